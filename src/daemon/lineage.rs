//! One daemon among its predecessors and successors: what it takes over, when it begins, and what
//! it leaves.
//!
//! The steps of a life, whichever way it began: the device is found or given, what was registered
//! is read back, the kernel is asked to send again what nobody answered, the doors open. Crash,
//! restart and upgrade differ only in who gives the device: a keeper, systemd, or a supervisor.

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use serde_json::{Value, json};

use super::control::ControlPlane;
use super::cookies::Cookies;
use super::doors::{Cachefiles, Doors};
use super::keeper::{CACHEFILES, Ending, FANOTIFY, Keeper};
use super::keeper_wire::duplicate;
use super::mounts::{self, Changed};
use super::remember::{Remembered, RememberedMount};
use super::succession::Restoration;
use super::succession_device;
use super::supervisor::{self, Handed, State};
use super::witness;
use crate::blob::journal::Journal;
use crate::config::{Config, EVENT_NUMBER_MAX};
use crate::engine::mesh::Sender;
use crate::error::{Error, Result};
use crate::upcall::binder::Binder;
use crate::upcall::device::Device;
use crate::upcall::objects::DoorMail;
use crate::upcall::watch::WatchMail;

/// What a daemon has from its predecessors, and what it will leave. Shared by `Arc`.
pub struct Lineage {
    config: Config,
    journal: Arc<Journal>,
    keeper: Keeper,
    /// What is registered, on disk.
    pub remembered: Arc<Remembered>,
    cachefiles: Option<Cachefiles>,
    binder: Option<Arc<Binder>>,
    /// Numbers of events whose readers are served.
    events: Vec<i32>,
    /// Where else the predecessor's witness may be.
    former_state_dir: OnceLock<PathBuf>,
    /// Whether a supervisor is to give the device or the group.
    is_awaited: bool,
    doors: OnceLock<Vec<Sender<DoorMail>>>,
    watches: OnceLock<Vec<Sender<WatchMail>>>,
    control: OnceLock<Weak<ControlPlane>>,
    restoration: Mutex<Option<Restoration>>,
}

/// What a supervisor gave, for the door it is of.
enum Taken<'a> {
    Device(&'a Cachefiles, Arc<Device>),
    Group(&'a Binder, OwnedFd),
}

impl Lineage {
    /// Reads what is remembered. `events` are the numbers of those that a dead daemon had read and
    /// that are served.
    ///
    /// # Errors
    /// A state directory of no use.
    pub fn begin(
        config: &Config,
        keeper: Keeper,
        doors: &Doors,
        events: Vec<i32>,
        journal: &Arc<Journal>,
    ) -> Result<Lineage> {
        let (remembered, flaws) = Remembered::open(&config.state_dir)?;
        flaws.iter().for_each(|flaw| journal.error(flaw.to_string()));
        let cachefiles = doors.cachefiles.clone();
        let binder = doors.fanotify.as_ref().map(|door| Arc::clone(&door.binder));
        let is_awaited = cachefiles.as_ref().is_some_and(|door| door.device.get().is_none())
            || binder.as_ref().is_some_and(|binder| binder.group().is_awaited());
        Ok(Lineage {
            config: config.clone(),
            journal: Arc::clone(journal),
            keeper,
            remembered: Arc::new(remembered),
            cachefiles,
            binder,
            events,
            former_state_dir: OnceLock::new(),
            is_awaited,
            doors: OnceLock::new(),
            watches: OnceLock::new(),
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
    pub fn attach(
        &self,
        doors: Vec<Sender<DoorMail>>,
        watches: Vec<Sender<WatchMail>>,
        control: &Arc<ControlPlane>,
    ) {
        self.doors.get_or_init(|| doors);
        self.watches.get_or_init(|| watches);
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
        if self.is_awaited {
            self.begin_watching();
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

    /// Gives the supervisor the device, or the group where there is no device, and all that is
    /// registered.
    ///
    /// # Errors
    /// `Unsupported` without either; what the supervisor's socket says.
    pub fn save(&self) -> Result<()> {
        let nothing = || Error::Unsupported("this daemon has nothing to hand over".into());
        let supervisor = self.config.supervisor.as_ref().ok_or_else(nothing)?;
        let (door, directory, file) = match (&self.cachefiles, &self.binder) {
            (Some(door), _) => {
                let file = self.device().and_then(|device| device.file()).ok_or_else(nothing)?;
                (CACHEFILES, &door.directory, file)
            }
            (None, Some(binder)) if !binder.group().is_awaited() => {
                (FANOTIFY, &self.config.cache_dir, binder.group().as_fd())
            }
            _ => return Err(nothing()),
        };
        let state = State {
            sluice: State::VERSION,
            door: door.to_owned(),
            cache_dir: succession_device::canonical(directory)?,
            state_dir: self.state_dir(),
            images: self.remembered.records(),
        };
        supervisor::save(supervisor, &Handed { file: duplicate(file)?, state })
    }

    /// Takes the device or group and what was registered from the supervisor: INIT to READY.
    ///
    /// # Errors
    /// What the supervisor gives is of no use; then another try may do better.
    pub fn take_over(&self) -> Result<()> {
        let alone = || Error::Unsupported("this daemon has no supervisor, or no door".into());
        let supervisor = self.config.supervisor.as_ref().ok_or_else(alone)?;
        if self.cachefiles.is_none() && self.binder.is_none() {
            return Err(alone());
        }
        let Handed { file, state } = supervisor::fetch(supervisor)?;
        let taken = match (state.door.as_str(), &self.cachefiles, &self.binder) {
            (CACHEFILES, Some(door), _) => {
                succession_device::check_same(&door.directory, &state.cache_dir)?;
                Taken::Device(door, Arc::new(Device::of(file).inherited()))
            }
            (FANOTIFY, None, Some(binder)) => {
                succession_device::check_same(&self.config.cache_dir, &state.cache_dir)?;
                Taken::Group(binder, file)
            }
            (other, ..) => {
                let text = format!("the state is of the door {other:?}, which is not open here");
                return Err(Error::Unsupported(text));
            }
        };
        if state.state_dir == self.state_dir() {
            // What is on disk is newer than a state that somebody has held for long.
            self.read_again();
        } else {
            self.former_state_dir.get_or_init(|| state.state_dir);
            for record in state.images {
                self.remembered.adopt(record)?;
            }
        }
        match taken {
            Taken::Device(door, device) => door
                .device
                .set(device)
                .map_err(|_| Error::Exists("this daemon has a device".into()))?,
            Taken::Group(binder, group) => binder.take_over(group)?,
        }
        self.bring_back();
        self.wait();
        Ok(())
    }

    /// Begins to take the events of a group that was given; the predecessor has ended. Whom it left
    /// waiting is served first, and whom nobody knows of gets what there is.
    fn begin_watching(&self) {
        let (Some(binder), Some(watches)) = (&self.binder, self.watches.get()) else { return };
        if self.cachefiles.is_some() {
            return;
        }
        let mut kept = self.events.clone();
        let directories = [Some(&self.config.state_dir), self.former_state_dir.get()];
        for directory in directories.into_iter().flatten() {
            let bequest = witness::collect(directory);
            kept.extend(bequest.events.iter().map(|(_, number)| *number));
            bequest.serve(watches, &self.journal);
        }
        let lost = binder.group().let_go(EVENT_NUMBER_MAX, &kept);
        if lost > 0 {
            self.journal.error(format!("{lost} readers of a former daemon get what is there"));
        }
        for watch in watches {
            let _ = watch.send(WatchMail::Begin);
        }
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
