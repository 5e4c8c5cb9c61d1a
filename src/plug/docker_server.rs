//! The plugin's socket: connections of Docker, one thread each, so many at once.
//!
//! Docker keeps a connection or two and makes more when it does things at the same time; calls last
//! as long as a layer takes to arrive, so a thread each is the simple thing. More connections than
//! threads wait in the kernel's queue. Only root may connect.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use serde_json::json;

use super::docker::{Answer, Plugin};
use super::docker_http::{Body, Head, Wire};
use super::pack;
use crate::config;
use crate::error::{Error, Result};

/// A socket that goes when it is dropped.
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Listens at `path`; what a dead plugin left there is replaced, a living one is not.
    pub fn bind(path: &Path) -> Result<Socket> {
        let failed = |error: std::io::Error| {
            Error::io(&error, format!("cannot listen at {}", path.display()))
        };
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory).map_err(failed)?;
        if UnixStream::connect(path).is_ok() {
            return Err(Error::Busy(format!("another plugin listens at {}", path.display())));
        }
        // Docker must not find a socket that does not listen yet, or that others may open.
        let new = directory.join(format!(".{}.new", std::process::id()));
        let _ = fs::remove_file(&new);
        let listener = UnixListener::bind(&new).map_err(failed)?;
        // A client may leave between poll and accept.
        listener.set_nonblocking(true).map_err(failed)?;
        let socket = Socket { listener, path: path.to_owned() };
        fs::set_permissions(&new, fs::Permissions::from_mode(0o600))
            .and_then(|()| fs::rename(&new, path))
            .map_err(failed)?;
        Ok(socket)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// How many there are of something, and who waits for them to be fewer.
#[derive(Default)]
pub(super) struct Gate {
    inside: Mutex<usize>,
    changed: Condvar,
}

impl Gate {
    /// Waits until fewer than `most` are inside.
    fn enter(&self, most: usize) {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let full = |inside: &mut usize| *inside >= most;
        let mut inside =
            self.changed.wait_while(inside, full).unwrap_or_else(PoisonError::into_inner);
        *inside += 1;
    }

    fn leave(&self) {
        *self.inside.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.changed.notify_all();
    }

    /// Waits until nobody is inside, but not for ever.
    fn wait_empty(&self, patience: Duration) {
        let inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_timeout_while(inside, patience, |inside| *inside > 0));
    }
}

/// Serves until SIGTERM or SIGINT, and lets calls that are under way end. Mounts stay: a successor
/// finds them.
pub fn serve(sockets: &[(Socket, Arc<Plugin>)], say: &dyn Fn(&str)) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    let failed = |errno: nix::Error| Error::system(errno as i32, "cannot wait for connections");
    signals.thread_block().map_err(failed)?;
    let stop = SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC).map_err(failed)?;
    for (_, plugin) in sockets {
        let plugin = plugin.clone();
        let thread = std::thread::Builder::new().name("docker-sweep".to_owned());
        thread
            .spawn(move || {
                loop {
                    plugin.sweep();
                }
            })
            .map_err(|error| Error::io(&error, "cannot start a thread"))?;
    }
    let (connections, calls) = (Arc::new(Gate::default()), Arc::new(Gate::default()));
    loop {
        let mut wanted = vec![PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        wanted.extend(
            sockets.iter().map(|(s, _)| PollFd::new(s.listener.as_fd(), PollFlags::POLLIN)),
        );
        match poll(&mut wanted, PollTimeout::NONE) {
            Ok(_) | Err(nix::Error::EINTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
        let ready: Vec<bool> = wanted.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        if ready[0] {
            calls.wait_empty(Duration::from_millis(config::DOCKER_STOP_WAIT_MS));
            return sockets.iter().try_for_each(|(_, plugin)| plugin.stop());
        }
        for ((socket, plugin), _) in sockets.iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            match socket.listener.accept() {
                Ok((stream, _)) => {
                    connections.enter(config::DOCKER_CONNECTIONS_MAX);
                    start(stream, plugin.clone(), connections.clone(), calls.clone(), say);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => {
                    say(&format!("a connection of Docker was lost: {error}"));
                    std::thread::sleep(Duration::from_millis(config::DOCKER_ACCEPT_PAUSE_MS));
                }
            }
        }
    }
}

fn start(
    stream: UnixStream,
    plugin: Arc<Plugin>,
    connections: Arc<Gate>,
    calls: Arc<Gate>,
    say: &dyn Fn(&str),
) {
    let at_end = connections.clone();
    let thread = std::thread::Builder::new().name("docker".to_owned());
    let started = thread.spawn(move || {
        // Whatever ends a connection, Docker sees that it ended.
        let _ = converse(stream, &plugin, &calls);
        at_end.leave();
    });
    if let Err(error) = started {
        connections.leave();
        say(&format!("no thread for a connection of Docker: {error}"));
    }
}

/// One connection, request by request.
pub(super) fn converse(stream: UnixStream, plugin: &Plugin, calls: &Gate) -> Result<()> {
    stream.set_nonblocking(false).map_err(|error| Error::io(&error, "cannot wait for Docker"))?;
    let mut wire = Wire::new(stream);
    loop {
        let patience = |wire: &Wire<UnixStream>, ms| {
            let wait = Some(Duration::from_millis(ms));
            let stream = wire.stream();
            stream
                .set_read_timeout(wait)
                .and_then(|()| stream.set_write_timeout(wait))
                .map_err(|error| Error::io(&error, "cannot set a timeout"))
        };
        patience(&wire, config::DOCKER_IDLE_MS)?;
        if !wire.wait()? {
            return Ok(());
        }
        patience(&wire, config::DOCKER_PATIENCE_MS)?;
        let head = match wire.head() {
            Ok(Some(head)) => head,
            Ok(None) => return Ok(()),
            Err(error) => return wire.answer(500, &refusal(&error), false),
        };
        calls.enter(usize::MAX);
        let outcome = exchange(&mut wire, &head, plugin);
        calls.leave();
        if !outcome? {
            return Ok(());
        }
    }
}

/// One request and its answer; whether the connection can be used again.
fn exchange(wire: &mut Wire<UnixStream>, head: &Head, plugin: &Plugin) -> Result<bool> {
    let mut body = wire.body(head)?;
    let outcome = match head.method.as_str() {
        "POST" => plugin.call(&head.target, &mut body),
        method => Err(Error::Unsupported(format!("{method:.20} is not how Docker calls plugins"))),
    };
    let keep_alive = Body::drain(body) && head.keep_alive;
    match outcome {
        Ok(Answer::Json(value)) => wire.answer(200, &value.to_string(), keep_alive)?,
        Ok(Answer::Tar(stack)) => {
            let mut chunks = wire.stream_answer(keep_alive)?;
            // Without its last chunk the answer is not whole, and Docker sees that.
            pack::pack(stack, &mut chunks)?;
            chunks.finish()?;
        }
        // A 200 here would be taken for a tar.
        Err(error) if head.target == "/GraphDriver.Diff" => {
            wire.answer(500, &refusal(&error), keep_alive)?;
        }
        Err(error) => wire.answer(200, &refusal(&error), keep_alive)?,
    }
    Ok(keep_alive)
}

fn refusal(error: &Error) -> String {
    json!({ "Err": error.to_string() }).to_string()
}
