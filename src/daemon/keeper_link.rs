//! The daemon's end of its keeper: finds it or starts it, and replaces it when it dies.
//!
//! Whoever wants to start a keeper holds the lock on the state directory, makes the listening
//! socket and hands it to the new process as its standard input. A keeper that dies takes nothing
//! with it while the daemon lives: a thread notices, starts another and gives it everything again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{Shutdown, shutdown};

use super::keeper_wire::{self as wire, Answer, Name, Request};
use super::socket::take_turn;
use crate::blob::journal::{Journal, Level};
use crate::config::{
    KEEPER_ANSWER_WAIT_MS, KEEPER_END_WAIT_MS, KEEPER_LOOK_MS, KEEPER_RESTART_PAUSE_MS,
    KEEPER_TRIES_MAX, KEEPER_TURN_WAIT_MS,
};
use crate::error::{Error, Result};

/// The socket's name in the state directory.
pub const SOCKET_NAME: &str = "keeper.sock";

/// How a keeper is found or started.
#[derive(Clone, Debug)]
pub struct Place {
    /// Where the socket is.
    pub state_dir: PathBuf,
    /// The program that has the command `keeper`: this one.
    pub program: PathBuf,
    /// Where the keeper's last words go; nowhere without one.
    pub log_file: Option<PathBuf>,
    /// How long it waits for a successor.
    pub patience: Duration,
}

/// A connection to a keeper.
pub struct Link {
    shared: Arc<Shared>,
    watch: Option<JoinHandle<()>>,
}

struct Shared {
    place: Place,
    journal: Arc<Journal>,
    state: Mutex<State>,
    /// Rung when the daemon is done with its keeper.
    bell: EventFd,
}

struct State {
    socket: OwnedFd,
    /// The keeper, if this process started it.
    child: Option<Child>,
    /// What a new keeper has to be given.
    files: BTreeMap<Name, OwnedFd>,
    is_over: bool,
}

impl Link {
    /// Connects to the keeper of a state directory, or to a new one. Also gives what it holds.
    ///
    /// # Errors
    /// `Busy` when another daemon has it; what keeps a process from being started.
    pub fn open(place: Place, journal: &Arc<Journal>) -> Result<(Link, Vec<(Name, OwnedFd)>)> {
        let (socket, child, files) = reach(&place)?;
        let mut held = BTreeMap::new();
        for (name, file) in &files {
            held.insert(name.clone(), wire::duplicate(file.as_fd())?);
        }
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| Error::system(errno as i32, "cannot make an eventfd"))?;
        let state = State { socket, child, files: held, is_over: false };
        let (state, journal) = (Mutex::new(state), Arc::clone(journal));
        let shared = Arc::new(Shared { place, journal, state, bell });
        let watched = Arc::clone(&shared);
        let watch = std::thread::Builder::new().name("keeper".into());
        let watch = watch
            .spawn(move || watched.watch())
            .map_err(|error| Error::io(&error, "cannot start a thread for the keeper"))?;
        Ok((Link { shared, watch: Some(watch) }, files))
    }

    /// Has a file held.
    ///
    /// # Errors
    /// A keeper that refuses. One that died is replaced soon and given the file then.
    pub fn put(&self, name: &Name, file: OwnedFd) -> Result<()> {
        let mut state = self.shared.lock();
        let asked = ask(&state.socket, &Request::Put(name.clone()), Some(&file));
        if asked.is_ok() || is_dead(&asked) {
            state.files.insert(name.clone(), file);
            return Ok(());
        }
        asked.map(drop)
    }

    /// Has a file closed.
    pub fn release(&self, name: &Name) -> Result<()> {
        let mut state = self.shared.lock();
        state.files.remove(name);
        let asked = ask(&state.socket, &Request::Drop(name.clone()), None);
        if is_dead(&asked) { Ok(()) } else { asked.map(drop) }
    }

    /// The end of the connection: with `is_done` the keeper ends, too, and has closed everything
    /// when this returns; otherwise it waits for a successor from now on.
    pub fn close(&self, is_done: bool) {
        let mut state = self.shared.lock();
        state.is_over = true;
        state.files.clear();
        if is_done {
            let _ = ask(&state.socket, &Request::Bye, None);
            if let Some(child) = state.child.take() {
                reap(child, Duration::from_millis(KEEPER_END_WAIT_MS));
            }
        }
        let _ = shutdown(state.socket.as_raw_fd(), Shutdown::Both);
        drop(state);
        let _ = self.shared.bell.write(1);
    }

    /// The process, if this one started it.
    pub fn process(&self) -> Option<u32> {
        self.shared.lock().child.as_ref().map(Child::id)
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.shared.lock().is_over = true;
        let _ = self.shared.bell.write(1);
        if let Some(watch) = self.watch.take() {
            let _ = watch.join();
        }
    }
}

impl Shared {
    /// Until the daemon is done: waits for the keeper's death, and replaces it.
    fn watch(&self) {
        loop {
            let Ok(socket) = wire::duplicate(self.lock().socket.as_fd()) else { return };
            if self.wait(Some(&socket), PollTimeout::NONE) {
                return;
            }
            self.journal.error("the keeper has died; another is started");
            while let Err(error) = self.replace() {
                self.journal.error(format!("without a keeper a crash costs readers: {error}"));
                let pause = KEEPER_RESTART_PAUSE_MS as u16;
                if self.wait(None, PollTimeout::from(pause)) {
                    return;
                }
            }
        }
    }

    /// Waits until the keeper hangs up or time is over; true when the daemon is done.
    fn wait(&self, socket: Option<&OwnedFd>, timeout: PollTimeout) -> bool {
        let mut polled = vec![PollFd::new(self.bell.as_fd(), PollFlags::POLLIN)];
        // No events are asked for: hanging up is always told, and answers are for others.
        polled.extend(socket.map(|socket| PollFd::new(socket.as_fd(), PollFlags::empty())));
        while poll(&mut polled, timeout) == Err(nix::errno::Errno::EINTR) {}
        self.lock().is_over
    }

    fn replace(&self) -> Result<()> {
        let mut state = self.lock();
        if state.is_over {
            return Ok(());
        }
        if let Some(child) = state.child.take() {
            reap(child, Duration::ZERO);
        }
        let (socket, child, _) = reach(&self.place)?;
        state.child = child;
        for (name, file) in &state.files {
            ask(&socket, &Request::Put(name.clone()), Some(file))?;
        }
        state.socket = socket;
        self.journal.write(Level::Info, || "another keeper has been started".to_owned());
        Ok(())
    }

    /// Nothing in here panics half-way through a change.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection, the process if it was started for it, and what it holds.
type Reached = (OwnedFd, Option<Child>, Vec<(Name, OwnedFd)>);

/// Connects to a keeper, starting one when there is none, and takes what it holds.
fn reach(place: &Place) -> Result<Reached> {
    let directory = File::open(&place.state_dir)
        .map_err(|error| Error::io(&error, format!("{}", place.state_dir.display())))?;
    let deadline = Instant::now() + Duration::from_millis(KEEPER_TURN_WAIT_MS);
    let mut deaths = 0;
    loop {
        let (socket, child) = connect_or_start(place, &directory)?;
        let patience_ms = place.patience.as_millis() as u64;
        let asked = ask(&socket, &Request::Take { patience_ms }, None);
        match asked {
            Ok(files) => return Ok((socket, child, files)),
            // The predecessor is on its way out, or another daemon was faster: then the keeper is
            // its own, whoever started it.
            Err(Error::Busy(_)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(KEEPER_LOOK_MS));
            }
            // It lost patience while we connected, or was killed.
            Err(_) if is_dead(&asked) && deaths < KEEPER_TRIES_MAX => {
                deaths += 1;
                if let Some(child) = child {
                    reap(child, Duration::from_millis(KEEPER_END_WAIT_MS));
                }
            }
            Err(error) => return Err(error.context(place.state_dir.join(SOCKET_NAME).display())),
        }
    }
}

fn connect_or_start(place: &Place, directory: &File) -> Result<(OwnedFd, Option<Child>)> {
    let connect = || wire::connect_at(directory, SOCKET_NAME, KEEPER_ANSWER_WAIT_MS);
    if let Some(socket) = connect()? {
        return Ok((socket, None));
    }
    let failed = |error: std::io::Error| Error::io(&error, "cannot lock the state directory");
    let _turn = take_turn(directory.try_clone().map_err(failed)?).map_err(failed)?;
    if let Some(socket) = connect()? {
        return Ok((socket, None));
    }
    let child = start(place, wire::listen_at(directory, SOCKET_NAME)?)?;
    match connect() {
        Ok(Some(socket)) => Ok((socket, Some(child))),
        other => {
            reap(child, Duration::ZERO);
            Err(other.err().unwrap_or_else(|| Error::unavailable("the keeper ended at once")))
        }
    }
}

/// The process inherits nothing but its socket: all our files are closed on exec.
fn start(place: &Place, listener: OwnedFd) -> Result<Child> {
    let failed = |error: std::io::Error| Error::io(&error, "cannot start a keeper");
    let words = match &place.log_file {
        None => Stdio::null(),
        Some(path) => {
            let file = OpenOptions::new().append(true).create(true).open(path);
            file.map_err(failed)?.into()
        }
    };
    let state_dir = std::path::absolute(&place.state_dir).map_err(failed)?;
    Command::new(&place.program)
        .arg0("sluice")
        .arg("keeper")
        .arg("--state-dir")
        .arg(state_dir)
        .arg("--keep")
        .arg(place.patience.as_secs().to_string())
        .env_clear()
        .current_dir(Path::new("/"))
        .stdin(Stdio::from(listener))
        .stdout(Stdio::null())
        .stderr(words)
        .spawn()
        .map_err(failed)
}

/// One request and its answer: the files it brought, by name.
///
/// # Errors
/// `Busy` when another daemon has the keeper, `Unavailable` when the keeper is gone.
fn ask(
    socket: &OwnedFd,
    request: &Request,
    file: Option<&OwnedFd>,
) -> Result<Vec<(Name, OwnedFd)>> {
    let gone = |error: Error| match error.errno() {
        libc::EAGAIN => Error::Deadline("the keeper does not answer; is it stopped?".into()),
        _ => Error::unavailable("the keeper is gone"),
    };
    let file: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
    wire::send(socket.as_fd(), &request.encode(), &file).map_err(gone)?;
    let (bytes, files) = wire::receive(socket.as_fd()).map_err(gone)?;
    if bytes.is_empty() {
        return Err(Error::unavailable("the keeper is gone"));
    }
    match Answer::parse(&bytes, files.len())? {
        Answer::Done(names) => Ok(names.into_iter().zip(files).collect()),
        Answer::Refused(reason) => Err(Error::Busy(format!("the keeper says no: {reason}"))),
    }
}

fn is_dead<T>(asked: &Result<T>) -> bool {
    matches!(asked, Err(Error::Unavailable { .. }))
}

/// Waits for a process that is about to end, a while; then it is made to.
fn reap(mut child: Child, patience: Duration) {
    let deadline = Instant::now() + patience;
    while matches!(child.try_wait(), Ok(None)) {
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        std::thread::sleep(Duration::from_millis(KEEPER_LOOK_MS));
    }
}
