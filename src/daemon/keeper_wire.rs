//! What daemon and keeper say to each other, and the socket they say it over.
//!
//! A SOCK_SEQPACKET unix socket: a message is a datagram of text lines, the files it speaks of come
//! with it (SCM_RIGHTS), and every request gets one answer. The first line is the version, so that
//! the keeper of an older daemon and a newer daemon understand each other or say that they do not.
//! The first request of a daemon is TAKE; with it the daemon becomes the keeper's only one, until
//! its connection breaks.
//!
//! ```text
//! sluice-keeper 1 / TAKE <patience in ms>    OK / name / name ...   all files, in that order
//! sluice-keeper 1 / PUT <name> + one file    OK                     replaces a file of that name
//! sluice-keeper 1 / DROP <name>              OK                     also when there is none
//! sluice-keeper 1 / BYE                      OK                     closes everything and ends
//! anything else, or not now                  NO / reason
//! ```
//! Only processes of the same user, or of root, are listened to.

use std::fs::{File, Permissions};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::socket::sockopt::{PeerCredentials, ReceiveTimeout, SendTimeout};
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    UnixAddr, UnixCredentials, bind, connect, getsockopt, listen, recvmsg, sendmsg, setsockopt,
    socket,
};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::config::{KEEPER_FILES_MAX, KEEPER_MESSAGE_MAX_BYTES, KEEPER_NAME_MAX_BYTES};
use crate::engine::Fd;
use crate::error::{Error, Result};
use crate::upcall::sys;

const GREETING: &str = "sluice-keeper 1";

/// The name of a file that is held: lower-case letters and dashes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Name(String);

/// What a daemon asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Give everything; from now on wait so long for a successor of mine.
    Take {
        /// In milliseconds.
        patience_ms: u64,
    },
    /// Hold the file that comes with this.
    Put(Name),
    /// Close a file.
    Drop(Name),
    /// Close everything and end.
    Bye,
}

/// What the keeper answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done; the names of the files that come with this.
    Done(Vec<Name>),
    /// Not done.
    Refused(String),
}

impl Name {
    /// Checks a name.
    pub fn new(text: &str) -> Result<Name> {
        let is_plain = text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-');
        match (1..=KEEPER_NAME_MAX_BYTES).contains(&text.len()) && is_plain {
            true => Ok(Name(text.to_owned())),
            false => Err(Error::Malformed(format!("{text:?} is no name of a file to be held"))),
        }
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Request {
    /// The message.
    pub fn encode(&self) -> String {
        match self {
            Request::Take { patience_ms } => format!("{GREETING}\nTAKE {patience_ms}"),
            Request::Put(name) => format!("{GREETING}\nPUT {}", name.0),
            Request::Drop(name) => format!("{GREETING}\nDROP {}", name.0),
            Request::Bye => format!("{GREETING}\nBYE"),
        }
    }

    /// Reads a message.
    pub fn parse(bytes: &[u8]) -> Result<Request> {
        let mut lines = lines(bytes)?;
        let line = lines.next().unwrap_or_default();
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let request = match word {
            "TAKE" => {
                let malformed = |_| Error::Malformed(format!("{rest:?} is no time"));
                Request::Take { patience_ms: rest.parse().map_err(malformed)? }
            }
            "PUT" => Request::Put(Name::new(rest)?),
            "DROP" => Request::Drop(Name::new(rest)?),
            "BYE" if rest.is_empty() => Request::Bye,
            _ => return Err(Error::Malformed(format!("{line:?} is no request to a keeper"))),
        };
        match lines.next() {
            None => Ok(request),
            Some(line) => Err(Error::Malformed(format!("{line:?} after a request"))),
        }
    }
}

impl Answer {
    /// The message.
    pub fn encode(&self) -> String {
        match self {
            Answer::Done(names) => {
                let names = names.iter().map(|name| format!("\n{}", name.0));
                format!("{GREETING}\nOK{}", names.collect::<String>())
            }
            Answer::Refused(reason) => {
                let reason = reason.replace('\n', " ");
                let most = KEEPER_MESSAGE_MAX_BYTES / 2;
                let reason: String = reason.chars().filter(char::is_ascii).take(most).collect();
                format!("{GREETING}\nNO\n{reason}")
            }
        }
    }

    /// Reads a message that came with `file_count` files.
    pub fn parse(bytes: &[u8], file_count: usize) -> Result<Answer> {
        let mut lines = lines(bytes)?;
        match lines.next() {
            Some("OK") => {
                let names = lines.map(Name::new).collect::<Result<Vec<Name>>>()?;
                match names.len() == file_count {
                    true => Ok(Answer::Done(names)),
                    false => Err(Error::Malformed(format!(
                        "a keeper gave {} names and {file_count} files",
                        names.len()
                    ))),
                }
            }
            Some("NO") => Ok(Answer::Refused(lines.next().unwrap_or("no reason").to_owned())),
            other => Err(Error::Malformed(format!("{other:?} is no answer of a keeper"))),
        }
    }
}

/// The lines behind the version.
fn lines(bytes: &[u8]) -> Result<std::str::Lines<'_>> {
    let text = std::str::from_utf8(bytes)
        .map_err(|_| Error::Malformed("a keeper's message is not text".into()))?;
    let mut lines = text.lines();
    match lines.next() {
        Some(GREETING) => Ok(lines),
        other => Err(Error::Unsupported(format!(
            "the other side says {:?}, not {GREETING:?}: it is of another version",
            other.unwrap_or_default()
        ))),
    }
}

/// Listens at a path that nobody listens at; whoever calls keeps others from doing the same.
pub fn listen_at(directory: &File, name: &str) -> Result<OwnedFd> {
    let failed = |errno: Errno| Error::system(errno as i32, "cannot listen for daemons");
    let _ = std::fs::remove_file(through(directory, name));
    let listener = new_socket()?;
    bind(listener.as_raw_fd(), &address(directory, name)?).map_err(failed)?;
    // Until here others could have connected; their credentials are looked at in any case.
    let _ = std::fs::set_permissions(through(directory, name), Permissions::from_mode(0o600));
    listen(&listener, Backlog::new(8).map_err(failed)?).map_err(failed)?;
    Ok(listener)
}

/// Connects to whoever listens there; `None` when nobody does.
pub fn connect_at(directory: &File, name: &str, timeout_ms: u64) -> Result<Option<OwnedFd>> {
    let failed = |errno: Errno| Error::system(errno as i32, "cannot connect to the keeper");
    let stream = new_socket()?;
    limit_wait(&stream, timeout_ms)?;
    match connect(stream.as_raw_fd(), &address(directory, name)?) {
        Ok(()) => check_peer(&stream).map(|_| Some(stream)),
        Err(Errno::ENOENT | Errno::ECONNREFUSED) => Ok(None),
        Err(errno) => Err(failed(errno)),
    }
}

/// Bounds how long a message is waited for and how long one may take to go.
pub fn limit_wait(socket: &OwnedFd, timeout_ms: u64) -> Result<()> {
    let timeout = TimeVal::milliseconds(timeout_ms as i64);
    setsockopt(socket, ReceiveTimeout, &timeout)
        .and_then(|()| setsockopt(socket, SendTimeout, &timeout))
        .map_err(|errno| Error::system(errno as i32, "cannot limit a wait"))
}

/// Who is at the other end, if it may speak to us.
///
/// # Errors
/// `Denied` unless it is root or our own user.
pub fn check_peer(socket: &OwnedFd) -> Result<UnixCredentials> {
    let peer = getsockopt(socket, PeerCredentials)
        .map_err(|errno| Error::system(errno as i32, "cannot tell who is there"))?;
    let own = nix::unistd::geteuid().as_raw();
    match peer.uid() == 0 || peer.uid() == own {
        true => Ok(peer),
        false => Err(Error::Denied(format!("process {} of user {}", peer.pid(), peer.uid()))),
    }
}

/// Sends one message with files.
pub fn send(socket: BorrowedFd<'_>, text: &str, files: &[BorrowedFd<'_>]) -> Result<()> {
    let numbers: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[] } else { &rights[..] };
    let (text, flags) = ([IoSlice::new(text.as_bytes())], MsgFlags::MSG_NOSIGNAL);
    sendmsg::<()>(socket.as_raw_fd(), &text, control, flags, None)
        .map(drop)
        .map_err(|errno| Error::system(errno as i32, "cannot send to the other side"))
}

/// Receives one message with its files; an empty one means that the other side has hung up.
///
/// # Errors
/// What the socket says; `Malformed` for a message that was cut short.
pub fn receive(socket: BorrowedFd<'_>) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut bytes = vec![0; KEEPER_MESSAGE_MAX_BYTES];
    let mut control = nix::cmsg_space!([RawFd; KEEPER_FILES_MAX]);
    let mut space = [IoSliceMut::new(&mut bytes)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let failed = |errno: Errno| Error::system(errno as i32, "cannot hear the other side");
    let message = recvmsg::<()>(socket.as_raw_fd(), &mut space, Some(&mut control), flags);
    let message = message.map_err(failed)?;
    let mut files = Vec::new();
    for part in message.cmsgs().map_err(failed)? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            files.extend(numbers.into_iter().map(|number| sys::adopt(Fd(number))));
        }
    }
    let (size, cut) = (message.bytes, MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
    if message.flags.intersects(cut) {
        return Err(Error::Malformed("a message with too many bytes or files".into()));
    }
    bytes.truncate(size);
    Ok((bytes, files))
}

/// A second number of the same file.
pub fn duplicate(file: BorrowedFd<'_>) -> Result<OwnedFd> {
    file.try_clone_to_owned().map_err(|error| Error::io(&error, "cannot duplicate a file"))
}

fn new_socket() -> Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|errno| Error::system(errno as i32, "cannot make a socket"))
}

/// The name goes through /proc: an address has 108 bytes, a directory's path may have more.
fn address(directory: &File, name: &str) -> Result<UnixAddr> {
    UnixAddr::new(&through(directory, name))
        .map_err(|errno| Error::system(errno as i32, format!("{name} is no socket's name")))
}

fn through(directory: &File, name: &str) -> std::path::PathBuf {
    Path::new("/proc/self/fd").join(directory.as_fd().as_raw_fd().to_string()).join(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(text: &str) -> Name {
        Name::new(text).unwrap()
    }

    #[test]
    fn requests_and_answers_survive_the_wire() {
        for request in [
            Request::Take { patience_ms: 60_000 },
            Request::Put(name("cachefiles")),
            Request::Drop(name("a-b")),
            Request::Bye,
        ] {
            assert_eq!(Request::parse(request.encode().as_bytes()), Ok(request));
        }
        let names: Vec<Name> = (b'a'..b'a' + KEEPER_FILES_MAX as u8)
            .map(|letter| name(&char::from(letter).to_string().repeat(KEEPER_NAME_MAX_BYTES)))
            .collect();
        for answer in [Answer::Done(vec![]), Answer::Done(names), Answer::Refused("busy".into())] {
            let count = if let Answer::Done(names) = &answer { names.len() } else { 0 };
            let text = answer.encode();
            assert!(text.len() <= KEEPER_MESSAGE_MAX_BYTES);
            assert_eq!(Answer::parse(text.as_bytes(), count), Ok(answer));
        }
    }

    #[test]
    fn what_is_not_a_message_is_refused() {
        for text in [
            "",
            "sluice-keeper 1",
            "sluice-keeper 1\n",
            "sluice-keeper 1\nTAKE",
            "sluice-keeper 1\nTAKE -1",
            "sluice-keeper 1\nTAKE 1 2",
            "sluice-keeper 1\nPUT",
            "sluice-keeper 1\nPUT A",
            "sluice-keeper 1\nPUT a/b",
            "sluice-keeper 1\nPUT aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
            "sluice-keeper 1\nBYE now",
            "sluice-keeper 1\nBYE\nBYE",
        ] {
            assert!(
                matches!(
                    Request::parse(text.as_bytes()),
                    Err(Error::Malformed(_) | Error::Unsupported(_))
                ),
                "{text:?}"
            );
        }
        let other = Request::parse(b"sluice-keeper 2\nBYE");
        assert!(matches!(other, Err(Error::Unsupported(_))), "{other:?}");
        assert!(Answer::parse(b"sluice-keeper 1\nOK\na", 0).is_err());
        assert!(Answer::parse(b"sluice-keeper 1\nOK\na", 2).is_err());
        assert!(Answer::parse(b"sluice-keeper 1\nYES", 0).is_err());
    }

    #[test]
    fn a_refusal_of_any_length_fits_a_message() {
        let text = Answer::Refused("\n\u{1f600}x".repeat(10_000)).encode();
        assert!(text.len() <= KEEPER_MESSAGE_MAX_BYTES);
        assert!(matches!(Answer::parse(text.as_bytes(), 0), Ok(Answer::Refused(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = (Request::parse(&bytes), Answer::parse(&bytes, 1));
        }
    }
}
