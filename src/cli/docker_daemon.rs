//! The daemon beside a Docker plugin, where nobody else starts one: in a managed plugin.
//!
//! Runs this program's own `daemon` command as a child, starts it again when it dies, and ends it
//! in order when dropped.

use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::output;
use crate::config;
use crate::error::{Error, Result};

/// A daemon that is started again and again.
pub struct DaemonBeside {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    stopping: Condvar,
}

#[derive(Default)]
struct State {
    stops: bool,
    /// The running child; its number is not given to another process before it is waited for.
    process: Option<Pid>,
}

impl DaemonBeside {
    /// Starts it with its cache in `cache`.
    pub fn start(cache: &Path, socket: &Path, state_dir: &Path) -> Result<DaemonBeside> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("daemon").arg("--cache").arg(cache).arg("--apisock").arg(socket);
        command.arg("--state-dir").arg(state_dir);
        let shared = Arc::new(Shared::default());
        let ours = shared.clone();
        let first = ours.spawn(&mut command)?;
        let thread = std::thread::Builder::new().name("daemon-beside".to_owned());
        let thread = thread
            .spawn(move || ours.look_after(first, &mut command))
            .map_err(|error| Error::io(&error, "cannot start a thread"))?;
        Ok(DaemonBeside { shared, thread: Some(thread) })
    }
}

impl Drop for DaemonBeside {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.stops = true;
        if let Some(process) = state.process {
            // It may have ended by itself.
            let _ = kill(process, Signal::SIGTERM);
        }
        drop(state);
        self.shared.stopping.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn spawn(&self, command: &mut Command) -> Result<Child> {
        let mut state = self.lock();
        let child = command.spawn().map_err(|error| Error::io(&error, "cannot start a daemon"))?;
        state.process = Some(Pid::from_raw(child.id() as i32));
        Ok(child)
    }

    fn look_after(&self, first: Child, command: &mut Command) {
        let mut child = Some(first);
        loop {
            if let Some(mut child) = child.take() {
                let ended = child.wait();
                let mut state = self.lock();
                state.process = None;
                if !state.stops {
                    let how = ended.map_or_else(|error| error.to_string(), |end| end.to_string());
                    output::complain(&format!("sluice: the daemon ended ({how}); again"));
                }
            }
            let pause = Duration::from_millis(config::DOCKER_DAEMON_AGAIN_MS);
            let goes_on = |state: &mut State| !state.stops;
            let waited = self.stopping.wait_timeout_while(self.lock(), pause, goes_on);
            let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if state.stops {
                return;
            }
            drop(state);
            match self.spawn(command) {
                Ok(started) => child = Some(started),
                Err(error) => output::complain(&format!("sluice: {error}")),
            }
        }
    }
}
