//! How many bytes segments take, how many they may, and what has to go. Pure but for its memory.
//!
//! The quota is kept by watermarks: above the high one eviction begins, and it ends below the low
//! one. Blobs that no bound image has go first, whole, the longest unused one first. Bytes are
//! counted as they are filled, on all cores, and counted anew from the disk from time to time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::segments::BlobUsage;

/// The count. Shared by all segments of a store.
#[derive(Debug, Default)]
pub struct Space {
    used: AtomicU64,
    /// Bytes there may be; 0 is no bound.
    quota: AtomicU64,
    /// Somebody had no room, or the high watermark was crossed: eviction is due.
    is_short: AtomicBool,
    /// While bytes of bound images are taken away, a file's size alone is no answer.
    is_evicting: AtomicBool,
}

impl Space {
    /// Bounds the bytes; 0 is no bound.
    pub fn set_quota(&self, quota: u64) {
        self.quota.store(quota, Ordering::Relaxed);
    }

    /// Bytes there may be; 0 is no bound.
    pub fn quota(&self) -> u64 {
        self.quota.load(Ordering::Relaxed)
    }

    /// Bytes there are.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// The disk was counted.
    pub fn set_used(&self, used: u64) {
        self.used.store(used, Ordering::Relaxed);
    }

    /// Bytes were filled.
    pub fn grow(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        if self.is_above_high() {
            self.is_short.store(true, Ordering::Relaxed);
        }
    }

    /// Whether eviction is to begin.
    pub fn is_above_high(&self) -> bool {
        let quota = self.quota();
        quota > 0 && self.used() > high_watermark(quota)
    }

    /// Bytes were taken away.
    pub fn shrink(&self, bytes: u64) {
        // Counted anew meanwhile, perhaps: never below nothing.
        let less = |used: u64| Some(used.saturating_sub(bytes));
        let _ = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Whether eviction is due; asks once for each time.
    pub fn take_shortage(&self) -> bool {
        self.is_short.swap(false, Ordering::Relaxed)
    }

    /// Somebody had no room.
    pub fn report_shortage(&self) {
        self.is_short.store(true, Ordering::Relaxed);
    }

    /// Bytes that must go now to be below the low watermark.
    pub fn excess(&self) -> u64 {
        match self.quota() {
            0 => 0,
            quota => self.used().saturating_sub(low_watermark(quota)),
        }
    }

    /// Whether bytes of bound images are being taken away.
    pub fn is_evicting(&self) -> bool {
        // Acquire pairs with the Release in set_evicting().
        self.is_evicting.load(Ordering::Acquire)
    }

    /// Begins or ends that.
    pub fn set_evicting(&self, is_evicting: bool) {
        self.is_evicting.store(is_evicting, Ordering::Release);
    }
}

/// Eviction begins above this.
fn high_watermark(quota: u64) -> u64 {
    quota - quota / 10
}

/// Eviction ends below this.
fn low_watermark(quota: u64) -> u64 {
    quota - quota / 4
}

/// Which blobs go to free at least `excess` bytes: those nobody has open, longest unused first.
pub fn choose(mut usage: Vec<BlobUsage>, excess: u64) -> Vec<BlobUsage> {
    usage.retain(|blob| !blob.is_open && blob.bytes > 0);
    usage.sort_by(|one, two| (one.last_used, &one.blob_id).cmp(&(two.last_used, &two.blob_id)));
    let mut freed = 0;
    let is_needed = |blob: &BlobUsage| {
        let is_needed = freed < excess;
        freed += blob.bytes;
        is_needed
    };
    usage.into_iter().take_while(is_needed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    fn blob(id: &str, bytes: u64, used_s: u64, is_open: bool) -> BlobUsage {
        let last_used = UNIX_EPOCH + Duration::from_secs(used_s);
        BlobUsage { blob_id: id.into(), bytes, last_used, is_open }
    }

    #[test]
    fn the_longest_unused_blobs_go_and_no_more_than_needed() {
        let usage = vec![
            blob("new", 100, 30, false),
            blob("open", 100, 1, true),
            blob("old", 100, 10, false),
            blob("empty", 0, 0, false),
            blob("older", 50, 5, false),
        ];
        let ids = |excess| {
            let chosen = choose(usage.clone(), excess);
            chosen.into_iter().map(|blob| blob.blob_id).collect::<Vec<_>>()
        };
        assert_eq!(ids(0), [""; 0]);
        assert_eq!(ids(1), ["older"]);
        assert_eq!(ids(51), ["older", "old"]);
        assert_eq!(ids(10_000), ["older", "old", "new"]);
    }

    #[test]
    fn eviction_is_due_above_the_high_watermark_and_ends_below_the_low_one() {
        let space = Space::default();
        space.grow(1000);
        assert!(!space.take_shortage() && space.excess() == 0);
        space.set_quota(1000);
        space.set_used(0);
        space.grow(900);
        assert!(!space.take_shortage());
        space.grow(1);
        assert!(space.take_shortage() && !space.take_shortage());
        assert_eq!(space.excess(), 901 - 750);
        space.shrink(u64::MAX);
        assert_eq!((space.used(), space.excess()), (0, 0));
    }
}
