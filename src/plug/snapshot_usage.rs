//! What a snapshot takes on disk.
//!
//! Counts blocks, not lengths, and a file with several names once, as `du` does. Never follows a
//! symbolic link and never leaves the file system it began on. Files may come and go meanwhile.

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::snapshot_records::Usage;
use crate::error::{Error, Result};

/// The size of `st_blocks`' unit, whatever the file system's is.
const BLOCK_BYTES: u64 = 512;

/// Adds up everything at and below `top`.
pub fn disk_usage(top: &Path) -> Result<Usage> {
    let failed = |error| Error::io(&error, format!("cannot measure {}", top.display()));
    let root = fs::symlink_metadata(top).map_err(failed)?;
    let mut usage = Usage { bytes: root.blocks() * BLOCK_BYTES, inodes: 1 };
    let mut linked = HashSet::new();
    let mut folders = vec![top.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let path = entry.map_err(failed)?.path();
            let metadata = match fs::symlink_metadata(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                metadata => metadata.map_err(failed)?,
            };
            if metadata.dev() != root.dev() {
                continue;
            }
            let is_first =
                metadata.is_dir() || metadata.nlink() < 2 || linked.insert(metadata.ino());
            if is_first {
                usage.bytes += metadata.blocks() * BLOCK_BYTES;
                usage.inodes += 1;
            }
            if metadata.is_dir() {
                folders.push(path);
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_and_hard_links_once() {
        let directory = tempfile::tempdir().expect("a directory");
        let at = |name: &str| directory.path().join(name);
        let empty = disk_usage(directory.path()).unwrap();
        fs::create_dir(at("a")).unwrap();
        fs::write(at("a/one"), vec![1; 100_000]).unwrap();
        let before = disk_usage(directory.path()).unwrap();
        fs::hard_link(at("a/one"), at("two")).unwrap();
        std::os::unix::fs::symlink("/usr", at("link")).unwrap();
        let after = disk_usage(directory.path()).unwrap();
        assert_eq!((empty.inodes, before.inodes, after.inodes), (1, 3, 4));
        assert!(before.bytes >= empty.bytes + 100_000);
        assert!(after.bytes < before.bytes + 100_000);
    }

    #[test]
    fn holes_take_nothing() {
        let directory = tempfile::tempdir().expect("a directory");
        let file = fs::File::create(directory.path().join("hole")).unwrap();
        file.set_len(1 << 40).unwrap();
        assert!(disk_usage(directory.path()).unwrap().bytes < 1 << 20);
    }

    #[test]
    fn what_is_absent_is_an_error() {
        assert!(disk_usage(Path::new("/nonexistent/x")).is_err());
    }
}
