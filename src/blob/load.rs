//! Loading a blob's layout: from the bootstrap at OPEN, and, for blobs whose bootstrap does not say
//! where chunks are stored, from the context table at the first read.
//!
//! A failed load is not remembered: the next read tries again. Other images may register the same
//! blob later and use more of its chunks; a read of a chunk the layout does not list loads it
//! again.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use super::cache::Cache;
use super::catalog::{Holder, Registered};
use super::crew::Crew;
use super::latency::Cause;
use super::map::Map;
use super::open::OpenBlob;
use super::registration::Image;
use super::retry::Tries;
use crate::config::{CONTEXT_TABLE_MAX_BYTES, LAYOUT_LOOK_NS, RANGE_LEASE_SIZE, SETTLE_LOOK_NS};
use crate::engine::{Class, Lane};
use crate::error::{Error, Result};
use crate::image::blob_table::BlobRecord;
use crate::image::bootstrap::Bootstrap;
use crate::image::context::{ContextTable, HEADER_BYTES};
use crate::image::identity::{BlobId, ChunkIndex};
use crate::image::layout::Layout;
use crate::registry::client::BlobRef;
use crate::registry::route::Route;
use crate::store::object::CacheObject;

/// Reads an image's bootstrap again and checks that it is the one that was registered.
/// Blocks on the disk: for helper threads.
pub fn read_bootstrap(image: &Image) -> Result<Bootstrap> {
    let bytes = image.read_bootstrap()?;
    Bootstrap::parse(bytes).map_err(|error| error.context(image.bootstrap_path.display()))
}

/// Lays a blob out from the bootstraps of all images that have it. Blocks on the disk.
fn build(holders: &[Holder], context: Option<&ContextTable>) -> Result<Layout> {
    let mut merged: Option<Layout> = None;
    for Holder { image, blob_index } in holders {
        let layout = Layout::build(&read_bootstrap(image)?, *blob_index, context)?;
        match &mut merged {
            Some(merged) => merged.merge_digests(&layout)?,
            None => merged = Some(layout),
        }
    }
    merged.ok_or_else(|| Error::NotFound("no image has this blob any more".into()))
}

impl Crew {
    /// A blob the kernel is opening. Its bootstrap is read and checked now; what needs the network,
    /// and what the cache holds already, is found out at the first read.
    pub async fn open_blob(
        self: &Rc<Self>,
        holders: Vec<Holder>,
        route: Arc<Route>,
        object: CacheObject,
    ) -> Result<Arc<OpenBlob>> {
        let first = holders.first().expect("a registered blob has an image");
        let (image, blob_index) = (Arc::clone(&first.image), first.blob_index);
        let loaded = self.core.offload(move || {
            let bootstrap = read_bootstrap(&holders[0].image)?;
            let record = &bootstrap.blobs()[holders[0].blob_index as usize];
            let layout = match Layout::needs_context(record) {
                true => None,
                false => Some(build(&holders, None)?),
            };
            Ok((record.chunk_count, layout))
        });
        let (chunk_count, layout) = loaded.await?;
        let cache = Cache::Object { object, map: Map::new(chunk_count) };
        let blob = OpenBlob::new(image, blob_index, route, cache);
        if let Some(layout) = layout {
            blob.set_layout(Arc::new(layout));
        }
        Ok(Arc::new(blob))
    }

    /// The layout of a blob, loading it when it is not there or lacks chunks of `range`.
    pub(super) async fn layout(
        self: &Rc<Self>,
        blob: &Arc<OpenBlob>,
        range: &Range<u64>,
        cause: Cause,
        deadline_ns: u64,
    ) -> Result<Arc<Layout>> {
        let mut may_reload = true;
        let began_ns = self.core.now();
        loop {
            if let Some(layout) = blob.layout().filter(|_| blob.is_scanned())
                && (lists_all(&layout, range) || !may_reload || blob.cache.is_ordered())
            {
                return Ok(layout);
            }
            if !blob.begin_loading() {
                if self.core.now() >= deadline_ns {
                    return Err(Error::Deadline(format!("{}: layout", blob.name())));
                }
                // Many may wait for long, and whoever has waited for long may be a little late.
                let waited_ns = self.core.now() - began_ns;
                let look_ns = (waited_ns / 8).clamp(LAYOUT_LOOK_NS, SETTLE_LOOK_NS);
                self.core.sleep(look_ns).await?;
                continue;
            }
            let loaded = match blob.layout().filter(|_| !blob.is_scanned()) {
                Some(layout) => Ok(layout),
                None => self.load(blob, cause, deadline_ns).await,
            };
            if let Ok(layout) = &loaded
                && !blob.is_scanned()
            {
                self.find_present(blob, layout);
                blob.set_scanned();
            }
            may_reload = !blob.is_scanned();
            blob.end_loading();
            match loaded {
                Ok(layout) => blob.set_layout(layout),
                // What is known already may still serve this read.
                Err(_) if blob.layout().is_some() => {}
                Err(error) => return Err(error.context(blob.name())),
            }
        }
    }

    async fn load(
        self: &Rc<Self>,
        blob: &Arc<OpenBlob>,
        cause: Cause,
        deadline_ns: u64,
    ) -> Result<Arc<Layout>> {
        let holders = self.holders(blob);
        let image = Arc::clone(&blob.image);
        let index = blob.blob_index as usize;
        let record =
            self.core.offload(move || Ok(read_bootstrap(&image)?.blobs()[index].clone())).await?;
        let layout = if Layout::needs_context(&record) {
            let (table, header) = self.context(blob, &record, cause, deadline_ns).await?;
            self.core
                .offload(move || {
                    let context = ContextTable::parse(&record, &table, &header)?;
                    build(&holders, Some(&context))
                })
                .await?
        } else {
            self.core.offload(move || build(&holders, None)).await?
        };
        Ok(Arc::new(layout))
    }

    /// The images that have the blob, the one it was opened for first.
    fn holders(&self, blob: &OpenBlob) -> Vec<Holder> {
        let first = Holder { image: Arc::clone(&blob.image), blob_index: blob.blob_index };
        let mut holders = vec![first];
        if blob.cache.is_ordered() {
            // Segments are this image's: other images' chunks are not in them.
            return holders;
        }
        let found = self.parts.catalog.object(&blob.image.domain_id, blob.id().as_str());
        if let Some(Registered::Data { image, blob_index, others }) = found {
            holders.push(Holder { image, blob_index });
            holders.extend(others);
        }
        holders.dedup_by(|a, b| Arc::ptr_eq(&a.image, &b.image));
        holders
    }

    /// Marks what the cache holds already.
    fn find_present(&self, blob: &OpenBlob, layout: &Layout) {
        let Cache::Object { object, map } = &blob.cache else { return };
        let mut at = 0;
        while let Some(data) = object.next_data(&self.core, at) {
            for chunk in layout.chunks_in(data.clone()).map(ChunkIndex) {
                let extent = layout.chunk(chunk);
                let end = extent.uncompressed_offset + u64::from(extent.padded_size());
                let is_whole = extent.uncompressed_offset >= data.start && end <= data.end;
                if is_whole && extent.digest.is_some() {
                    map.found(chunk);
                }
            }
            at = data.end;
        }
    }

    /// The compressed context table and its header, from the blob or the small blob beside it.
    async fn context(
        self: &Rc<Self>,
        blob: &Arc<OpenBlob>,
        record: &BlobRecord,
        cause: Cause,
        deadline_ns: u64,
    ) -> Result<(Vec<u8>, Vec<u8>)> {
        let range = record.context_range();
        let size = (range.end - range.start) as usize;
        if size > CONTEXT_TABLE_MAX_BYTES {
            return Err(Error::Unsupported(format!("a context table of {size} bytes")));
        }
        let id = context_blob(&blob.image, record)?;
        let mut bytes = Vec::with_capacity(size);
        let mut tries = Tries::new(blob, cause, deadline_ns);
        while bytes.len() < size {
            let at = range.start + bytes.len() as u64;
            let part = at..range.end.min(at + RANGE_LEASE_SIZE as u64);
            match self.append(blob, &id, part, deadline_ns, &mut bytes).await {
                Ok(()) => tries.progressed(),
                Err(error) if self.try_again(&mut tries, &error).await => {}
                Err(error) => return Err(error),
            }
        }
        let header = bytes.split_off(size - HEADER_BYTES);
        Ok((bytes, header))
    }

    /// Reads a part of a blob as it is stored, no longer than a range lease.
    async fn append(
        &self,
        blob: &OpenBlob,
        id: &BlobId,
        part: Range<u64>,
        deadline_ns: u64,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let size = (part.end - part.start) as usize;
        let (client, blob_ref) = (&self.parts.client, BlobRef { id: id.as_str() });
        let (core, lane) = (&self.core, Lane::Demand);
        let mut body = client.open(core, &blob.route, blob_ref, part, deadline_ns, lane).await?;
        // Not before something arrives: a dead registry would hold all leases.
        let _landing = self.landings.acquire(core).await;
        let mut lease = core.lease_for(lane, Class::Range).await;
        let mut landed = 0;
        while landed < size {
            let got;
            (lease, got) = body.read_into(core, lease, landed..size).await;
            landed += got?;
        }
        body.finish();
        blob.route.proven();
        bytes.extend_from_slice(&lease[..size]);
        Ok(())
    }
}

/// Whether the layout lists every chunk of a range.
fn lists_all(layout: &Layout, range: &Range<u64>) -> bool {
    layout.chunks_in(range.clone()).all(|chunk| layout.chunk(ChunkIndex(chunk)).digest.is_some())
}

/// The blob that holds the context table. Where the bootstrap does not name it, the bootstrap is
/// inlined in it and its file is called after it, up to the first dot.
fn context_blob(image: &Image, record: &BlobRecord) -> Result<BlobId> {
    record.context_blob().or_else(|error| {
        let name = image.bootstrap_path.file_name().and_then(|name| name.to_str());
        let name = name.and_then(|name| name.split('.').next());
        name.and_then(|name| BlobId::parse(name).ok()).ok_or(error)
    })
}
