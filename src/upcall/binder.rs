//! From a registered image to a mounted one behind the fanotify door.
//!
//! ```text
//! <cache>/segments/   the blobs' segments, as the daemon writes them
//! <cache>/door/       the same directory through a private bind mount, which the group has marked:
//!                     the kernel reads through it, and only that raises events
//! <cache>/views/      the metadata the kernel mounts, one file per bootstrap
//! ```
//! What is mounted is derived from the bootstrap each time and compared with what is there: a view
//! that a crash has torn is written anew, one that is mounted is left alone. All of this blocks on
//! the disk and in the kernel: control threads call it.

use std::fs::{DirBuilder, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::bindings::{Bindings, Holder};
use super::direct::DirectReads;
use super::group::Group;
use super::mounting::{self, Binding, below};
use super::sys;
use crate::blob::load::read_bootstrap;
use crate::blob::open::OpenBlob;
use crate::blob::registration::Image;
use crate::config::MIB;
use crate::error::{Error, Result};
use crate::image::Segmentation;
use crate::image::view::KernelView;
use crate::registry::route::Shared;
use crate::store::segment::{Owner, Segment};
use crate::store::segments::{BlobDirectory, SegmentStore};

/// The door's side of a cache directory. Shared by `Arc`.
pub struct Binder {
    bindings: Arc<Bindings>,
    group: Arc<Group>,
    /// The private bind mount.
    door: PathBuf,
    views: PathBuf,
    direct: DirectReads,
}

/// Where a group comes from.
pub enum Origin {
    /// It is made, on a kernel that was tried and can read directly, or not.
    New {
        /// Whether images that are whole may be read so.
        reads_directly: bool,
    },
    /// It was that of a daemon that died; its mark stands.
    Inherited(OwnedFd),
    /// Somebody will give it.
    Awaited,
}

/// What the kernel needs to mount an image.
struct Prepared {
    metadata: PathBuf,
    /// Segments by blob and name, in the order of the device table.
    devices: Vec<String>,
    /// Of the image's blobs.
    directories: Vec<Arc<BlobDirectory>>,
    /// By blob: whether any segment of it is incomplete.
    is_missing: Vec<bool>,
}

impl Binder {
    /// Opens the door of a cache directory: bind mount, group, mark.
    ///
    /// # Errors
    /// What the machine lacks, and what to do.
    pub fn open(
        cache_dir: &Path,
        store: Arc<SegmentStore>,
        routes: Arc<Shared>,
        origin: Origin,
    ) -> Result<Binder> {
        let (door, views) = (cache_dir.join("door"), cache_dir.join("views"));
        for directory in [&door, &views] {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(directory);
            made.map_err(|error| Error::io(&error, directory.display().to_string()))?;
        }
        let binding = mounting::bind_private(store.root(), &door)?;
        let direct = matches!(origin, Origin::New { reads_directly: true });
        let group = match origin {
            Origin::Awaited => Group::awaited()?,
            Origin::Inherited(group) if matches!(binding, Binding::Found) => Group::of(group),
            // Without the mount it was for, a group hears nothing.
            Origin::Inherited(_) | Origin::New { .. } => Group::open()?,
        };
        if !group.is_awaited() {
            group.mark_mount(&door)?;
        }
        let bindings = Bindings::new(store, routes);
        let (group, direct) = (Arc::new(group), DirectReads::new(direct));
        Ok(Binder { bindings, group, door, views, direct })
    }

    /// What is bound, for the cores.
    pub fn bindings(&self) -> &Arc<Bindings> {
        &self.bindings
    }

    /// The group, for the cores.
    pub fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// Takes the group that was awaited.
    ///
    /// # Errors
    /// `Malformed` for what is no group of this door; `Exists` if one was given before.
    pub fn take_over(&self, group: OwnedFd) -> Result<()> {
        self.group.become_given(&Group::of(group), &self.door)
    }

    /// Binds an image, unless it is bound, and mounts it at `mountpoint` as `peer` sees it. Gives
    /// the blobs to prefetch.
    ///
    /// # Errors
    /// What the disk and the kernel say; the image is bound then as it was before.
    pub fn mount(
        &self,
        image: &Arc<Image>,
        mountpoint: &Path,
        peer: Option<u32>,
    ) -> Result<Vec<Arc<OpenBlob>>> {
        if self.group.is_awaited() {
            let text = "this daemon waits for a supervisor to give it its group; mount later";
            return Err(Error::unavailable(text));
        }
        let prepared = self.prepare(image)?;
        let was_bound = self.bindings.of_image(image).is_some();
        if !was_bound {
            self.bindings.bind(image, prepared.directories.clone());
        }
        let mounted = self.attach(image, &prepared, mountpoint, peer);
        if mounted.is_err() && !was_bound {
            self.bindings.unbind(image);
        }
        mounted.map(|()| self.to_prefetch(image, &prepared.is_missing))
    }

    /// Binds an image that is mounted already, by a daemon that died. Gives the blobs to prefetch.
    ///
    /// # Errors
    /// What the disk says.
    pub fn rebind(&self, image: &Arc<Image>) -> Result<Vec<Arc<OpenBlob>>> {
        let prepared = self.prepare(image)?;
        if self.bindings.of_image(image).is_none() {
            self.bindings.bind(image, prepared.directories);
        }
        Ok(self.to_prefetch(image, &prepared.is_missing))
    }

    /// The blobs with something missing that is fetched before anybody asks for it. One that does
    /// not wake is left to its readers, who are told why.
    fn to_prefetch(&self, image: &Arc<Image>, is_missing: &[bool]) -> Vec<Arc<OpenBlob>> {
        let Some(bound) = self.bindings.of_image(image) else { return Vec::new() };
        let missing = (0..)
            .zip(is_missing)
            .filter(|&(index, is_missing)| *is_missing && image.is_fetched_ahead(index));
        let wake =
            |blob_index| Holder { bound: Arc::clone(&bound), blob_index }.wake(&self.bindings);
        missing.filter_map(|(blob_index, _)| wake(blob_index).ok()).collect()
    }

    /// Forgets an image that is mounted no more.
    pub fn unbind(&self, image: &Arc<Image>) {
        self.bindings.unbind(image);
    }

    /// Whether the kernel has an image's view open: while it has, somebody can read the image,
    /// wherever it was mounted and whatever became of those mounts. Images of one bootstrap have
    /// one view. False where it cannot be told.
    pub fn is_open(&self, image: &Image) -> bool {
        is_open(&self.views.join(image.bootstrap_digest.to_string()))
    }

    /// Removes the views of images that are not among `images` and that the kernel does not have
    /// open; what a dead daemon left unfinished goes, too. Gives the bytes.
    ///
    /// # Errors
    /// What the disk says.
    pub fn remove_views(&self, images: &[Arc<Image>]) -> Result<u64> {
        let failed = |error: std::io::Error| Error::io(&error, self.views.display().to_string());
        let kept: std::collections::HashSet<String> =
            images.iter().map(|image| image.bootstrap_digest.to_string()).collect();
        let mut freed = 0;
        for entry in std::fs::read_dir(&self.views).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let is_kept = |name: &str| kept.contains(name) || is_open(&entry.path());
            if entry.file_name().to_str().is_some_and(|name| !is_kept(name)) {
                freed += entry.metadata().map_err(failed)?.len();
                std::fs::remove_file(entry.path()).map_err(failed)?;
            }
        }
        Ok(freed)
    }

    /// Takes the bind mount away, when nothing needs it any more.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn close(&self) -> Result<()> {
        mounting::detach(&self.door, None, true)
    }

    fn attach(
        &self,
        image: &Image,
        prepared: &Prepared,
        mountpoint: &Path,
        peer: Option<u32>,
    ) -> Result<()> {
        // Names through the open directory are short, whatever the cache directory's path is.
        let door = mounting::open_directory(&self.door)?;
        let devices = prepared.devices.iter().map(|device| below(&door, device));
        let devices: Vec<String> = devices.collect();
        let metadata = prepared.metadata.to_string_lossy();
        let is_whole = !prepared.is_missing.contains(&true);
        let mount = self.direct.make(image.bootstrap_digest, is_whole, &metadata, &devices)?;
        mounting::attach(mount, mountpoint, peer)
    }

    /// Makes what is to be mounted, and lets the kernel read complete segments without asking.
    fn prepare(&self, image: &Arc<Image>) -> Result<Prepared> {
        let bootstrap = read_bootstrap(image)?;
        let plans = Segmentation::of_image(&bootstrap)?;
        let view = KernelView::derive(&bootstrap, &plans)?;
        let metadata = self.views.join(image.bootstrap_digest.to_string());
        keep(&metadata, &view.metadata)?;
        let store = self.bindings.store();
        let directories = image.blobs.iter().map(|blob| store.directory(blob.id.as_str()));
        let directories = directories.collect::<Result<Vec<_>>>()?;
        let mut devices = Vec::with_capacity(view.devices.len());
        let mut is_missing = vec![false; directories.len()];
        for device in &view.devices {
            let directory = &directories[device.blob_index as usize];
            let plan = plans[device.blob_index as usize].segment(device.place);
            let segment = directory.segment(&plan.file_name(), plan.size)?;
            match segment.is_complete() {
                true => self.welcome(&segment)?,
                false => is_missing[device.blob_index as usize] = true,
            }
            devices.push(format!("{}/{}", directory.blob_id(), segment.name()));
        }
        for directory in &directories {
            directory.touch();
            directory.tidy();
        }
        Ok(Prepared { metadata, devices, directories, is_missing })
    }

    /// Lets the kernel read a complete segment without asking; one that is being emptied, or has
    /// been, is heard of as before.
    ///
    /// # Errors
    /// What the kernel says: it goes on to raise events that are answered at once.
    pub fn let_pass(&self, segment: &Segment) -> Result<()> {
        if !segment.is_complete() {
            return Ok(());
        }
        self.group.ignore(segment.directory.fd(), segment.name())?;
        // Eviction heeds a segment once more after it has claimed it: one of us is the last.
        match segment.is_complete() && segment.owner() != Owner::Eviction {
            true => Ok(()),
            false => self.group.unignore(segment.directory.fd(), segment.name()),
        }
    }

    /// A segment that is complete: no events any more, and a record if it has none.
    fn welcome(&self, segment: &Arc<Segment>) -> Result<()> {
        self.let_pass(segment)?;
        if !segment.directory.is_recorded(segment.name(), segment.full_size) {
            segment.directory.has_completed(segment);
        }
        Ok(())
    }
}

/// Makes a file have these bytes, without touching it if it has them.
fn keep(path: &Path, bytes: &[u8]) -> Result<()> {
    if File::open(path).is_ok_and(|file| is_equal(file, bytes)) {
        return Ok(());
    }
    let part = path.with_extension(format!("part-{}", std::process::id()));
    let written = File::create(&part)
        .and_then(|mut file| file.write_all(bytes))
        .and_then(|()| std::fs::rename(&part, path));
    written.map_err(|error| {
        let _ = std::fs::remove_file(&part);
        Error::io(&error, format!("cannot write the metadata {}", path.display()))
    })
}

fn is_open(view: &Path) -> bool {
    File::open(view).is_ok_and(|view| sys::is_open_elsewhere(view.as_fd()).unwrap_or(false))
}

fn is_equal(mut file: File, bytes: &[u8]) -> bool {
    let has_size = file.metadata().is_ok_and(|metadata| metadata.len() == bytes.len() as u64);
    let mut buffer = vec![0; MIB];
    has_size
        && bytes.chunks(MIB).all(|piece| {
            let read = &mut buffer[..piece.len()];
            file.read_exact(read).is_ok() && read == piece
        })
}
