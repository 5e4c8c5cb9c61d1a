//! Removes the cache files of a blob, in every volume, by asking the kernel.
//!
//! The kernel's `inuse` and `cull` commands name a file relative to the caller's working directory
//! (Documentation/filesystems/caching/cachefiles.rst). A process has one, so this is done on a
//! thread that first stops sharing it with the others.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::{CloneFlags, unshare};

use crate::config::{CATALOG_ID_MAX_BYTES, CULL_FILES_MAX};
use crate::error::{Error, Result};

/// Writes one command to /dev/cachefiles from the calling thread, whose working directory counts.
pub type Command = Arc<dyn Fn(&str) -> Result<()> + Send + Sync>;

/// Culls below one cache directory.
#[derive(Clone)]
pub struct Culler {
    cache_dir: PathBuf,
    command: Command,
}

impl Culler {
    /// `fscache_dir` is what was given to the kernel as `dir`.
    pub fn new(fscache_dir: &Path, command: Command) -> Self {
        Self { cache_dir: fscache_dir.join("cache"), command }
    }

    /// Removes the blob's files, or says which one is in use or could not be removed. The others
    /// are removed all the same. That there is none is no error. Blocks on the disk.
    pub fn cull(&self, blob_id: &str) -> Result<()> {
        let printable = blob_id.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
        if blob_id.is_empty() || blob_id.len() > CATALOG_ID_MAX_BYTES || !printable {
            return Err(Error::Malformed(format!(
                "Invalid argument (os error 22): {blob_id:?} is not a blob id"
            )));
        }
        let this = self.clone();
        let name = format!("D{blob_id}");
        let thread = std::thread::Builder::new().name("cull".into());
        let thread = thread.spawn(move || this.cull_here(&name));
        let thread = thread.map_err(|error| Error::io(&error, "cannot start a thread to cull"))?;
        thread.join().unwrap_or_else(|_| Err(Error::Unsupported("culling failed".into())))
    }

    /// On a thread of its own.
    fn cull_here(&self, name: &str) -> Result<()> {
        unshare(CloneFlags::CLONE_FS)
            .map_err(|errno| Error::system(errno as i32, "cannot have a working directory"))?;
        let mut failures = Vec::new();
        for directory in self.directories_with(name)? {
            if let Err(error) = self.cull_one(&directory, name) {
                failures.push(format!("{}: {error}", directory.join(name).display()));
            }
        }
        match failures.len() {
            0 => Ok(()),
            count => Err(Error::Busy(format!(
                "failed to start service, {count} cache files of {name:?} stay; the first is {}",
                failures[0]
            ))),
        }
    }

    fn cull_one(&self, directory: &Path, name: &str) -> Result<()> {
        std::env::set_current_dir(directory)
            .map_err(|error| Error::io(&error, "cannot enter the directory"))?;
        (self.command)(&format!("inuse {name}"))?;
        (self.command)(&format!("cull {name}"))
    }

    /// `cache/Ierofs,*/@*/` directories that hold a file of this name.
    fn directories_with(&self, name: &str) -> Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for volume in directories(&self.cache_dir, b"Ierofs,")? {
            for fan in directories(&volume, b"@")? {
                if fan.join(name).symlink_metadata().is_ok() {
                    found.push(fan);
                }
                if found.len() >= CULL_FILES_MAX {
                    return Ok(found);
                }
            }
        }
        Ok(found)
    }
}

impl std::fmt::Debug for Culler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Culler below {}", self.cache_dir.display())
    }
}

/// The directories in `parent` whose names begin with `prefix`; none if `parent` is not there.
fn directories(parent: &Path, prefix: &[u8]) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(&error, parent.display().to_string())),
    };
    let is_wanted = |name: &OsStr| name.as_bytes().starts_with(prefix);
    let wanted = entries.flatten().filter(|entry| {
        is_wanted(&entry.file_name()) && entry.file_type().is_ok_and(|kind| kind.is_dir())
    });
    Ok(wanted.map(|entry| entry.path()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// A kernel that removes what is culled, except `busy` directories.
    struct Kernel {
        directory: tempfile::TempDir,
        commands: Arc<Mutex<Vec<(String, PathBuf)>>>,
    }

    impl Kernel {
        fn new(files: &[&str]) -> Kernel {
            let directory = tempfile::tempdir().unwrap();
            for file in files {
                let path = directory.path().join("cache").join(file);
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, "data").unwrap();
            }
            Kernel { directory, commands: Arc::default() }
        }

        fn culler(&self) -> Culler {
            let commands = self.commands.clone();
            Culler::new(
                self.directory.path(),
                Arc::new(move |command: &str| {
                    let here = std::env::current_dir().unwrap();
                    commands.lock().unwrap().push((command.to_owned(), here.clone()));
                    if here.to_string_lossy().contains("busy") {
                        return Err(Error::system(libc::EBUSY, command));
                    }
                    if let Some(name) = command.strip_prefix("cull ") {
                        std::fs::remove_file(name).unwrap();
                    }
                    Ok(())
                }),
            )
        }

        fn has(&self, file: &str) -> bool {
            self.directory.path().join("cache").join(file).exists()
        }
    }

    #[test]
    fn a_blob_is_culled_in_all_volumes_and_nowhere_else() {
        let kernel = Kernel::new(&[
            "Ierofs,a/@3f/Dblob",
            "Ierofs,b/@00/Dblob",
            "Ierofs,b/@00/Dother",
            "Infs,c/@00/Dblob",
        ]);
        let here = std::env::current_dir().unwrap();
        kernel.culler().cull("blob").unwrap();
        assert_eq!(std::env::current_dir().unwrap(), here);
        assert!(!kernel.has("Ierofs,a/@3f/Dblob"));
        assert!(!kernel.has("Ierofs,b/@00/Dblob"));
        assert!(kernel.has("Ierofs,b/@00/Dother"));
        assert!(kernel.has("Infs,c/@00/Dblob"));
        let commands = kernel.commands.lock().unwrap();
        let words: Vec<&str> = commands.iter().map(|entry| entry.0.as_str()).collect();
        assert_eq!(words, ["inuse Dblob", "cull Dblob", "inuse Dblob", "cull Dblob"]);
    }

    #[test]
    fn a_file_in_use_is_an_error_and_the_others_go() {
        let kernel = Kernel::new(&["Ierofs,a/@01/Dblob", "Ierofs,busy/@01/Dblob"]);
        let error = kernel.culler().cull("blob").unwrap_err();
        assert!(error.to_string().starts_with("failed to start service, "), "{error}");
        assert!(kernel.has("Ierofs,busy/@01/Dblob"));
        assert!(!kernel.has("Ierofs,a/@01/Dblob"));
    }

    #[test]
    fn nothing_to_cull_is_no_error() {
        Kernel::new(&[]).culler().cull("blob").unwrap();
    }

    #[test]
    fn what_is_no_blob_id_never_reaches_the_kernel() {
        let kernel = Kernel::new(&["Ierofs,a/@01/Dblob"]);
        for id in ["", "../x", "a/b", "a b", "a\nbind", "a\0", &"x".repeat(255)] {
            assert!(kernel.culler().cull(id).is_err(), "{id:?}");
        }
        assert!(kernel.commands.lock().unwrap().is_empty());
    }
}
