//! Reading a lazily loaded image before a container does: to see that its registry answers, or to
//! have all of it on this node.
//!
//! The tree is hostile: no symbolic link is followed, special files are not opened, nothing leaves
//! the mount. Everything here blocks, for as long as the daemon takes to answer a read.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::fcntl::{OFlag, OpenHow, PosixFadviseAdvice, ResolveFlag, openat2, posix_fadvise};

use crate::config::{MIB, PROBE_ENTRIES_MAX, TREE_PATH_MAX_BYTES};
use crate::error::{Error, Result};

/// Containers' managers read these of every image they start (to find out who root is), so looking
/// there fetches nothing in vain.
const READ_ANYWAY: [&str; 2] = ["etc/passwd", "etc/group"];

/// Reads one byte of a file that has some. If its bytes are not on the node, this takes the whole
/// way: registry, credentials, digest, cache. An image without files passes.
///
/// # Errors
/// What the read was refused with, as `Unavailable`: the daemon logs the cause.
pub fn first_bytes(top: &Path) -> Result<()> {
    let root = open_folder(top)?;
    let known = READ_ANYWAY.iter().map(PathBuf::from);
    let known = known.filter_map(|path| open_file(&root, &path).transpose()).next();
    let found = match known {
        Some(file) => Some(file?),
        None => first_file(top, &root)?,
    };
    let Some(mut file) = found else { return Ok(()) };
    file.read_exact(&mut [0]).map_err(|error| unreadable(top, &error))
}

/// Reads every file to its end, until `deadline`. The pages are given back at once: they are on
/// disk, and most of them nobody needs now.
pub fn everything(top: &Path, deadline: Instant) -> Result<u64> {
    let root = open_folder(top)?;
    let mut piece = vec![0; MIB];
    let mut bytes = 0;
    for path in Tree::of(top) {
        let path = path?;
        let Some(mut file) = open_file(&root, &path)? else { continue };
        loop {
            if Instant::now() >= deadline {
                return Err(Error::Deadline(format!(
                    "{}: {bytes} bytes were read and it is not all of it",
                    top.display()
                )));
            }
            match file.read(&mut piece) {
                Ok(0) => break,
                Ok(count) => bytes += count as u64,
                Err(error) => return Err(unreadable(&top.join(&path), &error)),
            }
        }
        // Advice may be refused; it is only advice.
        let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }
    Ok(bytes)
}

fn first_file(top: &Path, root: &File) -> Result<Option<File>> {
    for path in Tree::of(top).take(PROBE_ENTRIES_MAX) {
        if let Some(file) = open_file(root, &path?)? {
            return Ok(Some(file));
        }
    }
    Ok(None)
}

fn open_folder(top: &Path) -> Result<File> {
    File::open(top).map_err(|error| unreadable(top, &error))
}

/// A regular file that is not empty, or nothing.
fn open_file(root: &File, path: &Path) -> Result<Option<File>> {
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS | ResolveFlag::RESOLVE_BENEATH);
    let file = match openat2(root, path, how) {
        Ok(file) => File::from(file),
        Err(nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ELOOP | nix::Error::ENXIO) => {
            return Ok(None);
        }
        Err(errno) => return Err(unreadable(path, &errno.into())),
    };
    let metadata = file.metadata().map_err(|error| unreadable(path, &error))?;
    Ok(Some(file).filter(|_| metadata.is_file() && metadata.len() > 0))
}

fn unreadable(path: &Path, error: &std::io::Error) -> Error {
    Error::unavailable(format!(
        "{} cannot be read ({error}); the daemon's log says why its registry does not answer",
        path.display()
    ))
}

/// Every regular file below a folder, relative to it, depth first.
struct Tree {
    top: PathBuf,
    folders: Vec<PathBuf>,
    files: Vec<PathBuf>,
}

impl Tree {
    fn of(top: &Path) -> Tree {
        Tree { top: top.to_owned(), folders: vec![PathBuf::new()], files: Vec::new() }
    }

    fn enter(&mut self, folder: &Path) -> std::io::Result<()> {
        for entry in fs::read_dir(self.top.join(folder))? {
            let entry = entry?;
            let (path, kind) = (folder.join(entry.file_name()), entry.file_type()?);
            if kind.is_dir() && path.as_os_str().len() <= TREE_PATH_MAX_BYTES {
                self.folders.push(path);
            } else if kind.is_file() {
                self.files.push(path);
            }
        }
        Ok(())
    }
}

impl Iterator for Tree {
    type Item = Result<PathBuf>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.files.is_empty() {
            let folder = self.folders.pop()?;
            if let Err(error) = self.enter(&folder) {
                return Some(Err(unreadable(&self.top.join(folder), &error)));
            }
        }
        self.files.pop().map(Ok)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn tree(files: &[(&str, usize)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        for (path, size) in files {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().expect("a parent")).unwrap();
            fs::write(path, vec![1; *size]).unwrap();
        }
        directory
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    #[test]
    fn everything_is_every_byte_of_every_file() {
        let tree = tree(&[("a/b/c", 3_000_000), ("a/d", 5), ("e", 0)]);
        std::os::unix::fs::symlink("/etc/passwd", tree.path().join("link")).unwrap();
        assert_eq!(everything(tree.path(), soon()), Ok(3_000_005));
        let late = everything(tree.path(), Instant::now());
        assert!(matches!(late, Err(Error::Deadline(_))), "{late:?}");
    }

    #[test]
    fn a_readable_file_or_none_at_all_passes() {
        for files in [&[("etc/passwd", 9)][..], &[("x/y", 1)], &[("empty", 0)], &[]] {
            assert_eq!(first_bytes(tree(files).path()), Ok(()), "{files:?}");
        }
        assert!(first_bytes(Path::new("/nonexistent/x")).is_err());
    }

    #[test]
    fn the_file_read_anyway_is_the_one_tried() {
        let tree = tree(&[("a", 1), ("etc/passwd", 1)]);
        let root = open_folder(tree.path()).unwrap();
        assert!(open_file(&root, Path::new("etc/passwd")).unwrap().is_some());
        assert!(open_file(&root, Path::new("etc/group")).unwrap().is_none());
    }

    #[test]
    fn nothing_leads_out_of_the_tree() {
        let tree = tree(&[("a", 1)]);
        std::os::unix::fs::symlink("/etc", tree.path().join("etc")).unwrap();
        let root = open_folder(tree.path()).unwrap();
        for path in ["etc/passwd", "../x", "/etc/passwd"] {
            assert!(!matches!(open_file(&root, Path::new(path)), Ok(Some(_))), "{path}");
        }
    }
}
