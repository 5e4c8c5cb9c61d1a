//! One EROFS inode, compact (32 bytes) or extended (64 bytes).

use super::little::{u16_at, u32_at, u64_at};
use crate::error::Result;
use std::fmt;
use std::ops::Range;

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Link,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Pipe,
    /// A socket.
    Socket,
}

impl FileKind {
    fn from_mode(mode: u16) -> Result<Self> {
        match mode >> 12 {
            0o1 => Ok(FileKind::Pipe),
            0o2 => Ok(FileKind::CharacterDevice),
            0o4 => Ok(FileKind::Directory),
            0o6 => Ok(FileKind::BlockDevice),
            0o10 => Ok(FileKind::File),
            0o12 => Ok(FileKind::Link),
            0o14 => Ok(FileKind::Socket),
            _ => Err(malformed!("mode {mode:#o} is of no file type")),
        }
    }

    pub(super) fn from_dirent(number: u8) -> Result<Self> {
        match number {
            1 => Ok(FileKind::File),
            2 => Ok(FileKind::Directory),
            3 => Ok(FileKind::CharacterDevice),
            4 => Ok(FileKind::BlockDevice),
            5 => Ok(FileKind::Pipe),
            6 => Ok(FileKind::Socket),
            7 => Ok(FileKind::Link),
            _ => Err(malformed!("a directory entry of file type {number}")),
        }
    }

    /// The type bits of a mode.
    pub fn mode_bits(self) -> u16 {
        let bits = match self {
            FileKind::Pipe => 0o1,
            FileKind::CharacterDevice => 0o2,
            FileKind::Directory => 0o4,
            FileKind::BlockDevice => 0o6,
            FileKind::File => 0o10,
            FileKind::Link => 0o12,
            FileKind::Socket => 0o14,
        };
        bits << 12
    }

    /// The file type of a directory entry.
    pub(super) fn dirent_number(self) -> u8 {
        match self {
            FileKind::File => 1,
            FileKind::Directory => 2,
            FileKind::CharacterDevice => 3,
            FileKind::BlockDevice => 4,
            FileKind::Pipe => 5,
            FileKind::Socket => 6,
            FileKind::Link => 7,
        }
    }
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            FileKind::File => "file",
            FileKind::Directory => "directory",
            FileKind::Link => "link",
            FileKind::CharacterDevice => "character device",
            FileKind::BlockDevice => "block device",
            FileKind::Pipe => "pipe",
            FileKind::Socket => "socket",
        })
    }
}

/// A file of any kind, without its names and data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    /// Its number: where it stands, in units of 32 bytes. Hard links share it.
    pub nid: u64,
    /// What it is.
    pub kind: FileKind,
    /// Type and permission bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of data.
    pub size: u64,
    /// Last modification, whole seconds; 0 for a compact inode.
    pub mtime_seconds: u64,
    /// Last modification, the rest.
    pub mtime_nanoseconds: u32,
    /// Number of names.
    pub link_count: u32,
    /// Where its data is; of a file's, regular or not, only regular ones have any.
    pub(super) layout: DataLayout,
    /// Block address, chunk format or device number, by kind and layout.
    pub(super) address: u32,
    /// Where its extended attributes stand in the bootstrap; empty at their place if none.
    pub(super) xattrs: Range<usize>,
}

/// How the data of an inode is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataLayout {
    /// Whole blocks at `address`.
    FlatPlain,
    /// Whole blocks at `address`, the rest behind the inode.
    FlatInline,
    /// In data blobs; an array behind the inode says where.
    Chunked,
}

impl Inode {
    /// Parses the inode at the front of `record`, which starts at byte `start` of the bootstrap
    /// and goes to its end.
    pub(super) fn parse(nid: u64, start: usize, record: &[u8]) -> Result<Self> {
        let cut = || malformed!("cut off by the end of the bootstrap");
        let format = record.get(..2).map(|_| u16_at(record, 0)).ok_or_else(cut)?;
        let extended = format & 1 != 0;
        let size = if extended { 64 } else { 32 };
        if record.len() < size {
            return Err(cut());
        }
        let layout = match format >> 1 {
            0 => DataLayout::FlatPlain,
            2 => DataLayout::FlatInline,
            4 => DataLayout::Chunked,
            1 | 3 => return Err(unsupported!("data compressed by EROFS itself")),
            _ => return Err(malformed!("inode format {format:#x}")),
        };
        // 12 bytes of header come with the first unit of 4.
        let xattr_bytes = match usize::from(u16_at(record, 2)) {
            0 => 0,
            count => 12 + 4 * (count - 1),
        };
        let mode = u16_at(record, 4);
        let inode = Inode {
            nid,
            kind: FileKind::from_mode(mode)?,
            mode,
            uid: if extended { u32_at(record, 24) } else { u16_at(record, 24).into() },
            gid: if extended { u32_at(record, 28) } else { u16_at(record, 26).into() },
            size: if extended { u64_at(record, 8) } else { u32_at(record, 8).into() },
            mtime_seconds: if extended { u64_at(record, 32) } else { 0 },
            mtime_nanoseconds: if extended { u32_at(record, 40) } else { 0 },
            link_count: if extended { u32_at(record, 44) } else { u16_at(record, 6).into() },
            layout,
            address: u32_at(record, 16),
            xattrs: start + size..start + size + xattr_bytes,
        };
        if xattr_bytes > record.len() - size || inode.size > i64::MAX as u64 {
            return Err(malformed!("its size or its extended attributes are out of range"));
        }
        Ok(inode)
    }

    /// Major and minor number of a device.
    pub fn device(&self) -> Option<(u32, u32)> {
        let number = self.address;
        match self.kind {
            FileKind::CharacterDevice | FileKind::BlockDevice => {
                Some((number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xf_ff00))
            }
            _ => None,
        }
    }
}
