//! An inode of the tree of names: what a file is and has, and what it costs to hold.
//!
//! Plain values; which names lead where is the tree's business.

use super::entry::{Attributes, FileData};
use crate::image::FileKind;
use std::collections::BTreeMap;

/// The position of an inode in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InodeId(pub(super) u32);

/// A file of any kind, without its names.
#[derive(Clone, Debug)]
pub struct Node {
    /// Owner, permissions, time, extended attributes.
    pub(super) attributes: Attributes,
    /// What it is and has.
    pub(super) content: Content,
    /// How many names lead to it. What has none any more holds nothing.
    pub(super) names: u32,
}

/// What an inode is and has.
#[derive(Clone, Debug)]
pub(super) enum Content {
    Directory(BTreeMap<Box<[u8]>, Child>),
    File(FileData),
    Link(Box<[u8]>),
    Device(FileKind, u32, u32),
    Special(FileKind),
}

/// A name in a directory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Child {
    pub(super) inode: InodeId,
    /// The last layer that put something here or below.
    pub(super) layer: u32,
}

impl Node {
    /// What kind of file it is.
    pub(super) fn kind(&self) -> FileKind {
        match self.content {
            Content::Directory(_) => FileKind::Directory,
            Content::File(_) => FileKind::File,
            Content::Link(_) => FileKind::Link,
            Content::Device(kind, ..) | Content::Special(kind) => kind,
        }
    }

    /// Bytes of its attributes and its target: what a layer can make large.
    pub(super) fn held_bytes(&self) -> usize {
        let target = match &self.content {
            Content::Link(target) => target.len(),
            _ => 0,
        };
        self.attributes.xattr_bytes() + target
    }
}
