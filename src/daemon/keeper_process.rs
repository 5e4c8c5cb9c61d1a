//! The keeper itself: a tiny process that holds files for a daemon, so that they outlive it.
//!
//! Standard input is the socket it listens at, made by the daemon that starts it: so a daemon can
//! connect before the keeper runs, and two that start at once cannot start two. One daemon at a
//! time holds the connection. When that breaks, the keeper waits for a successor, but only so long:
//! then it closes everything, the kernel answers who still waits, and the keeper ends. It never
//! looks into what it holds, has no threads, opens nothing, and keeps no state but this.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{SockFlag, accept4};

use super::keeper_wire::{self as wire, Answer, Name, Request};
use super::socket::take_turn;
use crate::config::{KEEP_MAX_S, KEEPER_CALLER_WAIT_MS, KEEPER_FILES_MAX};
use crate::error::{Error, Result};
use crate::upcall::sys;

/// How a keeper ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to, or had nothing to hold.
    Done,
    /// No successor came for this many files.
    Abandoned(usize),
}

struct Keeper {
    listener: OwnedFd,
    /// The daemon's connection and process number.
    daemon: Option<(OwnedFd, i32)>,
    files: Vec<(Name, OwnedFd)>,
    patience: Duration,
    /// When patience is over, while there is no daemon.
    deadline: Instant,
}

/// Keeps until told to go or until patience is over. `listener` listens at `directory`/`name`,
/// which goes when this ends.
///
/// # Errors
/// What keeps it from waiting; then everything is closed.
pub fn run(listener: OwnedFd, directory: &File, name: &str, patience: Duration) -> Result<End> {
    let mut keeper = Keeper {
        listener,
        daemon: None,
        files: Vec::with_capacity(KEEPER_FILES_MAX),
        patience: bounded(patience),
        deadline: Instant::now() + bounded(patience),
    };
    let (end, farewell) = keeper.keep()?;
    // Readers that wait are answered by the kernel as soon as these are closed.
    keeper.files.clear();
    // The path goes while we still listen: nobody takes it over for as long.
    let turn = directory.try_clone().map(take_turn);
    let _ = std::fs::remove_file(
        Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name),
    );
    drop(turn);
    if let Some(daemon) = farewell {
        let _ = wire::send(daemon.as_fd(), &Answer::Done(Vec::new()).encode(), &[]);
    }
    Ok(end)
}

/// Closes whatever else the daemon's own parent has left open in it: a keeper outlives them, and a
/// pipe it held would never end. To be called first, while nothing else is open.
///
/// # Errors
/// Without /proc.
pub fn close_inherited() -> std::io::Result<()> {
    let numbers: Vec<i32> = std::fs::read_dir("/proc/self/fd")?
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    for number in numbers.into_iter().filter(|number| *number > 2) {
        // The listing's own number is closed by now.
        if std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok() {
            drop(sys::adopt(crate::engine::Fd(number)));
        }
    }
    Ok(())
}

fn bounded(patience: Duration) -> Duration {
    patience.min(Duration::from_secs(KEEP_MAX_S))
}

impl Keeper {
    /// How it ended, and who waits to hear of it.
    fn keep(&mut self) -> Result<(End, Option<OwnedFd>)> {
        loop {
            let (has_message, has_caller) = self.wait()?;
            if has_message && let Some((daemon, process)) = self.daemon.take() {
                match self.hear(daemon.as_fd()) {
                    Ok(Some(Request::Bye)) => return Ok((End::Done, Some(daemon))),
                    Ok(Some(_)) => self.daemon = Some((daemon, process)),
                    // It is gone, or makes no sense: a successor is better.
                    Ok(None) | Err(_) if self.files.is_empty() => return Ok((End::Done, None)),
                    Ok(None) | Err(_) => self.deadline = Instant::now() + self.patience,
                }
            }
            if has_caller {
                self.admit();
            }
            if self.daemon.is_none() && Instant::now() >= self.deadline {
                return Ok((End::Abandoned(self.files.len()), None));
            }
        }
    }

    /// Waits for the daemon, for callers, or for the end of patience.
    fn wait(&self) -> Result<(bool, bool)> {
        let mut polled = vec![PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
        let mut timeout = PollTimeout::NONE;
        match &self.daemon {
            Some((daemon, _)) => polled.push(PollFd::new(daemon.as_fd(), PollFlags::POLLIN)),
            None => {
                let left = self.deadline.saturating_duration_since(Instant::now());
                let left_ms = left.as_millis().min(i32::MAX as u128 - 1) as i32 + 1;
                timeout = PollTimeout::try_from(left_ms).unwrap_or(PollTimeout::MAX);
            }
        }
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::system(errno as i32, "cannot wait")),
        }
        let is_ready = |at: usize| polled.get(at).is_some_and(|it| it.any().unwrap_or(false));
        Ok((is_ready(1), is_ready(0)))
    }

    /// Does what the daemon asks for and answers, except for BYE; `None` when it has hung up.
    fn hear(&mut self, daemon: BorrowedFd<'_>) -> Result<Option<Request>> {
        let (bytes, files) = wire::receive(daemon)?;
        if bytes.is_empty() {
            return Ok(None);
        }
        let request = match Request::parse(&bytes) {
            Ok(request) => request,
            Err(error) => {
                wire::send(daemon, &Answer::Refused(error.to_string()).encode(), &[])?;
                return Err(error);
            }
        };
        let answer = match &request {
            Request::Bye => return Ok(Some(request)),
            Request::Take { patience_ms } => {
                self.patience = bounded(Duration::from_millis(*patience_ms));
                let names = self.files.iter().map(|(name, _)| name.clone()).collect();
                let files: Vec<_> = self.files.iter().map(|(_, file)| file.as_fd()).collect();
                wire::send(daemon, &Answer::Done(names).encode(), &files)?;
                return Ok(Some(request));
            }
            Request::Put(name) => self.put(name, files),
            Request::Drop(name) => {
                self.files.retain(|(known, _)| known != name);
                Answer::Done(Vec::new())
            }
        };
        wire::send(daemon, &answer.encode(), &[])?;
        Ok(Some(request))
    }

    fn put(&mut self, name: &Name, mut files: Vec<OwnedFd>) -> Answer {
        let (Some(file), true) = (files.pop(), files.is_empty()) else {
            return Answer::Refused("PUT comes with one file".into());
        };
        self.files.retain(|(known, _)| known != name);
        if self.files.len() == KEEPER_FILES_MAX {
            return Answer::Refused(format!(
                "{KEEPER_FILES_MAX} files are held, which is the most"
            ));
        }
        self.files.push((name.clone(), file));
        Answer::Done(Vec::new())
    }

    /// Takes a caller on, or tells it that another is there.
    fn admit(&mut self) {
        let Ok(number) = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) else { return };
        let caller = sys::adopt(crate::engine::Fd(number));
        let refusal = match (wire::check_peer(&caller), &self.daemon) {
            (Err(error), _) => error.to_string(),
            (Ok(_), Some((_, process))) => format!("busy with process {process}"),
            (Ok(peer), None) => {
                self.daemon = Some((caller, peer.pid()));
                return;
            }
        };
        // A caller whose request is never read would see a broken connection, not the refusal.
        let _ = wire::limit_wait(&caller, KEEPER_CALLER_WAIT_MS);
        let _ = wire::receive(caller.as_fd());
        let _ = wire::send(caller.as_fd(), &Answer::Refused(refusal).encode(), &[]);
    }
}
