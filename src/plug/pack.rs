//! Layers to a tar: what an image layer is made of when a container is committed.
//!
//! Overlayfs's whiteouts become OCI's (`.wh.NAME`, `.wh..wh..opq`). Names come sorted, a
//! directory before what is in it, so that the same tree makes the same bytes. The root directory
//! itself is left out, and sockets, as Docker does.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};

use nix::sys::stat::{FileStat, SFlag, major, minor};

use super::beneath;
use super::stack::{self, Stack, Visit, failed};
use crate::config;
use crate::error::{Error, Result};
use crate::tar::write::encode_head;
use crate::tar::{BLOCK_BYTES, Kind, Member};

/// Writes what `stack` shows as a tar.
pub fn pack(stack: Stack, sink: impl Write) -> Result<()> {
    let mut packer =
        Packer { sink, links: HashMap::new(), buffer: vec![0; config::TAR_COPY_BYTES] };
    if stack.hides() {
        packer
            .head(&Member { mode: 0o755, ..Member::new(b".wh..wh..opq".to_vec(), Kind::File) })?;
    }
    stack::walk(stack, Stack::default(), |visit| packer.entry(&visit))?;
    packer.write(&[0; 2 * BLOCK_BYTES])?;
    packer.sink.flush().map_err(|error| Error::io(&error, "cannot send the tar"))
}

/// Bytes of what `stack` shows, each file once however many names it has; directories do not count.
/// Never more than Docker can read: a container may have files of any size that are all hole.
pub fn size_bytes(stack: Stack) -> Result<u64> {
    let (mut seen, mut total) = (HashSet::new(), 0u64);
    stack::walk(stack, Stack::default(), |visit| {
        let status = &visit.found.status;
        let is_first = status.st_nlink == 1 || seen.insert((status.st_dev, status.st_ino));
        if !visit.found.is_directory() && is_first {
            total = total.saturating_add(status.st_size as u64).min(i64::MAX as u64);
        }
        Ok(())
    })?;
    Ok(total)
}

struct Packer<W> {
    sink: W,
    /// The first name of every file with several.
    links: HashMap<(u64, u64), Vec<u8>>,
    buffer: Vec<u8>,
}

impl<W: Write> Packer<W> {
    fn entry(&mut self, visit: &Visit<'_>) -> Result<()> {
        let Visit { path, name, found, .. } = *visit;
        let Some(kind) = kind_of(&found.status) else { return Ok(()) };
        if found.is_whiteout() {
            let parent = &path[..path.len() - name.len()];
            return self.head(&mark([parent, b".wh.", name].concat(), &found.status));
        }
        let layer = visit.parent.layer(found.layer);
        let mut member = member(path.to_vec(), kind, &found.status);
        member.xattrs = beneath::attributes(layer, name)
            .map_err(|error| failed(path, beneath::errno_of(&error)))?;
        if kind == Kind::Directory {
            member.path.push(b'/');
            self.head(&member)?;
            return match found.hides {
                true => self.head(&mark([path, b"/.wh..wh..opq"].concat(), &found.status)),
                false => Ok(()),
            };
        }
        if kind == Kind::Symlink {
            member.link = beneath::link_target(layer, name).map_err(|errno| failed(path, errno))?;
        }
        if found.status.st_nlink > 1 {
            let inode = (found.status.st_dev, found.status.st_ino);
            if let Some(first) = self.links.get(&inode) {
                (member.kind, member.link, member.size) = (Kind::HardLink, first.clone(), 0);
                member.xattrs.clear();
                return self.head(&member);
            }
            self.links.insert(inode, path.to_vec());
        }
        if kind != Kind::File {
            return self.head(&member);
        }
        let file = beneath::open_file(layer, name).map_err(|errno| failed(path, errno))?;
        self.head(&member)?;
        self.content(file, member.size)
            .map_err(|error| error.context(String::from_utf8_lossy(path)))
    }

    fn head(&mut self, member: &Member) -> Result<()> {
        self.write(&encode_head(member))
    }

    /// Exactly `size` bytes and the padding: the head has said so. A file that was cut short since
    /// ends in zeros, as in Docker.
    fn content(&mut self, mut file: std::fs::File, size: u64) -> Result<()> {
        let mut buffer = std::mem::take(&mut self.buffer);
        let mut left = size;
        while left > 0 {
            let wanted = left.min(buffer.len() as u64) as usize;
            let count = file
                .read(&mut buffer[..wanted])
                .map_err(|error| Error::io(&error, "cannot read a file"))?;
            if count == 0 {
                buffer[..wanted].fill(0);
            }
            let count = if count == 0 { wanted } else { count };
            self.write(&buffer[..count])?;
            left -= count as u64;
        }
        self.buffer = buffer;
        self.write(&[0; BLOCK_BYTES][..(size.next_multiple_of(BLOCK_BYTES as u64) - size) as usize])
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.sink.write_all(bytes).map_err(|error| Error::io(&error, "cannot send the tar"))
    }
}

fn kind_of(status: &FileStat) -> Option<Kind> {
    Some(match beneath::file_type(status) {
        SFlag::S_IFREG => Kind::File,
        SFlag::S_IFLNK => Kind::Symlink,
        SFlag::S_IFDIR => Kind::Directory,
        SFlag::S_IFCHR => Kind::Character,
        SFlag::S_IFBLK => Kind::Block,
        SFlag::S_IFIFO => Kind::Fifo,
        _ => return None,
    })
}

fn member(path: Vec<u8>, kind: Kind, status: &FileStat) -> Member {
    let is_device = matches!(kind, Kind::Character | Kind::Block);
    let device = (major(status.st_rdev) as u32, minor(status.st_rdev) as u32);
    Member {
        mode: status.st_mode & 0o7777,
        uid: status.st_uid,
        gid: status.st_gid,
        mtime: (status.st_mtime, 0),
        size: if kind == Kind::File { status.st_size as u64 } else { 0 },
        device: if is_device { device } else { (0, 0) },
        ..Member::new(path, kind)
    }
}

/// An empty file whose name says something about what is below.
fn mark(path: Vec<u8>, status: &FileStat) -> Member {
    let (uid, gid, mtime) = (status.st_uid, status.st_gid, (status.st_mtime, 0));
    Member { uid, gid, mtime, ..Member::new(path, Kind::File) }
}
