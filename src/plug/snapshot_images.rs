//! Lazily loaded images under the snapshots that use them: who mounts, when, and what happens if
//! that fails.
//!
//! An image is mounted when its first view or active snapshot is made and unmounted when its last
//! one is gone; who uses it is read from the records, so a crash leaves no count behind. The daemon
//! mounts; it is reached through the functions of a [`Mounter`]. A mounted image counts as good
//! when a byte of it could be read: a dead registry is met here, where the image's [`Policy`] says
//! what to do, and not by the container. One image at a time is tried by one thread; waiting holds
//! none.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::labels::{self, Labels};
use super::probe;
use super::start::{Policy, Start, Starts};
use crate::blob::journal::{Journal, Level};
use crate::config::{
    IMAGE_FAILURE_LIFE_MS, IMAGE_FULL_WAIT_MS, IMAGE_MOUNTS_AT_ONCE, IMAGE_MOUNTS_STACKED_MAX,
    IMAGE_RETRY_MS, IMAGE_RETRY_MS_MAX, PREFETCH_MERGING_DEFAULT_BYTES, PREFETCH_THREADS_DEFAULT,
};
use crate::error::{Error, Result};

/// Mounts an entry (as for PUT /api/v2/blobs) at a directory.
pub type Mount = dyn Fn(&Value, &Path) -> Result<()> + Send + Sync;
/// Unmounts what is at a directory.
pub type Unmount = dyn Fn(&Path) -> Result<()> + Send + Sync;
/// Whether something is so at a directory.
pub type IsThere = dyn Fn(&Path) -> Result<bool> + Send + Sync;

/// What the daemon and the kernel do for this room. All of it blocks.
pub struct Mounter {
    /// Registers and mounts.
    pub mount: Box<Mount>,
    /// Unmounts, and unregisters with the image's last mount.
    pub unmount: Box<Unmount>,
    /// Asks the kernel whether something is mounted there.
    pub is_mounted: Box<IsThere>,
    /// Asks the daemon whether it serves the image that is mounted there. One that was started anew
    /// may not know of it; to mount once more, over the old mount, makes it known.
    pub is_served: Box<IsThere>,
    /// How starts went.
    pub starts: Starts,
}

/// How images of one root are registered and started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// What the root is called.
    pub name: String,
    /// The first pattern that matches an image's name decides; `*` stands for anything.
    pub policies: Vec<(String, Policy)>,
    /// What all other images get.
    pub policy: Policy,
    /// How long one snapshot may wait.
    pub wait_ms: u64,
    /// Images share their blobs with the images of this domain; without one with none.
    pub domain: Option<String>,
    /// Whether the daemon shall fetch everything in the background.
    pub prefetch: bool,
    /// Registries spoken to without TLS, besides those on this machine.
    pub plain_http: Vec<String>,
}

/// An image to be mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The snapshot of its bootstrap layer.
    pub id: u64,
    /// SHA-256 of the bootstrap.
    pub digest: String,
    /// What clients said of that layer.
    pub labels: Labels,
    /// The bootstrap.
    pub bootstrap: PathBuf,
    /// A directory for what the daemon keeps of it.
    pub work_dir: PathBuf,
    /// Where to mount it; made if absent.
    pub mountpoint: PathBuf,
}

/// All lazily loaded images of one root.
pub struct Images {
    mounter: Mounter,
    plan: Plan,
    journal: Arc<Journal>,
    places: Mutex<BTreeMap<u64, Arc<Place>>>,
    tries: Semaphore,
}

/// One image's turn: whoever holds it mounts or unmounts.
#[derive(Default)]
struct Place {
    turn: tokio::sync::Mutex<()>,
    start: Mutex<Option<Start>>,
}

impl Plan {
    fn policy(&self, image: &str) -> Policy {
        let found = self.policies.iter().find(|(pattern, _)| matches(pattern, image));
        found.map_or(self.policy, |(_, policy)| *policy)
    }

    /// The entry of PUT /api/v2/blobs, in the form every daemon of that API reads. Its id is this
    /// layer's alone: the daemon keeps reading the bootstrap it was shown, which goes with the
    /// layer. Blobs are shared all the same.
    fn entry(&self, image: &Image) -> Result<Value> {
        let plain = |host: &str| {
            labels::is_loopback(host) || self.plain_http.iter().any(|plain| plain == host)
        };
        let backend = labels::backend(&image.labels, plain)?;
        let digest = image.digest.get(..16).unwrap_or(&image.digest);
        let id = format!("{}-{}-{digest}", self.name, image.id);
        let mut config = json!({
            "id": id,
            "backend_type": "registry",
            "backend_config": backend,
            "cache_type": "fscache",
            "cache_config": { "work_dir": image.work_dir },
            "metadata_path": image.bootstrap,
        });
        if self.prefetch {
            config["prefetch_config"] = json!({
                "enable": true,
                "threads_count": PREFETCH_THREADS_DEFAULT,
                "merging_size": PREFETCH_MERGING_DEFAULT_BYTES,
                "bandwidth_rate": 0,
            });
        }
        let domain = self.domain.as_ref().unwrap_or(&id);
        Ok(json!({ "type": "bootstrap", "id": id, "domain_id": domain, "config": config }))
    }
}

impl Images {
    /// Nothing is mounted yet.
    pub fn new(mounter: Mounter, plan: Plan, journal: Arc<Journal>) -> Images {
        let tries = Semaphore::new(IMAGE_MOUNTS_AT_ONCE);
        Images { mounter, plan, journal, places: Mutex::default(), tries }
    }

    /// How an image of this process started; nothing if nobody has wanted it since.
    pub fn start(&self, id: u64) -> Option<Start> {
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.get(&id).and_then(|place| place.start())
    }

    /// Returns when the image is mounted and readable.
    ///
    /// # Errors
    /// `Unavailable`, always: to the client of a snapshot all other kinds mean something else.
    pub async fn ensure(self: &Arc<Self>, image: Image) -> Result<()> {
        let place = self.place(image.id);
        let _turn = place.turn.lock().await;
        if let Some(Start::Failed(why, when)) = place.start()
            && when.elapsed() < Duration::from_millis(IMAGE_FAILURE_LIFE_MS)
        {
            return Err(Error::unavailable(why));
        }
        let name = labels::image_reference(&image.labels).unwrap_or("an image").to_owned();
        let image = Arc::new(image);
        match self.begin(&image, &name).await {
            Ok(start) => {
                self.note(&place, &name, start).await;
                Ok(())
            }
            Err(error) => {
                let why = format!("{name} cannot be mounted: {error}");
                self.journal.error(why.clone());
                self.count(&place, Start::Failed(why.clone(), Instant::now())).await;
                Err(Error::unavailable(why))
            }
        }
    }

    /// Unmounts the image unless `is_used` says otherwise. A failure is logged and made up for by
    /// the next cleanup.
    pub async fn release(
        self: &Arc<Self>,
        id: u64,
        mountpoint: PathBuf,
        is_used: impl Fn() -> bool + Clone + Send + 'static,
    ) {
        // Who uses it may be waiting for it, in its turn.
        let look = is_used.clone();
        if self.blocking(move || Ok(look())).await != Ok(false) {
            return;
        }
        let place = self.place(id);
        let _turn = place.turn.lock().await;
        let this = Arc::clone(self);
        let unmounted = self.blocking(move || match is_used() {
            true => Ok(false),
            false => this.unmount(&mountpoint).map(|()| true),
        });
        match unmounted.await {
            Ok(false) => {}
            // Why it failed stays to be seen.
            Ok(true) if matches!(place.start(), Some(Start::Failed(..))) => {}
            Ok(true) => place.set(None),
            Err(error) => self.journal.error(format!("an unused image stays mounted: {error}")),
        }
    }

    /// Forgets an image that is no snapshot any more, and so has no users.
    pub fn forget(&self, id: u64) {
        self.lock().remove(&id);
    }

    /// Unmounts what is mounted there, one over the other.
    pub fn unmount(&self, mountpoint: &Path) -> Result<()> {
        for _ in 0..IMAGE_MOUNTS_STACKED_MAX {
            if !mountpoint.exists() || !(self.mounter.is_mounted)(mountpoint)? {
                return Ok(());
            }
            (self.mounter.unmount)(mountpoint)?;
        }
        Err(Error::Busy(format!("{} is mounted again and again", mountpoint.display())))
    }

    async fn begin(self: &Arc<Self>, image: &Arc<Image>, name: &str) -> Result<Start> {
        let policy = self.plan.policy(name);
        let began = Instant::now();
        let until = began + Duration::from_millis(self.plan.wait_ms);
        let first = match self.attempt(image).await {
            Ok(()) => return Ok(Start::Lazy),
            Err(error) if policy == Policy::Fail => return Err(error),
            Err(error) => error,
        };
        self.journal.write(Level::Warn, || format!("{name} is waited for: {first}"));
        let mut pause_ms = IMAGE_RETRY_MS;
        let mut last = first.clone();
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(last.context(format!("waited {} ms", self.plan.wait_ms)));
            }
            tokio::time::sleep(left.min(Duration::from_millis(pause_ms))).await;
            pause_ms = (2 * pause_ms).min(IMAGE_RETRY_MS_MAX);
            let tried = match self.attempt(image).await {
                Ok(()) if policy == Policy::Full => self.bring_all(image).await.map(|_| ()),
                tried => tried,
            };
            match tried {
                Ok(()) if policy == Policy::Full => return Ok(Start::Full(first.to_string())),
                Ok(()) => return Ok(Start::Waited(first.to_string())),
                Err(error) => last = error,
            }
        }
    }

    async fn attempt(self: &Arc<Self>, image: &Arc<Image>) -> Result<()> {
        let (this, image) = (Arc::clone(self), Arc::clone(image));
        self.blocking(move || this.mount(&image)).await
    }

    async fn bring_all(self: &Arc<Self>, image: &Arc<Image>) -> Result<u64> {
        let place = image.mountpoint.clone();
        let deadline = Instant::now() + Duration::from_millis(IMAGE_FULL_WAIT_MS);
        self.blocking(move || probe::everything(&place, deadline)).await
    }

    fn mount(&self, image: &Image) -> Result<()> {
        let place = &image.mountpoint;
        std::fs::create_dir_all(place)
            .map_err(|error| Error::io(&error, format!("cannot make {}", place.display())))?;
        if !((self.mounter.is_mounted)(place)? && (self.mounter.is_served)(place)?) {
            match (self.mounter.mount)(&self.plan.entry(image)?, place) {
                // Mounted by a try whose answer was lost.
                Err(Error::Exists(_)) => {}
                mounted => mounted?,
            }
        }
        probe::first_bytes(place)
    }

    /// Runs what blocks on a thread that may; at most so many at a time.
    async fn blocking<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let _permit = self.tries.acquire().await.map_err(|_| Error::Shutdown)?;
        tokio::task::spawn_blocking(job).await.map_err(|_| Error::Shutdown)?
    }

    /// Later users of a mounted image do not change how it started.
    async fn note(self: &Arc<Self>, place: &Place, name: &str, start: Start) {
        let before = place.start();
        if before.is_none() || start != Start::Lazy || matches!(before, Some(Start::Failed(..))) {
            self.journal.write(Level::Info, || format!("{name} is mounted: {start}"));
            self.count(place, start).await;
        }
    }

    async fn count(self: &Arc<Self>, place: &Place, start: Start) {
        place.set(Some(start.clone()));
        let this = Arc::clone(self);
        let counted = self.blocking(move || {
            this.mounter.starts.note(&start);
            Ok(())
        });
        // At a stop nobody counts any more.
        let _ = counted.await;
    }

    fn place(&self, id: u64) -> Arc<Place> {
        Arc::clone(self.lock().entry(id).or_default())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u64, Arc<Place>>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Place {
    fn start(&self) -> Option<Start> {
        self.start.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set(&self, start: Option<Start>) {
        *self.start.lock().unwrap_or_else(PoisonError::into_inner) = start;
    }
}

/// Whether `text` is what `pattern` describes; `*` stands for any text, also none.
fn matches(pattern: &str, text: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap_or_default();
    let Some(mut rest) = text.strip_prefix(first) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}
