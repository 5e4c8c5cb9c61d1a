//! What the ledger must know of an image before the image may be opened.
//!
//! Pure but for the ledger and, when its records were lost, the bootstraps of other images.

use std::sync::Arc;

use crate::blob::catalog::{Catalog, Holder, Registered};
use crate::blob::load::read_bootstrap;
use crate::blob::registration::Image;
use crate::error::Result;
use crate::image::bootstrap::Bootstrap;
use crate::store::ledger::Ledger;
use crate::store::record::Record;

/// Has the cache checked for what an image brings, and the image remembered. `catalog` holds the
/// images registered so far, which `image` does not contradict. Blocks on the disk.
///
/// # Errors
/// `Busy` when the cache holds other bytes and is in use; what the disk says.
pub fn admit(
    ledger: &Ledger,
    catalog: &Catalog,
    image: &Image,
    bootstrap: &Bootstrap,
) -> Result<()> {
    let (domain, size) = (image.domain_id.as_str(), image.bootstrap_size_bytes);
    let mut contents = vec![(image.id.as_str(), Record::whole(size, image.bootstrap_digest.0))];
    for (index, blob) in image.blobs.iter().enumerate() {
        let mut record = record_of(bootstrap, index);
        if !ledger.has(domain, blob.id.as_str()) {
            // Others may fill the file as well: they were on record, which somebody removed.
            for Holder { image, blob_index } in holders(catalog, domain, blob.id.as_str()) {
                record = record.overlaid(record_of(&read_bootstrap(&image)?, blob_index as usize));
            }
        }
        contents.push((blob.id.as_str(), record));
    }
    ledger.admit(domain, contents)
}

/// What a data blob's cache file may be filled with on behalf of one image. The digest alone would
/// not do: an image may put a chunk with the right digest in the wrong place.
fn record_of(bootstrap: &Bootstrap, index: usize) -> Record {
    let blob = &bootstrap.blobs()[index];
    let algorithm = blob.digest_algorithm.to_string();
    let fingerprints = bootstrap.chunks_of(index as u32).map(|chunk| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&chunk.digest.0);
        hasher.update(&chunk.uncompressed_offset.to_le_bytes());
        hasher.update(&chunk.uncompressed_size.to_le_bytes());
        hasher.update(algorithm.as_bytes());
        (chunk.index.0, *hasher.finalize().as_bytes())
    });
    Record::new(blob.uncompressed_size, blob.chunk_count, fingerprints.collect())
}

/// The registered images that have a blob.
fn holders(catalog: &Catalog, domain: &str, blob_id: &str) -> Vec<Holder> {
    let Some(Registered::Data { image, blob_index, others }) = catalog.object(domain, blob_id)
    else {
        return Vec::new();
    };
    let first = catalog.images().into_iter().find(|one| Arc::ptr_eq(one, &image));
    let first = first.map(|image| Holder { image, blob_index });
    first.into_iter().chain(others).collect()
}
