//! The one link that answers share when a rule says so (`link_bytes_per_second`).
//!
//! Owns the time at which the link is free again. Whoever sends asks first, and waits until its
//! bytes would have come through: two answers at once take as long as one after the other.

use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

/// A real link has a queue that keeps it busy while its senders sleep a little too long. At 200
/// Mbit/s a piece of 16 KiB takes 0.66 ms, and a sleep ends 0.06 ms late: a tenth would be lost.
const QUEUE: Duration = Duration::from_millis(2);

pub struct Link {
    free_at: Mutex<Instant>,
}

impl Default for Link {
    fn default() -> Self {
        Link { free_at: Mutex::new(Instant::now()) }
    }
}

impl Link {
    /// Waits until the link has carried so many bytes behind all those before.
    pub fn carry(&self, bytes: usize, bytes_per_second: u64) {
        let taken = Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64);
        let until = {
            let mut free_at = self.free_at.lock().expect("nothing panics while it holds the link");
            let queued = Instant::now().checked_sub(QUEUE);
            *free_at = queued.map_or(*free_at, |queued| queued.max(*free_at)) + taken;
            *free_at
        };
        thread::sleep(until.saturating_duration_since(Instant::now()));
    }
}
