//! A directory that nothing gets out of: names are resolved with the directory as the root.
//!
//! Layers and containers are hostile: they make links to `/etc` and races while we look. So a path
//! is opened by the kernel with RESOLVE_IN_ROOT (a link's `/` and `..` stay inside, as in the
//! chroot Docker unpacks in), and the last name is never followed. Everything else here works on
//! one directory's descriptor and one name in it.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, openat, openat2, readlinkat};
use nix::sys::stat::{FchmodatFlags, FileStat, Mode, SFlag, fchmodat, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use crate::error::{Error, Result};

/// Overlayfs reads this on an upper or lower directory: what is below it is hidden.
pub const OPAQUE: &str = "trusted.overlay.opaque";
/// Names of overlayfs's own attributes, which no layer may bring along.
pub const OVERLAY_PREFIX: &[u8] = b"trusted.overlay.";

/// An opened directory and all below it.
#[derive(Debug)]
pub struct Beneath {
    directory: OwnedFd,
}

impl Beneath {
    /// Opens the directory at `path`.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = nix::fcntl::open(path, flags, Mode::empty()).map_err(|errno| {
            Error::system(errno as i32, format!("cannot open {}", path.display()))
        })?;
        Ok(Beneath { directory })
    }

    /// The directory at `path`, links followed within; the root itself for an empty path.
    pub fn directory(&self, path: &[u8]) -> nix::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
        openat2(&self.directory, OsStr::from_bytes(path), how)
    }

    /// The same, made with all that is missing on the way to it. What a whiteout hid before starts
    /// anew: an opaque directory.
    pub fn make_directory(&self, path: &[u8]) -> nix::Result<OwnedFd> {
        match self.directory(path) {
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            opened => return opened,
        }
        let mut parent = self.directory(b"")?;
        let mut end = 0;
        for name in path.split(|&byte| byte == b'/') {
            end += name.len();
            let directory = match self.directory(&path[..end]) {
                Err(Errno::ENOENT) => {
                    make_plain(&parent, name)?;
                    self.directory(&path[..end])
                }
                Err(Errno::ENOTDIR) if is_whiteout(&status(&parent, name)?) => {
                    unlinkat(&parent, OsStr::from_bytes(name), UnlinkatFlags::NoRemoveDir)?;
                    make_plain(&parent, name)?;
                    set_opaque(&parent, name)?;
                    self.directory(&path[..end])
                }
                opened => opened,
            };
            parent = directory?;
            end += 1;
        }
        Ok(parent)
    }
}

/// A directory that the tar only implies, whatever our umask is.
fn make_plain(parent: &OwnedFd, name: &[u8]) -> nix::Result<()> {
    let (name, mode) = (OsStr::from_bytes(name), Mode::from_bits_truncate(0o755));
    mkdirat(parent, name, mode)?;
    fchmodat(parent, name, mode, FchmodatFlags::FollowSymlink)
}

/// What a name in a directory is; links are not followed.
pub fn status(directory: impl AsFd, name: &[u8]) -> nix::Result<FileStat> {
    fstatat(directory, OsStr::from_bytes(name), AtFlags::AT_SYMLINK_NOFOLLOW)
}

/// The type bits of what was looked at.
pub fn file_type(status: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(status.st_mode & SFlag::S_IFMT.bits())
}

/// Whether this is overlayfs's whiteout.
pub fn is_whiteout(status: &FileStat) -> bool {
    file_type(status) == SFlag::S_IFCHR && status.st_rdev == 0
}

/// Opens a directory for listing and for what is in it; a link is refused.
pub fn open_directory(parent: impl AsFd, name: &[u8]) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, OsStr::from_bytes(name), flags, Mode::empty())
}

/// Opens a regular file for reading; anything else that came in its place is refused.
pub fn open_file(parent: impl AsFd, name: &[u8]) -> nix::Result<File> {
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = openat(parent, OsStr::from_bytes(name), flags, Mode::empty())?;
    match file_type(&nix::sys::stat::fstat(&file)?) {
        SFlag::S_IFREG => Ok(File::from(file)),
        _ => Err(Errno::ESTALE),
    }
}

/// The names in a directory that was opened for listing, sorted, without `.` and `..`.
pub fn names(directory: &OwnedFd) -> nix::Result<Vec<Vec<u8>>> {
    // A descriptor of its own: listing moves the place in the directory.
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut listing = Dir::openat(directory, ".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in listing.iter() {
        let name = entry?.file_name().to_bytes().to_vec();
        if name != b"." && name != b".." {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Where a symbolic link leads.
pub fn link_target(parent: impl AsFd, name: &[u8]) -> nix::Result<Vec<u8>> {
    Ok(readlinkat(parent, OsStr::from_bytes(name))?.into_vec())
}

/// A path for calls that take no descriptor; the last name of it is not followed by those.
pub fn path_of(parent: &impl AsRawFd, name: &[u8]) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", parent.as_raw_fd())).join(OsStr::from_bytes(name))
}

/// The extended attributes of a name, overlayfs's own left out, sorted by name.
pub fn attributes(parent: &OwnedFd, name: &[u8]) -> std::io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let path = path_of(parent, name);
    let mut attributes = Vec::new();
    let listed = match xattr::list(&path) {
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(attributes),
        listed => listed?,
    };
    for key in listed.filter(|key| !key.as_bytes().starts_with(OVERLAY_PREFIX)) {
        if let Some(value) = xattr::get(&path, &key)? {
            attributes.push((key.into_vec(), value));
        }
    }
    attributes.sort_unstable();
    Ok(attributes)
}

/// Hides what lies below a directory.
pub fn set_opaque(parent: &OwnedFd, name: &[u8]) -> nix::Result<()> {
    xattr::set(path_of(parent, name), OPAQUE, b"y").map_err(|error| errno_of(&error))
}

/// Whether a directory hides what lies below it.
pub fn is_opaque(parent: &OwnedFd, name: &[u8]) -> nix::Result<bool> {
    match xattr::get(path_of(parent, name), OPAQUE) {
        Ok(value) => Ok(value.as_deref() == Some(b"y")),
        Err(error) => Err(errno_of(&error)),
    }
}

/// The kernel's number; the calls used here give no other errors.
pub fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Removes a name and all below it, however deep: directories are moved up into `scrap`, one that
/// belongs to us on the same file system, before they are emptied, so that neither descriptors nor
/// the stack grow with the depth.
pub fn remove(parent: &OwnedFd, name: &[u8], scrap: &OwnedFd) -> nix::Result<()> {
    let os_name = OsStr::from_bytes(name);
    match unlinkat(parent, os_name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => return Ok(()),
        Err(Errno::EISDIR) => {}
        Err(errno) => return Err(errno),
    }
    let mut waiting = vec![move_to_scrap(parent, os_name, scrap)?];
    while let Some(moved) = waiting.pop() {
        let directory = open_directory(scrap, moved.as_bytes())?;
        for name in names(&directory)? {
            let os_name = OsStr::from_bytes(&name);
            match unlinkat(&directory, os_name, UnlinkatFlags::NoRemoveDir) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(Errno::EISDIR) => {
                    match unlinkat(&directory, os_name, UnlinkatFlags::RemoveDir) {
                        Ok(()) => {}
                        Err(Errno::ENOTEMPTY | Errno::EEXIST) => {
                            waiting.push(move_to_scrap(&directory, os_name, scrap)?);
                        }
                        Err(errno) => return Err(errno),
                    }
                }
                Err(errno) => return Err(errno),
            }
        }
        unlinkat(scrap, moved.as_str(), UnlinkatFlags::RemoveDir)?;
    }
    Ok(())
}

/// The inode's number makes a name that nothing else there has.
fn move_to_scrap(parent: &OwnedFd, name: &OsStr, scrap: &OwnedFd) -> nix::Result<String> {
    let inode = fstatat(parent, name, AtFlags::AT_SYMLINK_NOFOLLOW)?.st_ino;
    let moved = format!("inode-{inode}");
    nix::fcntl::renameat(parent, name, scrap, moved.as_str())?;
    Ok(moved)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_lead_nowhere_but_inside() {
        let place = tempfile::tempdir().expect("a directory");
        let root = place.path().join("root");
        fs::create_dir_all(root.join("etc")).expect("made");
        symlink("/etc", root.join("absolute")).expect("made");
        symlink("../../../../..", root.join("up")).expect("made");
        let beneath = Beneath::open(&root).expect("opens");
        for path in ["absolute", "up/etc", "../../etc", "/etc", "etc/../../etc"] {
            let found = beneath.directory(path.as_bytes()).expect(path);
            let inode = nix::sys::stat::fstat(&found).expect("a status").st_ino;
            let wanted = nix::sys::stat::stat(&root.join("etc")).expect("a status").st_ino;
            assert_eq!(inode, wanted, "{path}");
        }
        assert!(beneath.directory(b"up/usr").is_err());
    }

    #[test]
    fn a_tree_of_any_depth_and_any_modes_is_removed() {
        let place = tempfile::tempdir().expect("a directory");
        let directory = Beneath::open(place.path()).expect("opens").directory(b"").expect("opens");
        mkdirat(&directory, "scrap", Mode::S_IRWXU).expect("made");
        mkdirat(&directory, "deep", Mode::S_IRWXU).expect("made");
        let mut at = open_directory(&directory, b"deep").expect("opens");
        for _ in 0..3000 {
            fs::write(path_of(&at, b"file"), b"").expect("written");
            mkdirat(&at, "d", Mode::empty()).expect("made");
            at = open_directory(&at, b"d").expect("opens");
        }
        let scrap = open_directory(&directory, b"scrap").expect("opens");
        remove(&directory, b"deep", &scrap).expect("removed");
        remove(&directory, b"deep", &scrap).expect("what is gone is gone");
        assert_eq!(names(&directory).expect("listed"), [b"scrap"]);
        assert!(names(&scrap).expect("listed").is_empty());
    }
}
