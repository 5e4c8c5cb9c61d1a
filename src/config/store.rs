//! Limits of the caches: the ledger of the kernel's cache, and the segments of our own.

use super::*;

// Ledger: what the kernel's cache may hold. Read and written at registrations only.

/// One record: 36 bytes per chunk of a blob and 80 around them; the largest is 576 MiB.
pub const LEDGER_RECORD_MAX_BYTES: u64 = CHUNKS_PER_BLOB_MAX as u64 * 36 + 80;
/// A cookie that the kernel is taking leave of is waited for so long before it counts as in use.
pub const COOKIE_LEAVE_WAIT_MS: u64 = 5_000;
/// The pause between two looks at it.
pub const COOKIE_LOOK_MS: u64 = 10;
/// The kernel's lists of volumes and cookies: about 200 bytes for each of 300,000.
pub const COOKIE_LIST_MAX_BYTES: u64 = 64 * MIB as u64;

// Segments: the cache behind the fanotify door.

/// A fill on a core writes so much between two polls: 12 to 16 us each.
pub const FILL_SLICE_BYTES: usize = 64 * KIB;
/// The log of one blob's completions: 60 bytes for each of 65,535 segments, four times over.
pub const COMPLETION_LOG_MAX_BYTES: u64 = 16 * MIB as u64;
/// A segment's path as the kernel shows it: PATH_MAX.
pub const SEGMENT_PATH_MAX_BYTES: usize = 4096;
/// Completed segments on the way to their ignore marks and records.
pub const COMPLETED_QUEUE: usize = 64 * KIB;
/// A complete segment waits so long for others before its completion is written down.
pub const SEAL_DELAY_MS: u64 = 1_000;
/// What could not be written down is tried again after so long.
pub const SEAL_RECORD_RETRY_MS: u64 = 10_000;
/// So many complete segments are written down without waiting.
pub const SEAL_BATCH: usize = 1024;
/// Up to so many segments are synced one by one: each costs a flush of the disk.
pub const SEAL_FILES_SYNCED_ONE_BY_ONE: usize = 4;
/// How often is looked for images that nobody reads any more, and for mounts that went by hand.
pub const DOZE_INTERVAL_MS: u64 = 30_000;
/// An image nobody has read from for so long gives its memory back.
pub const AWAKE_IDLE_NS: u64 = 300 * SECOND_NS;
/// What eviction asks of the kernel to be told of before it decides who is read.
pub const EVICTION_LISTEN_MS: u64 = 1_000;
/// Readers that were let in before a segment was claimed are done after so long.
pub const EVICTION_GRACE_MS: u64 = 1_000;
/// The pause between two searches for blobs that nobody uses.
pub const EVICTION_SEARCH_MS: u64 = 200;
/// The pause between two evictions from mounted images.
pub const EVICTION_PAUSE_MS: u64 = 2_000;
/// Segments of mounted images that are decided on together.
pub const EVICTION_BATCH: usize = 4 * KIB;
/// How often a reader looks whether bytes that are being taken away are gone.
pub const EVICTION_LOOK_NS: u64 = 10 * MILLISECOND_NS;
/// How often the bytes on the disk are counted anew.
pub const SPACE_COUNT_INTERVAL_MS: u64 = 600_000;
