//! What this daemon has mounted, through which door, and where.
//!
//! One mount or unmount at a time: between them an image's registration, its binding and its last
//! mount must agree. What somebody mounts or unmounts by hand is found out by looking at the
//! kernel's own list, in the mount namespace it was mounted in; a namespace without a process is
//! gone with its mounts. The table's changes are told to whoever remembers them on disk.
//!
//! An image is over when its last mount is gone and nobody can read it any more. After a lazy
//! unmount somebody has files open; an overlay, or a copy of the mount elsewhere, goes on without
//! the mount it was made of. Such an image *lingers*: it is served, its last place stays remembered
//! for a successor, and from time to time is looked whether the kernel still has it open. Only the
//! fanotify door can tell.

use std::collections::{BTreeMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use clap::ValueEnum;

use crate::blob::open::OpenBlob;
use crate::blob::registration::Image;
use crate::error::{Error, Result};
use crate::upcall::binder::Binder;
use crate::upcall::{mountinfo, mounting};

/// A kernel interface images are mounted through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Door {
    /// /dev/cachefiles.
    Cachefiles,
    /// Pre-content events of fanotify.
    Fanotify,
}

/// Where something is mounted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The mount namespace, by its inode.
    pub namespace: u64,
    /// The directory.
    pub mountpoint: PathBuf,
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The image's domain.
    pub domain_id: String,
    /// The image.
    pub id: String,
    /// Through which door.
    pub door: Door,
}

/// Told what is mounted of an image now: its domain, its id, the places.
pub type Changed = Box<dyn Fn(&str, &str, &[(Place, Door)]) + Send + Sync>;

/// Told of a blob that is to be fetched before anybody asks.
pub type Prefetch = Box<dyn Fn(Arc<OpenBlob>) + Send + Sync>;

/// The mounts of a daemon.
pub struct Mounts {
    /// The fanotify door, if it is open.
    binder: Option<Arc<Binder>>,
    /// Whether the cachefiles door is open.
    has_cachefiles: bool,
    table: Mutex<BTreeMap<Place, Entry>>,
    lingering: Mutex<Vec<Leaving>>,
    turn: Mutex<()>,
    changed: Changed,
    prefetch: Prefetch,
}

/// What the table knows of a mount.
#[derive(Clone)]
struct Entry {
    image: Arc<Image>,
    door: Door,
}

/// An image that is mounted nowhere any more.
#[derive(Clone)]
pub struct Leaving {
    /// The image.
    pub image: Arc<Image>,
    /// Whether it stays registered.
    pub is_kept: bool,
}

/// How a mount went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Departure {
    /// Nobody had files of it open.
    Plain,
    /// Its users were left to it.
    Lazy,
}

impl Door {
    /// As the API and the command line call it.
    pub fn name(self) -> &'static str {
        match self {
            Door::Cachefiles => "cachefiles",
            Door::Fanotify => "fanotify",
        }
    }

    /// The door of a name.
    pub fn named(name: &str) -> Option<Door> {
        [Door::Cachefiles, Door::Fanotify].into_iter().find(|door| door.name() == name)
    }
}

impl Place {
    /// A directory as a process sees it; this process without one.
    ///
    /// # Errors
    /// `NotFound` if the process is gone.
    pub fn seen_by(mountpoint: &Path, peer: Option<u32>) -> Result<Place> {
        let namespace = namespace_of(peer).ok_or_else(|| {
            Error::NotFound("the process that asks is gone; its mounts cannot be found".into())
        })?;
        Ok(Place { namespace, mountpoint: mountpoint.to_owned() })
    }

    /// A process that sees the place; none when this process does, `NotFound` when nobody does.
    fn witness(&self) -> Result<Option<u32>> {
        if namespace_of(None) == Some(self.namespace) {
            return Ok(None);
        }
        let processes = std::fs::read_dir("/proc").map_err(|error| Error::io(&error, "/proc"))?;
        let numbers =
            processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let mut seers = numbers.filter(|&pid| namespace_of(Some(pid)) == Some(self.namespace));
        seers.next().map(Some).ok_or_else(|| {
            let place = self.mountpoint.display();
            Error::NotFound(format!("{place}: nobody is left in its mount namespace"))
        })
    }
}

impl Mounts {
    /// Nothing is mounted yet.
    pub fn new(
        binder: Option<Arc<Binder>>,
        has_cachefiles: bool,
        changed: Changed,
        prefetch: Prefetch,
    ) -> Mounts {
        let (table, lingering, turn) = (Mutex::default(), Mutex::default(), Mutex::default());
        Mounts { binder, has_cachefiles, table, lingering, turn, changed, prefetch }
    }

    /// The fanotify door.
    pub fn binder(&self) -> Option<&Arc<Binder>> {
        self.binder.as_ref()
    }

    /// All images of a former daemon have come back: an event of a file nobody knows is refused.
    pub fn set_restored(&self) {
        if let Some(binder) = &self.binder {
            binder.bindings().set_restored();
        }
    }

    /// Keeps everybody else from mounting and unmounting.
    pub fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open doors, the newer first.
    pub fn doors(&self) -> impl Iterator<Item = Door> {
        let fanotify = self.binder.is_some().then_some(Door::Fanotify);
        fanotify.into_iter().chain(self.has_cachefiles.then_some(Door::Cachefiles))
    }

    /// The door a mount goes through: the wished one, or the newer of those that are open.
    ///
    /// # Errors
    /// `Unsupported` if it is not open.
    pub fn door(&self, wish: Option<Door>) -> Result<Door> {
        self.doors().find(|door| wish.is_none_or(|wish| wish == *door)).ok_or_else(|| {
            Error::Unsupported(match wish {
                Some(door) => format!("this daemon has not opened the {} door", door.name()),
                None => "this daemon has no door open".into(),
            })
        })
    }

    /// Mounts a registered image. Call it in one's turn.
    ///
    /// # Errors
    /// `Exists` if an image is mounted there; what disk and kernel say.
    pub fn mount(
        &self,
        image: &Arc<Image>,
        at: &Place,
        peer: Option<u32>,
        door: Door,
    ) -> Result<()> {
        if let Some(there) = self.at(at).filter(|_| is_there(at)) {
            let (place, id) = (at.mountpoint.display(), &there.image.id);
            let text = format!("{id} is mounted at {place} already; `sluice umount` it first");
            return Err(Error::Exists(text));
        }
        match (door, &self.binder) {
            (Door::Fanotify, Some(binder)) => {
                let blobs = binder.mount(image, &at.mountpoint, peer)?;
                blobs.into_iter().for_each(&self.prefetch);
                self.relieve(image);
            }
            (Door::Fanotify, None) => return self.door(Some(door)).map(drop),
            (Door::Cachefiles, _) => self.mount_cookies(image, at, peer)?,
        }
        self.note(image, at, door);
        Ok(())
    }

    /// Takes up a mount that a former daemon made. False when it is not there any more and nobody
    /// can read the image.
    pub fn adopt(&self, image: &Arc<Image>, at: &Place, door: Door) -> Result<bool> {
        // Another image may be mounted where this one lingers.
        let is_own = |entry: Entry| Arc::ptr_eq(&entry.image, image);
        let is_there = is_there(at) && self.at(at).is_none_or(is_own);
        if !is_there && !self.is_in_use(image, door) {
            return Ok(false);
        }
        image.touches.resume();
        if let (Door::Fanotify, Some(binder)) = (door, &self.binder) {
            binder.rebind(image)?.into_iter().for_each(&self.prefetch);
        }
        match is_there {
            true => drop(self.lock().insert(at.clone(), Entry { image: Arc::clone(image), door })),
            false => self.linger(Leaving { image: Arc::clone(image), is_kept: false }),
        }
        Ok(true)
    }

    /// Takes a mount away; with an image's last one the image may stay registered (`is_kept`).
    /// Gives what was mounted, and the image if it is over. Call it in one's turn.
    ///
    /// # Errors
    /// `NotFound` if this daemon mounted nothing there; `Busy` while it is in use.
    pub fn unmount(
        &self,
        at: &Place,
        peer: Option<u32>,
        departure: Departure,
        is_kept: bool,
    ) -> Result<(Mounted, Option<Leaving>)> {
        let entry = self.at(at).ok_or_else(|| {
            let place = at.mountpoint.display();
            Error::NotFound(format!("{place}: this daemon has mounted no image there"))
        })?;
        match mounting::detach(&at.mountpoint, peer, departure == Departure::Lazy) {
            // Somebody was faster.
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        self.lock().remove(at);
        let leaving = Leaving { image: Arc::clone(&entry.image), is_kept };
        Ok((entry.mounted(), self.leave(leaving, entry.door, departure)))
    }

    /// An image is mounted no more: what is absent of it is refused from now on.
    pub fn forget(&self, image: &Arc<Image>) {
        if let Some(binder) = &self.binder {
            binder.unbind(image);
        }
    }

    /// Takes mounts out of the table that somebody took away by hand. Gives the images that are
    /// over, those that lingered among them. Call it in one's turn.
    pub fn reconcile(&self) -> Vec<Leaving> {
        let places: Vec<Place> = self.lock().keys().cloned().collect();
        let mut gone = self.lingered();
        // By namespace, whose list is read once: a thousand images are a thousand lines.
        let of_namespaces = places.chunk_by(|one, two| one.namespace == two.namespace);
        let missing = of_namespaces.flat_map(|places| {
            let mounted = erofs_mounts(&places[0]);
            places.iter().filter(move |place| {
                mounted.as_ref().is_some_and(|mounted| !mounted.contains(&place.mountpoint))
            })
        });
        for place in missing {
            let Some(Entry { image, door }) = self.lock().remove(place) else { continue };
            // Lazily or not: nobody says.
            gone.extend(self.leave(Leaving { image, is_kept: false }, door, Departure::Lazy));
        }
        gone
    }

    /// A place of an image is gone. Gives the image if it is over.
    fn leave(&self, leaving: Leaving, door: Door, departure: Departure) -> Option<Leaving> {
        let image = &leaving.image;
        let places = self.places(&image.domain_id, &image.id);
        // Who has the view of a bootstrap open that several images have cannot be told; after a
        // plain unmount it is the others.
        let may_linger = departure == Departure::Lazy || !self.shares_view(image);
        if places.is_empty() && may_linger && self.is_in_use(image, door) {
            self.linger(leaving);
            return None;
        }
        (self.changed)(&image.domain_id, &image.id, &places);
        places.is_empty().then_some(leaving)
    }

    /// Takes out what lingered and is over now, or is mounted again.
    fn lingered(&self) -> Vec<Leaving> {
        let looked_at = std::mem::take(&mut *self.lingering());
        let is_mounted =
            |image: &Arc<Image>| self.lock().values().any(|entry| Arc::ptr_eq(&entry.image, image));
        let (mut gone, mut left) = (Vec::new(), Vec::new());
        for leaving in looked_at.into_iter().filter(|leaving| !is_mounted(&leaving.image)) {
            let is_in_use = self.is_in_use(&leaving.image, Door::Fanotify);
            let list = if is_in_use { &mut left } else { &mut gone };
            list.push(leaving);
        }
        *self.lingering() = left;
        gone
    }

    fn linger(&self, leaving: Leaving) {
        let mut lingering = self.lingering();
        if !lingering.iter().any(|other| Arc::ptr_eq(&other.image, &leaving.image)) {
            lingering.push(leaving);
        }
    }

    /// An image has been mounted: it serves those who linger under its name with the same bytes,
    /// by the way to its registry that is known now.
    fn relieve(&self, image: &Arc<Image>) {
        let is_same = |leaving: &mut Leaving| {
            let other = &leaving.image;
            other.bootstrap_digest == image.bootstrap_digest
                && (&other.domain_id, &other.id) == (&image.domain_id, &image.id)
        };
        let relieved: Vec<Leaving> = self.lingering().extract_if(.., is_same).collect();
        for Leaving { image: other, .. } in relieved {
            if !Arc::ptr_eq(&other, image) {
                self.forget(&other);
            }
        }
    }

    /// Whether somebody can read an image, mounted or not, as far as can be told.
    fn is_in_use(&self, image: &Image, door: Door) -> bool {
        let binder = self.binder.as_ref().filter(|_| door == Door::Fanotify);
        binder.is_some_and(|binder| binder.is_open(image))
    }

    /// Whether another image that somebody may read has the same view.
    fn shares_view(&self, image: &Arc<Image>) -> bool {
        let is_other = |other: &Arc<Image>| {
            !Arc::ptr_eq(other, image) && other.bootstrap_digest == image.bootstrap_digest
        };
        self.lock().values().any(|entry| is_other(&entry.image))
            || self.lingering().iter().any(|leaving| is_other(&leaving.image))
    }

    /// Takes the fanotify door's own mount away, unless a mounted image reads through it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn close(&self) -> Result<()> {
        let is_used = self.lock().values().any(|entry| entry.door == Door::Fanotify)
            || !self.lingering().is_empty();
        match &self.binder {
            Some(binder) if !is_used => binder.close(),
            _ => Ok(()),
        }
    }

    /// All mounts.
    pub fn list(&self) -> Vec<(Place, Mounted)> {
        self.lock().iter().map(|(place, entry)| (place.clone(), entry.mounted())).collect()
    }

    /// Where an image is mounted.
    pub fn places(&self, domain_id: &str, id: &str) -> Vec<(Place, Door)> {
        let table = self.lock();
        let of_image = |image: &Image| image.domain_id == domain_id && image.id == id;
        let places = table.iter().filter(|(_, entry)| of_image(&entry.image));
        places.map(|(place, entry)| (place.clone(), entry.door)).collect()
    }

    fn at(&self, place: &Place) -> Option<Entry> {
        self.lock().get(place).cloned()
    }

    fn note(&self, image: &Arc<Image>, at: &Place, door: Door) {
        self.lock().insert(at.clone(), Entry { image: Arc::clone(image), door });
        (self.changed)(&image.domain_id, &image.id, &self.places(&image.domain_id, &image.id));
    }

    /// The kernel gives an image's volume to one mount; further ones are clones of it.
    fn mount_cookies(&self, image: &Image, at: &Place, peer: Option<u32>) -> Result<()> {
        let places = self.places(&image.domain_id, &image.id);
        let sibling = places.iter().find(|(place, _)| place.namespace == at.namespace);
        let mount = match sibling {
            Some((place, _)) => mounting::another(&place.mountpoint, peer)?,
            None => {
                let domain = (image.domain_id != image.id).then_some(image.domain_id.as_str());
                let blobs: Vec<&str> = image.blobs.iter().map(|blob| blob.id.as_str()).collect();
                mounting::image_of_cookies(&image.id, domain, &blobs)?
            }
        };
        mounting::attach(mount, &at.mountpoint, peer)
    }

    /// Nothing in here panics half-way through a change, so a poisoned lock holds a whole table.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Place, Entry>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lingering(&self) -> MutexGuard<'_, Vec<Leaving>> {
        self.lingering.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    fn mounted(&self) -> Mounted {
        let Entry { image, door } = self;
        Mounted { domain_id: image.domain_id.clone(), id: image.id.clone(), door: *door }
    }
}

fn namespace_of(process: Option<u32>) -> Option<u64> {
    let process = process.map_or("self".into(), |pid| pid.to_string());
    std::fs::metadata(format!("/proc/{process}/ns/mnt")).ok().map(|namespace| namespace.ino())
}

/// Whether an EROFS file system is mounted there. In doubt, yes.
fn is_there(place: &Place) -> bool {
    erofs_mounts(place).is_none_or(|mounted| mounted.contains(&place.mountpoint))
}

/// Where EROFS file systems are mounted in a place's namespace, whatever may be mounted over them;
/// nowhere if nobody is left in it. None if it cannot be told.
fn erofs_mounts(place: &Place) -> Option<HashSet<PathBuf>> {
    let mounts = match place.witness() {
        Ok(witness) => mountinfo::read(witness).ok()?,
        Err(_) => return Some(HashSet::new()),
    };
    let erofs = mounts.into_iter().filter(|mount| mount.kind == "erofs");
    Some(erofs.map(|mount| mount.mountpoint).collect())
}
