//! Registering and forgetting images: the part of the control plane that changes what is there.
//!
//! An image is remembered on disk before its client is told. What came back from disk after a
//! restart is the client's to register once more, as if there had been none.

use std::sync::Arc;

use super::admission;
use super::control::ControlPlane;
use super::entry::Entry;
use super::mounts::{Door, Mounted};
use super::remember::Key;
use super::succession::Claim;
use crate::blob::journal::Level;
use crate::blob::registration::{Image, ImageSpec};
use crate::error::{Error, Result};

impl ControlPlane {
    /// Registers what an entry describes, and tells the daemon. `body` is the entry's JSON. What
    /// came back from disk is the client's to register once more.
    pub fn register(&self, entry: Entry, body: &[u8]) -> Result<Arc<Image>> {
        let spec = entry.into_spec()?;
        let domain_id = if spec.domain_id.is_empty() { &spec.id } else { &spec.domain_id };
        let key = (domain_id.clone(), spec.id.clone());
        let image = match self.admit(spec.clone()) {
            Err(exists @ Error::Exists(_)) => match self.restored.claim(&key, body) {
                Claim::Taken => return Err(exists),
                claim => match self.keep(&key, &spec, claim) {
                    Some(image) => return Ok(image),
                    None => self.replace(&key, spec)?,
                },
            },
            outcome => outcome?,
        };
        self.journal.write(Level::Info, || {
            format!(
                "image {}/{} registered: {} blobs, bootstrap {}",
                image.domain_id,
                image.id,
                image.blobs.len(),
                image.bootstrap_path.display()
            )
        });
        if let Err(error) = (self.hooks.registered)(&image, body) {
            // Nobody has been told of it; if somebody else took it away meanwhile, all the better.
            let _ = self.catalog.unregister(&key.0, &key.1);
            return Err(error);
        }
        // Removed while the hook ran, when there was nothing to forget yet.
        if self.catalog.object(&image.domain_id, &image.id).is_none() {
            (self.hooks.forgotten)(&image.domain_id, Some(&image.id));
        }
        Ok(image)
    }

    fn admit(&self, spec: ImageSpec) -> Result<Arc<Image>> {
        let image = self.catalog.register_if(spec, |image, bootstrap| {
            let ledger = self.ledger.as_ref();
            ledger.map_or(Ok(()), |it| admission::admit(it, &self.catalog, image, bootstrap))
        })?;
        self.recall_start(&image);
        Ok(image)
    }

    fn replace(&self, (domain_id, id): &Key, spec: ImageSpec) -> Result<Arc<Image>> {
        self.check_unused(domain_id, Some(id))?;
        self.catalog.unregister(domain_id, id)?;
        self.admit(spec)
    }

    /// The image that came back from disk, if it is what the client means. Its bootstrap may have
    /// been replaced by another since; what somebody reads stays as it is.
    fn keep(&self, key: &Key, spec: &ImageSpec, claim: Claim) -> Option<Arc<Image>> {
        let image = self.catalog.image(&key.0, &key.1)?;
        let is_mounted = !self.mounts.places(&key.0, &key.1).is_empty();
        let is_meant = match is_mounted {
            true => image.has_bootstrap(&spec.metadata_path),
            false => claim == Claim::Same && image.read_bootstrap().is_ok(),
        };
        is_meant.then_some(image)
    }

    /// Forgets an image, on disk too.
    pub(super) fn unregister(&self, domain_id: &str, id: &str) -> Result<()> {
        if let Some(image) = self.catalog.image(domain_id, id) {
            self.keep_start(&image, true);
        }
        self.catalog.unregister(domain_id, id)?;
        (self.hooks.forgotten)(domain_id, Some(id));
        Ok(())
    }

    /// An image this daemon has mounted is not forgotten while somebody may read it.
    pub(super) fn check_unused(&self, domain_id: &str, id: Option<&str>) -> Result<()> {
        let mounts = self.mounts.list();
        let is_meant = |mounted: &Mounted| {
            mounted.door == Door::Fanotify
                && mounted.domain_id == domain_id
                && id.is_none_or(|id| mounted.id == id)
        };
        match mounts.iter().find(|(_, mounted)| is_meant(mounted)) {
            None => Ok(()),
            Some((place, mounted)) => Err(Error::Busy(format!(
                "image {domain_id}/{} is mounted at {}; unmount it first",
                mounted.id,
                place.mountpoint.display()
            ))),
        }
    }
}
