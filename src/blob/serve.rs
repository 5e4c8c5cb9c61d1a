//! The story of one fault: which chunks it needs, who fetches them, and when it may be answered.
//!
//! Nobody is answered before every chunk of the fault is published, and publishing comes after
//! digest and fill. A fault waits for its own chunks only.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use super::cache::Cache;
use super::crew::Crew;
use super::latency::{Cause, Step};
use super::map::ChunkState;
use super::open::OpenBlob;
use crate::config::{EVICTION_LOOK_NS, FLIGHT_PAUSE_NS, LAUNCHES_PER_FAULT, SETTLE_LOOK_NS};
use crate::error::{Error, Result};
use crate::image::identity::ChunkIndex;
use crate::image::layout::Layout;

impl Crew {
    /// Brings the bytes of `range` of a blob's address space into the cache, or says why not. The
    /// time for it counts from `since_ns`.
    pub async fn serve(
        self: &Rc<Self>,
        blob: &Arc<OpenBlob>,
        range: Range<u64>,
        since_ns: u64,
    ) -> Result<()> {
        let deadline_ns = since_ns + self.parts.fault_deadline_ns;
        if self.core.now() >= deadline_ns {
            return Err(Error::Deadline(format!("{}, waiting for its turn", blob.name())));
        }
        let layout = self.layout(blob, &range, Cause::Demand, deadline_ns).await?;
        let wanted = layout.chunks_in(range.clone());
        let recorder = &self.parts.catalog.recorder;
        let began_ns = self.core.now();
        let is_recorded = recorder.note(blob.id(), &range, began_ns);
        blob.image.touches.note(blob.blob_index, &range, began_ns);
        self.check_presence(blob, &layout, &range, &wanted);
        let outcome = self.launch(blob, &layout, wanted.clone(), Cause::Demand, deadline_ns);
        self.record_step(blob, Cause::Demand, Step::Claim, began_ns);
        let ahead = match span(&layout, &wanted) {
            Some(span) if !is_recorded => blob.streams.observe(&span, layout.uncompressed_size()),
            _ => 0..0,
        };
        if !ahead.is_empty() && outcome.is_ok() {
            let chunks = layout.chunks_in(ahead.clone());
            let chunks = chunks.start.max(wanted.end)..chunks.end;
            blob.image.touches.note(blob.blob_index, &ahead, began_ns);
            // No place for it is no harm: the reader will ask.
            let _ = self.launch(blob, &layout, chunks, Cause::ReadAhead, deadline_ns);
        }
        for chunk in wanted.map(ChunkIndex) {
            if layout.chunk(chunk).digest.is_some() {
                self.settle(blob, &layout, chunk, deadline_ns).await?;
            }
        }
        Ok(())
    }

    /// Whether all of a range is there, as far as this core knows without waiting. Behind the
    /// cachefiles door the kernel asks only for what is not.
    pub fn has(&self, blob: &OpenBlob, range: &Range<u64>) -> bool {
        let Some(layout) = blob.layout().filter(|_| blob.cache.is_ordered()) else { return false };
        let is_there = |chunk| {
            layout.chunk(chunk).digest.is_none()
                || blob.cache.state(&layout, chunk) == ChunkState::Present
        };
        layout.chunks_in(range.clone()).map(ChunkIndex).all(is_there)
    }

    /// The kernel asks only for holes. If all chunks are present in the map and there is a hole all
    /// the same, the cache lost them (culled, or never on disk): they are fetched again.
    fn check_presence(
        &self,
        blob: &OpenBlob,
        layout: &Layout,
        range: &Range<u64>,
        wanted: &Range<u32>,
    ) {
        let Cache::Object { object, map } = &blob.cache else { return };
        let mut chunks = wanted.clone().map(ChunkIndex);
        let all_present = chunks.all(|chunk| map.state(chunk) == ChunkState::Present);
        if !all_present || !object.has_hole(&self.core, range) {
            return;
        }
        for chunk in wanted.clone().map(ChunkIndex) {
            let extent = layout.chunk(chunk);
            let end = extent.uncompressed_offset + u64::from(extent.padded_size());
            if object.has_hole(&self.core, &(extent.uncompressed_offset..end)) {
                map.forget(chunk);
            }
        }
    }

    /// Whether another core has begun to fetch a chunk.
    fn is_elsewhere(&self, blob: &OpenBlob, layout: &Layout, chunk: ChunkIndex) -> bool {
        let state = blob.cache.state(layout, chunk);
        matches!(state, ChunkState::Claimed(owner) if owner != self.id())
    }

    /// Waits until a chunk is present.
    async fn settle(
        self: &Rc<Self>,
        blob: &Arc<OpenBlob>,
        layout: &Arc<Layout>,
        chunk: ChunkIndex,
        deadline_ns: u64,
    ) -> Result<()> {
        let mut launches = 1;
        loop {
            let now_ns = self.core.now();
            if now_ns >= deadline_ns {
                return Err(Error::Deadline(format!("{}, chunk {}", blob.name(), chunk.0)));
            }
            let look_ns = deadline_ns.min(now_ns + SETTLE_LOOK_NS);
            match blob.cache.state(layout, chunk) {
                ChunkState::Present => return Ok(()),
                ChunkState::Claimed(owner) if owner == self.id() => {
                    match self.flights.find(blob, chunk) {
                        Some(flight) => {
                            self.promote(flight);
                            self.flights.settled(flight).wait(&self.core).by(look_ns).await;
                        }
                        None => self.core.sleep_until(look_ns).await?,
                    }
                }
                ChunkState::Claimed(owner) => {
                    let news = self.news.wait(&self.core);
                    self.ask(owner, blob, chunk);
                    news.by(look_ns).await;
                }
                ChunkState::Leaving => {
                    let look_ns = deadline_ns.min(now_ns + EVICTION_LOOK_NS);
                    self.core.sleep_until(look_ns).await?;
                }
                ChunkState::Absent if launches < LAUNCHES_PER_FAULT => {
                    // Whoever fetched it gave up, perhaps a read-ahead: try for ourselves.
                    let wanted = chunk.0..chunk.0 + 1;
                    match self.launch(blob, layout, wanted, Cause::Demand, deadline_ns) {
                        Ok(()) => launches += u32::from(!self.is_elsewhere(blob, layout, chunk)),
                        Err(Error::Busy(_)) => {
                            let pause_ns = now_ns + FLIGHT_PAUSE_NS;
                            self.core.sleep_until(pause_ns.min(deadline_ns)).await?;
                        }
                        Err(error) => return Err(error),
                    }
                }
                ChunkState::Absent => {
                    let text = format!("{}, chunk {}: not available", blob.name(), chunk.0);
                    return Err(Error::unavailable(text));
                }
            }
        }
    }
}

/// The address space of a row of chunks: what is fetched for them.
fn span(layout: &Layout, chunks: &Range<u32>) -> Option<Range<u64>> {
    let last = layout.chunk(ChunkIndex(chunks.clone().next_back()?));
    let start = layout.chunk(ChunkIndex(chunks.start)).uncompressed_offset;
    Some(start..last.uncompressed_offset + u64::from(last.padded_size()))
}
