//! An open blob: everything the cores share about one data blob while the kernel has it open.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::cache::Cache;
use super::registration::Image;
use super::schedule::Streams;
use crate::image::identity::BlobId;
use crate::image::layout::Layout;
use crate::registry::route::Route;

/// One data blob, open in the kernel: of one domain behind the cachefiles door, of one image behind
/// the fanotify door. Shared by all cores.
pub struct OpenBlob {
    /// The image that registered the blob first: its backend and work directory are used.
    pub image: Arc<Image>,
    /// The blob's place in that image.
    pub blob_index: u32,
    /// Where its bytes come from.
    pub route: Arc<Route>,
    /// Where its bytes go, what is there and who fetches the rest.
    pub cache: Cache,
    /// Who reads it in order.
    pub streams: Streams,
    /// Set once the kernel has closed the object: no new fetch begins.
    pub is_closed: AtomicBool,
    /// Fetches of prefetch that have not ended.
    pub prefetch_flights: AtomicU32,
    /// One of them has failed since prefetch last looked.
    pub prefetch_has_failed: AtomicBool,
    layout: RwLock<Option<Arc<Layout>>>,
    is_loading: AtomicBool,
    /// Whether the map knows what the cache held already.
    is_scanned: AtomicBool,
}

impl OpenBlob {
    /// A blob whose layout has yet to be loaded.
    pub fn new(image: Arc<Image>, blob_index: u32, route: Arc<Route>, cache: Cache) -> Self {
        image.touches.prepare();
        OpenBlob {
            image,
            blob_index,
            route,
            // What segments hold their files say.
            is_scanned: AtomicBool::new(cache.is_ordered()),
            cache,
            streams: Streams::default(),
            is_closed: AtomicBool::new(false),
            prefetch_flights: AtomicU32::new(0),
            prefetch_has_failed: AtomicBool::new(false),
            layout: RwLock::new(None),
            is_loading: AtomicBool::new(false),
        }
    }

    /// The blob's id.
    pub fn id(&self) -> &BlobId {
        &self.image.blobs[self.blob_index as usize].id
    }

    /// Bytes of its address space.
    pub fn size(&self) -> u64 {
        self.image.blobs[self.blob_index as usize].uncompressed_size_bytes
    }

    /// Image and blob, as log lines name them.
    pub fn name(&self) -> String {
        format!("image {}/{}, blob {}", self.image.domain_id, self.image.id, self.id())
    }

    /// The layout, once loaded. The lock is written a few times in the blob's life: a read costs
    /// one uncontended atomic.
    pub fn layout(&self) -> Option<Arc<Layout>> {
        self.layout.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Prefetch has begun to fetch so many bytes.
    pub fn prefetch_took_off(&self, bytes: u64) {
        self.route.pace.took_off(bytes);
        self.prefetch_flights.fetch_add(1, Ordering::Relaxed);
    }

    /// A fetch of prefetch has ended.
    pub fn prefetch_landed(&self, bytes: u64, is_whole: bool) {
        self.route.pace.landed(bytes);
        self.prefetch_has_failed.fetch_or(!is_whole, Ordering::Relaxed);
        // Release pairs with prefetch's Acquire: who sees that it ended sees how.
        self.prefetch_flights.fetch_sub(1, Ordering::Release);
    }

    /// Puts a layout in place.
    pub fn set_layout(&self, layout: Arc<Layout>) {
        *self.layout.write().unwrap_or_else(PoisonError::into_inner) = Some(layout);
    }

    /// Whether the map knows what the cache held when the blob was opened.
    pub fn is_scanned(&self) -> bool {
        self.is_scanned.load(Ordering::Acquire)
    }

    /// The map knows from now on.
    pub fn set_scanned(&self) {
        self.is_scanned.store(true, Ordering::Release);
    }

    /// Takes the right to load the layout; false while another core has it.
    pub fn begin_loading(&self) -> bool {
        !self.is_loading.swap(true, Ordering::AcqRel)
    }

    /// Gives that right back.
    pub fn end_loading(&self) {
        self.is_loading.store(false, Ordering::Release);
    }
}
