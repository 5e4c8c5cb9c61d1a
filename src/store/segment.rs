//! One segment behind the fanotify door: a backing file whose size is its presence.
//!
//! What lies below the file's size was verified before it was written; what lies above is a short
//! read, which EROFS turns into EIO. So a file only ever grows, from its start, by bytes whose
//! digests matched, and whoever dies leaves nothing that could be read wrongly. A segment has one
//! filler at a time: the core that owns it. The file's name says which bytes may be in it
//! (`image::segmentation`), so two images with the same name for it share it.
//!
//! Callers must keep true: only the owner fills; fills go on where the last one ended, except over
//! gaps that the name says nobody reads; nobody opens the file through the marked mount.

use std::ffi::CString;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::segments::BlobDirectory;
use crate::config::FILL_SLICE_BYTES;
use crate::engine::{Call, Core, CoreId, Fd, Lane, Lease};
use crate::error::{Error, Result};

/// Nobody fills.
const NOBODY: u8 = 0;
/// Its bytes are being taken away.
const EVICTION: u8 = u8::MAX;

/// A segment's file. Shared by all images and cores that use it.
#[derive(Debug)]
pub struct Segment {
    /// Where it lies.
    pub directory: Arc<BlobDirectory>,
    /// The file's name, which is also its recipe. Opening by it allocates nothing.
    name: CString,
    /// Bytes when complete.
    pub full_size: u64,
    /// Verified bytes, from the start; at most the file's size.
    size: AtomicU64,
    /// 0, the filling core's number + 1, or 255 for eviction.
    owner: AtomicU8,
    /// Somebody has read it since the last look. Only noticed while eviction listens.
    is_read: AtomicBool,
    /// Open while somebody fills.
    writer: Mutex<Option<File>>,
}

/// Who may fill a segment now.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Owner {
    /// Whoever claims it.
    Nobody,
    /// This core.
    Core(CoreId),
    /// Nobody until its bytes are gone.
    Eviction,
}

impl Segment {
    /// A segment as its file stands; the file is made if it is not there.
    ///
    /// # Errors
    /// What the disk says.
    pub(super) fn open(
        directory: &Arc<BlobDirectory>,
        name: CString,
        full_size: u64,
    ) -> Result<Segment> {
        let segment = Segment {
            directory: Arc::clone(directory),
            name,
            full_size,
            size: AtomicU64::new(0),
            owner: AtomicU8::new(NOBODY),
            is_read: AtomicBool::new(false),
            writer: Mutex::new(None),
        };
        let metadata = segment.open_file(OFlag::O_CREAT)?.metadata();
        let size = metadata.map_err(|error| segment.failed(&error))?.len();
        segment.size.store(size.min(full_size), Ordering::Release);
        Ok(segment)
    }

    /// The file's name.
    pub fn name(&self) -> &str {
        self.name.to_str().expect("made from text")
    }

    /// The file, seen through the unmarked path.
    pub fn path(&self) -> PathBuf {
        self.directory.path().join(self.name())
    }

    /// Verified bytes, from the start.
    pub fn size(&self) -> u64 {
        // Acquire pairs with the Release in publish(): who sees the size sees the bytes.
        self.size.load(Ordering::Acquire)
    }

    /// Whether all of it is there.
    pub fn is_complete(&self) -> bool {
        self.size() >= self.full_size
    }

    /// Who fills it.
    pub fn owner(&self) -> Owner {
        match self.owner.load(Ordering::Acquire) {
            NOBODY => Owner::Nobody,
            EVICTION => Owner::Eviction,
            core => Owner::Core(CoreId(core - 1)),
        }
    }

    /// Somebody reads it.
    pub fn note_read(&self) {
        self.is_read.store(true, Ordering::Relaxed);
    }

    /// Whether somebody has read it since the last look.
    pub fn take_read(&self) -> bool {
        self.is_read.swap(false, Ordering::Relaxed)
    }

    /// Takes the right to fill for a core. False when somebody has it.
    pub fn claim(&self, core: CoreId) -> bool {
        self.take(core.0 + 1)
    }

    /// Takes the right to empty it, on the way to eviction. False when somebody fills it.
    pub fn claim_for_eviction(&self) -> bool {
        self.take(EVICTION)
    }

    fn take(&self, owner: u8) -> bool {
        let taken = self.owner.compare_exchange(NOBODY, owner, Ordering::AcqRel, Ordering::Relaxed);
        taken.is_ok()
    }

    /// Whether this core fills it.
    pub fn is_owned_by(&self, core: CoreId) -> bool {
        self.owner.load(Ordering::Acquire) == core.0 + 1
    }

    /// Gives a core's right back, if it has it, and closes the file.
    pub fn release(&self, core: CoreId) {
        if self.is_owned_by(core) {
            *self.writer() = None;
            self.owner.store(NOBODY, Ordering::Release);
        }
    }

    /// Bytes up to `end` are verified and in the file. Called by the owner alone.
    pub fn publish(&self, core: CoreId, end: u64) {
        assert!(self.is_owned_by(core), "only the owner publishes");
        assert!(end >= self.size() && end <= self.full_size, "a segment only grows");
        let before = self.size.swap(end, Ordering::Release);
        self.directory.space().grow(end - before);
    }

    /// Somebody else made the file shorter than we know it: believe the file.
    pub fn believe(&self, file_size: u64) {
        if file_size < self.size() && self.claim_for_eviction() {
            self.size.store(file_size, Ordering::Release);
            self.owner.store(NOBODY, Ordering::Release);
        }
    }

    /// Empties the file. The caller claimed it for eviction, removed its completion record and its
    /// ignore mark, and knows that no mounted image reads it.
    ///
    /// # Errors
    /// What the disk says; the segment counts as empty all the same.
    pub fn empty(&self) -> Result<()> {
        assert_eq!(self.owner(), Owner::Eviction, "claimed before it is emptied");
        let before = self.size.swap(0, Ordering::Release);
        self.directory.space().shrink(before);
        let emptied = self
            .open_file(OFlag::empty())
            .and_then(|file| file.set_len(0).map_err(|error| self.failed(&error)));
        self.owner.store(NOBODY, Ordering::Release);
        emptied
    }

    /// Gives the right to empty it back.
    pub fn spare(&self) {
        assert_eq!(self.owner(), Owner::Eviction, "claimed before it is spared");
        self.owner.store(NOBODY, Ordering::Release);
    }

    /// Writes `lease[range]` at `offset` of the file, all of it. Called by the owner alone.
    ///
    /// A buffered write of 64 KiB takes 12 to 16 us in place and 75 to 96 through the ring, where
    /// ext4 hands it to a kernel thread: so demand writes in place, a slice at a time with a yield
    /// between, and background work takes the ring.
    ///
    /// # Errors
    /// What the file system says, ENOSPC among it. What was written in part is verified data.
    pub async fn fill(
        &self,
        core: &Core,
        mut lease: Lease,
        range: Range<usize>,
        offset: u64,
        lane: Lane,
    ) -> (Lease, Result<()>) {
        assert!(self.is_owned_by(core.id()), "only the owner fills");
        let fd = match self.open_writer() {
            Ok(fd) => fd,
            Err(error) => return (lease, Err(error)),
        };
        let mut at = range.start;
        while at < range.end {
            let place = offset + (at - range.start) as u64;
            let written = match lane {
                Lane::Demand => {
                    let slice = at..range.end.min(at + FILL_SLICE_BYTES);
                    let written = core.call(Call::WriteAt(fd, &lease[slice], place));
                    written.map(|count| count as usize).map_err(|errno| {
                        Error::system(errno, format!("cannot write to {}", self.path().display()))
                    })
                }
                Lane::Background => {
                    let written;
                    (lease, written) = core.write_at(fd, lease, at..range.end, place).await;
                    written
                }
            };
            match written {
                Ok(0) => return (lease, Err(Error::system(libc::EIO, "the cache took no bytes"))),
                Ok(count) => at += count,
                Err(Error::System { errno: libc::EINTR, .. }) => {}
                Err(error) => return (lease, Err(error)),
            }
            if at < range.end {
                core.yield_now().await;
            }
        }
        (lease, Ok(()))
    }

    /// Brings the bytes to the disk.
    ///
    /// # Errors
    /// What the disk says.
    pub fn sync(&self) -> Result<()> {
        let file = self.open_file(OFlag::empty())?;
        file.sync_data().map_err(|error| self.failed(&error))
    }

    /// The open file, which stays open until the owner releases the segment.
    fn open_writer(&self) -> Result<Fd> {
        let mut writer = self.writer();
        if writer.is_none() {
            // Opening a file whose name and inode are hot takes 2 us.
            *writer = Some(self.open_file(OFlag::empty())?);
        }
        Ok(Fd(writer.as_ref().expect("opened above").as_raw_fd()))
    }

    fn open_file(&self, more: OFlag) -> Result<File> {
        let flags = OFlag::O_WRONLY | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | more;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let opened = openat(self.directory.fd(), self.name.as_c_str(), flags, mode);
        opened.map(File::from).map_err(|errno| {
            Error::system(errno as i32, format!("segment {}", self.path().display()))
        })
    }

    fn failed(&self, error: &std::io::Error) -> Error {
        Error::io(error, format!("segment {}", self.path().display()))
    }

    /// Nothing in here panics half-way, so a poisoned lock holds a whole value.
    fn writer(&self) -> MutexGuard<'_, Option<File>> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
