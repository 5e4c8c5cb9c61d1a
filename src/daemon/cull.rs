//! Removes cache files by asking the kernel: a blob's in every volume, or one cookie's in its own.
//!
//! The kernel's `inuse` and `cull` commands name a file relative to the caller's working directory
//! (Documentation/filesystems/caching/cachefiles.rst). A process has one, so this is done on a
//! thread that first stops sharing it with the others.

use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sched::{CloneFlags, unshare};

use super::cookies::Cookies;
use crate::config::{CATALOG_ID_MAX_BYTES, CULL_FILES_MAX};
use crate::error::{Error, Result};

/// Writes one command to /dev/cachefiles from the calling thread, whose working directory counts.
pub type Command = Arc<dyn Fn(&str) -> Result<()> + Send + Sync>;

/// Culls below one cache directory.
#[derive(Clone)]
pub struct Culler {
    fscache_dir: PathBuf,
    cookies: Cookies,
    command: Command,
}

impl Culler {
    /// `fscache_dir` is what was given to the kernel as `dir`.
    pub fn new(fscache_dir: &Path, cookies: Cookies, command: Command) -> Self {
        Self { fscache_dir: fscache_dir.to_owned(), cookies, command }
    }

    /// What was given to the kernel as `dir`.
    pub fn fscache_dir(&self) -> &Path {
        &self.fscache_dir
    }

    /// Removes the blob's files, or says which one is in use or could not be removed. The others
    /// are removed all the same. That there is none is no error. Blocks on the disk.
    pub fn cull(&self, blob_id: &str) -> Result<()> {
        let name = file_name("blob", blob_id)?;
        let volumes = directories(&self.fscache_dir.join("cache"), b"Ierofs,")?;
        let (_, failures) = self.remove(volumes, name.clone())?;
        match failures.first() {
            None => Ok(()),
            Some((path, error)) => Err(Error::Busy(format!(
                "failed to start service, {} cache files of {name:?} stay; first {}: {error}",
                failures.len(),
                path.display()
            ))),
        }
    }

    /// Every cache file with a name, as domain and cookie.
    ///
    /// # Errors
    /// What the disk says.
    pub fn cookies(&self) -> Result<Vec<(String, String)>> {
        let mut found = Vec::new();
        let name_of = |path: &Path| path.file_name().and_then(OsStr::to_str).map(str::to_owned);
        for volume in directories(&self.fscache_dir.join("cache"), b"Ierofs,")? {
            let Some(domain) = name_of(&volume) else { continue };
            let domain = domain.trim_start_matches("Ierofs,").to_owned();
            for fan in directories(&volume, b"@")? {
                let entries = std::fs::read_dir(&fan)
                    .map_err(|error| Error::io(&error, fan.display().to_string()))?;
                let names = entries.flatten().filter_map(|entry| name_of(&entry.path()));
                let cookies = names.filter_map(|name| name.strip_prefix('D').map(str::to_owned));
                found.extend(cookies.map(|cookie| (domain.clone(), cookie)));
            }
        }
        found.truncate(CULL_FILES_MAX);
        Ok(found)
    }

    /// Makes sure that the kernel holds nothing for a cookie of a domain, neither a file nor an
    /// open object whose file has no name yet; says how many files were removed. They do not come
    /// back with a power failure. Waits for a cookie that is being let go; blocks on the disk.
    ///
    /// # Errors
    /// `Busy` when it is in use, with what to do.
    pub fn clear(&self, domain: &str, cookie: &str) -> Result<usize> {
        let name = file_name("cookie", cookie)?;
        let volume = format!("Ierofs,{}", checked("domain", domain)?);
        let in_use = |reason: &dyn std::fmt::Display| {
            Error::Busy(format!(
                "{domain}/{cookie} holds data of another image, or data that nobody verified, and \
                 is in use ({reason}): an erofs with fsid or device {cookie} is mounted; unmount \
                 it (`findmnt -t erofs`), then register again"
            ))
        };
        if let Some(state) = self.cookies.settle(&volume[1..], cookie)? {
            return Err(in_use(&format_args!("cookie state {state:?}")));
        }
        let volume = self.fscache_dir.join("cache").join(volume);
        let (removed, failures) = self.remove(vec![volume], name)?;
        match failures.into_iter().next() {
            None => Ok(removed),
            Some((_, error)) if error.errno() == libc::EBUSY => Err(in_use(&error)),
            Some((path, error)) => Err(error.context(format!("cannot remove {}", path.display()))),
        }
    }

    /// Removes the files called `name` in `volumes`: how many went, and which did not, and why.
    fn remove(&self, volumes: Vec<PathBuf>, name: String) -> Result<(usize, Vec<Failure>)> {
        let found = directories_with(&volumes, &name)?;
        if found.is_empty() {
            return Ok((0, Vec::new()));
        }
        let this = self.clone();
        let thread = std::thread::Builder::new().name("cull".into());
        let thread = thread.spawn(move || this.remove_here(&found, &name));
        let thread = thread.map_err(|error| Error::io(&error, "cannot start a thread to cull"))?;
        thread.join().unwrap_or_else(|_| Err(Error::Unsupported("culling failed".into())))
    }

    /// On a thread of its own.
    fn remove_here(&self, found: &[PathBuf], name: &str) -> Result<(usize, Vec<Failure>)> {
        unshare(CloneFlags::CLONE_FS)
            .map_err(|errno| Error::system(errno as i32, "cannot have a working directory"))?;
        let mut failures = Vec::new();
        for directory in found {
            if let Err(error) = self.cull_one(directory, name) {
                failures.push((directory.join(name), error));
            }
        }
        Ok((found.len() - failures.len(), failures))
    }

    fn cull_one(&self, directory: &Path, name: &str) -> Result<()> {
        std::env::set_current_dir(directory)
            .map_err(|error| Error::io(&error, "cannot enter the directory"))?;
        (self.command)(&format!("inuse {name}"))?;
        (self.command)(&format!("cull {name}"))?;
        // The kernel's own removal is not durable, and what is known of the file is forgotten now.
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .map_err(|error| Error::io(&error, "cannot sync the directory"))
    }
}

/// A file that stays, and why.
type Failure = (PathBuf, Error);

fn file_name(what: &str, id: &str) -> Result<String> {
    Ok(format!("D{}", checked(what, id)?))
}

/// A word of a command to the kernel.
fn checked<'a>(what: &str, id: &'a str) -> Result<&'a str> {
    let printable = id.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/');
    if id.is_empty() || id.len() > CATALOG_ID_MAX_BYTES || !printable {
        return Err(Error::Malformed(format!(
            "Invalid argument (os error 22): {id:?} is not a {what} id"
        )));
    }
    Ok(id)
}

/// `@*/` directories of `volumes` that hold a file of this name.
fn directories_with(volumes: &[PathBuf], name: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for volume in volumes {
        for fan in directories(volume, b"@")? {
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

impl std::fmt::Debug for Culler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Culler below {}", self.fscache_dir.display())
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
            let kernel = Kernel { directory, commands: Arc::default() };
            kernel.open(&[]);
            kernel
        }

        /// What is open, as volume, cookie in hexadecimal digits, and state.
        fn open(&self, cookies: &[(&str, &str, char)]) {
            let (mut volumes, mut list) = ("HEAD\n".to_owned(), "HEAD\n".to_owned());
            for (index, (volume, cookie, state)) in cookies.iter().enumerate() {
                volumes += &format!("{index:08x} 2 1 1 00 a cache  {volume}\n");
                list += &format!("{index:08x} {index:08x} 1 1 0 {state} 4008 {cookie}, \n");
            }
            std::fs::write(self.directory.path().join("volumes"), volumes).unwrap();
            std::fs::write(self.directory.path().join("cookies"), list).unwrap();
        }

        fn culler(&self) -> Culler {
            let commands = self.commands.clone();
            Culler::new(
                self.directory.path(),
                Cookies::listed_in(self.directory.path()),
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

    #[test]
    fn a_cookie_is_cleared_in_its_own_volume_only() {
        let kernel = Kernel::new(&["Ierofs,a/@3f/Dblob", "Ierofs,b/@00/Dblob"]);
        assert_eq!(kernel.culler().clear("a", "blob"), Ok(1));
        assert_eq!(kernel.culler().clear("a", "blob"), Ok(0));
        assert!(!kernel.has("Ierofs,a/@3f/Dblob"));
        assert!(kernel.has("Ierofs,b/@00/Dblob"));
    }

    #[test]
    fn a_cookie_in_use_is_not_cleared_even_when_its_file_has_no_name_yet() {
        let kernel = Kernel::new(&["Ierofs,busy/@01/Dblob"]);
        let error = kernel.culler().clear("busy", "blob").unwrap_err();
        assert!(matches!(&error, Error::Busy(text) if text.contains("unmount it")), "{error}");
        kernel.open(&[("erofs,new", "626c6f62", 'A')]);
        let error = kernel.culler().clear("new", "blob").unwrap_err();
        assert!(matches!(&error, Error::Busy(text) if text.contains("new/blob")), "{error}");
        assert_eq!(kernel.culler().clear("other", "blob"), Ok(0));
        assert_eq!(kernel.culler().clear("new", "blo"), Ok(0));
        assert!(kernel.culler().clear("new", "../x").is_err());
    }
}
