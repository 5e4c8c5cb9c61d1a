//! A layer's tar to a directory that overlayfs can stack.
//!
//! Whiteouts become overlayfs's (a character device 0:0, an opaque attribute), all else is made as
//! the tar says: owner, mode, attributes, times, links, devices, holes. Nothing is made outside
//! the directory, whatever the tar says: `super::beneath` resolves every path. A later member
//! replaces an earlier one of the same path; directories merge, as in Docker.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{
    FchmodatFlags, Mode, SFlag, UtimensatFlags, fchmodat, makedev, mkdirat, mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, fchownat, linkat, symlinkat};

use super::beneath::{self, Beneath};
use crate::config;
use crate::error::{Error, Result};
use crate::tar::{Archive, Kind, Member};

const WHITEOUT_PREFIX: &[u8] = b".wh.";
const OPAQUE_MARK: &[u8] = b".wh..wh..opq";
/// Other names that start like this are AUFS's own bookkeeping.
const AUFS_PREFIX: &[u8] = b".wh..wh.";

/// What came out of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unpacked {
    /// Bytes of regular files.
    pub size_bytes: u64,
    /// Whether the layer hides everything below it.
    pub opaque_root: bool,
}

/// Unpacks `tar` into `directory`; `scrap` is an empty directory beside it. Reads `tar` to its end.
pub fn unpack(directory: &Path, scrap: &Path, tar: impl Read) -> Result<Unpacked> {
    let mut unpacker = Unpacker {
        root: Beneath::open(directory)?,
        scrap: Beneath::open(scrap)?.directory(b"").map_err(|errno| {
            Error::system(errno as i32, format!("cannot open {}", scrap.display()))
        })?,
        parent: None,
        directory_times: Vec::new(),
        directory_bytes: 0,
        unpacked: Unpacked::default(),
    };
    let mut archive = Archive::new(tar);
    while let Some(mut member) = archive.next_member()? {
        let shown = String::from_utf8_lossy(&member.path).into_owned();
        let path = normal_path(&member.path)
            .ok_or_else(|| Error::Malformed(format!("the layer's member {shown:?} leaves it")))?;
        member.path = path;
        unpacker.take(&member, &mut archive).map_err(|failure| match failure {
            Failure::Errno(errno) => {
                Error::system(errno as i32, format!("cannot unpack the layer's member {shown:?}"))
            }
            Failure::Error(error) => error.context(format_args!("the layer's member {shown:?}")),
        })?;
    }
    unpacker.finish()
}

/// A path below the root without `.`, `..` and extra slashes; None for one that leaves it.
fn normal_path(path: &[u8]) -> Option<Vec<u8>> {
    let mut names: Vec<&[u8]> = Vec::new();
    for name in path.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => {
                names.pop()?;
            }
            name => names.push(name),
        }
    }
    Some(names.join(&b'/'))
}

enum Failure {
    Errno(Errno),
    Error(Error),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Failure::Errno(errno)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Failure::Error(error)
    }
}

type Outcome = std::result::Result<(), Failure>;

struct Unpacker {
    root: Beneath,
    scrap: OwnedFd,
    /// The directory of the member before: members of one directory come one after the other.
    parent: Option<(Vec<u8>, OwnedFd)>,
    /// Directories get their times last: what is made in them would change those.
    directory_times: Vec<(Vec<u8>, (i64, u32))>,
    /// Bytes of the paths in it.
    directory_bytes: usize,
    unpacked: Unpacked,
}

impl Unpacker {
    fn take<R: Read>(&mut self, member: &Member, archive: &mut Archive<R>) -> Outcome {
        let split = member.path.iter().rposition(|&byte| byte == b'/');
        let (parent_path, name) = match split {
            Some(at) => (&member.path[..at], &member.path[at + 1..]),
            None => (&b""[..], &member.path[..]),
        };
        if member.path.is_empty() {
            return self.root_directory(member);
        }
        let parent = match self.parent.take() {
            Some((path, directory)) if path == parent_path => directory,
            _ => self.root.make_directory(parent_path)?,
        };
        if name == OPAQUE_MARK {
            // Overlayfs does not look for the attribute on a layer's own root.
            match parent_path.is_empty() {
                true => self.unpacked.opaque_root = true,
                false => beneath::set_opaque(&parent, b".")?,
            }
        } else if let Some(hidden) = name.strip_prefix(WHITEOUT_PREFIX) {
            if !name.starts_with(AUFS_PREFIX) {
                self.whiteout(&parent, hidden)?;
            }
        } else {
            self.make(&parent, name, member, archive)?;
        }
        // A link or a removal may have changed what the path means.
        if matches!(member.kind, Kind::File | Kind::Directory) {
            self.parent = Some((parent_path.to_vec(), parent));
        }
        Ok(())
    }

    /// `./` in a tar: only its attributes matter.
    fn root_directory(&mut self, member: &Member) -> Outcome {
        if member.kind == Kind::Directory {
            let root = self.root.directory(b"")?;
            dress(&root, b".", member)?;
            self.note_times(member)?;
        }
        Ok(())
    }

    /// What this layer itself has under the name stays; a directory then shows nothing from below.
    fn whiteout(&mut self, parent: &OwnedFd, name: &[u8]) -> Outcome {
        if matches!(name, b"" | b"." | b"..") {
            return Err(Error::Malformed("a whiteout of no name".to_owned()).into());
        }
        match beneath::status(parent, name) {
            Err(Errno::ENOENT) => {
                let (kind, mode) = (SFlag::S_IFCHR, Mode::empty());
                mknodat(parent, OsStr::from_bytes(name), kind, mode, 0)?;
            }
            Ok(there) if beneath::file_type(&there) == SFlag::S_IFDIR => {
                beneath::set_opaque(parent, name)?;
            }
            Ok(_) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(())
    }

    fn make<R: Read>(
        &mut self,
        parent: &OwnedFd,
        name: &[u8],
        member: &Member,
        archive: &mut Archive<R>,
    ) -> Outcome {
        let there = match beneath::status(parent, name) {
            Ok(there) => Some(there),
            Err(Errno::ENOENT) => None,
            Err(errno) => return Err(errno.into()),
        };
        let merges = member.kind == Kind::Directory
            && there.is_some_and(|there| beneath::file_type(&there) == SFlag::S_IFDIR);
        if there.is_some() && !merges {
            beneath::remove(parent, name, &self.scrap)?;
        }
        let os_name = OsStr::from_bytes(name);
        let device = makedev(member.device.0.into(), member.device.1.into());
        let node = |kind| mknodat(parent, os_name, kind, Mode::empty(), device);
        match member.kind {
            Kind::File => {
                self.file(parent, os_name, member, archive)?;
            }
            Kind::HardLink => return self.hard_link(parent, os_name, member),
            Kind::Symlink => symlinkat(OsStr::from_bytes(&member.link), parent, os_name)?,
            Kind::Character => node(SFlag::S_IFCHR)?,
            Kind::Block => node(SFlag::S_IFBLK)?,
            Kind::Fifo => node(SFlag::S_IFIFO)?,
            Kind::Directory => {
                if !merges {
                    mkdirat(parent, os_name, Mode::S_IRWXU)?;
                }
                if there.is_some_and(|there| beneath::is_whiteout(&there)) {
                    beneath::set_opaque(parent, name)?;
                }
                self.note_times(member)?;
            }
        }
        dress(parent, name, member)
    }

    fn file<R: Read>(
        &mut self,
        parent: &OwnedFd,
        name: &OsStr,
        member: &Member,
        archive: &mut Archive<R>,
    ) -> Outcome {
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let file = openat(parent, name, flags | OFlag::O_CLOEXEC, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let file = File::from(file);
        let mut end = 0;
        archive.copy(member, |offset, bytes| {
            end = offset + bytes.len() as u64;
            file.write_all_at(bytes, offset).map_err(|error| Error::io(&error, "cannot write it"))
        })?;
        if end != member.size {
            file.set_len(member.size).map_err(|error| Error::io(&error, "cannot size it"))?;
        }
        self.unpacked.size_bytes = self.unpacked.size_bytes.saturating_add(member.size);
        Ok(())
    }

    /// The target is a member of the same layer; it has its attributes already.
    fn hard_link(&mut self, parent: &OwnedFd, name: &OsStr, member: &Member) -> Outcome {
        let target = normal_path(&member.link)
            .filter(|path| !path.is_empty())
            .ok_or_else(|| Error::Malformed("a hard link to nothing in the layer".to_owned()))?;
        let split = target.iter().rposition(|&byte| byte == b'/');
        let (target_parent, target_name) = match split {
            Some(at) => (&target[..at], &target[at + 1..]),
            None => (&b""[..], &target[..]),
        };
        let directory = self.root.directory(target_parent)?;
        linkat(&directory, OsStr::from_bytes(target_name), parent, name, AtFlags::empty())?;
        Ok(())
    }

    fn note_times(&mut self, member: &Member) -> Outcome {
        self.directory_bytes += member.path.len() + 64;
        if self.directory_bytes > config::LAYER_DIRECTORIES_MAX_BYTES {
            return Err(Error::Unsupported(format!(
                "its directories' paths are longer than {} bytes together",
                config::LAYER_DIRECTORIES_MAX_BYTES
            ))
            .into());
        }
        self.directory_times.push((member.path.clone(), member.mtime));
        Ok(())
    }

    fn finish(self) -> Result<Unpacked> {
        for (path, mtime) in self.directory_times.iter().rev() {
            let set = |directory: OwnedFd| set_times(&directory, b".", *mtime);
            match self.root.directory(path).and_then(set) {
                // Replaced later by something else.
                Ok(()) | Err(Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP) => {}
                Err(errno) => {
                    let shown = String::from_utf8_lossy(path);
                    return Err(Error::system(errno as i32, format!("the times of {shown:?}")));
                }
            }
        }
        Ok(self.unpacked)
    }
}

/// Owner, mode, attributes, times, in this order: a change of owner clears set-id bits and
/// capabilities, and everything changes times but setting them.
fn dress(parent: &OwnedFd, name: &[u8], member: &Member) -> Outcome {
    let os_name = OsStr::from_bytes(name);
    let (uid, gid) = (Some(Uid::from_raw(member.uid)), Some(Gid::from_raw(member.gid)));
    fchownat(parent, os_name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW)?;
    if member.kind != Kind::Symlink {
        let mode = Mode::from_bits_truncate(member.mode);
        fchmodat(parent, os_name, mode, FchmodatFlags::FollowSymlink)?;
    }
    for (key, value) in &member.xattrs {
        if key.starts_with(beneath::OVERLAY_PREFIX) {
            continue;
        }
        match xattr::set(beneath::path_of(parent, name), OsStr::from_bytes(key), value) {
            Ok(()) => {}
            // As in Docker: not every file system has every kind, and links have few.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EPERM)) => {}
            Err(error) => {
                let key = String::from_utf8_lossy(key);
                return Err(Error::io(&error, format!("cannot set its attribute {key:?}")).into());
            }
        }
    }
    if member.kind != Kind::Directory {
        set_times(parent, name, member.mtime)?;
    }
    Ok(())
}

fn set_times(parent: &OwnedFd, name: &[u8], (seconds, nanoseconds): (i64, u32)) -> nix::Result<()> {
    let time = TimeSpec::new(seconds, nanoseconds.into());
    let flags = UtimensatFlags::NoFollowSymlink;
    utimensat(parent, OsStr::from_bytes(name), &time, &time, flags)
}

/// Flushes what was unpacked to the disk.
pub fn flush(directory: &Path) -> Result<()> {
    let file = File::open(directory)
        .map_err(|error| Error::io(&error, format!("cannot open {}", directory.display())))?;
    nix::unistd::syncfs(&file).map_err(|errno| {
        Error::system(errno as i32, format!("cannot flush {}", directory.display()))
    })
}
