//! The tree of inodes and directories in a bootstrap, read safely.
//!
//! Borrows a [`Bootstrap`] and checks as it goes: every inode, directory block and chunk array is
//! in bounds when it is answered, names are legal and sorted, and a file's chunks are where the
//! kernel will look for them. One call is bounded by the size of what it reads; walks over many
//! directories are in [`super::walk`].

use super::bootstrap::Bootstrap;
use super::files::FileChunks;
use super::inode::{DataLayout, FileKind, Inode};
use super::little::{u16_at, u64_at};
use super::superblock::BLOCK_BYTES;
use crate::config::{FILE_NAME_MAX_BYTES, LINK_TARGET_MAX_BYTES};
use crate::error::{Error, Result};
use std::ops::Range;

/// The tree of one image.
#[derive(Clone, Copy, Debug)]
pub struct Tree<'a> {
    pub(super) bootstrap: &'a Bootstrap,
}

/// One name in a directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectoryEntry<'a> {
    /// 1 to 255 bytes, none of them `/` or NUL; never `.` or `..`.
    pub name: &'a [u8],
    /// Number of the inode it leads to.
    pub nid: u64,
    /// What the directory says it leads to.
    pub kind: FileKind,
}

/// An extended attribute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr<'a> {
    /// With its prefix, as in `user.note`.
    pub name: Vec<u8>,
    /// The value.
    pub value: &'a [u8],
}

impl Bootstrap {
    /// The tree of files.
    pub fn tree(&self) -> Tree<'_> {
        Tree { bootstrap: self }
    }
}

impl<'a> Tree<'a> {
    /// The root directory.
    pub fn root(self) -> Result<Inode> {
        let root = self.inode(self.bootstrap.superblock().root_nid)?;
        match root.kind {
            FileKind::Directory => Ok(root),
            kind => Err(malformed!("the root of the image is a {kind}")),
        }
    }

    /// The inode with this number.
    pub fn inode(self, nid: u64) -> Result<Inode> {
        let start = nid.checked_mul(32).and_then(|at| {
            let start = at.checked_add(self.bootstrap.superblock().meta_offset)?;
            usize::try_from(start).ok()
        });
        start
            .and_then(|start| self.bytes().get(start..).map(|record| (start, record)))
            .ok_or_else(|| malformed!("outside the bootstrap"))
            .and_then(|(start, record)| Inode::parse(nid, start, record))
            .map_err(|error| error.context(format!("inode {nid}")))
    }

    /// The entries of a directory by ascending name, without `.` and `..`.
    pub fn read_dir(self, directory: &Inode) -> Result<Vec<DirectoryEntry<'a>>> {
        self.entries(directory)
            .map_err(|error| error.context(format!("directory inode {}", directory.nid)))
    }

    /// The target of a symbolic link: 1 to 4096 bytes without NUL.
    pub fn read_link(self, link: &Inode) -> Result<Vec<u8>> {
        if link.kind != FileKind::Link {
            return Err(malformed!("inode {} is a {}, not a link", link.nid, link.kind));
        }
        if link.size == 0 || link.size > LINK_TARGET_MAX_BYTES {
            return Err(malformed!("link inode {}: {} bytes of target", link.nid, link.size));
        }
        let (body, tail) = self.flat(link).map_err(|error| named(error, link))?;
        let target = [body, tail].concat();
        match target.contains(&0) {
            true => Err(malformed!("link inode {}: a NUL in its target", link.nid)),
            false => Ok(target),
        }
    }

    /// The extended attributes of an inode, in stored order.
    pub fn xattrs(self, inode: &Inode) -> Result<Vec<Xattr<'a>>> {
        let area = self.bytes().get(inode.xattrs.clone());
        area.ok_or_else(|| malformed!("extended attributes outside the bootstrap"))
            .and_then(read_xattrs)
            .map_err(|error| named(error, inode))
    }

    /// The chunks of a regular file, in order.
    pub fn file_chunks(self, file: &Inode) -> Result<FileChunks<'a>> {
        FileChunks::of(self, file).map_err(|error| named(error, file))
    }

    /// The inode at `path`, whose components are separated by `/`. Links are not followed, `.` and
    /// `..` not interpreted.
    pub fn lookup(self, path: &[u8]) -> Result<Inode> {
        let mut inode = self.root()?;
        for name in path.split(|&byte| byte == b'/').filter(|name| !name.is_empty()) {
            let absent = || {
                let (name, path) = (String::from_utf8_lossy(name), String::from_utf8_lossy(path));
                Error::NotFound(format!("no {name:?} in the image (looking for {path:?})"))
            };
            if inode.kind != FileKind::Directory {
                return Err(absent());
            }
            let entries = self.read_dir(&inode)?;
            let found = entries.binary_search_by_key(&name, |entry| entry.name);
            inode = self.inode(entries[found.map_err(|_| absent())?].nid)?;
        }
        Ok(inode)
    }

    pub(super) fn bytes(self) -> &'a [u8] {
        self.bootstrap.bytes()
    }

    /// The data of a directory or link: whole blocks, then what stands behind the inode.
    fn flat(self, inode: &Inode) -> Result<(&'a [u8], &'a [u8])> {
        let (body, tail) = self.flat_ranges(inode)?;
        Ok((&self.bytes()[body], &self.bytes()[tail]))
    }

    /// Where both lie in the bootstrap; `0..0` if there is no whole block.
    pub(super) fn flat_ranges(self, inode: &Inode) -> Result<(Range<usize>, Range<usize>)> {
        let size = usize::try_from(inode.size).map_err(|_| malformed!("{} bytes", inode.size))?;
        let (body, tail) = match inode.layout {
            DataLayout::FlatPlain => (size, 0),
            DataLayout::FlatInline => (size - size % BLOCK_BYTES, size % BLOCK_BYTES),
            DataLayout::Chunked => return Err(malformed!("its data is in chunks")),
        };
        let body_start = match body {
            // Without a whole block the address has no meaning.
            0 => Some(0),
            _ => (inode.address as usize).checked_mul(BLOCK_BYTES),
        };
        let tail_start = inode.xattrs.end;
        if tail_start % BLOCK_BYTES + tail > BLOCK_BYTES {
            return Err(malformed!("its inline data crosses a block"));
        }
        let part = |start: usize, length: usize| {
            let end = start.checked_add(length).filter(|&end| end <= self.bytes().len())?;
            Some(start..end)
        };
        let parts =
            body_start.and_then(|start| Some((part(start, body)?, part(tail_start, tail)?)));
        parts.ok_or_else(|| malformed!("its data leaves the bootstrap"))
    }

    fn entries(self, directory: &Inode) -> Result<Vec<DirectoryEntry<'a>>> {
        if directory.kind != FileKind::Directory {
            return Err(malformed!("it is a {}", directory.kind));
        }
        let (body, tail) = self.flat(directory)?;
        let mut entries = Vec::new();
        for block in body.chunks(BLOCK_BYTES).chain(tail.chunks(BLOCK_BYTES)) {
            read_block(block, &mut entries)?;
        }
        if entries.windows(2).any(|pair| pair[0].name >= pair[1].name) {
            return Err(malformed!("its names are not sorted and distinct"));
        }
        let own = |entry: &DirectoryEntry<'_>| entry.name == b"." || entry.name == b"..";
        if entries.iter().filter(|entry| own(entry)).count() != 2 {
            return Err(malformed!("it lacks \".\" or \"..\""));
        }
        entries.retain(|entry| !own(entry));
        Ok(entries)
    }
}

fn named(error: Error, inode: &Inode) -> Error {
    error.context(format!("{} inode {}", inode.kind, inode.nid))
}

const DIRENT_BYTES: usize = 12;

/// Appends the entries of one block: an array of records, then the names.
fn read_block<'a>(block: &'a [u8], entries: &mut Vec<DirectoryEntry<'a>>) -> Result<()> {
    if block.len() < DIRENT_BYTES {
        return Err(malformed!("a directory block of {} bytes", block.len()));
    }
    // The first name starts where the records end.
    let records_end = usize::from(u16_at(block, 8));
    let legal = records_end >= DIRENT_BYTES && records_end < block.len();
    if !legal || !records_end.is_multiple_of(DIRENT_BYTES) {
        return Err(malformed!("names start at byte {records_end} of a directory block"));
    }
    let (records, _) = block[..records_end].as_chunks::<DIRENT_BYTES>();
    let mut start = records_end;
    for (position, record) in records.iter().enumerate() {
        let next = records.get(position + 1);
        let end = next.map_or(block.len(), |next| usize::from(u16_at(next, 8)));
        let name = block.get(start..end).filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| malformed!("a name from byte {start} to byte {end}"))?;
        // Only the last name of a block may be padded.
        let name = match next {
            None => name.split(|&byte| byte == 0).next().unwrap_or_default(),
            Some(_) => name,
        };
        check_name(name)?;
        entries.push(DirectoryEntry {
            name,
            nid: u64_at(record, 0),
            kind: FileKind::from_dirent(record[10])?,
        });
        start = end;
    }
    Ok(())
}

fn check_name(name: &[u8]) -> Result<()> {
    let illegal = name.iter().any(|&byte| byte == 0 || byte == b'/');
    if name.is_empty() || name.len() > FILE_NAME_MAX_BYTES || illegal {
        return Err(malformed!("illegal name {:?}", String::from_utf8_lossy(name)));
    }
    Ok(())
}

const XATTR_HEADER_BYTES: usize = 12;
const XATTR_ENTRY_BYTES: usize = 4;

fn read_xattrs(area: &[u8]) -> Result<Vec<Xattr<'_>>> {
    let mut xattrs = Vec::new();
    if area.is_empty() {
        return Ok(xattrs);
    }
    if area[4] != 0 {
        return Err(unsupported!("shared extended attributes"));
    }
    let mut rest = &area[XATTR_HEADER_BYTES..];
    while !rest.is_empty() {
        let cut = || malformed!("an extended attribute leaves its area");
        let head = rest.get(..XATTR_ENTRY_BYTES).ok_or_else(cut)?;
        let name_end = XATTR_ENTRY_BYTES + usize::from(head[0]);
        let end = name_end + usize::from(u16_at(head, 2));
        let name = rest.get(XATTR_ENTRY_BYTES..name_end).ok_or_else(cut)?;
        let value = rest.get(name_end..end).ok_or_else(cut)?;
        let name = [xattr_prefix(head[1])?.as_bytes(), name].concat();
        xattrs.push(Xattr { name, value });
        rest = rest.get(end.next_multiple_of(4)..).ok_or_else(cut)?;
    }
    Ok(xattrs)
}

fn xattr_prefix(index: u8) -> Result<&'static str> {
    match index {
        1 => Ok("user."),
        2 => Ok("system.posix_acl_access"),
        3 => Ok("system.posix_acl_default"),
        4 => Ok("trusted."),
        6 => Ok("security."),
        _ => Err(unsupported!("extended attributes of class {index}")),
    }
}
