//! Limits of building and unpacking images.
//!
//! Memory of a build: `BUILD_IN_FLIGHT_BYTES` of jobs, about 100 bytes per chunk and 200 per file,
//! and the compressors (a MiB or two per thread up to zstd level 12).

use super::*;

/// Threads that digest and compress.
pub const BUILD_THREADS_MAX: usize = 256;
/// Bytes of file data that travel together, unless one chunk is larger.
pub const BUILD_JOB_BYTES: usize = MIB;
/// Pieces of file data that travel together.
pub const BUILD_JOB_PIECES_MAX: usize = 4096;
/// Bytes of jobs on their way, plain and packed: with chunks of 16 MiB four jobs go round.
pub const BUILD_IN_FLIGHT_BYTES: usize = 128 * MIB;
/// What is collected before it is written to a blob file.
pub const BUILD_WRITE_BYTES: usize = 256 * KIB;
/// What is read of a layer at once.
pub const BUILD_READ_BYTES: usize = 256 * KIB;
/// Chunks of file data in all files of an image, duplicates included: 64 GiB in chunks of 4 KiB, or
/// 16 TiB of 1 MiB. A tar of one block can claim a hole of any size; this bounds what it costs.
pub const BUILD_REFERENCES_MAX: usize = 1 << 24;
/// Files of all layers of an image, those that later layers replace included.
pub const BUILD_INODES_MAX: usize = 1 << 24;
/// Bytes of a path in a layer: the kernel's PATH_MAX.
pub const PATH_MAX_BYTES: usize = 4096;
/// Symbolic links followed on the way along a path: the kernel's MAXSYMLINKS.
pub const LINKS_FOLLOWED_MAX: usize = 40;
/// Names passed on the way along a path, those in the targets of links counted: a path has 2048 of
/// one byte at most, and links may add as many. 40 links of 1600 names each would make 64000, for
/// every path that leads through them.
pub const WALK_NAMES_MAX: usize = PATH_MAX_BYTES;
/// Directories of a walk may be nested so deep: each holds a descriptor, of 1024 by default.
pub const BUILD_DEPTH_MAX: usize = 512;
/// Names of one file's extended attributes: the kernel's XATTR_LIST_MAX.
pub const XATTR_LIST_MAX_BYTES: usize = 64 * KIB;
/// Bytes of a blob read at once while an image is unpacked, unless one unit is longer.
pub const UNPACK_READ_BYTES: u64 = MIB as u64;
