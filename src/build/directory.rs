//! A directory of the host as a layer.
//!
//! Walks in an order that depends on names only, never follows a link and never changes anything.
//! Files are opened relative to their directory; one that changes its size while it is read is an
//! error that names it. Holes of sparse files are not read.

use super::entry::{Attributes, Entry, Xattr};
use super::feeder::Feeder;
use super::tree::Tree;
use crate::config::{BUILD_DEPTH_MAX, XATTR_LIST_MAX_BYTES};
use crate::error::{Error, Result};
use crate::image::FileKind;
use crate::image::inode_writer::split_xattr_name;
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, SeekFrom, Stat};
use rustix::io::Errno;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

/// Walks a directory into a tree and a feeder.
pub(super) struct Walker<'a> {
    tree: &'a mut Tree,
    feeder: &'a mut Feeder,
    /// The first name of each file with several: device and number.
    names: HashMap<(u64, u64), Vec<u8>>,
    /// What has become of the walk.
    pub(super) entry_count: u64,
    pub(super) lost_xattrs: u64,
    read: &'a dyn Fn(u64),
    /// For names and values of extended attributes.
    scratch: Vec<u8>,
}

impl<'a> Walker<'a> {
    /// `read` is told how many bytes of files have been read.
    pub(super) fn new(tree: &'a mut Tree, feeder: &'a mut Feeder, read: &'a dyn Fn(u64)) -> Self {
        let scratch = vec![0; XATTR_LIST_MAX_BYTES];
        let names = HashMap::new();
        Walker { tree, feeder, names, entry_count: 0, lost_xattrs: 0, read, scratch }
    }

    /// Takes in everything in `root`, and the root itself.
    pub(super) fn walk(&mut self, root: &Path) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = fs::open(root, flags, Mode::empty())
            .map_err(|errno| failed(errno, "open", root.as_os_str().as_bytes()))?;
        let stat = fs::fstat(&directory).map_err(|errno| failed(errno, "examine", b"."))?;
        let xattrs = self.xattrs(&directory, b".", b"")?;
        self.tree.put(b"", Entry::Directory(attributes(&stat, xattrs)))?;
        self.entry_count += 1;
        self.descend(directory, &mut Vec::new(), 0)
    }

    fn descend(&mut self, directory: OwnedFd, path: &mut Vec<u8>, depth: usize) -> Result<()> {
        if depth > BUILD_DEPTH_MAX {
            return Err(unsupported!("directories nested more than {BUILD_DEPTH_MAX} deep"));
        }
        for (_, name) in names(&directory, path)? {
            let length = path.len();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(&name);
            self.visit(&directory, &name, path, depth)?;
            path.truncate(length);
        }
        Ok(())
    }

    fn visit(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        path: &mut Vec<u8>,
        depth: usize,
    ) -> Result<()> {
        let stat = fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|errno| failed(errno, "examine", path))?;
        self.entry_count += 1;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let first = (stat.st_dev, stat.st_ino);
        if kind != FileType::Directory && stat.st_nlink > 1 {
            if let Some(target) = self.names.get(&first) {
                return self.tree.put(path, Entry::HardLink(target.clone()));
            }
            self.names.insert(first, path.clone());
        }
        let xattrs = self.xattrs(directory, name, path)?;
        let attributes = attributes(&stat, xattrs);
        let entry = match kind {
            FileType::Directory => Entry::Directory(attributes),
            FileType::RegularFile => self.file(directory, name, path, &stat, attributes)?,
            FileType::Symlink => {
                let target = fs::readlinkat(directory, name, Vec::new())
                    .map_err(|errno| failed(errno, "read the link", path))?;
                Entry::Link(attributes, target.into_bytes())
            }
            FileType::CharacterDevice | FileType::BlockDevice => {
                let kind = match kind {
                    FileType::CharacterDevice => FileKind::CharacterDevice,
                    _ => FileKind::BlockDevice,
                };
                let (major, minor) = (fs::major(stat.st_rdev), fs::minor(stat.st_rdev));
                Entry::Device(attributes, kind, major, minor)
            }
            FileType::Fifo => Entry::Special(attributes, FileKind::Pipe),
            FileType::Socket => Entry::Special(attributes, FileKind::Socket),
            FileType::Unknown => {
                return Err(unsupported!("/{}: unknown type", String::from_utf8_lossy(path)));
            }
        };
        self.tree.put(path, entry)?;
        if kind == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let below = fs::openat(directory, name, flags, Mode::empty())
                .map_err(|errno| failed(errno, "open", path))?;
            self.descend(below, path, depth + 1)?;
        }
        Ok(())
    }

    fn file(
        &mut self,
        directory: &OwnedFd,
        name: &[u8],
        path: &[u8],
        stat: &Stat,
        attributes: Attributes,
    ) -> Result<Entry> {
        let size = stat.st_size.cast_unsigned();
        let data = self.feeder.begin(size)?;
        if size > 0 {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
            let file = fs::openat(directory, name, flags, Mode::empty())
                .map_err(|errno| failed(errno, "open", path))?;
            let sparse = stat.st_blocks.cast_unsigned() * 512 < size;
            let fed = self.feed(&mut File::from(file), size, sparse);
            fed.map_err(|error| {
                let path = String::from_utf8_lossy(path);
                error.context(format!("/{path} (was it changed while it was read?)"))
            })?;
        }
        (self.read)(size);
        Ok(Entry::File(attributes, data))
    }

    /// Feeds a file; one with fewer blocks than bytes hole by hole.
    fn feed(&mut self, file: &mut File, size: u64, sparse: bool) -> Result<()> {
        let mut at = 0;
        while sparse && at < size {
            let data = match fs::seek(&*file, SeekFrom::Data(at)) {
                Ok(data) => data.min(size),
                Err(Errno::NXIO) => size,
                // The file system cannot tell: all of it is data.
                Err(_) => break,
            };
            let hole = match data < size {
                true => fs::seek(&*file, SeekFrom::Hole(data)).unwrap_or(size).min(size),
                false => size,
            };
            self.feeder.zeros(data - at)?;
            let back = fs::seek(&*file, SeekFrom::Start(data));
            back.map_err(|errno| Error::system(errno.raw_os_error(), "cannot seek"))?;
            self.feeder.bytes(file, hole - data, 0)?;
            at = hole;
        }
        if at < size {
            self.feeder.bytes(file, size - at, 0)?;
        }
        match file.read(&mut [0]) {
            Ok(0) => Ok(()),
            Ok(_) => Err(malformed!("it is longer than its {size} bytes")),
            Err(error) => Err(Error::io(&error, "cannot be read")),
        }
    }

    /// The attributes an image can hold, sorted by name.
    fn xattrs(&mut self, directory: &OwnedFd, name: &[u8], path: &[u8]) -> Result<Box<[Xattr]>> {
        // The calls that do not follow links take a path; this one has no race and no limit.
        let place = [format!("/proc/self/fd/{}/", directory.as_raw_fd()).as_bytes(), name].concat();
        let listed = match fs::llistxattr(&place[..], &mut self.scratch[..]) {
            Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Box::default()),
            Ok(count) => self.scratch[..count].to_vec(),
            Err(errno) => return Err(failed(errno, "list the attributes of", path)),
        };
        let mut xattrs: Vec<Xattr> = Vec::new();
        for name in listed.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            if split_xattr_name(name).is_none() {
                self.lost_xattrs += 1;
                continue;
            }
            match fs::lgetxattr(&place[..], name, &mut self.scratch[..]) {
                Ok(count) => xattrs.push((name.into(), self.scratch[..count].into())),
                // Listed, and not there to be read: ACLs that only mirror the mode.
                Err(Errno::NODATA | Errno::OPNOTSUPP) => {}
                Err(errno) => return Err(failed(errno, "read an attribute of", path)),
            }
        }
        xattrs.sort();
        Ok(xattrs.into())
    }
}

/// The names in a directory: files before directories, both ascending. What is started touches
/// files of one directory together, and so they lie together in the blob: traced starts of shells,
/// perl, python and apt took the fewest requests in this order, of seven (by depth, by breadth,
/// small files apart, by extension); a request brings what follows, up to a MiB.
fn names(directory: &OwnedFd, path: &[u8]) -> Result<Vec<(bool, Vec<u8>)>> {
    let mut names = Vec::new();
    let listing = fs::Dir::read_from(directory).map_err(|errno| failed(errno, "list", path))?;
    for entry in listing {
        let entry = entry.map_err(|errno| failed(errno, "list", path))?;
        let name = entry.file_name().to_bytes();
        if name == b"." || name == b".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                let stat = fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(|errno| failed(errno, "examine", path))?;
                FileType::from_raw_mode(stat.st_mode)
            }
            kind => kind,
        };
        names.push((kind == FileType::Directory, name.to_vec()));
    }
    names.sort_unstable();
    Ok(names)
}

fn attributes(stat: &Stat, xattrs: Box<[Xattr]>) -> Attributes {
    Attributes {
        permissions: (stat.st_mode & 0o7777) as u16,
        uid: stat.st_uid,
        gid: stat.st_gid,
        mtime_seconds: stat.st_mtime,
        mtime_nanoseconds: stat.st_mtime_nsec as u32,
        xattrs,
    }
}

fn failed(errno: Errno, what: &str, path: &[u8]) -> Error {
    let path = String::from_utf8_lossy(path);
    Error::system(errno.raw_os_error(), format!("cannot {what} /{path} of the directory"))
}
