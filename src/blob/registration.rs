//! One registered image: what a caller must say about it, and the little that is kept.
//!
//! Loading reads the bootstrap once, checks it whole and drops it: a node holds a thousand images
//! and most are never opened. What stays is a digest of the file, so that the bytes served at OPEN
//! are the bytes that were checked. Everything here blocks on the disk; it is called from control
//! threads or a core's helper threads, never on a core.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::inlined;
use super::touches::Touches;
use crate::config::{CATALOG_BOOTSTRAP_MAX_BYTES, CATALOG_DOMAIN_MAX_BYTES, CATALOG_ID_MAX_BYTES};
use crate::error::{Error, Result};
use crate::image::blob_table::BlobRecord;
use crate::image::bootstrap::Bootstrap;
use crate::image::digest::Digest;
use crate::image::identity::BlobId;
use crate::image::prefetch::start_bytes;
use crate::registry::config::Backend;

/// What may be fetched before anybody asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PrefetchConfig {
    /// Whether anything is prefetched at all.
    pub enable: bool,
    /// How many fetches run at once.
    pub threads: u32,
    /// How many bytes one fetch asks for.
    pub merging_size_bytes: u64,
    /// The most bytes per second prefetch may use; 0 is no bound.
    pub bandwidth_bytes_per_second: u64,
}

impl Default for PrefetchConfig {
    fn default() -> Self {
        let (threads, merging_size_bytes) = (8, 1 << 20);
        Self { enable: false, threads, merging_size_bytes, bandwidth_bytes_per_second: 0 }
    }
}

/// What a client says about an image when it registers it.
#[derive(Clone, Debug)]
pub struct ImageSpec {
    /// The volume the image is mounted from: EROFS's domain_id, or its fsid where there is none.
    /// Empty means "equal to `id`", which is what the kernel asks for then.
    pub domain_id: String,
    /// The cookie of the bootstrap: EROFS's fsid.
    pub id: String,
    /// The client's own name of the configuration; statistics are filed under it.
    pub config_id: String,
    /// The bootstrap file, or a local blob that holds one behind its table of contents.
    pub metadata_path: PathBuf,
    /// Where the blobs' bytes come from.
    pub backend: Backend,
    /// An existing directory for what belongs to the image (blob.meta, extracted bootstraps).
    pub work_dir: PathBuf,
    /// What may be fetched ahead.
    pub prefetch: PrefetchConfig,
}

/// One data blob of an image, by its place in the blob table.
#[derive(Clone, Debug)]
pub struct ImageBlob {
    /// The blob's name in the registry and its cookie in the kernel.
    pub id: BlobId,
    /// The size of its address space: the size its cookie is opened with.
    pub uncompressed_size_bytes: u64,
    /// Chunks in that space, listed by this bootstrap or not.
    pub chunk_count: u32,
    /// A digest over all (chunk index, chunk digest) pairs this bootstrap lists for the blob.
    pub chunks: Digest,
}

/// One registered image. Small: no chunk is held here. Immutable but for its touches.
#[derive(Debug)]
pub struct Image {
    /// The volume, never empty.
    pub domain_id: String,
    /// The bootstrap's cookie.
    pub id: String,
    /// The client's name of the configuration, possibly empty.
    pub config_id: String,
    /// The bootstrap; differs from the registered path when it was extracted from a blob.
    pub bootstrap_path: PathBuf,
    /// blake3 of the file that was checked at registration.
    pub bootstrap_digest: Digest,
    /// The file's size in bytes: the size its cookie is opened with.
    pub bootstrap_size_bytes: u64,
    /// Where the blobs' bytes come from.
    pub backend: Backend,
    /// The directory for what belongs to the image.
    pub work_dir: PathBuf,
    /// What may be fetched ahead.
    pub prefetch: PrefetchConfig,
    /// The data blobs; position = blob index in the bootstrap.
    pub blobs: Vec<ImageBlob>,
    /// The size of the first blob, if the image was optimised for a start and that is in it.
    pub start_bytes: u64,
    /// What its readers need first.
    pub touches: Touches,
}

impl Image {
    /// Reads the bootstrap again, for OPEN: the bytes that were checked at registration, or an
    /// error that says the file has changed since. Blocks on the disk.
    pub fn read_bootstrap(&self) -> Result<Vec<u8>> {
        let bytes = read_all(open_file(&self.bootstrap_path)?, &self.bootstrap_path)?;
        if digest_of(&bytes) != self.bootstrap_digest {
            return Err(Error::Digest(format!(
                "{}: the bootstrap of image {}/{} is not the file that was registered; \
                 remove the registration and register the image again",
                self.bootstrap_path.display(),
                self.domain_id,
                self.id
            )));
        }
        Ok(bytes)
    }

    /// What a start needs of a blob as far as is known: all of the blob that was made for it, or
    /// what earlier starts on this node touched.
    pub fn start_ranges(&self, blob_index: u32) -> Vec<Range<u64>> {
        match blob_index {
            0 if self.start_bytes > 0 && !self.touches.is_resumed() => {
                std::iter::once(0..self.start_bytes).collect()
            }
            _ => self.touches.known_ranges(blob_index),
        }
    }

    /// Whether something of a blob is fetched before anybody asks for it.
    pub fn is_fetched_ahead(&self, blob_index: u32) -> bool {
        self.prefetch.enable || !self.start_ranges(blob_index).is_empty()
    }

    /// Whether a file has the bytes of this image's bootstrap. Blocks on the disk.
    pub fn has_bootstrap(&self, path: &Path) -> bool {
        let bytes = open_file(path).and_then(|file| read_all(file, path));
        path == self.bootstrap_path
            || bytes.is_ok_and(|bytes| digest_of(&bytes) == self.bootstrap_digest)
    }

    /// Checks `spec`, reads and parses its bootstrap. Blocks on the disk, holds no lock.
    pub(super) fn load(spec: ImageSpec) -> Result<(Image, Bootstrap)> {
        let (domain_id, id) = names(&spec)?;
        let file = open_file(&spec.metadata_path)?;
        let work_dir = existing_directory(&spec.work_dir)?;
        let named = |error: Error| error.context(spec.metadata_path.display());
        let (bootstrap, bootstrap_path) =
            match inlined::find(&file, &spec.metadata_path).map_err(named)? {
                Some(bootstrap) => {
                    let kept = inlined::keep(&bootstrap, &spec.metadata_path, &work_dir)?;
                    (bootstrap, kept)
                }
                None => {
                    let bytes = read_all(file, &spec.metadata_path)?;
                    (Bootstrap::parse(bytes).map_err(named)?, absolute(&spec.metadata_path)?)
                }
            };
        let blobs = blobs_of(&bootstrap);
        if blobs.iter().any(|blob| blob.id.as_str() == id) {
            return Err(Error::Malformed(format!(
                "id {id:?} is also the id of one of the image's data blobs; choose another id"
            )));
        }
        let image = Image {
            domain_id,
            id,
            config_id: spec.config_id,
            bootstrap_path,
            bootstrap_digest: digest_of(bootstrap.bytes()),
            bootstrap_size_bytes: bootstrap.size_bytes(),
            backend: spec.backend,
            work_dir,
            prefetch: spec.prefetch,
            blobs,
            // A list that makes no sense is told of by whoever prefetches.
            start_bytes: start_bytes(&bootstrap).unwrap_or(0),
            touches: Touches::default(),
        };
        Ok((image, bootstrap))
    }
}

impl ImageBlob {
    /// What all images that share a blob must agree on.
    pub(super) fn shape(&self) -> (u64, u32) {
        (self.uncompressed_size_bytes, self.chunk_count)
    }
}

fn digest_of(bytes: &[u8]) -> Digest {
    Digest(*blake3::hash(bytes).as_bytes())
}

/// The domain and id of `spec`, checked.
fn names(spec: &ImageSpec) -> Result<(String, String)> {
    check_name("id", &spec.id, CATALOG_ID_MAX_BYTES)?;
    let domain_id = if spec.domain_id.is_empty() { &spec.id } else { &spec.domain_id };
    check_name("domain_id", domain_id, CATALOG_DOMAIN_MAX_BYTES)?;
    Ok((domain_id.clone(), spec.id.clone()))
}

/// Both names become file names below the cache directory: fs/cachefiles/key.c takes a key as it
/// is only while every byte is printable, no space and no '/', and the name fits NAME_MAX.
fn check_name(field: &str, name: &str, max_bytes: usize) -> Result<()> {
    let reason = if name.is_empty() {
        "is empty".to_owned()
    } else if name.len() > max_bytes {
        format!("is longer than {max_bytes} bytes")
    } else if name.contains('/') {
        "contains '/'".to_owned()
    } else if !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        "contains a byte that is not printable ASCII".to_owned()
    } else {
        return Ok(());
    };
    Err(Error::Malformed(format!("Invalid argument (os error 22): {field} {name:?} {reason}")))
}

/// The light description of every blob. The parser has checked ids and indexes.
fn blobs_of(bootstrap: &Bootstrap) -> Vec<ImageBlob> {
    let describe = |(index, record): (usize, &BlobRecord)| {
        let mut hasher = blake3::Hasher::new();
        for chunk in bootstrap.chunks_of(index as u32) {
            hasher.update(&chunk.index.0.to_le_bytes());
            hasher.update(&chunk.digest.0);
        }
        ImageBlob {
            id: record.id.clone(),
            uncompressed_size_bytes: record.uncompressed_size,
            chunk_count: record.chunk_count,
            chunks: Digest(*hasher.finalize().as_bytes()),
        }
    };
    bootstrap.blobs().iter().enumerate().map(describe).collect()
}

/// Opens a regular file. A FIFO or a device in its place is refused, not waited for: hence
/// O_NONBLOCK.
fn open_file(path: &Path) -> Result<File> {
    let failed = |error: std::io::Error| Error::io(&error, format!("bootstrap {}", path.display()));
    let mut options = std::fs::OpenOptions::new();
    let file = options.read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        let path = path.display();
        return Err(Error::Malformed(format!("bootstrap {path}: not a regular file")));
    }
    Ok(file)
}

/// Reads a file of bounded size.
fn read_all(file: File, path: &Path) -> Result<Vec<u8>> {
    let limit = CATALOG_BOOTSTRAP_MAX_BYTES as u64;
    let size_bytes = file.metadata().map_or(0, |metadata| metadata.len());
    let mut bytes = Vec::with_capacity(size_bytes.min(limit) as usize);
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(|error| Error::io(&error, format!("bootstrap {}", path.display())))?;
    if bytes.len() as u64 > limit {
        let path = path.display();
        return Err(Error::Unsupported(format!("bootstrap {path}: larger than {limit} bytes")));
    }
    Ok(bytes)
}

fn existing_directory(path: &Path) -> Result<PathBuf> {
    match std::fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => absolute(path),
        Ok(_) => Err(Error::system(libc::ENOTDIR, format!("work_dir {}", path.display()))),
        Err(error) => Err(Error::io(&error, format!("work_dir {}", path.display()))),
    }
}

/// A relative path is taken from where the daemon was started, once, now.
fn absolute(path: &Path) -> Result<PathBuf> {
    std::path::absolute(path).map_err(|error| Error::io(&error, path.display().to_string()))
}
