//! The open device, shared by all cores: messages out of it, commands and answers into it.
//!
//! Reads and answers go through the calling core, which may be a simulated one. Every answer is
//! given exactly once, by the task that took the message.

use std::fs::OpenOptions;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::AtomicUsize;

use super::cachefiles::{MESSAGE_MAX_BYTES, MessageId, copen};
use super::sys;
use crate::engine::{Call, Core, Fd};
use crate::error::{Error, Result};

/// Where the kernel's door is.
pub const DEVICE_PATH: &str = "/dev/cachefiles";

/// How a read is answered.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Completion {
    /// By ioctl on the object's file, as the kernel wants it.
    Control,
    /// By a line to the device: for a test's kernel at the other end of a socket.
    Line,
}

/// The device.
#[derive(Debug)]
pub struct Device {
    fd: Fd,
    /// Closes the device at the end; absent in simulations.
    guard: Option<OwnedFd>,
    completion: Completion,
    /// Whether another daemon had it before.
    is_inherited: bool,
    /// Opens taken and not answered, on all cores.
    unanswered_opens: AtomicUsize,
}

impl Device {
    /// Opens the kernel's device and binds it to a cache directory.
    ///
    /// # Errors
    /// `Busy` when another process has it; `System` and `Unsupported` say what to do.
    pub fn bind(directory: &Path, tag: Option<&str>) -> Result<Device> {
        let file = OpenOptions::new().read(true).write(true).open(DEVICE_PATH);
        let device = Device::of(file.map_err(|error| refused(&error))?.into());
        let directory = directory.canonicalize().map_err(|error| {
            Error::io(&error, format!("cache directory {}", directory.display()))
        })?;
        device.command(&format!("dir {}", directory.display()))?;
        if let Some(tag) = tag {
            device.command(&format!("tag {tag}"))?;
        }
        device.command("bind ondemand").map_err(|error| match error.errno() {
            libc::EOPNOTSUPP | libc::EINVAL => Error::Unsupported(format!(
                "{error}: the kernel lacks CONFIG_CACHEFILES_ONDEMAND, or the file system of {} \
                 lacks extended attributes or direct I/O; `sluice doctor` tells which",
                directory.display()
            )),
            _ => error,
        })?;
        Ok(device)
    }

    /// A kernel's device that is open already, and bound.
    pub fn of(guard: OwnedFd) -> Device {
        let fd = Fd(guard.as_raw_fd());
        Device { guard: Some(guard), ..Device::simulated(fd) }
    }

    /// The same, when the daemon that had it before is gone, or about to go: the kernel sends again
    /// what that daemon has not answered, once [`Device::restore`] has asked for it.
    pub fn inherited(self) -> Device {
        Device { is_inherited: true, ..self }
    }

    /// A test's kernel: the other end of a SOCK_SEQPACKET socket speaks the device's messages.
    pub fn of_socket(guard: OwnedFd) -> Device {
        Device { completion: Completion::Line, ..Device::of(guard) }
    }

    /// A simulated device: a number that only the simulated world understands.
    pub fn simulated(fd: Fd) -> Device {
        let (completion, unanswered_opens) = (Completion::Control, AtomicUsize::new(0));
        Device { fd, guard: None, completion, is_inherited: false, unanswered_opens }
    }

    /// Whether another daemon had it before.
    pub fn is_inherited(&self) -> bool {
        self.is_inherited
    }

    /// Has every request that was handed out and not answered handed out again (Linux 6.8). Not
    /// while a request to open is being served here: the kernel gives a second file for one object
    /// to nobody and fails the open (cachefiles_ondemand_get_fd, EEXIST).
    pub fn restore(&self) -> Result<()> {
        self.command("restore")
    }

    /// Opens that have been taken and not answered, on all cores.
    pub fn unanswered_opens(&self) -> &AtomicUsize {
        &self.unanswered_opens
    }

    /// The device's file, for polling.
    pub fn fd(&self) -> Fd {
        self.fd
    }

    /// The open device itself, for whoever is to hold it; none in simulations.
    pub fn file(&self) -> Option<BorrowedFd<'_>> {
        self.guard.as_ref().map(AsFd::as_fd)
    }

    /// Takes over the file of an OPEN message.
    pub fn adopt(&self, fd: Fd) -> Option<OwnedFd> {
        self.guard.is_some().then(|| sys::adopt(fd))
    }

    /// Takes one message, if there is one.
    pub fn receive<'a>(
        &self,
        core: &Core,
        buffer: &'a mut [u8; MESSAGE_MAX_BYTES],
    ) -> Result<Option<&'a [u8]>> {
        match core.call(Call::Read(self.fd, &mut buffer[..])) {
            Ok(0) | Err(libc::EAGAIN | libc::EINTR) => Ok(None),
            Ok(size) => Ok(Some(&buffer[..size as usize])),
            Err(errno) => Err(Error::system(errno, "cannot read from /dev/cachefiles")),
        }
    }

    /// Answers an OPEN.
    pub fn answer_open(
        &self,
        core: &Core,
        id: MessageId,
        answer: std::result::Result<u64, i32>,
    ) -> Result<()> {
        let mut text = [0; 64];
        let size = copen(id, answer, &mut text);
        match core.call(Call::Write(self.fd, &text[..size])) {
            Ok(_) => Ok(()),
            Err(errno) => Err(Error::system(errno, "cannot answer an open")),
        }
    }

    /// Answers a READ: its bytes are in the cache, or the reader gets EIO for the hole.
    pub fn answer_read(&self, core: &Core, object: Fd, id: MessageId) -> Result<()> {
        let answered = match self.completion {
            Completion::Control => {
                core.call(Call::Control(object, sys::READ_COMPLETE, u64::from(id.0)))
            }
            Completion::Line => {
                let mut line = [0; 16];
                line[..6].copy_from_slice(b"cread ");
                line[6..10].copy_from_slice(&id.0.to_ne_bytes());
                core.call(Call::Write(self.fd, &line))
            }
        };
        match answered {
            Ok(_) => Ok(()),
            Err(errno) => Err(Error::system(errno, format!("cannot answer read {}", id.0))),
        }
    }

    /// Gives the kernel a command (`cull`, `inuse`, `restore`), from an ordinary thread.
    pub fn command(&self, command: &str) -> Result<()> {
        let guard = self
            .guard
            .as_ref()
            .ok_or_else(|| Error::Unsupported("a simulated device takes no commands".into()))?;
        match nix::unistd::write(guard, command.as_bytes()) {
            Ok(_) => Ok(()),
            Err(errno) => {
                let word = command.split(' ').next().unwrap_or(command);
                Err(Error::system(errno as i32, format!("{DEVICE_PATH}, command `{word}`")))
            }
        }
    }
}

fn refused(error: &std::io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EBUSY) => Error::Busy(format!(
            "{DEVICE_PATH} is in use by another process (cachefilesd? another daemon?); \
             `sluice doctor` names it"
        )),
        Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => Error::NotFound(format!(
            "{DEVICE_PATH} is not there: load the module with `modprobe cachefiles`, or boot a \
             kernel 5.19 to 7.1 that has it; `sluice doctor` tells what is missing"
        )),
        Some(libc::EACCES | libc::EPERM) => {
            Error::Denied(format!("{DEVICE_PATH} may be opened by root only (CAP_SYS_ADMIN)"))
        }
        _ => Error::io(error, DEVICE_PATH),
    }
}
