//! Decoding and verifying a batch of units: the pure CPU part of a fetch, on a core or a helper
//! thread.
//!
//! Output is laid out as in the address space, so that neighbouring chunks are filled with one
//! write. A row is of whole chunks whose digests all matched; nothing else may be filled.

use std::ops::Range;

use super::plan::extent;
use crate::engine::CoreId;
use crate::error::Error;
use crate::image::decode::Decoder;
use crate::image::identity::ChunkIndex;
use crate::image::layout::Layout;

use super::cache::Cache;
use super::map::ChunkState;

/// Chunks that were verified, back to back.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Row {
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
    pub rows: Vec<Row>,
    /// What may not.
    pub failures: Vec<Failure>,
    /// What decoding the batch took, and what digesting it took.
    pub decode_ns: u64,
    /// See there.
    pub verify_ns: u64,
}

impl Default for Workbench {
    fn default() -> Self {
        let (rows, failures) = (Vec::with_capacity(1024), Vec::new());
        Workbench { decoder: Decoder::new(), rows, failures, decode_ns: 0, verify_ns: 0 }
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

/// What a batch is of, and whose claims count.
pub struct Job<'a> {
    /// The blob's layout.
    pub layout: &'a Layout,
    /// The blob's cache.
    pub cache: &'a Cache,
    /// Only chunks that this core has claimed are looked at.
    pub core: CoreId,
    /// And of these, only the flight's own.
    pub chunks: Range<u32>,
    /// Says what time it is.
    pub clock: fn() -> u64,
}

impl Workbench {
    /// Decodes and verifies a batch. Where chunks must be filled in order, nothing behind the first
    /// failure is looked at.
    pub fn process(&mut self, job: &Job<'_>, batch: &Batch, input: &[u8], output: &mut [u8]) {
        self.rows.clear();
        self.failures.clear();
        (self.decode_ns, self.verify_ns) = (0, 0);
        let mut began_ns = (job.clock)();
        let layout = job.layout;
        for number in batch.units.clone() {
            if job.cache.is_ordered() && !self.failures.is_empty() {
                return;
            }
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
            let decoded_ns = (job.clock)();
            for chunk in unit.chunks.clone().map(ChunkIndex) {
                let is_wanted = job.chunks.contains(&chunk.0)
                    && layout.chunk(chunk).digest.is_some()
                    && job.cache.state(layout, chunk) == ChunkState::Claimed(job.core);
                if is_wanted && !self.verify(job, number, chunk, batch.output_start, output) {
                    break;
                }
            }
            self.decode_ns += decoded_ns - began_ns;
            began_ns = (job.clock)();
            self.verify_ns += began_ns - decoded_ns;
        }
    }

    /// False when nothing behind this chunk may be looked at.
    fn verify(
        &mut self,
        job: &Job<'_>,
        unit: u32,
        index: ChunkIndex,
        output_start: u64,
        output: &[u8],
    ) -> bool {
        let chunk = job.layout.chunk(index);
        let start = (chunk.uncompressed_offset - output_start) as usize;
        let end = start + chunk.padded_size() as usize;
        if !job.layout.verify(index, &output[start..start + chunk.size as usize]) {
            let text = format!("chunk {} is not what its digest says", index.0);
            let failure = Failure { unit, chunk: Some(index), error: Error::Digest(text) };
            self.failures.push(failure);
            return !job.cache.is_ordered();
        }
        match self.rows.last_mut() {
            Some(last)
                if last.bytes.end == start
                    && last.chunks.end == index.0
                    && job.cache.share_a_write(ChunkIndex(last.chunks.start), index) =>
            {
                last.bytes.end = end;
                last.chunks.end = index.0 + 1;
            }
            _ => self.rows.push(Row { chunks: index.0..index.0 + 1, bytes: start..end }),
        }
        true
    }
}
