//! The keeper as it runs: real processes of the built program, killed the hard way.
//!
//! A pipe tells who holds it: its other end reports when the last holder has closed it. A daemon
//! that can be killed is this test program, started again with a role in its environment.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use sluice::blob::journal::{Journal, Level};
use sluice::daemon::keeper::{Ending, Keeper};
use sluice::daemon::keeper_link::{Place, SOCKET_NAME};
use sluice::daemon::keeper_systemd::Environment;
use sluice::error::Error;
use tempfile::TempDir;

const ROLE: &str = "SLUICE_TEST_ROLE_STATE_DIR";
const LONG: Duration = Duration::from_secs(60);

fn place(state_dir: &Path, patience: Duration) -> Place {
    Place {
        state_dir: state_dir.to_owned(),
        program: env!("CARGO_BIN_EXE_sluice").into(),
        log_file: Some(state_dir.join("keeper.log")),
        patience,
    }
}

fn journal() -> Arc<Journal> {
    Journal::new(Level::Debug).0
}

fn open(state_dir: &Path, patience: Duration) -> Result<Keeper, Error> {
    Keeper::open(Some(place(state_dir, patience)), &Environment::default(), &journal())
}

/// A pipe: what is held, and the end that tells when nobody holds it any more.
fn watched() -> (OwnedFd, File) {
    let (watch, held) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).expect("a pipe");
    (held, File::from(watch))
}

fn is_held(watch: &File) -> bool {
    let mut polled = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::ZERO).expect("a pipe can be polled") == 0
}

/// Waits until nobody holds it; gives how long that took.
fn wait_closed(watch: &File) -> Duration {
    let since = Instant::now();
    let mut polled = [PollFd::new(watch.as_fd(), PollFlags::POLLIN)];
    let patience = PollTimeout::try_from(30_000).expect("it fits");
    assert_eq!(poll(&mut polled, patience), Ok(1), "still held after 30 s");
    since.elapsed()
}

/// Says something through a held end and hears it at the other: it is the same pipe.
fn speaks_to(held: &OwnedFd, mut watch: &File) -> bool {
    let mut file = File::from(held.try_clone().expect("a number"));
    file.write_all(b"x").expect("room");
    let mut byte = [0];
    watch.read_exact(&mut byte).is_ok() && byte == *b"x"
}

/// The keeper's process, by the socket it was started for.
fn keeper_of(state_dir: &Path) -> Option<Pid> {
    let processes = std::fs::read_dir("/proc").expect("proc");
    let is_ours = |line: &[u8]| {
        let mut words = line.split(|&byte| byte == 0);
        words.nth(1) == Some(b"keeper")
            && words.any(|it| it == state_dir.as_os_str().as_encoded_bytes())
    };
    processes.flatten().find_map(|entry| {
        let process: i32 = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        is_ours(&line).then(|| Pid::from_raw(process))
    })
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5)); // tidy: polling
    }
}

/// Ends what a failed test leaves: the keeper outlives everything else by design.
struct StateDir(TempDir);

impl StateDir {
    fn new() -> StateDir {
        StateDir(TempDir::new().expect("a directory"))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        if let Some(process) = keeper_of(self.path()) {
            let _ = kill(process, Signal::SIGKILL);
        }
    }
}

/// A daemon in another process: has its standard input held as "x", says so, and stays.
struct Daemon(Child);

impl Daemon {
    fn start(state_dir: &Path, held: OwnedFd) -> Daemon {
        let program = std::env::current_exe().expect("a process knows its program");
        let mut child = Command::new(program)
            .args(["--exact", "acts_as_a_daemon_when_told_to", "--nocapture"])
            .env(ROLE, state_dir)
            .stdin(Stdio::from(held))
            .stdout(Stdio::piped())
            .spawn()
            .expect("this program can be started");
        let mut said = Vec::new();
        let mut byte = [0];
        let output = child.stdout.as_mut().expect("its output was asked for");
        while !said.ends_with(b"holds\n") && output.read(&mut byte).expect("output") == 1 {
            said.push(byte[0]);
        }
        assert!(said.ends_with(b"holds\n"), "{}", String::from_utf8_lossy(&said));
        Daemon(child)
    }

    fn kill(mut self) {
        self.0.kill().expect("it is there");
        self.0.wait().expect("it ends");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn acts_as_a_daemon_when_told_to() {
    let Some(state_dir) = std::env::var_os(ROLE) else { return };
    let keeper = open(Path::new(&state_dir), LONG).expect("a keeper");
    keeper.put("x", std::io::stdin().as_fd()).expect("held");
    println!("holds");
    let _end = keeper;
    loop {
        std::thread::park();
    }
}

#[test]
fn files_survive_a_killed_daemon_and_reach_the_successor_again_and_again() {
    let state_dir = StateDir::new();
    let (held, watch) = watched();
    let daemon = Daemon::start(state_dir.path(), held);
    let process = keeper_of(state_dir.path()).expect("a keeper");
    daemon.kill();
    assert!(is_held(&watch));
    for _ in 0..3 {
        let keeper = open(state_dir.path(), LONG).expect("the keeper");
        assert_eq!(keeper_of(state_dir.path()), Some(process), "it is the same");
        let file = keeper.take("x").expect("what was left");
        assert!(keeper.take("x").is_none() && keeper.take("y").is_none());
        assert!(speaks_to(&file, &watch));
        drop(file);
        keeper.finish(Ending::HandOver);
        assert!(is_held(&watch));
    }
    open(state_dir.path(), LONG).expect("the keeper").finish(Ending::Done);
    assert!(!is_held(&watch), "closed before the end was reported");
    eventually("the keeper ends", || keeper_of(state_dir.path()).is_none());
    assert!(!state_dir.path().join(SOCKET_NAME).exists());
}

#[test]
fn patience_is_bounded_and_then_everything_is_closed() {
    let state_dir = StateDir::new();
    let (held, watch) = watched();
    let patience = Duration::from_millis(1500);
    let keeper = open(state_dir.path(), patience).expect("a keeper");
    keeper.put("x", held.as_fd()).expect("held");
    drop(held);
    keeper.finish(Ending::HandOver);
    let took = wait_closed(&watch);
    assert!(took > patience - Duration::from_millis(100), "closed after {took:?}");
    eventually("the keeper ends", || keeper_of(state_dir.path()).is_none());
    let said = std::fs::read_to_string(state_dir.path().join("keeper.log")).expect("its log");
    assert!(said.contains("1 files closed"), "{said}");
    // The next daemon finds nothing and no obstacle.
    let keeper = open(state_dir.path(), LONG).expect("another keeper");
    assert!(keeper.take("x").is_none());
    keeper.finish(Ending::Done);
}

#[test]
fn a_keeper_with_nothing_to_hold_ends_with_its_daemon() {
    let state_dir = StateDir::new();
    open(state_dir.path(), LONG).expect("a keeper").finish(Ending::HandOver);
    eventually("the keeper ends", || keeper_of(state_dir.path()).is_none());
}

#[test]
fn of_two_successors_one_gets_everything_and_the_other_is_told_who() {
    let state_dir = StateDir::new();
    let (held, watch) = watched();
    Daemon::start(state_dir.path(), held).kill();
    let first = open(state_dir.path(), LONG).expect("the first");
    let refused = open(state_dir.path(), LONG).expect_err("the second");
    let text = refused.to_string();
    assert!(
        matches!(refused, Error::Busy(_)) && text.contains(&std::process::id().to_string()),
        "{text}"
    );
    assert!(first.take("x").is_some());
    first.finish(Ending::HandOver);
    // Two at the very same time, with nobody there before.
    let nobody = StateDir::new();
    let both = std::thread::scope(|scope| {
        let race = || scope.spawn(|| open(nobody.path(), LONG));
        let (one, two) = (race(), race());
        [one.join().expect("no panic"), two.join().expect("no panic")]
    });
    assert_eq!(both.iter().filter(|outcome| outcome.is_ok()).count(), 1, "{both:?}");
    both.into_iter().flatten().for_each(|keeper| keeper.finish(Ending::Done));
    open(state_dir.path(), LONG).expect("the last").finish(Ending::Done);
    assert!(!is_held(&watch));
}

#[test]
fn a_killed_keeper_is_replaced_and_holds_everything_again() {
    let state_dir = StateDir::new();
    let (held, watch) = watched();
    let keeper = open(state_dir.path(), LONG).expect("a keeper");
    keeper.put("x", held.as_fd()).expect("held");
    drop(held);
    let first = keeper_of(state_dir.path()).expect("a process");
    kill(first, Signal::SIGKILL).expect("it is there");
    eventually("another keeper", || keeper_of(state_dir.path()).is_some_and(|it| it != first));
    // Another file works at once or as soon as the new one listens.
    let (more, more_watch) = watched();
    keeper.put("y", more.as_fd()).expect("held");
    drop(more);
    keeper.finish(Ending::HandOver);
    let successor = open(state_dir.path(), LONG).expect("the keeper");
    assert!(speaks_to(&successor.take("x").expect("given again"), &watch));
    assert!(speaks_to(&successor.take("y").expect("given too"), &more_watch));
    successor.finish(Ending::Done);
    assert!(!is_held(&watch) && !is_held(&more_watch));
}

#[test]
fn daemon_and_keeper_killed_together_leave_nothing_in_the_way() {
    let state_dir = StateDir::new();
    let (held, watch) = watched();
    let daemon = Daemon::start(state_dir.path(), held);
    let process = keeper_of(state_dir.path()).expect("a keeper");
    kill(Pid::from_raw(daemon.0.id() as i32), Signal::SIGSTOP).expect("stopped");
    kill(process, Signal::SIGKILL).expect("it is there");
    daemon.kill();
    wait_closed(&watch);
    assert!(state_dir.path().join(SOCKET_NAME).exists(), "a stale socket is left");
    let keeper = open(state_dir.path(), LONG).expect("another keeper");
    assert!(keeper.take("x").is_none());
    keeper.finish(Ending::Done);
}

#[test]
fn what_nobody_takes_is_closed() {
    let state_dir = StateDir::new();
    let (held, watch) = watched();
    Daemon::start(state_dir.path(), held).kill();
    let keeper = open(state_dir.path(), LONG).expect("the keeper");
    assert_eq!(keeper.release_untaken(), ["x"]);
    assert!(!is_held(&watch));
    assert!(keeper.release_untaken().is_empty());
    keeper.finish(Ending::Done);
}

#[test]
fn names_and_numbers_have_bounds() {
    let state_dir = StateDir::new();
    let keeper = open(state_dir.path(), LONG).expect("a keeper");
    let (held, watch) = watched();
    assert!(keeper.put("", held.as_fd()).is_err());
    assert!(keeper.put("A", held.as_fd()).is_err());
    for letter in 'a'..='p' {
        keeper.put(&letter.to_string(), held.as_fd()).expect("held");
    }
    let error = keeper.put("q", held.as_fd()).expect_err("too many").to_string();
    assert!(error.contains("16 files"), "{error}");
    keeper.put("a", held.as_fd()).expect("in place of the first");
    keeper.release("b").expect("closed");
    keeper.put("q", held.as_fd()).expect("there is room again");
    drop(held);
    keeper.finish(Ending::HandOver);
    let successor = open(state_dir.path(), LONG).expect("the keeper");
    assert!(successor.take("b").is_none());
    let taken = ('a'..='q').filter(|letter| successor.take(&letter.to_string()).is_some());
    assert_eq!(taken.count(), 16);
    successor.finish(Ending::Done);
    assert!(!is_held(&watch));
}

#[test]
fn the_keeper_is_a_process_apart_that_a_group_signal_does_not_reach() {
    let state_dir = StateDir::new();
    let (held, watch) = watched();
    let keeper = open(state_dir.path(), LONG).expect("a keeper");
    keeper.put("x", held.as_fd()).expect("held");
    drop(held);
    let process = keeper_of(state_dir.path()).expect("a process");
    let about =
        |file: &str| std::fs::read_to_string(format!("/proc/{process}/{file}")).expect("proc");
    let own_session = format!("sluice-keeper) S {} {process} {process} ", std::process::id());
    eventually("its own session and name", || about("stat").contains(&own_session));
    assert_eq!(about("status").lines().find(|it| it.starts_with("Threads:")), Some("Threads:\t1"));
    assert_eq!(std::fs::read_link(format!("/proc/{process}/cwd")).expect("proc"), Path::new("/"));
    let files = std::fs::read_dir(format!("/proc/{process}/fd")).expect("proc").flatten();
    let files: Vec<_> = files.filter_map(|it| std::fs::read_link(it.path()).ok()).collect();
    // Three standard ones, listener, directory, our connection, the pipe.
    assert_eq!(files.len(), 7, "{files:?}");
    keeper.finish(Ending::Done);
    assert!(!is_held(&watch));
}
