//! A kernel of one's own: the far end of the device, in this process.
//!
//! Speaks the messages of /dev/cachefiles over a socket, keeps objects in real files that the
//! daemon fills with direct I/O, and reads like EROFS over fscache: what is a hole is asked for,
//! and what is still a hole after the answer is EIO. Unlike the real kernel it is fast, and can be
//! rude.

use std::collections::{HashMap, HashSet};
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

pub struct Kernel {
    inner: Arc<Inner>,
    pub reads: AtomicU64,
    listener: Option<JoinHandle<()>>,
}

/// What the listener shares.
struct Inner {
    socket: OwnedFd,
    cache: PathBuf,
    requests: Mutex<Requests>,
    next_message: AtomicU32,
    next_object: AtomicU32,
    /// Opens of objects a dead daemon had open that its successor answered with an error: the real
    /// kernel asks again and again, this one stops after `REFUSALS_MAX`.
    refusals: AtomicU32,
}

#[derive(Default)]
struct Requests {
    waiting: HashMap<u32, Request>,
    /// Objects by the number they were first opened under.
    objects: HashMap<u32, Open>,
    is_lingering: bool,
    /// Requests that were sent again: they may be answered by more than one daemon.
    asked_twice: HashSet<u32>,
}

struct Request {
    answer: Option<Sender<i64>>,
    opcode: u32,
    object: u32,
    /// The number it was last sent under.
    current: u32,
    payload: Vec<u8>,
}

struct Open {
    domain: String,
    cookie: String,
    /// The number messages use now; none while no daemon has it open.
    current: Option<u32>,
}

pub const REFUSALS_MAX: u32 = 20;

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
        let inner = Arc::new(Inner {
            socket: ours,
            cache: cache.to_owned(),
            requests: Mutex::default(),
            next_message: AtomicU32::new(1),
            next_object: AtomicU32::new(1),
            refusals: AtomicU32::new(0),
        });
        let listening = Arc::clone(&inner);
        let listener = Some(std::thread::spawn(move || listening.listen()));
        (Kernel { inner, reads: AtomicU64::new(0), listener }, device)
    }

    /// Looks a cookie up; the error is the errno the daemon answered.
    pub fn open(&self, domain: &str, cookie: &str) -> Result<Object, i32> {
        let id = self.inner.next_object.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = channel();
        let (domain_key, cookie_key) = (domain.to_owned(), cookie.to_owned());
        let open = Open { domain: domain_key, cookie: cookie_key, current: Some(id) };
        self.inner.requests().objects.insert(id, open);
        self.inner.ask_open(domain, cookie, id, id, Some(sender));
        let size = receiver.recv_timeout(PATIENCE).expect("an open is answered");
        if size < 0 {
            self.inner.requests().objects.remove(&id);
            return Err(-size as i32);
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(nix::libc::O_DIRECT);
        let file = options.open(self.inner.path(domain, cookie)).expect("the same file");
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
        let (sender, receiver) = channel();
        self.inner.ask_read(object.id, payload, sender);
        receiver
    }

    /// Closes an object. Readers of it have been answered by the real kernel before this.
    pub fn close(&self, object: &Object) {
        let open = self.inner.requests().objects.remove(&object.id);
        if let Some(current) = open.and_then(|open| open.current) {
            self.send(&message(0, 1, current, &[]));
        }
    }

    /// Says anything at all.
    pub fn send(&self, bytes: &[u8]) {
        self.inner.send(bytes);
    }

    /// Empties what the cache has of a cookie.
    pub fn lose(&self, domain: &str, cookie: &str) {
        let path = self.inner.path(domain, cookie);
        let file = OpenOptions::new().write(true).open(path).expect("the object's file");
        let size = file.metadata().expect("its size").len();
        file.set_len(0).expect("it can be emptied");
        file.set_len(size).expect("it can grow");
    }

    /// Requests nobody has answered.
    pub fn unanswered(&self) -> usize {
        self.inner.requests().waiting.len()
    }

    /// Ends every request that waits, as the real kernel does when the device is closed.
    pub fn fail_all(&self) {
        self.inner.requests().waiting.clear();
    }

    /// The daemon's files of objects are closed, the device is not: somebody holds it.
    pub fn lose_daemon(&self) {
        let mut requests = self.inner.requests();
        if !requests.is_lingering {
            requests.objects.values_mut().for_each(|open| open.current = None);
        }
    }

    /// A dead daemon's files stay open until `end_lingering`.
    pub fn linger(&self) {
        self.inner.requests().is_lingering = true;
    }

    /// They are closed now.
    pub fn end_lingering(&self) {
        self.inner.requests().is_lingering = false;
        self.lose_daemon();
    }

    /// The daemon has closed its file of an object by itself.
    pub fn lose_file(&self, object: &Object) {
        if let Some(open) = self.inner.requests().objects.get_mut(&object.id) {
            open.current = None;
        }
    }

    /// Answers to opens with which the real kernel would go round in circles.
    pub fn refusals(&self) -> u32 {
        self.inner.refusals.load(Ordering::Relaxed)
    }
}

impl Inner {
    fn requests(&self) -> std::sync::MutexGuard<'_, Requests> {
        self.requests.lock().expect("no test panics with it")
    }

    fn path(&self, domain: &str, cookie: &str) -> PathBuf {
        self.cache.join(format!("{domain}_{cookie}"))
    }

    fn send(&self, bytes: &[u8]) {
        send(self.socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL).expect("the daemon listens");
    }

    fn ask(&self, request: Request) {
        let id = self.next_message.fetch_add(1, Ordering::Relaxed);
        let bytes = message(id, request.opcode, request.current, &request.payload);
        self.requests().waiting.insert(id, request);
        self.send(&bytes);
    }

    /// Asks for `object` under the number `current`, with a new file of the daemon's.
    fn ask_open(
        &self,
        domain: &str,
        cookie: &str,
        object: u32,
        current: u32,
        answer: Option<Sender<i64>>,
    ) {
        let direct = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .custom_flags(nix::libc::O_DIRECT)
            .open(self.path(domain, cookie))
            .expect("an object's file");
        let volume = format!("erofs,{domain}\0");
        let mut payload = Vec::new();
        let fd = direct.into_raw_fd();
        for field in [volume.len() as u32, cookie.len() as u32, fd as u32, 0] {
            payload.extend(field.to_ne_bytes());
        }
        payload.extend(volume.as_bytes());
        payload.extend(cookie.as_bytes());
        self.ask(Request { answer, opcode: 0, object, current, payload });
    }

    /// A read of an object that no daemon has open waits until one has.
    fn ask_read(&self, object: u32, payload: Vec<u8>, sender: Sender<i64>) {
        let current = self.requests().objects.get(&object).and_then(|open| open.current);
        let (answer, opcode) = (Some(sender), 2);
        let request = Request { answer, opcode, object, current: current.unwrap_or(0), payload };
        match current {
            Some(_) => self.ask(request),
            None => {
                let id = self.next_message.fetch_add(1, Ordering::Relaxed);
                self.requests().waiting.insert(id, request);
                self.reopen(object, None);
            }
        }
    }

    fn reopen(&self, object: u32, answer: Option<Sender<i64>>) {
        let current = self.next_object.fetch_add(1, Ordering::Relaxed);
        let requests = self.requests();
        let Some(open) = requests.objects.get(&object) else { return };
        let (domain, cookie) = (open.domain.clone(), open.cookie.clone());
        let is_under_way =
            requests.waiting.values().any(|it| it.opcode == 0 && it.object == object);
        drop(requests);
        if !is_under_way {
            self.ask_open(&domain, &cookie, object, current, answer);
        }
    }

    /// Everything that waits becomes new again: reads under their numbers, opens with new files.
    fn restore(&self) {
        let (mut objects, mut opens) = (Vec::new(), Vec::new());
        let mut requests = self.requests();
        let ids: Vec<u32> = requests.waiting.keys().copied().collect();
        for id in ids {
            requests.asked_twice.insert(id);
            let request = &requests.waiting[&id];
            let current = requests.objects.get(&request.object).and_then(|open| open.current);
            match current {
                _ if request.opcode == 0 => opens.extend(requests.waiting.remove(&id)),
                Some(current) => self.send(&message(id, request.opcode, current, &request.payload)),
                None => objects.push(request.object),
            }
        }
        drop(requests);
        for open in opens {
            self.reopen(open.object, open.answer);
        }
        objects.sort_unstable();
        objects.dedup();
        objects.into_iter().for_each(|object| self.reopen(object, None));
    }

    /// A daemon has answered an open: somebody's first one, or that of an object a daemon before it
    /// had open, which the kernel asks for until it is answered with success.
    fn reopened(&self, object: u32, current: u32, size: i64, waiter: Option<Sender<i64>>) {
        if size < 0 && waiter.is_none() {
            if self.refusals.fetch_add(1, Ordering::Relaxed) < REFUSALS_MAX {
                self.reopen(object, None);
            }
            return;
        }
        let mut requests = self.requests();
        if let Some(open) = requests.objects.get_mut(&object) {
            open.current = Some(current);
        }
        let Requests { waiting, asked_twice, .. } = &mut *requests;
        let is_read = |it: &Request| it.object == object && it.opcode == 2;
        for (&id, request) in waiting.iter().filter(|(_, it)| is_read(it)) {
            // It may be on its way already.
            asked_twice.insert(id);
            self.send(&message(id, request.opcode, current, &request.payload));
        }
        drop(requests);
        // Last: a read that the waiter asks for from here on must not be sent twice.
        if let Some(waiter) = waiter {
            let _ = waiter.send(size);
        }
    }

    fn listen(&self) {
        let mut bytes = [0; 256];
        loop {
            let size = match recv(self.socket.as_raw_fd(), &mut bytes, MsgFlags::empty()) {
                Ok(0) => break,
                Ok(size) => size,
                Err(nix::errno::Errno::EINTR) => continue,
                Err(_) => break,
            };
            if &bytes[..size] == b"restore" {
                self.restore();
            }
            let Some((id, answer)) = parse_answer(&bytes[..size]) else { continue };
            let mut requests = self.requests();
            let (request, is_twice) =
                (requests.waiting.remove(&id), requests.asked_twice.contains(&id));
            drop(requests);
            match request {
                Some(Request { opcode: 0, object, current, answer: waiter, .. }) => {
                    self.reopened(object, current, answer, waiter);
                }
                Some(request) => {
                    let _ = request.answer.map(|waiter| waiter.send(answer));
                }
                // Answered twice: a bug the tests must see, unless it was asked twice.
                None => assert!(id >= UNTRACKED || is_twice, "request {id} was answered twice"),
            }
        }
        self.requests().waiting.clear();
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        let how = nix::sys::socket::Shutdown::Both;
        let _ = nix::sys::socket::shutdown(self.inner.socket.as_raw_fd(), how);
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
