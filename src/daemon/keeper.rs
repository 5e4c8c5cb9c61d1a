//! What must outlive the daemon: open files, held elsewhere under a name.
//!
//! One interface over two keepers: a process of our own (`keeper_link.rs`, `keeper_process.rs`) and
//! systemd's store (`keeper_systemd.rs`). A daemon asks for what its predecessor left with
//! [`Keeper::take`], has things held with [`Keeper::put`], and at its end says whether a successor
//! is expected. The keeper's copy of a file is one more holder of it: the kernel sees a device or
//! group closed only when daemon *and* keeper have let go.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use super::keeper_link::{Link, Place};
use super::keeper_systemd::{Environment, Systemd};
use super::keeper_wire::{self as wire, Name};
use crate::blob::journal::Journal;
use crate::error::Result;

/// The name of the file of /dev/cachefiles.
pub const CACHEFILES: &str = "cachefiles";

/// How a daemon ends, for what it has had held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Nothing is mounted, or nobody shall wait: everything is closed.
    Done,
    /// Readers wait for a successor, for a while.
    HandOver,
}

/// What holds files for the daemon. Shared by `Arc`.
pub struct Keeper {
    way: Way,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What the predecessor left and nobody has taken.
    left: BTreeMap<Name, OwnedFd>,
    /// All that is held.
    names: BTreeSet<Name>,
}

enum Way {
    Process(Link),
    Systemd(Systemd),
    Nobody,
}

impl Keeper {
    /// Finds or starts a keeper. systemd is one where it offers a store (`environment`); it is
    /// never asked for both. Without `place` nothing outlives the daemon.
    ///
    /// # Errors
    /// `Busy` when another daemon uses the keeper; what keeps one from being started.
    pub fn open(
        place: Option<Place>,
        environment: &Environment,
        journal: &Arc<Journal>,
    ) -> Result<Keeper> {
        let (way, files) = match (place, &environment.notify_socket) {
            (None, _) => (Way::Nobody, Vec::new()),
            (Some(_), Some(socket)) if environment.store_size.is_some() => {
                (Way::Systemd(Systemd::at(socket)?), environment.files())
            }
            (Some(place), _) => {
                let (link, files) = Link::open(place, journal)?;
                (Way::Process(link), files)
            }
        };
        let names = files.iter().map(|(name, _)| name.clone()).collect();
        let state = State { left: files.into_iter().collect(), names };
        Ok(Keeper { way, state: Mutex::new(state) })
    }

    /// A keeper that keeps nothing.
    pub fn nobody() -> Keeper {
        Keeper { way: Way::Nobody, state: Mutex::default() }
    }

    /// Whether anything put here outlives the daemon.
    pub fn is_there(&self) -> bool {
        !matches!(self.way, Way::Nobody)
    }

    /// Its name, for statistics.
    pub fn kind(&self) -> &'static str {
        match self.way {
            Way::Process(_) => "process",
            Way::Systemd(_) => "systemd",
            Way::Nobody => "none",
        }
    }

    /// What the predecessor left under a name; given once. It stays held.
    pub fn take(&self, name: &str) -> Option<OwnedFd> {
        self.lock().left.remove(&Name::new(name).ok()?)
    }

    /// Has a file held, in place of another of that name.
    ///
    /// # Errors
    /// A name that is none, too many files, a keeper that does not answer. One that dies is
    /// replaced and given everything again.
    pub fn put(&self, name: &str, file: BorrowedFd<'_>) -> Result<()> {
        let name = Name::new(name)?;
        self.lock().left.remove(&name);
        match &self.way {
            Way::Process(link) => link.put(&name, wire::duplicate(file)?),
            Way::Systemd(systemd) => systemd.put(&name, file),
            Way::Nobody => Ok(()),
        }?;
        self.lock().names.insert(name);
        Ok(())
    }

    /// Has a file closed. That there is none is no error.
    pub fn release(&self, name: &str) -> Result<()> {
        let name = Name::new(name)?;
        let mut state = self.lock();
        state.left.remove(&name);
        state.names.remove(&name);
        drop(state);
        match &self.way {
            Way::Process(link) => link.release(&name),
            Way::Systemd(systemd) => systemd.release(&name),
            Way::Nobody => Ok(()),
        }
    }

    /// Has everything closed that the predecessor left and nobody took: whoever waits for an answer
    /// through it waits in vain. Gives the names.
    pub fn release_untaken(&self) -> Vec<String> {
        let left = std::mem::take(&mut self.lock().left);
        let names: Vec<String> = left.keys().map(|name| name.as_str().to_owned()).collect();
        drop(left);
        for name in &names {
            // A keeper that is gone holds nothing any more.
            let _ = self.release(name);
        }
        names
    }

    /// The end: what is held is closed, or waits for a successor.
    pub fn finish(&self, ending: Ending) {
        let names = std::mem::take(&mut *self.lock()).names;
        match &self.way {
            Way::Process(link) => link.close(ending == Ending::Done),
            Way::Systemd(systemd) if ending == Ending::Done => {
                for name in names {
                    let _ = systemd.release(&name);
                }
            }
            Way::Systemd(_) | Way::Nobody => {}
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Keeper {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keeper by {}", self.kind())
    }
}
