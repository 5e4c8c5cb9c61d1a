//! systemd as the keeper, played by this test: it takes files with their names from a socket, and
//! starts the next daemon with them. The daemons are this test program, started again with a role.

use std::fs::File;
use std::io::{BufRead, BufReader, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use sluice::blob::journal::{Journal, Level};
use sluice::daemon::keeper::{Ending, Keeper};
use sluice::daemon::keeper_link::Place;
use sluice::daemon::keeper_systemd::Environment;
use sluice::engine::Fd;
use sluice::upcall::sys::adopt;
use tempfile::TempDir;

const ROLE: &str = "SLUICE_TEST_ROLE";

struct Systemd {
    directory: TempDir,
    socket: UnixDatagram,
    stored: Vec<(String, OwnedFd)>,
}

impl Systemd {
    fn new() -> Systemd {
        let directory = TempDir::new().expect("a directory");
        let socket = UnixDatagram::bind(directory.path().join("notify")).expect("a socket");
        socket.set_read_timeout(Some(Duration::from_secs(30))).expect("a socket");
        Systemd { directory, socket, stored: Vec::new() }
    }

    /// Starts a daemon. A stored file is handed to it as number 3, whatever the shell makes of it.
    fn start(&self, role: &str) -> (Child, BufReader<ChildStdout>) {
        let mut command = Command::new("/bin/sh");
        let program = std::env::current_exe().expect("a process knows its program");
        match self.stored.first() {
            None => command.args(["-c", "exec \"$0\" \"$@\""]),
            Some((name, _)) => command
                .args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\" 3<&0 0</dev/null"])
                .env("LISTEN_FDNAMES", name),
        };
        let stdin = self
            .stored
            .first()
            .map_or_else(Stdio::null, |(_, file)| Stdio::from(file.try_clone().expect("a number")));
        let mut child = command
            .arg(program)
            .args(["--exact", "acts_as_a_daemon_when_told_to", "--nocapture"])
            .env(ROLE, role)
            .env("NOTIFY_SOCKET", self.directory.path().join("notify"))
            .env("FDSTORE", "16")
            .stdin(stdin)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let output = BufReader::new(child.stdout.take().expect("asked for"));
        (child, output)
    }

    /// The next message, obeyed as systemd would.
    fn obey(&mut self) -> String {
        let mut bytes = vec![0; 4096];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut space = [IoSliceMut::new(&mut bytes)];
        let (number, flags) = (self.socket.as_raw_fd(), MsgFlags::MSG_CMSG_CLOEXEC);
        let message =
            recvmsg::<()>(number, &mut space, Some(&mut control), flags).expect("a message");
        let mut files = Vec::new();
        for part in message.cmsgs().expect("whole") {
            if let ControlMessageOwned::ScmRights(numbers) = part {
                files.extend(numbers);
            }
        }
        let size = message.bytes;
        let text = String::from_utf8(bytes[..size].to_vec()).expect("text");
        let value = |key: &str| {
            text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')).unwrap_or("")
        };
        if value("FDSTOREREMOVE") == "1" {
            self.stored.retain(|(name, _)| name != value("FDNAME"));
        }
        if value("FDSTORE") == "1" {
            let [number] = files[..] else { panic!("{text:?} with {} files", files.len()) };
            self.stored.push((value("FDNAME").to_owned(), adopt(Fd(number))));
        }
        text
    }
}

fn line(output: &mut BufReader<ChildStdout>, word: &str) {
    let mut said = String::new();
    while !said.contains(word) {
        said.clear();
        assert_ne!(output.read_line(&mut said).expect("output"), 0, "{word} was never said");
    }
}

fn open() -> Keeper {
    let place = Place {
        state_dir: "/nonexistent".into(),
        program: "/nonexistent".into(),
        log_file: None,
        patience: Duration::from_secs(60),
    };
    let (journal, _) = Journal::new(Level::Debug);
    Keeper::open(Some(place), &Environment::of_process(), &journal).expect("systemd")
}

#[test]
fn acts_as_a_daemon_when_told_to() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let keeper = open();
    assert_eq!(keeper.kind(), "systemd");
    match role.as_str() {
        "first" => {
            assert!(keeper.take("pipe").is_none());
            let (mut watch, held) = nix::unistd::pipe().map(|(a, b)| (File::from(a), b)).unwrap();
            keeper.put("pipe", held.as_fd()).expect("stored");
            drop(held);
            println!("stored");
            // What the successor writes arrives through the stored file.
            let mut byte = [0];
            watch.read_exact(&mut byte).expect("somebody holds the other end");
            println!("heard {}", byte[0] as char);
            std::thread::park();
        }
        "second" => {
            let mut file = File::from(keeper.take("pipe").expect("handed over"));
            let flags = nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_GETFD).expect("flags");
            assert_eq!(flags & 1, 1, "closed on exec");
            file.write_all(b"x").expect("the first still listens");
            keeper.finish(Ending::HandOver);
            println!("left");
        }
        _ => {
            assert!(keeper.take("pipe").is_some());
            keeper.finish(Ending::Done);
            println!("done");
        }
    }
}

#[test]
fn files_are_stored_by_name_and_handed_to_the_next_daemon() {
    let mut systemd = Systemd::new();
    let (mut first, mut output) = systemd.start("first");
    line(&mut output, "stored");
    assert_eq!(systemd.obey(), "FDSTOREREMOVE=1\nFDNAME=pipe");
    assert_eq!(systemd.obey(), "FDSTORE=1\nFDPOLL=0\nFDNAME=pipe");
    assert_eq!(systemd.stored.len(), 1);
    let (mut second, mut its_output) = systemd.start("second");
    line(&mut its_output, "left");
    line(&mut output, "heard x");
    first.kill().expect("it is there");
    first.wait().expect("it ends");
    assert!(second.wait().expect("it ends").success());
    let (mut third, mut output) = systemd.start("third");
    line(&mut output, "done");
    assert!(third.wait().expect("it ends").success());
    // A hand-over left it there without a word, an end takes it away.
    assert_eq!(systemd.obey(), "FDSTOREREMOVE=1\nFDNAME=pipe");
    assert!(systemd.stored.is_empty() && systemd.directory.path() != Path::new("/"));
}
