//! Who uses what of the caches, and giving back what nobody uses.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Value, json};

use super::control::ControlPlane;
use super::reply;
use crate::blob::journal::Level;
use crate::error::{Error, Result};
use crate::store::segments::BlobUsage;

impl ControlPlane {
    /// GET images: each with its mountpoints and, where it can be told, how much of it is here.
    pub(super) fn images(&self) -> Result<Value> {
        let usage: HashMap<String, BlobUsage> =
            self.usage()?.into_iter().map(|blob| (blob.blob_id.clone(), blob)).collect();
        let images = self.catalog.images();
        let mut listed = reply::images(&images);
        for (image, shown) in images.iter().zip(listed.as_array_mut().into_iter().flatten()) {
            let places = self.mounts.places(&image.domain_id, &image.id);
            let places = places.iter().map(|(place, _)| place.mountpoint.to_string_lossy());
            shown["mountpoints"] = places.collect();
            for blob in shown["blobs"].as_array_mut().into_iter().flatten() {
                let known = blob["id"].as_str().and_then(|id| usage.get(id));
                if let Some(known) = known {
                    blob["fetched"] = known.bytes.into();
                }
            }
        }
        Ok(listed)
    }

    /// GET cache: bytes by blob, and which images have it.
    pub(super) fn cache(&self) -> Result<Value> {
        let mut users: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for image in self.catalog.images() {
            for blob in &image.blobs {
                let name = format!("{}/{}", image.domain_id, image.id);
                users.entry(blob.id.to_string()).or_default().push(name);
            }
        }
        let mut blobs = self.usage()?;
        blobs.sort_by(|one, two| two.bytes.cmp(&one.bytes).then(one.blob_id.cmp(&two.blob_id)));
        let shown = blobs.iter().map(|blob| {
            let since = blob.last_used.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
            json!({
                "id": blob.blob_id,
                "bytes": blob.bytes,
                "last_used_s": since.as_secs(),
                "in_use": blob.is_open,
                "images": users.get(&blob.blob_id).cloned().unwrap_or_default(),
            })
        });
        let used: u64 = blobs.iter().map(|blob| blob.bytes).sum();
        let quota = self.store().map_or(0, |store| store.space().quota());
        Ok(json!({ "used_bytes": used, "quota_bytes": quota, "blobs": shown.collect::<Value>() }))
    }

    /// PUT gc: gives back what no mounted image uses, behind all doors.
    pub(super) fn collect_garbage(&self) -> Result<Value> {
        let _turn = self.mounts.turn();
        // What was unmounted by hand just now is used by nobody.
        self.reconcile();
        let mut freed = 0;
        if let (Some(evictor), Some(binder)) = (&self.evictor, self.mounts.binder()) {
            freed += evictor.remove_unused(u64::MAX);
            freed += binder.remove_views(&self.catalog.images())?;
        }
        let mut cookies = 0;
        if let Some(culler) = &self.culler {
            for (domain, cookie) in culler.cookies()? {
                if self.catalog.object(&domain, &cookie).is_some() {
                    continue;
                }
                match culler.clear(&domain, &cookie) {
                    Ok(removed) => cookies += removed,
                    // Mounted by hand and unregistered since: it goes with its mount.
                    Err(Error::Busy(_)) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        self.journal.write(Level::Info, || format!("gc: {freed} bytes, {cookies} cache files"));
        Ok(json!({ "freed_bytes": freed, "removed_cache_files": cookies }))
    }

    fn usage(&self) -> Result<Vec<BlobUsage>> {
        self.store().map_or(Ok(Vec::new()), |store| store.usage())
    }

    fn store(&self) -> Option<&crate::store::segments::SegmentStore> {
        self.mounts.binder().map(|binder| &**binder.bindings().store())
    }
}
