//! The chunks of a regular file: 8 bytes for each, behind its inode.
//!
//! The kernel uses the block address of an entry and perhaps only that of the first; we use the
//! chunk index of each. An iterator over a file answers an error where the two would differ.

use super::erofs::Tree;
use super::identity::ChunkIndex;
use super::inode::{DataLayout, FileKind, Inode};
use super::little::{u16_at, u32_at};
use super::superblock::BLOCK_BYTES;
use crate::error::Result;

/// One chunk of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileChunk {
    /// The blob it is in.
    pub blob_index: u32,
    /// Which chunk of the blob.
    pub index: ChunkIndex,
    /// Offset in the blob's address space, where the kernel reads it.
    pub uncompressed_offset: u64,
    /// Offset in the file.
    pub file_offset: u64,
    /// Bytes of the file it has: as many as the whole chunk.
    pub size: u32,
}

/// The chunks of a file, in order.
#[derive(Clone, Debug)]
pub struct FileChunks<'a> {
    tree: Tree<'a>,
    entries: std::slice::Iter<'a, [u8; ENTRY_BYTES]>,
    file_size: u64,
    file_offset: u64,
    /// Bytes the kernel takes for one chunk: it reads the first entry of each only.
    kernel_chunk_bytes: u64,
    /// The chunk before: its blob and the end of its slot in the address space.
    before: Option<(u32, u64)>,
}

pub(super) const ENTRY_BYTES: usize = 8;
/// The chunk format: low 5 bits are log2 of the chunk's blocks, this one is always set.
pub(super) const FORMAT_INDEXES: u32 = 0x20;
const FORMAT_BITS: u32 = 0x1f;
/// EROFS's address of a hole.
const NO_ADDRESS: u32 = u32::MAX;

impl<'a> FileChunks<'a> {
    pub(super) fn of(tree: Tree<'a>, file: &Inode) -> Result<Self> {
        if file.kind != FileKind::File || file.layout != DataLayout::Chunked {
            return Err(malformed!("it has no chunks"));
        }
        let chunk_size = u64::from(tree.bootstrap.chunk_size());
        let format = file.address;
        let kernel_chunk_bytes = (BLOCK_BYTES as u64) << (format & FORMAT_BITS);
        if format & !FORMAT_BITS != FORMAT_INDEXES || kernel_chunk_bytes < chunk_size {
            return Err(malformed!("chunk format {format:#x}"));
        }
        let start = entries_start(file);
        let bytes = usize::try_from(file.size.div_ceil(chunk_size))
            .ok()
            .and_then(|count| count.checked_mul(ENTRY_BYTES));
        let entries = bytes
            .and_then(|bytes| tree.bytes().get(start..start.checked_add(bytes)?))
            .ok_or_else(|| malformed!("{} bytes of file: too many chunks", file.size))?;
        Ok(FileChunks {
            tree,
            entries: entries.as_chunks().0.iter(),
            file_size: file.size,
            file_offset: 0,
            kernel_chunk_bytes,
            before: None,
        })
    }

    fn check(&mut self, entry: &[u8; ENTRY_BYTES]) -> Result<FileChunk> {
        let (low, high, address) = (u16_at(entry, 0), u16_at(entry, 2), u32_at(entry, 4));
        let chunk_size = self.tree.bootstrap.chunk_size();
        let chunk = FileChunk {
            // Device 0 is the bootstrap itself.
            blob_index: u32::from(high & 0xff).wrapping_sub(1),
            index: ChunkIndex(u32::from(high >> 8) << 16 | u32::from(low)),
            uncompressed_offset: u64::from(address) * BLOCK_BYTES as u64,
            file_offset: self.file_offset,
            size: (self.file_size - self.file_offset).min(chunk_size.into()) as u32,
        };
        let blob = self.tree.bootstrap.blobs().get(chunk.blob_index as usize);
        let Some(blob) = blob.filter(|_| address != NO_ADDRESS) else {
            return Err(malformed!("its chunk at {} is in no blob", chunk.file_offset));
        };
        let end = chunk.uncompressed_offset + u64::from(chunk.size);
        if chunk.index.0 >= blob.chunk_count || end > blob.uncompressed_size {
            return Err(malformed!("its chunk at {} is outside its blob", chunk.file_offset));
        }
        let adjacent = (chunk.blob_index, chunk.uncompressed_offset);
        let inside = !chunk.file_offset.is_multiple_of(self.kernel_chunk_bytes);
        if inside && self.before != Some(adjacent) {
            return Err(malformed!(
                "its chunk at {} does not follow the one before, which the kernel assumes",
                chunk.file_offset
            ));
        }
        self.before = Some((chunk.blob_index, chunk.uncompressed_offset + u64::from(chunk_size)));
        self.file_offset += u64::from(chunk.size);
        Ok(chunk)
    }
}

/// Where the entries of a file start in the bootstrap.
pub(super) fn entries_start(file: &Inode) -> usize {
    file.xattrs.end.next_multiple_of(ENTRY_BYTES)
}

impl Iterator for FileChunks<'_> {
    type Item = Result<FileChunk>;

    fn next(&mut self) -> Option<Self::Item> {
        let entry = self.entries.next()?;
        let checked = self.check(entry);
        if checked.is_err() {
            self.entries = [].iter();
        }
        Some(checked)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.entries.size_hint()
    }
}

impl ExactSizeIterator for FileChunks<'_> {}
