//! The fanotify group: whose events are raised, and for which files they are not.
//!
//! One mark on the private bind mount raises an event before anything opened through it is read
//! ([`Group::mark_mount`]). It must be there before an image is mounted: files opened earlier never
//! ask. A file that is complete is ignored by its inode ([`Group::ignore`]) and costs its readers
//! nothing from then on.
//!
//! The group lives as long as any process holds its descriptor. When the last one closes it, marks
//! and waits are gone: readers get what is in the files, which is right or too short.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;

use super::fanotify::{Answer, encode};
use super::sys;
use crate::engine::{Call, Core, Fd};
use crate::error::{Error, Result};

/// A group for pre-content events.
#[derive(Debug)]
pub struct Group {
    fd: OwnedFd,
    /// Whether it stands for one that somebody is yet to give.
    is_awaited: AtomicBool,
}

/// An ignore mark that outlives writes to its file. Evictable: it does not pin the inode in memory,
/// and goes with it once no mounted image has the file open. So it is set again after a mount.
const IGNORE: libc::c_uint = libc::FAN_MARK_IGNORE_SURV | libc::FAN_MARK_EVICTABLE;

impl Group {
    /// Makes a group without marks.
    ///
    /// # Errors
    /// What is missing and what to do about it.
    pub fn open() -> Result<Group> {
        let flags = libc::FAN_CLASS_PRE_CONTENT
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_UNLIMITED_QUEUE
            | libc::FAN_UNLIMITED_MARKS;
        let files = libc::O_RDWR | libc::O_LARGEFILE | libc::O_CLOEXEC;
        sys::fanotify_init(flags, files).map(Group::of).map_err(|errno| match errno {
            Errno::EPERM => Error::Denied(
                "fanotify: run as root, with CAP_SYS_ADMIN in the initial user namespace"
                    .to_owned(),
            ),
            Errno::ENOSYS => {
                Error::Unsupported("this kernel has no fanotify (CONFIG_FANOTIFY)".to_owned())
            }
            Errno::EINVAL => Error::Unsupported(
                "this kernel has no pre-content events (Linux 6.14 with \
                 CONFIG_FANOTIFY_ACCESS_PERMISSIONS)"
                    .to_owned(),
            ),
            Errno::EMFILE => Error::Busy(
                "fanotify: too many groups of this user (sysctl user.max_fanotify_groups) or too \
                 many open files"
                    .to_owned(),
            ),
            _ => Error::system(errno as i32, "cannot make a fanotify group"),
        })
    }

    /// A group that somebody kept for us.
    pub fn of(fd: OwnedFd) -> Group {
        Group { fd, is_awaited: AtomicBool::new(false) }
    }

    /// A group that hears nothing, for one that is to be given.
    ///
    /// # Errors
    /// As for `open`.
    pub fn awaited() -> Result<Group> {
        let group = Group::open()?;
        group.is_awaited.store(true, Ordering::Release);
        Ok(group)
    }

    /// Whether it is yet to be given.
    pub fn is_awaited(&self) -> bool {
        self.is_awaited.load(Ordering::Acquire)
    }

    /// From now on this is the group that was given, which hears the mount at `place`.
    ///
    /// # Errors
    /// `Exists` if one was given before; `Malformed` for what is no such group.
    pub fn become_given(&self, given: &Group, place: &Path) -> Result<()> {
        let refused = |error: Error| Error::Malformed(format!("this is no group of ours: {error}"));
        given.mark_mount(place).map_err(refused)?;
        if !self.is_awaited.swap(false, Ordering::AcqRel) {
            return Err(Error::Exists("this daemon has a group".into()));
        }
        sys::replace(self.fd.as_fd(), given.fd.as_fd())
            .map_err(|errno| Error::system(errno as i32, "cannot take the group over"))
    }

    /// The group's file, for polling.
    pub fn fd(&self) -> Fd {
        Fd(self.fd.as_raw_fd())
    }

    /// Raises an event before anything is read that is opened through the mount at `place` from
    /// now on. Doing it again changes nothing.
    ///
    /// # Errors
    /// `Unsupported` for kernels before 6.14 and file systems without pre-content events.
    pub fn mark_mount(&self, place: &Path) -> Result<()> {
        let what = format!("cannot watch the mount {}", place.display());
        let path = CString::new(place.as_os_str().as_bytes());
        let path = path.map_err(|_| Error::Malformed(format!("{what}: a NUL in the path")))?;
        let flags = libc::FAN_MARK_ADD | libc::FAN_MARK_MOUNT;
        let marked = sys::fanotify_mark(self.fd.as_fd(), flags, None, &path);
        marked.map_err(|errno| match errno {
            Errno::EINVAL => Error::Unsupported(format!(
                "{what}: this kernel has no pre-content events (Linux 6.14 or later has)"
            )),
            Errno::EOPNOTSUPP | Errno::ENODEV | Errno::EXDEV => Error::Unsupported(format!(
                "{what}: its file system has no pre-content events; keep the cache on ext4, xfs \
                 or btrfs (not tmpfs, not overlayfs)"
            )),
            Errno::EPERM => Error::Denied(format!("{what}: run as root")),
            _ => Error::system(errno as i32, what),
        })
    }

    /// Raises no more events for a file: it is complete. `name` is seen from `directory`.
    pub fn ignore(&self, directory: BorrowedFd<'_>, name: &str) -> Result<()> {
        self.mark(libc::FAN_MARK_ADD | IGNORE, directory, name)
            .map_err(|errno| Error::system(errno as i32, format!("cannot ignore {name}")))
    }

    /// Raises events for a file again: before it is emptied. One that is not ignored stays so.
    pub fn unignore(&self, directory: BorrowedFd<'_>, name: &str) -> Result<()> {
        match self.mark(libc::FAN_MARK_REMOVE | libc::FAN_MARK_IGNORE_SURV, directory, name) {
            // ENOENT without the file, too: whoever removes one wants it to have no mark.
            Ok(()) | Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(Error::system(errno as i32, format!("cannot watch {name} again"))),
        }
    }

    fn mark(
        &self,
        flags: libc::c_uint,
        directory: BorrowedFd<'_>,
        name: &str,
    ) -> std::result::Result<(), Errno> {
        let name = CString::new(name).map_err(|_| Errno::EINVAL)?;
        sys::fanotify_mark(self.fd.as_fd(), flags, Some(directory), &name)
    }

    /// Takes events, if there are any: what of `buffer` they fill.
    pub fn receive<'a>(&self, core: &Core, buffer: &'a mut [u8]) -> Result<&'a [u8]> {
        match core.call(Call::Read(self.fd(), buffer)) {
            Ok(size) => Ok(&buffer[..size as usize]),
            Err(libc::EAGAIN | libc::EINTR) => Ok(&[]),
            Err(errno) => Err(Error::system(errno, "cannot read from the fanotify group")),
        }
    }

    /// Lets the readers of events go that a dead daemon had read and nobody can serve any more:
    /// they get what their files hold. Which these are is not known, so all numbers below `end`
    /// are answered but those of `kept`; before an event is read, or its number may be among them.
    /// Gives how many there were.
    pub fn let_go(&self, end: i32, kept: &[i32]) -> usize {
        let numbers = (0..end).filter(|number| !kept.contains(number));
        let answered = numbers.filter(|&number| {
            nix::unistd::write(&self.fd, &encode(Fd(number), Answer::Allow)).is_ok()
        });
        answered.count()
    }

    /// Answers an event; its file is closed afterwards by whoever has adopted it.
    pub fn answer(&self, core: &Core, file: Fd, answer: Answer) -> Result<()> {
        match core.call(Call::Write(self.fd(), &encode(file, answer))) {
            Ok(_) => Ok(()),
            Err(errno) => Err(Error::system(errno, format!("cannot answer event {}", file.0))),
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
