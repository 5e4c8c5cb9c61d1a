//! The bootstrap of a finished tree: superblocks, tables, inodes, directories, chunks.
//!
//! Decides which blobs the image has: those with a chunk some file uses, in the order of their
//! layers. Everything is written into one buffer; the only thing that grows with the data of an
//! image is 8 bytes per chunk of a file and 80 bytes per distinct chunk.

use super::chunks::{Chunk, Chunks};
use super::entry::FileData;
use super::numbering::{FIRST_INODE, Numbering, Place, fields, xattrs_of};
use super::options::Options;
use super::tree::{Content, Tree};
use crate::config::{BLOBS_PER_IMAGE_MAX, BOOTSTRAP_MAX_BYTES};
use crate::error::Result;
use crate::image::chunk_table::ChunkFlags;
use crate::image::inode_writer::{WrittenLayout, chunk_entry, chunk_format, directory_data};
use crate::image::record_writer::{
    BLOB_RECORD_BYTES, CHUNK_RECORD_BYTES, DEVICE_SLOT_BYTES, SLOTS_OFFSET, SuperblockFields,
    device_slot,
};
use crate::image::superblock::BLOCK_BYTES;
use crate::image::{BlobRecord, ChunkIndex, ChunkRecord, Compressor};

/// A bootstrap and the blobs it names.
pub(super) struct Written {
    pub(super) bytes: Vec<u8>,
    /// The builder's numbers of the blobs, in the order of the image's table.
    pub(super) blobs: Vec<u16>,
    pub(super) inode_count: u64,
    /// Chunks listed.
    pub(super) chunk_count: u64,
    /// Bytes of file data, names of hard links counted once.
    pub(super) data_bytes: u64,
}

/// Writes the bootstrap of `tree`; `blobs` are the records by the builder's numbers.
pub(super) fn write(
    options: &Options,
    tree: &mut Tree,
    chunks: &Chunks,
    blobs: &[BlobRecord],
) -> Result<Written> {
    let numbering = Numbering::of(tree, options.chunk_size)?;
    let mut prefetch = Vec::new();
    for path in &options.prefetch {
        let nid = tree.find(path)?.and_then(|inode| numbering.nid(inode));
        // A table entry has 32 bits; an inode behind the first 128 GiB cannot be.
        prefetch.extend(nid.and_then(|nid| u32::try_from(nid).ok()));
    }
    let uses = Uses::of(tree, &numbering, chunks, blobs.len(), options.chunk_size);
    let draft = Draft { options, tree, chunks, numbering: &numbering, uses: &uses };
    draft.write(blobs, &prefetch)
}

/// Which chunks and blobs the files of an image use.
struct Uses {
    /// By chunk: where it is in the first file that has it; `NOWHERE` if none does.
    offsets: Vec<u64>,
    /// By the builder's number of a blob: its place in the image's table.
    blob_indexes: Vec<Option<u32>>,
    /// The reverse.
    blobs: Vec<u16>,
    chunk_count: usize,
    data_bytes: u64,
}

const NOWHERE: u64 = u64::MAX;

impl Uses {
    fn of(
        tree: &Tree,
        numbering: &Numbering,
        chunks: &Chunks,
        blob_count: usize,
        chunk_size: u32,
    ) -> Self {
        let mut uses = Uses {
            offsets: vec![NOWHERE; chunks.len()],
            blob_indexes: vec![None; blob_count],
            blobs: Vec::new(),
            chunk_count: 0,
            data_bytes: 0,
        };
        let mut used = vec![false; blob_count];
        for place in &numbering.places {
            let Content::File(data) = &tree.node(place.inode).content else { continue };
            uses.data_bytes += data.size;
            for (position, &at) in of_file(chunks, data, chunk_size).iter().enumerate() {
                let offset = &mut uses.offsets[at as usize];
                if *offset == NOWHERE {
                    *offset = position as u64 * u64::from(chunk_size);
                    uses.chunk_count += 1;
                    used[chunks.chunk(at).blob as usize] = true;
                }
            }
        }
        for (blob, _) in used.iter().enumerate().filter(|(_, used)| **used) {
            uses.blob_indexes[blob] = Some(uses.blobs.len() as u32);
            uses.blobs.push(blob as u16);
        }
        uses
    }

    fn blob_index(&self, chunk: &Chunk) -> u32 {
        self.blob_indexes[chunk.blob as usize].expect("invariant: its blob is used")
    }
}

fn of_file<'a>(chunks: &'a Chunks, data: &FileData, chunk_size: u32) -> &'a [u32] {
    chunks.of_file(data.first, data.size.div_ceil(chunk_size.into()) as usize)
}

struct Draft<'a> {
    options: &'a Options,
    tree: &'a Tree,
    chunks: &'a Chunks,
    numbering: &'a Numbering,
    uses: &'a Uses,
}

impl Draft<'_> {
    fn write(&self, blobs: &[BlobRecord], prefetch: &[u32]) -> Result<Written> {
        let blob_count = self.uses.blobs.len();
        if blob_count > BLOBS_PER_IMAGE_MAX {
            return Err(unsupported!(
                "{blob_count} blobs, an image has at most {BLOBS_PER_IMAGE_MAX}: squash layers or \
                 offer fewer images for deduplication"
            ));
        }
        let block = BLOCK_BYTES;
        let blob_table = (SLOTS_OFFSET + blob_count * DEVICE_SLOT_BYTES).next_multiple_of(block);
        let prefetch_table = blob_table + blob_count * BLOB_RECORD_BYTES;
        let inodes = (prefetch_table + prefetch.len() * 4).next_multiple_of(block);
        let meta = inodes - FIRST_INODE as usize;
        let directories = (meta as u64 + self.numbering.inode_bytes).next_multiple_of(block as u64);
        let chunk_table = directories + u64::from(self.numbering.block_count) * block as u64;
        let chunk_bytes = self.uses.chunk_count as u64 * CHUNK_RECORD_BYTES as u64;
        let size = (chunk_table + chunk_bytes).next_multiple_of(block as u64);
        if size > BOOTSTRAP_MAX_BYTES as u64 {
            return Err(unsupported!(
                "a bootstrap of {size} bytes, {BOOTSTRAP_MAX_BYTES} are allowed: choose larger \
                 chunks"
            ));
        }
        let mut out = Vec::with_capacity(size as usize);
        out.resize(blob_table, 0);
        let mut block_count = 0;
        for (index, &blob) in self.uses.blobs.iter().enumerate() {
            let record = BlobRecord { index: index as u32, ..blobs[blob as usize].clone() };
            let at = SLOTS_OFFSET + index * DEVICE_SLOT_BYTES;
            out[at..at + DEVICE_SLOT_BYTES].copy_from_slice(&device_slot(&record));
            out.extend(record.to_bytes());
            block_count += record.uncompressed_size / block as u64;
        }
        out.extend(prefetch.iter().flat_map(|nid| nid.to_le_bytes()));
        out.resize(inodes, 0);
        self.write_inodes(&mut out, meta, (directories / block as u64) as u32)?;
        assert_eq!(out.len() as u64, chunk_table, "inodes and directories fill what was planned");
        self.write_chunks(&mut out);
        out.resize(size as usize, 0);
        let compressor = self.compressor(blobs);
        SuperblockFields {
            compressor,
            digest_algorithm: self.options.digest,
            has_xattrs: self.numbering.has_xattrs,
            chunk_size: self.options.chunk_size,
            root_nid: self.numbering.nid(Tree::ROOT).unwrap_or_default() as u16,
            inode_count: self.numbering.places.len() as u64,
            block_count,
            meta_offset: meta as u64,
            blob_count: blob_count as u16,
            blob_table_offset: blob_table as u64,
            prefetch_table: (prefetch_table as u64, prefetch.len() as u32 * 4),
            chunk_table: (chunk_table, chunk_bytes),
        }
        .write(&mut out);
        Ok(Written {
            bytes: out,
            blobs: self.uses.blobs.clone(),
            inode_count: self.numbering.places.len() as u64,
            chunk_count: self.uses.chunk_count as u64,
            data_bytes: self.uses.data_bytes,
        })
    }

    /// The superblock names one compressor; an image of untouched layers is a gzip one.
    fn compressor(&self, blobs: &[BlobRecord]) -> Compressor {
        let own = self.options.compression.compressor();
        let used: Vec<Compressor> =
            self.uses.blobs.iter().map(|&blob| blobs[blob as usize].compressor).collect();
        match used.first() {
            Some(&first) if !used.contains(&own) => first,
            _ => own,
        }
    }

    /// Inodes with what is behind them, then the blocks of directories, which start at
    /// `first_block` of the bootstrap.
    fn write_inodes(&self, out: &mut Vec<u8>, meta: usize, first_block: u32) -> Result<()> {
        let mut blocks = vec![0; self.numbering.block_count as usize * BLOCK_BYTES];
        for number in self.numbering.by_offset() {
            let place = &self.numbering.places[number as usize];
            let node = self.tree.node(place.inode);
            out.resize(meta + place.offset as usize, 0);
            let xattrs = xattrs_of(node)?;
            let file = match &node.content {
                Content::File(data) => of_file(self.chunks, data, self.options.chunk_size),
                _ => &[],
            };
            let address = match place.layout {
                WrittenLayout::Chunked => chunk_format(self.kernel_chunk_bytes(place, file)),
                _ => first_block + place.first_block,
            };
            fields(node, place, address, number, xattrs.len()).write(out);
            out.extend(xattrs);
            match &node.content {
                Content::File(_) => {
                    out.resize(out.len().next_multiple_of(8), 0);
                    out.extend(file.iter().flat_map(|&at| {
                        let chunk = self.chunks.chunk(at);
                        let blob = self.uses.blob_index(chunk);
                        chunk_entry(blob, chunk.index, chunk.uncompressed_offset)
                    }));
                }
                Content::Directory(_) => {
                    let data = directory_data(&self.numbering.entries(self.tree, place));
                    assert_eq!(data.len() as u64, place.size, "a directory is as long as planned");
                    write_flat(place, &data, out, &mut blocks);
                }
                Content::Link(target) => write_flat(place, target, out, &mut blocks),
                Content::Device(..) | Content::Special(_) => {}
            }
        }
        out.resize(first_block as usize * BLOCK_BYTES, 0);
        out.append(&mut blocks);
        Ok(())
    }

    /// How much the kernel takes for one chunk: the whole file if its chunks follow each other in
    /// one blob, so that it maps large extents; a chunk otherwise.
    fn kernel_chunk_bytes(&self, place: &Place, file: &[u32]) -> u64 {
        let chunk_size = u64::from(self.options.chunk_size);
        let follows = |pair: &[u32]| {
            let (left, right) = (self.chunks.chunk(pair[0]), self.chunks.chunk(pair[1]));
            left.blob == right.blob
                && left.uncompressed_offset + chunk_size == right.uncompressed_offset
        };
        let whole = place.size.checked_next_power_of_two().unwrap_or(0);
        match place.size > chunk_size && whole <= KERNEL_CHUNK_MAX && file.windows(2).all(follows) {
            true => whole,
            false => chunk_size,
        }
    }

    fn write_chunks(&self, out: &mut Vec<u8>) {
        let mut used: Vec<u32> = (0..self.chunks.len() as u32)
            .filter(|&at| self.uses.offsets[at as usize] != NOWHERE)
            .collect();
        used.sort_unstable_by_key(|&at| self.chunks.chunk(at).digest);
        for at in used {
            let chunk = self.chunks.chunk(at);
            let record = ChunkRecord {
                digest: chunk.digest,
                blob_index: self.uses.blob_index(chunk),
                flags: ChunkFlags::stored(chunk.is_compressed),
                compressed_size: chunk.compressed_size,
                uncompressed_size: chunk.uncompressed_size,
                compressed_offset: chunk.compressed_offset,
                uncompressed_offset: chunk.uncompressed_offset,
                file_offset: self.uses.offsets[at as usize],
                index: ChunkIndex(chunk.index),
                crc32c: None,
            };
            out.extend(record.to_bytes());
        }
    }
}

/// Five bits of log2, of blocks.
const KERNEL_CHUNK_MAX: u64 = (BLOCK_BYTES as u64) << 31;

/// Whole blocks to their place among the blocks, the rest behind the inode; or all of it.
fn write_flat(place: &Place, data: &[u8], out: &mut Vec<u8>, blocks: &mut [u8]) {
    let whole = match place.layout {
        WrittenLayout::Inline => data.len() / BLOCK_BYTES * BLOCK_BYTES,
        _ => data.len(),
    };
    let start = place.first_block as usize * BLOCK_BYTES;
    blocks[start..start + whole].copy_from_slice(&data[..whole]);
    out.extend(&data[whole..]);
}
