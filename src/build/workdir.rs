//! Where unfinished files lie: a directory that goes away with its owner, however that ends.
//!
//! The name begins with `.sluice-work-` and the directory is locked while its owner lives, so that
//! the next one finds what a killed process left behind, and removes it. Nobody else's files are
//! ever touched.

use std::fs::{DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::fcntl::{Flock, FlockArg};

use crate::config as limits;
use crate::error::{Error, Result};

const PREFIX: &str = ".sluice-work-";

/// A directory for unfinished files.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
    count: AtomicU64,
    _lock: Flock<File>,
}

impl WorkDir {
    /// Makes one below `parent`, which exists, and removes what dead owners left there.
    pub fn new(parent: &Path) -> Result<WorkDir> {
        sweep(parent);
        let failed = |error: &std::io::Error| {
            let what = format!("cannot make a working directory in {}", parent.display());
            Error::io(error, what)
        };
        for attempt in 0..limits::WORK_DIRECTORY_TRIES_MAX {
            let path = parent.join(format!("{PREFIX}{}-{attempt}", std::process::id()));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(failed(&error)),
            }
            let directory = File::open(&path).map_err(|error| failed(&error))?;
            let lock = Flock::lock(directory, FlockArg::LockExclusiveNonblock);
            // Somebody's sweep may have taken it between the two calls: then it is not ours.
            if let Ok(lock) = lock
                && path.is_dir()
            {
                return Ok(WorkDir { path, count: AtomicU64::new(0), _lock: lock });
            }
        }
        Err(Error::Busy(format!("{}: too many working directories", parent.display())))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A name in it that was not given before.
    pub fn fresh(&self, kind: &str) -> PathBuf {
        let number = self.count.fetch_add(1, Ordering::Relaxed);
        self.path.join(format!("{kind}-{number}"))
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        remove(&self.path);
    }
}

/// Removes a working directory that others may still be writing into: renamed first, so that what
/// they do next fails.
pub fn remove(path: &Path) {
    let mut gone = path.as_os_str().to_owned();
    gone.push("-gone");
    let target = match std::fs::rename(path, &gone) {
        Ok(()) => PathBuf::from(gone),
        Err(_) => path.to_owned(),
    };
    // What cannot be removed now, the next owner's sweep will find.
    let _ = std::fs::remove_dir_all(target);
}

fn sweep(parent: &Path) {
    let Ok(entries) = std::fs::read_dir(parent) else { return };
    for entry in entries.take(limits::WORK_SWEEP_MAX).flatten() {
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX));
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !is_ours || !is_directory {
            continue;
        }
        let Ok(directory) = File::open(entry.path()) else { continue };
        if let Ok(_lock) = Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_with_its_owner_and_a_dead_owners_goes_with_the_next() {
        let parent = tempfile::tempdir().unwrap();
        let abandoned = parent.path().join(".sluice-work-1-0");
        std::fs::create_dir(&abandoned).unwrap();
        std::fs::write(abandoned.join("left"), "x").unwrap();
        std::fs::write(parent.path().join("mine"), "x").unwrap();
        let first = WorkDir::new(parent.path()).unwrap();
        assert!(!abandoned.exists());
        let second = WorkDir::new(parent.path()).unwrap();
        assert!(first.path().is_dir() && first.path() != second.path());
        std::fs::write(second.fresh("a"), "x").unwrap();
        assert_ne!(second.fresh("a"), second.fresh("a"));
        drop((first, second));
        let left: Vec<_> = std::fs::read_dir(parent.path()).unwrap().collect();
        assert_eq!(left.len(), 1);
    }
}
