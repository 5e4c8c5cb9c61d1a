//! nydusd's way of handing a daemon's state to its successor through a supervisor.
//!
//! The supervisor listens at a unix stream socket; a daemon connects once for each act. To save, it
//! sends bytes with exactly one file and closes; to take over, it receives bytes with one file up
//! to the end. What the bytes mean is the daemon's own affair: here JSON, with all that is
//! registered. A supervisor may hold a state for long; what is on this daemon's disk is newer.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::{Deserialize, Serialize};

use super::remember::Record;
use crate::config::{KEEPER_FILES_MAX, KIB, SUPERVISOR_STATE_MAX_BYTES, SUPERVISOR_WAIT_MS};
use crate::engine::Fd;
use crate::error::{Error, Result};
use crate::upcall::sys;

/// What a daemon hands over: the file of a door, and what belongs to it.
#[derive(Debug)]
pub struct Handed {
    /// The device or group.
    pub file: OwnedFd,
    /// What the successor must know.
    pub state: State,
}

/// What a successor must know.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct State {
    /// The version of this structure.
    pub sluice: u32,
    /// What the file is: "cachefiles" or "fanotify".
    pub door: String,
    /// The directory of the cache the file belongs to.
    pub cache_dir: PathBuf,
    /// Where the predecessor remembers its images.
    pub state_dir: PathBuf,
    /// What was registered.
    pub images: Vec<Record>,
}

impl State {
    /// The only version there is.
    pub const VERSION: u32 = 1;
}

/// Gives the supervisor a state to hold.
///
/// # Errors
/// `Unavailable` when nobody listens; what the socket says; a state that is too large.
pub fn save(supervisor: &Path, handed: &Handed) -> Result<()> {
    let state = serde_json::to_vec(&handed.state)
        .map_err(|error| Error::Malformed(format!("the state cannot be written down: {error}")))?;
    if state.len() > SUPERVISOR_STATE_MAX_BYTES {
        return Err(Error::Unsupported(format!(
            "a state of {} bytes; a supervisor is given {SUPERVISOR_STATE_MAX_BYTES} at most",
            state.len()
        )));
    }
    let mut stream = connect(supervisor)?;
    let number = [handed.file.as_fd().as_raw_fd()];
    let (rights, text) = ([ControlMessage::ScmRights(&number)], [IoSlice::new(&state)]);
    let sent = sendmsg::<()>(stream.as_raw_fd(), &text, &rights, MsgFlags::MSG_NOSIGNAL, None);
    let sent = sent.map_err(|errno| failed(supervisor)(errno.into()))?;
    stream.write_all(&state[sent..]).map_err(failed(supervisor))
}

/// Takes the state that the supervisor holds.
///
/// # Errors
/// As for `save`; `Malformed` for what is no state, `Unsupported` for another version's.
pub fn fetch(supervisor: &Path) -> Result<Handed> {
    let stream = connect(supervisor)?;
    let mut bytes = vec![0; 64 * KIB];
    let mut control = nix::cmsg_space!([RawFd; KEEPER_FILES_MAX]);
    let mut files = Vec::new();
    let mut space = [IoSliceMut::new(&mut bytes)];
    let (number, flags) = (stream.as_raw_fd(), MsgFlags::MSG_CMSG_CLOEXEC);
    let message = recvmsg::<()>(number, &mut space, Some(&mut control), flags);
    let message = message.map_err(|errno| failed(supervisor)(errno.into()))?;
    for part in message.cmsgs().map_err(|errno| failed(supervisor)(errno.into()))? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            files.extend(numbers.into_iter().map(|number| sys::adopt(Fd(number))));
        }
    }
    let size = message.bytes;
    bytes.truncate(size);
    let limit = (SUPERVISOR_STATE_MAX_BYTES - size + 1) as u64;
    (&stream).take(limit).read_to_end(&mut bytes).map_err(failed(supervisor))?;
    let named = |error: Error| error.context(format_args!("state of {}", supervisor.display()));
    let state = parse(&bytes).map_err(named)?;
    match (files.pop(), files.is_empty()) {
        (Some(file), true) => Ok(Handed { file, state }),
        (other, _) => Err(named(Error::Malformed(format!(
            "came with {} files, not with one",
            files.len() + usize::from(other.is_some())
        )))),
    }
}

fn parse(bytes: &[u8]) -> Result<State> {
    if bytes.len() > SUPERVISOR_STATE_MAX_BYTES {
        return Err(Error::Malformed("is too long".into()));
    }
    let state: State = serde_json::from_slice(bytes)
        .map_err(|error| Error::Malformed(format!("is none that sluice has saved: {error}")))?;
    match state.sluice {
        State::VERSION => Ok(state),
        version => {
            Err(Error::Unsupported(format!("has version {version}; {} is known", State::VERSION)))
        }
    }
}

fn connect(supervisor: &Path) -> Result<UnixStream> {
    let stream = UnixStream::connect(supervisor).map_err(|error| {
        Error::unavailable(format!("no supervisor at {}: {error}", supervisor.display()))
    })?;
    let patience = Some(Duration::from_millis(SUPERVISOR_WAIT_MS));
    stream
        .set_read_timeout(patience)
        .and_then(|()| stream.set_write_timeout(patience))
        .map_err(failed(supervisor))?;
    Ok(stream)
}

fn failed(supervisor: &Path) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::io(&error, format!("supervisor at {}", supervisor.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    fn state(images: usize) -> State {
        let record = r#"{"version":1,"domain_id":"d","id":"i","bootstrap":"00","directory":"/",
            "entry":{"secret":"x"}}"#;
        let record: Record = serde_json::from_str(record).unwrap();
        State {
            sluice: State::VERSION,
            door: "cachefiles".into(),
            cache_dir: "/cache".into(),
            state_dir: "/state".into(),
            images: vec![record; images],
        }
    }

    /// Bytes and files.
    type Received = (Vec<u8>, Vec<OwnedFd>);

    /// Receives as nydus-snapshotter does: one message with the file, then up to the end.
    fn receiver(directory: &Path) -> (PathBuf, JoinHandle<Received>) {
        let path = directory.join("supervisor.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let receive = move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut bytes = vec![0; 100];
            let mut control = nix::cmsg_space!([RawFd; 4]);
            let mut space = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message =
                recvmsg::<()>(stream.as_raw_fd(), &mut space, Some(&mut control), flags).unwrap();
            let mut files = Vec::new();
            for part in message.cmsgs().unwrap() {
                if let ControlMessageOwned::ScmRights(numbers) = part {
                    files.extend(numbers.into_iter().map(|number| sys::adopt(Fd(number))));
                }
            }
            let size = message.bytes;
            bytes.truncate(size);
            stream.read_to_end(&mut bytes).unwrap();
            (bytes, files)
        };
        (path, std::thread::spawn(receive))
    }

    /// Gives whoever connects these bytes and files.
    fn giver(directory: &Path, bytes: Vec<u8>, files: usize) -> PathBuf {
        let path = directory.join("giver.sock");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let file = std::fs::File::open("/dev/null").unwrap();
            let numbers = vec![file.as_raw_fd(); files];
            let rights = [ControlMessage::ScmRights(&numbers)];
            let control = if files == 0 { &[] } else { &rights[..] };
            let text = [IoSlice::new(&bytes)];
            let sent =
                sendmsg::<()>(stream.as_raw_fd(), &text, control, MsgFlags::MSG_NOSIGNAL, None);
            stream.write_all(&bytes[sent.unwrap()..]).unwrap();
        });
        path
    }

    #[test]
    fn a_state_reaches_the_supervisor_with_one_file_and_comes_back() {
        let directory = tempfile::tempdir().unwrap();
        // Longer than one message of a socket.
        let state = state(8000);
        let (path, received) = receiver(directory.path());
        let file = std::fs::File::open("/dev/null").unwrap().into();
        save(&path, &Handed { file, state: state.clone() }).unwrap();
        let (bytes, files) = received.join().unwrap();
        assert_eq!(files.len(), 1);
        assert_eq!(parse(&bytes).unwrap(), state);
        let handed = fetch(&giver(directory.path(), bytes, 1)).unwrap();
        assert_eq!(handed.state, state);
    }

    #[test]
    fn what_is_no_state_is_refused_with_a_sentence() {
        let directory = tempfile::tempdir().unwrap();
        let good = serde_json::to_vec(&state(1)).unwrap();
        let newer = serde_json::to_vec(&State { sluice: 2, ..state(0) }).unwrap();
        for (bytes, files, word) in [
            (good.clone(), 0, "0 files"),
            (good.clone(), 2, "2 files"),
            (good[..good.len() - 1].to_vec(), 1, "none that sluice has saved"),
            (b"\0nydus".to_vec(), 1, "none that sluice has saved"),
            (newer, 1, "version 2"),
        ] {
            let error = fetch(&giver(directory.path(), bytes, files)).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("giver.sock"), "{error}");
        }
    }

    #[test]
    fn without_a_supervisor_it_is_said_where_none_is() {
        let nowhere = Path::new("/nonexistent/supervisor.sock");
        let error = fetch(nowhere).unwrap_err();
        assert!(
            matches!(error, Error::Unavailable { .. }) && error.to_string().contains("/nonexist")
        );
    }
}
