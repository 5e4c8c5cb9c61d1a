//! The ledger: under which digests each of the kernel's cache files may have been filled.
//!
//! The kernel keeps cache files over restarts and gives them to whoever asks for the same name
//! again. Bytes that are present are never verified again, so they must have been filled under the
//! digests of whoever reads them now. A record per cookie says what may be in its file:
//! `<state_dir>/filled/I<domain>/D<cookie>`, named as the kernel names its own files, so that
//! every domain and cookie is a good file name. A cache file without a record, or with one that
//! contradicts what is being registered, is removed before the registration succeeds.
//!
//! Callers must keep true: `admit` returns before the image can be opened; no two images are
//! registered at once that contradict each other; a record is never dropped while its cache file
//! may exist (records stay when images go: 36 bytes per chunk). A crash at any point leaves at
//! worst a record of more than was filled, which costs a cull and never a wrong byte.
//!
//! A cache directory and a state directory know each other by a random id in both. Where the ids
//! differ, the cache was filled by a daemon with another state directory, and no record counts.
//! What this cannot see: another program that fills the same cache directory in between, and a
//! state directory that is put back from a copy. Who does either must remove one of the two
//! directories.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use super::record::{LedgerId, Record};
use crate::config::LEDGER_RECORD_MAX_BYTES;
use crate::error::{Error, Result};

/// Removes what the cache holds for a domain's cookie, durably; `Busy` while it is in use. That
/// there is nothing is no error.
pub type Clear = Box<dyn Fn(&str, &str) -> Result<()> + Send + Sync>;

/// The records of one cache directory.
pub struct Ledger {
    directory: PathBuf,
    id: LedgerId,
    clear: Clear,
    /// One admission at a time: there is one unfinished file, and records are read before written.
    turn: Mutex<()>,
}

/// Where a cache directory names its ledger. The kernel looks at `cache` and `graveyard` only.
const CACHE_ID_FILE: &str = "sluice-ledger";
const OWN_ID_FILE: &str = "id";
const UNFINISHED_FILE: &str = "unfinished";

impl Ledger {
    /// The ledger of `cache_dir`, which is kept in `state_dir`; both must exist.
    ///
    /// # Errors
    /// What the disk says.
    pub fn open(state_dir: &Path, cache_dir: &Path, clear: Clear) -> Result<Ledger> {
        let directory = state_dir.join("filled");
        create_directory(&directory, state_dir)?;
        let (own, other) = (directory.join(OWN_ID_FILE), cache_dir.join(CACHE_ID_FILE));
        let known = read_id(&own).filter(|id| read_id(&other) == Some(*id));
        let id = match known {
            Some(id) => id,
            None => {
                let id = random_id()?;
                replace(&directory.join(UNFINISHED_FILE), &own, &id)?;
                replace(&cache_dir.join(format!("{CACHE_ID_FILE}.new")), &other, &id)?;
                id
            }
        };
        Ok(Ledger { directory, id, clear, turn: Mutex::default() })
    }

    /// Makes sure that the cache files of `domain` hold nothing but what `contents`, a record per
    /// cookie, allows, and remembers that they may be filled so from now on. Blocks on the disk.
    ///
    /// # Errors
    /// `Busy` when a file has to go and is in use; what the disk says. No record has changed then,
    /// unless the disk failed half-way.
    pub fn admit(&self, domain: &str, contents: Vec<(&str, Record)>) -> Result<()> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut stale, mut changed) = (Vec::new(), Vec::new());
        for (cookie, wanted) in contents {
            let Some(known) = self.read(domain, cookie) else {
                stale.push(cookie);
                changed.push((cookie, wanted));
                continue;
            };
            if known.contradicts(&wanted) {
                stale.push(cookie);
            }
            let next = known.overlaid(wanted);
            if next != known {
                changed.push((cookie, next));
            }
        }
        // All removals first: one that is refused leaves every record as it was.
        for cookie in stale {
            (self.clear)(domain, cookie)?;
        }
        changed.into_iter().try_for_each(|(cookie, record)| self.write(domain, cookie, &record))
    }

    /// Whether there is a good record.
    pub fn has(&self, domain: &str, cookie: &str) -> bool {
        self.read(domain, cookie).is_some()
    }

    /// A record that is damaged, another ledger's or out of the disk's reach counts as none.
    fn read(&self, domain: &str, cookie: &str) -> Option<Record> {
        let bytes = read_file(&self.path(domain, cookie), LEDGER_RECORD_MAX_BYTES).ok()??;
        Record::decode(&bytes, &self.id)
    }

    fn write(&self, domain: &str, cookie: &str, record: &Record) -> Result<()> {
        let path = self.path(domain, cookie);
        create_directory(path.parent().unwrap_or(&self.directory), &self.directory)?;
        replace(&self.directory.join(UNFINISHED_FILE), &path, &record.encode(&self.id))
    }

    fn path(&self, domain: &str, cookie: &str) -> PathBuf {
        debug_assert!(!domain.contains('/') && !cookie.contains('/'), "names are file names");
        self.directory.join(format!("I{domain}")).join(format!("D{cookie}"))
    }
}

impl std::fmt::Debug for Ledger {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ledger in {}", self.directory.display())
    }
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::io(&error, path.display().to_string())
}

/// At most `limit` bytes of a file and one more, or `None` when it is not there.
fn read_file(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes).map_err(failed(path))?;
    Ok(Some(bytes))
}

fn read_id(path: &Path) -> Option<LedgerId> {
    read_file(path, size_of::<LedgerId>() as u64).ok()??.try_into().ok()
}

fn random_id() -> Result<LedgerId> {
    let (mut id, path) = (LedgerId::default(), Path::new("/dev/urandom"));
    File::open(path).and_then(|mut file| file.read_exact(&mut id)).map_err(failed(path))?;
    Ok(id)
}

/// Puts a file in place whole or not at all, and durably.
fn replace(unfinished: &Path, path: &Path, bytes: &[u8]) -> Result<()> {
    let write = || {
        let mut options = OpenOptions::new();
        let mut file =
            options.write(true).create(true).truncate(true).mode(0o600).open(unfinished)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(unfinished, path)
    };
    write().map_err(failed(path))?;
    path.parent().map_or(Ok(()), sync)
}

/// A directory that is there after a power failure too.
fn create_directory(path: &Path, parent: &Path) -> Result<()> {
    match std::fs::create_dir(path) {
        Ok(()) => sync(parent),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(failed(path)(error)),
    }
}

fn sync(directory: &Path) -> Result<()> {
    File::open(directory).and_then(|file| file.sync_all()).map_err(failed(directory))
}
