//! A directory of the host that an image is unpacked into.
//!
//! Owns every call that changes the host's files. All of them go through the descriptor of the
//! target or of a directory below it that was opened without following a link
//! (`RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS`), and name one component: whatever an image says, and
//! whatever somebody else puts there meanwhile, nothing outside the target is touched.

use crate::error::{Error, Result};
use crate::image::{FileKind, Inode};
use rustix::fs::{
    self, AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;
use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

/// An empty directory being filled.
pub(super) struct Target {
    root: OwnedFd,
    /// The directory used last, by its path.
    open: Option<(Vec<u8>, OwnedFd)>,
}

/// Owner, permissions, times and attributes to be restored.
pub(super) struct Looks<'a> {
    pub(super) inode: &'a Inode,
    pub(super) xattrs: Vec<(Vec<u8>, &'a [u8])>,
}

impl Target {
    /// Opens the target, which is made if it is not there.
    ///
    /// # Errors
    /// `Exists` if there is something in it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let shown = path.display();
        std::fs::create_dir_all(path)
            .map_err(|error| Error::io(&error, format!("cannot make {shown}")))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = fs::open(path, flags, Mode::empty())
            .map_err(|errno| failed(errno, "open", path.as_os_str().as_encoded_bytes()))?;
        let listing = fs::Dir::read_from(&root)
            .map_err(|errno| failed(errno, "list", path.as_os_str().as_encoded_bytes()))?;
        let own = |name: &[u8]| name == b"." || name == b"..";
        let foreign = listing.flatten().any(|entry| !own(entry.file_name().to_bytes()));
        if foreign {
            return Err(Error::Exists(format!(
                "{shown} is not empty: unpack into a new directory"
            )));
        }
        Ok(Target { root, open: None })
    }

    /// Makes a directory that nobody else can enter before it is finished.
    pub(super) fn make_directory(&mut self, path: &[u8]) -> Result<()> {
        let (parent, name) = self.place(path)?;
        fs::mkdirat(parent, name, Mode::RWXU).map_err(|errno| failed(errno, "make", path))
    }

    /// Makes an empty file.
    pub(super) fn make_file(&mut self, path: &[u8]) -> Result<File> {
        let (parent, name) = self.place(path)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW;
        let file = fs::openat(parent, name, flags | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
        file.map(File::from).map_err(|errno| failed(errno, "make", path))
    }

    /// Makes a symbolic link.
    pub(super) fn make_link(&mut self, path: &[u8], target: &[u8]) -> Result<()> {
        let (parent, name) = self.place(path)?;
        fs::symlinkat(target, parent, name).map_err(|errno| failed(errno, "make", path))
    }

    /// Makes a device, pipe or socket.
    pub(super) fn make_special(&mut self, path: &[u8], inode: &Inode) -> Result<()> {
        let kind = match inode.kind {
            FileKind::CharacterDevice => FileType::CharacterDevice,
            FileKind::BlockDevice => FileType::BlockDevice,
            FileKind::Pipe => FileType::Fifo,
            _ => FileType::Socket,
        };
        let (major, minor) = inode.device().unwrap_or_default();
        let (parent, name) = self.place(path)?;
        let number = fs::makedev(major, minor);
        fs::mknodat(parent, name, kind, Mode::RUSR | Mode::WUSR, number)
            .map_err(|errno| failed(errno, "make", path))
    }

    /// Gives a file made before another name.
    pub(super) fn link(&mut self, first: &[u8], path: &[u8]) -> Result<()> {
        let (parent, name) = self.place(first)?;
        let from = parent.try_clone().map_err(|error| Error::io(&error, "cannot open a file"))?;
        let name = name.to_vec();
        let (parent, other) = self.place(path)?;
        fs::linkat(&from, &name[..], parent, other, AtFlags::empty())
            .map_err(|errno| failed(errno, "make", path))
    }

    /// Restores what is not content. A directory's time is right only if nothing is put into it
    /// afterwards.
    pub(super) fn dress(&mut self, path: &[u8], looks: &Looks<'_>) -> Result<()> {
        let inode = looks.inode;
        let (parent, name) = match path {
            b"" => (&self.root, &b"."[..]),
            path => self.place(path)?,
        };
        // From here on the file itself is meant, whatever becomes of its name. What calls do not
        // take a descriptor of this kind reach it through its entry in /proc.
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat(parent, name, flags, Mode::empty())
            .map_err(|errno| failed(errno, "open", path))?;
        let place = format!("/proc/self/fd/{}", file.as_raw_fd());
        let (owner, group) = (Uid::from_raw(inode.uid), Gid::from_raw(inode.gid));
        // First: a change of owner takes set-id bits and capabilities away.
        fs::chownat(&file, "", Some(owner), Some(group), AtFlags::EMPTY_PATH)
            .map_err(|errno| failed(errno, "give an owner to", path))?;
        if inode.kind != FileKind::Link {
            let mode = Mode::from_raw_mode((inode.mode & 0o7777).into());
            fs::chmod(&place, mode)
                .map_err(|errno| failed(errno, "set the permissions of", path))?;
        }
        for (attribute, value) in &looks.xattrs {
            fs::setxattr(&place, &attribute[..], value, XattrFlags::empty()).map_err(|errno| {
                let attribute = String::from_utf8_lossy(attribute);
                failed(errno, &format!("set the attribute {attribute} of"), path)
            })?;
        }
        let time = Timespec {
            tv_sec: inode.mtime_seconds.cast_signed(),
            tv_nsec: inode.mtime_nanoseconds.into(),
        };
        let times = Timestamps { last_access: time, last_modification: time };
        fs::utimensat(fs::CWD, &place, &times, AtFlags::empty())
            .map_err(|errno| failed(errno, "set the time of", path))
    }

    /// The directory a path is in, and its last component.
    fn place<'a>(&mut self, path: &'a [u8]) -> Result<(&OwnedFd, &'a [u8])> {
        let Some(slash) = path.iter().rposition(|&byte| byte == b'/') else {
            return Ok((&self.root, path));
        };
        let (parent, name) = (&path[..slash], &path[slash + 1..]);
        if self.open.as_ref().is_none_or(|(open, _)| open != parent) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            let fd = fs::openat2(&self.root, parent, flags, Mode::empty(), resolve)
                .map_err(|errno| failed(errno, "open", parent))?;
            self.open = Some((parent.to_vec(), fd));
        }
        let (_, fd) = self.open.as_ref().expect("invariant: it has just been opened");
        Ok((fd, name))
    }
}

fn failed(errno: Errno, what: &str, path: &[u8]) -> Error {
    let path = String::from_utf8_lossy(path);
    let hint = match errno {
        Errno::PERM | Errno::ACCESS => " (owners, devices and attributes need root)",
        Errno::NAMETOOLONG => " (its path is longer than the system takes)",
        _ => "",
    };
    Error::system(errno.raw_os_error(), format!("cannot {what} {path:?}{hint}"))
}
