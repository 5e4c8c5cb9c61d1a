//! Helper threads for work that blocks or takes long: names, bootstraps, large chunks.
//!
//! A job is a closure that owns what it works on; its result comes back to the task that waits,
//! and the core is woken through its bell. In the simulated world jobs run at once, in place. A
//! job whose waiter has gone runs to its end and its result is dropped.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::thread::JoinHandle;

use super::Core;
use super::mesh::Wake;
use crate::config::HELPER_QUEUE;
use crate::error::{Error, Result};

type Job = Box<dyn FnOnce() + Send>;

/// A process's helper threads. They end when the last handle is dropped.
pub struct Helpers {
    jobs: Option<crossbeam_channel::Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Helpers {
    /// Starts so many threads.
    pub fn start(thread_count: usize) -> Result<Arc<Helpers>> {
        let (sender, receiver) = crossbeam_channel::bounded::<Job>(HELPER_QUEUE);
        let mut helpers = Helpers { jobs: Some(sender), threads: Vec::new() };
        for index in 0..thread_count {
            let receiver = receiver.clone();
            let thread = std::thread::Builder::new()
                .name(format!("helper-{index}"))
                .spawn(move || receiver.iter().for_each(|job| job()))
                .map_err(|error| Error::io(&error, "cannot start a helper thread"))?;
            helpers.threads.push(thread);
        }
        Ok(Arc::new(helpers))
    }

    fn run(&self, job: Job) -> std::result::Result<(), Job> {
        let jobs = self.jobs.as_ref().expect("present until drop");
        jobs.try_send(job).map_err(|error| error.into_inner())
    }
}

impl Drop for Helpers {
    fn drop(&mut self) {
        self.jobs = None;
        let me = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last handle may be dropped by a job; a thread cannot wait for itself.
            if thread.thread().id() != me {
                let _ = thread.join();
            }
        }
    }
}

/// Where the result of a job is left: `None` until it has ended, then `Err` if it panicked.
type Outcome<T> = Arc<Mutex<Option<std::thread::Result<T>>>>;

/// Waits for a job.
#[must_use = "a future does nothing until awaited"]
pub struct Offload<T> {
    core: Core,
    outcome: Outcome<T>,
}

impl<T: Send + 'static> Offload<T> {
    pub(super) fn start(
        core: &Core,
        helpers: Option<&Helpers>,
        wake: &Arc<Wake>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Self {
        let outcome: Outcome<T> = Arc::new(Mutex::new(None));
        let (place, wake) = (Arc::clone(&outcome), Arc::clone(wake));
        let job: Job = Box::new(move || {
            // The panic goes on in the task that waits, where it can be attributed.
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            *place.lock().expect("nobody panics while holding it") = Some(result);
            wake.ring();
        });
        let refused = match helpers {
            Some(helpers) => helpers.run(job),
            None => Err(job),
        };
        if let Err(job) = refused {
            // No helpers (simulation) or their queue is full: slower here, never lost.
            job();
        }
        Offload { core: core.clone(), outcome }
    }
}

impl<T> Future for Offload<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<T> {
        let finished = self.outcome.lock().expect("nobody panics while holding it").take();
        match finished {
            Some(Ok(value)) => Poll::Ready(value),
            Some(Err(panic)) => std::panic::resume_unwind(panic),
            None => {
                self.core.wait_for_mail();
                Poll::Pending
            }
        }
    }
}
