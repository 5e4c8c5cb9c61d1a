//! Prefetch: what an image's starts are known to need, for every image, and whole blobs for images
//! that ask for it.
//!
//! What earlier starts on this node needed comes first, of all blobs that wait, then what the
//! image's builder listed, of all of them, then the rest of each. One
//! task per core walks one blob at a time in that order, keeps a few runs in the read-ahead queue
//! and no more, pauses while readers wait on this core, keeps to the image's bandwidth, and has no
//! more in flight than the route's readers leave it (`registry/pace.rs`).
//! It goes through the same claims as everybody, so nothing is fetched twice.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cache::Cache;
use super::crew::Crew;
use super::journal::Level;
use super::latency::Cause;
use super::load::read_bootstrap;
use super::open::OpenBlob;
use super::statistics::Counter;
use crate::config::{
    GET_MAX_BYTES, MILLISECOND_NS, PREFETCH_AHEAD, PREFETCH_BUDGET_MIN_BYTES, RECORDING_LOOK_NS,
    SECOND_NS,
};
use crate::error::Result;
use crate::image::layout::Layout;
use crate::image::prefetch::listed_ranges;

/// How long prefetch waits before it looks again whether it may go on.
const PAUSE_NS: u64 = 5 * MILLISECOND_NS;

/// A blob that waits to be prefetched.
pub(super) struct Wish {
    blob: Arc<OpenBlob>,
    part: Part,
}

/// What of a blob is prefetched next.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Part {
    /// What earlier starts needed.
    Touched,
    /// What the image lists.
    Listed,
    /// Everything that is absent.
    Whole,
}

impl Part {
    /// What comes after it.
    fn next(self, blob: &OpenBlob) -> Option<Part> {
        match self {
            Part::Touched if blob.image.prefetch.enable => Some(Part::Listed),
            Part::Listed => Some(Part::Whole),
            Part::Touched | Part::Whole => None,
        }
    }
}

impl Crew {
    /// Has a blob fetched when those before it have been.
    pub fn prefetch_later(&self, blob: Arc<OpenBlob>) {
        let wish = Wish { blob, part: Part::Touched };
        if let Err(wish) = self.prefetch.push(&self.core, wish) {
            let text = || format!("{}: too many prefetches wait; skipped", wish.blob.name());
            self.parts.journal.write(Level::Warn, text);
        }
    }

    /// Takes blobs from the prefetch queue, for ever.
    pub(super) async fn prefetch_all(self: &Rc<Self>) {
        loop {
            let mut next = Some(self.prefetch.pop(&self.core, |_| true).await);
            while let Some(Wish { blob, part }) = next.take() {
                let is_done = self.prefetch_part(&blob, part).await;
                if !is_done && let Some(part) = part.next(&blob) {
                    let rest = Wish { blob, part };
                    // This part of the blobs behind it goes first, if there is room to wait.
                    next = self.prefetch.push(&self.core, rest).err();
                }
            }
        }
    }

    /// Waits until prefetch may go on; says for how many bytes at once.
    async fn allowance(&self, blob: &OpenBlob) -> u64 {
        loop {
            let allowed = blob.route.pace.allowance(self.core.now());
            let is_idle = self.ahead.len() < PREFETCH_AHEAD && self.demand.is_empty();
            if is_idle && allowed >= PREFETCH_BUDGET_MIN_BYTES || self.gate.is_closed() {
                return allowed.max(PREFETCH_BUDGET_MIN_BYTES);
            }
            // A sleep ends by its time, whatever happens.
            let _ = self.core.sleep(PAUSE_NS).await;
        }
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

    /// Says whether there is nothing more to be done for the blob.
    async fn prefetch_part(self: &Rc<Self>, blob: &Arc<OpenBlob>, part: Part) -> bool {
        let deadline_ns = self.core.now() + self.parts.fault_deadline_ns;
        if !self.is_attached(blob, deadline_ns).await {
            return true;
        }
        let mut ranges = match part {
            Part::Touched => blob.image.touches.known_ranges(blob.blob_index),
            Part::Whole => std::iter::once(0..blob.size()).collect(),
            Part::Listed => self.listed(blob).await.unwrap_or_else(|error| {
                let text = || format!("{}: its prefetch list: {error}", blob.name());
                self.parts.journal.write(Level::Warn, text);
                Vec::new()
            }),
        };
        // Before the layout is asked for, which may have to come from the registry.
        ranges.retain(|range| blob.cache.may_lack(&self.core, range));
        if ranges.is_empty() {
            return false;
        }
        let layout = match self.layout(blob, &(0..0), deadline_ns).await {
            Ok(layout) => layout,
            Err(error) => {
                self.parts.journal.error(format!("prefetch: {error}"));
                return true;
            }
        };
        for range in ranges {
            if self.prefetch_range(blob, &layout, range).await {
                return true;
            }
        }
        false
    }

    /// What the image lists of the blob.
    async fn listed(&self, blob: &OpenBlob) -> Result<Vec<Range<u64>>> {
        let (image, blob_index) = (Arc::clone(&blob.image), blob.blob_index);
        self.core.offload(move || listed_ranges(&read_bootstrap(&image)?, blob_index)).await
    }

    /// Says whether prefetch of the blob is over.
    async fn prefetch_range(
        self: &Rc<Self>,
        blob: &Arc<OpenBlob>,
        layout: &Arc<Layout>,
        range: Range<u64>,
    ) -> bool {
        let step = blob.image.prefetch.merging_size_bytes.clamp(1, GET_MAX_BYTES);
        let rate = blob.image.prefetch.bandwidth_bytes_per_second;
        let mut at = range.start;
        while at < range.end {
            let allowed = self.allowance(blob).await;
            if self.parts.catalog.recorder.is_active() {
                // What prefetch brings, nobody is seen to need.
                let _ = self.core.sleep(RECORDING_LOOK_NS).await;
                if !blob.is_closed.load(Ordering::Relaxed) && !self.gate.is_closed() {
                    continue;
                }
            }
            let step = step.min(allowed).min(range.end - at);
            if blob.is_closed.load(Ordering::Relaxed) || self.gate.is_closed() {
                return true;
            }
            if blob.cache.is_short_of_room() {
                // What somebody reads is worth more than what nobody has asked for.
                let text = || format!("{}: prefetch ends, the quota is reached", blob.name());
                self.parts.journal.write(Level::Info, text);
                return true;
            }
            let chunks = layout.chunks_in(at..at + step);
            let deadline_ns = self.core.now() + self.parts.fault_deadline_ns;
            let launched = self.launch(blob, layout, chunks, Cause::Prefetch, deadline_ns);
            if launched.is_ok() {
                self.parts.counters.count(Counter::PrefetchRequests);
                at += step;
            }
            let pause_ns = (step * SECOND_NS).checked_div(rate).unwrap_or(0);
            if pause_ns > 0 || launched.is_err() {
                let _ = self.core.sleep(pause_ns.max(PAUSE_NS)).await;
            }
        }
        false
    }
}
