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
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crossbeam_channel::Sender;

use super::completion::{self, Completions};
use super::segment::Segment;
use super::space::Space;
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
    space: Arc<Space>,
}

/// What one blob takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlobUsage {
    /// The blob.
    pub blob_id: String,
    /// Bytes of its segments.
    pub bytes: u64,
    /// When an image with it was last mounted or unmounted.
    pub last_used: std::time::SystemTime,
    /// Whether a bound image has it, or somebody fetches it.
    pub is_open: bool,
}

/// The segments of one blob.
#[derive(Debug)]
pub struct BlobDirectory {
    blob_id: Box<str>,
    path: PathBuf,
    directory: OwnedFd,
    segments: Mutex<HashMap<Box<str>, Weak<Segment>>>,
    /// Read when somebody needs it; a node knows a thousand blobs.
    completions: Mutex<Option<Completions>>,
    completed: Sender<Arc<Segment>>,
    space: Arc<Space>,
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
        let (directories, space) = (Mutex::default(), Arc::default());
        Ok(Arc::new(SegmentStore { root, boot_id, directories, completed, space }))
    }

    /// The same after another boot, for tests.
    #[must_use]
    pub fn after_boot(&self, boot_id: &str) -> Arc<SegmentStore> {
        Arc::new(SegmentStore {
            root: self.root.clone(),
            boot_id: boot_id.to_owned(),
            directories: Mutex::default(),
            completed: self.completed.clone(),
            space: Arc::default(),
        })
    }

    /// How many bytes there are.
    pub fn space(&self) -> &Arc<Space> {
        &self.space
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
            return Ok(known);
        }
        let opened = Arc::new(BlobDirectory::open(self, blob_id)?);
        directories.retain(|_, directory| directory.strong_count() > 0);
        directories.insert(blob_id.into(), Arc::downgrade(&opened));
        Ok(opened)
    }

    /// A blob's directory, if somebody has it open.
    pub fn find(&self, blob_id: &str) -> Option<Arc<BlobDirectory>> {
        self.lock().get(blob_id).and_then(Weak::upgrade)
    }

    /// All blobs on the disk: bytes, and when an image with the blob was last mounted or unmounted.
    ///
    /// # Errors
    /// What the disk says.
    pub fn usage(&self) -> Result<Vec<BlobUsage>> {
        let mut usage = Vec::new();
        for entry in std::fs::read_dir(&self.root).map_err(|error| failed(&self.root, &error))? {
            let entry = entry.map_err(|error| failed(&self.root, &error))?;
            let Ok(blob_id) = entry.file_name().into_string() else { continue };
            // One that goes meanwhile has no bytes.
            let bytes = directory_bytes(&entry.path()).unwrap_or(0);
            let used = std::fs::metadata(entry.path().join(BOOT)).and_then(|boot| boot.modified());
            let last_used = used.unwrap_or(std::time::UNIX_EPOCH);
            let is_open = self.find(&blob_id).is_some();
            usage.push(BlobUsage { blob_id, bytes, last_used, is_open });
        }
        Ok(usage)
    }

    /// Removes all of a blob, unless somebody has it open. Gives the bytes.
    ///
    /// # Errors
    /// What the disk says; `Busy` if it is open.
    pub fn remove(&self, blob_id: &str) -> Result<u64> {
        // Nobody opens it while it goes.
        let directories = self.lock();
        if directories.get(blob_id).is_some_and(|known| known.strong_count() > 0) {
            return Err(Error::Busy(format!("blob {blob_id} is in use")));
        }
        let path = self.root.join(blob_id);
        let bytes = directory_bytes(&path).map_err(|error| failed(&path, &error))?;
        // The record first: a segment that is there without it is emptied after another boot, one
        // that is on record and torn would be believed.
        match std::fs::remove_file(path.join(COMPLETIONS)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(&path, &error)),
            _ => {}
        }
        let synced = File::open(&path).and_then(|directory| directory.sync_all());
        synced.and_then(|()| std::fs::remove_dir_all(&path)).map_err(|e| failed(&path, &e))?;
        self.space.shrink(bytes);
        Ok(bytes)
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
        let opened = BlobDirectory {
            blob_id: blob_id.into(),
            directory,
            segments: Mutex::default(),
            completions: Mutex::default(),
            completed: store.completed.clone(),
            space: Arc::clone(&store.space),
            path: path.clone(),
        };
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
        let mut completions = lock(&self.completions);
        let completions = self.load(&mut completions)?;
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

    /// Forgets segments that nobody holds any more, and the completions, which can be read again.
    pub fn tidy(&self) {
        let mut segments = lock(&self.segments);
        segments.retain(|_, segment| segment.strong_count() > 0);
        segments.shrink_to_fit();
        *lock(&self.completions) = None;
    }

    /// Notes that an image with the blob has been mounted or unmounted.
    pub fn touch(&self) {
        // Only the order of eviction is lost.
        let boot = OpenOptions::new().append(true).open(self.path.join(BOOT));
        let _ = boot.and_then(|boot| boot.set_modified(std::time::SystemTime::now()));
    }

    /// What is known of the space.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// A segment has become complete: whoever looks after such is told.
    pub fn has_completed(&self, segment: &Arc<Segment>) {
        // A full channel loses the word: the segment stays complete, and the next bind sees it.
        let _ = self.completed.try_send(Arc::clone(segment));
    }

    /// Whether a segment is known to be complete on the disk.
    pub fn is_recorded(&self, name: &str, size: u64) -> bool {
        let mut completions = lock(&self.completions);
        self.load(&mut completions).is_ok_and(|known| known.size_of(name) == Some(size))
    }

    /// Writes down that segments are complete, durably. Their bytes must have been synced.
    ///
    /// # Errors
    /// What the disk says; nothing is believed then.
    pub fn record<'a>(&self, segments: impl Iterator<Item = (&'a str, u64)>) -> Result<()> {
        let mut completions = lock(&self.completions);
        let completions = self.load(&mut completions)?;
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
            Some(log) => self.rewrite(completions, &log),
            None => Ok(()),
        }
    }

    /// Takes segments out of the record, durably: before they are emptied.
    ///
    /// # Errors
    /// What the disk says; they must not be emptied then.
    pub fn unrecord<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<()> {
        let known: Vec<&str> = {
            let mut completions = lock(&self.completions);
            let completions = self.load(&mut completions)?;
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

    /// The completions, read from the log if nobody has yet.
    fn load<'a>(&self, completions: &'a mut Option<Completions>) -> Result<&'a mut Completions> {
        if completions.is_none() {
            let path = self.path.join(COMPLETIONS);
            let log = read_bounded(&path)?;
            let known = Completions::parse(&log);
            if log.len() as u64 != known.log_size() {
                // A torn end: later entries must not stand behind it.
                let file = OpenOptions::new().write(true).open(&path);
                let cut = file.and_then(|file| file.set_len(known.log_size()));
                cut.map_err(|error| failed(&path, &error))?;
            }
            *completions = Some(known);
        }
        Ok(completions.as_mut().expect("read above"))
    }
}

/// Bytes of the files of a directory.
fn directory_bytes(path: &Path) -> std::io::Result<u64> {
    std::fs::read_dir(path)?.try_fold(0, |sum, entry| Ok(sum + entry?.metadata()?.size()))
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
