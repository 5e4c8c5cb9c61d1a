//! How long an answer's first byte is awaited before the request is sent once more, on another
//! connection. Pure but for its memory, which belongs to one line of one core.
//!
//! One request in a hundred may meet a lost packet or a server that has something else to do, and
//! its reader then waits a hundred times longer than the others. So an answer that is much later
//! than answers of late is given up and asked for again, once. That must not double the load of a
//! server that has become slow for everybody: repeating is paid for by answers that came, a few in
//! a hundred, and what is usual follows what is measured.

use std::cell::Cell;

use crate::config::{PATIENCE_ANSWERS_PER_REPEAT, PATIENCE_NS_MIN, PATIENCE_REPEATS_SAVED_MAX};

/// The memory of a line.
#[derive(Debug, Default)]
pub struct Patience {
    /// From the request to the first byte of the answer, of late.
    usual_ns: Cell<u64>,
    /// How far single answers are from it.
    spread_ns: Cell<u64>,
    /// Answers that no repetition has used up.
    saved: Cell<u32>,
}

impl Patience {
    /// An answer has come after so long.
    pub fn learn(&self, took_ns: u64) {
        let saved_max = PATIENCE_REPEATS_SAVED_MAX * PATIENCE_ANSWERS_PER_REPEAT;
        self.saved.set((self.saved.get() + 1).min(saved_max));
        let (usual_ns, spread_ns) = match self.usual_ns.get() {
            0 => (took_ns, took_ns / 2),
            usual_ns => (usual_ns, self.spread_ns.get()),
        };
        // As TCP estimates its round trips: an eighth and a quarter of what is new.
        let off_ns = took_ns.abs_diff(usual_ns);
        self.usual_ns.set(usual_ns - usual_ns / 8 + took_ns / 8);
        self.spread_ns.set(spread_ns - spread_ns / 4 + off_ns / 4);
    }

    /// How long to wait for the next answer; none while repeating has not been earned.
    pub fn limit_ns(&self) -> Option<u64> {
        let is_earned = self.saved.get() >= PATIENCE_ANSWERS_PER_REPEAT;
        let (usual_ns, spread_ns) = (self.usual_ns.get(), self.spread_ns.get());
        let late_ns = usual_ns.saturating_mul(3).max(usual_ns + spread_ns.saturating_mul(8));
        is_earned.then(|| late_ns.max(PATIENCE_NS_MIN))
    }

    /// A request is repeated.
    pub fn spend(&self) {
        self.saved.set(self.saved.get().saturating_sub(PATIENCE_ANSWERS_PER_REPEAT));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MILLISECOND_NS;

    fn after(answers: u32, took_ns: u64) -> Patience {
        let patience = Patience::default();
        (0..answers).for_each(|_| patience.learn(took_ns));
        patience
    }

    #[test]
    fn nothing_is_late_before_enough_is_known() {
        assert_eq!(after(PATIENCE_ANSWERS_PER_REPEAT - 1, MILLISECOND_NS).limit_ns(), None);
        assert_eq!(
            after(PATIENCE_ANSWERS_PER_REPEAT, MILLISECOND_NS).limit_ns(),
            Some(PATIENCE_NS_MIN)
        );
    }

    #[test]
    fn far_and_scattered_answers_are_given_their_time() {
        let far_ns = 200 * MILLISECOND_NS;
        let limit_ns = after(200, far_ns).limit_ns().unwrap();
        assert!((3 * far_ns - far_ns / 8..=3 * far_ns).contains(&limit_ns), "{limit_ns}");
        let scattered = after(PATIENCE_ANSWERS_PER_REPEAT, far_ns);
        (0..100).for_each(|at| scattered.learn(far_ns + (at % 2) * far_ns));
        assert!(scattered.limit_ns().unwrap() > 4 * far_ns);
    }

    #[test]
    fn repeating_is_earned_by_answers() {
        let patience = after(10_000, MILLISECOND_NS);
        for _ in 0..PATIENCE_REPEATS_SAVED_MAX {
            assert!(patience.limit_ns().is_some());
            patience.spend();
        }
        assert_eq!(patience.limit_ns(), None);
        (1..PATIENCE_ANSWERS_PER_REPEAT).for_each(|_| patience.learn(MILLISECOND_NS));
        assert_eq!(patience.limit_ns(), None);
        patience.learn(MILLISECOND_NS);
        assert!(patience.limit_ns().is_some());
    }

    #[test]
    fn a_server_that_becomes_slow_is_not_late_for_long() {
        let patience = after(100, MILLISECOND_NS);
        let slow_ns = 500 * MILLISECOND_NS;
        let late = (0..20).filter(|_| {
            let is_late = patience.limit_ns().is_some_and(|limit_ns| limit_ns < slow_ns);
            patience.learn(slow_ns);
            is_late
        });
        assert_eq!(late.count(), 1);
    }
}
