//! Lazily loaded images in use: mounted for the first layer that stands on one, unmounted after the
//! last.
//!
//! Users are names: a user that comes or goes twice counts once, so a restart that finds things
//! half done cannot miscount. The daemon mounts and unmounts; if it cannot, the mount is taken away
//! here all the same, so that nothing stays mounted that Docker believes gone.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::docker_image;
use super::docker_origin::{ImageStore, Origin, Start};
use super::layers::Layers;
use super::overlay;
use crate::config;
use crate::error::{Error, Result};

/// What the plugin needs done by others.
pub struct Service {
    /// Registers an image from its entry, if need be, and mounts it at a directory.
    pub mount: Box<dyn Fn(&Value, &Path) -> Result<()> + Send + Sync>,
    /// Unmounts it and, with its last mount, forgets it. `NotFound` if nothing is known of it.
    pub unmount: Box<dyn Fn(&Path) -> Result<()> + Send + Sync>,
    /// Makes sure that the registry in an entry answers.
    pub reach: Box<dyn Fn(&Value) -> Result<()> + Send + Sync>,
    /// Tells an operator.
    pub say: Box<dyn Fn(&str) + Send + Sync>,
    /// The domain in which images share blobs; empty for none.
    pub domain: String,
}

/// The users of each image.
pub struct Images {
    users: Mutex<HashMap<String, Arc<Mutex<BTreeSet<String>>>>>,
    service: Arc<Service>,
    store: ImageStore,
}

impl Images {
    /// Nothing is in use.
    pub fn new(service: Arc<Service>, store: ImageStore) -> Images {
        Images { users: Mutex::default(), service, store }
    }

    /// Where the image of a layer comes from.
    pub fn origin(&self, layers: &Layers, id: &str) -> Result<Origin> {
        let record = layers.record(id)?;
        let diff_id = record.applied.as_ref().and_then(|applied| applied.diff_id.as_deref());
        self.store.origin(diff_id.unwrap_or_default())
    }

    /// Notes a user of an image that is mounted already.
    pub fn adopt(&self, id: &str, user: &str) {
        lock(&self.slot(id)).insert(user.to_owned());
    }

    /// Mounts the image of layer `id` unless it is mounted.
    pub fn acquire(&self, layers: &Layers, id: &str, user: &str) -> Result<()> {
        let slot = self.slot(id);
        let mut users = lock(&slot);
        if !overlay::is_mounted(&layers.path(id, "image")) {
            self.mount(layers, id)
                .map_err(|error| error.context("the image cannot be mounted lazily"))?;
        }
        users.insert(user.to_owned());
        Ok(())
    }

    /// Unmounts the image if nobody uses it now.
    pub fn release(&self, layers: &Layers, id: &str, user: &str) -> Result<()> {
        let slot = self.slot(id);
        let mut users = lock(&slot);
        users.remove(user);
        let place = layers.path(id, "image");
        match users.is_empty() && overlay::is_mounted(&place) {
            true => self.unmount(&place),
            false => Ok(()),
        }
    }

    /// Unmounts the image whoever uses it, and lets the daemon forget it, should it still know it.
    pub fn forget(&self, layers: &Layers, id: &str) -> Result<()> {
        let slot = self.slot(id);
        let mut users = lock(&slot);
        users.clear();
        self.users.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        self.unmount(&layers.path(id, "image"))
    }

    fn slot(&self, id: &str) -> Arc<Mutex<BTreeSet<String>>> {
        let mut users = self.users.lock().unwrap_or_else(PoisonError::into_inner);
        users.entry(id.to_owned()).or_default().clone()
    }

    /// The daemon may be starting, or starting again: it is waited for, unless the operator wants
    /// to know at once.
    fn mount(&self, layers: &Layers, id: &str) -> Result<()> {
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
        if origin.start == Start::Fail {
            (self.service.reach)(&entry)?;
            return (self.service.mount)(&entry, &place);
        }
        let wait = Duration::from_millis(config::DOCKER_DAEMON_WAIT_MS);
        let deadline = Instant::now() + wait;
        loop {
            match (self.service.mount)(&entry, &place) {
                Err(error @ (Error::Unavailable { .. } | Error::Deadline(_))) => {
                    if Instant::now() >= deadline {
                        return Err(error.context(format_args!("waited {} s", wait.as_secs())));
                    }
                    std::thread::sleep(Duration::from_millis(config::DOCKER_DAEMON_LOOK_MS));
                }
                result => return result,
            }
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

fn lock(slot: &Mutex<BTreeSet<String>>) -> MutexGuard<'_, BTreeSet<String>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}
