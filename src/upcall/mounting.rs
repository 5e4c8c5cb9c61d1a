//! Mounting images: an EROFS superblock, made of a bootstrap's cookies (cachefiles door) or of
//! files (fanotify door), and put where its user sees it.
//!
//! A superblock is made first and is then a mount that is nowhere ([`image_of_files`],
//! [`image_of_cookies`]); [`attach`] puts it into the mount namespace of whoever asked. Nothing is
//! left behind when a step fails: what is nowhere goes with its file descriptor.
//!
//! Behind the fanotify door the kernel opens the segment files by path, once, while it makes the
//! superblock. They must be opened through the private bind mount of the cache ([`bind_private`])
//! that carries the group's mark: what is opened elsewhere never asks. Paths longer than 255 bytes
//! do not fit; [`below`] names a file by the descriptor of its directory.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::mountinfo;
use super::sys;
use crate::config::{MOUNT_MESSAGE_MAX_BYTES, MOUNT_MESSAGES_MAX, MOUNT_VALUE_MAX_BYTES};
use crate::error::{Error, Result};

/// A mount that is nowhere yet; its superblock goes with it when it is dropped.
#[derive(Debug)]
pub struct DetachedMount {
    fd: OwnedFd,
}

impl DetachedMount {
    /// Opens a file of the image, wherever it is mounted.
    pub fn open(&self, name: &str) -> Result<File> {
        use nix::fcntl::{OFlag, openat};
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        openat(&self.fd, name, flags, nix::sys::stat::Mode::empty())
            .map(File::from)
            .map_err(|errno| failed(errno, format!("cannot open {name} of an image")))
    }
}

/// How the kernel reads the devices of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reading {
    /// Through their page cache, and copies it into that of the image.
    Cached,
    /// Straight into the page cache of the image (mount option `directio`, Linux 6.14).
    Direct,
}

/// What a daemon found when it asked for its private bind mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Binding {
    /// It was made.
    Made,
    /// It was there: mounted images may have files open through it.
    Found,
}

/// An image whose metadata is the file `metadata` and whose devices are files in this order, which
/// must be that of its device table.
///
/// # Errors
/// What the kernel says, with what it may mean. `Malformed` for a path of more than 255 bytes.
pub fn image_of_files<D: AsRef<str>>(
    metadata: &str,
    devices: impl IntoIterator<Item = D>,
    reading: Reading,
) -> Result<DetachedMount> {
    let context = Context::open()?;
    context.set("source", metadata)?;
    context.set_devices(devices)?;
    if reading == Reading::Direct {
        context.set_flag(c"directio")?;
    }
    context.make().map_err(|error| {
        let advice = match error.errno() {
            libc::ENOTBLK => "this kernel cannot mount files (CONFIG_EROFS_FS_BACKED_BY_FILE)",
            libc::ENOENT => "the metadata or a segment file is missing",
            libc::EINVAL | libc::EUCLEAN => {
                "the kernel refuses the metadata, or a file is on a file system it cannot use"
            }
            libc::ENFILE => "the system has too many open files (sysctl fs.file-max)",
            _ => "see dmesg and `sluice doctor`",
        };
        error.context(format!("cannot mount the image of {metadata}: {advice}"))
    })
}

/// An image that the cachefiles door serves, by the names it is registered under.
pub fn image_of_cookies<D: AsRef<str>>(
    fsid: &str,
    domain_id: Option<&str>,
    devices: impl IntoIterator<Item = D>,
) -> Result<DetachedMount> {
    let context = Context::open()?;
    let advise = |error: Error| {
        let advice = match error.errno() {
            libc::EINVAL => {
                "this kernel has no EROFS over fscache (or, with a domain, no shared domains)"
            }
            libc::ENOENT | libc::ENOBUFS => "the daemon does not have the device",
            libc::EBUSY | libc::EEXIST => "it is mounted already",
            _ => "see dmesg and `sluice doctor`",
        };
        error.context(format!("cannot mount {fsid}: {advice}"))
    };
    let domain = domain_id.map(|domain_id| ("domain_id", domain_id));
    for (key, value) in std::iter::once(("fsid", fsid)).chain(domain) {
        context.set(key, value).map_err(advise)?;
        // A kernel without fscache takes the option, says so, and would mount something else.
        let said = context.said();
        if !said.is_empty() {
            return Err(Error::Unsupported(format!(
                "cannot mount {fsid}: this kernel has no EROFS over fscache{said}"
            )));
        }
    }
    context.set_devices(devices).map_err(advise)?;
    context.make().map_err(advise)
}

/// Names a file of an open directory, for this process: short, whatever the directory's path is,
/// and through the mount the directory was opened through.
pub fn below(directory: &impl AsFd, name: &str) -> String {
    format!("/proc/self/fd/{}/{name}", directory.as_fd().as_raw_fd())
}

/// Opens a directory to name files below it.
pub fn open_directory(path: &Path) -> Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    open(path, flags, nix::sys::stat::Mode::empty())
        .map_err(|errno| failed(errno, format!("directory {}", path.display())))
}

/// A directory through a mount of its own that is nowhere, for as long as it is held.
pub fn clone_directory(path: &Path) -> Result<OwnedFd> {
    sys::clone_mount(&c_path(path)?)
        .map_err(|errno| failed(errno, format!("cannot clone the mount of {}", path.display())))
}

/// Puts a mount at `mountpoint` as the process `peer` sees it; in this process's own namespace
/// without one. On failure it is gone.
///
/// # Errors
/// `NotFound` if the peer is gone or has no such directory.
pub fn attach(image: DetachedMount, mountpoint: &Path, peer: Option<u32>) -> Result<()> {
    let path = c_path(mountpoint)?;
    let moved = as_seen_by(peer, || Ok(sys::move_mount(image.fd.as_fd(), &path)))?;
    moved.map_err(|errno| {
        let what = format!("cannot mount at {}", mountpoint.display());
        match errno {
            Errno::ENOENT | Errno::ENOTDIR => {
                Error::NotFound(format!("{what}: make the directory first"))
            }
            _ => failed(errno, what),
        }
    })
}

/// Makes an empty file, or empties it, as the process `peer` sees it; in this process's own
/// namespace without one.
///
/// # Errors
/// What the system says.
pub fn create_file(path: &Path, peer: Option<u32>) -> Result<File> {
    let create =
        || File::create(path).map_err(|error| Error::io(&error, path.display().to_string()));
    as_seen_by(peer, create)
}

/// A further mount of the image that `peer` sees at `mountpoint`: the same superblock, whose pages
/// are in memory once.
pub fn another(mountpoint: &Path, peer: Option<u32>) -> Result<DetachedMount> {
    let path = c_path(mountpoint)?;
    match as_seen_by(peer, || Ok(sys::clone_mount(&path)))? {
        Ok(fd) => Ok(DetachedMount { fd }),
        Err(errno) => Err(failed(errno, format!("cannot mount {} again", mountpoint.display()))),
    }
}

/// Takes away the topmost mount at `mountpoint` as `peer` sees it; at once if nobody uses it, or
/// `lazy`, when its last user leaves. Never by force.
///
/// # Errors
/// `Busy` while files of it are open, `NotFound` if nothing is mounted there or the peer is gone.
pub fn detach(mountpoint: &Path, peer: Option<u32>, lazy: bool) -> Result<()> {
    let flags = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    let flags = flags | MntFlags::UMOUNT_NOFOLLOW;
    as_seen_by(peer, || Ok(umount2(mountpoint, flags)))?.map_err(|errno| {
        let what = format!("cannot unmount {}", mountpoint.display());
        match errno {
            Errno::EBUSY => {
                Error::Busy(format!("{what}: it is in use; stop its users (see `fuser -vm`)"))
            }
            Errno::EINVAL | Errno::ENOENT => {
                Error::NotFound(format!("{what}: nothing is mounted there"))
            }
            _ => failed(errno, what),
        }
    })
}

/// Makes `directory` be seen at `place`, too, through a mount of its own that takes no part in
/// what other namespaces do. Finds the one of a daemon that died: mounted images still have their
/// files open through it, so it must be the same one.
///
/// # Errors
/// `Exists` if something else is mounted at `place`.
pub fn bind_private(directory: &Path, place: &Path) -> Result<Binding> {
    let metadata = |path: &Path| {
        path.metadata().map_err(|error| Error::io(&error, format!("directory {}", path.display())))
    };
    std::fs::create_dir_all(place)
        .map_err(|error| Error::io(&error, format!("directory {}", place.display())))?;
    // The list of mounts has no symbolic links.
    let place = place
        .canonicalize()
        .map_err(|error| Error::io(&error, format!("directory {}", place.display())))?;
    let binding = match mountinfo::at(&mountinfo::read(None)?, &place) {
        None => Binding::Made,
        Some(_) => {
            let (wanted, there) = (metadata(directory)?, metadata(&place)?);
            if (wanted.dev(), wanted.ino()) != (there.dev(), there.ino()) {
                return Err(Error::Exists(format!(
                    "something else than {} is mounted at {}; unmount it",
                    directory.display(),
                    place.display()
                )));
            }
            Binding::Found
        }
    };
    let no: Option<&str> = None;
    if binding == Binding::Made {
        mount(Some(directory), &place, no, MsFlags::MS_BIND, no).map_err(|errno| {
            let (directory, place) = (directory.display(), place.display());
            failed(errno, format!("cannot bind {directory} to {place}"))
        })?;
    }
    mount(no, &place, no, MsFlags::MS_PRIVATE, no)
        .map_err(|errno| failed(errno, format!("cannot make {} private", place.display())))?;
    Ok(binding)
}

/// An EROFS mount in the making.
struct Context {
    fd: OwnedFd,
}

impl Context {
    fn open() -> Result<Context> {
        match sys::fsopen(c"erofs") {
            Ok(fd) => Ok(Context { fd }),
            Err(errno) => Err(match errno {
                Errno::ENODEV => Error::Unsupported(
                    "this kernel has no EROFS (CONFIG_EROFS_FS; try `modprobe erofs`)".to_owned(),
                ),
                _ => failed(errno, "cannot mount EROFS".to_owned()),
            }),
        }
    }

    fn set(&self, key: &str, value: &str) -> Result<()> {
        if value.len() > MOUNT_VALUE_MAX_BYTES {
            return Err(Error::Malformed(format!(
                "{key} {value} has {} bytes, the kernel takes {MOUNT_VALUE_MAX_BYTES}: use a \
                 directory with a shorter path",
                value.len()
            )));
        }
        let text = |text: &str| {
            CString::new(text).map_err(|_| Error::Malformed(format!("{key} {text:?} has a NUL")))
        };
        sys::set_string(self.fd.as_fd(), &text(key)?, &text(value)?)
            .map_err(|errno| failed(errno, format!("{key}={value}{}", self.said())))
    }

    fn set_flag(&self, key: &CStr) -> Result<()> {
        sys::set_flag(self.fd.as_fd(), key).map_err(|errno| {
            failed(errno, format!("mount option {}{}", key.to_string_lossy(), self.said()))
        })
    }

    fn set_devices<D: AsRef<str>>(&self, devices: impl IntoIterator<Item = D>) -> Result<()> {
        devices.into_iter().try_for_each(|device| self.set("device", device.as_ref()))
    }

    fn make(self) -> Result<DetachedMount> {
        let fd = self.fd.as_fd();
        sys::set_flag(fd, c"ro")
            .and_then(|()| sys::create(fd))
            .and_then(|()| sys::fsmount(fd))
            .map(|fd| DetachedMount { fd })
            .map_err(|errno| failed(errno, format!("erofs{}", self.said())))
    }

    /// What the kernel has to say about this context, `; ` before each message.
    fn said(&self) -> String {
        let mut text = String::new();
        let Ok(fd) = self.fd.try_clone() else { return text };
        let (mut file, mut message) = (File::from(fd), [0; MOUNT_MESSAGE_MAX_BYTES]);
        for _ in 0..MOUNT_MESSAGES_MAX {
            match file.read(&mut message) {
                Ok(size) if size > 0 => {
                    let line = String::from_utf8_lossy(&message[..size]);
                    // "e erofs: ...": the first letter is the level.
                    let line = line.trim_end();
                    text.push_str("; ");
                    text.push_str(line.split_once(' ').map_or(line, |(_, rest)| rest));
                }
                _ => break,
            }
        }
        text
    }
}

/// Runs `act` in the mount namespace of a process. A thread changes namespace as a whole and not
/// back, so it has one of its own; one that shares its root and working directory may not.
fn as_seen_by<T: Send>(peer: Option<u32>, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let Some(peer) = peer else { return act() };
    let path = format!("/proc/{peer}/ns/mnt");
    let open = |path: &str| {
        let file = File::open(path)?;
        file.metadata().map(|metadata| (file, metadata.dev(), metadata.ino()))
    };
    let (theirs, device, inode) = open(&path).map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => {
            Error::NotFound(format!("process {peer}, which asked for a mount, has ended"))
        }
        _ => Error::io(&error, path.clone()),
    })?;
    let own = "/proc/thread-self/ns/mnt";
    let (_, own_device, own_inode) = open(own).map_err(|error| Error::io(&error, own))?;
    if (device, inode) == (own_device, own_inode) {
        return act();
    }
    let enter = || {
        unshare(CloneFlags::CLONE_FS)
            .and_then(|()| setns(&theirs, CloneFlags::CLONE_NEWNS))
            .map_err(|errno| {
                failed(errno, format!("cannot enter the mount namespace of process {peer}"))
            })?;
        act()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("mounting".to_owned());
        let thread = thread.spawn_scoped(scope, enter);
        let thread = thread.map_err(|error| Error::io(&error, "cannot start a thread"))?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn c_path(path: &Path) -> Result<CString> {
    CString::new(path.as_os_str().as_bytes())
        .map_err(|_| Error::Malformed(format!("path {path:?} has a NUL")))
}

fn failed(errno: Errno, what: String) -> Error {
    let advice = if errno == Errno::EPERM { " (run as root, with CAP_SYS_ADMIN)" } else { "" };
    Error::system(errno as i32, what + advice)
}
