//! Limits of pushing and converting images.
//!
//! Memory of transfers: 4 at once x (2 x 1.125 MiB + 64 KiB) per registry.

use super::{KIB, MIB};

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
