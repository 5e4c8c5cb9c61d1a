//! The graph driver: what Docker asks of a store of layers, as functions.
//!
//! An ordinary image is an overlay of its layers' directories. An image whose lowest layer is a
//! bootstrap stands on the EROFS mount of that image instead, and its bytes come when somebody
//! reads them. Docker gets a layer as often as it likes and puts it back as often; the count
//! survives a restart of the plugin, and what is mounted is found again: the mount itself is the
//! truth, the count is a note beside it.
//!
//! Locks: a layer's own, then an image's (`driver_images`). Waiting for the daemon under both holds
//! up nobody but those who want the same.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::changes::{self, Change};
use super::docker_image;
use super::docker_origin::ImageStore;
use super::driver_images::{Images, Service};
use super::layers::{Applied, Layers, Record, RootAttributes};
use super::overlay::{self, Overlay};
use super::stack::Stack;
use super::{pack, unpack};
use crate::error::{Error, Result};

/// The root directory of an image that says nothing about it.
const PLAIN_ROOT: RootAttributes = RootAttributes { mode: 0o755, uid: 0, gid: 0 };

/// The layers of one home directory and what is mounted of them.
pub struct Driver {
    layers: Layers,
    images: Images,
    /// How often each layer was got and not put back. Only what is mounted counts.
    uses: Mutex<HashMap<String, Arc<Mutex<u32>>>>,
    /// Names for passing users of images.
    serial: AtomicU64,
}

impl Driver {
    /// Takes up a home directory with all that is mounted in it.
    pub fn open(home: &Path, store: ImageStore, service: Arc<Service>) -> Result<Driver> {
        let driver = Driver {
            layers: Layers::open(home)?,
            images: Images::new(service, store),
            uses: Mutex::default(),
            serial: AtomicU64::new(0),
        };
        for id in driver.layers.ids() {
            if overlay::is_mounted(&driver.layers.path(&id, "merged")) {
                *lock(&driver.slot(&id)) = driver.layers.uses(&id).unwrap_or(1).max(1);
                if let Ok(Some(image)) = driver.image_below(&id) {
                    driver.images.adopt(&image, &id);
                }
            }
        }
        for id in driver.layers.ids() {
            // A user that never was: what nobody uses is unmounted later.
            driver.images.release(&driver.layers, &id, "");
        }
        Ok(driver)
    }

    /// The home directory.
    pub fn home(&self) -> &Path {
        self.layers.home()
    }

    /// A Docker that has just started holds each layer of a running container once, whatever the
    /// one before it did.
    pub fn docker_started(&self) -> Result<()> {
        for id in self.layers.ids() {
            let slot = self.slot(&id);
            let mut uses = lock(&slot);
            if *uses > 1 {
                *uses = 1;
                self.layers.set_uses(&id, 1)?;
            }
        }
        Ok(())
    }

    /// Makes an empty layer on top of `parent`.
    pub fn create(&self, id: &str, parent: Option<&str>, writable: bool) -> Result<()> {
        let root = match parent {
            Some(parent) => self.root_of(parent)?,
            None => PLAIN_ROOT,
        };
        self.layers.create(id, parent, writable, root)
    }

    /// Removes a layer and all its mounts. One that is not there is removed.
    pub fn remove(&self, id: &str) -> Result<()> {
        let slot = self.slot(id);
        let mut uses = lock(&slot);
        if !self.layers.exists(id) {
            return Ok(());
        }
        self.release(id, &mut uses)?;
        let is_image = self.layers.record(id).is_ok_and(|record| is_image(&record));
        if is_image || overlay::is_mounted(&self.layers.path(id, "image")) {
            self.images.forget(&self.layers, id)?;
        }
        self.layers.remove(id)?;
        self.uses.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        Ok(())
    }

    /// Whether there is such a layer.
    pub fn exists(&self, id: &str) -> bool {
        self.layers.exists(id)
    }

    /// Where the layer and all below it can be seen and written. Of a lowest layer that is its own
    /// directory: an image is saved and pushed by the files its tar had.
    pub fn get(&self, id: &str, label: &str) -> Result<PathBuf> {
        let slot = self.slot(id);
        let mut uses = lock(&slot);
        let record = self.layers.record(id)?;
        if record.parent.is_none() {
            return Ok(self.layers.path(id, "diff"));
        }
        let merged = self.layers.path(id, "merged");
        let mounted = match overlay::is_mounted(&merged) {
            true => Ok(()),
            false => {
                *uses = 0;
                self.mount(id, &record, label, &merged)
            }
        };
        if let Err(error) = mounted.and_then(|()| self.layers.set_uses(id, *uses + 1)) {
            if *uses == 0 {
                // Docker puts back only what it got. It is told what failed first.
                let _ = self.release(id, &mut uses);
                self.drop_unborn(id);
            }
            return Err(error);
        }
        *uses += 1;
        Ok(merged)
    }

    /// Takes back one `get`.
    pub fn put(&self, id: &str) -> Result<()> {
        let slot = self.slot(id);
        let mut uses = lock(&slot);
        if *uses > 1 {
            *uses -= 1;
            return self.layers.set_uses(id, *uses);
        }
        match self.layers.exists(id) {
            true => self.release(id, &mut uses),
            false => Ok(()),
        }
    }

    /// Unpacks a layer's tar; its size in bytes.
    pub fn apply(&self, id: &str, tar: impl Read) -> Result<u64> {
        let slot = self.slot(id);
        let uses = lock(&slot);
        let record = self.layers.record(id)?;
        if *uses > 0 {
            return Err(Error::Busy(format!(
                "layer {id} is in use: nothing can be unpacked into it"
            )));
        }
        let diff = self.layers.path(id, "diff");
        let mut tar = Hashed { source: tar, hash: record.parent.is_none().then(Sha256::new) };
        let unpacked = unpack::unpack(&diff, &self.layers.home().join("scrap"), &mut tar)?;
        let applied = Applied {
            size_bytes: unpacked.size_bytes,
            opaque_root: unpacked.opaque_root,
            diff_id: tar.hash.map(|hash| format!("sha256:{}", hex(&hash.finalize()))),
            image: match record.parent {
                None => docker_image::recognise(&diff)?,
                Some(_) => None,
            },
        };
        unpack::flush(&diff)?;
        self.layers.set_applied(id, applied)?;
        Ok(unpacked.size_bytes)
    }

    /// What `id` has on top of `parent`, to be packed.
    pub fn diff(&self, id: &str, parent: Option<&str>) -> Result<Stack> {
        let (upper, _) = self.split(id, parent)?;
        let hides = self.layers.record(&upper[upper.len() - 1]).is_ok_and(|r| is_opaque(&r));
        let roots: Vec<PathBuf> = upper.iter().map(|id| self.layers.path(id, "diff")).collect();
        Stack::open(&roots, hides)
    }

    /// Bytes of what `id` has on top of `parent`.
    pub fn diff_size(&self, id: &str, parent: Option<&str>) -> Result<u64> {
        pack::size_bytes(self.diff(id, parent)?)
    }

    /// What changed from `parent` to `id`.
    pub fn changes(&self, id: &str, parent: Option<&str>) -> Result<Vec<Change>> {
        let upper = self.diff(id, parent)?;
        let (_, lower) = self.split(id, parent)?;
        let user = format!("changes-{}", self.serial.fetch_add(1, Ordering::Relaxed));
        let image = lower.last().filter(|id| self.layers.record(id).is_ok_and(|r| is_image(&r)));
        if let Some(image) = image {
            self.images.acquire(&self.layers, image, &user)?;
        }
        let root =
            |id: &String| self.layers.path(id, if Some(id) == image { "image" } else { "diff" });
        let roots: Vec<PathBuf> = lower.iter().map(root).collect();
        let changes = Stack::open(&roots, false).and_then(|lower| changes::changes(upper, lower));
        if let Some(image) = image {
            self.images.release(&self.layers, image, &user);
        }
        changes
    }

    /// What `docker inspect` shows.
    pub fn metadata(&self, id: &str) -> Result<BTreeMap<String, String>> {
        let record = self.layers.record(id)?;
        let shown = |id: &str, name: &str| self.layers.path(id, name).display().to_string();
        let mut metadata = BTreeMap::new();
        let mut note = |key: &str, value: String| metadata.insert(key.to_owned(), value);
        note("UpperDir", shown(id, "diff"));
        if record.parent.is_some() {
            note("MergedDir", shown(id, "merged"));
            note("WorkDir", shown(id, "work"));
            let mut lower = Vec::new();
            for (id, record) in self.layers.ancestors(id)? {
                lower.push(shown(&id, if is_image(&record) { "image" } else { "diff" }));
            }
            note("LowerDir", lower.join(":"));
        }
        let image = if is_image(&record) { Some(id.to_owned()) } else { self.image_below(id)? };
        if let Some(image) = image {
            note("LazyImage", shown(&image, "diff/image/image.boot"));
            if let Some(start) = self.images.start(&image) {
                note("LazyStart", start.to_string());
            }
            note(
                "LazyOrigin",
                match self.images.origin(&self.layers, &image) {
                    Ok(origin) => {
                        format!("{}://{}/{}", origin.scheme.as_str(), origin.host, origin.repo)
                    }
                    Err(error) => error.to_string(),
                },
            );
        }
        Ok(metadata)
    }

    /// What `docker info` shows.
    pub fn status(&self) -> Vec<[String; 2]> {
        let ids = self.layers.ids();
        let images: Vec<&String> =
            ids.iter().filter(|id| self.layers.record(id).is_ok_and(|r| is_image(&r))).collect();
        let is_mounted = |id: &&&String| overlay::is_mounted(&self.layers.path(id, "image"));
        let mounted = images.iter().filter(is_mounted).count();
        let pair = |key: &str, value: String| [key.to_owned(), value];
        vec![
            pair("Driver", concat!("sluice ", env!("CARGO_PKG_VERSION")).to_owned()),
            pair("Home", self.home().display().to_string()),
            pair("Layers", ids.len().to_string()),
            pair("Lazily loaded images", format!("{} ({mounted} mounted)", images.len())),
            pair("Starts of them", self.images.starts()),
        ]
    }

    /// Unmounts images that nobody has used for so long, once there are some; gives up waiting for
    /// them after `patience`.
    pub fn sweep(&self, idle: Duration, patience: Duration) -> Result<()> {
        self.images.wait_for_idle(patience);
        self.images.sweep(&self.layers, idle)
    }

    /// Docker stops: unmounts everything.
    pub fn cleanup(&self) -> Result<()> {
        let mut outcome = Ok(());
        for id in self.layers.ids() {
            let slot = self.slot(&id);
            let released = self.release(&id, &mut lock(&slot));
            outcome = outcome.and(released);
        }
        for id in self.layers.ids() {
            if overlay::is_mounted(&self.layers.path(&id, "image")) {
                outcome = outcome.and(self.images.forget(&self.layers, &id));
            }
        }
        outcome
    }

    fn slot(&self, id: &str) -> Arc<Mutex<u32>> {
        let mut uses = self.uses.lock().unwrap_or_else(PoisonError::into_inner);
        uses.entry(id.to_owned()).or_default().clone()
    }

    /// Unmounts a layer whoever uses it.
    fn release(&self, id: &str, uses: &mut u32) -> Result<()> {
        overlay::unmount(&self.layers.path(id, "merged"))?;
        let noted = match std::mem::take(uses) {
            0 => Ok(()),
            _ => self.layers.set_uses(id, 0),
        };
        // A damaged layer stands on nothing that is known.
        if let Ok(Some(image)) = self.image_below(id) {
            self.images.release(&self.layers, &image, id);
        }
        noted
    }

    fn mount(&self, id: &str, record: &Record, label: &str, merged: &Path) -> Result<()> {
        let (mut lower, mut image) = (Vec::new(), None);
        for (id, record) in self.layers.ancestors(id)? {
            let name = if is_image(&record) { "image" } else { "diff" };
            lower.push(format!("{}/{name}", record.number));
            if is_image(&record) {
                image = Some(id);
            }
            if is_opaque(&record) {
                break;
            }
        }
        if let Some(image) = &image {
            self.images.acquire(&self.layers, image, id)?;
        }
        let overlay = Overlay {
            lower,
            upper: format!("{}/diff", record.number),
            work: format!("{}/work", record.number),
            label: label.to_owned(),
        };
        let mounted = overlay.mount(&self.layers.home().join("numbers"), merged);
        if let (Err(_), Some(image)) = (&mounted, &image) {
            self.images.release(&self.layers, image, id);
        }
        mounted
    }

    /// Docker forgets the first layer of a new container when it cannot get it (`initMount` in
    /// layer/layer_store.go returns without removing what it has created), and would leave it here
    /// for ever.
    fn drop_unborn(&self, id: &str) {
        if id.ends_with("-init") && self.layers.uses(id).is_none() {
            // Should this fail, too, Docker is told what failed first.
            let _ = self.layers.remove(id);
        }
    }

    /// The lazily loaded image that a layer's overlay stands on.
    fn image_below(&self, id: &str) -> Result<Option<String>> {
        let lowest = self.layers.ancestors(id)?.pop();
        Ok(lowest.filter(|(_, record)| is_image(record)).map(|(id, _)| id))
    }

    /// Layers from `id` down to, but not including, `parent`; and those from `parent` down.
    fn split(&self, id: &str, parent: Option<&str>) -> Result<(Vec<String>, Vec<String>)> {
        let mut upper = vec![id.to_owned()];
        upper.extend(self.layers.ancestors(id)?.into_iter().map(|(id, _)| id));
        let at = match parent {
            None => upper.len(),
            Some(parent) => upper.iter().skip(1).position(|id| id == parent).map_or(0, |at| at + 1),
        };
        if at == 0 {
            let parent = parent.unwrap_or_default();
            return Err(Error::Unsupported(format!("layer {parent} is not below layer {id}")));
        }
        let mut lower = upper.split_off(at);
        let opaque = |id: &String| self.layers.record(id).is_ok_and(|record| is_opaque(&record));
        if let Some(at) = upper.iter().position(&opaque) {
            upper.truncate(at + 1);
        }
        if let Some(at) = lower.iter().position(&opaque) {
            lower.truncate(at + 1);
        }
        Ok((upper, lower))
    }

    /// A new layer's root directory hides those below it: it must look like them.
    fn root_of(&self, id: &str) -> Result<RootAttributes> {
        use std::os::unix::fs::MetadataExt;
        let record = self.layers.record(id)?;
        if let Some(root) = record.applied.as_ref().and_then(|applied| applied.image) {
            return Ok(root);
        }
        let diff = self.layers.path(id, "diff");
        let status = std::fs::symlink_metadata(&diff)
            .map_err(|error| Error::io(&error, format!("cannot look at {}", diff.display())))?;
        Ok(RootAttributes { mode: status.mode() & 0o7777, uid: status.uid(), gid: status.gid() })
    }
}

fn is_image(record: &Record) -> bool {
    record.applied.as_ref().is_some_and(|applied| applied.image.is_some())
}

fn is_opaque(record: &Record) -> bool {
    record.applied.as_ref().is_some_and(|applied| applied.opaque_root)
}

fn lock(slot: &Mutex<u32>) -> MutexGuard<'_, u32> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Passes bytes through and, if wanted, into a digest.
struct Hashed<R> {
    source: R,
    hash: Option<Sha256>,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.source.read(buffer)?;
        if let Some(hash) = &mut self.hash {
            hash.update(&buffer[..count]);
        }
        Ok(count)
    }
}
