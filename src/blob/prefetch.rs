//! Prefetch: what an image's starts are known to need, for every image, and whole blobs for images
//! that ask for it.
//!
//! What a start needs comes first, of all blobs that wait: the blob an optimised image has for it,
//! and what earlier starts on this node touched. Then comes what the image's builder listed, of
//! all blobs, then the rest of each. One
//! task per core walks one blob at a time in that order, keeps a few runs in the read-ahead queue
//! and no more, pauses while readers wait on this core, keeps to the image's bandwidth, and has no
//! more in flight than the route's readers leave it (`registry/pace.rs`). A blob that has to wait
//! for its bandwidth, or for a registry that gives nothing, lets the others go first.
//! It goes through the same claims as everybody, so nothing is fetched twice.

use std::collections::VecDeque;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cache::Cache;
use super::crew::Crew;
use super::flight::Plan;
use super::journal::Level;
use super::latency::Cause;
use super::load::read_bootstrap;
use super::open::OpenBlob;
use super::statistics::Counter;
use crate::config::{
    GET_MAX_BYTES, MILLISECOND_NS, PREFETCH_AHEAD, PREFETCH_BUDGET_MIN_BYTES, PREFETCH_FORGIVEN_NS,
    PREFETCH_LAYOUT_NS, PREFETCH_PAUSE_NS, PREFETCH_STEP_MIN_BYTES, PREFETCH_TRIES,
    PREFETCH_TURN_NS, RECORDING_LOOK_NS, SECOND_NS,
};
use crate::engine::Lane;
use crate::error::Result;
use crate::image::layout::Layout;
use crate::image::prefetch::listed_ranges;

/// How long prefetch waits before it looks again whether it may go on.
const PAUSE_NS: u64 = 5 * MILLISECOND_NS;

/// A blob that waits to be prefetched.
pub(super) struct Wish {
    blob: Arc<OpenBlob>,
    part: Part,
    /// What of the part has not been asked for; `None` before anybody has looked.
    left: Option<VecDeque<Range<u64>>>,
    /// Not before this time.
    not_before_ns: u64,
    /// Looks that found that a fetch had failed, and the last of them.
    tries: u32,
    failed_ns: u64,
}

/// How a stay with a blob ended.
enum Outcome {
    /// The part is done.
    Done,
    /// Nothing more is to be done for the blob.
    Over,
    /// To be gone on with when others had their turn.
    Later,
}

/// What of a blob is prefetched next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// What a start needs.
    Start,
    /// What the image lists.
    Listed,
    /// Everything that is absent.
    Whole,
}

impl Part {
    /// What comes after it.
    fn next(self, blob: &OpenBlob) -> Option<Part> {
        match self {
            Part::Start if blob.image.prefetch.enable => Some(Part::Listed),
            Part::Listed => Some(Part::Whole),
            Part::Start | Part::Whole => None,
        }
    }
}

impl Crew {
    /// Has a blob fetched when those before it have been.
    pub fn prefetch_later(&self, blob: Arc<OpenBlob>) {
        let part = Part::Start;
        let wish = Wish { blob, part, left: None, not_before_ns: 0, tries: 0, failed_ns: 0 };
        if let Err(wish) = self.prefetch.push(&self.core, wish) {
            let text = || format!("{}: too many prefetches wait; skipped", wish.blob.name());
            self.parts.journal.write(Level::Warn, text);
        }
    }

    /// Takes blobs from the prefetch queue, for ever.
    pub(super) async fn prefetch_all(self: &Rc<Self>) {
        loop {
            let mut next = Some(self.prefetch.pop(&self.core, |_| true).await);
            while let Some(mut wish) = next.take() {
                let outcome = if self.core.now() < wish.not_before_ns {
                    let pause_ns =
                        if self.prefetch.is_empty() { PREFETCH_TURN_NS } else { PAUSE_NS };
                    // A sleep ends by its time, whatever happens.
                    let _ = self.core.sleep(pause_ns).await;
                    Outcome::Later
                } else {
                    self.prefetch_part(&mut wish).await
                };
                match (outcome, wish.part.next(&wish.blob)) {
                    (Outcome::Later, _) => {}
                    (Outcome::Done, Some(part)) => (wish.part, wish.left) = (part, None),
                    (Outcome::Done, None) | (Outcome::Over, _) => continue,
                }
                // The blobs behind it go first, if there is room to wait.
                next = self.prefetch.push(&self.core, wish).err();
            }
        }
    }

    /// Waits until prefetch may go on; says for how many bytes at once. Nothing when it is the
    /// blob's route that stands still, and others wait that do not need it.
    async fn allowance(&self, blob: &OpenBlob) -> Option<u64> {
        let patience_ns = self.core.now() + PREFETCH_TURN_NS;
        loop {
            let allowed = blob.route.pace.allowance(self.core.now());
            let has_room = allowed >= PREFETCH_BUDGET_MIN_BYTES && self.has_few_queued(blob);
            if has_room && !self.is_demanded() || self.gate.is_closed() {
                return Some(allowed.max(PREFETCH_BUDGET_MIN_BYTES));
            }
            let is_elsewhere = |wish: &Wish| wish.blob.route.host != blob.route.host;
            let has_waited = self.core.now() >= patience_ns;
            if !has_room && has_waited && self.prefetch.any(is_elsewhere) {
                return None;
            }
            let _ = self.core.sleep(PAUSE_NS).await;
        }
    }

    /// Whether what somebody waits for could be taken by a fetcher. What waits for one of its own
    /// host, or of a registry that is away, is not helped by waiting for it.
    fn is_demanded(&self) -> bool {
        self.demand.any(|&id| self.may_take(id, Lane::Demand))
    }

    /// Whether few fetches of the blob's host wait for a fetcher; those of others are none of its
    /// business.
    fn has_few_queued(&self, blob: &OpenBlob) -> bool {
        let is_same = |plan: &Plan| plan.blob.route.host == blob.route.host;
        self.ahead.count(|&id| self.flights.matches(id, is_same)) < PREFETCH_AHEAD
    }

    /// Waits until the cache tells what it holds, so that it is not fetched again; says whether it
    /// does.
    async fn is_attached(&self, blob: &OpenBlob, deadline_ns: u64) -> bool {
        let Cache::Object { object, .. } = &blob.cache else { return true };
        while !object.is_attached(&self.core) {
            let is_over = blob.is_closed.load(Ordering::Relaxed) || self.gate.is_closed();
            if is_over || self.core.now() >= deadline_ns {
                return false;
            }
            let _ = self.core.sleep(PAUSE_NS).await;
        }
        true
    }

    /// Goes on with a part of a blob.
    async fn prefetch_part(self: &Rc<Self>, wish: &mut Wish) -> Outcome {
        let blob = Arc::clone(&wish.blob);
        let deadline_ns = self.core.now() + PREFETCH_LAYOUT_NS;
        if !self.is_attached(&blob, deadline_ns).await {
            return Outcome::Over;
        }
        if wish.left.is_none() {
            wish.left = Some(self.absent_ranges(&blob, wish.part).await);
        }
        // Before the layout is asked for, which may have to come from the registry.
        if wish.left.as_ref().is_some_and(VecDeque::is_empty) {
            return self.ended(wish);
        }
        let layout = match self.layout(&blob, &(0..0), Cause::Prefetch, deadline_ns).await {
            Ok(layout) => layout,
            Err(error) => return self.prefetch_failed(wish, || error.to_string()),
        };
        while let Some(range) = wish.left.as_mut().and_then(VecDeque::pop_front) {
            let mut at = range.start;
            let outcome = self.prefetch_range(wish, &layout, &mut at, range.end).await;
            if let Some(outcome) = outcome {
                if let Some(left) = &mut wish.left {
                    left.push_front(at..range.end);
                }
                return outcome;
            }
        }
        self.ended(wish)
    }

    /// All of a part was asked for. Behind the last part, what failed is asked for once more.
    fn ended(&self, wish: &mut Wish) -> Outcome {
        let blob = &wish.blob;
        if wish.part.next(blob).is_some() || blob.is_closed.load(Ordering::Relaxed) {
            return Outcome::Done;
        }
        if blob.prefetch_flights.load(Ordering::Acquire) > 0 {
            wish.not_before_ns = self.core.now() + PREFETCH_TURN_NS;
            return Outcome::Later;
        }
        if blob.prefetch_has_failed.swap(false, Ordering::Relaxed) {
            return self.prefetch_failed(wish, || "a fetch failed".to_owned());
        }
        Outcome::Done
    }

    /// What of a part is not there.
    async fn absent_ranges(&self, blob: &OpenBlob, part: Part) -> VecDeque<Range<u64>> {
        let mut ranges = match part {
            Part::Start => blob.image.start_ranges(blob.blob_index),
            Part::Whole => std::iter::once(0..blob.size()).collect(),
            Part::Listed => self.listed(blob).await.unwrap_or_else(|error| {
                let text = || format!("{}: its prefetch list: {error}", blob.name());
                self.parts.journal.write(Level::Warn, text);
                Vec::new()
            }),
        };
        ranges.retain(|range| blob.cache.may_lack(&self.core, range));
        ranges.into()
    }

    /// Begins the part anew after a pause, a few times: what was fetched is passed over.
    fn prefetch_failed(&self, wish: &mut Wish, why: impl Fn() -> String) -> Outcome {
        let now_ns = self.core.now();
        if now_ns.saturating_sub(wish.failed_ns) > PREFETCH_FORGIVEN_NS {
            wish.tries = 0;
        }
        (wish.tries, wish.failed_ns) = (wish.tries + 1, now_ns);
        let name = wish.blob.name();
        if wish.tries > PREFETCH_TRIES {
            self.parts.journal.error(format!("{name}: prefetch is given up: {}", why()));
            return Outcome::Over;
        }
        let pause_ns = PREFETCH_PAUSE_NS << (wish.tries - 1);
        let text = || format!("{name}: prefetch goes on in {} s: {}", pause_ns / SECOND_NS, why());
        self.parts.journal.write(Level::Warn, text);
        wish.not_before_ns = now_ns + pause_ns;
        wish.left = None;
        Outcome::Later
    }

    /// What the image lists of the blob.
    async fn listed(&self, blob: &OpenBlob) -> Result<Vec<Range<u64>>> {
        let (image, blob_index) = (Arc::clone(&blob.image), blob.blob_index);
        self.core.offload(move || listed_ranges(&read_bootstrap(&image)?, blob_index)).await
    }

    /// Asks for a range from `at` on, which tells how far it came; nothing when all was asked for.
    async fn prefetch_range(
        self: &Rc<Self>,
        wish: &mut Wish,
        layout: &Arc<Layout>,
        at: &mut u64,
        end: u64,
    ) -> Option<Outcome> {
        let blob = Arc::clone(&wish.blob);
        let rate = blob.image.prefetch.bandwidth_bytes_per_second;
        let step = blob.image.prefetch.merging_size_bytes.min(GET_MAX_BYTES);
        // Of a narrow bandwidth, what it carries in a second.
        let step = if rate > 0 { step.min(rate) } else { step }.max(PREFETCH_STEP_MIN_BYTES);
        while *at < end {
            let Some(allowed) = self.allowance(&blob).await else { return Some(Outcome::Later) };
            if blob.is_closed.load(Ordering::Relaxed) || self.gate.is_closed() {
                return Some(Outcome::Over);
            }
            if self.parts.catalog.recorder.is_active() {
                // What prefetch brings, nobody is seen to need.
                let _ = self.core.sleep(RECORDING_LOOK_NS).await;
                continue;
            }
            if blob.cache.is_short_of_room() {
                // What somebody reads is worth more than what nobody has asked for.
                let text = || format!("{}: prefetch ends, the quota is reached", blob.name());
                self.parts.journal.write(Level::Info, text);
                return Some(Outcome::Over);
            }
            if blob.prefetch_has_failed.swap(false, Ordering::Relaxed) {
                return Some(self.prefetch_failed(wish, || "a fetch failed".to_owned()));
            }
            let step = step.min(allowed).min(end - *at);
            let chunks = layout.chunks_in(*at..*at + step);
            let deadline_ns = self.core.now() + self.parts.fault_deadline_ns;
            if self.launch(&blob, layout, chunks, Cause::Prefetch, deadline_ns).is_err() {
                let _ = self.core.sleep(PAUSE_NS).await;
                continue;
            }
            self.parts.counters.count(Counter::PrefetchRequests);
            *at += step;
            if let Some(pause_ns) = (step * SECOND_NS).checked_div(rate) {
                wish.not_before_ns = self.core.now() + pause_ns;
                return Some(Outcome::Later);
            }
            // Where all is there, nothing above has waited for anything.
            self.core.yield_now().await;
        }
        None
    }
}
