//! Blobs that are files on this node: nydus' `localfs` backend.
//!
//! Owns the open files of one route and core, bounded in number. A file is looked for in the order
//! of the configuration each time it is not open; that it is missing is never remembered. Reads go
//! through the ring.

use std::cell::RefCell;
use std::ops::Range;
use std::os::fd::IntoRawFd;
use std::path::PathBuf;
use std::rc::Rc;

use crate::config as limits;
use crate::engine::{Core, Fd, Lease};
use crate::error::{Error, Result};
use crate::registry::config::LocalFsConfig;

/// An open blob file; closed when the last user drops it.
pub struct LocalFile {
    core: Core,
    fd: Fd,
    /// Its size when it was opened.
    pub size_bytes: u64,
}

/// The open files of one route on one core.
#[derive(Default)]
pub struct LocalFiles {
    open: RefCell<Vec<(String, Rc<LocalFile>)>>,
}

impl LocalFiles {
    /// The file of a blob.
    pub async fn open(
        &self,
        core: &Core,
        config: &LocalFsConfig,
        blob: &str,
    ) -> Result<Rc<LocalFile>> {
        let found = self.open.borrow().iter().find(|(id, _)| id == blob).map(|(_, f)| f.clone());
        if let Some(file) = found {
            return Ok(file);
        }
        let candidates = candidates(config, blob)?;
        let (number, size_bytes) = core.offload(move || open_first(&candidates)).await?;
        let file = Rc::new(LocalFile { core: core.clone(), fd: Fd(number), size_bytes });
        let mut open = self.open.borrow_mut();
        if open.len() >= limits::LOCALFS_FILE_COUNT_MAX {
            open.remove(0);
        }
        open.push((blob.to_string(), Rc::clone(&file)));
        Ok(file)
    }

    /// Closes what nobody is reading, so that replaced files are seen.
    pub fn forget(&self) {
        self.open.borrow_mut().clear();
    }
}

impl LocalFile {
    /// Reads at least a byte at `offset` into `lease[range]`; the end of the file is an error.
    pub async fn read(
        &self,
        lease: Lease,
        range: Range<usize>,
        offset: u64,
        deadline_ns: u64,
    ) -> (Lease, Result<usize>) {
        let end = range.end.min(range.start + limits::LOCALFS_READ_SIZE_MAX);
        let reading = self.core.read_at(self.fd, lease, range.start..end, offset);
        let (lease, got) = reading.by(deadline_ns).await;
        match got {
            Ok(0) => (lease, Err(Error::unavailable("the blob's file ends too early"))),
            other => (lease, other),
        }
    }
}

impl Drop for LocalFile {
    fn drop(&mut self) {
        self.core.close(self.fd);
    }
}

fn candidates(config: &LocalFsConfig, blob: &str) -> Result<Vec<PathBuf>> {
    if let Some(file) = &config.blob_file {
        return Ok(vec![file.clone()]);
    }
    let is_name = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if blob.is_empty() || blob.starts_with('.') || !blob.bytes().all(is_name) {
        return Err(Error::Malformed(format!("blob id {blob:?} cannot be a file name")));
    }
    Ok(config.dirs.iter().map(|dir| dir.join(blob)).collect())
}

fn open_first(candidates: &[PathBuf]) -> Result<(i32, u64)> {
    for path in candidates {
        match std::fs::File::open(path) {
            Ok(file) => {
                let metadata = file.metadata();
                let metadata =
                    metadata.map_err(|error| Error::io(&error, path.display().to_string()))?;
                if !metadata.is_file() {
                    return Err(Error::Unsupported(format!("{}: not a file", path.display())));
                }
                return Ok((file.into_raw_fd(), metadata.len()));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io(&error, path.display().to_string())),
        }
    }
    let tried: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
    Err(Error::NotFound(format!("no blob file: looked at {}", tried.join(", "))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_id_never_leaves_its_directory() {
        let config = LocalFsConfig { blob_file: None, dirs: vec!["/a".into(), "/b".into()] };
        assert_eq!(candidates(&config, "0af").unwrap(), [PathBuf::from("/a/0af"), "/b/0af".into()]);
        for blob in ["", ".", "..", "../x", "a/b", "a\0b"] {
            assert!(candidates(&config, blob).is_err(), "{blob:?}");
        }
    }
}
