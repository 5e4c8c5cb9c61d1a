//! How demand on a route fares, and what prefetch may therefore have in flight. Pure but for its
//! memory, which all cores share.
//!
//! Demand's small requests are timed from their wish to their last byte and compared with the best
//! of late. When they take noticeably longer somebody stands in their way: prefetch's budget is
//! halved, down to one short request at a time. While they do not it grows, and when nobody has
//! asked for anything for a while it is unbounded but for `PREFETCH_BUDGET_MAX_BYTES`. Two cores
//! that update one word at once lose a step, nothing else.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::{
    PACE_QUIET_NS, PACE_SLACK_NS, PREFETCH_BUDGET_MAX_BYTES, PREFETCH_BUDGET_MIN_BYTES,
    PREFETCH_BUDGET_STEP_BYTES,
};

/// The best time is forgotten by a 256th at each request, so that a route may become slower.
const DRIFT: u64 = 256;

/// The pace of one route.
#[derive(Debug)]
pub struct Pace {
    best_ns: AtomicU64,
    demanded_ns: AtomicU64,
    budget_bytes: AtomicU64,
    flying_bytes: AtomicU64,
}

impl Default for Pace {
    fn default() -> Self {
        Pace {
            best_ns: AtomicU64::new(u64::MAX / 2),
            demanded_ns: AtomicU64::new(0),
            budget_bytes: AtomicU64::new(PREFETCH_BUDGET_MAX_BYTES),
            flying_bytes: AtomicU64::new(0),
        }
    }
}

impl Pace {
    /// Somebody waits for something.
    pub fn demanded(&self, now_ns: u64) {
        self.demanded_ns.store(now_ns, Ordering::Relaxed);
    }

    /// A small request of demand took so long.
    pub fn measured(&self, took_ns: u64) {
        let best_ns = self.best_ns.load(Ordering::Relaxed);
        let next_ns = took_ns.min(best_ns + best_ns / DRIFT);
        self.best_ns.store(next_ns, Ordering::Relaxed);
        let budget = self.budget_bytes.load(Ordering::Relaxed);
        let is_late = took_ns > best_ns.saturating_add(best_ns / 2 + PACE_SLACK_NS);
        let next = if is_late { budget / 2 } else { budget + PREFETCH_BUDGET_STEP_BYTES };
        let bounds = (PREFETCH_BUDGET_MIN_BYTES, PREFETCH_BUDGET_MAX_BYTES);
        self.budget_bytes.store(next.clamp(bounds.0, bounds.1), Ordering::Relaxed);
    }

    /// How many bytes more prefetch may have in flight now.
    pub fn allowance(&self, now_ns: u64) -> u64 {
        let demanded_ns = self.demanded_ns.load(Ordering::Relaxed);
        let is_quiet = now_ns.saturating_sub(demanded_ns) > PACE_QUIET_NS;
        let budget = match is_quiet {
            true => PREFETCH_BUDGET_MAX_BYTES,
            false => self.budget_bytes.load(Ordering::Relaxed),
        };
        budget.saturating_sub(self.flying_bytes.load(Ordering::Relaxed))
    }

    /// Prefetch has begun to fetch so many bytes.
    pub fn took_off(&self, bytes: u64) {
        self.flying_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Prefetch has ended a fetch of so many bytes.
    pub fn landed(&self, bytes: u64) {
        self.flying_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST_NS: u64 = 5_000_000;
    const LATE_NS: u64 = 20_000_000;

    fn pressed() -> Pace {
        let pace = Pace::default();
        pace.demanded(1);
        pace.measured(FAST_NS);
        (0..20).for_each(|_| pace.measured(LATE_NS));
        pace
    }

    #[test]
    fn late_demand_leaves_prefetch_one_short_request() {
        let pace = pressed();
        assert_eq!(pace.allowance(2), PREFETCH_BUDGET_MIN_BYTES);
        pace.took_off(PREFETCH_BUDGET_MIN_BYTES);
        assert_eq!(pace.allowance(2), 0);
        pace.landed(PREFETCH_BUDGET_MIN_BYTES);
        assert_eq!(pace.allowance(2), PREFETCH_BUDGET_MIN_BYTES);
    }

    #[test]
    fn the_budget_grows_while_demand_is_as_fast_as_ever() {
        let pace = pressed();
        (0..3).for_each(|_| pace.measured(FAST_NS));
        let grown = PREFETCH_BUDGET_MIN_BYTES + 3 * PREFETCH_BUDGET_STEP_BYTES;
        assert_eq!(pace.allowance(2), grown);
    }

    #[test]
    fn nobody_asking_leaves_prefetch_everything() {
        assert_eq!(pressed().allowance(2 + PACE_QUIET_NS), PREFETCH_BUDGET_MAX_BYTES);
    }

    #[test]
    fn a_route_that_becomes_slower_is_not_late_for_ever() {
        let pace = pressed();
        (0..1000).for_each(|_| pace.measured(LATE_NS));
        assert_eq!(pace.allowance(2), PREFETCH_BUDGET_MAX_BYTES);
    }
}
