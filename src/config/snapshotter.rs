//! Limits of the snapshotter: snapshots for containerd. Records are small: 100,000 x about 2 KiB =
//! 200 MiB of memory at most.

use super::*;

/// Lower directories of one overlay: the kernel's own limit (OVL_MAX_STACK, fs/overlayfs/params.h).
pub const OVERLAY_LOWERS_MAX: usize = 500;
/// Snapshots under one root.
pub const SNAPSHOTS_MAX: usize = 100_000;
/// One record; containerd allows 4 KiB for each label and sends about ten.
pub const SNAPSHOT_RECORD_MAX_BYTES: u64 = 256 * KIB as u64;
/// Ids set aside at a time; a restart skips at most so many.
pub const SNAPSHOT_IDS_STEP: u64 = 1024;
/// How long a root's former owner may take to go.
pub const SNAPSHOT_LOCK_WAIT_MS: u64 = 3_000;
/// The pause between two looks at its lock.
pub const SNAPSHOT_LOCK_LOOK_MS: u64 = 20;
/// Snapshots in one message of a list, as in containerd.
pub const SNAPSHOT_LIST_PART: usize = 100;
/// Filters of one request.
pub const FILTERS_MAX: usize = 64;
/// Bytes of one filter.
pub const FILTER_MAX_BYTES: usize = 8 * KIB;
/// Calls of one client at once; more wait in HTTP/2.
pub const SNAPSHOT_CALLS_AT_ONCE: usize = 256;
/// Images being mounted, unmounted or read whole at once; others wait their turn.
pub const IMAGE_MOUNTS_AT_ONCE: usize = 64;
/// Mounts of an image over each other, one for each daemon that did not know of the one before.
pub const IMAGE_MOUNTS_STACKED_MAX: usize = 64;
/// Threads for what blocks: the images' and as many for everything else, which is short.
pub const SNAPSHOT_THREADS: usize = 2 * IMAGE_MOUNTS_AT_ONCE;
/// What is under way when the snapshotter is told to stop may take so long.
pub const SNAPSHOT_STOP_WAIT_MS: u64 = 5_000;
/// How long a snapshot waits for its image by default: half of what the kubelet waits.
pub const IMAGE_WAIT_DEFAULT_MS: u64 = 60_000;
/// The first pause before an image is tried again; it doubles.
pub const IMAGE_RETRY_MS: u64 = 250;
/// The longest such pause.
pub const IMAGE_RETRY_MS_MAX: u64 = 4_000;
/// Those who waited for the same image share its failure this long.
pub const IMAGE_FAILURE_LIFE_MS: u64 = 1_000;
/// How long it may take to bring all of an image to this node.
pub const IMAGE_FULL_WAIT_MS: u64 = 1_800_000;
/// Entries of an image looked at in search of a file to read.
pub const PROBE_ENTRIES_MAX: usize = 10_000;
/// Prefetch threads asked of the daemon when all of an image is wanted.
pub const PREFETCH_THREADS_DEFAULT: u32 = 4;
/// How much one such fetch asks for.
pub const PREFETCH_MERGING_DEFAULT_BYTES: usize = MIB;
/// Where the snapshotter's sockets are, one per name.
pub const SNAPSHOTTER_RUN_DIR_DEFAULT: &str = "/run/sluice-snapshotter";
/// Where snapshots are kept, one directory per name.
pub const SNAPSHOTTER_ROOT_DEFAULT: &str = "/var/lib/sluice-snapshotter";
/// Where containerd listens.
pub const CONTAINERD_SOCKET_DEFAULT: &str = "/run/containerd/containerd.sock";
/// One call to containerd; the longest unpacks a bootstrap.
pub const CONTAINERD_CALL_TIMEOUT_MS: u64 = 120_000;
/// Content sent in one message; containerd takes 16 MiB.
pub const CONTENT_PIECE_BYTES: usize = MIB;
/// A label's key and value together, in containerd (labels/validate.go).
pub const LABEL_MAX_BYTES: usize = 4096;
/// What a pull that broke off leaves is garbage after this time.
pub const PULL_LEASE_S: u64 = 3600;
