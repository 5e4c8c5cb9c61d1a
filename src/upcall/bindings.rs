//! The images that are bound behind the fanotify door, and from a segment's name to a blob that
//! fills it.
//!
//! A bound image costs next to nothing until somebody reads what is absent: an event says a file,
//! the file's path says blob, number and recipe, and only then the image is *awake*: its bootstrap
//! is read, the blob is cut and its segments' files are looked at. Who has been idle for a while
//! is put to sleep again. Segments are interned by the store, so that it does not matter through
//! which of several images, or how often, one is woken.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::blob::cache::{Cache, Segments};
use crate::blob::load::read_bootstrap;
use crate::blob::open::OpenBlob;
use crate::blob::registration::Image;
use crate::error::{Error, Result};
use crate::image::Segmentation;
use crate::image::layout::Layout;
use crate::registry::route::Shared;
use crate::store::segment::Segment;
use crate::store::segments::{BlobDirectory, SegmentStore};

/// All bound images. Shared by `Arc` with the cores.
pub struct Bindings {
    store: Arc<SegmentStore>,
    routes: Arc<Shared>,
    /// By blob.
    table: RwLock<HashMap<Box<str>, Vec<Holder>>>,
    /// Whether all images that were bound before a restart are bound again.
    is_restored: AtomicBool,
}

/// An image that has a blob, and at which index.
#[derive(Clone)]
pub struct Holder {
    /// The image.
    pub bound: Arc<Bound>,
    /// The blob's index in it.
    pub blob_index: u32,
}

/// One bound image.
pub struct Bound {
    /// The image.
    pub image: Arc<Image>,
    /// Its blobs' directories: nobody evicts a blob whose directory is open.
    directories: Vec<Arc<BlobDirectory>>,
    /// By blob index; absent while the blob sleeps.
    awake: Box<[Mutex<Option<Arc<OpenBlob>>>]>,
    /// By blob index: whether somebody wakes it.
    is_waking: Box<[AtomicBool]>,
    /// When an event was last served through it, in ns on the cores' clock.
    last_event_ns: AtomicU64,
}

/// What a segment's path says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SegmentName<'a> {
    /// The blob.
    pub blob_id: &'a str,
    /// The file's name.
    pub name: &'a str,
    /// The segment's number in the blob.
    pub number: u32,
}

impl<'a> SegmentName<'a> {
    /// Reads the last two parts of a path as the kernel shows it.
    pub fn parse(path: &'a [u8]) -> Option<SegmentName<'a>> {
        let path = std::str::from_utf8(path).ok()?;
        let (directory, name) = path.rsplit_once('/')?;
        let blob_id = directory.rsplit('/').next()?;
        let number = u32::from_str_radix(name.split_once('-')?.0, 16).ok()?;
        Some(SegmentName { blob_id, name, number })
    }
}

impl Bindings {
    /// None yet.
    pub fn new(store: Arc<SegmentStore>, routes: Arc<Shared>) -> Arc<Bindings> {
        let (table, is_restored) = (RwLock::default(), AtomicBool::new(false));
        Arc::new(Bindings { store, routes, table, is_restored })
    }

    /// Where the segments are.
    pub fn store(&self) -> &Arc<SegmentStore> {
        &self.store
    }

    /// Whether an unknown file is one of nobody's. Before that it may be an image's that is yet to
    /// be bound again.
    pub fn is_restored(&self) -> bool {
        self.is_restored.load(Ordering::Acquire)
    }

    /// All images of a former daemon are bound again.
    pub fn set_restored(&self) {
        self.is_restored.store(true, Ordering::Release);
    }

    /// Binds an image with its blobs' directories: its segments are filled on demand from now on.
    pub fn bind(&self, image: &Arc<Image>, directories: Vec<Arc<BlobDirectory>>) -> Arc<Bound> {
        let count = image.blobs.len();
        let bound = Arc::new(Bound {
            image: Arc::clone(image),
            directories,
            awake: (0..count).map(|_| Mutex::default()).collect(),
            is_waking: (0..count).map(|_| AtomicBool::new(false)).collect(),
            last_event_ns: AtomicU64::new(0),
        });
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        for (index, blob) in image.blobs.iter().enumerate() {
            let holder = Holder { bound: Arc::clone(&bound), blob_index: index as u32 };
            table.entry(blob.id.as_str().into()).or_default().push(holder);
        }
        bound
    }

    /// Forgets an image: what is absent of its segments is refused from now on, unless another
    /// image has them. Fetches under way end by themselves.
    pub fn unbind(&self, image: &Arc<Image>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        for blob in &image.blobs {
            let Some(holders) = table.get_mut(blob.id.as_str()) else { continue };
            for holder in holders.iter().filter(|holder| Arc::ptr_eq(&holder.bound.image, image)) {
                holder.bound.directories.iter().for_each(|directory| directory.touch());
                holder.bound.sleep();
            }
            holders.retain(|holder| !Arc::ptr_eq(&holder.bound.image, image));
            if holders.is_empty() {
                table.remove(blob.id.as_str());
            }
        }
    }

    /// How an image is bound, if it is.
    pub fn of_image(&self, image: &Arc<Image>) -> Option<Arc<Bound>> {
        let blob = image.blobs.first()?;
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let holders = table.get(blob.id.as_str())?;
        let holder = holders.iter().find(|holder| Arc::ptr_eq(&holder.bound.image, image))?;
        Some(Arc::clone(&holder.bound))
    }

    /// The bound image at `place` among those that have a blob.
    pub fn holder(&self, blob_id: &str, place: usize) -> Option<Holder> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.get(blob_id)?.get(place).cloned()
    }

    /// The complete segments of bound images, those of the longest idle images first.
    pub fn complete_segments(&self) -> Vec<Arc<Segment>> {
        let mut holders: Vec<Holder> = {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            table.values().flatten().cloned().collect()
        };
        holders.sort_by_key(|holder| holder.bound.last_event_ns.load(Ordering::Relaxed));
        let mut segments: Vec<Arc<Segment>> = Vec::new();
        for holder in holders {
            // Its plan says the names; what cannot be read is left alone.
            let blob = holder.awake().map_or_else(|| holder.wake(self), Ok);
            if let Some(Cache::Segments(own)) = blob.as_ref().ok().map(|blob| &blob.cache) {
                segments.extend(own.files().iter().filter(|file| file.is_complete()).cloned());
            }
        }
        let mut seen = std::collections::HashSet::new();
        segments.retain(|segment| seen.insert(Arc::as_ptr(segment)));
        segments
    }

    /// Puts images to sleep that served no event since `before_ns`. Gives how many blobs went.
    pub fn doze(&self, before_ns: u64) -> usize {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let holders = table.values().flatten();
        holders.filter(|holder| holder.doze(before_ns)).count()
    }
}

impl Holder {
    /// The blob, if it is awake and the segment is one of it.
    pub fn awake(&self) -> Option<Arc<OpenBlob>> {
        self.bound.blob(self.blob_index).clone()
    }

    /// Takes the right to wake the blob; false while somebody else does.
    pub fn begin_waking(&self) -> bool {
        !self.bound.is_waking[self.blob_index as usize].swap(true, Ordering::AcqRel)
    }

    /// Gives that right back.
    pub fn end_waking(&self) {
        self.bound.is_waking[self.blob_index as usize].store(false, Ordering::Release);
    }

    /// Notes that somebody needs it.
    pub fn touch(&self, now_ns: u64) {
        self.bound.last_event_ns.store(now_ns, Ordering::Relaxed);
    }

    /// Wakes the blob: reads the bootstrap, cuts the blob, looks at its segments' files. Blocks on
    /// the disk.
    ///
    /// # Errors
    /// What the disk says; a bootstrap that has changed.
    pub fn wake(&self, bindings: &Bindings) -> Result<Arc<OpenBlob>> {
        let image = &self.bound.image;
        let index = self.blob_index as usize;
        let bootstrap = read_bootstrap(image)?;
        let mut plans = Segmentation::of_image(&bootstrap)?;
        let plan = plans.swap_remove(index);
        let layout = match Layout::needs_context(&bootstrap.blobs()[index]) {
            true => None,
            false => Some(Layout::build(&bootstrap, self.blob_index, None)?),
        };
        drop((bootstrap, plans));
        let directory = bindings.store.directory(image.blobs[index].id.as_str())?;
        let files = plan.segments().map(|plan| directory.segment(&plan.file_name(), plan.size));
        let files = files.collect::<Result<Box<[_]>>>()?;
        let route = bindings.routes.route(&image.backend)?;
        let cache = Cache::Segments(Segments::new(plan, files));
        let blob = Arc::new(OpenBlob::new(Arc::clone(image), self.blob_index, route, cache));
        if let Some(layout) = layout {
            blob.set_layout(Arc::new(layout));
        }
        let mut awake = self.bound.blob(self.blob_index);
        Ok(Arc::clone(awake.get_or_insert(blob)))
    }

    fn doze(&self, before_ns: u64) -> bool {
        if self.bound.last_event_ns.load(Ordering::Relaxed) >= before_ns {
            return false;
        }
        let mut awake = self.bound.blob(self.blob_index);
        // Held by a fetch or a reader otherwise: not idle.
        let is_idle = awake.as_ref().is_some_and(|blob| Arc::strong_count(blob) == 1);
        if is_idle {
            *awake = None;
        }
        is_idle
    }
}

impl Bound {
    fn blob(&self, index: u32) -> MutexGuard<'_, Option<Arc<OpenBlob>>> {
        self.awake[index as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// No new fetch begins for it.
    fn sleep(&self) {
        for index in 0..self.awake.len() {
            if let Some(blob) = self.blob(index as u32).take() {
                blob.is_closed.store(true, Ordering::Relaxed);
            }
        }
    }
}

/// What nobody bound.
pub(super) fn unknown(name: &SegmentName<'_>) -> Error {
    Error::NotFound(format!(
        "segment {} of blob {} belongs to no image that is mounted here",
        name.name, name.blob_id
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_blob_and_segment() {
        let recipe = "00112233445566778899aabbccddeeff";
        let path = format!("/run/door/aabb/1f-{recipe}");
        let name = SegmentName::parse(path.as_bytes()).unwrap();
        assert_eq!((name.blob_id, name.number), ("aabb", 0x1f));
        assert_eq!(name.name, format!("1f-{recipe}"));
        for path in ["", "/", "a-b", "/x/y", "/x/-1", "/x/zz-1", "/x/123456789-1"] {
            assert_eq!(SegmentName::parse(path.as_bytes()), None, "{path}");
        }
        assert_eq!(SegmentName::parse(b"/x/1-\xff"), None);
    }
}
