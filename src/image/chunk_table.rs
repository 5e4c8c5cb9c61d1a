//! The chunk table of a bootstrap: 80 bytes for each chunk its files use.
//!
//! It has the digest of every chunk, with no further download; that is what makes every fill
//! verifiable. Chunks of a blob that the merged tree does not use are missing from it.

use super::blob_table::BlobRecord;
use super::digest::Digest;
use super::identity::ChunkIndex;
use super::little::{bytes_at, u32_at, u64_at};
use super::superblock::BLOCK_BYTES;
use crate::config::{CHUNK_MAX_BYTES, UNIT_COMPRESSED_MAX_BYTES};
use crate::error::Result;

pub(super) const BYTES: usize = 80;

/// Flag bits of a chunk, as the chunk table stores them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkFlags(pub u32);

impl ChunkFlags {
    const COMPRESSED: u32 = 0x1;
    const HOLE: u32 = 0x2;
    const ENCRYPTED: u32 = 0x4;
    const BATCH: u32 = 0x8;
    const HAS_CRC32: u32 = 0x10;
    const KNOWN: u32 = 0x1d;

    /// The flags of a chunk that is neither encrypted nor part of a batch.
    pub fn stored(is_compressed: bool) -> Self {
        ChunkFlags(if is_compressed { Self::COMPRESSED } else { 0 })
    }

    /// The stored form is compressed.
    pub fn is_compressed(self) -> bool {
        self.0 & Self::COMPRESSED != 0
    }

    /// The stored form is encrypted.
    pub fn is_encrypted(self) -> bool {
        self.0 & Self::ENCRYPTED != 0
    }

    /// The chunk is one member of a batch; its own compressed extent says nothing.
    pub fn is_batch(self) -> bool {
        self.0 & Self::BATCH != 0
    }
}

/// One entry of the chunk table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRecord {
    /// Digest of the uncompressed chunk, by the blob's digest algorithm.
    pub digest: Digest,
    /// The blob it is in.
    pub blob_index: u32,
    /// How it is stored.
    pub flags: ChunkFlags,
    /// Bytes as stored; 0 for members of a batch, perhaps 0 in a ZRAN blob.
    pub compressed_size: u32,
    /// Bytes of the chunk, 1 to 16 MiB.
    pub uncompressed_size: u32,
    /// Where it is stored in the blob file.
    pub compressed_offset: u64,
    /// Where it lies in the blob's address space: a multiple of 4096.
    pub uncompressed_offset: u64,
    /// Where it lies in the first file that has it.
    pub file_offset: u64,
    /// Position in the blob.
    pub index: ChunkIndex,
    /// CRC-32C of the uncompressed chunk, if the builder stored one.
    pub crc32c: Option<u32>,
}

impl ChunkRecord {
    /// Reads an entry; `check` decides whether it makes sense.
    pub(super) fn read(record: &[u8; BYTES]) -> Self {
        let flags = ChunkFlags(u32_at(record, 36));
        let has_crc = flags.0 & ChunkFlags::HAS_CRC32 != 0;
        ChunkRecord {
            digest: Digest(bytes_at(record, 0)),
            blob_index: u32_at(record, 32),
            flags,
            compressed_size: u32_at(record, 40),
            uncompressed_size: u32_at(record, 44),
            compressed_offset: u64_at(record, 48),
            uncompressed_offset: u64_at(record, 56),
            file_offset: u64_at(record, 64),
            index: ChunkIndex(u32_at(record, 72)),
            crc32c: has_crc.then(|| u32_at(record, 76)),
        }
    }

    /// Checks everything that can be known from the entry and its blob.
    pub(super) fn check(&self, blobs: &[BlobRecord]) -> Result<()> {
        let Some(blob) = blobs.get(self.blob_index as usize) else {
            return Err(malformed!("a chunk of blob {}, which does not exist", self.blob_index));
        };
        self.check_in(blob)
            .map_err(|error| error.context(format!("blob {}, chunk {}", blob.id, self.index)))
    }

    fn check_in(&self, blob: &BlobRecord) -> Result<()> {
        if self.flags.0 & ChunkFlags::HOLE != 0 {
            return Err(unsupported!("hole chunks"));
        }
        if self.flags.0 & !ChunkFlags::KNOWN != 0 {
            return Err(unsupported!("unknown chunk flags {:#x}", self.flags.0));
        }
        if self.index.0 >= blob.chunk_count {
            return Err(malformed!("the blob has {} chunks", blob.chunk_count));
        }
        if self.flags.is_batch() && !blob.is_batch() {
            return Err(malformed!("a member of a batch in a blob without batches"));
        }
        let size = self.uncompressed_size as usize;
        if size == 0 || size > CHUNK_MAX_BYTES {
            return Err(malformed!("{size} bytes: a chunk has 1 byte to 16 MiB"));
        }
        let start = self.uncompressed_offset;
        let padded = size.next_multiple_of(BLOCK_BYTES) as u64;
        let ends_inside =
            start.checked_add(padded).is_some_and(|end| end <= blob.uncompressed_size);
        if !start.is_multiple_of(BLOCK_BYTES as u64) || !ends_inside {
            return Err(malformed!("at {start}: not on a block, or outside the address space"));
        }
        if blob.is_zran() || self.flags.is_batch() {
            return Ok(());
        }
        self.check_stored(blob)
    }

    /// The extent in the blob file. ZRAN blobs and batches have it in the context table instead.
    fn check_stored(&self, blob: &BlobRecord) -> Result<()> {
        let stored = self.compressed_size as usize;
        if stored == 0 || stored > UNIT_COMPRESSED_MAX_BYTES {
            return Err(malformed!("stored in {stored} bytes, 1 byte to 16 MiB are allowed"));
        }
        let end = self.compressed_offset.checked_add(stored as u64);
        if end.is_none_or(|end| end > blob.data_end()) {
            return Err(malformed!(
                "stored at {}, {stored} bytes long: chunk data ends at {}",
                self.compressed_offset,
                blob.data_end()
            ));
        }
        blob.check_storage(self.flags.is_compressed(), self.flags.is_encrypted())?;
        let plain = self.flags.is_encrypted().then_some(super::cipher::SHORT_BYTES);
        let same_size = self.compressed_size == self.uncompressed_size || plain == Some(stored);
        if !self.flags.is_compressed() && !same_size {
            return Err(malformed!("not compressed, yet of another size when stored"));
        }
        Ok(())
    }
}

impl BlobRecord {
    /// Whether chunks of this blob may be compressed or encrypted as their flags say.
    pub(super) fn check_storage(&self, compressed: bool, encrypted: bool) -> Result<()> {
        if compressed && self.compressor == super::codec::Compressor::None {
            return Err(malformed!("compressed, in a blob without a compressor"));
        }
        if encrypted && self.cipher.is_none() {
            return Err(malformed!("encrypted, in a blob without a key"));
        }
        Ok(())
    }
}
