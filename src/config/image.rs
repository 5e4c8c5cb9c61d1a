//! Limits of images: what one bootstrap, blob or chunk may ask of us. All of it is hostile input.

use super::*;

/// Data blobs per image: EROFS device ids are bytes, 0 is the bootstrap, and RAFS keeps one back.
pub const BLOBS_PER_IMAGE_MAX: usize = 254;
/// Chunks per blob: RAFS stores a chunk index in 24 bits.
pub const CHUNKS_PER_BLOB_MAX: u32 = 1 << 24;
/// Bytes of one decoded chunk.
pub const CHUNK_MAX_BYTES: usize = 16 * MIB;
/// Bytes of one unit as fetched. Encryption pads up to 18 bytes, but never a chunk this large.
pub const UNIT_COMPRESSED_MAX_BYTES: usize = 16 * MIB;
/// Bytes of the address space one unit covers: what a Large lease holds.
pub const UNIT_OUTPUT_MAX_BYTES: usize = 16 * MIB;
/// Bytes of a bootstrap. A million files cost about 200 MiB.
pub const BOOTSTRAP_MAX_BYTES: usize = 1024 * MIB;
/// Bytes of a decompressed context table: 32 KiB of dictionary per 0.5 MiB of tar.gz or so, which
/// allows layers of about 5 GiB.
pub const CONTEXT_TABLE_MAX_BYTES: usize = 512 * MIB;
/// Bytes a decoder takes when it is made: the decoded form of an ordinary ZRAN context (2 MiB).
pub const DECODER_SCRATCH_BYTES: usize = 2 * MIB;
/// Bytes a deflate dictionary can have: the window of the format.
pub const DEFLATE_DICTIONARY_MAX_BYTES: usize = 32 * KIB;
