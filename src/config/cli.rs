//! Limits and defaults of the command line.

use super::*;

/// One worker per CPU up to here; more CPUs than this need `--cores`, and no list is longer.
pub const CORES_MAX: usize = 64;
/// Workers when nobody said: a node's other work needs its CPUs too.
pub const CORES_DEFAULT: usize = 8;
/// Where `sluice daemon` listens and the other commands call.
pub const API_SOCKET_DEFAULT: &str = "/run/sluice.sock";
/// Bootstraps and registrations.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/sluice";
/// The kernel's requests are answered by then; half of the kernel's hung-task warning (120 s).
pub const FAULT_DEADLINE_DEFAULT_MS: u64 = 60_000;
/// The least that still covers a connection, a token and a chunk.
pub const FAULT_DEADLINE_MIN_MS: u64 = 1_000;
/// The open files nydusd asks for, and so do we.
pub const NOFILE_DEFAULT: u64 = 1_000_000;
/// A call to the daemon: no call waits for a registry, so this is generous.
pub const API_CALL_TIMEOUT_MS: u64 = 10_000;
/// The longest head of a daemon's answer.
pub const API_REPLY_HEAD_MAX_BYTES: usize = 16 * KIB;
/// The longest answer of a daemon: 16 MiB is a list of about 30,000 images.
pub const API_REPLY_MAX_BYTES: usize = 16 * MIB;
/// The header lines an answer may have.
pub const API_REPLY_HEADERS_MAX: usize = 32;
/// mount(2) takes one page of options, NUL included; longer device lists are left to the kernel.
pub const MOUNT_OPTIONS_MAX_BYTES: usize = 4095;
/// A text file of the kernel (`/proc`, `/boot/config-*`); the longest known is 300 KiB.
pub const SYSTEM_TEXT_MAX_BYTES: u64 = 8 * MIB as u64;
/// Open descriptors looked at while searching who holds the device.
pub const DESCRIPTORS_SCANNED_MAX: usize = 1_000_000;
/// Bytes of one name in a directory: the kernel's NAME_MAX.
pub const FILE_NAME_MAX_BYTES: usize = 255;
/// Bytes of a symbolic link's target: the kernel's PATH_MAX.
pub const LINK_TARGET_MAX_BYTES: u64 = 4096;
/// Bytes of a path met on a walk: deeper trees can be mounted, not inspected.
pub const TREE_PATH_MAX_BYTES: usize = 32 * KIB;
/// Bytes of a manifest or index: what registries commonly accept.
pub const MANIFEST_MAX_BYTES: usize = 4 * MIB;
/// Bytes of unpacked tar read in search of a bootstrap.
pub const LAYER_SCAN_MAX_BYTES: u64 = 4 * BOOTSTRAP_MAX_BYTES as u64;
/// Threads that read and verify blobs at the same time.
pub const CHECK_READERS_MAX: usize = 16;
/// Bytes of a blob read at once while it is verified, unless one unit is longer:
/// 16 readers x (16 MiB read + 16 MiB decoded + 32 MiB of decoder) = 1 GiB at the very worst.
pub const CHECK_BATCH_BYTES: u64 = 4 * MIB as u64;
/// Units closer together than this are read in one range.
pub const CHECK_GAP_BYTES: u64 = 64 * KIB as u64;
/// Bad chunks remembered per blob; more are counted.
pub const CHECK_BAD_CHUNKS_MAX: usize = 10_000;
/// Files named per bad chunk; more are counted.
pub const CHECK_FILES_MAX: usize = 10;
/// One range, manifest or bootstrap layer fetched by a command, retries included, apart from the
/// time its bytes take.
pub const CLI_FETCH_DEADLINE_NS: u64 = 60 * SECOND_NS;
/// Bytes per second below which a download is given up.
pub const CLI_FETCH_SLOWEST_BYTES: u64 = 64 * KIB as u64;
/// A bootstrap layer is a tar.gz; compressed it is smaller than what it holds.
pub const BOOTSTRAP_LAYER_MAX_BYTES: usize = 512 * MIB;
/// Faults of an image's structure shown; more are counted.
pub const CHECK_FAULTS_MAX: usize = 1000;
/// Files shown as an image's largest.
pub const INSPECT_LARGEST_FILES: usize = 10;
