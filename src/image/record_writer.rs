//! Superblocks and table records as bytes: the inverse of the parsers of this room.
//!
//! Pure. What is written here, [`super::Bootstrap::parse`] and [`super::ContextTable::parse`] must
//! read back as it was; callers keep the values within the fields' ranges, which the parsers check
//! again.

use super::blob_table::{self, BlobRecord};
use super::chunk_table::{self, ChunkRecord};
use super::codec::Compressor;
use super::context::HEADER_BYTES;
use super::digest::DigestAlgorithm;
use super::entry::{ContextEntry, Place, ZranContext};
use super::superblock::{BLOCK_BYTES, SLOT_BYTES};

/// Where the EROFS superblock starts, and where the device slots do.
const EROFS_OFFSET: usize = 1024;
const RAFS_OFFSET: usize = 1152;
/// Where the device slots start: the end of both superblocks.
pub const SLOTS_OFFSET: usize = 1408;
/// Bytes of one record of the blob table.
pub const BLOB_RECORD_BYTES: usize = blob_table::RECORD_BYTES;
/// Bytes of one record of the chunk table.
pub const CHUNK_RECORD_BYTES: usize = chunk_table::BYTES;
/// Bytes of one device slot.
pub const DEVICE_SLOT_BYTES: usize = SLOT_BYTES;

/// What both superblocks say. Offsets and sizes are in bytes of the bootstrap.
#[derive(Clone, Debug)]
pub struct SuperblockFields {
    /// How chunks are compressed.
    pub compressor: Compressor,
    /// How chunk digests are made.
    pub digest_algorithm: DigestAlgorithm,
    /// Whether any inode has extended attributes.
    pub has_xattrs: bool,
    /// Bytes of file data per chunk.
    pub chunk_size: u32,
    /// Number of the root's inode, counted from `meta_offset`.
    pub root_nid: u16,
    /// How many inodes there are.
    pub inode_count: u64,
    /// Blocks of all data blobs together.
    pub block_count: u64,
    /// Where inode numbers count from: a multiple of 4096.
    pub meta_offset: u64,
    /// Number of data blobs.
    pub blob_count: u16,
    /// Where the blob table is.
    pub blob_table_offset: u64,
    /// Where the prefetch table is, and its length.
    pub prefetch_table: (u64, u32),
    /// Where the chunk table is, and its length.
    pub chunk_table: (u64, u64),
}

impl SuperblockFields {
    /// Writes both superblocks into the front of a bootstrap, which is zero there.
    pub fn write(&self, bootstrap: &mut [u8]) {
        let erofs = &mut bootstrap[EROFS_OFFSET..RAFS_OFFSET];
        put(erofs, 0, &0xe0f5_e1e2u32.to_le_bytes());
        put(erofs, 8, &0x4000_0000u32.to_le_bytes());
        erofs[12] = BLOCK_BYTES.ilog2() as u8;
        put(erofs, 14, &self.root_nid.to_le_bytes());
        put(erofs, 16, &self.inode_count.to_le_bytes());
        let blocks = u32::try_from(self.block_count).unwrap_or(u32::MAX);
        put(erofs, 36, &blocks.to_le_bytes());
        put(erofs, 40, &((self.meta_offset / BLOCK_BYTES as u64) as u32).to_le_bytes());
        put(erofs, 80, &0xcu32.to_le_bytes());
        put(erofs, 86, &self.blob_count.to_le_bytes());
        put(erofs, 88, &((SLOTS_OFFSET / SLOT_BYTES) as u16).to_le_bytes());
        let rafs = &mut bootstrap[RAFS_OFFSET..SLOTS_OFFSET];
        put(rafs, 0, &self.flags().to_le_bytes());
        put(rafs, 8, &self.blob_table_offset.to_le_bytes());
        let blob_bytes = u32::from(self.blob_count) * BLOB_RECORD_BYTES as u32;
        put(rafs, 16, &blob_bytes.to_le_bytes());
        put(rafs, 20, &self.chunk_size.to_le_bytes());
        put(rafs, 24, &self.chunk_table.0.to_le_bytes());
        put(rafs, 32, &self.chunk_table.1.to_le_bytes());
        put(rafs, 40, &self.prefetch_table.0.to_le_bytes());
        put(rafs, 48, &self.prefetch_table.1.to_le_bytes());
    }

    /// ENCRYPTION_NONE (0x0100_0000) is left out: builders before 2.3 did not know it.
    fn flags(&self) -> u64 {
        let compressor = match self.compressor {
            Compressor::None => 0x1,
            Compressor::Lz4Block => 0x2,
            Compressor::Gzip => 0x40,
            Compressor::Zstd => 0x80,
        };
        let digest = match self.digest_algorithm {
            DigestAlgorithm::Blake3 => 0x4,
            DigestAlgorithm::Sha256 => 0x8,
        };
        let explicit_owners = 0x10;
        compressor | digest | explicit_owners | if self.has_xattrs { 0x20 } else { 0 }
    }
}

/// The EROFS device slot of a blob.
pub fn device_slot(blob: &BlobRecord) -> [u8; SLOT_BYTES] {
    let mut slot = [0; SLOT_BYTES];
    put(&mut slot, 0, &blob.id.to_field());
    let blocks = (blob.uncompressed_size / BLOCK_BYTES as u64) as u32;
    put(&mut slot, 64, &blocks.to_le_bytes());
    slot
}

impl BlobRecord {
    /// The record as stored. The key of an encrypted blob is not written: nothing here makes one.
    pub fn to_bytes(&self) -> [u8; BLOB_RECORD_BYTES] {
        let mut record = [0; BLOB_RECORD_BYTES];
        put(&mut record, 0, &self.id.to_field());
        let words = [
            self.index,
            self.chunk_size,
            self.chunk_count,
            self.compressor.number(),
            self.digest_algorithm.number(),
            self.features.0,
        ];
        for (position, word) in words.iter().enumerate() {
            put(&mut record, 64 + 4 * position, &word.to_le_bytes());
        }
        put(&mut record, 88, &self.compressed_size.to_le_bytes());
        put(&mut record, 96, &self.uncompressed_size.to_le_bytes());
        put(&mut record, 104, &self.toc_size.to_le_bytes());
        put(&mut record, 108, &self.ci_compressor.number().to_le_bytes());
        put(&mut record, 112, &self.ci_offset.to_le_bytes());
        put(&mut record, 120, &self.ci_compressed_size.to_le_bytes());
        put(&mut record, 128, &self.ci_uncompressed_size.to_le_bytes());
        put(&mut record, 136, &self.toc_digest.map_or([0; 32], |digest| digest.0));
        put(&mut record, 168, &self.meta_digest.map_or([0; 32], |digest| digest.0));
        put(&mut record, 200, &self.meta_size.to_le_bytes());
        record
    }

    /// The header that stands behind the compressed context table.
    ///
    /// `contexts`: where the ZRAN contexts lie in the decompressed table, their bytes with the
    /// dictionaries, and how many there are.
    pub fn context_header(&self, contexts: (u64, u64, u32)) -> Box<[u8; HEADER_BYTES]> {
        let mut header = Box::new([0; HEADER_BYTES]);
        for at in [0, HEADER_BYTES - 4] {
            put(&mut header[..], at, &0xb10b_b10bu32.to_le_bytes());
        }
        put(&mut header[..], 4, &self.features.0.to_le_bytes());
        put(&mut header[..], 8, &self.ci_compressor.number().to_le_bytes());
        put(&mut header[..], 12, &self.chunk_count.to_le_bytes());
        put(&mut header[..], 16, &self.ci_offset.to_le_bytes());
        put(&mut header[..], 24, &self.ci_compressed_size.to_le_bytes());
        put(&mut header[..], 32, &self.ci_uncompressed_size.to_le_bytes());
        put(&mut header[..], 40, &contexts.0.to_le_bytes());
        put(&mut header[..], 48, &contexts.1.to_le_bytes());
        put(&mut header[..], 56, &contexts.2.to_le_bytes());
        header
    }
}

impl ChunkRecord {
    /// The record as stored.
    pub fn to_bytes(&self) -> [u8; CHUNK_RECORD_BYTES] {
        let mut record = [0; CHUNK_RECORD_BYTES];
        put(&mut record, 0, &self.digest.0);
        put(&mut record, 32, &self.blob_index.to_le_bytes());
        put(&mut record, 36, &self.flags.0.to_le_bytes());
        put(&mut record, 40, &self.compressed_size.to_le_bytes());
        put(&mut record, 44, &self.uncompressed_size.to_le_bytes());
        put(&mut record, 48, &self.compressed_offset.to_le_bytes());
        put(&mut record, 56, &self.uncompressed_offset.to_le_bytes());
        put(&mut record, 64, &self.file_offset.to_le_bytes());
        put(&mut record, 72, &self.index.0.to_le_bytes());
        put(&mut record, 76, &self.crc32c.unwrap_or(0).to_le_bytes());
        record
    }
}

impl ContextEntry {
    /// A chunk stored by itself, as version 1 has it: compressed exactly if the sizes differ.
    pub fn to_v1(uncompressed_offset: u64, size: u32, offset: u64, stored: u32) -> [u8; 16] {
        let spread = |size: u32, high: u64| {
            let size = u64::from(size - 1);
            (size & 0xf_ffff) << 44 | (size >> 20) << high
        };
        let mut entry = [0; 16];
        put(&mut entry, 0, &(uncompressed_offset | spread(size, 8)).to_le_bytes());
        put(&mut entry, 8, &(offset | spread(stored, 40)).to_le_bytes());
        entry
    }

    /// The entry as version 2 has it; members of batches are not written. `hint`: where the
    /// stored bytes of a ZRAN chunk roughly are.
    pub fn to_v2(&self, hint: (u64, u32)) -> [u8; 24] {
        let (flags, offset, stored, data) = match self.place {
            Place::Own { offset, size, compressed, .. } => (u64::from(compressed), offset, size, 0),
            Place::Batch { offset, .. } => (0x5, offset, 0, 0),
            Place::Zran { context, inside } => {
                (0x3, hint.0, hint.1, u64::from(context) << 32 | u64::from(inside))
            }
        };
        let block = self.uncompressed_offset / BLOCK_BYTES as u64;
        let mut entry = [0; 24];
        let word = block | u64::from(self.size - 1) << 32 | flags << 56;
        put(&mut entry, 0, &word.to_le_bytes());
        put(&mut entry, 8, &(offset | u64::from(stored) << 40).to_le_bytes());
        put(&mut entry, 16, &data.to_le_bytes());
        entry
    }
}

impl ZranContext {
    /// The record as stored.
    pub fn to_bytes(&self) -> [u8; ZranContext::BYTES] {
        let mut record = [0; ZranContext::BYTES];
        put(&mut record, 0, &self.input_offset.to_le_bytes());
        put(&mut record, 8, &self.output_offset.to_le_bytes());
        put(&mut record, 16, &self.dictionary_offset.to_le_bytes());
        put(&mut record, 24, &self.input_size.to_le_bytes());
        put(&mut record, 28, &self.output_size.to_le_bytes());
        put(&mut record, 32, &self.dictionary_size.to_le_bytes());
        record[36] = self.entry_byte;
        record[37] = self.entry_bits;
        record
    }
}

fn put(record: &mut [u8], at: usize, field: &[u8]) {
    record[at..at + field.len()].copy_from_slice(field);
}

#[cfg(test)]
mod tests {
    use super::super::specimen_tests::{IMAGES, Specimen};
    use super::*;

    /// Every record of every fixture, parsed and written again.
    #[test]
    fn records_come_back_as_their_builder_wrote_them() {
        for name in IMAGES {
            let bootstrap = Specimen::fixture(name).bootstrap;
            let bytes = bootstrap.bytes();
            let superblock = bootstrap.superblock();
            for (index, blob) in bootstrap.blobs().iter().enumerate() {
                let at = superblock.blob_table.start + index * BLOB_RECORD_BYTES;
                assert_eq!(blob.to_bytes()[..], bytes[at..at + BLOB_RECORD_BYTES], "{name}");
                let at = SLOTS_OFFSET + index * SLOT_BYTES;
                assert_eq!(device_slot(blob)[..68], bytes[at..at + 68], "{name}");
            }
            let table = &bytes[superblock.chunk_table.clone()];
            for (chunk, record) in bootstrap.chunks().zip(table.chunks(CHUNK_RECORD_BYTES)) {
                assert_eq!(chunk.to_bytes()[..], *record, "{name}");
            }
        }
    }

    #[test]
    fn context_entries_of_both_versions_are_read_as_written() {
        let sizes = [1, 2, 4096, 1 << 20, (1 << 20) + 1, (1 << 24) - 1, 1 << 24];
        for (size, stored) in sizes.iter().flat_map(|&a| sizes.map(|b| (a, b))) {
            let offset = (1 << 40) - 1;
            let compressed = size != stored;
            let place = Place::Own { offset, size: stored, compressed, encrypted: false };
            let entry = ContextEntry { uncompressed_offset: 0xfff_ffff_f000, size, place };
            let written = ContextEntry::to_v1(entry.uncompressed_offset, size, offset, stored);
            assert_eq!(ContextEntry::read(&written), entry);
            if stored < 1 << 24 {
                assert_eq!(ContextEntry::read(&entry.to_v2((0, 0))), entry);
            }
        }
        let place = Place::Zran { context: 7, inside: u32::MAX };
        let entry = ContextEntry { uncompressed_offset: 4096, size: 9, place };
        assert_eq!(ContextEntry::read(&entry.to_v2((3, 4))), entry);
    }

    #[test]
    fn zran_contexts_are_read_as_written() {
        let context = ZranContext {
            input_offset: 1,
            input_size: 2,
            output_offset: 3,
            output_size: 4,
            dictionary_offset: 5,
            dictionary_size: 6,
            entry_byte: 7,
            entry_bits: 3,
        };
        assert_eq!(ZranContext::read(&context.to_bytes()), context);
    }
}
