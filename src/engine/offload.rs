//! Helper threads for work that takes long (bootstraps, large chunks), and others for questions to
//! the rest of the machine (names, credentials), which may stay without an answer.
//!
//! A job is a closure that owns what it works on; its result comes back to the task that waits,
//! and the core is woken through its bell. In the simulated world jobs run at once, in place. A
//! job whose waiter has gone runs to its end and its result is dropped. At the end of the process
//! what has not begun is dropped, work that has begun is waited for, and questions are not.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use super::Core;
use super::mesh::Wake;
use crate::config::{ASKER_QUEUE, ASKER_THREADS, HELPER_QUEUE};
use crate::error::{Error, Result};

/// What waits in the queue: a place with its work.
type Job = Arc<dyn Run>;

trait Run: Send + Sync {
    /// Does the work and tells who waits.
    fn run(&self);
}

/// A process's helper threads. They end when the last handle is dropped.
pub struct Helpers {
    work: Pool,
    questions: Pool,
}

/// A queue and the threads that take from it.
struct Pool {
    jobs: Option<crossbeam_channel::Sender<Job>>,
    /// The threads' end of the queue, to drop what is left in it.
    queue: crossbeam_channel::Receiver<Job>,
    threads: Vec<JoinHandle<()>>,
}

impl Helpers {
    /// Starts so many threads for work, and those for questions.
    pub fn start(thread_count: usize) -> Result<Arc<Helpers>> {
        let work = Pool::start("helper", thread_count, HELPER_QUEUE)?;
        let questions = Pool::start("asker", ASKER_THREADS, ASKER_QUEUE)?;
        Ok(Arc::new(Helpers { work, questions }))
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.questions.close();
        self.work.close();
        let me = std::thread::current().id();
        for thread in self.work.threads.drain(..) {
            // The last handle may be dropped by a job; a thread cannot wait for itself.
            if thread.thread().id() != me {
                let _ = thread.join();
            }
        }
    }
}

impl Pool {
    fn start(name: &str, thread_count: usize, queue_length: usize) -> Result<Pool> {
        let (jobs, queue) = crossbeam_channel::bounded::<Job>(queue_length);
        let mut pool = Pool { jobs: Some(jobs), queue, threads: Vec::new() };
        for index in 0..thread_count {
            let queue = pool.queue.clone();
            let thread = std::thread::Builder::new()
                .name(format!("{name}-{index}"))
                .spawn(move || queue.iter().for_each(|job| job.run()))
                .map_err(|error| Error::io(&error, "cannot start a helper thread"))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// False if the queue is full.
    fn take(&self, job: Job) -> bool {
        let jobs = self.jobs.as_ref().expect("present until drop");
        jobs.try_send(job).is_ok()
    }

    /// Nothing comes any more, and what has not begun is not begun.
    fn close(&mut self) {
        self.jobs = None;
        self.queue.try_iter().for_each(drop);
    }
}

/// One job and what it works on.
struct Place<I, O> {
    work: fn(I) -> O,
    wake: Arc<Wake>,
    state: Mutex<State<I, O>>,
}

enum State<I, O> {
    /// Nothing is to be done, or is being done.
    Empty,
    Asked(I),
    /// `Err` if the work panicked.
    Answered(std::thread::Result<O>),
}

impl<I, O> Place<I, O> {
    fn exchange(&self, state: State<I, O>) -> State<I, O> {
        std::mem::replace(&mut *self.state.lock().expect("nobody panics while holding it"), state)
    }
}

impl<I: Send, O: Send> Run for Place<I, O> {
    fn run(&self) {
        let State::Asked(input) = self.exchange(State::Empty) else { return };
        // The panic goes on in the task that waits, where it can be attributed.
        let work = std::panic::AssertUnwindSafe(|| (self.work)(input));
        self.exchange(State::Answered(std::panic::catch_unwind(work)));
        self.wake.ring();
    }
}

/// Work that is given to helper threads again and again: nothing is allocated each time.
pub struct Errand<I, O> {
    core: Core,
    place: Arc<Place<I, O>>,
}

impl<I: Send + 'static, O: Send + 'static> Errand<I, O> {
    /// For the tasks of one core.
    pub fn new(core: &Core, work: fn(I) -> O) -> Self {
        let (wake, state) = (Arc::clone(core.wake()), Mutex::new(State::Empty));
        Errand { core: core.clone(), place: Arc::new(Place { work, wake, state }) }
    }

    /// Has the work done on `input`. One at a time: whoever stops waiting throws the errand away.
    pub fn run(&self, input: I) -> Offload<I, O> {
        self.place.exchange(State::Asked(input));
        let job: Job = Arc::<Place<I, O>>::clone(&self.place);
        let is_taken = self.core.helpers().is_some_and(|helpers| helpers.work.take(job));
        if !is_taken {
            // No helpers (simulation) or their queue is full: slower here, never lost.
            self.place.run();
        }
        Offload { core: self.core.clone(), place: Arc::clone(&self.place) }
    }

    /// The same for work that may never end: on the threads for that, and never on the core.
    ///
    /// # Errors
    /// Too many such wait.
    pub fn ask(&self, input: I) -> Result<Offload<I, O>> {
        self.place.exchange(State::Asked(input));
        let job: Job = Arc::<Place<I, O>>::clone(&self.place);
        match self.core.helpers() {
            None => self.place.run(),
            Some(helpers) if helpers.questions.take(job) => {}
            Some(_) => {
                let text = "too many names and credentials wait for an answer; look at the \
                            resolver and the credential helpers";
                return Err(Error::unavailable(text));
            }
        }
        Ok(Offload { core: self.core.clone(), place: Arc::clone(&self.place) })
    }
}

/// Waits for a job.
#[must_use = "a future does nothing until awaited"]
pub struct Offload<I, O> {
    core: Core,
    place: Arc<Place<I, O>>,
}

impl<I, O> Future for Offload<I, O> {
    type Output = O;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<O> {
        let mut state = self.place.state.lock().expect("nobody panics while holding it");
        if !matches!(*state, State::Answered(_)) {
            drop(state);
            self.core.wait_for_mail();
            return Poll::Pending;
        }
        match std::mem::replace(&mut *state, State::Empty) {
            State::Answered(Err(panic)) => {
                drop(state);
                std::panic::resume_unwind(panic)
            }
            State::Answered(Ok(output)) => Poll::Ready(output),
            State::Empty | State::Asked(_) => unreachable!("it was looked at under the lock"),
        }
    }
}
