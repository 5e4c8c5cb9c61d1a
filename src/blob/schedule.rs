//! Read-ahead: who reads a blob in order, and how far ahead of them to fetch. Pure but for its
//! memory.
//!
//! The kernel asks only for what is not there, so a stream shows as faults that go on where the
//! last fetch of that stream ended, or anywhere inside what was fetched ahead. A stream may be as
//! far ahead as its reader has come in order: a window that is earned, so that at worst as much is
//! fetched in vain as was read. What is ahead is topped up in long steps and before the reader has
//! come to its end. Random readers pay nothing: a fault that goes on with no stream starts one, and
//! one that goes on for less than `AHEAD_EARN_BYTES` earns nothing yet.
//!
//! The streams of a blob are a few atomic words, shared by all cores. Two cores that update one
//! word at once lose a step, nothing else.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::config::{
    AHEAD_EARN_BYTES, AHEAD_GAP_BYTES, AHEAD_MAX_BYTES, AHEAD_STEP_BYTES, KIB, STREAMS_PER_BLOB,
};

/// Offsets are kept in pages so that what was read in order fits beside them.
pub const PAGE_BYTES: u64 = 4 * KIB as u64;
const RUN_BITS: u32 = 16;
const RUN_MAX: u64 = (1 << RUN_BITS) - 1;

const _: () = assert!(AHEAD_MAX_BYTES / PAGE_BYTES <= RUN_MAX);

/// The sequential readers of one blob.
#[derive(Debug, Default)]
pub struct Streams {
    /// A [`Stream`] each; 0 is an unused place.
    words: [AtomicU64; STREAMS_PER_BLOB],
    next_victim: AtomicU32,
}

/// One reader, as it is kept: `head` in pages << 16 | `run` in pages.
#[derive(Clone, Copy)]
struct Stream {
    /// Up to here everything has been asked for.
    head: u64,
    /// Bytes read in order, after the first fault.
    run: u64,
}

impl Streams {
    /// Notes a fault, in whole chunks, and says what to fetch behind it, within the blob's size;
    /// possibly nothing.
    pub fn observe(&self, fault: &Range<u64>, blob_size: u64) -> Range<u64> {
        for word in &self.words {
            let stream = Stream::of(word.load(Ordering::Relaxed));
            if let Some(stream) = stream.filter(|stream| stream.covers(fault)) {
                let Some(next) = stream.advanced(fault, blob_size) else { return 0..0 };
                word.store(next.word(), Ordering::Relaxed);
                return stream.head.max(fault.end)..next.head;
            }
        }
        let victim = self.next_victim.fetch_add(1, Ordering::Relaxed) as usize;
        let stream = Stream { head: fault.end, run: 0 };
        self.words[victim % STREAMS_PER_BLOB].store(stream.word(), Ordering::Relaxed);
        0..0
    }
}

impl Stream {
    fn of(word: u64) -> Option<Stream> {
        let (head, run) = (word >> RUN_BITS, word & RUN_MAX);
        (word != 0).then_some(Stream { head: head * PAGE_BYTES, run: run * PAGE_BYTES })
    }

    fn word(self) -> u64 {
        let run = (self.run / PAGE_BYTES).min(RUN_MAX);
        (self.head.div_ceil(PAGE_BYTES) << RUN_BITS) | run
    }

    /// How far ahead of its reader it may be.
    fn window(self) -> u64 {
        if self.run < AHEAD_EARN_BYTES { 0 } else { self.run.min(AHEAD_MAX_BYTES) }
    }

    /// Where its reader was when something was last asked for.
    fn position(self) -> u64 {
        self.head.saturating_sub(self.window())
    }

    /// Whether a fault is this reader's. The kernel reads ahead as well, so faults of one reader
    /// may come in another order than it reads.
    fn covers(self, fault: &Range<u64>) -> bool {
        let size = fault.end - fault.start;
        let start = self.position().saturating_sub(self.window().max(size));
        fault.start >= start && fault.start <= self.head + AHEAD_GAP_BYTES
    }

    /// The stream once its reader has come to `fault`, if it is time to fetch more.
    fn advanced(self, fault: &Range<u64>, blob_size: u64) -> Option<Stream> {
        let (window, consumed) = (self.window(), fault.end.checked_sub(self.position())?);
        if consumed == 0 || consumed < (window / 2).min(AHEAD_STEP_BYTES) {
            return None;
        }
        let mut next = Stream { head: self.head.max(fault.end), run: self.run + consumed };
        next.head = next.head.max((fault.end + next.window()).min(blob_size));
        Some(next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;
    const STEP: u64 = 128 * KIB as u64;

    /// Reads `count` blocks in order from `at` on; gives what was fetched ahead, and up to where.
    fn read(streams: &Streams, at: u64, count: u64) -> (u64, u64) {
        let (mut ahead_bytes, mut head) = (0, 0);
        for step in 0..count {
            let start = at + step * STEP;
            let ahead = streams.observe(&(start..start + STEP), SIZE);
            ahead_bytes += ahead.end - ahead.start;
            head = ahead.end.max(head);
        }
        (ahead_bytes, head)
    }

    #[test]
    fn a_window_is_as_long_as_what_was_read_in_order() {
        let streams = Streams::default();
        for blocks in 1..2000 {
            let start = (blocks - 1) * STEP;
            let ahead = streams.observe(&(start..start + STEP), SIZE);
            let beyond = ahead.end.saturating_sub(start + STEP);
            assert!(beyond <= (start + STEP).min(AHEAD_MAX_BYTES), "{beyond} after {start}");
        }
        let (_, head) = read(&streams, 2000 * STEP, 100);
        assert!(head > 2100 * STEP + AHEAD_MAX_BYTES - 2 * AHEAD_STEP_BYTES, "{head}");
    }

    #[test]
    fn the_reader_never_comes_to_the_end_of_its_window() {
        let streams = Streams::default();
        let (_, mut head) = read(&streams, 0, 8);
        for step in 8..2000 {
            let start = step * STEP;
            assert!(head > start + STEP, "nothing is ahead of {start}");
            head = head.max(streams.observe(&(start..start + STEP), SIZE).end);
        }
    }

    #[test]
    fn a_reader_seen_only_at_the_ends_of_its_windows_earns_the_longest() {
        let streams = Streams::default();
        let (_, mut at) = read(&streams, 0, 3);
        for _ in 0..20 {
            let ahead = streams.observe(&(at..at + STEP), SIZE);
            assert_eq!(ahead.start, at + STEP);
            at = ahead.end;
        }
        let ahead = streams.observe(&(at..at + STEP), SIZE);
        assert_eq!(ahead.end - ahead.start, AHEAD_MAX_BYTES);
    }

    #[test]
    fn asking_is_done_in_long_steps() {
        let streams = Streams::default();
        read(&streams, 0, 1000);
        let mut asked = 0;
        for step in 1000..2000 {
            let ahead = streams.observe(&(step * STEP..(step + 1) * STEP), SIZE);
            asked += u32::from(!ahead.is_empty());
        }
        assert!(u64::from(asked) <= 1000 * STEP / AHEAD_STEP_BYTES + 1, "asked {asked} times");
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
    fn a_short_read_in_several_bites_earns_nothing() {
        let streams = Streams::default();
        let chunk = 64 * KIB as u64;
        // Bites of one chunk look the same, then the next chunk.
        for start in [0, 0, 0, chunk, chunk, 2 * chunk] {
            assert!(streams.observe(&(start..start + chunk), SIZE).is_empty(), "at {start}");
        }
    }

    #[test]
    fn interleaved_streams_keep_their_windows() {
        let streams = Streams::default();
        let (mut low, mut high) = (0, SIZE / 2);
        for step in 0..8 {
            for at in [&mut low, &mut high] {
                let ahead = streams.observe(&(*at..*at + STEP), SIZE);
                assert_eq!(ahead.is_empty(), step < 2, "step {step} at {at}");
                *at = ahead.end.max(*at + STEP);
            }
        }
    }

    #[test]
    fn the_window_ends_with_the_blob() {
        let streams = Streams::default();
        let size = 5 * STEP;
        streams.observe(&(0..STEP), size);
        streams.observe(&(STEP..2 * STEP), size);
        assert_eq!(streams.observe(&(2 * STEP..3 * STEP), size), 3 * STEP..5 * STEP);
        assert!(streams.observe(&(4 * STEP..5 * STEP), size).is_empty());
    }
}
