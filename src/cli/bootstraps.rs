//! Bootstraps on this node: `<state>/images/<sha256>/image.boot`.
//!
//! A file that has that name is whole: it is written under another name, synced and renamed. The
//! directory is also the daemon's place for what belongs to the image (blob.meta). Nothing here is
//! removed: what is stored saves the next mount its download.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// A bootstrap on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// SHA-256 of its bytes, 64 hex digits.
    pub digest: String,
    /// Where it is, absolute.
    pub path: PathBuf,
}

/// Stores a bootstrap, or finds that it is there.
pub fn store(state_dir: &Path, bootstrap: &[u8]) -> Result<Stored> {
    let digest = hex(&Sha256::digest(bootstrap));
    let directory = state_dir.join("images").join(&digest);
    let failed = |error: std::io::Error| {
        Error::io(&error, format!("cannot store a bootstrap in {}", directory.display()))
    };
    fs::create_dir_all(&directory).map_err(failed)?;
    let directory = fs::canonicalize(&directory).map_err(failed)?;
    let path = directory.join("image.boot");
    // The daemon remembers a digest of the file it was shown; rewriting a good one helps nobody.
    if fs::read(&path).is_ok_and(|there| there == bootstrap) {
        return Ok(Stored { digest, path });
    }
    let temporary = directory.join(format!("image.boot.{}", std::process::id()));
    let written = write_synced(&temporary, bootstrap)
        .and_then(|()| fs::rename(&temporary, &path))
        .and_then(|()| File::open(&directory)?.sync_all());
    if let Err(error) = written {
        let _ = fs::remove_file(&temporary);
        return Err(failed(error));
    }
    Ok(Stored { digest, path })
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bootstrap_is_stored_once_and_whole() {
        let state = tempfile::tempdir().expect("a directory");
        let first = store(state.path(), b"bootstrap").expect("stored");
        assert_eq!(fs::read(&first.path).expect("readable"), b"bootstrap");
        assert!(first.path.is_absolute() && first.path.ends_with("image.boot"));
        let inode = |path: &Path| {
            use std::os::unix::fs::MetadataExt;
            fs::metadata(path).expect("there").ino()
        };
        let before = inode(&first.path);
        assert_eq!(store(state.path(), b"bootstrap"), Ok(first.clone()));
        assert_eq!(inode(&first.path), before);
        let names = fs::read_dir(first.path.parent().expect("a parent")).expect("a directory");
        assert_eq!(names.count(), 1);
    }

    #[test]
    fn a_damaged_file_is_replaced() {
        let state = tempfile::tempdir().expect("a directory");
        let stored = store(state.path(), b"bootstrap").expect("stored");
        fs::write(&stored.path, b"boots").expect("cut short");
        store(state.path(), b"bootstrap").expect("stored again");
        assert_eq!(fs::read(&stored.path).expect("readable"), b"bootstrap");
    }

    #[test]
    fn a_place_that_cannot_be_written_is_named() {
        let error = store(Path::new("/proc/nowhere"), b"b").expect_err("refused");
        assert!(error.to_string().contains("/proc/nowhere/images/"), "{error}");
    }
}
