//! Limits of pushing and converting images.
//!
//! Memory of transfers: 2 layers at once (one is built, the next arrives) x 16 pieces of at most
//! 1.125 MiB, and 4 uploads x 1.2 MiB of leases: 41 MiB at the very most.

use super::{KIB, MANIFEST_MAX_BYTES, MIB};

/// Bytes of a file read and sent at once; each has a whole timeout.
pub const UPLOAD_PIECE_SIZE: usize = 256 * KIB;
/// Bytes sent in one request: a failure loses no more, a token need not live longer.
pub const UPLOAD_CHUNK_SIZE: u64 = 256 * MIB as u64;
/// Times a write request is tried when nothing comes of it; what moved on counts anew.
pub const UPLOAD_TRIES_MAX: u32 = 5;
/// Times an upload is begun from its first byte.
pub const UPLOAD_STARTS_MAX: u32 = 3;
/// An answer to a write may take this many of the backend's timeouts: stores copy and hash.
pub const UPLOAD_TIMEOUT_FACTOR: u64 = 12;
/// Characters kept of what a registry says about a refusal.
pub const COMPLAINT_CHARS_MAX: usize = 256;
/// Times a download goes on after a failure when no new byte comes.
pub const DOWNLOAD_TRIES_MAX: u32 = 5;
/// Layers of an image that is converted; Docker's own limit is 127.
pub const LAYERS_MAX: usize = 250;
/// Lines of history of such an image.
pub const HISTORY_MAX: usize = 4096;
/// Images that may refer to one other, as far as we keep the list.
pub const REFERRERS_MAX: usize = 1000;
/// Layers and blobs on their way at once, per registry; each has a thread and an engine.
pub const TRANSFERS_MAX: usize = 4;
/// Pieces of a layer that wait for the builder: 16 x 64 KiB to 1.125 MiB.
pub const LAYER_PIECES_AHEAD: usize = 16;
/// Names tried for a working directory.
pub const WORK_DIRECTORY_TRIES_MAX: u32 = 1000;
/// Names looked at in search of working directories of the dead.
pub const WORK_SWEEP_MAX: usize = 10_000;
/// Images of an index that are converted in one run.
pub const PLATFORMS_MAX: usize = 64;
/// Bytes of an image's configuration.
pub const IMAGE_CONFIG_MAX_BYTES: usize = MANIFEST_MAX_BYTES;
/// Names of a layout or archive shown when a user has to choose.
pub const NAMES_SHOWN_MAX: usize = 10;
/// Members of a docker-archive: four per layer and a few more, in archives of many images.
pub const ARCHIVE_MEMBERS_MAX: usize = 64 * KIB;
/// Where unfinished files lie when neither destination nor environment say.
pub const WORK_PARENT_DEFAULT: &str = "/var/tmp";
/// Lines of a trace: a start that touches 4 GiB page by page.
pub const TRACE_LINES_MAX: usize = 1 << 20;
/// Bytes of one line: the longest path, escaped, and the rest.
pub const TRACE_LINE_MAX_BYTES: u64 = 32 * KIB as u64;
