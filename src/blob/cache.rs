//! What one blob's cache holds and who fetches the rest, behind either door.
//!
//! Behind the cachefiles door the kernel's object takes any chunk in any order: presence and claims
//! are a byte per chunk ([`Map`]). Behind the fanotify door chunks lie in segments, which only grow
//! from their start: a chunk is present when its segment's file reaches over it, and a claim is on
//! the segment, for all of it that is absent. Both are asked by chunk.

use std::ops::Range;
use std::sync::Arc;

use super::latency::DoorKind;
use super::map::{ChunkState, Map};
use super::workbench::Row;
use crate::engine::{Core, CoreId, Lane, Lease};
use crate::error::Result;
use crate::image::identity::ChunkIndex;
use crate::image::layout::{Chunk, Layout};
use crate::image::{SegmentPlan, Segmentation};
use crate::store::object::CacheObject;
use crate::store::segment::{Owner, Segment};

/// Where a blob's bytes go.
pub enum Cache {
    /// Into a cache object of the kernel.
    Object {
        /// The object.
        object: CacheObject,
        /// What is there and who fetches the rest.
        map: Map,
    },
    /// Into segments.
    Segments(Segments),
}

/// The segments of one blob as one image sees them.
pub struct Segments {
    plan: Segmentation,
    /// By place in the plan.
    files: Box<[Arc<Segment>]>,
}

impl Cache {
    /// Whether units must be filled in the order of their chunks.
    pub fn is_ordered(&self) -> bool {
        matches!(self, Cache::Segments(_))
    }

    /// Whether more bytes would take it above its quota.
    pub fn is_short_of_room(&self) -> bool {
        match self {
            Cache::Object { .. } => false,
            Cache::Segments(segments) => {
                segments.files.first().is_some_and(|file| file.directory.space().is_above_high())
            }
        }
    }

    /// By which door it is read.
    pub fn door(&self) -> DoorKind {
        match self {
            Cache::Object { .. } => DoorKind::Cachefiles,
            Cache::Segments(_) => DoorKind::Fanotify,
        }
    }

    /// The kernel's object, behind the cachefiles door.
    pub fn object(&self) -> Option<&CacheObject> {
        match self {
            Cache::Object { object, .. } => Some(object),
            Cache::Segments(_) => None,
        }
    }

    /// Where a listed chunk stands.
    pub fn state(&self, layout: &Layout, chunk: ChunkIndex) -> ChunkState {
        match self {
            Cache::Object { map, .. } => map.state(chunk),
            Cache::Segments(segments) => segments.state(layout, chunk),
        }
    }

    /// Whether a part of a range of the address space may be absent. Needs no layout, and so cannot
    /// tell what no chunk covers from what is absent.
    pub fn may_lack(&self, core: &Core, range: &Range<u64>) -> bool {
        match self {
            Cache::Object { object, .. } => object.has_hole(core, range),
            Cache::Segments(segments) => segments.may_lack(range),
        }
    }

    /// Whether two chunks in a row may be filled with one write.
    pub fn share_a_write(&self, first: ChunkIndex, second: ChunkIndex) -> bool {
        match self {
            Cache::Object { .. } => true,
            Cache::Segments(segments) => {
                segments.plan.place_of(first) == segments.plan.place_of(second)
            }
        }
    }

    /// Writes a row of verified chunks, which this core has claimed. `output_start` is the place in
    /// the address space of the lease's first byte.
    pub async fn fill(
        &self,
        core: &Core,
        lease: Lease,
        row: &Row,
        output_start: u64,
        lane: Lane,
    ) -> (Lease, Result<()>) {
        let offset = output_start + row.bytes.start as u64;
        match self {
            Cache::Object { object, .. } => {
                object.fill(core, lease, row.bytes.clone(), offset).await
            }
            Cache::Segments(segments) => {
                let (plan, file) = segments.of(ChunkIndex(row.chunks.start));
                file.fill(core, lease, row.bytes.clone(), offset - plan.base, lane).await
            }
        }
    }

    /// A row of chunks is in the cache. Gives how many of them nobody had published before.
    pub fn publish(&self, layout: &Layout, row: &Row, core: CoreId) -> u32 {
        match self {
            Cache::Object { map, .. } => {
                let chunks = row.chunks.clone().map(ChunkIndex);
                chunks.filter(|&chunk| map.publish(chunk, core)).count() as u32
            }
            Cache::Segments(segments) => segments.publish(layout, row, core),
        }
    }

    /// Gives back what this core has claimed of `chunks` and not published.
    pub fn release(&self, chunks: Range<u32>, core: CoreId) {
        match self {
            Cache::Object { map, .. } => {
                chunks.map(ChunkIndex).for_each(|chunk| map.release(chunk, core));
            }
            Cache::Segments(segments) => {
                let files = segments.places(chunks).map(|place| &segments.files[place]);
                files.for_each(|file| file.release(core));
            }
        }
    }

    /// Whether both would fill the same file with this chunk: images share segments.
    pub fn shares(&self, other: &Cache, chunk: ChunkIndex) -> bool {
        let (Cache::Segments(one), Cache::Segments(two)) = (self, other) else { return false };
        let (one, two) = (one.find(chunk), two.find(chunk));
        one.zip(two).is_some_and(|(one, two)| Arc::ptr_eq(one, two))
    }
}

impl Segments {
    /// Segments as an image's plan names them.
    ///
    /// # Panics
    /// If there is not one file for each segment of the plan.
    pub fn new(plan: Segmentation, files: Box<[Arc<Segment>]>) -> Segments {
        assert_eq!(plan.count() as usize, files.len(), "a file for each segment");
        Segments { plan, files }
    }

    /// The plan.
    pub fn plan(&self) -> &Segmentation {
        &self.plan
    }

    /// The files, by place in the plan.
    pub fn files(&self) -> &[Arc<Segment>] {
        &self.files
    }

    /// The places of the segments that have a chunk of `chunks`.
    pub fn places(&self, chunks: Range<u32>) -> Range<usize> {
        let behind = |chunk: u32| self.plan.places_before(ChunkIndex(chunk)) as usize;
        if chunks.is_empty() {
            return 0..0;
        }
        // The first segment may begin before the first chunk.
        let first = self.plan.place_of(ChunkIndex(chunks.start)).map(|place| place as usize);
        first.unwrap_or_else(|| behind(chunks.start))..behind(chunks.end)
    }

    /// Takes the right to fill what is absent of a segment. Gives the chunks, or none when nothing
    /// is absent or somebody else fills it.
    pub fn claim(&self, layout: &Layout, place: usize, core: CoreId) -> Option<Range<u32>> {
        let (plan, file) = (self.plan.segment(place as u32), &self.files[place]);
        if file.is_complete() || !file.claim(core) {
            return None;
        }
        let size = file.size();
        let is_absent = |chunk: &u32| {
            let chunk = layout.chunk(ChunkIndex(*chunk));
            chunk.digest.is_some() && end_of(&chunk) - plan.base > size
        };
        let first = plan.chunks.clone().find(is_absent);
        if first.is_none() {
            file.release(core);
        }
        first.map(|first| first..plan.chunks.end)
    }

    fn may_lack(&self, range: &Range<u64>) -> bool {
        self.plan.places_within(range).any(|place| !self.files[place as usize].is_complete())
    }

    fn state(&self, layout: &Layout, chunk: ChunkIndex) -> ChunkState {
        let (plan, file) = self.of(chunk);
        // The owner first: one who leaves has published before.
        let owner = file.owner();
        if owner == Owner::Eviction {
            return ChunkState::Leaving;
        }
        if end_of(&layout.chunk(chunk)) - plan.base <= file.size() {
            return ChunkState::Present;
        }
        match owner {
            Owner::Core(core) => ChunkState::Claimed(core),
            Owner::Nobody | Owner::Eviction => ChunkState::Absent,
        }
    }

    fn publish(&self, layout: &Layout, row: &Row, core: CoreId) -> u32 {
        let (plan, file) = self.of(ChunkIndex(row.chunks.start));
        let last = layout.chunk(ChunkIndex(row.chunks.end - 1));
        file.publish(core, end_of(&last) - plan.base);
        if file.is_complete() {
            // The claim stays until the flight ends: given back here, another flight of this core
            // could have it by then (evicted, asked for again), and lose it to that end.
            file.directory.has_completed(file);
        }
        row.chunks.len() as u32
    }

    fn find(&self, chunk: ChunkIndex) -> Option<&Arc<Segment>> {
        self.plan.place_of(chunk).map(|place| &self.files[place as usize])
    }

    fn of(&self, chunk: ChunkIndex) -> (SegmentPlan, &Arc<Segment>) {
        let place = self.plan.place_of(chunk).expect("a listed chunk is in a segment");
        (self.plan.segment(place), &self.files[place as usize])
    }
}

/// Where a chunk's pages end in the address space.
fn end_of(chunk: &Chunk) -> u64 {
    chunk.uncompressed_offset + u64::from(chunk.padded_size())
}
