//! What a reader that waits needs when the daemon is killed: the event that was read and not yet
//! answered.
//!
//! An event is answered by the number of the file that came with it, and what it is about only that
//! file tells; both are gone with the process that read it, and its reader would wait for ever (or
//! until the group is closed). So a second process, the *witness*, shares the daemon's table of
//! open files from the start and does nothing. When the daemon has ended, however it did, the
//! witness closes everything but the files of events, and hands those to the next daemon under
//! their old numbers; there they are before anything else is opened, so no new event can be given
//! the number of one that waits. If no daemon comes in time it ends, and the readers get EIO with
//! the end of the group, which the keeper holds.
//!
//! Whatever goes wrong here costs a reader an error, never a wrong byte: an event that is let go
//! unserved lets its reader read what the file holds.

use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr,
    connect, recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

use super::sys;
use super::worker::serve_event;
use crate::blob::journal::{Journal, Level};
use crate::config::{Config, WITNESS_ANSWER_WAIT_MS, WITNESS_FILES_PER_MESSAGE};
use crate::engine::mesh::Sender;
use crate::error::{Error, Result};
use crate::upcall::watch::WatchMail;

/// Sockets of witnesses in the state directory: this and the daemon's number.
const SOCKET_PREFIX: &str = "witness-";

/// What dead daemons had read and not answered.
#[derive(Debug, Default)]
pub struct Bequest {
    /// The files, and the numbers they had there: those they have here, where they are free.
    pub events: Vec<(OwnedFd, RawFd)>,
}

/// Starts a witness for this process. To be called while there is one thread and nothing but the
/// standard files is open.
///
/// # Errors
/// What the system says; without a witness a kill costs readers that wait an error.
pub fn start(config: &Config) -> Result<()> {
    let listener = listen(&config.state_dir)?;
    let watched = sys::watch(nix::unistd::Pid::this())
        .map_err(|errno| Error::system(errno as i32, "cannot watch this process"))?;
    match sys::split() {
        Ok(Some(_)) => {
            // They stay open in the table, under the witness's hand.
            std::mem::forget((listener, watched));
            Ok(())
        }
        Ok(None) => {
            let _ = attend(config, &listener, watched.as_fd());
            std::process::exit(0)
        }
        Err(errno) => Err(Error::system(errno as i32, "cannot start a witness")),
    }
}

/// Takes what witnesses of dead daemons have at a state directory. To be called before anything
/// else is opened; a daemon that was started before the other ended finds some numbers taken, by
/// files of its own, so that no new event gets them.
pub fn collect(state_dir: &Path) -> Bequest {
    let own = format!("{SOCKET_PREFIX}{}.sock", std::process::id());
    let mut bequest = Bequest::default();
    for path in sockets(state_dir).filter(|path| !path.ends_with(&own)) {
        match ask(&path) {
            Ok(files) => bequest.events.extend(files),
            // Left by a witness that was killed, too.
            Err(Error::System { errno: libc::ECONNREFUSED, .. }) => {
                let _ = std::fs::remove_file(&path);
            }
            // Its daemon lives: it has nothing to give.
            Err(_) => {}
        }
    }
    bequest.renumber();
    bequest
}

impl Bequest {
    /// Has the cores serve the readers that waited.
    pub fn serve(self, watches: &[Sender<WatchMail>], journal: &Journal) {
        let count = self.events.len();
        for (file, number) in self.events {
            serve_event(watches, file, number);
        }
        if count > 0 {
            journal.write(Level::Info, || format!("{count} readers of a former daemon are served"));
        }
    }

    /// Gives every file the number it had, where that is free. They came under low ones, which
    /// others of them may need.
    fn renumber(&mut self) {
        let highest = self.events.iter().map(|(_, number)| *number).max().unwrap_or(0);
        // Two witnesses may have the same event: then it is the same file, too.
        let mut lifted = BTreeMap::new();
        for (file, number) in std::mem::take(&mut self.events) {
            let above = nix::fcntl::F_DUPFD_CLOEXEC(highest + 1);
            if let Ok(copy) = nix::fcntl::fcntl(&file, above) {
                lifted.insert(number, sys::inherit(copy));
            }
        }
        for (number, file) in lifted {
            let placed = match sys::is_open(number) {
                true => Ok(file),
                false => sys::renumber(file, number),
            };
            self.events.extend(placed.ok().map(|file| (file, number)));
        }
    }
}

/// The witness's life.
fn attend(config: &Config, listener: &UnixListener, daemon: BorrowedFd<'_>) -> Result<()> {
    let _ = nix::unistd::setsid();
    let _ = nix::sys::prctl::set_name(c"sluice-witness");
    let _ = nix::sys::signal::SigSet::empty().thread_set_mask();
    let _ = std::env::set_current_dir("/");
    while wait(daemon, None)? == 0 {}
    let door = config.cache_dir.canonicalize().unwrap_or_else(|_| config.cache_dir.clone());
    let events = keep_events(&door.join("door"), [listener.as_raw_fd(), daemon.as_raw_fd()]);
    let socket = listener.local_addr().ok().and_then(|it| Some(it.as_pathname()?.to_owned()));
    if !events.is_empty() {
        let until = Instant::now() + Duration::from_secs(config.keep_s);
        serve(listener, &events, until)?;
    }
    if let Some(path) = socket {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Closes everything in the table but the files of events and `mine`.
fn keep_events(door: &Path, mine: [RawFd; 2]) -> Vec<(OwnedFd, RawFd)> {
    let mut events = Vec::new();
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return events };
    let open: Vec<(RawFd, Option<PathBuf>)> = entries
        .flatten()
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            Some((number, std::fs::read_link(entry.path()).ok()))
        })
        .collect();
    for (number, path) in open {
        // The list's own file is among them, and closed by now.
        let is_theirs = !mine.contains(&number) && sys::is_open(number);
        let Some(path) = path.filter(|_| is_theirs) else { continue };
        let file = sys::inherit(number);
        if path.starts_with(door) && path != door {
            events.push((file, number));
        }
    }
    events
}

/// Hands the events to whoever comes before `until`.
fn serve(listener: &UnixListener, events: &[(OwnedFd, RawFd)], until: Instant) -> Result<()> {
    while Instant::now() < until {
        if wait(listener.as_fd(), Some(until))? == 0 {
            return Ok(());
        }
        let Ok((stream, _)) = listener.accept() else { continue };
        let sent = events.chunks(WITNESS_FILES_PER_MESSAGE).try_for_each(|part| {
            let numbers: Vec<String> = part.iter().map(|(_, number)| number.to_string()).collect();
            send(stream.as_fd(), &numbers.join(" "), part)
        });
        let sent = sent.and_then(|()| send(stream.as_fd(), "end", &[]));
        // Taken is what was acknowledged; a daemon that died over it has a witness, too.
        let mut word = [0; 8];
        let acknowledged = sent.is_ok()
            && wait(stream.as_fd(), Some(until))? > 0
            && std::io::Read::read(&mut &stream, &mut word).is_ok_and(|size| size > 0);
        if acknowledged {
            return Ok(());
        }
    }
    Ok(())
}

/// Everything that the witness at `path` has.
fn ask(path: &Path) -> Result<Vec<(OwnedFd, RawFd)>> {
    let failed = |errno: nix::Error| Error::system(errno as i32, path.display().to_string());
    let (family, kind, flags) = (AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
    let stream = socket(family, kind, flags, None).map_err(failed)?;
    let patience = TimeVal::milliseconds(WITNESS_ANSWER_WAIT_MS);
    setsockopt(&stream, sockopt::ReceiveTimeout, &patience).map_err(failed)?;
    connect(stream.as_raw_fd(), &UnixAddr::new(path).map_err(failed)?).map_err(failed)?;
    let mut events = Vec::new();
    loop {
        let (text, files) = receive(stream.as_fd()).map_err(failed)?;
        if text == "end" {
            break;
        }
        let numbers = text.split(' ').filter_map(|number| number.parse().ok());
        events.extend(files.into_iter().zip(numbers));
        if text.is_empty() {
            return Err(Error::unavailable("the witness has ended"));
        }
    }
    let _ = nix::unistd::write(&stream, b"taken");
    Ok(events)
}

fn send(stream: BorrowedFd<'_>, text: &str, files: &[(OwnedFd, RawFd)]) -> Result<()> {
    let numbers: Vec<RawFd> = files.iter().map(|(file, _)| file.as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[] } else { &rights[..] };
    let bytes = [IoSlice::new(text.as_bytes())];
    let sent = sendmsg::<()>(stream.as_raw_fd(), &bytes, control, MsgFlags::MSG_NOSIGNAL, None);
    sent.map(drop).map_err(|errno| Error::system(errno as i32, "cannot hand events over"))
}

fn receive(stream: BorrowedFd<'_>) -> nix::Result<(String, Vec<OwnedFd>)> {
    let mut bytes = [0; 16 * WITNESS_FILES_PER_MESSAGE];
    let mut control = nix::cmsg_space!([RawFd; WITNESS_FILES_PER_MESSAGE]);
    let mut space = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream.as_raw_fd(), &mut space, Some(&mut control), flags)?;
    let size = message.bytes;
    let mut files = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            files.extend(numbers.into_iter().map(sys::inherit));
        }
    }
    Ok((String::from_utf8_lossy(&bytes[..size]).into_owned(), files))
}

fn listen(state_dir: &Path) -> Result<UnixListener> {
    let path = state_dir.join(format!("{SOCKET_PREFIX}{}.sock", std::process::id()));
    let failed = |errno: nix::Error| Error::system(errno as i32, path.display().to_string());
    std::fs::create_dir_all(state_dir)
        .map_err(|error| Error::io(&error, state_dir.display().to_string()))?;
    let _ = std::fs::remove_file(&path);
    let (family, kind, flags) = (AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC);
    let listener = socket(family, kind, flags, None).map_err(failed)?;
    let address = UnixAddr::new(&path).map_err(failed)?;
    nix::sys::socket::bind(listener.as_raw_fd(), &address).map_err(failed)?;
    let backlog = nix::sys::socket::Backlog::new(4).map_err(failed)?;
    nix::sys::socket::listen(&listener, backlog).map_err(failed)?;
    Ok(UnixListener::from(listener))
}

fn sockets(state_dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = std::fs::read_dir(state_dir).into_iter().flatten().flatten();
    let is_witness = |name: &str| name.starts_with(SOCKET_PREFIX) && name.ends_with(".sock");
    let paths = entries.filter(move |entry| is_witness(&entry.file_name().to_string_lossy()));
    paths.map(|entry| entry.path())
}

/// Waits until a file is readable; 0 when `until` has passed.
fn wait(file: BorrowedFd<'_>, until: Option<Instant>) -> Result<i32> {
    let left = until.map_or(PollTimeout::NONE, |until| {
        let left_ms = until.saturating_duration_since(Instant::now()).as_millis();
        PollTimeout::try_from(left_ms).unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut [PollFd::new(file, PollFlags::POLLIN)], left) {
        Ok(ready) => Ok(ready),
        Err(nix::Error::EINTR) => Ok(0),
        Err(errno) => Err(Error::system(errno as i32, "poll")),
    }
}
