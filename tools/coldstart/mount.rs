//! The target of a mounted file system: its regular files, read with pread(2).
//!
//! Works on any mount, lazy or not. The list of files is made first, which reads the metadata; the
//! files are opened by the reads themselves. Symbolic links and other file systems are not
//! followed. Bytes come through the page cache, so each byte is cold once per mount.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::load::{Target, Touch};
use crate::plan::{Extent, Operation};

/// Files deeper than this are left out.
const DEPTH_MAX: usize = 64;

/// A mounted tree as a target.
pub struct Mount {
    root: PathBuf,
    /// The regular files that are not empty, by name.
    pub files: Vec<Extent>,
    buffers: Vec<Mutex<Vec<u8>>>,
}

impl Mount {
    /// Lists the tree.
    pub fn open(root: &Path, readers: usize) -> io::Result<Self> {
        let device = std::fs::metadata(root)?.dev();
        let mut files = Vec::new();
        list(root, root, device, 0, &mut files)?;
        files.sort_by(|a, b| a.name.cmp(&b.name));
        let buffers = (0..readers).map(|_| Mutex::default()).collect();
        Ok(Mount { root: root.to_owned(), files, buffers })
    }
}

fn list(
    root: &Path,
    folder: &Path,
    device: u64,
    depth: usize,
    files: &mut Vec<Extent>,
) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let about = std::fs::symlink_metadata(&path)?;
        if about.is_dir() && about.dev() == device && depth < DEPTH_MAX {
            list(root, &path, device, depth + 1, files)?;
        } else if about.is_file() && about.len() > 0 {
            let name = path.strip_prefix(root).map_err(io::Error::other)?;
            files.push(Extent { name: name.display().to_string(), size: about.len() });
        }
    }
    Ok(())
}

impl Target for Mount {
    fn read(&self, reader: usize, operation: &Operation) -> io::Result<Touch> {
        let mut buffer = self.buffers[reader].lock().unwrap_or_else(PoisonError::into_inner);
        let size = buffer.len().max(operation.length as usize);
        buffer.resize(size, 0);
        let path = self.root.join(&self.files[operation.file as usize].name);
        let space = &mut buffer[..operation.length as usize];
        let read = File::open(path).and_then(|file| file.read_exact_at(space, operation.offset));
        match read {
            // Which reads had to wait for somebody cannot be seen from here.
            Ok(()) => Ok(Touch::Miss),
            Err(error) if error.raw_os_error() == Some(nix::libc::EIO) => Ok(Touch::Refused),
            Err(error) => Err(error),
        }
    }
}
