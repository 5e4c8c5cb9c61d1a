//! Which images and blobs the kernel may ask for.
//!
//! The lock is held for look-ups and inserts only; bootstraps are read and parsed outside it, so a
//! registration from a hung disk delays nobody. A key (domain, cookie) names one thing: an image's
//! bootstrap or a data blob, never both.
//!
//! Images of one domain share data blobs. A blob keeps the first image's backend for as long as it
//! is referenced, even when that image is gone. Images may list digests for different chunks of a
//! shared blob, but never two digests for the same chunk: the second image is refused.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::awaited::Awaited;
use super::recorder::Recorder;
use super::registration::{Image, ImageSpec};
use crate::config::{CATALOG_IMAGES_MAX, CATALOG_INSERT_TRIES_MAX};
use crate::error::{Error, Result};
use crate::image::bootstrap::Bootstrap;
use crate::image::digest::Digest;

/// The registered images of this daemon. Shared by `Arc`; every method takes `&self`.
#[derive(Debug, Default)]
pub struct Catalog {
    /// Images that were registered before a restart and are still to come.
    pub awaited: Awaited,
    /// Who records what is asked of them.
    pub recorder: Recorder,
    domains: Mutex<BTreeMap<String, Domain>>,
    /// Held by the registration that is being admitted: none comes between admission and insert.
    admitting: Mutex<()>,
}

/// What a cookie stands for.
#[derive(Clone, Debug)]
pub enum Registered {
    /// The bootstrap of an image.
    Bootstrap {
        /// The image.
        image: Arc<Image>,
    },
    /// A data blob.
    Data {
        /// The image that registered the blob first: its backend is the one to use. It may have
        /// been unregistered since.
        image: Arc<Image>,
        /// The blob's index in that image.
        blob_index: u32,
        /// Registered images that list digests for other chunks of the blob, one for each
        /// different list; they also stand in when the first image's bootstrap is gone.
        others: Vec<Holder>,
    },
}

/// An image that has the blob, and at which index.
#[derive(Clone, Debug)]
pub struct Holder {
    /// The image.
    pub image: Arc<Image>,
    /// The blob's index in that image.
    pub blob_index: u32,
}

/// One line of a listing: a registered image or a data blob.
#[derive(Clone, Debug)]
pub struct Listed {
    /// The image, or the one that registered the blob first.
    pub image: Arc<Image>,
    /// The blob's index in `image` and its number of references; none for the image itself.
    pub data: Option<(u32, u32)>,
}

#[derive(Debug, Default)]
struct Domain {
    images: BTreeMap<String, Arc<Image>>,
    blobs: BTreeMap<String, Shared>,
}

/// A data blob of a domain.
#[derive(Debug)]
struct Shared {
    first: Holder,
    /// Registrations minus removals. Removing a blob by its own id counts, as in nydusd, so this
    /// may be less than the number of holders; the blob goes at 0.
    references: u32,
    /// The registered images that have the blob, in order of registration.
    holders: Vec<Holder>,
}

impl Catalog {
    /// Registers an image and its data blobs. Reads and parses the bootstrap (blocks on the disk,
    /// never on the network).
    ///
    /// # Errors
    /// `Exists` when the key is taken, `Malformed` and `Unsupported` for what the bootstrap or the
    /// names are, `System` for what the disk says, `Digest` when a chunk of a shared blob has
    /// another digest in an image that is registered already.
    pub fn register(&self, spec: ImageSpec) -> Result<Arc<Image>> {
        self.register_if(spec, |_, _| Ok(()))
    }

    /// Registers an image if `admit`, which may take its time, agrees. It is asked last, when
    /// nothing else can go wrong, about one image at a time; the image cannot be opened before.
    ///
    /// # Errors
    /// Those of `register` and of `admit`.
    pub fn register_if(
        &self,
        spec: ImageSpec,
        admit: impl Fn(&Image, &Bootstrap) -> Result<()>,
    ) -> Result<Arc<Image>> {
        let domain_id = if spec.domain_id.is_empty() { &spec.id } else { &spec.domain_id };
        self.check_free(domain_id, &spec.id)?;
        let (image, bootstrap) = Image::load(spec)?;
        let image = Arc::new(image);
        // Images compared so far. The lists of holders may grow while we compare outside the lock,
        // so look again until nothing new is found.
        let mut compared: Vec<Arc<Image>> = Vec::new();
        for _ in 0..CATALOG_INSERT_TRIES_MAX {
            let admitting = self.admitting.lock().unwrap_or_else(PoisonError::into_inner);
            let rivals = {
                let domains = self.lock();
                check_insert(&domains, &image)?;
                rivals(&domains, &image, &compared)
            };
            if rivals.is_empty() {
                admit(&image, &bootstrap)?;
                // Images may have gone meanwhile, but none has come.
                insert(&mut self.lock(), &image);
                return Ok(image);
            }
            drop(admitting);
            for (rival, pairs) in rivals {
                compare(&image, &bootstrap, &rival, &pairs)?;
                compared.push(rival);
            }
        }
        Err(Error::unavailable(format!(
            "{}/{}: the images of this domain keep changing; try again",
            image.domain_id, image.id
        )))
    }

    /// Forgets everything of a domain. An unknown domain is no error. Open objects are not touched.
    pub fn unregister_domain(&self, domain_id: &str) {
        self.lock().remove(domain_id);
    }

    /// Forgets an image and its references to its blobs, or takes one reference of a data blob.
    ///
    /// # Errors
    /// `NotFound` when neither an image nor a blob has this id.
    pub fn unregister(&self, domain_id: &str, id: &str) -> Result<()> {
        let mut domains = self.lock();
        let missing = || {
            Error::NotFound(format!(
                "No such file or directory (os error 2): nothing is registered as {domain_id}/{id}"
            ))
        };
        let domain = domains.get_mut(domain_id).ok_or_else(missing)?;
        if let Some(image) = domain.images.remove(id) {
            for blob in &image.blobs {
                domain.release(blob.id.as_str(), Some(&image));
            }
        } else if domain.blobs.contains_key(id) {
            domain.release(id, None);
        } else {
            return Err(missing());
        }
        if domain.images.is_empty() && domain.blobs.is_empty() {
            domains.remove(domain_id);
        }
        Ok(())
    }

    /// What `cookie` of the volume of `domain_id` stands for. `domain_id` is the kernel's volume
    /// key without `erofs,` and the NUL.
    pub fn object(&self, domain_id: &str, cookie: &str) -> Option<Registered> {
        let domains = self.lock();
        let domain = domains.get(domain_id)?;
        if let Some(image) = domain.images.get(cookie) {
            return Some(Registered::Bootstrap { image: image.clone() });
        }
        let shared = domain.blobs.get(cookie)?;
        Some(Registered::Data {
            image: shared.first.image.clone(),
            blob_index: shared.first.blob_index,
            others: shared.others(),
        })
    }

    /// The images and blobs of a domain, images first, or only what is registered as `id`.
    pub fn list(&self, domain_id: &str, id: Option<&str>) -> Vec<Listed> {
        let domains = self.lock();
        let Some(domain) = domains.get(domain_id) else { return Vec::new() };
        let wanted = |key: &String| id.is_none_or(|id| id == key);
        let images = domain.images.iter().filter(|(key, _)| wanted(key));
        let images = images.map(|(_, image)| Listed { image: image.clone(), data: None });
        let blobs = domain.blobs.iter().filter(|(key, _)| wanted(key)).map(|(_, shared)| Listed {
            image: shared.first.image.clone(),
            data: Some((shared.first.blob_index, shared.references)),
        });
        images.chain(blobs).collect()
    }

    /// All registered images, by domain and id.
    pub fn images(&self) -> Vec<Arc<Image>> {
        let domains = self.lock();
        domains.values().flat_map(|domain| domain.images.values().cloned()).collect()
    }

    /// A registered image.
    pub fn image(&self, domain_id: &str, id: &str) -> Option<Arc<Image>> {
        self.lock().get(domain_id)?.images.get(id).cloned()
    }

    fn check_free(&self, domain_id: &str, id: &str) -> Result<()> {
        let domains = self.lock();
        let count: usize = domains.values().map(|domain| domain.images.len()).sum();
        if count >= CATALOG_IMAGES_MAX {
            return Err(Error::Busy(format!(
                "{CATALOG_IMAGES_MAX} images are registered, which is the most; remove some first"
            )));
        }
        match domains.get(domain_id) {
            Some(domain) => domain.check_free(id),
            None => Ok(()),
        }
    }

    /// Nothing in here panics half-way through a change, so a poisoned lock holds whole tables.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Domain>> {
        self.domains.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Domain {
    fn check_free(&self, id: &str) -> Result<()> {
        if self.images.contains_key(id) || self.blobs.contains_key(id) {
            return Err(Error::Exists(format!("blob_cache: bootstrap blob already exists ({id})")));
        }
        Ok(())
    }

    /// Takes one reference of a blob: that of `image`, or anybody's.
    fn release(&mut self, blob_id: &str, image: Option<&Arc<Image>>) {
        let Some(shared) = self.blobs.get_mut(blob_id) else { return };
        if let Some(image) = image {
            shared.holders.retain(|holder| !Arc::ptr_eq(&holder.image, image));
        }
        shared.references = shared.references.saturating_sub(1);
        if shared.references == 0 {
            self.blobs.remove(blob_id);
        }
    }
}

impl Shared {
    /// One registered holder for each list of chunks, other than the first image's own list while
    /// that image is registered.
    fn others(&self) -> Vec<Holder> {
        let is_first = |holder: &Holder| Arc::ptr_eq(&holder.image, &self.first.image);
        let mut lists = Vec::new();
        if self.holders.iter().any(is_first) {
            lists.push(self.first.chunks());
        }
        let mut others = Vec::new();
        for holder in &self.holders {
            if !lists.contains(&holder.chunks()) {
                lists.push(holder.chunks());
                others.push(holder.clone());
            }
        }
        others
    }
}

impl Holder {
    fn chunks(&self) -> Digest {
        self.image.blobs[self.blob_index as usize].chunks
    }
}

/// Blob indexes (ours, theirs) to compare.
type Pairs = Vec<(u32, u32)>;

/// The registered images whose list for a shared blob differs from `image`'s and which are not in
/// `compared`; one image for each different list.
fn rivals(
    domains: &BTreeMap<String, Domain>,
    image: &Image,
    compared: &[Arc<Image>],
) -> Vec<(Arc<Image>, Pairs)> {
    let Some(domain) = domains.get(&image.domain_id) else { return Vec::new() };
    let mut rivals: HashMap<*const Image, (Arc<Image>, Pairs)> = HashMap::new();
    for (index, blob) in image.blobs.iter().enumerate() {
        let Some(shared) = domain.blobs.get(blob.id.as_str()) else { continue };
        let mut lists = vec![blob.chunks];
        let is_compared =
            |holder: &&Holder| compared.iter().any(|done| Arc::ptr_eq(done, &holder.image));
        lists.extend(shared.holders.iter().filter(is_compared).map(Holder::chunks));
        for holder in &shared.holders {
            if !lists.contains(&holder.chunks()) {
                lists.push(holder.chunks());
                let rival = rivals
                    .entry(Arc::as_ptr(&holder.image))
                    .or_insert_with(|| (holder.image.clone(), Vec::new()));
                rival.1.push((index as u32, holder.blob_index));
            }
        }
    }
    rivals.into_values().collect()
}

/// Refuses `image` when it and `rival` give one chunk two digests. A rival whose bootstrap can no
/// longer be read is passed over: it cannot be opened either, and an open blob checks again when
/// it takes our digests in.
fn compare(image: &Image, bootstrap: &Bootstrap, rival: &Image, pairs: &Pairs) -> Result<()> {
    let Ok(theirs) = rival.read_bootstrap().and_then(Bootstrap::parse) else { return Ok(()) };
    for &(ours_index, theirs_index) in pairs {
        // Both lists ascend by chunk index.
        let mut listed = theirs.chunks_of(theirs_index).peekable();
        for chunk in bootstrap.chunks_of(ours_index) {
            while listed.next_if(|other| other.index < chunk.index).is_some() {}
            let same = listed.next_if(|other| other.index == chunk.index);
            if same.is_some_and(|other| other.digest != chunk.digest) {
                return Err(Error::Digest(format!(
                    "chunk {} of blob {} has another digest in image {}/{}; \
                     one of the two bootstraps is wrong",
                    chunk.index, image.blobs[ours_index as usize].id, rival.domain_id, rival.id
                )));
            }
        }
    }
    Ok(())
}

/// Whether there is room for `image` beside what is registered.
fn check_insert(domains: &BTreeMap<String, Domain>, image: &Image) -> Result<()> {
    if let Some(domain) = domains.get(&image.domain_id) {
        domain.check_free(&image.id)?;
        for blob in &image.blobs {
            let id = blob.id.as_str();
            if domain.images.contains_key(id) {
                return Err(Error::Exists(format!(
                    "blob {id} has the id of an image of the same domain"
                )));
            }
            let shape = domain.blobs.get(id).map(Shared::shape);
            if shape.is_some_and(|shape| shape != blob.shape()) {
                return Err(Error::Malformed(format!(
                    "blob {id} has another size or number of chunks in an image that is \
                     registered already"
                )));
            }
        }
    }
    Ok(())
}

/// Puts `image` in, which has been checked.
fn insert(domains: &mut BTreeMap<String, Domain>, image: &Arc<Image>) {
    let domain = domains.entry(image.domain_id.clone()).or_default();
    for (index, blob) in image.blobs.iter().enumerate() {
        let holder = Holder { image: image.clone(), blob_index: index as u32 };
        let shared = domain.blobs.entry(blob.id.to_string()).or_insert_with(|| Shared {
            first: holder.clone(),
            references: 0,
            holders: Vec::new(),
        });
        shared.references += 1;
        shared.holders.push(holder);
    }
    domain.images.insert(image.id.clone(), image.clone());
}

impl Shared {
    fn shape(&self) -> (u64, u32) {
        self.first.image.blobs[self.first.blob_index as usize].shape()
    }
}
