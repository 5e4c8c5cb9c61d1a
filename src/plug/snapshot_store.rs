//! One root of snapshots at work: each call of the snapshots service, from request to result.
//!
//! Puts the rules, the directories and the lazily loaded images together. Everything that touches
//! the disk runs on threads that may block; the rules' lock is held for one durable change at a
//! time and never while an image is waited for. A client that gives up does not stop what it began.

use std::collections::HashMap;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::beneath::{self, Beneath};
use super::containerd_messages::{Mount, SnapshotInfo, Timestamp};
use super::labels::{self, Labels};
use super::snapshot_filter::Filters;
use super::snapshot_images::{Image, Images, Mounter, Plan};
use super::snapshot_layer;
use super::snapshot_overlay::{Overlay, kernel_has_index};
use super::snapshot_records::{Contents, Kind, Snapshot, Time, Usage};
use super::snapshot_usage::disk_usage;
use super::snapshots::{Directories, Lower, Snapshots, Stack};
use crate::blob::journal::{Journal, Level};
use crate::error::{Error, Result};

/// A label that is shown and never stored: how the lazily loaded image of a layer started.
pub const START_LABEL: &str = "containerd.io/snapshot/sluice.start";

/// One root.
pub struct Store {
    snapshots: Mutex<Snapshots>,
    images: Arc<Images>,
    directories: Directories,
    journal: Arc<Journal>,
    index_off: bool,
    /// Whoever holds it removes orphans.
    tidying: Mutex<()>,
}

impl Store {
    /// Opens a root and tidies up after whoever had it before.
    pub fn open(
        root: &Path,
        mounter: Mounter,
        plan: Plan,
        journal: Arc<Journal>,
    ) -> Result<Arc<Store>> {
        let snapshots = Snapshots::open(root)?;
        let store = Store {
            directories: snapshots.directories().clone(),
            snapshots: Mutex::new(snapshots),
            images: Arc::new(Images::new(mounter, plan, Arc::clone(&journal))),
            journal,
            index_off: kernel_has_index(),
            tidying: Mutex::default(),
        };
        // Nobody calls yet, so nobody needs to be asked to wait.
        for id in store.unused_images()? {
            if let Err(error) = store.images.unmount(&store.directories.image(id)) {
                store.journal.error(format!("an unused image stays mounted: {error}"));
            }
        }
        store.remove_orphans()?;
        Ok(Arc::new(store))
    }

    /// Prepare and View.
    ///
    /// # Errors
    /// `Exists` for a blob layer, which is there as soon as it is asked for: so containerd does not
    /// download it (docs/remote-snapshotter.md).
    pub async fn create(
        self: Arc<Self>,
        kind: Kind,
        key: String,
        parent: String,
        labels: Labels,
    ) -> Result<Vec<Mount>> {
        let made = self.clone().blocking(move |store| {
            let mut snapshots = store.lock();
            if let Some(chain) = labels::blob_layer(&labels).filter(|_| kind == Kind::Active) {
                snapshots.commit_blob(chain, &parent, &labels)?;
                return Err(Error::Exists(format!("layer {chain} is there: it is loaded lazily")));
            }
            snapshots.create(kind, &key, &parent, labels)
        });
        let stack = made.await?;
        let mounted = self.clone().mount(stack.clone()).await;
        if mounted.is_err() {
            // Without this a second try would meet its own key.
            let key = stack.snapshot.name;
            let undone = self.clone().blocking(move |store| store.lock().remove(&key).map(drop));
            if let Err(error) = undone.await {
                self.journal.error(format!("a snapshot that failed stays behind: {error}"));
            }
            self.release(stack.lowers).await;
        }
        mounted
    }

    /// What an active snapshot or a view is mounted with, its image ready to be read.
    pub async fn mounts(self: Arc<Self>, key: String) -> Result<Vec<Mount>> {
        let stack = self.clone().blocking(move |store| store.lock().stack(&key)).await?;
        self.mount(stack).await
    }

    /// An active snapshot becomes a layer.
    pub async fn commit(self: Arc<Self>, name: String, key: String, labels: Labels) -> Result<()> {
        let committed = self.clone().blocking(move |store| {
            let active = store.lock().active(&key)?.clone();
            let files = store.directories.files(active.id);
            let contents = snapshot_layer::contents(&files, &labels, active.parent.is_empty())?;
            let usage = disk_usage(&files)?;
            let mut snapshots = store.lock();
            let lowers = snapshots.stack(&key)?.lowers;
            snapshots.commit(&key, &name, labels, usage, contents)?;
            Ok(lowers)
        });
        // It no longer uses the image it stands on.
        let lowers = committed.await?;
        self.release(lowers).await;
        Ok(())
    }

    /// Forgets a snapshot. Its files go with the next cleanup, which containerd asks for after
    /// every garbage collection, without a lock held.
    pub async fn remove(self: Arc<Self>, key: String) -> Result<()> {
        let stack = self.clone().blocking(move |store| store.lock().remove(&key)).await?;
        self.images.forget(stack.snapshot.id);
        self.release(stack.lowers).await;
        Ok(())
    }

    /// One snapshot.
    pub async fn stat(self: Arc<Self>, key: String) -> Result<SnapshotInfo> {
        self.blocking(move |store| {
            let snapshot = store.lock().stat(&key)?.clone();
            Ok(store.info(&snapshot))
        })
        .await
    }

    /// Changes labels.
    pub async fn update(
        self: Arc<Self>,
        info: SnapshotInfo,
        paths: Vec<String>,
    ) -> Result<SnapshotInfo> {
        self.blocking(move |store| {
            let mut labels: Labels = info.labels.into_iter().collect();
            labels.remove(START_LABEL);
            let snapshot = store.lock().update(&info.name, &labels, &paths)?;
            Ok(store.info(&snapshot))
        })
        .await
    }

    /// All snapshots that match.
    pub async fn list(self: Arc<Self>, filters: Vec<String>) -> Result<Vec<SnapshotInfo>> {
        let filters = Filters::parse(&filters)?;
        self.blocking(move |store| {
            let found: Vec<Snapshot> = store.lock().list(&filters).cloned().collect();
            Ok(found.iter().map(|snapshot| store.info(snapshot)).collect())
        })
        .await
    }

    /// What a snapshot takes on disk, without what is below it.
    pub async fn usage(self: Arc<Self>, key: String) -> Result<Usage> {
        self.blocking(move |store| {
            let snapshot = store.lock().stat(&key)?.clone();
            match snapshot.kind {
                Kind::Committed => Ok(snapshot.usage),
                Kind::View => Ok(Usage::default()),
                Kind::Active => disk_usage(&store.directories.files(snapshot.id)),
            }
        })
        .await
    }

    /// Removes what removed snapshots left behind.
    pub async fn cleanup(self: Arc<Self>) -> Result<()> {
        for id in self.clone().blocking(Store::unused_images).await? {
            self.release_image(id).await;
        }
        self.blocking(Store::remove_orphans).await
    }

    async fn mount(self: Arc<Self>, stack: Stack) -> Result<Vec<Mount>> {
        if let Some(image) = stack.image() {
            self.images.ensure(self.image(image)?).await?;
        }
        self.blocking(move |store| {
            store.inherit_root(&stack)?;
            store.mounts_of(&stack)
        })
        .await
    }

    fn image(&self, layer: &Snapshot) -> Result<Image> {
        let Contents::Image(digest) = &layer.contents else {
            return Err(Error::Malformed(format!("snapshot {:?} is no image", layer.name)));
        };
        let files = self.directories.files(layer.id);
        Ok(Image {
            id: layer.id,
            digest: digest.clone(),
            labels: layer.labels.clone(),
            bootstrap: files.join(crate::image::layer::BOOTSTRAP_PATH),
            work_dir: self.directories.of(layer.id),
            mountpoint: self.directories.image(layer.id),
        })
    }

    /// The root directory of an overlay is its upper's: give that the owner and the mode of the
    /// root it covers, unless somebody has written there already.
    fn inherit_root(&self, stack: &Stack) -> Result<()> {
        let upper = self.directories.files(stack.snapshot.id);
        let Some(lower) = stack.lowers.first().map(|lower| self.lower_path(lower)) else {
            return Ok(());
        };
        let failed = |error| Error::io(&error, format!("cannot look at {}", lower.display()));
        let is_new = fs::read_dir(&upper).map_err(failed)?.next().is_none();
        if stack.snapshot.kind != Kind::Active || !is_new {
            return Ok(());
        }
        let root = fs::metadata(&lower).map_err(failed)?;
        let mode = Permissions::from_mode(root.mode() & 0o7777);
        lchown(&upper, Some(root.uid()), Some(root.gid()))
            .and_then(|()| fs::set_permissions(&upper, mode))
            .map_err(|error| Error::io(&error, format!("cannot change {}", upper.display())))
    }

    /// A bind mount where there is but one directory, an overlay otherwise.
    fn mounts_of(&self, stack: &Stack) -> Result<Vec<Mount>> {
        let id = stack.snapshot.id;
        let is_view = stack.snapshot.kind == Kind::View;
        let bind = |source: PathBuf, access: &str| Mount {
            kind: "bind".to_owned(),
            source: source.display().to_string(),
            options: vec![access.to_owned(), "rbind".to_owned()],
        };
        let lowers: Vec<PathBuf> = stack.lowers.iter().map(|it| self.lower_path(it)).collect();
        let mount = match (lowers.as_slice(), is_view) {
            ([], true) => bind(self.directories.files(id), "ro"),
            ([], false) => bind(self.directories.files(id), "rw"),
            ([only], true) => bind(only.clone(), "ro"),
            _ => {
                let own = (self.directories.files(id), self.directories.work(id));
                let overlay = Overlay { lowers, upper: Some(own).filter(|_| !is_view) };
                let options = overlay.options(self.index_off)?;
                Mount { kind: "overlay".to_owned(), source: "overlay".to_owned(), options }
            }
        };
        Ok(vec![mount])
    }

    fn lower_path(&self, lower: &Lower) -> PathBuf {
        match lower {
            Lower::Files(id) => self.directories.files(*id),
            Lower::Image(layer) => self.directories.image(layer.id),
        }
    }

    async fn release(self: &Arc<Self>, lowers: Vec<Lower>) {
        if let Some(Lower::Image(layer)) = lowers.last() {
            self.release_image(layer.id).await;
        }
    }

    async fn release_image(self: &Arc<Self>, id: u64) {
        let store = Arc::clone(self);
        let is_used = move || store.lock().is_image_used(id);
        self.images.release(id, self.directories.image(id), is_used).await;
    }

    /// Images that may still be mounted and need not be: after a crash, or when unmounting failed.
    fn unused_images(&self) -> Result<Vec<u64>> {
        let (snapshots, all) = (self.lock(), Filters::parse(&[])?);
        let images = snapshots.list(&all).filter(|it| matches!(it.contents, Contents::Image(_)));
        Ok(images.map(|it| it.id).filter(|id| !snapshots.is_image_used(*id)).collect())
    }

    /// What cannot be removed stays an orphan and is tried again at the next cleanup.
    fn remove_orphans(&self) -> Result<()> {
        // One at a time: what one moves up the other would take for its own.
        let _turn = self.tidying.lock().unwrap_or_else(PoisonError::into_inner);
        let orphans = self.lock().orphans()?;
        for orphan in orphans {
            match self.remove_orphan(&orphan) {
                Ok(()) => self.journal.write(Level::Debug, || format!("removed {orphan:?}")),
                Err(error) => self.journal.error(format!("left for later: {error}")),
            }
        }
        Ok(())
    }

    /// Whatever a container has made: neither the stack nor descriptors grow with its depth.
    fn remove_orphan(&self, orphan: &Path) -> Result<()> {
        self.images.unmount(&orphan.join("image"))?;
        let (Some(all), Some(name)) = (orphan.parent(), orphan.file_name()) else { return Ok(()) };
        // What is moved up here on the way is an orphan itself, should we die meanwhile.
        Beneath::open(all)?
            .directory(b"")
            .and_then(|all| beneath::open_directory(all, b"."))
            .and_then(|all| beneath::remove(&all, name.as_bytes(), &all))
            .map_err(|errno| Error::system(errno as i32, format!("cannot remove {orphan:?}")))
    }

    fn info(&self, snapshot: &Snapshot) -> SnapshotInfo {
        let mut labels: HashMap<String, String> = snapshot.labels.clone().into_iter().collect();
        if let Some(start) = self.images.start(snapshot.id) {
            labels.insert(START_LABEL.to_owned(), start.to_string());
        }
        let time = |time: Time| Some(Timestamp { seconds: time.seconds, nanos: time.nanos });
        SnapshotInfo {
            name: snapshot.name.clone(),
            parent: snapshot.parent.clone(),
            kind: match snapshot.kind {
                Kind::View => 1,
                Kind::Active => 2,
                Kind::Committed => 3,
            },
            created_at: time(snapshot.created),
            updated_at: time(snapshot.updated),
            labels,
        }
    }

    async fn blocking<T: Send + 'static>(
        self: Arc<Self>,
        job: impl FnOnce(&Store) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        tokio::task::spawn_blocking(move || job(&self)).await.map_err(|_| Error::Shutdown)?
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Snapshots> {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
