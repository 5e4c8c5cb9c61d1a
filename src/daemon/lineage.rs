//! One daemon among its predecessors and successors: what it takes over, when it begins, and what
//! it leaves.
//!
//! The steps of a life, whichever way it began: the device is found or given, what was registered
//! is read back, the kernel is asked to send again what nobody answered, the doors open. Crash,
//! restart and upgrade differ only in who gives the device: a keeper, systemd, or a supervisor.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use serde_json::{Value, json};

use super::control::ControlPlane;
use super::cookies::Cookies;
use super::doors::Cachefiles;
use super::keeper::{CACHEFILES, Ending, Keeper};
use super::keeper_wire::duplicate;
use super::mounts::{self, Changed};
use super::remember::{Remembered, RememberedMount};
use super::succession::Restoration;
use super::succession_device;
use super::supervisor::{self, Handed, State};
use crate::blob::journal::Journal;
use crate::config::Config;
use crate::engine::mesh::Sender;
use crate::error::{Error, Result};
use crate::upcall::device::Device;
use crate::upcall::objects::DoorMail;

/// What a daemon has from its predecessors, and what it will leave. Shared by `Arc`.
pub struct Lineage {
    config: Config,
    journal: Arc<Journal>,
    keeper: Keeper,
    /// What is registered, on disk.
    pub remembered: Arc<Remembered>,
    cachefiles: Option<Cachefiles>,
    /// Whether a supervisor is to give the device.
    is_awaited: bool,
    doors: OnceLock<Vec<Sender<DoorMail>>>,
    control: OnceLock<Weak<ControlPlane>>,
    restoration: Mutex<Option<Restoration>>,
}

impl Lineage {
    /// Reads what is remembered. `cachefiles` is that door, if it is open.
    ///
    /// # Errors
    /// A state directory of no use.
    pub fn begin(
        config: &Config,
        keeper: Keeper,
        cachefiles: Option<Cachefiles>,
        journal: &Arc<Journal>,
    ) -> Result<Lineage> {
        let (remembered, flaws) = Remembered::open(&config.state_dir)?;
        flaws.iter().for_each(|flaw| journal.error(flaw.to_string()));
        let is_awaited = cachefiles.as_ref().is_some_and(|door| door.device.get().is_none());
        Ok(Lineage {
            config: config.clone(),
            journal: Arc::clone(journal),
            keeper,
            remembered: Arc::new(remembered),
            cachefiles,
            is_awaited,
            doors: OnceLock::new(),
            control: OnceLock::new(),
            restoration: Mutex::default(),
        })
    }

    /// Whether this daemon waits for a supervisor.
    pub fn is_awaited(&self) -> bool {
        self.is_awaited
    }

    /// The keeper.
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// Who remembers the places images are mounted at.
    pub fn mounts_changed(&self) -> Changed {
        let (remembered, journal) = (Arc::clone(&self.remembered), Arc::clone(&self.journal));
        Box::new(move |domain_id, id, places| {
            let mount = |(place, door): &(mounts::Place, mounts::Door)| RememberedMount {
                namespace: place.namespace,
                mountpoint: place.mountpoint.clone(),
                door: door.name().to_owned(),
            };
            let (key, mounts) = ((domain_id.to_owned(), id.to_owned()), places.iter().map(mount));
            if let Err(error) = remembered.set_mounts(&key, mounts.collect()) {
                journal.error(format!("{domain_id}/{id}, its mounts are not remembered: {error}"));
            }
        })
    }

    /// Tells who serves and who knows what is registered; before `start`.
    pub fn attach(&self, doors: Vec<Sender<DoorMail>>, control: &Arc<ControlPlane>) {
        self.doors.get_or_init(|| doors);
        self.control.get_or_init(|| Arc::downgrade(control));
    }

    /// Begins to serve: READY to RUNNING. What comes back from disk does so behind this.
    ///
    /// # Errors
    /// What the kernel says to `restore`.
    pub fn start(&self) -> Result<()> {
        if self.is_awaited {
            // The predecessor went on after its state was saved.
            self.read_again();
        }
        self.bring_back();
        let untaken = self.keeper.release_untaken();
        if !untaken.is_empty() {
            self.journal.error(format!(
                "what the last daemon left for others is closed: {}",
                untaken.join(", ")
            ));
        }
        let Some(device) = self.device() else { return Ok(()) };
        if device.is_inherited() {
            // What is asked for from now on finds its image registered, or waits for it.
            device.restore()?;
        }
        for door in self.doors.get().into_iter().flatten() {
            // Nothing has been sent there before.
            let _ = door.send(DoorMail::Begin(Arc::clone(device)));
        }
        Ok(())
    }

    /// Gives the supervisor the device and all that is registered.
    ///
    /// # Errors
    /// `Unsupported` without a device; what the supervisor's socket says.
    pub fn save(&self) -> Result<()> {
        let nothing = || Error::Unsupported("this daemon has nothing to hand over".into());
        let supervisor = self.config.supervisor.as_ref().ok_or_else(nothing)?;
        let door = self.cachefiles.as_ref().ok_or_else(nothing)?;
        let file = self.device().and_then(|device| device.file()).ok_or_else(nothing)?;
        let state = State {
            sluice: State::VERSION,
            door: CACHEFILES.to_owned(),
            fscache_dir: Some(succession_device::canonical(&door.directory)?),
            state_dir: self.state_dir(),
            images: self.remembered.records(),
        };
        supervisor::save(supervisor, &Handed { file: duplicate(file)?, state })
    }

    /// Takes the device and what was registered from the supervisor: INIT to READY.
    ///
    /// # Errors
    /// What the supervisor gives is of no use; then another try may do better.
    pub fn take_over(&self) -> Result<()> {
        let (Some(supervisor), Some(door)) = (&self.config.supervisor, &self.cachefiles) else {
            return Err(Error::Unsupported("this daemon has no supervisor, or no door".into()));
        };
        let Handed { file, state } = supervisor::fetch(supervisor)?;
        if state.door != CACHEFILES {
            return Err(Error::Unsupported(format!("the state is of the door {:?}", state.door)));
        }
        let bound_to = state.fscache_dir.as_deref();
        let device = Arc::new(succession_device::handed(file, &door.directory, bound_to)?);
        if state.state_dir == self.state_dir() {
            // What is on disk is newer than a state that somebody has held for long.
            self.read_again();
        } else {
            for record in state.images {
                self.remembered.adopt(record)?;
            }
        }
        if door.device.set(device).is_err() {
            return Err(Error::Exists("this daemon has a device".into()));
        }
        self.bring_back();
        self.wait();
        Ok(())
    }

    /// How this daemon ends: at a hand-over, readers wait for a successor.
    pub fn ending(&self, is_final: bool) -> Ending {
        let is_held = self.keeper.is_there() || self.config.supervisor.is_some();
        let is_mounted = self.remembered.is_any_mounted()
            || self.device().is_some() && Cookies::of_kernel().any_in_use();
        match is_held && is_mounted && !is_final {
            true => Ending::HandOver,
            false => Ending::Done,
        }
    }

    /// The end. When this returns and nobody waits for a successor, everything is closed but the
    /// device, which the callers hold.
    pub fn end(&self, ending: Ending) {
        if let Some(restoration) = self.restoration().take() {
            restoration.abandon();
        }
        self.keeper.finish(ending);
    }

    /// For statistics.
    pub fn document(&self) -> Value {
        let control = self.control.get().and_then(Weak::upgrade);
        json!({
            "keeper": self.keeper.kind(),
            "inherited": self.device().is_some_and(|device| device.is_inherited()),
            "restored": control.map(|control| control.restored.document()),
        })
    }

    /// Waits until everything has come back or has been skipped.
    pub fn wait(&self) {
        let restoration = self.restoration().take();
        if let Some(restoration) = restoration {
            restoration.finish();
        }
    }

    fn device(&self) -> Option<&Arc<Device>> {
        self.cachefiles.as_ref()?.device.get()
    }

    fn bring_back(&self) {
        self.wait();
        if let Some(control) = self.control.get().and_then(Weak::upgrade) {
            *self.restoration() = Some(Restoration::begin(&control, &self.remembered));
        }
    }

    fn read_again(&self) {
        match self.remembered.read_again() {
            Ok(flaws) => flaws.iter().for_each(|flaw| self.journal.error(flaw.to_string())),
            Err(error) => self.journal.error(error.to_string()),
        }
    }

    fn state_dir(&self) -> PathBuf {
        let directory = &self.config.state_dir;
        directory.canonicalize().unwrap_or_else(|_| directory.clone())
    }

    fn restoration(&self) -> std::sync::MutexGuard<'_, Option<Restoration>> {
        self.restoration.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
