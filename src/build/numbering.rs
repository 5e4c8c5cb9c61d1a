//! Where each inode of a bootstrap stands: order, numbers, layouts, directory blocks.
//!
//! Inodes are put in the order of a walk level by level, those of one directory side by side, each
//! with what belongs behind it. Rules that readers enforce and that are kept here:
//! - the root's number is not 0 and fits 16 bits;
//! - data behind an inode does not cross a block: where it would, the inode moves on to the next
//!   block, and later inodes fill the gap; what no block can hold has blocks of its own.

use super::entry::FileData;
use super::tree::{Child, Content, InodeId, Node, Tree};
use crate::error::Result;
use crate::image::inode_writer::{
    InodeFields, WrittenEntry, WrittenLayout, device_number, directory_bytes, xattr_area,
};
use crate::image::superblock::BLOCK_BYTES;

/// Inode numbers count in units of this many bytes.
const SLOT_BYTES: u64 = 32;
/// Numbers count from a block before the inodes, so that none has number 0.
pub(super) const FIRST_INODE: u64 = BLOCK_BYTES as u64;

/// The place of one inode.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) inode: InodeId,
    /// Offset from where numbers count, a multiple of 32.
    pub(super) offset: u64,
    /// Bytes of data, of a file or of a directory as it will be written.
    pub(super) size: u64,
    pub(super) layout: WrittenLayout,
    /// First of its whole blocks, counted from the first directory block.
    pub(super) first_block: u32,
    pub(super) link_count: u32,
    /// The directory that has it; of no meaning for what is no directory.
    parent: InodeId,
}

/// The places of all inodes of a tree.
pub(super) struct Numbering {
    /// In the order of their running numbers.
    pub(super) places: Vec<Place>,
    /// Position in `places` by inode; `NOWHERE` for inodes without a name.
    positions: Vec<u32>,
    /// End of the inode area, counted from where numbers do.
    pub(super) inode_bytes: u64,
    /// Blocks of directories and long links.
    pub(super) block_count: u32,
    pub(super) has_xattrs: bool,
    /// Room that inodes left when they moved on to the next block: offset and size.
    gaps: Vec<(u64, u64)>,
}

/// Gaps remembered; more than a few are never open at once, as most inodes are small.
const GAPS_MAX: usize = 64;

const NOWHERE: u32 = u32::MAX;

impl Numbering {
    /// Places every inode that has a name. `chunk_size` says how long chunk arrays are.
    pub(super) fn of(tree: &Tree, chunk_size: u32) -> Result<Self> {
        let mut numbering = Numbering {
            places: Vec::new(),
            positions: vec![NOWHERE; tree.inode_count()],
            inode_bytes: FIRST_INODE,
            block_count: 0,
            has_xattrs: false,
            gaps: Vec::new(),
        };
        numbering.visit(tree);
        for at in 0..numbering.places.len() {
            numbering.place(tree, at, chunk_size)?;
        }
        Ok(numbering)
    }

    /// Positions in `places` by ascending offset.
    pub(super) fn by_offset(&self) -> Vec<u32> {
        let mut order: Vec<u32> = (0..self.places.len() as u32).collect();
        order.sort_unstable_by_key(|&at| self.places[at as usize].offset);
        order
    }

    /// The number of an inode that has a name.
    pub(super) fn nid(&self, inode: InodeId) -> Option<u64> {
        let place = self.places.get(self.positions[inode.0 as usize] as usize)?;
        Some(place.offset / SLOT_BYTES)
    }

    /// The entries of a directory, `.` and `..` among them, sorted.
    pub(super) fn entries<'a>(&self, tree: &'a Tree, place: &Place) -> Vec<WrittenEntry<'a>> {
        let entry = |name, inode: InodeId| WrittenEntry {
            name,
            nid: self.nid(inode).unwrap_or_default(),
            kind: tree.node(inode).kind(),
        };
        let children = tree.children(place.inode).into_iter().flatten();
        let mut entries: Vec<WrittenEntry<'a>> =
            children.map(|(name, child)| entry(name, child.inode)).collect();
        for (name, inode) in [(&b"."[..], place.inode), (b"..", place.parent)] {
            let at = entries.partition_point(|other| other.name < name);
            entries.insert(at, entry(name, inode));
        }
        entries
    }

    /// Orders inodes and counts their names.
    fn visit(&mut self, tree: &Tree) {
        self.meet(Tree::ROOT, Tree::ROOT);
        self.places[0].link_count = 2;
        let mut next = 0;
        while next < self.places.len() {
            let directory = self.places[next].inode;
            for child in tree.children(directory).into_iter().flat_map(|names| names.values()) {
                self.visit_child(tree, directory, next, child);
            }
            next += 1;
        }
    }

    fn visit_child(&mut self, tree: &Tree, directory: InodeId, position: usize, child: &Child) {
        let is_directory = tree.children(child.inode).is_some();
        let at = self.meet(child.inode, directory);
        // A directory has its own `.`; each subdirectory's `..` is a link to its parent.
        self.places[at].link_count += if is_directory { 2 } else { 1 };
        self.places[position].link_count += u32::from(is_directory);
    }

    fn meet(&mut self, inode: InodeId, parent: InodeId) -> usize {
        let position = &mut self.positions[inode.0 as usize];
        if *position == NOWHERE {
            *position = self.places.len() as u32;
            self.places.push(Place {
                inode,
                offset: 0,
                size: 0,
                layout: WrittenLayout::Plain,
                first_block: 0,
                link_count: 0,
                parent,
            });
        }
        *position as usize
    }

    fn place(&mut self, tree: &Tree, at: usize, chunk_size: u32) -> Result<()> {
        let node = tree.node(self.places[at].inode);
        let mut place = self.places[at].clone();
        place.size = data_bytes(node);
        let xattrs = xattrs_of(node)?.len();
        self.has_xattrs |= xattrs > 0;
        let head = (fields(node, &place, 0, at as u32, xattrs).size_bytes() + xattrs) as u64;
        match &node.content {
            Content::Directory(_) | Content::Link(_) => self.place_flat(&mut place, head),
            Content::File(FileData { size, .. }) => {
                place.layout = WrittenLayout::Chunked;
                let array = size.div_ceil(chunk_size.into()) * 8;
                self.take(&mut place, head.next_multiple_of(8) + array);
            }
            _ => self.take(&mut place, head),
        }
        self.places[at] = place;
        Ok(())
    }

    /// A directory or link: its last bytes behind the inode, in the same block, or in a block of
    /// their own. Data of whole blocks has nothing to put behind the inode, and the kernel takes
    /// the last block of an inline file to be there.
    fn place_flat(&mut self, place: &mut Place, head: u64) {
        let block = BLOCK_BYTES as u64;
        let (whole, tail) = (place.size / block, place.size % block);
        let start = self.inode_bytes % block;
        place.first_block = self.block_count;
        if tail > 0 && head + tail <= block {
            if self.gap_for(head + tail).is_none() && start + head + tail > block {
                self.leave_gap(block - start);
            }
            place.layout = WrittenLayout::Inline;
            self.block_count += whole as u32;
            self.take(place, head + tail);
        } else {
            self.block_count += place.size.div_ceil(block) as u32;
            self.take(place, head);
        }
    }

    fn take(&mut self, place: &mut Place, bytes: u64) {
        let bytes = bytes.next_multiple_of(SLOT_BYTES);
        match self.gap_for(bytes) {
            Some(at) => {
                let (offset, size) = &mut self.gaps[at];
                place.offset = *offset;
                *offset += bytes;
                *size -= bytes;
                if *size == 0 {
                    self.gaps.remove(at);
                }
            }
            None => {
                place.offset = self.inode_bytes;
                self.inode_bytes += bytes;
            }
        }
    }

    /// The smallest gap that has so many bytes.
    fn gap_for(&self, bytes: u64) -> Option<usize> {
        let fitting = self.gaps.iter().enumerate().filter(|(_, (_, size))| *size >= bytes);
        fitting.min_by_key(|(_, (_, size))| *size).map(|(at, _)| at)
    }

    /// Goes on to the next block, `size` bytes away.
    fn leave_gap(&mut self, size: u64) {
        if self.gaps.len() == GAPS_MAX {
            let smallest = self.gaps.iter().enumerate().min_by_key(|(_, (_, size))| *size);
            if let Some((at, _)) = smallest {
                self.gaps.remove(at);
            }
        }
        self.gaps.push((self.inode_bytes, size));
        self.inode_bytes += size;
    }
}

/// The record of a placed inode. `address` is what stands in its place-dependent field: a block
/// or a chunk format; devices have their number there.
pub(super) fn fields(
    node: &Node,
    place: &Place,
    address: u32,
    number: u32,
    xattr_bytes: usize,
) -> InodeFields {
    let attributes = &node.attributes;
    InodeFields {
        kind: node.kind(),
        permissions: attributes.permissions,
        uid: attributes.uid,
        gid: attributes.gid,
        size: place.size,
        mtime_seconds: attributes.mtime_seconds,
        mtime_nanoseconds: attributes.mtime_nanoseconds,
        link_count: place.link_count,
        number: number + 1,
        address: match node.content {
            Content::Device(_, major, minor) => device_number(major, minor),
            _ => address,
        },
        layout: place.layout,
        xattr_bytes,
    }
}

/// The extended attributes of an inode as they stand behind it.
pub(super) fn xattrs_of(node: &Node) -> Result<Vec<u8>> {
    xattr_area(node.attributes.xattrs.iter().map(|(name, value)| (&name[..], &value[..])))
}

fn data_bytes(node: &Node) -> u64 {
    match &node.content {
        Content::File(data) => data.size,
        Content::Link(target) => target.len() as u64,
        Content::Directory(children) => {
            let mut names: Vec<&[u8]> = children.keys().map(|name| &name[..]).collect();
            for own in [&b"."[..], b".."] {
                let at = names.partition_point(|name| *name < own);
                names.insert(at, own);
            }
            directory_bytes(names.into_iter())
        }
        Content::Device(..) | Content::Special(_) => 0,
    }
}
