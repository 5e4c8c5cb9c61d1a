//! A supervisor as nydusd knows it: holds a daemon's state with one file, and gives it back.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use tempfile::TempDir;

use super::daemon::{Daemon, put};

pub struct Supervisor {
    home: TempDir,
    listener: UnixListener,
    held: Mutex<Option<(Vec<u8>, OwnedFd)>>,
}

impl Supervisor {
    pub fn new() -> Supervisor {
        let home = TempDir::new().expect("a folder");
        let listener = UnixListener::bind(home.path().join("supervisor")).expect("a socket");
        Supervisor { home, listener, held: Mutex::default() }
    }

    pub fn path(&self) -> PathBuf {
        self.home.path().join("supervisor")
    }

    /// A new daemon beside the old one, which goes when the new one has everything.
    pub fn upgrade(&self, daemon: &mut Daemon) {
        self.save(daemon);
        let (mut former, socket) = daemon.start_successor();
        self.give(daemon);
        assert_eq!(put(&socket, "/api/v1/daemon/exit", ""), 204);
        assert!(former.wait().expect("ours").success(), "{}", daemon.log());
        assert_eq!(daemon.act("/api/v1/daemon/start"), 204, "{}", daemon.log());
    }

    /// A daemon dies, and the next one is given what was saved.
    pub fn recover(&self, daemon: &mut Daemon) {
        self.save(daemon);
        daemon.kill();
        daemon.start_again();
        self.give(daemon);
        assert_eq!(daemon.act("/api/v1/daemon/start"), 204, "{}", daemon.log());
    }

    fn save(&self, daemon: &Daemon) {
        std::thread::scope(|scope| {
            let receiver = scope.spawn(|| self.receive());
            assert_eq!(daemon.act("/api/v1/daemon/fuse/sendfd"), 204, "{}", daemon.log());
            receiver.join().expect("one file");
        });
    }

    fn give(&self, daemon: &Daemon) {
        std::thread::scope(|scope| {
            let sender = scope.spawn(|| self.send());
            assert_eq!(daemon.act("/api/v1/daemon/fuse/takeover"), 204, "{}", daemon.log());
            sender.join().expect("it takes it");
        });
    }

    fn receive(&self) {
        let (mut stream, _) = self.listener.accept().expect("a daemon");
        let mut bytes = vec![0; 1 << 16];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut space = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut space, Some(&mut control), flags);
        let message = message.expect("a message");
        let rights = message.cmsgs().expect("whole").find_map(|part| match part {
            ControlMessageOwned::ScmRights(numbers) => Some(numbers),
            _ => None,
        });
        let [number] = rights.expect("files")[..] else { panic!("exactly one file") };
        let file = sluice::upcall::sys::adopt(sluice::engine::Fd(number));
        let size = message.bytes;
        bytes.truncate(size);
        stream.read_to_end(&mut bytes).expect("up to the end");
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Some((bytes, file));
    }

    fn send(&self) {
        let (mut stream, _) = self.listener.accept().expect("a daemon");
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let (bytes, file) = held.as_ref().expect("saved before");
        let (numbers, text) = ([file.as_raw_fd()], [IoSlice::new(bytes)]);
        let rights = [ControlMessage::ScmRights(&numbers)];
        let flags = MsgFlags::MSG_NOSIGNAL;
        let sent = sendmsg::<()>(stream.as_raw_fd(), &text, &rights, flags, None).expect("sent");
        stream.write_all(&bytes[sent..]).expect("sent");
    }
}
