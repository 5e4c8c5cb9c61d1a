//! What is registered, and where it is mounted, on disk: after a restart no client has to say it
//! again.
//!
//! `<state_dir>/registered/` holds one file per image, mode 0600 because entries hold credentials:
//! JSON with the entry as the client sent it. A file is whole or not there, and durable before the
//! client is answered. What is read back is hostile until checked; a file that makes no sense is
//! put into `aside/` beside the others with a reason for the log, and never ends the daemon.
//!
//! Callers must keep true: the catalog is changed first, then the file; both methods that follow a
//! change ask what the catalog holds *now*, under the one lock, so that whatever calls cross, the
//! last one leaves the truth. Blocks on the disk. References that clients took from data blobs by
//! the blob's own id are not remembered: after a restart each image counts once.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::blob::registration::Image;
use crate::config::{CATALOG_IMAGES_MAX, REMEMBERED_FILE_MAX_BYTES};
use crate::error::{Error, Result};

/// Domain and id.
pub type Key = (String, String);

/// One image as it is remembered.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
pub struct Record {
    version: u32,
    /// The image's domain, never empty.
    pub domain_id: String,
    /// The image's id.
    pub id: String,
    /// blake3 of the bootstrap that was registered, in hexadecimal digits.
    pub bootstrap: String,
    /// Where relative paths of the entry begin.
    pub directory: PathBuf,
    /// The entry as the client sent it.
    pub entry: Value,
    /// Where the daemon mounted it.
    #[serde(default)]
    pub mounts: Vec<RememberedMount>,
}

/// A mount as it is remembered.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
pub struct RememberedMount {
    /// The mount namespace, by its inode.
    pub namespace: u64,
    /// The directory.
    pub mountpoint: PathBuf,
    /// "cachefiles" or "fanotify".
    pub door: String,
}

/// What is remembered. Shared by `Arc`.
#[derive(Debug)]
pub struct Remembered {
    directory: PathBuf,
    records: Mutex<BTreeMap<Key, Record>>,
}

const VERSION: u32 = 1;
const FILE_ENDING: &str = ".json";
const UNFINISHED_FILE: &str = "unfinished";
const ASIDE: &str = "aside";

impl Record {
    /// Domain and id.
    pub fn key(&self) -> Key {
        (self.domain_id.clone(), self.id.clone())
    }

    /// The entry's JSON.
    pub fn body(&self) -> Vec<u8> {
        self.entry.to_string().into_bytes()
    }

    fn file_name(&self) -> String {
        file_name(&self.domain_id, &self.id)
    }

    /// Reads a file's bytes. The version is looked at first: the rest may be another one's.
    fn parse(bytes: &[u8], name: &str) -> Result<Record> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let malformed = |error: serde_json::Error| Error::Malformed(error.to_string());
        let Versioned { version } = serde_json::from_slice(bytes).map_err(malformed)?;
        if version != VERSION {
            return Err(Error::Unsupported(format!("version {version}; {VERSION} is known")));
        }
        let record: Record = serde_json::from_slice(bytes).map_err(malformed)?;
        if record.file_name() != name {
            let (domain, id) = record.key();
            return Err(Error::Malformed(format!(
                "is the file of another image than {domain}/{id}"
            )));
        }
        Ok(record)
    }
}

impl Remembered {
    /// Reads what `state_dir`, which must exist, remembers. Also gives what was wrong with files
    /// that could not be read; those that make no sense have been put aside.
    ///
    /// # Errors
    /// A directory that cannot be made or listed.
    pub fn open(state_dir: &Path) -> Result<(Remembered, Vec<Error>)> {
        let directory = state_dir.join("registered");
        create_directory(&directory, state_dir)?;
        let remembered = Remembered { directory, records: Mutex::default() };
        let flaws = remembered.read_again()?;
        Ok((remembered, flaws))
    }

    /// Reads everything once more: another daemon may have written since. Gives what was wrong.
    ///
    /// # Errors
    /// A directory that cannot be listed.
    pub fn read_again(&self) -> Result<Vec<Error>> {
        let mut records = self.lock();
        let (mut found, mut flaws) = (BTreeMap::new(), Vec::new());
        let names = self.names()?;
        if names.len() > CATALOG_IMAGES_MAX {
            flaws.push(Error::Busy(format!(
                "{}: {} images are remembered; {CATALOG_IMAGES_MAX} can be registered",
                self.directory.display(),
                names.len()
            )));
        }
        for name in names.into_iter().take(CATALOG_IMAGES_MAX) {
            match self.read(&name) {
                Ok(record) => drop(found.insert(record.key(), record)),
                Err(error) => {
                    let path = self.directory.join(&name);
                    // Another version's file may be good for that version.
                    let is_hopeless = matches!(error, Error::Malformed(_));
                    let is_aside = is_hopeless && self.put_aside(&name).is_ok();
                    let fate = if is_aside { "put aside" } else { "left alone" };
                    flaws.push(error.context(format_args!("{} ({fate})", path.display())));
                }
            }
        }
        *records = found;
        Ok(flaws)
    }

    /// Remembers what another daemon remembered, unless something is remembered under its name.
    ///
    /// # Errors
    /// What the disk says.
    pub fn adopt(&self, record: Record) -> Result<()> {
        let mut records = self.lock();
        if let Entry::Vacant(place) = records.entry(record.key()) {
            self.write(&record)?;
            place.insert(record);
        }
        Ok(())
    }

    /// Everything, by domain and id.
    pub fn records(&self) -> Vec<Record> {
        self.lock().values().cloned().collect()
    }

    /// One image.
    pub fn find(&self, domain_id: &str, id: &str) -> Option<Record> {
        self.lock().get(&(domain_id.to_owned(), id.to_owned())).cloned()
    }

    /// Whether the daemon has mounted any image.
    pub fn is_any_mounted(&self) -> bool {
        self.lock().values().any(|record| !record.mounts.is_empty())
    }

    /// Remembers an image that has been registered with `body`, if it still is.
    ///
    /// # Errors
    /// What the disk says; then the file is what it was before.
    pub fn remember(
        &self,
        image: &Image,
        body: &[u8],
        is_registered: impl FnOnce() -> bool,
    ) -> Result<()> {
        let entry = serde_json::from_slice(body)
            .map_err(|error| Error::Malformed(format!("entry: {error}")))?;
        let directory = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
        let mut record = Record {
            version: VERSION,
            domain_id: image.domain_id.clone(),
            id: image.id.clone(),
            bootstrap: image.bootstrap_digest.to_string(),
            directory,
            entry,
            mounts: Vec::new(),
        };
        let mut records = self.lock();
        if !is_registered() {
            return Ok(());
        }
        // Registered anew while it was mounted: the mounts are still there.
        if let Some(known) = records.get(&record.key()) {
            record.mounts = known.mounts.clone();
        }
        self.write(&record)?;
        records.insert(record.key(), record);
        Ok(())
    }

    /// Forgets what has been unregistered: an image, or all of a domain. `is_gone` says whether an
    /// image really is.
    ///
    /// # Errors
    /// What the disk says; then the image comes back with the next start.
    pub fn forget(
        &self,
        domain_id: &str,
        id: Option<&str>,
        is_gone: impl Fn(&str, &str) -> bool,
    ) -> Result<()> {
        let mut records = self.lock();
        let is_meant = |(domain, name): &Key| {
            domain == domain_id && id.is_none_or(|id| id == name) && is_gone(domain, name)
        };
        let keys: Vec<Key> = records.keys().filter(|key| is_meant(key)).cloned().collect();
        for (domain, name) in &keys {
            let path = self.directory.join(file_name(domain, name));
            match std::fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(failed(&path)(error)),
            }
            records.remove(&(domain.clone(), name.clone()));
        }
        if keys.is_empty() { Ok(()) } else { sync(&self.directory) }
    }

    /// Remembers where the daemon has mounted an image: all places. An image that is not remembered
    /// has been unregistered meanwhile.
    ///
    /// # Errors
    /// What the disk says.
    pub fn set_mounts(&self, key: &Key, mounts: Vec<RememberedMount>) -> Result<()> {
        let mut records = self.lock();
        let Some(known) = records.get(key) else { return Ok(()) };
        if known.mounts == mounts {
            return Ok(());
        }
        let changed = Record { mounts, ..known.clone() };
        self.write(&changed)?;
        records.insert(key.clone(), changed);
        Ok(())
    }

    /// Puts an image's file aside: it can no longer be registered, and why has been said.
    pub fn set_aside(&self, key: &Key) -> Result<()> {
        self.lock().remove(key);
        self.put_aside(&file_name(&key.0, &key.1))
    }

    /// The names of all images' files. What dead daemons have not finished writing goes.
    fn names(&self) -> Result<Vec<String>> {
        let entries = std::fs::read_dir(&self.directory).map_err(failed(&self.directory))?;
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        let (mut wanted, others): (Vec<String>, Vec<String>) =
            names.partition(|name| name.ends_with(FILE_ENDING));
        for name in others {
            let writer = name.strip_prefix(UNFINISHED_FILE).and_then(|rest| rest.strip_prefix('.'));
            if writer.is_some_and(|process| !Path::new("/proc").join(process).exists()) {
                let _ = std::fs::remove_file(self.directory.join(name));
            }
        }
        wanted.sort();
        Ok(wanted)
    }

    /// A FIFO or a link in a file's place is refused, not followed or waited for.
    fn read(&self, name: &str) -> Result<Record> {
        let path = self.directory.join(name);
        let failed = |error: std::io::Error| match error.raw_os_error() {
            Some(libc::ELOOP) => Error::Malformed("is a link".into()),
            _ => Error::io(&error, "cannot be read"),
        };
        let mut options = OpenOptions::new();
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = options.read(true).custom_flags(flags).open(path).map_err(failed)?;
        if !file.metadata().map_err(failed)?.is_file() {
            return Err(Error::Malformed("is not a regular file".into()));
        }
        let mut bytes = Vec::new();
        file.take(REMEMBERED_FILE_MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
        if bytes.len() as u64 > REMEMBERED_FILE_MAX_BYTES {
            return Err(Error::Malformed("is too long".into()));
        }
        Record::parse(&bytes, name)
    }

    /// Puts a file in place whole or not at all, and durably. Called with the lock held: there is
    /// one unfinished file.
    fn write(&self, record: &Record) -> Result<()> {
        let path = self.directory.join(record.file_name());
        let bytes = serde_json::to_vec(record).map_err(|error| {
            Error::Malformed(format!(
                "{}/{} cannot be remembered: {error}",
                record.domain_id, record.id
            ))
        })?;
        if bytes.len() as u64 > REMEMBERED_FILE_MAX_BYTES {
            let (domain, id) = record.key();
            return Err(Error::Unsupported(format!(
                "{domain}/{id}: entry and mounts are larger than {REMEMBERED_FILE_MAX_BYTES} bytes"
            )));
        }
        let unfinished = self.directory.join(format!("{UNFINISHED_FILE}.{}", std::process::id()));
        let write = || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600);
            let mut file = options.custom_flags(libc::O_NOFOLLOW).open(&unfinished)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            std::fs::rename(&unfinished, &path)
        };
        write().map_err(failed(&path))?;
        sync(&self.directory)
    }

    fn put_aside(&self, name: &str) -> Result<()> {
        let aside = self.directory.join(ASIDE);
        create_directory(&aside, &self.directory)?;
        let (from, to) = (self.directory.join(name), aside.join(name));
        std::fs::rename(&from, to).map_err(failed(&from))?;
        sync(&self.directory)
    }

    /// Nothing in here panics half-way through a change, so a poisoned lock holds a whole table.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Record>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Both names together may be longer than a file's name may be.
fn file_name(domain_id: &str, id: &str) -> String {
    let digest = blake3::hash(format!("{domain_id}\0{id}").as_bytes());
    format!("{}{FILE_ENDING}", &digest.to_hex()[..32])
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::io(&error, path.display().to_string())
}

/// A directory that is there after a power failure too.
fn create_directory(path: &Path, parent: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => sync(parent),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed(path)(error)),
    }
}

fn sync(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(failed(directory))
}
