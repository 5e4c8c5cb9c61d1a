//! Limits of the Docker plugin: layers it unpacks and packs, and the socket it serves.

use super::*;

// Layers: hostile input from registries and containers.

/// Extensions in front of one member of a tar.
pub const TAR_EXTENSIONS_MAX: usize = 64;
/// Bytes of one extension of a tar: what Go's archive/tar, and so Docker, reads at most.
pub const TAR_EXTENSION_MAX_BYTES: usize = MIB;
/// Runs of data of one sparse file in a tar: 64 Ki x 16 bytes = 1 MiB.
pub const TAR_SPARSE_RUNS_MAX: usize = 64 * KIB;
/// Bytes of a file's content copied at once.
pub const TAR_COPY_BYTES: usize = 256 * KIB;
/// Paths of a layer's directories, kept until its end to set their times: about a million.
pub const LAYER_DIRECTORIES_MAX_BYTES: usize = 128 * MIB;
/// Directories in each other: PATH_MAX has room for 2,048, and each costs a descriptor.
pub const LAYER_DEPTH_MAX: usize = 1000;
/// Paths in one answer to `docker diff`.
pub const LAYER_CHANGES_MAX: usize = 1 << 20;
