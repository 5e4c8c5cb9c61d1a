//! The images of a restart that are still to come back: those somebody waits for first, and what
//! failed and may heal once more after a pause.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::remember::Record;
use crate::config::RESTORE_PAUSES_MS;

/// An image on its way back.
#[derive(Debug)]
pub struct Comeback {
    /// What is remembered of it.
    pub record: Record,
    /// Whether this restart has registered it, and only its mounts were not to be had.
    pub is_registered: bool,
    tries: usize,
}

/// The images, for the threads that bring them back.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Mutex<Waiting>,
    closed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    ready: VecDeque<Comeback>,
    /// Not before these times.
    later: Vec<(Instant, Comeback)>,
    is_closed: bool,
}

impl Queue {
    /// All that are remembered.
    pub fn of(records: Vec<Record>) -> Arc<Queue> {
        let queue = Arc::<Queue>::default();
        let fresh = |record| Comeback { record, is_registered: false, tries: 0 };
        queue.lock().ready = records.into_iter().map(fresh).collect();
        queue
    }

    /// The next image, of the domain that `urgent` names if there is one. Waits for those that are
    /// tried again; none when there is nothing to wait for.
    pub fn next(&self, urgent: impl Fn() -> Option<String>) -> Option<Comeback> {
        let mut waiting = self.lock();
        loop {
            let is_it = |domain: &String| {
                waiting.ready.iter().position(|comeback| comeback.record.domain_id == *domain)
            };
            let at = urgent().as_ref().and_then(is_it).unwrap_or(0);
            if let Some(comeback) = waiting.ready.remove(at) {
                return Some(comeback);
            }
            let soonest = (0..waiting.later.len()).min_by_key(|&at| waiting.later[at].0)?;
            let pause = waiting.later[soonest].0.saturating_duration_since(Instant::now());
            if pause.is_zero() {
                return Some(waiting.later.swap_remove(soonest).1);
            }
            let woken = self.closed.wait_timeout(waiting, pause);
            waiting = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// One that failed is to be tried again after a pause. False when it was tried often enough.
    pub fn again(&self, comeback: Comeback) -> bool {
        let mut waiting = self.lock();
        let Some(pause_ms) = RESTORE_PAUSES_MS.get(comeback.tries) else { return false };
        if waiting.is_closed {
            return false;
        }
        let (when, tries) = (Instant::now() + Duration::from_millis(*pause_ms), comeback.tries + 1);
        waiting.later.push((when, Comeback { tries, ..comeback }));
        true
    }

    /// Nobody is brought back any more.
    pub fn close(&self) {
        *self.lock() = Waiting { is_closed: true, ..Waiting::default() };
        self.closed.notify_all();
    }

    /// Nothing in here panics half-way through a change.
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
