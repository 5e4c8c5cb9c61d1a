//! A kernel of one's own: the far end of the device, in this process.
//!
//! Speaks the messages of /dev/cachefiles over a socket, keeps objects in real files that the
//! daemon fills with direct I/O, and reads like EROFS over fscache: what is a hole is asked for,
//! and what is still a hole after the answer is EIO. Unlike the real kernel it is fast, and can be
//! rude.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::unistd::{Whence, lseek64};

/// Longer than any deadline a test sets: a reader that waits this long hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Messages from this number on are a test's own; nobody waits for their answers.
pub const UNTRACKED: u32 = 900_000;

type Waiting = Arc<Mutex<HashMap<u32, Sender<i64>>>>;

pub struct Kernel {
    socket: Arc<OwnedFd>,
    cache: PathBuf,
    waiting: Waiting,
    next_message: AtomicU32,
    next_object: AtomicU32,
    pub reads: AtomicU64,
    listener: Option<JoinHandle<()>>,
}

/// A cookie that is open.
pub struct Object {
    pub id: u32,
    pub size: u64,
    file: File,
}

impl Kernel {
    /// A kernel with its cache in a folder, and the device for the daemon.
    pub fn new(cache: &Path) -> (Kernel, OwnedFd) {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, device) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
            .expect("a socket pair");
        let nonblocking = nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK);
        nix::fcntl::fcntl(device.as_fd(), nonblocking).expect("a socket can be non-blocking");
        let (socket, waiting) = (Arc::new(ours), Waiting::default());
        let (heard, answers) = (Arc::clone(&socket), Arc::clone(&waiting));
        let listener = std::thread::spawn(move || listen(&heard, &answers));
        let kernel = Kernel {
            socket,
            cache: cache.to_owned(),
            waiting,
            next_message: AtomicU32::new(1),
            next_object: AtomicU32::new(1),
            reads: AtomicU64::new(0),
            listener: Some(listener),
        };
        (kernel, device)
    }

    /// Looks a cookie up; the error is the errno the daemon answered.
    pub fn open(&self, domain: &str, cookie: &str) -> Result<Object, i32> {
        let path = self.cache.join(format!("{domain}_{cookie}"));
        let direct = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(nix::libc::O_DIRECT)
            .open(&path)
            .expect("an object's file");
        let id = self.next_object.fetch_add(1, Ordering::Relaxed);
        let volume = format!("erofs,{domain}\0");
        let mut payload = Vec::new();
        let fd = direct.into_raw_fd();
        for field in [volume.len() as u32, cookie.len() as u32, fd as u32, 0] {
            payload.extend(field.to_ne_bytes());
        }
        payload.extend(volume.as_bytes());
        payload.extend(cookie.as_bytes());
        let size = self.ask(0, id, &payload).recv_timeout(PATIENCE).expect("an open is answered");
        if size < 0 {
            return Err(-size as i32);
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(nix::libc::O_DIRECT);
        let file = options.open(&path).expect("the same file");
        if file.metadata().expect("its size").len() < size as u64 {
            file.set_len((size as u64).next_multiple_of(4096)).expect("it can grow");
        }
        Ok(Object { id, size: size as u64, file })
    }

    /// Reads like a process on the mounted file system.
    pub fn read(&self, object: &Object, range: Range<u64>) -> Result<Vec<u8>, i32> {
        let pages = range.start / 4096 * 4096..range.end.next_multiple_of(4096);
        if let Some(hole) = hole_in(&object.file, &pages) {
            let answer = self.ask_read(object, hole.start..pages.end);
            match answer.recv_timeout(PATIENCE) {
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => panic!("a reader hangs"),
                Err(RecvTimeoutError::Disconnected) => return Err(nix::libc::EIO),
            }
            if hole_in(&object.file, &pages).is_some() {
                return Err(nix::libc::EIO);
            }
        }
        Ok(read_direct(&object.file, &pages, &range))
    }

    /// Sends a READ; the channel gets the answer, or breaks when the daemon is gone.
    pub fn ask_read(&self, object: &Object, range: Range<u64>) -> Receiver<i64> {
        self.reads.fetch_add(1, Ordering::Relaxed);
        let mut payload = range.start.to_ne_bytes().to_vec();
        payload.extend((range.end - range.start).to_ne_bytes());
        self.ask(2, object.id, &payload)
    }

    /// Closes an object. Readers of it have been answered by the real kernel before this.
    pub fn close(&self, object: &Object) {
        self.send(&message(0, 1, object.id, &[]));
    }

    /// Says anything at all.
    pub fn send(&self, bytes: &[u8]) {
        send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).expect("the daemon listens");
    }

    /// Empties what the cache has of a cookie.
    pub fn lose(&self, domain: &str, cookie: &str) {
        let path = self.cache.join(format!("{domain}_{cookie}"));
        let file = OpenOptions::new().write(true).open(path).expect("the object's file");
        let size = file.metadata().expect("its size").len();
        file.set_len(0).expect("it can be emptied");
        file.set_len(size).expect("it can grow");
    }

    /// Requests nobody has answered.
    pub fn unanswered(&self) -> usize {
        self.waiting.lock().expect("no test panics with it").len()
    }

    /// Ends every request that waits, as the real kernel does when the device is closed.
    pub fn fail_all(&self) {
        self.waiting.lock().expect("no test panics with it").clear();
    }

    fn ask(&self, opcode: u32, object: u32, payload: &[u8]) -> Receiver<i64> {
        let id = self.next_message.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = channel();
        self.waiting.lock().expect("no test panics with it").insert(id, sender);
        self.send(&message(id, opcode, object, payload));
        receiver
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let _ =
            nix::sys::socket::shutdown(self.socket.as_raw_fd(), nix::sys::socket::Shutdown::Both);
        if let Some(listener) = self.listener.take() {
            let _ = listener.join();
        }
    }
}

/// A message in the device's layout.
pub fn message(id: u32, opcode: u32, object: u32, payload: &[u8]) -> Vec<u8> {
    let length = 16 + payload.len() as u32;
    let mut bytes = Vec::new();
    for field in [id, opcode, length, object] {
        bytes.extend(field.to_ne_bytes());
    }
    bytes.extend(payload);
    bytes
}

fn listen(socket: &OwnedFd, waiting: &Waiting) {
    let mut bytes = [0; 256];
    loop {
        let size = match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
            Ok(0) => break,
            Ok(size) => size,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(_) => break,
        };
        let Some((id, answer)) = parse_answer(&bytes[..size]) else { continue };
        let sender = waiting.lock().expect("no test panics with it").remove(&id);
        // Answered twice: a bug the tests must see.
        match sender {
            Some(sender) => drop(sender.send(answer)),
            None => assert!(id >= UNTRACKED, "request {id} was answered twice"),
        }
    }
    waiting.lock().expect("no test panics with it").clear();
}

fn parse_answer(bytes: &[u8]) -> Option<(u32, i64)> {
    if let Some(rest) = bytes.strip_prefix(b"cread ") {
        return Some((u32::from_ne_bytes(rest[..4].try_into().ok()?), 0));
    }
    let text = std::str::from_utf8(bytes).ok()?.strip_prefix("copen ")?;
    let (id, answer) = text.split_once(',')?;
    Some((id.parse().ok()?, answer.parse().ok()?))
}

fn hole_in(file: &File, range: &Range<u64>) -> Option<Range<u64>> {
    let size = file.metadata().expect("its size").len();
    let end = range.end.min(size);
    if range.start >= end {
        return None;
    }
    match lseek64(file.as_fd(), range.start as i64, Whence::SeekHole) {
        Ok(hole) if (hole as u64) < end => Some(hole as u64..end),
        _ => None,
    }
}

/// Past the page cache, as fscache reads: fills are direct, and a cached page of a hole would be
/// old.
fn read_direct(file: &File, pages: &Range<u64>, range: &Range<u64>) -> Vec<u8> {
    let mut buffer = vec![0u8; (pages.end - pages.start) as usize + 4096];
    let aligned = buffer.as_ptr().align_offset(4096);
    let space = &mut buffer[aligned..aligned + (pages.end - pages.start) as usize];
    file.read_exact_at(space, pages.start).expect("data below the size");
    let skip = (range.start - pages.start) as usize;
    space[skip..skip + (range.end - range.start) as usize].to_vec()
}

/// A file number for the daemon to own, and the end that tells when it has been closed.
pub fn watched_fd() -> (i32, OwnedFd) {
    let (watch, given) = nix::unistd::pipe().expect("a pipe");
    (given.into_raw_fd(), watch)
}

/// Whether the other end is closed; waits for it within a test's patience.
pub fn is_closed(watch: &OwnedFd) -> bool {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
    let mut polled = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(PATIENCE).expect("a minute fits");
    poll(&mut polled, patience) == Ok(1)
}
