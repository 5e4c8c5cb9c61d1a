//! The threads that do the control API's calls.
//!
//! Two kinds, so that calls that only look at memory never stand behind calls that wait for a disk.
//! A job that waited too long can be taken back, as long as no thread has begun it. Threads end
//! when the crew is dropped and their call, if any, returns; nobody waits longer than a bound for
//! that.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use nix::sys::eventfd::EventFd;

use super::api::Call;
use super::control::ControlPlane;
use super::reply::Response;
use crate::config::{
    CONTROL_CONNECTIONS_MAX, CONTROL_QUEUE_MAX, CONTROL_QUICK_THREADS, CONTROL_SLOW_THREADS,
};
use crate::error::{Error, Result};

/// Which connection an answer is for. A slot is used again, a ticket never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// The connection's slot.
    pub slot: usize,
    /// Which of the requests of this process.
    pub number: u64,
}

/// A call on its way to a thread. Whoever sets this first has it.
#[derive(Clone, Debug)]
pub struct Claim(Arc<AtomicBool>);

/// The threads and the way to them.
pub struct Crew {
    quick: Sender<Job>,
    slow: Sender<Job>,
    /// Disconnected when the last thread has ended.
    alive: Receiver<()>,
}

/// Answers on their way back, and the bell that says so.
pub struct Answers {
    /// The answers.
    pub receiver: Receiver<(Ticket, Response)>,
    /// Readable when there may be some.
    pub bell: Arc<EventFd>,
}

struct Job {
    ticket: Ticket,
    call: Call,
    claim: Claim,
}

impl Claim {
    /// Whether the caller is the first to ask.
    pub fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// Whether somebody has it.
    pub fn is_taken(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl Crew {
    /// Starts the threads.
    pub fn start(control: &Arc<ControlPlane>, bell: Arc<EventFd>) -> Result<(Crew, Answers)> {
        let (quick, quick_jobs) = crossbeam_channel::bounded(CONTROL_QUEUE_MAX);
        let (slow, slow_jobs) = crossbeam_channel::bounded(CONTROL_QUEUE_MAX);
        // Connections that ended leave answers behind, but each is taken out at the next bell.
        let (sender, receiver) =
            crossbeam_channel::bounded(CONTROL_CONNECTIONS_MAX + 2 * CONTROL_QUEUE_MAX);
        let (living, alive) = crossbeam_channel::bounded(0);
        let kinds = [
            ("api-quick", CONTROL_QUICK_THREADS, quick_jobs),
            ("api-slow", CONTROL_SLOW_THREADS, slow_jobs),
        ];
        for (name, count, jobs) in kinds {
            for _ in 0..count {
                let (jobs, control) = (jobs.clone(), control.clone());
                let (sender, bell, living) = (sender.clone(), bell.clone(), living.clone());
                let work = move || {
                    let _living: Sender<()> = living;
                    serve(&jobs, &control, &sender, &bell);
                };
                std::thread::Builder::new()
                    .name(name.into())
                    .spawn(work)
                    .map_err(|error| Error::io(&error, "cannot start a thread for the API"))?;
            }
        }
        Ok((Crew { quick, slow, alive }, Answers { receiver, bell }))
    }

    /// Queues a call; none when too many wait already. Never waits.
    pub fn give(&self, ticket: Ticket, call: Call) -> Option<Claim> {
        let claim = Claim(Arc::default());
        let queue = if call.may_wait() { &self.slow } else { &self.quick };
        queue.try_send(Job { ticket, call, claim: claim.clone() }).ok().map(|()| claim)
    }

    /// Lets the threads end; true when all have within the time.
    pub fn end(self, wait: Duration) -> bool {
        drop((self.quick, self.slow));
        let ended = self.alive.recv_timeout(wait);
        ended == Err(crossbeam_channel::RecvTimeoutError::Disconnected)
    }
}

fn serve(
    jobs: &Receiver<Job>,
    control: &ControlPlane,
    answers: &Sender<(Ticket, Response)>,
    bell: &EventFd,
) {
    for job in jobs {
        if job.claim.take() {
            let response = control.perform(job.call);
            // The server may be gone; then nobody waits for the answer.
            if answers.send((job.ticket, response)).is_err() {
                return;
            }
            let _ = bell.write(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::control::Hooks;
    use crate::daemon::control_tests::control;
    use nix::sys::eventfd::EfdFlags;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn more_calls_than_may_wait_are_refused_and_the_other_kind_goes_on() {
        let (report, reports) = crossbeam_channel::unbounded();
        let (release, wait) = crossbeam_channel::unbounded::<()>();
        let send_fd: crate::daemon::control::Act = Box::new(move || {
            let _ = report.send(());
            let _ = wait.recv();
            Ok(())
        });
        let mut control = control(Hooks { send_fd, ..Hooks::idle() });
        control.identity.supervisor = Some("/s.sock".into());
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
        let (crew, answers) = Crew::start(&Arc::new(control), Arc::new(bell)).unwrap();
        let ticket = |number| Ticket { slot: 0, number };
        for number in 0..CONTROL_SLOW_THREADS as u64 {
            assert!(crew.give(ticket(number), Call::SendFd).is_some());
            reports.recv_timeout(PATIENCE).unwrap();
        }
        let waiting: Vec<_> =
            (0..CONTROL_QUEUE_MAX).filter_map(|_| crew.give(ticket(1000), Call::SendFd)).collect();
        assert_eq!(waiting.len(), CONTROL_QUEUE_MAX);
        assert!(crew.give(ticket(2000), Call::SendFd).is_none());
        assert!(crew.give(ticket(3000), Call::Daemon).is_some());
        let (answered, response) = answers.receiver.recv_timeout(PATIENCE).unwrap();
        assert_eq!((answered, response.status), (ticket(3000), 200));
        // Taken back, the waiting ones are never done.
        assert!(waiting.iter().all(Claim::take));
        drop(release);
        assert!(crew.end(PATIENCE));
        assert_eq!(answers.receiver.try_iter().count(), CONTROL_SLOW_THREADS);
    }

    #[test]
    fn a_call_that_does_not_end_is_left_behind() {
        let (_release, wait) = crossbeam_channel::unbounded::<()>();
        let start: crate::daemon::control::Act = Box::new(move || {
            let _ = wait.recv();
            Ok(())
        });
        let control = control(Hooks { takeover: start, ..Hooks::idle() });
        let control = ControlPlane { state: Arc::default(), ..control };
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
        let (crew, _answers) = Crew::start(&Arc::new(control), Arc::new(bell)).unwrap();
        let claim = crew.give(Ticket { slot: 0, number: 0 }, Call::Takeover).unwrap();
        while !claim.is_taken() {
            std::thread::yield_now();
        }
        assert!(!crew.end(Duration::from_millis(1)));
    }
}
