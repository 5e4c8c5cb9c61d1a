//! The EROFS metadata the kernel mounts behind the fanotify door.
//!
//! A RAFS bootstrap names one device for each blob; the kernel is to see one for each segment. So
//! the view has its own superblock, a device table with a slot for each segment, and the
//! bootstrap's inodes and directories behind it, in which every block address is moved and every
//! file's chunks are named by (segment, block in the segment). RAFS's own tables are left out.
//! Numbers of inodes stay what they are: they count from the start of the area.
//!
//! ```text
//! 0      1024 zero | superblock 128
//! 1152   128 for each segment: blob 0 segment 0, blob 0 segment 1, ..., blob 1 segment 0, ...
//! M      the bootstrap's metadata, from its meta_blkaddr to its chunk table
//! ```
//! The device table must start below 8 MiB (its position is 16 bits of 128 bytes), so it stands in
//! front. Every file is in chunks of the image's RAFS chunk size, also where the bootstrap lets
//! the kernel take neighbours for one: neighbours may be in different segments.
//!
//! The view is made in one pass over the tree and is equal for equal input. Every inode and every
//! directory is in bounds and shares no byte with another; every chunk of every file is one the
//! chunk table lists, at that place and of that size. Anything else is refused: only what is
//! listed can be verified, and only what is verified may be read.

use super::bootstrap::Bootstrap;
use super::erofs::Tree;
use super::files::{ENTRY_BYTES, FORMAT_INDEXES, FileChunk, entries_start};
use super::inode::{FileKind, Inode};
use super::little::put;
use super::segmentation::Segmentation;
use super::superblock::{BLOCK_BYTES, EROFS_MAGIC, EROFS_OFFSET, INCOMPAT, SLOT_BYTES};
use crate::config::DEVICES_PER_IMAGE_MAX;
use crate::error::Result;
use std::ops::Range;

/// Metadata for the kernel and what its devices are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelView {
    /// What is mounted: whole blocks of 4096 bytes.
    pub metadata: Vec<u8>,
    /// The device of id `n + 1` is at `n`.
    pub devices: Vec<DeviceRef>,
}

/// A device: a segment of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceRef {
    /// Which blob of the image.
    pub blob_index: u32,
    /// Which of the segments that exist in its [`Segmentation`].
    pub place: u32,
}

/// Right behind the superblock: slot 9.
const TABLE_OFFSET: usize = EROFS_OFFSET + 128;
/// Bytes of an inode that its number counts in.
const INODE_UNIT_BYTES: usize = 32;
/// Where both kinds of inode have their block address or chunk format.
const ADDRESS_OFFSET: usize = 16;

impl KernelView {
    /// Derives the view of an image cut into `segmentations`, which are
    /// [`Segmentation::of_image`] of the same bootstrap.
    ///
    /// Needs as much memory as the bootstrap once more, and a 64th of it for the time it takes.
    pub fn derive(bootstrap: &Bootstrap, segmentations: &[Segmentation]) -> Result<KernelView> {
        let devices = list_devices(segmentations);
        if segmentations.len() != bootstrap.blobs().len() || devices.len() > DEVICES_PER_IMAGE_MAX {
            return Err(malformed!(
                "{} blobs cut into {} devices: not the segments of this image",
                bootstrap.blobs().len(),
                devices.len()
            ));
        }
        let area = metadata_area(bootstrap);
        let start = (TABLE_OFFSET + devices.len() * SLOT_BYTES).next_multiple_of(BLOCK_BYTES);
        let mut metadata = Vec::with_capacity(start + area.len());
        metadata.resize(start, 0);
        metadata.extend_from_slice(&bootstrap.bytes()[area.clone()]);
        write_superblock(&mut metadata, bootstrap, start, devices.len());
        for (slot, device) in devices.iter().enumerate() {
            let segment = segmentations[device.blob_index as usize].segment(device.place);
            let at = TABLE_OFFSET + slot * SLOT_BYTES;
            put(&mut metadata, at, segment.file_name().as_bytes());
            let blocks = segment.size.div_ceil(BLOCK_BYTES as u64) as u32;
            put(&mut metadata, at + 64, &blocks.to_le_bytes());
        }
        let mut rewriting = Rewriting {
            tree: bootstrap.tree(),
            segmentations,
            first_devices: first_devices(segmentations),
            claims: Claims::new(area),
            area: &mut metadata[start..],
            new_start: start,
        };
        for visit in bootstrap.tree().walk() {
            let inode = visit?.inode;
            let named = |error: crate::error::Error| error.context(format!("inode {}", inode.nid));
            rewriting.rewrite(&inode).map_err(named)?;
        }
        Ok(KernelView { metadata, devices })
    }
}

fn list_devices(segmentations: &[Segmentation]) -> Vec<DeviceRef> {
    let blobs = segmentations.iter().zip(0..);
    blobs
        .flat_map(|(cut, blob_index)| {
            (0..cut.count()).map(move |place| DeviceRef { blob_index, place })
        })
        .collect()
}

/// The id of the first device of each blob; device 0 is the metadata.
fn first_devices(segmentations: &[Segmentation]) -> Vec<u32> {
    let next = |next: &mut u32, cut: &Segmentation| {
        let first = *next;
        *next += cut.count();
        Some(first)
    };
    segmentations.iter().scan(1, next).collect()
}

/// What inodes and directories are in: whole blocks, because both ends are on a block.
fn metadata_area(bootstrap: &Bootstrap) -> Range<usize> {
    let superblock = bootstrap.superblock();
    let start = superblock.meta_offset as usize;
    let chunk_table = &superblock.chunk_table;
    match chunk_table.start > start {
        true => start..chunk_table.start,
        false => start..bootstrap.bytes().len(),
    }
}

fn write_superblock(metadata: &mut [u8], bootstrap: &Bootstrap, start: usize, devices: usize) {
    let blocks = (metadata.len() / BLOCK_BYTES) as u32;
    let mut field = |at: usize, bytes: &[u8]| put(metadata, EROFS_OFFSET + at, bytes);
    let kept = |range: Range<usize>| &bootstrap.bytes()[EROFS_OFFSET..][range];
    field(0, &EROFS_MAGIC.to_le_bytes());
    field(12, &[BLOCK_BYTES.ilog2() as u8]);
    // The root's number, how many inodes there are, when it was built, its UUID and name.
    for range in [14..36, 48..80] {
        field(range.start, kept(range.clone()));
    }
    field(36, &blocks.to_le_bytes());
    field(40, &((start / BLOCK_BYTES) as u32).to_le_bytes());
    field(80, &INCOMPAT.to_le_bytes());
    field(86, &(devices as u16).to_le_bytes());
    field(88, &((TABLE_OFFSET / SLOT_BYTES) as u16).to_le_bytes());
}

/// The pass over the tree: reads the bootstrap, writes the copy.
struct Rewriting<'a> {
    tree: Tree<'a>,
    segmentations: &'a [Segmentation],
    first_devices: Vec<u32>,
    claims: Claims,
    /// The copy of the metadata area.
    area: &'a mut [u8],
    /// Where it stands in the view.
    new_start: usize,
}

impl Rewriting<'_> {
    fn rewrite(&mut self, inode: &Inode) -> Result<()> {
        let start = self.claims.area.start + inode.nid as usize * INODE_UNIT_BYTES;
        if !self.claims.is_first_visit(start) {
            return Ok(());
        }
        // EROFS would look for them at a place of its own in the bootstrap.
        let xattrs = &self.tree.bytes()[inode.xattrs.clone()];
        if xattrs.get(4).is_some_and(|&shared| shared != 0) {
            return Err(unsupported!("shared extended attributes"));
        }
        match inode.kind {
            FileKind::File => self.rewrite_file(inode, start),
            FileKind::Directory | FileKind::Link => self.rewrite_flat(inode, start),
            _ => self.claims.claim(start..inode.xattrs.end),
        }
    }

    fn rewrite_flat(&mut self, inode: &Inode, start: usize) -> Result<()> {
        let (body, tail) = self.tree.flat_ranges(inode)?;
        self.claims.claim(start..tail.end)?;
        if body.is_empty() {
            return Ok(());
        }
        self.claims.claim(body.clone())?;
        let moved = body.start - self.claims.area.start + self.new_start;
        self.put_address(start, (moved / BLOCK_BYTES) as u32);
        Ok(())
    }

    fn rewrite_file(&mut self, inode: &Inode, start: usize) -> Result<()> {
        let chunks = self.tree.file_chunks(inode)?;
        let entries = entries_start(inode);
        self.claims.claim(start..entries + chunks.len() * ENTRY_BYTES)?;
        let chunk_blocks = self.tree.bootstrap.chunk_size() / BLOCK_BYTES as u32;
        self.put_address(start, FORMAT_INDEXES | chunk_blocks.ilog2());
        let mut at = entries - self.claims.area.start;
        for chunk in chunks {
            let (device, block) = self.locate(&chunk?)?;
            // The first field is unused by the kernel; RAFS had its chunk index there.
            put(self.area, at, &[0; 2]);
            put(self.area, at + 2, &device.to_le_bytes());
            put(self.area, at + 4, &block.to_le_bytes());
            at += ENTRY_BYTES;
        }
        Ok(())
    }

    fn put_address(&mut self, inode_start: usize, address: u32) {
        let at = inode_start - self.claims.area.start + ADDRESS_OFFSET;
        put(self.area, at, &address.to_le_bytes());
    }

    /// The device and the block in it of a file's chunk.
    fn locate(&self, chunk: &FileChunk) -> Result<(u16, u32)> {
        let listed = self.tree.bootstrap.chunk(chunk.blob_index, chunk.index);
        let same = listed.is_some_and(|listed| {
            listed.uncompressed_offset == chunk.uncompressed_offset
                && listed.uncompressed_size == chunk.size
        });
        let blob = chunk.blob_index as usize;
        let place = self.segmentations[blob].place_at(chunk.uncompressed_offset);
        let (true, Some(place)) = (same, place) else {
            return Err(malformed!(
                "the chunk table has no chunk {} of {} bytes at {} in blob {blob}",
                chunk.index,
                chunk.size,
                chunk.uncompressed_offset
            ));
        };
        let base = self.segmentations[blob].segment(place).base;
        let block = (chunk.uncompressed_offset - base) / BLOCK_BYTES as u64;
        // At most DEVICES_PER_IMAGE_MAX, and blocks of a file below 4 GiB.
        Ok(((self.first_devices[blob] + place) as u16, block as u32))
    }
}

/// Which bytes of the metadata area are spoken for, in units of 32 bytes: two bits for each.
struct Claims {
    area: Range<usize>,
    /// Units of which something is in an inode or its data.
    taken: Vec<u64>,
    /// Units that an inode starts at.
    inodes: Vec<u64>,
}

impl Claims {
    fn new(area: Range<usize>) -> Self {
        let words = (area.len() / INODE_UNIT_BYTES).div_ceil(u64::BITS as usize);
        Claims { area, taken: vec![0; words], inodes: vec![0; words] }
    }

    /// False for a further name of an inode met before. Inodes outside the area are refused when
    /// they are claimed.
    fn is_first_visit(&mut self, start: usize) -> bool {
        let unit = (start - self.area.start) / INODE_UNIT_BYTES;
        self.inodes.get_mut(unit / 64).is_none_or(|word| set(word, unit))
    }

    fn claim(&mut self, bytes: Range<usize>) -> Result<()> {
        if bytes.start < self.area.start || bytes.end > self.area.end {
            return Err(malformed!(
                "bytes {bytes:?} are outside of the metadata, which is bytes {:?}",
                self.area
            ));
        }
        let first = (bytes.start - self.area.start) / INODE_UNIT_BYTES;
        let end = (bytes.end - self.area.start).div_ceil(INODE_UNIT_BYTES);
        match (first..end).all(|unit| set(&mut self.taken[unit / 64], unit)) {
            true => Ok(()),
            false => Err(malformed!("bytes {bytes:?} belong to something else, too")),
        }
    }
}

/// Sets the bit of a unit; false if it was set.
fn set(word: &mut u64, unit: usize) -> bool {
    let bit = 1 << (unit % 64);
    let was_clear = *word & bit == 0;
    *word |= bit;
    was_clear
}
