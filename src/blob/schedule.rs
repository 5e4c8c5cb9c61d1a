//! Read-ahead: who reads a blob in order, and how far ahead of them to fetch. Pure but for its
//! memory.
//!
//! The kernel asks only for what is not there, so a stream shows as faults that begin where the
//! last fetch of that stream ended. Each such step doubles the stream's window; a fault that
//! continues no stream starts one and fetches nothing ahead: random readers pay nothing. The
//! streams of a blob are a few atomic words, shared by all cores. Two cores that update one word
//! at once lose a step, nothing else.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::config::{AHEAD_MAX_BYTES, AHEAD_MIN_BYTES, KIB, STREAMS_PER_BLOB};

/// Offsets are kept in pages so that a window fits beside them.
const PAGE_BYTES: u64 = 4 * KIB as u64;
const WINDOW_BITS: u32 = 16;

/// The sequential readers of one blob.
#[derive(Debug, Default)]
pub struct Streams {
    /// Next expected page << 16 | window in pages; 0 is an unused place.
    words: [AtomicU64; STREAMS_PER_BLOB],
    next_victim: AtomicU32,
}

impl Streams {
    /// Notes a fault and says what to fetch behind it, within the blob's size; possibly nothing.
    pub fn observe(&self, fault: &Range<u64>, blob_size: u64) -> Range<u64> {
        for word in &self.words {
            let value = word.load(Ordering::Relaxed);
            let (expected, window) = (value >> WINDOW_BITS << 12, pages_of(value) * PAGE_BYTES);
            // A reader may also fault inside the window while it is still being fetched.
            let start = expected.saturating_sub(window);
            if value != 0 && fault.start <= expected && fault.end > start && fault.start >= start {
                let grown = (window * 2).clamp(AHEAD_MIN_BYTES, AHEAD_MAX_BYTES);
                let ahead = fault.end.max(expected)..(fault.end + grown).min(blob_size);
                if ahead.start >= ahead.end {
                    return 0..0;
                }
                word.store(pack(ahead.end, grown), Ordering::Relaxed);
                return ahead;
            }
        }
        let victim = self.next_victim.fetch_add(1, Ordering::Relaxed) as usize;
        self.words[victim % STREAMS_PER_BLOB].store(pack(fault.end, 0), Ordering::Relaxed);
        0..0
    }
}

fn pages_of(word: u64) -> u64 {
    word & ((1 << WINDOW_BITS) - 1)
}

fn pack(expected: u64, window_bytes: u64) -> u64 {
    (expected.div_ceil(PAGE_BYTES) << WINDOW_BITS) | (window_bytes / PAGE_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;
    const STEP: u64 = 128 * KIB as u64;

    #[test]
    fn a_stream_earns_a_doubling_window() {
        let streams = Streams::default();
        assert!(streams.observe(&(0..STEP), SIZE).is_empty());
        let first = streams.observe(&(STEP..2 * STEP), SIZE);
        assert_eq!(first, 2 * STEP..2 * STEP + AHEAD_MIN_BYTES);
        let second = streams.observe(&(first.end..first.end + STEP), SIZE);
        assert_eq!(second, first.end + STEP..first.end + STEP + 2 * AHEAD_MIN_BYTES);
        let mut at = second.end;
        for _ in 0..20 {
            let ahead = streams.observe(&(at..at + STEP), SIZE);
            assert!(ahead.end - ahead.start <= AHEAD_MAX_BYTES);
            at = ahead.end;
        }
    }

    #[test]
    fn random_faults_fetch_nothing_ahead() {
        let streams = Streams::default();
        for step in [9u64, 2, 77, 41, 5, 60, 33, 18, 90, 71, 12] {
            let at = step * (4 << 20);
            assert!(streams.observe(&(at..at + 4096), SIZE).is_empty(), "at {at}");
        }
    }

    #[test]
    fn interleaved_streams_keep_their_windows() {
        let streams = Streams::default();
        let (mut low, mut high) = (0, SIZE / 2);
        for step in 0..6 {
            for at in [&mut low, &mut high] {
                let ahead = streams.observe(&(*at..*at + STEP), SIZE);
                assert_eq!(ahead.is_empty(), step == 0, "step {step} at {at}");
                *at = ahead.end.max(*at + STEP);
            }
        }
    }

    #[test]
    fn the_window_ends_with_the_blob() {
        let streams = Streams::default();
        streams.observe(&(0..STEP), 3 * STEP);
        assert_eq!(streams.observe(&(STEP..2 * STEP), 3 * STEP), 2 * STEP..3 * STEP);
        assert!(streams.observe(&(2 * STEP..3 * STEP), 3 * STEP).is_empty());
    }
}
