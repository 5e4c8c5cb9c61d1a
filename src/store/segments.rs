//! The segments of a node: a directory per blob, a file per segment, and the record of what is
//! complete on the disk.
//!
//! ```text
//! <cache>/segments/<blob id>/<number>-<recipe>   a segment
//! <cache>/segments/<blob id>/complete            the log of completions
//! <cache>/segments/<blob id>/boot                the boot in which the sizes were last believed
//! ```
//! The first look at a blob's directory after another boot empties every segment without a record
//! of completion: what was not synced may hold zeros inside its size. After a mere death of the
//! daemon the sizes stand. All of this blocks on the disk: control and helper threads call it.

use std::collections::HashMap;
use std::ffi::CString;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crossbeam_channel::Sender;

use super::completion::{self, Completions};
use super::segment::Segment;
use crate::config::COMPLETION_LOG_MAX_BYTES;
use crate::error::{Error, Result};

const SEGMENTS: &str = "segments";
const COMPLETIONS: &str = "complete";
const BOOT: &str = "boot";
/// What a boot is told by: proc(5).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// All segments of a cache directory. Shared by `Arc`.
#[derive(Debug)]
pub struct SegmentStore {
    root: PathBuf,
    boot_id: String,
    directories: Mutex<HashMap<Box<str>, Weak<BlobDirectory>>>,
    completed: Sender<Arc<Segment>>,
}

/// The segments of one blob.
#[derive(Debug)]
pub struct BlobDirectory {
    blob_id: Box<str>,
    path: PathBuf,
    directory: OwnedFd,
    segments: Mutex<HashMap<Box<str>, Weak<Segment>>>,
    completions: Mutex<Completions>,
    completed: Sender<Arc<Segment>>,
    /// When its segments were last asked for, in seconds since 1970.
    last_used_s: AtomicU64,
}

impl SegmentStore {
    /// The segments below `cache_dir`, which is made. Segments that become complete are sent to
    /// `completed`; when it is full they are found at the next bind.
    ///
    /// # Errors
    /// What the disk says.
    pub fn open(cache_dir: &Path, completed: Sender<Arc<Segment>>) -> Result<Arc<SegmentStore>> {
        let root = cache_dir.join(SEGMENTS);
        make_directory(&root)?;
        let boot_id = std::fs::read_to_string(BOOT_ID)
            .map_err(|error| Error::io(&error, format!("{BOOT_ID} tells boots apart")))?;
        let boot_id = boot_id.trim().to_owned();
        Ok(Arc::new(SegmentStore { root, boot_id, directories: Mutex::default(), completed }))
    }

    /// The same after another boot, for tests.
    #[must_use]
    pub fn after_boot(&self, boot_id: &str) -> Arc<SegmentStore> {
        Arc::new(SegmentStore {
            root: self.root.clone(),
            boot_id: boot_id.to_owned(),
            directories: Mutex::default(),
            completed: self.completed.clone(),
        })
    }

    /// Where all blobs' directories lie.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A blob's directory, which is made. Empties what a former boot left without a record.
    ///
    /// # Errors
    /// What the disk says.
    pub fn directory(&self, blob_id: &str) -> Result<Arc<BlobDirectory>> {
        // Held while a directory is swept: two sweeps of one would be in each other's way.
        let mut directories = self.lock();
        if let Some(known) = directories.get(blob_id).and_then(Weak::upgrade) {
            known.touch();
            return Ok(known);
        }
        let opened = Arc::new(BlobDirectory::open(self, blob_id)?);
        directories.retain(|_, directory| directory.strong_count() > 0);
        directories.insert(blob_id.into(), Arc::downgrade(&opened));
        Ok(opened)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Box<str>, Weak<BlobDirectory>>> {
        self.directories.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlobDirectory {
    fn open(store: &SegmentStore, blob_id: &str) -> Result<BlobDirectory> {
        let path = store.root.join(blob_id);
        make_directory(&path)?;
        let failed = |error: std::io::Error| failed(&path, &error);
        let directory = File::open(&path).map_err(failed)?.into();
        let log = read_bounded(&path.join(COMPLETIONS))?;
        let completions = Completions::parse(&log);
        if log.len() as u64 != completions.log_size() {
            // A torn end: later entries must not stand behind it.
            let file = OpenOptions::new().write(true).open(path.join(COMPLETIONS));
            file.and_then(|file| file.set_len(completions.log_size())).map_err(failed)?;
        }
        let opened = BlobDirectory {
            blob_id: blob_id.into(),
            directory,
            segments: Mutex::default(),
            completions: Mutex::new(completions),
            completed: store.completed.clone(),
            last_used_s: AtomicU64::new(0),
            path: path.clone(),
        };
        opened.touch();
        let believed_in = std::fs::read_to_string(path.join(BOOT)).unwrap_or_default();
        if believed_in != store.boot_id {
            opened.sweep()?;
            std::fs::write(path.join(BOOT), &store.boot_id).map_err(failed)?;
        }
        Ok(opened)
    }

    /// Empties every segment that is not known to be complete on the disk.
    fn sweep(&self) -> Result<()> {
        let failed = |error: std::io::Error| failed(&self.path, &error);
        let completions = lock(&self.completions);
        for entry in std::fs::read_dir(&self.path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let name = name.to_str().unwrap_or_default();
            if [COMPLETIONS, BOOT].contains(&name) {
                continue;
            }
            let size = entry.metadata().map_err(failed)?.size();
            if size > 0 && completions.size_of(name) != Some(size) {
                let file = OpenOptions::new().write(true).open(entry.path()).map_err(failed)?;
                file.set_len(0).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// The blob.
    pub fn blob_id(&self) -> &str {
        &self.blob_id
    }

    /// Where the segments lie, by the path that raises no events.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The open directory.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// A segment; the same value for all who ask for the name. Its file is made if absent.
    ///
    /// # Errors
    /// What the disk says.
    pub fn segment(self: &Arc<Self>, name: &str, full_size: u64) -> Result<Arc<Segment>> {
        let mut segments = lock(&self.segments);
        if let Some(known) = segments.get(name).and_then(Weak::upgrade) {
            return Ok(known);
        }
        let file_name = CString::new(name)
            .map_err(|_| Error::Malformed(format!("{name:?} is no segment's name")))?;
        let opened = Arc::new(Segment::open(self, file_name, full_size)?);
        segments.insert(name.into(), Arc::downgrade(&opened));
        Ok(opened)
    }

    /// Forgets segments that nobody holds any more. The directory of a blob that many images used
    /// one after the other would remember all their names.
    pub fn tidy(&self) {
        lock(&self.segments).retain(|_, segment| segment.strong_count() > 0);
    }

    /// A segment has become complete: whoever looks after such is told.
    pub fn has_completed(&self, segment: &Arc<Segment>) {
        // A full channel loses the word: the segment stays complete, and the next bind sees it.
        let _ = self.completed.try_send(Arc::clone(segment));
    }

    /// Whether a segment is known to be complete on the disk.
    pub fn is_recorded(&self, name: &str, size: u64) -> bool {
        lock(&self.completions).size_of(name) == Some(size)
    }

    /// Writes down that segments are complete, durably. Their bytes must have been synced.
    ///
    /// # Errors
    /// What the disk says; nothing is believed then.
    pub fn record<'a>(&self, segments: impl Iterator<Item = (&'a str, u64)>) -> Result<()> {
        let mut completions = lock(&self.completions);
        let entries: Vec<_> = segments.collect();
        let path = self.path.join(COMPLETIONS);
        let bytes: Vec<u8> =
            entries.iter().flat_map(|(name, size)| completion::encode(name, *size)).collect();
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600);
        let appended = options.open(&path).and_then(|mut file| {
            let end = file.metadata()?.len();
            let written = file.write_all(&bytes).and_then(|()| file.sync_data());
            // Half an entry must not stay in front of the next ones.
            written.inspect_err(|_| drop(file.set_len(end)))
        });
        appended.map_err(|error| failed(&path, &error))?;
        entries.into_iter().for_each(|(name, size)| completions.apply(name, size));
        match completions.compacted() {
            Some(log) => self.rewrite(&mut completions, &log),
            None => Ok(()),
        }
    }

    /// Takes segments out of the record, durably: before they are emptied.
    ///
    /// # Errors
    /// What the disk says; they must not be emptied then.
    pub fn unrecord<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<()> {
        let known: Vec<&str> = {
            let completions = lock(&self.completions);
            names.filter(|name| completions.size_of(name).is_some()).collect()
        };
        if known.is_empty() { Ok(()) } else { self.record(known.into_iter().map(|name| (name, 0))) }
    }

    fn rewrite(&self, completions: &mut Completions, log: &[u8]) -> Result<()> {
        let (new, path) = (self.path.join("complete.new"), self.path.join(COMPLETIONS));
        let replace = || {
            let mut options = OpenOptions::new();
            let mut file =
                options.write(true).create(true).truncate(true).mode(0o600).open(&new)?;
            file.write_all(log)?;
            file.sync_all()?;
            std::fs::rename(&new, &path)?;
            File::open(&self.path)?.sync_all()
        };
        replace().map_err(|error| failed(&path, &error))?;
        *completions = Completions::parse(log);
        Ok(())
    }

    /// When its segments were last asked for, in seconds since 1970.
    pub fn last_used_s(&self) -> u64 {
        self.last_used_s.load(Ordering::Relaxed)
    }

    /// Its segments are being asked for.
    pub fn touch(&self) {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        self.last_used_s.store(now.unwrap_or_default().as_secs(), Ordering::Relaxed);
    }
}

/// A whole file of bounded size; empty when it is not there.
fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(path, &error)),
    };
    let mut bytes = Vec::new();
    let read = file.take(COMPLETION_LOG_MAX_BYTES).read_to_end(&mut bytes);
    read.map_err(|error| failed(path, &error))?;
    Ok(bytes)
}

fn make_directory(path: &Path) -> Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| Error::io(&error, format!("cannot make {}", path.display())))
}

fn failed(path: &Path, error: &std::io::Error) -> Error {
    Error::io(error, path.display().to_string())
}

/// Nothing in here panics half-way through a change, so a poisoned lock holds a whole value.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
