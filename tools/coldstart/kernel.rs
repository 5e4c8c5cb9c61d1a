//! The kernel's side of the emulated /dev/cachefiles, for a daemon that runs as its own process.
//!
//! The daemon's end is `device.c`. Objects are sparse files that are written with direct I/O, as
//! behind the real device. A read does what EROFS over fscache does: it looks for a hole, asks the
//! daemon for it, waits, looks again, and is refused (EIO) when the hole is still there. Request
//! numbers are dealt out so that number modulo readers is the reader: the answer wakes that reader
//! directly, in the daemon's own thread, as the kernel's completion does.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, Error, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, bind, listen,
    recv, send, sendmsg, setsockopt, socket, sockopt,
};
use nix::unistd::{Whence, lseek64};

/// A request that is not answered by then has been forgotten.
const PATIENCE_MS: u16 = 60_000;
/// The shim takes no more event files.
pub const READERS_MAX: usize = 128;
const OPCODE_OPEN: u32 = 0;
const OPCODE_READ: u32 = 2;
/// Room for the messages of all readers, so that sending never waits.
const SOCKET_BUFFER_BYTES: usize = 1 << 20;

/// A device that waits for its daemon.
pub struct Listener {
    socket: OwnedFd,
    folder: PathBuf,
    readers: Vec<EventFd>,
}

/// A device that a daemon has opened.
pub struct Kernel {
    socket: Arc<OwnedFd>,
    folder: PathBuf,
    readers: Vec<EventFd>,
    /// The next request of each reader, before it is made a number.
    turns: Vec<AtomicU32>,
    next_object: AtomicU32,
    opening: Opening,
    hearing: Option<JoinHandle<()>>,
    reads: AtomicU64,
}

type Opening = Arc<Mutex<HashMap<u32, Sender<i64>>>>;

/// A cookie that is open.
pub struct Object {
    id: u32,
    /// As the daemon said.
    pub size: u64,
    /// The cache file, for looking at.
    pub file: File,
}

impl Listener {
    /// Makes the socket `EMULATED_KERNEL` names; objects will be files in `folder`.
    pub fn new(path: &Path, folder: &Path, readers: usize) -> io::Result<Self> {
        assert!(readers < READERS_MAX, "one event file is for opens");
        let socket =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
        listen(&socket, Backlog::new(1)?)?;
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let readers = (0..=readers)
            .map(|_| EventFd::from_value_and_flags(0, flags))
            .collect::<nix::Result<Vec<_>>>()?;
        std::fs::create_dir_all(folder)?;
        Ok(Listener { socket, folder: folder.to_owned(), readers })
    }

    /// Waits until the daemon opens the device.
    pub fn accept(self) -> io::Result<Kernel> {
        wait_readable(self.socket.as_fd(), "the daemon did not open /dev/cachefiles")?;
        // What it accepts speaks in packets, not in a stream; only its number is of interest.
        let socket: OwnedFd = UnixListener::from(self.socket).accept()?.0.into();
        setsockopt(&socket, sockopt::SndBuf, &SOCKET_BUFFER_BYTES)?;
        let files: Vec<RawFd> = self.readers.iter().map(|event| event.as_raw_fd()).collect();
        send_with(&socket, b"hello", &files)?;
        let (socket, opening) = (Arc::new(socket), Opening::default());
        let (heard, answers) = (Arc::clone(&socket), Arc::clone(&opening));
        let hearing = std::thread::spawn(move || hear(&heard, &answers));
        Ok(Kernel {
            socket,
            folder: self.folder,
            turns: self.readers.iter().map(|_| AtomicU32::new(1)).collect(),
            readers: self.readers,
            next_object: AtomicU32::new(1),
            opening,
            hearing: Some(hearing),
            reads: AtomicU64::new(0),
        })
    }
}

impl Kernel {
    /// Looks a cookie up.
    ///
    /// # Errors
    /// The daemon's refusal, as its errno.
    pub fn open(&self, domain: &str, cookie: &str) -> io::Result<Object> {
        let path = self.folder.join(format!("{domain}+{cookie}"));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path)?;
        let direct = options.custom_flags(nix::libc::O_DIRECT).open(&path)?;
        let id = self.next_object.fetch_add(1, Ordering::Relaxed);
        let volume = format!("erofs,{domain}\0");
        let mut payload = Vec::new();
        // The shim puts the file's number in place of the zero.
        for field in [volume.len() as u32, cookie.len() as u32, 0, 0] {
            payload.extend(field.to_ne_bytes());
        }
        payload.extend(volume.as_bytes());
        payload.extend(cookie.as_bytes());
        let number = self.number(self.readers.len() - 1);
        let (sender, answer) = channel();
        self.opening.lock().unwrap_or_else(PoisonError::into_inner).insert(number, sender);
        let bytes = message(number, OPCODE_OPEN, id, &payload);
        send_with(&self.socket, &bytes, &[direct.as_raw_fd()])?;
        let answered = answer.recv_timeout(Duration::from_millis(PATIENCE_MS.into()));
        let size = answered.map_err(|_| Error::other(format!("open {cookie}: no answer")))?;
        if size < 0 {
            return Err(Error::from_raw_os_error(-size as i32));
        }
        file.set_len((size as u64).next_multiple_of(4096))?;
        Ok(Object { id, size: size as u64, file })
    }

    /// Makes the range present, as a reader's page faults do. True when it had to be asked for,
    /// an error of kind `InvalidData` when it is refused.
    pub fn read(&self, reader: usize, object: &Object, range: Range<u64>) -> io::Result<bool> {
        let mut at = range.start / 4096 * 4096;
        let end = range.end.next_multiple_of(4096).min(object.size.next_multiple_of(4096));
        let mut has_asked = false;
        while at < end {
            let data = next_data(&object.file, at, end)?;
            if data == at {
                at = next_hole(&object.file, at, end)?;
                continue;
            }
            self.ask(reader, object, at..data)?;
            has_asked = true;
            if next_data(&object.file, at, end)? != at {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        Ok(has_asked)
    }

    /// Sends a READ and waits for its answer.
    fn ask(&self, reader: usize, object: &Object, range: Range<u64>) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let mut payload = [0; 16];
        payload[..8].copy_from_slice(&range.start.to_ne_bytes());
        payload[8..].copy_from_slice(&(range.end - range.start).to_ne_bytes());
        let bytes = message(self.number(reader), OPCODE_READ, object.id, &payload);
        send(self.socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?;
        let event = &self.readers[reader];
        wait_readable(event.as_fd(), "a read is not answered")?;
        match event.read()? {
            1 => Ok(()),
            count => Err(Error::other(format!("a read was answered {count} times"))),
        }
    }

    /// READs sent so far.
    pub fn reads(&self) -> u64 {
        self.reads.load(Ordering::Relaxed)
    }

    /// Lets a reader go that waits for an answer; what is answered later is not looked at.
    pub fn give_up(&self, reader: usize) {
        // Fails only when the counter overflows.
        let _ = self.readers[reader].write(1);
    }

    /// A number nobody uses that belongs to a reader.
    fn number(&self, reader: usize) -> u32 {
        let turn = self.turns[reader].fetch_add(1, Ordering::Relaxed);
        turn * self.readers.len() as u32 + reader as u32
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        use nix::sys::socket::{Shutdown, shutdown};
        // The daemon has gone already, or finds its device closed.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        if let Some(hearing) = self.hearing.take() {
            let _ = hearing.join();
        }
    }
}

/// A message in the device's layout.
fn message(id: u32, opcode: u32, object: u32, payload: &[u8]) -> Vec<u8> {
    let length = 16 + payload.len() as u32;
    let mut bytes = Vec::with_capacity(length as usize);
    for field in [id, opcode, length, object] {
        bytes.extend(field.to_ne_bytes());
    }
    bytes.extend(payload);
    bytes
}

fn send_with(socket: &OwnedFd, bytes: &[u8], files: &[RawFd]) -> io::Result<()> {
    let rights = [ControlMessage::ScmRights(files)];
    let pieces = [IoSlice::new(bytes)];
    sendmsg::<()>(socket.as_raw_fd(), &pieces, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Listens to what the daemon writes to the device: answers to OPENs, and commands, which succeed.
fn hear(socket: &OwnedFd, opening: &Opening) {
    let mut bytes = [0; 4096];
    while let Ok(size) = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
        if size == 0 {
            break;
        }
        let answer = std::str::from_utf8(&bytes[..size]).ok().and_then(parse_copen);
        if let Some((id, size)) = answer {
            let sender = opening.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            // Nobody waits for an answer given twice; the measurement goes on without it.
            let _ = sender.map(|sender| sender.send(size));
        }
    }
    opening.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

fn parse_copen(text: &str) -> Option<(u32, i64)> {
    let (id, size) = text.trim_end_matches(['\n', '\0']).strip_prefix("copen ")?.split_once(',')?;
    Some((id.parse().ok()?, size.parse().ok()?))
}

fn wait_readable(file: std::os::fd::BorrowedFd<'_>, otherwise: &str) -> io::Result<()> {
    let mut polled = [PollFd::new(file, PollFlags::POLLIN)];
    match poll(&mut polled, PollTimeout::from(PATIENCE_MS)) {
        Ok(0) => Err(Error::other(otherwise.to_owned())),
        Ok(_) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// The next data at or after `from`, or `end`.
pub fn next_data(file: &File, from: u64, end: u64) -> io::Result<u64> {
    match lseek64(file.as_fd(), from as i64, Whence::SeekData) {
        Ok(at) => Ok((at as u64).min(end)),
        Err(nix::errno::Errno::ENXIO) => Ok(end),
        Err(errno) => Err(errno.into()),
    }
}

/// The next hole at or after `from`, or `end`.
pub fn next_hole(file: &File, from: u64, end: u64) -> io::Result<u64> {
    match lseek64(file.as_fd(), from as i64, Whence::SeekHole) {
        Ok(at) => Ok((at as u64).min(end)),
        Err(nix::errno::Errno::ENXIO) => Ok(end),
        Err(errno) => Err(errno.into()),
    }
}
