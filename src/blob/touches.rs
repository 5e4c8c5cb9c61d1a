//! What an image's readers needed at its start, so that the next start on this node finds it there.
//!
//! Each image notes the ranges its first readers waited for, and those read ahead for them, for
//! `START_WINDOW_NS` from the first. What comes of it is kept on disk by the daemon
//! (`daemon/starts.rs`) and prefetched, in this order, when the image is mounted once more and its
//! bytes are gone. A start is a mount: who reads an image that a former daemon had mounted is in
//! the middle of something, and is neither noted nor helped. Behind the cachefiles door a blob that
//! images of one domain share counts for the image that registered it first.
//!
//! Noting is on the fault path: two atomic steps, no lock, nothing allocated. What finds no room is
//! not noted, and costs the next start a wait.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use super::recorder::Fault;
use super::schedule::PAGE_BYTES;
use crate::config::{
    MILLISECOND_NS, PREFETCH_GAP_BYTES, START_TOUCHED_MAX_BYTES, START_TOUCHES_MAX, START_WINDOW_NS,
};

/// The touches of one image: of this start, and of those before. Shared by all cores.
#[derive(Debug, Default)]
pub struct Touches {
    /// Each a [`Fault`] in one word; 0 where there is none yet.
    slots: OnceLock<Box<[AtomicU64]>>,
    next: AtomicUsize,
    /// When the first came; 0 before that.
    began_ns: AtomicU64,
    is_resumed: AtomicBool,
    is_over: AtomicBool,
    /// A word each, too: a node has thousands of images.
    known: RwLock<Arc<[u64]>>,
}

impl Touches {
    /// Makes room for notes, if any are to come. Not for the fault path.
    pub fn prepare(&self) {
        if self.is_over.load(Ordering::Relaxed) {
            return;
        }
        self.slots.get_or_init(|| (0..START_TOUCHES_MAX).map(|_| AtomicU64::new(0)).collect());
    }

    /// The image was mounted before this daemon came: this is no start.
    pub fn resume(&self) {
        self.is_resumed.store(true, Ordering::Relaxed);
    }

    /// Nothing is noted: this daemon learns nothing.
    pub fn rest(&self) {
        self.is_over.store(true, Ordering::Relaxed);
    }

    /// What earlier starts needed.
    pub fn recall(&self, known: &[Fault]) {
        let words = known.iter().filter_map(|it| pack(it.blob_index, &it.range, it.elapsed_ns));
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = words.collect();
    }

    /// A reader needs `range` of a blob.
    pub fn note(&self, blob_index: u32, range: &Range<u64>, now_ns: u64) {
        if self.is_over.load(Ordering::Relaxed) || self.is_resumed() {
            return;
        }
        let Some(slots) = self.slots.get() else { return };
        let began_ns = match self.began_ns.load(Ordering::Relaxed) {
            0 => {
                let now_ns = now_ns.max(1);
                let raced =
                    self.began_ns.compare_exchange(0, now_ns, Ordering::Relaxed, Ordering::Relaxed);
                raced.err().unwrap_or(now_ns)
            }
            began_ns => began_ns,
        };
        let elapsed_ns = now_ns.saturating_sub(began_ns);
        if elapsed_ns >= START_WINDOW_NS || self.next.load(Ordering::Relaxed) >= slots.len() {
            return;
        }
        let Some(word) = pack(blob_index, range, elapsed_ns) else { return };
        if let Some(slot) = slots.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            slot.store(word, Ordering::Release);
        }
    }

    /// Whether the image was mounted before this daemon came.
    pub fn is_resumed(&self) -> bool {
        self.is_resumed.load(Ordering::Relaxed)
    }

    /// What a start is known to need of a blob, in the order of its touches. What is close to the
    /// range before is joined to it, with what is between.
    pub fn known_ranges(&self, blob_index: u32) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        if self.is_resumed() {
            return ranges;
        }
        for touch in self.known().filter(|touch| touch.blob_index == blob_index) {
            let Range { start, end } = touch.range;
            match ranges.last_mut() {
                Some(last) if (last.start..=last.end + PREFETCH_GAP_BYTES).contains(&start) => {
                    last.end = last.end.max(end);
                }
                _ => ranges.push(start..end),
            }
        }
        ranges
    }

    /// Everything known, this start's so far included; earlier starts' touches come first.
    pub fn all(&self) -> Vec<Fault> {
        let slots = self.slots.get().map_or(&[][..], |slots| slots);
        let words = slots.iter().map(|slot| slot.load(Ordering::Acquire));
        merge(self.known().collect(), words.filter_map(unpack))
    }

    /// Ends the notes if their time is up, or in any case; gives what is known if that is more than
    /// it was.
    pub fn end(&self, now_ns: u64, is_end: bool) -> Option<Vec<Fault>> {
        let began_ns = self.began_ns.load(Ordering::Relaxed);
        let is_up = is_end || now_ns.saturating_sub(began_ns) >= START_WINDOW_NS;
        if began_ns == 0 || !is_up || self.is_over.swap(true, Ordering::Relaxed) {
            return None;
        }
        let all = self.all();
        let is_more = all.len() > self.known().count();
        self.recall(&all);
        is_more.then_some(all)
    }

    fn known(&self) -> impl Iterator<Item = Fault> + use<> {
        let words = Arc::clone(&self.known.read().unwrap_or_else(PoisonError::into_inner));
        (0..words.len()).filter_map(move |at| unpack(words[at]))
    }
}

/// Adds touches that are not part of earlier ones, up to what is prefetched for one start.
fn merge(mut known: Vec<Fault>, new: impl Iterator<Item = Fault>) -> Vec<Fault> {
    let mut bytes: u64 = known.iter().map(|touch| touch.range.end - touch.range.start).sum();
    for touch in new {
        let is_in = |other: &Fault| {
            other.blob_index == touch.blob_index
                && other.range.start <= touch.range.start
                && other.range.end >= touch.range.end
        };
        let size = touch.range.end - touch.range.start;
        let has_room = known.len() < START_TOUCHES_MAX && bytes + size <= START_TOUCHED_MAX_BYTES;
        if has_room && !known.iter().any(is_in) {
            bytes += size;
            known.push(touch);
        }
    }
    known
}

/// Blob (8 bits), first page (24), pages (16, never 0), milliseconds (16). None for what does not
/// fit: a blob's part beyond 64 GiB.
fn pack(blob_index: u32, range: &Range<u64>, elapsed_ns: u64) -> Option<u64> {
    let elapsed_ms = elapsed_ns / MILLISECOND_NS;
    let first = range.start / PAGE_BYTES;
    let count = range.end.div_ceil(PAGE_BYTES).checked_sub(first)?.min(0xffff);
    let is_small = blob_index < 1 << 8 && first < 1 << 24 && elapsed_ms < 1 << 16;
    (is_small && !range.is_empty())
        .then(|| u64::from(blob_index) << 56 | first << 32 | count << 16 | elapsed_ms)
}

fn unpack(word: u64) -> Option<Fault> {
    let (first, count) = (word >> 32 & 0xff_ffff, word >> 16 & 0xffff);
    (count > 0).then(|| Fault {
        blob_index: (word >> 56) as u32,
        range: first * PAGE_BYTES..(first + count) * PAGE_BYTES,
        elapsed_ns: (word & 0xffff) * MILLISECOND_NS,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = crate::config::SECOND_NS;

    fn prepared() -> Touches {
        let touches = Touches::default();
        touches.prepare();
        touches
    }

    fn touch(blob_index: u32, range: Range<u64>, elapsed_ms: u64) -> Fault {
        Fault { blob_index, range, elapsed_ns: elapsed_ms * MILLISECOND_NS }
    }

    #[test]
    fn who_rests_notes_nothing_and_takes_no_memory() {
        let touches = Touches::default();
        touches.rest();
        touches.prepare();
        touches.note(0, &(0..1), SECOND);
        assert!(touches.slots.get().is_none() && touches.all().is_empty());
        assert_eq!(touches.end(2 * SECOND, true), None);
    }

    #[test]
    fn a_touch_is_whole_pages_and_comes_back() {
        let touches = prepared();
        touches.note(253, &(5000..5001), 7 * SECOND);
        touches.note(0, &(1 << 35..(1 << 35) + 8192), 7 * SECOND + 3 * MILLISECOND_NS);
        let expected = [touch(253, 4096..8192, 0), touch(0, 1 << 35..(1 << 35) + 8192, 3)];
        assert_eq!(touches.all(), expected);
        // Nothing, and what does not fit.
        touches.note(0, &(9..9), 7 * SECOND);
        touches.note(0, &(1 << 36..(1 << 36) + 1), 7 * SECOND);
        touches.note(256, &(0..1), 7 * SECOND);
        assert_eq!(touches.all().len(), 2);
    }

    #[test]
    fn a_start_has_an_end_and_is_told_of_once() {
        let touches = prepared();
        assert_eq!(touches.end(SECOND, true), None, "nobody has read anything");
        touches.note(0, &(0..4096), SECOND);
        touches.note(0, &(4096..8192), SECOND + START_WINDOW_NS);
        assert_eq!(touches.end(SECOND + START_WINDOW_NS - 1, false), None);
        let ended = touches.end(SECOND + START_WINDOW_NS, false);
        assert_eq!(ended, Some(vec![touch(0, 0..4096, 0)]));
        assert_eq!(touches.end(u64::MAX, true), None);
        touches.note(0, &(8192..12288), SECOND + 1);
        assert_eq!(touches.all().len(), 1);
        assert_eq!(touches.known_ranges(0), std::slice::from_ref(&(0..4096)));
    }

    #[test]
    fn a_second_start_adds_what_the_first_did_not_need() {
        let touches = prepared();
        touches.recall(&[touch(0, 0..8192, 5)]);
        touches.note(0, &(4096..8192), SECOND);
        assert_eq!(touches.end(SECOND, true), None, "nothing new");
        let touches = prepared();
        touches.recall(&[touch(0, 0..8192, 5)]);
        touches.note(1, &(4096..8192), SECOND);
        let ended = touches.end(SECOND, true);
        assert_eq!(ended, Some(vec![touch(0, 0..8192, 5), touch(1, 4096..8192, 0)]));
    }

    #[test]
    fn what_is_close_behind_is_joined_in_the_order_of_touches() {
        let touches = Touches::default();
        let gap = PREFETCH_GAP_BYTES;
        touches.recall(&[
            touch(0, 1 << 20..(1 << 20) + 4096, 0),
            touch(1, 0..4096, 1),
            touch(0, (1 << 20) + 4096 + gap..(1 << 20) + 8192 + gap, 2),
            touch(0, 0..4096, 3),
            touch(0, 8192 + gap..12288 + gap, 4),
        ]);
        let expected = [1 << 20..(1 << 20) + 8192 + gap, 0..4096, 8192 + gap..12288 + gap];
        assert_eq!(touches.known_ranges(0), expected);
        assert!(touches.known_ranges(2).is_empty());
    }

    #[test]
    fn a_resumed_image_is_neither_noted_nor_helped() {
        let touches = prepared();
        touches.recall(&[touch(0, 0..4096, 0)]);
        touches.resume();
        touches.note(0, &(8192..12288), SECOND);
        assert!(touches.is_resumed() && touches.known_ranges(0).is_empty());
        assert_eq!(touches.end(u64::MAX, true), None);
    }

    #[test]
    fn touches_and_their_bytes_are_bounded() {
        let touches = prepared();
        let mut page = 0;
        for _ in 0..START_TOUCHES_MAX + 10 {
            touches.note(0, &(page..page + 4096), SECOND);
            page += 8192;
        }
        assert_eq!(touches.all().len(), START_TOUCHES_MAX);
        let size = START_TOUCHED_MAX_BYTES / 2;
        let large = (0..3).map(|it| touch(0, it * size..(it + 1) * size, 0));
        assert_eq!(merge(Vec::new(), large).len(), 2);
    }

    #[test]
    fn without_room_nothing_is_noted() {
        let touches = Touches::default();
        touches.note(0, &(0..4096), SECOND);
        assert!(touches.all().is_empty());
    }
}
