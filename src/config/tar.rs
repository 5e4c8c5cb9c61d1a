//! Limits of tar archives: hostile input from registries and containers.

use super::*;

/// Bytes of one extension header: what Go's archive/tar, and so Docker, reads at most. An inode's
/// attributes have at most 256 KiB.
pub const TAR_EXTENSION_MAX_BYTES: u64 = MIB as u64;
/// Extension headers in front of one member.
pub const TAR_EXTENSIONS_MAX: usize = 16;
/// Segments of one sparse file: 256 Ki x 16 bytes = 4 MiB.
pub const TAR_SEGMENTS_MAX: usize = 256 * KIB;
/// Bytes of a file's content copied at once.
pub const TAR_COPY_BYTES: usize = 256 * KIB;
