//! Which images the kernel reads past the page cache of their segments.
//!
//! Segments are files of their own, and the kernel reads none ahead of another: through their page
//! cache, one waits for the disk behind the other. An image that is whole is read straight into the
//! pages of EROFS instead, several segments at once, and is in memory once, not twice.
//!
//! Not an image of which something is missing: what is filled would have to reach the disk before
//! anybody can read it. And only at its first mount since the daemon began: what is mounted again
//! and again is better kept in the page cache of its segments, which outlives the mount. The mount
//! behind a direct one fills it, unless one before did.

use std::collections::{BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, RwLock};

use super::mounting::{self, DetachedMount, Reading};
use crate::config::{DIRECT_READ_AHEAD_KIB, MOUNTED_IMAGES_NOTED_MAX};
use crate::error::Result;
use crate::image::digest::Digest;

/// Where the kernel shows what it reads ahead, an entry for each file system.
const DEVICES: &str = "/sys/class/bdi";

/// Decides how images are read, and mounts them so.
pub struct DirectReads {
    /// This kernel was seen to do it right.
    is_possible: bool,
    /// Images, by their bootstraps, that were mounted since the daemon began.
    noted: Mutex<HashSet<Digest>>,
    /// Held for writing while a superblock is made that must be known by being new, for reading
    /// while another is.
    turn: RwLock<()>,
}

impl DirectReads {
    /// None where the kernel was not tried, or does it wrong.
    pub fn new(is_possible: bool) -> DirectReads {
        DirectReads { is_possible, noted: Mutex::default(), turn: RwLock::default() }
    }

    /// Makes the superblock of an image; see [`mounting::image_of_files`].
    ///
    /// # Errors
    /// As there.
    pub fn make(
        &self,
        image: Digest,
        is_whole: bool,
        metadata: &str,
        devices: &[String],
    ) -> Result<DetachedMount> {
        let is_first = self.note(image);
        if is_whole && is_first {
            let _alone = self.turn.write().unwrap_or_else(PoisonError::into_inner);
            let before = superblocks();
            // What it cannot do directly, it may do otherwise, or has to say why not.
            if let Ok(mount) = mounting::image_of_files(metadata, devices, Reading::Direct) {
                read_far_ahead(&before);
                return Ok(mount);
            }
        }
        let _beside = self.turn.read().unwrap_or_else(PoisonError::into_inner);
        mounting::image_of_files(metadata, devices, Reading::Cached)
    }

    /// Notes an image; says whether it was not noted before, as far as that is known.
    fn note(&self, image: Digest) -> bool {
        let mut noted = self.noted.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_possible && noted.len() < MOUNTED_IMAGES_NOTED_MAX && noted.insert(image)
    }
}

/// Has the superblock that was not there before read as much ahead as keeps several segments on
/// their way. Nothing else tells which entry is whose; if somebody else made one meanwhile, both
/// stay as they are, and so it is where /sys may not be written.
fn read_far_ahead(before: &BTreeSet<PathBuf>) {
    let after = superblocks();
    let mut new = after.difference(before);
    if let (Some(entry), None) = (new.next(), new.next()) {
        let size = DIRECT_READ_AHEAD_KIB.to_string();
        let _ = std::fs::write(entry.join("read_ahead_kb"), size);
    }
}

fn superblocks() -> BTreeSet<PathBuf> {
    let entries = std::fs::read_dir(DEVICES).into_iter().flatten().flatten();
    let of_erofs = entries.filter(|it| it.file_name().to_string_lossy().starts_with("erofs-"));
    of_erofs.map(|entry| entry.path()).collect()
}
