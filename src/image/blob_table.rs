//! The blob table: 256 bytes for each data blob of an image.
//!
//! A [`BlobRecord`] that exists has passed every check that needs no other record: sizes, counts
//! and offsets are in range and agree with each other, and its features are ones we serve.

use super::cipher::Cipher;
use super::codec::Compressor;
use super::digest::{Digest, DigestAlgorithm};
use super::identity::BlobId;
use super::little::{bytes_at, u32_at, u64_at};
use super::superblock::{BLOCK_BYTES, check_chunk_size};
use crate::config::{CHUNK_MAX_BYTES, CHUNKS_PER_BLOB_MAX, CONTEXT_TABLE_MAX_BYTES};
use crate::error::Result;
use std::ops::Range;

pub(super) const RECORD_BYTES: usize = 256;

/// Offsets into a blob file fit 40 bits: the width of the context table's field.
const COMPRESSED_OFFSET_END: u64 = 1 << 40;
/// Block addresses are 32 bits wide.
const UNCOMPRESSED_BYTES_MAX: u64 = (u32::MAX as u64) * BLOCK_BYTES as u64;
const TAR_HEADER_BYTES: u64 = 512;

/// The feature bits of a blob, as stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlobFeatures(pub u32);

impl BlobFeatures {
    /// Chunks start on 4 KiB boundaries of the address space. Mandatory.
    pub const ALIGNED: u32 = 0x1;
    /// The bootstrap is stored inside the blob (or its meta blob).
    pub const INLINED_FS_META: u32 = 0x2;
    /// Context table entries have 24 bytes, not 16.
    pub const CHUNK_INFO_V2: u32 = 0x4;
    /// The blob is an untouched tar.gz.
    pub const ZRAN: u32 = 0x8;
    /// The context table is stored in another, small blob.
    pub const SEPARATE: u32 = 0x10;
    /// The blob carries an array of chunk digests.
    pub const INLINED_CHUNK_DIGEST: u32 = 0x20;
    const TARFS: u32 = 0x40;
    /// Small chunks are compressed together.
    pub const BATCH: u32 = 0x80;
    /// Everything in the blob is encrypted.
    pub const ENCRYPTED: u32 = 0x100;
    const EXTERNAL: u32 = 0x800;
    /// The chunk data is followed by a tar header.
    pub const HAS_TAR_HEADER: u32 = 0x1000_0000;
    /// The blob ends in a table of contents.
    pub const HAS_TOC: u32 = 0x2000_0000;
    /// The builder is new enough to have written both of these.
    pub const CAP_TAR_TOC: u32 = 0x4000_0000;
    const IN_MEMORY_ONLY: u32 = 0x8000_0000;
    /// The incompatible half, and of it what we serve. 0x200 and 0x400 (dictionary and prefetch
    /// blobs) say where chunks came from and change nothing for a reader.
    const INCOMPATIBLE: u32 = 0xffff;
    const SERVED: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x80 | 0x100 | 0x200 | 0x400;

    /// Whether all bits of `mask` are set.
    pub fn has(self, mask: u32) -> bool {
        self.0 & mask == mask
    }

    fn check(self) -> Result<()> {
        if self.has(Self::TARFS) || self.has(Self::EXTERNAL) {
            let kind = if self.has(Self::TARFS) { "tarfs" } else { "external" };
            return Err(unsupported!("{kind} blobs"));
        }
        let unknown = self.0 & Self::INCOMPATIBLE & !Self::SERVED;
        if unknown != 0 {
            return Err(unsupported!("unknown blob features {unknown:#x}"));
        }
        if self.has(Self::IN_MEMORY_ONLY) || !self.has(Self::ALIGNED) {
            return Err(malformed!("blob features {:#x} cannot be on disk", self.0));
        }
        let special = self.0 & (Self::ZRAN | Self::BATCH | Self::ENCRYPTED);
        if special != 0 && !self.has(Self::CHUNK_INFO_V2) {
            return Err(malformed!("features {:#x} need context table v2", self.0));
        }
        // A tar.gz is as its builder left it: nothing batched, nothing encrypted.
        if self.has(Self::ZRAN) && special != Self::ZRAN {
            return Err(malformed!("features {:#x} contradict each other", self.0));
        }
        Ok(())
    }
}

/// What the bootstrap says of one data blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobRecord {
    /// Name in the registry and in the kernel.
    pub id: BlobId,
    /// Position in the table; the EROFS device id is one more.
    pub index: u32,
    /// Largest chunk, in bytes of file data.
    pub chunk_size: u32,
    /// Chunks in the blob, whether this image uses them or not.
    pub chunk_count: u32,
    /// How chunks are compressed.
    pub compressor: Compressor,
    /// How chunk digests are made.
    pub digest_algorithm: DigestAlgorithm,
    /// Feature bits.
    pub features: BlobFeatures,
    /// Bytes of the blob file, or of its front part: not to be relied on, see `data_end`.
    pub compressed_size: u64,
    /// Bytes of the address space the kernel sees: whole blocks, not zero.
    pub uncompressed_size: u64,
    /// How the context table is compressed.
    pub ci_compressor: Compressor,
    /// Where the compressed context table starts, in the blob or its meta blob.
    pub ci_offset: u64,
    /// Bytes of the compressed context table, its 4096-byte header not counted.
    pub ci_compressed_size: u64,
    /// Bytes of the decompressed context table.
    pub ci_uncompressed_size: u64,
    /// Bytes of the table of contents with its tar header, 0 if there is none or it is unknown.
    pub toc_size: u32,
    /// SHA-256 of the table of contents with its tar header.
    pub toc_digest: Option<Digest>,
    /// Name of the blob that holds the context table of a SEPARATE blob.
    pub meta_digest: Option<Digest>,
    /// Bytes of that blob.
    pub meta_size: u64,
    /// Key of an encrypted blob.
    pub cipher: Option<Cipher>,
}

impl BlobRecord {
    /// Parses record `index` of the blob table.
    pub(super) fn parse(record: &[u8; RECORD_BYTES], index: u32) -> Result<Self> {
        let id = BlobId::from_field(&bytes_at(record, 0))?;
        let features = BlobFeatures(u32_at(record, 84));
        features.check()?;
        let cipher = parse_cipher(record, features)?;
        let own_meta = cipher.is_none();
        let parsed = BlobRecord {
            id,
            index: u32_at(record, 64),
            chunk_size: u32_at(record, 68),
            chunk_count: u32_at(record, 72),
            compressor: Compressor::from_number(u32_at(record, 76))?,
            digest_algorithm: DigestAlgorithm::from_number(u32_at(record, 80))?,
            features,
            compressed_size: u64_at(record, 88),
            uncompressed_size: u64_at(record, 96),
            ci_compressor: Compressor::from_number(u32_at(record, 108))?,
            ci_offset: u64_at(record, 112),
            ci_compressed_size: u64_at(record, 120),
            ci_uncompressed_size: u64_at(record, 128),
            toc_size: u32_at(record, 104),
            toc_digest: digest_field(record, 136),
            meta_digest: digest_field(record, 168).filter(|_| own_meta),
            meta_size: if own_meta { u64_at(record, 200) } else { 0 },
            cipher,
        };
        parsed.check(index)?;
        Ok(parsed)
    }

    /// The end of chunk data in the blob file: no chunk reaches beyond.
    pub fn data_end(&self) -> u64 {
        let trailer = match self.features.has(BlobFeatures::HAS_TAR_HEADER) {
            true => TAR_HEADER_BYTES,
            false => 0,
        };
        match self.is_separate() || self.ci_offset == 0 {
            true => self.compressed_size,
            false => self.ci_offset.saturating_sub(trailer),
        }
    }

    /// The blob that has the context table: this one, or its meta blob. `Unsupported` where only
    /// the name of a file could tell (a meta blob that also holds the bootstrap).
    pub fn context_blob(&self) -> Result<BlobId> {
        match (self.is_separate(), self.meta_digest) {
            (false, _) => Ok(self.id.clone()),
            (true, Some(digest)) => BlobId::parse(&digest.to_string()),
            (true, None) => Err(unsupported!(
                "blob {}: the bootstrap does not name the blob with its context table",
                self.id
            )),
        }
    }

    /// The bytes of `context_blob` to fetch: the compressed table, then its header, which is the
    /// last `HEADER_BYTES` of them.
    pub fn context_range(&self) -> Range<u64> {
        let size = self.ci_compressed_size + super::context::HEADER_BYTES as u64;
        self.ci_offset..self.ci_offset + size
    }

    /// Whether the context table lies in a blob of its own, named by `meta_digest`.
    pub fn is_separate(&self) -> bool {
        self.features.has(BlobFeatures::SEPARATE)
    }

    /// Whether the blob is an untouched tar.gz.
    pub fn is_zran(&self) -> bool {
        self.features.has(BlobFeatures::ZRAN)
    }

    /// Whether small chunks are compressed together.
    pub fn is_batch(&self) -> bool {
        self.features.has(BlobFeatures::BATCH)
    }

    fn check(&self, index: u32) -> Result<()> {
        if self.index != index {
            return Err(malformed!("record {index} says it is blob {}", self.index));
        }
        check_chunk_size(self.chunk_size)?;
        if self.chunk_count == 0 || self.chunk_count > CHUNKS_PER_BLOB_MAX {
            return Err(malformed!("{} chunks: a blob has 1 to 2^24", self.chunk_count));
        }
        // Chunks tile the address space, each padded to whole blocks.
        let smallest = u64::from(self.chunk_count) * BLOCK_BYTES as u64;
        let largest = u64::from(self.chunk_count) * CHUNK_MAX_BYTES as u64;
        let size = self.uncompressed_size;
        if !size.is_multiple_of(BLOCK_BYTES as u64) || size > UNCOMPRESSED_BYTES_MAX {
            return Err(malformed!("address space of {size} bytes: not blocks, or above 16 TiB"));
        }
        if size < smallest || size > largest {
            return Err(malformed!("{} chunks cannot tile {size} bytes", self.chunk_count));
        }
        if self.data_end() > COMPRESSED_OFFSET_END {
            return Err(malformed!("chunk data ends at {}, above 1 TiB", self.data_end()));
        }
        self.check_context()
    }

    fn check_context(&self) -> Result<()> {
        let (compressed, uncompressed) = (self.ci_compressed_size, self.ci_uncompressed_size);
        if self.ci_offset.checked_add(compressed).is_none_or(|end| end >= COMPRESSED_OFFSET_END) {
            return Err(malformed!("the context table ends above 1 TiB"));
        }
        if uncompressed > CONTEXT_TABLE_MAX_BYTES as u64 {
            return Err(unsupported!(
                "a context table of {uncompressed} bytes (limit {CONTEXT_TABLE_MAX_BYTES})"
            ));
        }
        if compressed > uncompressed && self.cipher.is_none() {
            return Err(malformed!("a context table grows when compressed"));
        }
        Ok(())
    }
}

fn digest_field(record: &[u8; RECORD_BYTES], offset: usize) -> Option<Digest> {
    Some(Digest(bytes_at(record, offset))).filter(|digest| !digest.is_zero())
}

/// The key stands where other blobs have the digest and size of their meta blob.
fn parse_cipher(record: &[u8; RECORD_BYTES], features: BlobFeatures) -> Result<Option<Cipher>> {
    match (u32_at(record, 216), features.has(BlobFeatures::ENCRYPTED)) {
        (0, false) => Ok(None),
        (1, true) => Ok(Some(Cipher::aes_128_xts(bytes_at(record, 168), bytes_at(record, 200)))),
        (cipher @ 0..=1, _) => {
            Err(malformed!("cipher {cipher} contradicts features {:#x}", features.0))
        }
        (cipher, _) => Err(unsupported!("cipher {cipher} (known: 1 aes-128-xts)")),
    }
}
