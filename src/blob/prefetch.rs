//! Prefetch: whole blobs in the background, for images that ask for it.
//!
//! One task per core walks one blob at a time in address order, keeps a few runs in the read-ahead
//! queue and no more, pauses while readers wait on this core, keeps to the image's bandwidth, and
//! has no more in flight than the route's readers leave it (`registry/pace.rs`).
//! It goes through the same claims as everybody, so nothing is fetched twice.

use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::crew::Crew;
use super::journal::Level;
use super::latency::Cause;
use super::open::OpenBlob;
use super::statistics::Counter;
use crate::config::{
    GET_MAX_BYTES, MILLISECOND_NS, PREFETCH_AHEAD, PREFETCH_BUDGET_MIN_BYTES, RECORDING_LOOK_NS,
    SECOND_NS,
};

/// How long prefetch waits before it looks again whether it may go on.
const PAUSE_NS: u64 = 5 * MILLISECOND_NS;

impl Crew {
    /// Has a blob fetched when those before it have been.
    pub fn prefetch_later(&self, blob: Arc<OpenBlob>) {
        if let Err(blob) = self.prefetch.push(&self.core, blob) {
            let text = || format!("{}: too many prefetches wait; skipped", blob.name());
            self.parts.journal.write(Level::Warn, text);
        }
    }

    /// Takes blobs from the prefetch queue, for ever.
    pub(super) async fn prefetch_all(self: &Rc<Self>) {
        loop {
            let blob = self.prefetch.pop(&self.core, |_| true).await;
            self.prefetch_blob(&blob).await;
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

    async fn prefetch_blob(self: &Rc<Self>, blob: &Arc<OpenBlob>) {
        let deadline_ns = || self.core.now() + self.parts.fault_deadline_ns;
        let layout = match self.layout(blob, &(0..0), deadline_ns()).await {
            Ok(layout) => layout,
            Err(error) => {
                self.parts.journal.error(format!("prefetch: {error}"));
                return;
            }
        };
        let step = blob.image.prefetch.merging_size_bytes.clamp(1, GET_MAX_BYTES);
        let rate = blob.image.prefetch.bandwidth_bytes_per_second;
        let mut at = 0;
        while at < layout.uncompressed_size() {
            let allowed = self.allowance(blob).await;
            if self.parts.catalog.recorder.is_active() {
                // What prefetch brings, nobody is seen to need.
                let _ = self.core.sleep(RECORDING_LOOK_NS).await;
                if !blob.is_closed.load(Ordering::Relaxed) && !self.gate.is_closed() {
                    continue;
                }
            }
            let step = step.min(allowed);
            if blob.is_closed.load(Ordering::Relaxed) || self.gate.is_closed() {
                return;
            }
            if blob.cache.is_short_of_room() {
                // What somebody reads is worth more than what nobody has asked for.
                let text = || format!("{}: prefetch ends, the quota is reached", blob.name());
                return self.parts.journal.write(Level::Info, text);
            }
            let chunks = layout.chunks_in(at..at + step);
            let launched = self.launch(blob, &layout, chunks, Cause::Prefetch, deadline_ns());
            if launched.is_ok() {
                self.parts.counters.count(Counter::PrefetchRequests);
                at += step;
            }
            let pause_ns = (step * SECOND_NS).checked_div(rate).unwrap_or(0);
            if pause_ns > 0 || launched.is_err() {
                let _ = self.core.sleep(pause_ns.max(PAUSE_NS)).await;
            }
        }
    }
}
