//! Lazily loaded images in use: mounted for the first layer that stands on one, unmounted some
//! seconds after the last.
//!
//! Docker gets and puts back a layer several times on the way to a running container; an image that
//! went each time would be registered and mounted anew each time. Users are names: one that comes
//! or goes twice counts once, so a restart that finds things half done cannot miscount. The daemon
//! mounts and unmounts; if it cannot, the mount is taken away here all the same, so that nothing
//! stays mounted that Docker believes gone.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::docker_image;
use super::docker_origin::{ImageStore, Origin};
use super::layers::Layers;
use super::overlay;
use super::probe;
use super::start::{Policy, Start, Starts};
use crate::config;
use crate::error::{Error, Result};

/// Mounts the image of an entry at a directory.
pub type MountCall = Box<dyn Fn(&Value, &Path) -> Result<()> + Send + Sync>;
/// Unmounts a directory.
pub type UnmountCall = Box<dyn Fn(&Path) -> Result<()> + Send + Sync>;
/// Looks at the registry of an entry.
pub type ReachCall = Box<dyn Fn(&Value) -> Result<()> + Send + Sync>;

/// What the plugin needs done by others.
pub struct Service {
    /// Registers an image from its entry, if need be, and mounts it at a directory.
    pub mount: MountCall,
    /// Unmounts it and, with its last mount, forgets it. `NotFound` if nothing is known of it.
    pub unmount: UnmountCall,
    /// Makes sure that the registry in an entry answers.
    pub reach: ReachCall,
    /// How starts went.
    pub starts: Starts,
    /// Tells an operator.
    pub say: Box<dyn Fn(&str) + Send + Sync>,
    /// The domain in which images share blobs; empty for none.
    pub domain: String,
}

/// The users of each image.
pub struct Images {
    slots: Mutex<HashMap<String, Arc<Mutex<Slot>>>>,
    /// Images that are mounted and have no users.
    idle: Mutex<BTreeSet<String>>,
    /// Told when there is one more.
    idle_changed: Condvar,
    service: Arc<Service>,
    store: ImageStore,
}

/// One image.
#[derive(Default)]
struct Slot {
    users: BTreeSet<String>,
    /// When the last user went, while it is mounted.
    idle_since: Option<Instant>,
    /// How it went when it was mounted last, or was to be.
    start: Option<Start>,
}

impl Images {
    /// Nothing is in use.
    pub fn new(service: Arc<Service>, store: ImageStore) -> Images {
        let (slots, idle, idle_changed) = Default::default();
        Images { slots, idle, idle_changed, service, store }
    }

    /// Where the image of a layer comes from.
    pub fn origin(&self, layers: &Layers, id: &str) -> Result<Origin> {
        let record = layers.record(id)?;
        let diff_id = record.applied.as_ref().and_then(|applied| applied.diff_id.as_deref());
        self.store.origin(diff_id.unwrap_or_default())
    }

    /// How its last start went; nothing if nobody wanted it since this process began.
    pub fn start(&self, id: &str) -> Option<Start> {
        lock(&self.slot(id)).start.clone()
    }

    /// All starts, for people.
    pub fn starts(&self) -> String {
        self.service.starts.summary()
    }

    /// Notes a user of an image that is mounted already.
    pub fn adopt(&self, id: &str, user: &str) {
        lock(&self.slot(id)).users.insert(user.to_owned());
    }

    /// Mounts the image of layer `id` unless it is mounted.
    pub fn acquire(&self, layers: &Layers, id: &str, user: &str) -> Result<()> {
        let slot = self.slot(id);
        let mut slot = lock(&slot);
        if !overlay::is_mounted(&layers.path(id, "image")) {
            let (start, outcome) = match self.mount(layers, id) {
                Ok(start) => (start, Ok(())),
                Err(error) => (Start::Failed(error.to_string(), Instant::now()), Err(error)),
            };
            self.service.starts.note(&start);
            slot.start = Some(start);
            outcome.map_err(|error| error.context("the image cannot be mounted lazily"))?;
        }
        slot.idle_since = None;
        slot.users.insert(user.to_owned());
        Ok(())
    }

    /// Takes a user away; an image without users is unmounted by a later `sweep`.
    pub fn release(&self, layers: &Layers, id: &str, user: &str) {
        let slot = self.slot(id);
        let mut slot = lock(&slot);
        slot.users.remove(user);
        if slot.users.is_empty() && overlay::is_mounted(&layers.path(id, "image")) {
            slot.idle_since = Some(Instant::now());
            lock(&self.idle).insert(id.to_owned());
            self.idle_changed.notify_all();
        }
    }

    /// Unmounts what has had no users for so long.
    pub fn sweep(&self, layers: &Layers, idle: Duration) -> Result<()> {
        let ids: Vec<String> = lock(&self.idle).iter().cloned().collect();
        let mut outcome = Ok(());
        for id in ids {
            let slot = self.slot(&id);
            let mut slot = lock(&slot);
            if slot.idle_since.is_some_and(|since| since.elapsed() < idle) {
                continue;
            }
            lock(&self.idle).remove(&id);
            if slot.idle_since.take().is_some() {
                outcome = outcome.and(self.unmount(&layers.path(&id, "image")));
            }
        }
        outcome
    }

    /// Waits until there is something to sweep, not longer than `patience`.
    pub fn wait_for_idle(&self, patience: Duration) {
        let is_empty = |idle: &mut BTreeSet<String>| idle.is_empty();
        drop(self.idle_changed.wait_timeout_while(lock(&self.idle), patience, is_empty));
    }

    /// Unmounts the image whoever uses it, and lets the daemon forget it, should it still know it.
    pub fn forget(&self, layers: &Layers, id: &str) -> Result<()> {
        let slot = self.slot(id);
        let mut slot = lock(&slot);
        *slot = Slot::default();
        lock(&self.slots).remove(id);
        self.unmount(&layers.path(id, "image"))
    }

    fn slot(&self, id: &str) -> Arc<Mutex<Slot>> {
        lock(&self.slots).entry(id.to_owned()).or_default().clone()
    }

    /// The daemon may be starting, or starting again: it is waited for, unless the operator wants
    /// to know at once. Who wants more than to wait wants the registry to answer, too.
    fn mount(&self, layers: &Layers, id: &str) -> Result<Start> {
        let origin = self.origin(layers, id)?;
        let directory = layers.path(id, "");
        let entry = docker_image::entry(id, &self.service.domain, &directory, &origin)?;
        let place = layers.path(id, "image");
        match std::fs::create_dir(&place) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(Error::io(&error, format!("cannot make {}", place.display())));
            }
            _ => {}
        }
        let attempt = || {
            if origin.start != Policy::Wait {
                (self.service.reach)(&entry)?;
            }
            (self.service.mount)(&entry, &place)
        };
        let Some(why) = self.persist(origin.start, attempt)? else { return Ok(Start::Lazy) };
        if origin.start != Policy::Full {
            return Ok(Start::Waited(why));
        }
        let deadline = Instant::now() + Duration::from_millis(config::IMAGE_FULL_WAIT_MS);
        if let Err(error) = probe::everything(&place, deadline) {
            self.unmount(&place)?;
            return Err(error.context("it is wanted whole after a failure"));
        }
        Ok(Start::Full(why))
    }

    /// Tries until it works, the time is over, or trying is of no use; why it did not work at once.
    fn persist(&self, policy: Policy, attempt: impl Fn() -> Result<()>) -> Result<Option<String>> {
        let wait = Duration::from_millis(config::DOCKER_DAEMON_WAIT_MS);
        let deadline = Instant::now() + wait;
        let mut first = None;
        loop {
            let error = match attempt() {
                Ok(()) => return Ok(first),
                Err(error) => error,
            };
            let is_passing = matches!(error, Error::Unavailable { .. } | Error::Deadline(_));
            if policy == Policy::Fail || !is_passing {
                return Err(error);
            }
            if Instant::now() >= deadline {
                return Err(error.context(format_args!("waited {} s", wait.as_secs())));
            }
            if first.is_none() {
                (self.service.say)(&format!("a start waits: {error}"));
                first = Some(error.to_string());
            }
            std::thread::sleep(Duration::from_millis(config::DOCKER_DAEMON_LOOK_MS));
        }
    }

    fn unmount(&self, place: &Path) -> Result<()> {
        match (self.service.unmount)(place) {
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => {
                let place = place.display();
                (self.service.say)(&format!("{place} is unmounted without the daemon: {error}"));
            }
        }
        overlay::unmount(place)
    }
}

/// Nothing in here panics half-way through a change.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
