//! Which source of a route is asked first, and which is left out for now.
//!
//! Pure; one per route and core, times are passed in. Sources stand in the order of their
//! preference: mirrors as configured, then the proxy, the origin last. A source that failed
//! `failure_limit` times in a row is out until its interval has passed (then one request tries it
//! again) or a ping finds it well. Below the limit a failure moves a source behind the others for a
//! moment, so that the next try of the same bytes goes elsewhere. One whose bytes were wrong is
//! behind the others for longer, however well it answers. The last source is never out: somebody
//! must be asked, and an outage must end by itself. But one that asks to be left alone for a while
//! (Retry-After) is, even the last, up to a limit.

use crate::config as limits;

/// The health of the sources of one route.
#[derive(Clone, Debug)]
pub struct Health {
    sources: Vec<Source>,
}

/// What is known about one source.
#[derive(Clone, Debug)]
struct Source {
    failure_limit: u32,
    interval_ns: u64,
    failures: u32,
    /// No request before this time, when the limit is reached.
    out_until_ns: u64,
    /// Tried after the others until this time.
    suspect_until_ns: u64,
    /// The same, because its bytes were wrong: no success ends it.
    distrusted_until_ns: u64,
    /// It has asked not to be asked before this time.
    rests_until_ns: u64,
    next_ping_ns: u64,
}

impl Health {
    /// All well. Each source has its failure limit and its check interval; at least one.
    pub fn new(sources: impl Iterator<Item = (u32, u64)>) -> Self {
        let sources: Vec<Source> = sources
            .map(|(failure_limit, interval_ns)| Source {
                failure_limit,
                interval_ns,
                failures: 0,
                out_until_ns: 0,
                suspect_until_ns: 0,
                distrusted_until_ns: 0,
                rests_until_ns: 0,
                next_ping_ns: 0,
            })
            .collect();
        assert!((1..=32).contains(&sources.len()), "a route has its origin and few mirrors");
        Health { sources }
    }

    /// The source to try at `now_ns`, when those in the set `tried` have been: well sources in
    /// their order, then suspect ones in theirs; `None` when the round is over. One that rests is
    /// not tried, whichever it is.
    ///
    /// With sources 0 (out), 1 (suspect) and 2 (well), the tries of a round go to 2, then 1.
    pub fn pick(&self, tried: u32, now_ns: u64) -> Option<usize> {
        let is_left = |index: &usize| tried & (1 << index) == 0;
        let is_awake = |index: &usize| self.sources[*index].rests_until_ns <= now_ns;
        let mut left = self.usable(now_ns).filter(is_left).filter(is_awake);
        let first = left.next()?;
        let well =
            std::iter::once(first).chain(left).find(|index| !self.is_suspect(*index, now_ns));
        Some(well.unwrap_or(first))
    }

    /// A request is about to try a source. One that has failed is thereby kept from others for a
    /// while: one request finds out whether it is back, the rest do not wait for it.
    pub fn begin(&mut self, index: usize, now_ns: u64) {
        let source = &mut self.sources[index];
        if source.failures > 0 {
            source.suspect_until_ns = now_ns + limits::REGISTRY_SUSPECT_NS;
        }
        if source.failures >= source.failure_limit {
            source.out_until_ns = now_ns.saturating_add(source.interval_ns);
        }
    }

    /// How many sources a round may have.
    pub fn usable_count(&self, now_ns: u64) -> usize {
        self.usable(now_ns).count()
    }

    /// A request to the source failed in a way another source may not.
    pub fn failed(&mut self, index: usize, now_ns: u64) {
        let source = &mut self.sources[index];
        source.failures = source.failures.saturating_add(1);
        source.suspect_until_ns = now_ns + limits::REGISTRY_SUSPECT_NS;
        if source.failures >= source.failure_limit {
            source.out_until_ns = now_ns.saturating_add(source.interval_ns);
        }
    }

    /// The source's bytes were not what their digest says.
    pub fn lied(&mut self, index: usize, now_ns: u64) {
        self.sources[index].distrusted_until_ns = now_ns + limits::REGISTRY_DISTRUST_NS;
    }

    /// The source has asked, with Retry-After, not to be asked for so long. No success ends it: the
    /// answer may be to a request that was made before.
    pub fn rests(&mut self, index: usize, now_ns: u64, asked_ns: u64) {
        let source = &mut self.sources[index];
        let until_ns = now_ns + asked_ns.min(limits::REGISTRY_REST_NS_MAX);
        source.rests_until_ns = source.rests_until_ns.max(until_ns);
    }

    /// When the first of the sources that a round may have can be asked: in the past, mostly.
    pub fn awake_ns(&self, now_ns: u64) -> u64 {
        let rests = self.usable(now_ns).map(|index| self.sources[index].rests_until_ns);
        rests.min().expect("the last source is always usable")
    }

    /// A request or a ping succeeded.
    pub fn succeeded(&mut self, index: usize) {
        let source = &mut self.sources[index];
        source.failures = 0;
        source.out_until_ns = 0;
        source.suspect_until_ns = 0;
    }

    /// Whether a ping is due; counts it as sent.
    pub fn ping_due(&mut self, index: usize, now_ns: u64) -> bool {
        let source = &mut self.sources[index];
        let is_due = source.next_ping_ns <= now_ns;
        if is_due {
            source.next_ping_ns = now_ns.saturating_add(source.interval_ns);
        }
        is_due
    }

    /// A ping failed: the source is out until the next one.
    pub fn ping_failed(&mut self, index: usize, now_ns: u64) {
        let source = &mut self.sources[index];
        source.failures = source.failures.max(source.failure_limit);
        source.out_until_ns = now_ns.saturating_add(source.interval_ns.saturating_mul(2));
    }

    /// Whether the source has failed since it last succeeded.
    pub fn is_troubled(&self, index: usize) -> bool {
        self.sources[index].failures > 0
    }

    fn usable(&self, now_ns: u64) -> impl Iterator<Item = usize> + '_ {
        let last = self.sources.len() - 1;
        (0..self.sources.len())
            .filter(move |index| *index == last || self.sources[*index].out_until_ns <= now_ns)
    }

    fn is_suspect(&self, index: usize, now_ns: u64) -> bool {
        let source = &self.sources[index];
        source.suspect_until_ns.max(source.distrusted_until_ns) > now_ns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = limits::SECOND_NS;

    fn three() -> Health {
        Health::new([(2, 5 * SECOND), (2, 5 * SECOND), (1, 5 * SECOND)].into_iter())
    }

    fn round(health: &Health, now_ns: u64) -> Vec<usize> {
        let mut tried = 0;
        let next = || {
            let index = health.pick(tried, now_ns)?;
            tried |= 1 << index;
            Some(index)
        };
        std::iter::from_fn(next).collect()
    }

    #[test]
    fn mirrors_go_first_and_the_origin_last() {
        let health = three();
        assert_eq!(round(&health, 0), [0, 1, 2]);
        assert_eq!(health.usable_count(0), 3);
    }

    #[test]
    fn a_failure_moves_a_source_back_for_a_moment() {
        let mut health = three();
        health.failed(0, 0);
        assert_eq!(round(&health, 1), [1, 2, 0]);
        assert_eq!(round(&health, 2 * SECOND), [0, 1, 2]);
    }

    #[test]
    fn one_that_lied_stays_behind_the_others_although_it_answers() {
        let mut health = three();
        health.lied(0, 0);
        health.succeeded(0);
        assert_eq!(round(&health, 2 * SECOND), [1, 2, 0]);
        assert_eq!(round(&health, limits::REGISTRY_DISTRUST_NS), [0, 1, 2]);
    }

    #[test]
    fn a_source_at_its_limit_is_out_until_its_interval_passed_or_it_answers() {
        let mut health = three();
        health.failed(0, 0);
        health.failed(0, 0);
        assert_eq!(round(&health, 1), [1, 2]);
        assert_eq!(round(&health, 5 * SECOND), [0, 1, 2]);
        health.failed(0, 5 * SECOND);
        assert_eq!(round(&health, 6 * SECOND), [1, 2], "one failed trial is enough");
        health.succeeded(0);
        assert_eq!(round(&health, 6 * SECOND), [0, 1, 2]);
        assert!(!health.is_troubled(0));
    }

    #[test]
    fn one_that_asks_to_be_left_alone_is_though_it_be_the_last_but_not_for_ever() {
        let mut health = three();
        health.rests(0, 0, 10 * SECOND);
        health.rests(0, 0, SECOND);
        health.succeeded(0);
        assert_eq!(round(&health, SECOND), [1, 2], "what was asked first still counts");
        assert_eq!(health.awake_ns(SECOND), 0);
        (1..3).for_each(|index| health.rests(index, 0, u64::MAX));
        assert!(round(&health, SECOND).is_empty());
        assert_eq!(health.awake_ns(SECOND), 10 * SECOND);
        assert_eq!(round(&health, 10 * SECOND), [0]);
        assert_eq!(round(&health, limits::REGISTRY_REST_NS_MAX), [0, 1, 2]);
    }

    #[test]
    fn one_request_finds_out_whether_a_source_is_back() {
        let mut health = three();
        health.failed(0, 0);
        health.failed(0, 0);
        assert_eq!(health.pick(0, 5 * SECOND), Some(0));
        health.begin(0, 5 * SECOND);
        assert_eq!(round(&health, 5 * SECOND), [1, 2]);
        assert_eq!(round(&health, 9 * SECOND), [1, 2], "until the one knows");
        health.begin(1, 5 * SECOND);
        assert_eq!(health.pick(0, 5 * SECOND), Some(1), "a well source is for everybody");
    }

    #[test]
    fn the_origin_is_never_out() {
        let mut health = three();
        for _ in 0..9 {
            (0..3).for_each(|index| health.failed(index, 0));
        }
        assert_eq!(round(&health, 1), [2]);
    }

    #[test]
    fn pings_are_due_once_per_interval_and_put_a_source_out() {
        let mut health = three();
        assert!(health.ping_due(0, SECOND));
        assert!(!health.ping_due(0, 2 * SECOND));
        assert!(health.ping_due(0, 6 * SECOND));
        health.ping_failed(0, 6 * SECOND);
        assert_eq!(round(&health, 7 * SECOND), [1, 2]);
        assert_eq!(round(&health, 12 * SECOND), [1, 2], "stays out until the next ping");
    }
}
