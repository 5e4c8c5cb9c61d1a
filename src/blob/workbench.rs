//! Decoding and verifying a batch of units: the pure CPU part of a fetch, on a core or a helper
//! thread.
//!
//! Output is laid out as in the address space, so that neighbouring chunks are filled with one
//! write. A segment is a row of whole chunks whose digests all matched; nothing else may be
//! filled.

use std::ops::Range;

use super::plan::extent;
use crate::engine::CoreId;
use crate::error::Error;
use crate::image::decode::Decoder;
use crate::image::identity::ChunkIndex;
use crate::image::layout::Layout;

use super::map::{ChunkState, Map};

/// Chunks that were verified, back to back.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Segment {
    /// The chunks; those of them that this core claimed are to be published.
    pub chunks: Range<u32>,
    /// Where their bytes stand in the output: whole pages.
    pub bytes: Range<usize>,
}

/// What is wrong with a unit.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Failure {
    /// The unit.
    pub unit: u32,
    /// The chunk, or `None` when nothing of the unit could be decoded.
    pub chunk: Option<ChunkIndex>,
    /// Why.
    pub error: Error,
}

/// A decoder and the lists a batch fills. Kept and used again.
pub struct Workbench {
    decoder: Decoder,
    /// What may be filled.
    pub segments: Vec<Segment>,
    /// What may not.
    pub failures: Vec<Failure>,
}

impl Default for Workbench {
    fn default() -> Self {
        let (segments, failures) = (Vec::with_capacity(1024), Vec::new());
        Workbench { decoder: Decoder::new(), segments, failures }
    }
}

/// Consecutive units that have arrived whole and whose output fits the output buffer.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Batch {
    /// The units.
    pub units: Range<u32>,
    /// Where in the blob file the input begins.
    pub input_start: u64,
    /// Where in the address space the output begins.
    pub output_start: u64,
}

impl Batch {
    /// The longest batch from `first` on, at most up to `end`, of units that end at or before
    /// `landed_end` in the blob file and decode into `room` bytes. Has at least `first`.
    pub fn longest(
        layout: &Layout,
        first: u32,
        end: u32,
        input_start: u64,
        landed_end: u64,
        room: usize,
    ) -> Batch {
        let output_start = layout.unit(first).uncompressed_offset;
        let mut last = first + 1;
        while last < end {
            let unit = layout.unit(last);
            let output_end = unit.uncompressed_offset + u64::from(unit.output_size);
            if extent(&unit).end > landed_end || output_end - output_start > room as u64 {
                break;
            }
            last += 1;
        }
        Batch { units: first..last, input_start, output_start }
    }
}

impl Workbench {
    /// Decodes and verifies a batch. Looks only at chunks that `core` has claimed in `map`.
    pub fn process(
        &mut self,
        layout: &Layout,
        map: &Map,
        core: CoreId,
        batch: &Batch,
        input: &[u8],
        output: &mut [u8],
    ) {
        self.segments.clear();
        self.failures.clear();
        for number in batch.units.clone() {
            let unit = layout.unit(number);
            let stored = extent(&unit);
            let stored = (stored.start - batch.input_start) as usize
                ..(stored.end - batch.input_start) as usize;
            let start = (unit.uncompressed_offset - batch.output_start) as usize;
            let place = &mut output[start..start + unit.output_size as usize];
            if let Err(error) =
                self.decoder.decode_unit(layout, number, &input[stored], &mut *place)
            {
                self.failures.push(Failure { unit: number, chunk: None, error });
                continue;
            }
            for chunk in unit.chunks.clone().map(ChunkIndex) {
                if map.state(chunk) == ChunkState::Claimed(core) {
                    self.verify(layout, number, chunk, batch.output_start, output);
                }
            }
        }
    }

    fn verify(
        &mut self,
        layout: &Layout,
        unit: u32,
        index: ChunkIndex,
        output_start: u64,
        output: &[u8],
    ) {
        let chunk = layout.chunk(index);
        let start = (chunk.uncompressed_offset - output_start) as usize;
        let end = start + chunk.padded_size() as usize;
        if !layout.verify(index, &output[start..start + chunk.size as usize]) {
            let text = format!("chunk {} is not what its digest says", index.0);
            let failure = Failure { unit, chunk: Some(index), error: Error::Digest(text) };
            self.failures.push(failure);
            return;
        }
        match self.segments.last_mut() {
            Some(last) if last.bytes.end == start && last.chunks.end == index.0 => {
                last.bytes.end = end;
                last.chunks.end = index.0 + 1;
            }
            _ => self.segments.push(Segment { chunks: index.0..index.0 + 1, bytes: start..end }),
        }
    }
}
