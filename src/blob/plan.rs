//! Which units go into one GET. Pure.
//!
//! A run is a row of consecutive units, fetched with one request: it grows while the next unit
//! follows closely in the blob file and the request stays worthwhile, and never beyond what its
//! buffers hold.

use std::ops::Range;

use crate::config::{GET_GAP_MAX_BYTES, GET_MAX_BYTES};
use crate::image::identity::ChunkIndex;
use crate::image::layout::{Layout, Unit};

/// Consecutive units to fetch with one GET.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Run {
    /// Unit numbers.
    pub units: Range<u32>,
    /// Bytes of the blob file.
    pub compressed: Range<u64>,
    /// First to last chunk of the units.
    pub chunks: Range<u32>,
    /// The largest decoded size of one unit.
    pub output_size_max: u32,
}

impl Run {
    /// A run of one unit.
    pub fn of(number: u32, unit: &Unit) -> Self {
        Run {
            units: number..number + 1,
            compressed: extent(unit),
            chunks: unit.chunks.clone(),
            output_size_max: unit.output_size,
        }
    }

    /// The units of a row of chunks, the first and last of which are listed. They need not follow
    /// each other in the blob file: [`Run::longest`] finds what one GET can bring.
    pub fn over(layout: &Layout, chunks: Range<u32>) -> Self {
        let unit_of = |chunk: u32| layout.chunk(ChunkIndex(chunk)).unit;
        let units = unit_of(chunks.start)..unit_of(chunks.end - 1) + 1;
        let first = extent(&layout.unit(units.start));
        let mut run = Run { units, compressed: first, chunks, output_size_max: 0 };
        for number in run.units.clone() {
            let unit = layout.unit(number);
            run.compressed.end = run.compressed.end.max(extent(&unit).end);
            run.output_size_max = run.output_size_max.max(unit.output_size);
        }
        run
    }

    /// Takes in a run that follows, unless another GET serves it better.
    #[must_use]
    pub fn join(&mut self, next: &Run) -> bool {
        // Two segments may share the unit at their border.
        let is_next = next.units.start == self.units.end || next.units.start + 1 == self.units.end;
        let follows = is_next
            && next.compressed.end >= self.compressed.end
            && next.compressed.start <= self.compressed.end + GET_GAP_MAX_BYTES
            && next.compressed.end.saturating_sub(self.compressed.start) <= GET_MAX_BYTES;
        if follows {
            self.units.end = next.units.end;
            self.compressed.end = next.compressed.end;
            self.chunks.end = next.chunks.end;
            self.output_size_max = self.output_size_max.max(next.output_size_max);
        }
        follows
    }

    /// The longest run of units from the first of `units` on that one GET can bring.
    pub fn longest(layout: &Layout, units: Range<u32>) -> Self {
        let mut run = Run::of(units.start, &layout.unit(units.start));
        for number in units.start + 1..units.end {
            if !run.extend(number, &layout.unit(number)) {
                break;
            }
        }
        run
    }

    /// Takes in the next unit, unless another GET serves it better.
    #[must_use]
    pub fn extend(&mut self, number: u32, unit: &Unit) -> bool {
        let stored = extent(unit);
        let follows = number == self.units.end
            && stored.start >= self.compressed.end
            && stored.start - self.compressed.end <= GET_GAP_MAX_BYTES
            && stored.end - self.compressed.start <= GET_MAX_BYTES;
        if follows {
            self.units.end = number + 1;
            self.compressed.end = stored.end;
            self.chunks.end = unit.chunks.end;
            self.output_size_max = self.output_size_max.max(unit.output_size);
        }
        follows
    }
}

/// Where a unit is stored.
pub fn extent(unit: &Unit) -> Range<u64> {
    unit.compressed_offset..unit.compressed_offset + u64::from(unit.compressed_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(number: u32, offset: u64, size: u32) -> Unit {
        Unit {
            compressed_offset: offset,
            compressed_size: size,
            chunks: number..number + 1,
            uncompressed_offset: u64::from(number) * 4096,
            output_size: 4096,
        }
    }

    #[test]
    fn neighbours_share_a_get_and_small_gaps_are_fetched() {
        let mut run = Run::of(7, &unit(7, 1000, 500));
        assert!(run.extend(8, &unit(8, 1500, 500)));
        assert!(run.extend(9, &unit(9, 2000 + GET_GAP_MAX_BYTES, 10)));
        assert_eq!((run.units, run.chunks), (7..10, 7..10));
        assert_eq!(run.compressed, 1000..2010 + GET_GAP_MAX_BYTES);
    }

    #[test]
    fn gaps_jumps_and_long_requests_start_another_get() {
        let run = Run::of(7, &unit(7, 1000, 500));
        assert!(!run.clone().extend(9, &unit(9, 1500, 500)));
        assert!(!run.clone().extend(8, &unit(8, 1501 + GET_GAP_MAX_BYTES, 500)));
        assert!(!run.clone().extend(8, &unit(8, 900, 50)));
        assert!(!run.clone().extend(8, &unit(8, 1500, GET_MAX_BYTES as u32)));
    }

    #[test]
    fn one_unit_may_be_larger_than_a_get() {
        let run = Run::of(0, &unit(0, 0, 3 * GET_MAX_BYTES as u32));
        assert_eq!(run.compressed.end, 3 * GET_MAX_BYTES);
    }
}
