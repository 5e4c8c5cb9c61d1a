//! A bootstrap: the metadata of one image, checked.
//!
//! Owns the bytes (they are also what the kernel is served) and what was parsed of them: blob
//! records, and the order of the chunk table by blob and index. After `parse` every entry of
//! every table is in bounds, blob ids are distinct and no chunk is listed twice. The tree of
//! inodes is read through [`super::erofs`], which checks as it goes.

use super::blob_table::{self, BlobRecord};
use super::chunk_table::{self, ChunkRecord};
use super::identity::{BLOB_ID_MAX_BYTES, BlobId};
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
