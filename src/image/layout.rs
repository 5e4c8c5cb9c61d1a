//! Everything the daemon needs of one blob at run time: which chunk is where, stored how, and
//! what its digest is.
//!
//! Chunks tile the address space: every block of 4 KiB belongs to exactly one chunk index, listed
//! by the bootstrap or not. A chunk the bootstrap does not list has no digest and must never be
//! filled. What can be decoded is a *unit*: one chunk, or several that are compressed together.
//!
//! Memory per listed chunk: 16 bytes of record, 32 of digest, 4 of index if any chunk of the blob
//! is not listed; a unit of several chunks costs 48 more, ZRAN dictionaries as much as they are
//! (up to 32 KiB each). Chunks that are not listed cost nothing. Nothing is allocated by a query.

use super::assembly;
use super::blob_table::BlobRecord;
use super::bootstrap::Bootstrap;
use super::cipher::Cipher;
use super::codec::Compressor;
use super::context::ContextTable;
use super::digest::{Digest, DigestAlgorithm};
use super::identity::{BlobId, ChunkIndex};
use super::superblock::BLOCK_BYTES;
use super::tiling::Hole;
use crate::error::Result;
use std::ops::Range;
use std::sync::Arc;

/// The chunks of one blob, for queries at run time.
#[derive(Clone, Debug)]
pub struct Layout {
    pub(super) traits: Traits,
    /// Listed chunks by ascending index, hence by ascending offset.
    pub(super) records: Vec<Record>,
    /// Parallel to `records`.
    pub(super) digests: Vec<Digest>,
    /// Parallel to `records`; empty if every chunk is listed.
    pub(super) indexes: Vec<u32>,
    /// Ascending by the members they have, covering all records; empty if each is its own unit.
    pub(super) units: Vec<SharedUnit>,
    /// The context table, for its dictionaries; empty unless the blob is ZRAN.
    pub(super) dictionaries: Arc<[u8]>,
}

/// What holds for the whole blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Traits {
    pub(super) blob_id: BlobId,
    pub(super) uncompressed_size: u64,
    pub(super) chunk_count: u32,
    pub(super) compressor: Compressor,
    pub(super) digest_algorithm: DigestAlgorithm,
    pub(super) cipher: Option<Cipher>,
}

/// One chunk, as a query answers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    /// Offset in the address space, a multiple of 4096.
    pub uncompressed_offset: u64,
    /// Bytes of data, 1 to 16 MiB; behind them zeros up to the next multiple of 4096.
    pub size: u32,
    /// What its bytes must hash to. `None`: the image does not use this chunk, its borders are
    /// made up, and it must never be filled.
    pub digest: Option<Digest>,
    /// The unit that decodes to it; [`Layout::NO_UNIT`] exactly if there is no digest.
    pub unit: u32,
}

impl Chunk {
    /// Bytes of the address space it occupies: `size` up to the next multiple of 4096.
    pub fn padded_size(&self) -> u32 {
        self.size.next_multiple_of(BLOCK_BYTES as u32)
    }
}

/// The smallest piece that can be fetched and decoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Offset in the blob file.
    pub compressed_offset: u64,
    /// Bytes in the blob file, 1 to 16 MiB.
    pub compressed_size: u32,
    /// First to last of its chunks; chunks without digest among them are not decoded.
    pub chunks: Range<u32>,
    /// Offset of its first chunk in the address space.
    pub uncompressed_offset: u64,
    /// Bytes of the address space from its first chunk to the padded end of its last: a multiple
    /// of 4096, up to 16 MiB.
    pub output_size: u32,
}

impl Layout {
    /// The unit of a chunk that has none.
    pub const NO_UNIT: u32 = u32::MAX;

    /// Lays out blob `blob_index` of an image.
    ///
    /// `context`: its context table; required if [`Layout::needs_context`], otherwise only
    /// compared with the bootstrap's chunk table if given.
    pub fn build(
        bootstrap: &Bootstrap,
        blob_index: u32,
        context: Option<&ContextTable>,
    ) -> Result<Self> {
        let record = bootstrap
            .blobs()
            .get(blob_index as usize)
            .ok_or_else(|| malformed!("the image has no blob {blob_index}"))?;
        assembly::build(bootstrap, record, context)
            .map_err(|error| error.context(format!("blob {}", record.id)))
    }

    /// Whether the bootstrap alone does not say where the chunks of a blob are stored.
    pub fn needs_context(record: &BlobRecord) -> bool {
        record.is_zran() || record.is_batch()
    }

    /// Adds the chunks that another image lists of the same blob. `Malformed`, with nothing
    /// changed, if the two contradict each other about the blob or a chunk.
    pub fn merge_digests(&mut self, other: &Layout) -> Result<()> {
        *self = assembly::merge(self, other)
            .map_err(|error| error.context(format!("blob {}", self.blob_id())))?;
        Ok(())
    }

    /// The blob's name.
    pub fn blob_id(&self) -> &BlobId {
        &self.traits.blob_id
    }

    /// Bytes of the address space, a multiple of 4096.
    pub fn uncompressed_size(&self) -> u64 {
        self.traits.uncompressed_size
    }

    /// Chunks in the blob, listed or not.
    pub fn chunk_count(&self) -> u32 {
        self.traits.chunk_count
    }

    /// Chunks the image uses.
    pub fn listed_count(&self) -> u32 {
        self.records.len() as u32
    }

    /// Units in the blob, those of listed chunks only. Their compressed offsets ascend.
    pub fn unit_count(&self) -> u32 {
        if self.units.is_empty() { self.records.len() as u32 } else { self.units.len() as u32 }
    }

    /// How chunks are compressed.
    pub fn compressor(&self) -> Compressor {
        self.traits.compressor
    }

    /// How digests are made.
    pub fn digest_algorithm(&self) -> DigestAlgorithm {
        self.traits.digest_algorithm
    }

    /// The chunks that have bytes of `range` of the address space; what lies behind its end is
    /// ignored. O(log n).
    pub fn chunks_in(&self, range: Range<u64>) -> Range<u32> {
        let end = range.end.min(self.uncompressed_size());
        if range.start >= end {
            return 0..0;
        }
        let block = |byte: u64| byte / BLOCK_BYTES as u64;
        let (first, last) = (block(range.start), block(end - 1));
        let behind = |records: &[Record], block| {
            records.partition_point(|record| u64::from(record.block) <= block)
        };
        let first_behind = behind(&self.records, first);
        // A chunk has a block at least: the range cannot reach further than it has blocks.
        let near = (last - first) as usize;
        let rest = &self.records[first_behind..];
        let last_behind = first_behind + behind(&rest[..near.min(rest.len())], last);
        self.chunk_at(first_behind, first)..self.chunk_at(last_behind, last) + 1
    }

    /// One chunk. O(1) if the bootstrap lists all chunks, else O(log of how many it does not).
    ///
    /// # Panics
    /// If there is no such chunk.
    pub fn chunk(&self, index: ChunkIndex) -> Chunk {
        assert!(index.0 < self.chunk_count(), "chunk {index} of {}", self.chunk_count());
        match self.position(index.0) {
            Ok(position) => {
                let record = &self.records[position];
                Chunk {
                    uncompressed_offset: record.uncompressed_offset(),
                    size: record.size(),
                    digest: Some(self.digests[position]),
                    unit: self.unit_of(position),
                }
            }
            Err(position) => {
                let blocks = self.hole(position).blocks_of(index.0);
                Chunk {
                    uncompressed_offset: blocks.start * BLOCK_BYTES as u64,
                    size: (blocks.end - blocks.start) as u32 * BLOCK_BYTES as u32,
                    digest: None,
                    unit: Self::NO_UNIT,
                }
            }
        }
    }

    /// One unit.
    ///
    /// # Panics
    /// If there is no such unit.
    pub fn unit(&self, unit: u32) -> Unit {
        let source = self.source(unit);
        let positions = self.positions(unit);
        let (first, last) = (&self.records[positions.start], &self.records[positions.end - 1]);
        let start = first.uncompressed_offset();
        Unit {
            compressed_offset: source.compressed_offset,
            compressed_size: source.compressed_size,
            chunks: self.index(positions.start)..self.index(positions.end - 1) + 1,
            uncompressed_offset: start,
            output_size: (last.end_block() * BLOCK_BYTES as u64 - start) as u32,
        }
    }

    /// Whether `bytes` (exactly the chunk's `size`, without padding) are what the bootstrap says.
    /// False for a chunk without digest. Allocates nothing.
    ///
    /// # Panics
    /// If there is no such chunk.
    pub fn verify(&self, index: ChunkIndex, bytes: &[u8]) -> bool {
        assert!(index.0 < self.chunk_count(), "chunk {index} of {}", self.chunk_count());
        self.position(index.0).is_ok_and(|position| {
            bytes.len() == self.records[position].size() as usize
                && self.digest_algorithm().digest(bytes) == self.digests[position]
        })
    }

    /// Bytes this layout occupies, its dictionaries included.
    pub fn memory_bytes(&self) -> usize {
        self.records.capacity() * size_of::<Record>()
            + self.digests.capacity() * size_of::<Digest>()
            + self.indexes.capacity() * size_of::<u32>()
            + self.units.capacity() * size_of::<SharedUnit>()
            + self.dictionaries.len()
    }
}

/// For the decoder and for assembly.
impl Layout {
    pub(super) fn cipher(&self) -> Option<&Cipher> {
        self.traits.cipher.as_ref()
    }

    /// How a unit is stored.
    pub(super) fn source(&self, unit: u32) -> Source {
        match self.units.is_empty() {
            true => self.records[unit as usize].own_source(),
            false => self.units[unit as usize].source,
        }
    }

    /// The listed chunks of a unit.
    pub(super) fn members(&self, unit: u32) -> impl Iterator<Item = Member> + Clone {
        self.records[self.positions(unit)].iter().map(|record| Member {
            uncompressed_offset: record.uncompressed_offset(),
            size: record.size(),
            offset: if self.units.is_empty() { 0 } else { record.inside() as usize },
        })
    }

    pub(super) fn dictionary(&self, source: &Source) -> &[u8] {
        let start = source.dictionary_offset as usize;
        &self.dictionaries[start..start + source.dictionary_size as usize]
    }

    /// The chunk index of the listed chunk at `position`.
    pub(super) fn index(&self, position: usize) -> u32 {
        self.indexes.get(position).copied().unwrap_or(position as u32)
    }

    /// The hole before the listed chunk at `position`, or behind the last one.
    pub(super) fn hole(&self, position: usize) -> Hole {
        let (first_chunk, first_block) = match position.checked_sub(1) {
            Some(before) => (self.index(before) + 1, self.records[before].end_block()),
            None => (0, 0),
        };
        let (end_chunk, end_block) = match self.records.get(position) {
            Some(record) => (self.index(position), record.block.into()),
            None => (self.chunk_count(), self.uncompressed_size() / BLOCK_BYTES as u64),
        };
        Hole { chunks: first_chunk..end_chunk, blocks: first_block..end_block }
    }

    fn unit_of(&self, position: usize) -> u32 {
        match self.units.is_empty() {
            true => position as u32,
            false => self.records[position].unit(),
        }
    }

    fn positions(&self, unit: u32) -> Range<usize> {
        match self.units.is_empty() {
            true => unit as usize..unit as usize + 1,
            false => {
                let unit = &self.units[unit as usize];
                unit.first as usize..unit.end as usize
            }
        }
    }

    /// The chunk that has `block`, if `behind` counts the records that start at or before it.
    fn chunk_at(&self, behind: usize, block: u64) -> u32 {
        match behind.checked_sub(1) {
            Some(at) if block < self.records[at].end_block() => self.index(at),
            _ => self.hole(behind).chunk_at(block),
        }
    }

    /// Position of a listed chunk, or the position it would have.
    fn position(&self, index: u32) -> std::result::Result<usize, usize> {
        if self.indexes.is_empty() {
            let position = index as usize;
            return if position < self.records.len() { Ok(position) } else { Err(0) };
        }
        // Each missing chunk moves those behind it one place to the front, no more.
        let missing = self.chunk_count() as usize - self.indexes.len();
        let first = (index as usize).saturating_sub(missing).min(self.indexes.len());
        let end = (index as usize + 1).min(self.indexes.len());
        self.indexes[first..end]
            .binary_search(&index)
            .map(|found| first + found)
            .map_err(|absent| first + absent)
    }
}

/// A listed chunk in 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Record {
    /// First block in the address space.
    block: u32,
    /// Low 24 bits: size less one. Above: storage flags, for a chunk that is its own unit.
    size_and_flags: u32,
    /// A chunk that is its own unit: offset in the file << 24 | bytes stored less one.
    /// Otherwise: unit << 32 | offset in its decoded form.
    place: u64,
}

const SIZE_MASK: u32 = 0xff_ffff;
const STORED_BITS: u32 = 24;

impl Record {
    /// A chunk that is its own unit. Both sizes are 1 to 2^24, offsets below 2^40: checked by
    /// the tables they come from.
    pub(super) fn own(uncompressed_offset: u64, size: u32, source: &Source) -> Self {
        assert!(source.compressed_offset >> 40 == 0 && source.compressed_size > 0);
        let stored = u64::from(source.compressed_size - 1);
        Record {
            block: (uncompressed_offset / BLOCK_BYTES as u64) as u32,
            size_and_flags: (size - 1) | u32::from(source.flags) << 24,
            place: source.compressed_offset << STORED_BITS | stored,
        }
    }

    /// A member of a shared unit.
    pub(super) fn member(uncompressed_offset: u64, size: u32, unit: u32, inside: u32) -> Self {
        Record {
            block: (uncompressed_offset / BLOCK_BYTES as u64) as u32,
            size_and_flags: size - 1,
            place: u64::from(unit) << 32 | u64::from(inside),
        }
    }

    pub(super) fn uncompressed_offset(&self) -> u64 {
        u64::from(self.block) * BLOCK_BYTES as u64
    }

    pub(super) fn size(&self) -> u32 {
        (self.size_and_flags & SIZE_MASK) + 1
    }

    pub(super) fn end_block(&self) -> u64 {
        u64::from(self.block) + u64::from(self.size()).div_ceil(BLOCK_BYTES as u64)
    }

    pub(super) fn unit(&self) -> u32 {
        (self.place >> 32) as u32
    }

    pub(super) fn inside(&self) -> u32 {
        self.place as u32
    }

    pub(super) fn own_source(&self) -> Source {
        Source {
            compressed_offset: self.place >> STORED_BITS,
            compressed_size: (self.place as u32 & SIZE_MASK) + 1,
            decoded_size: self.size(),
            flags: (self.size_and_flags >> 24) as u8,
            ..Source::default()
        }
    }
}

/// Where a unit is stored and how it is decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Source {
    pub(super) compressed_offset: u64,
    pub(super) compressed_size: u32,
    pub(super) decoded_size: u32,
    /// In `Layout::dictionaries`.
    pub(super) dictionary_offset: u32,
    pub(super) dictionary_size: u32,
    pub(super) entry_byte: u8,
    pub(super) entry_bits: u8,
    pub(super) flags: u8,
}

impl Source {
    pub(super) const COMPRESSED: u8 = 1;
    pub(super) const ENCRYPTED: u8 = 2;
    pub(super) const ZRAN: u8 = 4;
    /// Members are slices of the decoded form.
    pub(super) const SHARED: u8 = 8;

    /// The flags of a stored form.
    pub(super) fn storage(compressed: bool, encrypted: bool) -> u8 {
        let flag = |set: bool, flag: u8| if set { flag } else { 0 };
        flag(compressed, Self::COMPRESSED) | flag(encrypted, Self::ENCRYPTED)
    }

    pub(super) fn is_compressed(&self) -> bool {
        self.flags & Self::COMPRESSED != 0
    }

    pub(super) fn is_encrypted(&self) -> bool {
        self.flags & Self::ENCRYPTED != 0
    }

    pub(super) fn is_zran(&self) -> bool {
        self.flags & Self::ZRAN != 0
    }

    pub(super) fn is_shared(&self) -> bool {
        self.flags & Self::SHARED != 0
    }
}

/// A unit of a BATCH or ZRAN blob and the positions of its members in `records`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SharedUnit {
    pub(super) source: Source,
    pub(super) first: u32,
    pub(super) end: u32,
}

/// A slice of a decoded unit.
#[derive(Clone, Copy, Debug)]
pub(super) struct Member {
    pub(super) uncompressed_offset: u64,
    pub(super) size: u32,
    /// Offset in the decoded form.
    pub(super) offset: usize,
}

const _: () = assert!(size_of::<Record>() == 16 && size_of::<SharedUnit>() <= 48);
