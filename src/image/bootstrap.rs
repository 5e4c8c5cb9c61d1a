//! A bootstrap: the metadata of one image, checked.
//!
//! Owns the bytes (they are also what the kernel is served) and what was parsed of them: blob
//! records, and the order of the chunk table by blob and index. After `parse` every entry of
//! every table is in bounds, blob ids are distinct and no chunk is listed twice. The tree of
//! inodes is read through [`super::erofs`], which checks as it goes.

use super::blob_table::{self, BlobRecord};
use super::chunk_table::{self, ChunkRecord};
use super::identity::{BLOB_ID_MAX_BYTES, BlobId, ChunkIndex};
use super::little::{bytes_at, u32_at};
use super::superblock::{BLOCK_BYTES, SLOT_BYTES, Superblock};
use crate::config::BOOTSTRAP_MAX_BYTES;
use crate::error::Result;
use std::ops::Range;
use std::sync::Arc;

/// The metadata of one image.
#[derive(Clone, Debug)]
pub struct Bootstrap {
    bytes: Arc<[u8]>,
    superblock: Superblock,
    blobs: Vec<BlobRecord>,
    /// Positions in the chunk table, by blob, then by chunk index: 4 bytes per chunk.
    chunk_order: Vec<u32>,
    /// The part of `chunk_order` of each blob.
    chunk_spans: Vec<Range<usize>>,
}

impl Bootstrap {
    /// Parses the whole of `image.boot`.
    ///
    /// `Unsupported` says which feature we refuse to serve, `Malformed` what is broken.
    pub fn parse(bytes: impl Into<Arc<[u8]>>) -> Result<Self> {
        let bytes = bytes.into();
        if bytes.len() > BOOTSTRAP_MAX_BYTES {
            return Err(unsupported!(
                "a bootstrap of {} bytes (limit {BOOTSTRAP_MAX_BYTES})",
                bytes.len()
            ));
        }
        let superblock = Superblock::parse(&bytes)?;
        let blobs = parse_blobs(&bytes, &superblock)?;
        let chunk_order = order_chunks(&bytes[superblock.chunk_table.clone()], &blobs)?;
        let mut bootstrap =
            Bootstrap { bytes, superblock, blobs, chunk_order, chunk_spans: Vec::new() };
        bootstrap.chunk_spans = bootstrap.find_spans();
        Ok(bootstrap)
    }

    /// Gives the blob of a bootstrap that was stored inside that blob its real id: the name the
    /// blob was found under. A bootstrap without the placeholder is returned as it is.
    pub fn with_inlined_id(self, id: &BlobId) -> Result<Self> {
        let is_placeholder = |blob: &BlobRecord| blob.id.is_inlined_placeholder();
        let Some(position) = self.blobs.iter().position(is_placeholder) else {
            return Ok(self);
        };
        let mut bytes = self.bytes.to_vec();
        for start in [
            self.superblock.slots.start + position * SLOT_BYTES,
            self.superblock.blob_table.start + position * blob_table::RECORD_BYTES,
        ] {
            bytes[start..start + BLOB_ID_MAX_BYTES].copy_from_slice(&id.to_field());
        }
        Bootstrap::parse(bytes)
    }

    /// The bytes the kernel is to see.
    pub fn bytes(&self) -> &Arc<[u8]> {
        &self.bytes
    }

    /// Length of the bootstrap, a multiple of 4096.
    pub fn size_bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// What the superblocks say.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The data blobs, in order of their index. Empty for a tree without file data.
    pub fn blobs(&self) -> &[BlobRecord] {
        &self.blobs
    }

    /// Bytes of file data per chunk.
    pub fn chunk_size(&self) -> u32 {
        self.superblock.chunk_size
    }

    /// The chunk table in stored order: by digest, then by blob.
    pub fn chunks(&self) -> impl ExactSizeIterator<Item = ChunkRecord> {
        self.chunk_table().iter().map(ChunkRecord::read)
    }

    /// The listed chunks of a blob by ascending index; the indexes are distinct.
    /// Nothing for a blob that does not exist.
    pub fn chunks_of(&self, blob_index: u32) -> impl ExactSizeIterator<Item = ChunkRecord> {
        let span = self.chunk_spans.get(blob_index as usize).cloned().unwrap_or(0..0);
        let table = self.chunk_table();
        self.chunk_order[span].iter().map(|&position| ChunkRecord::read(&table[position as usize]))
    }

    /// A listed chunk of a blob. O(1) if the bootstrap lists all of that blob, else O(log n).
    pub fn chunk(&self, blob_index: u32, index: ChunkIndex) -> Option<ChunkRecord> {
        let order = &self.chunk_order[self.chunk_spans.get(blob_index as usize)?.clone()];
        let table = self.chunk_table();
        let index_of = |&position: &u32| u32_at(&table[position as usize], 72);
        let dense = order.get(index.0 as usize).filter(|position| index_of(position) == index.0);
        let position = dense.or_else(|| {
            let found = order.binary_search_by_key(&index.0, index_of);
            found.ok().map(|found| &order[found])
        });
        position.map(|&position| ChunkRecord::read(&table[position as usize]))
    }

    /// Inode numbers the builder wants loaded first, in its order.
    pub fn prefetch_nids(&self) -> impl Iterator<Item = u64> {
        let (nids, _) = self.bytes[self.superblock.prefetch_table.clone()].as_chunks::<4>();
        nids.iter().map(|nid| u32::from_le_bytes(*nid).into()).take_while(|&nid| nid != 0)
    }

    fn chunk_table(&self) -> &[[u8; chunk_table::BYTES]] {
        self.bytes[self.superblock.chunk_table.clone()].as_chunks().0
    }

    fn find_spans(&self) -> Vec<Range<usize>> {
        let table = self.chunk_table();
        let blob_of = |&position: &u32| u32_at(&table[position as usize], 32);
        let mut start = 0;
        let span = |blob: &BlobRecord| {
            let end = self.chunk_order.partition_point(|at| blob_of(at) <= blob.index);
            std::mem::replace(&mut start, end)..end
        };
        self.blobs.iter().map(span).collect()
    }
}

/// Blob records, each agreeing with its device slot, all with different ids.
fn parse_blobs(bytes: &[u8], superblock: &Superblock) -> Result<Vec<BlobRecord>> {
    let (slots, _) = bytes[superblock.slots.clone()].as_chunks::<SLOT_BYTES>();
    let (records, _) =
        bytes[superblock.blob_table.clone()].as_chunks::<{ blob_table::RECORD_BYTES }>();
    let mut blobs: Vec<BlobRecord> = Vec::with_capacity(records.len());
    for (index, (slot, record)) in slots.iter().zip(records).enumerate() {
        let blob = BlobRecord::parse(record, index as u32)
            .and_then(|blob| check_slot(slot, &blob).map(|()| blob))
            .map_err(|error| error.context(format!("blob {index}")))?;
        if blobs.iter().any(|earlier| earlier.id == blob.id) {
            return Err(malformed!("blob id {} stands twice in the blob table", blob.id));
        }
        blobs.push(blob);
    }
    Ok(blobs)
}

/// The kernel reads the slot, we read the record: they must mean the same blob.
fn check_slot(slot: &[u8; SLOT_BYTES], blob: &BlobRecord) -> Result<()> {
    if BlobId::from_field(&bytes_at(slot, 0))? != blob.id {
        return Err(malformed!("device slot and blob table name different blobs"));
    }
    let blocks = u64::from(u32_at(slot, 64));
    if blocks * BLOCK_BYTES as u64 != blob.uncompressed_size {
        return Err(malformed!(
            "the device slot says {blocks} blocks, the blob table {} bytes",
            blob.uncompressed_size
        ));
    }
    Ok(())
}

/// Checks every entry of the chunk table and answers their order by blob and index.
fn order_chunks(table: &[u8], blobs: &[BlobRecord]) -> Result<Vec<u32>> {
    let (records, _) = table.as_chunks::<{ chunk_table::BYTES }>();
    for record in records {
        ChunkRecord::read(record).check(blobs)?;
    }
    let key = |&position: &u32| {
        let record = &records[position as usize];
        (u32_at(record, 32), u32_at(record, 72))
    };
    // At most BOOTSTRAP_MAX_BYTES / 80 entries: positions fit 32 bits.
    let mut order: Vec<u32> = (0..records.len() as u32).collect();
    order.sort_unstable_by_key(key);
    for pair in order.windows(2) {
        if key(&pair[0]) == key(&pair[1]) {
            let (blob, chunk) = key(&pair[0]);
            return Err(malformed!(
                "blob {}: chunk {chunk} stands twice in the chunk table",
                blobs[blob as usize].id
            ));
        }
    }
    Ok(order)
}

#[cfg(test)]
mod tests {
    use super::super::draft_tests::{Draft, put};
    use super::super::specimen_tests::{IMAGES, Specimen};
    use super::super::{ChunkIndex, Compressor, Layout};
    use super::*;
    use crate::error::Error;
    use proptest::prelude::*;

    const BLOB: usize = 4096;

    fn draft() -> Draft {
        Draft::new(&[5000, 1, 65536])
    }

    /// The draft's bootstrap with `field` put at `at`.
    fn with(at: usize, field: &[u8]) -> Result<Bootstrap> {
        let mut bytes = draft().write().0;
        put(&mut bytes, at, field);
        Bootstrap::parse(bytes)
    }

    fn chunk_table() -> usize {
        draft().build().bootstrap.superblock().chunk_table.start
    }

    #[test]
    fn fixtures_say_what_is_known_of_them() {
        let lz4 = Specimen::fixture("lz4-1m").bootstrap;
        let blob = &lz4.blobs()[0];
        assert_eq!(blob.compressor, Compressor::Lz4Block);
        assert_eq!((lz4.chunk_size(), blob.chunk_size), (1 << 20, 1 << 20));
        assert_eq!(lz4.chunks().len(), lz4.chunks_of(0).len());
        assert_eq!(lz4.prefetch_nids().count(), 0);
        for name in IMAGES {
            let image = Specimen::fixture(name);
            assert_eq!(image.bootstrap.size_bytes() as usize, image.bootstrap.bytes().len());
        }
    }

    #[test]
    fn image_without_data_has_no_blobs_and_a_tree() {
        let bootstrap = Draft::new(&[]).build().bootstrap;
        assert!(bootstrap.blobs().is_empty());
        assert_eq!(bootstrap.tree().walk().count(), 1);
        assert_eq!(bootstrap.chunks_of(0).len(), 0);
        assert!(Layout::build(&bootstrap, 0, None).is_err());
    }

    #[test]
    fn inlined_bootstrap_takes_the_name_it_was_found_under_everywhere() {
        let inlined = Draft { id: "x".repeat(64), ..draft() }.build().bootstrap;
        let id = BlobId::parse("short-name").unwrap();
        let named = inlined.with_inlined_id(&id).unwrap();
        assert_eq!(named.blobs()[0].id, id);
        assert_eq!(&named.bytes()[1408..1419], b"short-name\0");
        let again = named.clone().with_inlined_id(&BlobId::parse("other").unwrap()).unwrap();
        assert_eq!(again.blobs()[0].id, id);
    }

    #[test]
    fn known_images_of_other_kinds_are_unsupported() {
        let fields: [(usize, &[u8]); 9] = [
            (0, &0x5241_4653u32.to_le_bytes()),
            (1024 + 8, &[0; 4]),
            (1024 + 12, &[9]),
            (1024 + 80, &0x1cu32.to_le_bytes()),
            (1152, &0x0200_0000_0000_0084u64.to_le_bytes()),
            (1152, &0x284u64.to_le_bytes()),
            (BLOB + 84, &0x4000_0041u32.to_le_bytes()),
            (BLOB + 84, &0x4000_0801u32.to_le_bytes()),
            (BLOB + 84, &0x4000_1001u32.to_le_bytes()),
        ];
        for (at, field) in fields {
            let error = with(at, field).unwrap_err();
            assert!(matches!(error, Error::Unsupported(_)), "{at}: {error:?}");
        }
    }

    #[test]
    fn contradictions_and_impossible_sizes_are_malformed() {
        let chunk = chunk_table();
        let fields: [(usize, &[u8]); 26] = [
            (1024, &[0]),
            (1024 + 12, &[13]),
            (1024 + 86, &255u16.to_le_bytes()),
            (1024 + 86, &[2, 0]),
            (1024 + 88, &[12]),
            (1024 + 40, &u32::MAX.to_le_bytes()),
            (1152, &0x86u64.to_le_bytes()),
            (1152, &0x8cu64.to_le_bytes()),
            (1152 + 8, &1408u64.to_le_bytes()),
            (1152 + 8, &u64::MAX.to_le_bytes()),
            (1152 + 20, &0x10001u32.to_le_bytes()),
            (1152 + 20, &0x200_0000u32.to_le_bytes()),
            (1152 + 24, &4096u64.to_le_bytes()),
            (1152 + 32, &81u64.to_le_bytes()),
            (1408, b"other"),
            (1408 + 64, &[0]),
            (BLOB + 64, &[1]),
            (BLOB + 72, &[0; 4]),
            (BLOB + 72, &((1u32 << 24) + 1).to_le_bytes()),
            (BLOB + 84, &0x4000_0109u32.to_le_bytes()),
            (BLOB + 112, &u64::MAX.to_le_bytes()),
            (chunk + 32, &[1]),
            (chunk + 40, &u32::MAX.to_le_bytes()),
            (chunk + 44, &0u32.to_le_bytes()),
            (chunk + 56, &1u64.to_le_bytes()),
            (chunk + 72, &[3]),
        ];
        for (at, field) in fields {
            let error = with(at, field).unwrap_err();
            assert!(matches!(error, Error::Malformed(_)), "{at}: {error:?}");
        }
    }

    #[test]
    fn a_chunk_or_blob_listed_twice_is_malformed() {
        let mut bytes = draft().write().0;
        let chunk = chunk_table();
        bytes.copy_within(chunk..chunk + 80, chunk + 80);
        assert!(Bootstrap::parse(bytes).unwrap_err().to_string().contains("twice"));
        let mut bytes = draft().write().0;
        put(&mut bytes, 1024 + 86, &[2]);
        put(&mut bytes, 1152 + 16, &512u32.to_le_bytes());
        bytes.copy_within(1408..1536, 1536);
        bytes.copy_within(BLOB..BLOB + 256, BLOB + 256);
        put(&mut bytes, BLOB + 256 + 64, &[1]);
        assert!(Bootstrap::parse(bytes).unwrap_err().to_string().contains("twice"));
    }

    #[test]
    fn chunks_that_overlap_are_refused_by_the_layout() {
        // Chunk 1 moved onto chunk 0, and chunk 2 stored on chunk 1.
        let chunk = chunk_table();
        for (at, field) in [(chunk + 80 + 56, 0u64), (chunk + 160 + 48, 0)] {
            let bootstrap = with(at, &field.to_le_bytes()).unwrap();
            assert!(Layout::build(&bootstrap, 0, None).is_err(), "{at}");
        }
        assert!(draft().build().layout(0).verify(ChunkIndex(1), &draft().chunks[1].0));
    }

    /// Everything a caller does with a bootstrap. Must return.
    fn exercise(bytes: Vec<u8>) {
        let Ok(bootstrap) = Bootstrap::parse(bytes) else { return };
        for blob in 0..bootstrap.blobs().len() as u32 {
            if let Ok(layout) = Layout::build(&bootstrap, blob, None) {
                layout.chunks_in(0..u64::MAX);
            }
        }
        for visit in bootstrap.tree().walk().map_while(Result::ok) {
            let tree = bootstrap.tree();
            let _ = tree.read_link(&visit.inode);
            let _ = tree.xattrs(&visit.inode);
            let chunks = tree.file_chunks(&visit.inode);
            chunks.into_iter().flatten().count();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn damaged_bootstraps_never_panic(
            name in 0..IMAGES.len(),
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..30),
            cut in prop::option::of(any::<prop::sample::Index>()),
        ) {
            let image = Specimen::fixture(IMAGES[name]).bootstrap;
            let mut bytes = image.bytes().to_vec();
            for (at, value) in flips {
                // Half of the flips in the tables at the front.
                let range = if value & 1 == 0 { bytes.len() } else { 5000 };
                bytes[at.index(range)] ^= value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            exercise(bytes);
        }
    }
}
