//! Which images the kernel reads past the page cache of their segments.
//!
//! Segments are files of their own, and the kernel reads none ahead of another: through their page
//! cache, one waits for the disk behind the other. An image that is whole is read straight into the
//! pages of EROFS instead, several segments at once, and is in memory once, not twice.
//!
//! Not an image of which something is missing: what is filled would have to reach the disk before
//! anybody can read it. And only at its first mount since the daemon began: what was mounted before
//! is likely to be in memory still, which no disk is as fast as.

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

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
    /// Held while a superblock is made, so that it is known by being new.
    turn: Mutex<()>,
}

impl DirectReads {
    /// None where the kernel was not tried, or does it wrong.
    pub fn new(is_possible: bool) -> DirectReads {
        DirectReads { is_possible, noted: Mutex::default(), turn: Mutex::default() }
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
        if is_whole && self.is_first(image) {
            let _turn = lock(&self.turn);
            let before = superblocks();
            // What it cannot do directly, it may do otherwise, or has to say why not.
            if let Ok(mount) = mounting::image_of_files(metadata, devices, Reading::Direct) {
                read_far_ahead(&before);
                return Ok(mount);
            }
        }
        let mount = mounting::image_of_files(metadata, devices, Reading::Cached)?;
        self.is_first(image);
        Ok(mount)
    }

    /// Notes an image; says whether it was not noted before, as far as that is known.
    fn is_first(&self, image: Digest) -> bool {
        let mut noted = lock(&self.noted);
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
    let Ok(entries) = std::fs::read_dir(Path::new(DEVICES)) else { return BTreeSet::new() };
    let is_ours = |name: &Path| name.to_string_lossy().starts_with("erofs-");
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    paths.filter(|path| path.file_name().is_some_and(|name| is_ours(Path::new(name)))).collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
