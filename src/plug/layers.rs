//! Layers on disk, below the home directory that Docker gives a graphdriver.
//!
//! ```text
//! layers/ID/layer.json   what the layer is: written under another name, synced, renamed
//! layers/ID/diff         what the layer itself has; overlayfs's upper directory if it is writable
//! layers/ID/work         overlayfs's own           layers/ID/merged   where Docker finds it
//! layers/ID/image        where a lazily loaded image is mounted
//! layers/ID/uses         how often Docker got the layer and did not put it back
//! numbers/N              -> ../layers/ID: short names, for mount options hold one page
//! scrap/                 layers being made or removed; emptied at start
//! ```
//! A directory in `layers` is whole: it is made in `scrap` and renamed, and removed the other way
//! round. So a crash leaves either the layer or something in `scrap`. One process at a time owns a
//! home; the lock on `lock` says which.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::beneath::{self, Beneath};
use crate::config;
use crate::error::{Error, Result};

/// What is known about a layer; its `layer.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The layer right below, if any.
    pub parent: Option<String>,
    /// Whether a container writes into it.
    pub writable: bool,
    /// Its name in `numbers`.
    pub number: u64,
    /// What was unpacked into it, once that is on disk.
    #[serde(default)]
    pub applied: Option<Applied>,
}

/// What a layer was unpacked from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    /// Bytes of its regular files.
    pub size_bytes: u64,
    /// Whether it hides all layers below.
    pub opaque_root: bool,
    /// `sha256:...` of its tar, which is Docker's name for it; known for lowest layers.
    pub diff_id: Option<String>,
    /// For the bootstrap of a lazily loaded image, what the image's root directory is like.
    pub image: Option<RootAttributes>,
}

/// Mode and owner of a root directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootAttributes {
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// The layers of one home directory.
#[derive(Debug)]
pub struct Layers {
    home: PathBuf,
    index: Mutex<Index>,
    scrap: OwnedFd,
    _lock: Flock<File>,
}

#[derive(Debug, Default)]
struct Index {
    /// None for a layer whose record cannot be read: it can be removed, and nothing else.
    records: HashMap<String, Option<Arc<Record>>>,
    next_number: u64,
}

impl Layers {
    /// Takes up a home directory, makes it if need be, and removes what a crash left unfinished.
    pub fn open(home: &Path) -> Result<Layers> {
        let failed = |error: std::io::Error| {
            Error::io(&error, format!("cannot use {} for layers", home.display()))
        };
        for name in ["layers", "numbers", "scrap"] {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o710)
                .create(home.join(name))
                .map_err(failed)?;
        }
        let file =
            OpenOptions::new().write(true).create(true).truncate(false).open(home.join("lock"));
        let lock =
            Flock::lock(file.map_err(failed)?, FlockArg::LockExclusiveNonblock).map_err(|_| {
                Error::Busy(format!("another plugin serves {} already", home.display()))
            })?;
        let scrap = Beneath::open(&home.join("scrap"))?
            .directory(b"")
            .and_then(|scrap| beneath::open_directory(scrap, b"."))
            .map_err(|errno| failed(std::io::Error::from(errno)))?;
        let layers = Layers { home: home.to_owned(), index: Mutex::default(), scrap, _lock: lock };
        layers.empty_scrap()?;
        layers.load().map_err(failed)?;
        Ok(layers)
    }

    /// The home directory.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// A layer's file or directory.
    pub fn path(&self, id: &str, name: &str) -> PathBuf {
        self.home.join("layers").join(id).join(name)
    }

    /// Whether the layer is there, readable or not.
    pub fn exists(&self, id: &str) -> bool {
        self.lock().records.contains_key(id)
    }

    /// All layers.
    pub fn ids(&self) -> Vec<String> {
        self.lock().records.keys().cloned().collect()
    }

    /// What is known about a layer.
    pub fn record(&self, id: &str) -> Result<Arc<Record>> {
        match self.lock().records.get(id) {
            Some(Some(record)) => Ok(record.clone()),
            Some(None) => Err(Error::Malformed(format!(
                "layer {id} is damaged: {} cannot be read; it can only be removed",
                self.path(id, "layer.json").display()
            ))),
            None => Err(Error::NotFound(format!("there is no layer {id}"))),
        }
    }

    /// The layers below, nearest first.
    pub fn ancestors(&self, id: &str) -> Result<Vec<(String, Arc<Record>)>> {
        let mut ancestors = Vec::new();
        let mut below = self.record(id)?.parent.clone();
        while let Some(id) = below.take() {
            let record = self.record(&id)?;
            below.clone_from(&record.parent);
            ancestors.push((id, record));
            if ancestors.len() > config::LAYERS_STACKED_MAX {
                return Err(Error::Unsupported(format!(
                    "more than {} layers on top of each other",
                    config::LAYERS_STACKED_MAX
                )));
            }
        }
        Ok(ancestors)
    }

    /// Makes an empty layer whose root directory is like `root`.
    pub fn create(
        &self,
        id: &str,
        parent: Option<&str>,
        writable: bool,
        root: RootAttributes,
    ) -> Result<()> {
        check_id(id)?;
        let record = {
            let mut index = self.lock();
            if index.records.contains_key(id) {
                return Err(Error::Exists(format!("layer {id} exists already")));
            }
            index.next_number += 1;
            let number = index.next_number;
            Record { parent: parent.map(str::to_owned), writable, number, applied: None }
        };
        let staging = self.home.join("scrap").join(format!("new-{id}"));
        self.discard(&staging)?;
        let made = self.make(&staging, id, &record, root);
        if made.is_err() {
            // What is left is emptied at the next start.
            let _ = self.discard(&staging);
        }
        made.map_err(|error| Error::io(&error, format!("cannot make layer {id}")))?;
        self.lock().records.insert(id.to_owned(), Some(Arc::new(record)));
        Ok(())
    }

    /// Remembers what was unpacked into a layer.
    pub fn set_applied(&self, id: &str, applied: Applied) -> Result<()> {
        let record = Record { applied: Some(applied), ..Record::clone(&*self.record(id)?) };
        let directory = self.home.join("layers").join(id);
        write_record(&directory, &record)
            .map_err(|error| Error::io(&error, format!("cannot record layer {id}")))?;
        self.lock().records.insert(id.to_owned(), Some(Arc::new(record)));
        Ok(())
    }

    /// Removes a layer in which nothing is mounted. What is not there is removed.
    pub fn remove(&self, id: &str) -> Result<()> {
        let failed = |error: std::io::Error| Error::io(&error, format!("cannot remove layer {id}"));
        if !self.exists(id) {
            return Ok(());
        }
        let old = self.home.join("scrap").join(format!("old-{id}"));
        if let Ok(record) = self.record(id) {
            let _ = fs::remove_file(self.home.join("numbers").join(record.number.to_string()));
        }
        fs::rename(self.home.join("layers").join(id), &old).map_err(failed)?;
        self.lock().records.remove(id);
        sync_directory(&self.home.join("layers")).map_err(failed)?;
        self.discard(&old)
    }

    /// How often the layer is in use, as far as that was noted.
    pub fn uses(&self, id: &str) -> Option<u32> {
        fs::read_to_string(self.path(id, "uses")).ok()?.trim().parse().ok()
    }

    /// Notes how often the layer is in use. It need not survive the machine: nor do mounts.
    pub fn set_uses(&self, id: &str, uses: u32) -> Result<()> {
        let (path, new) = (self.path(id, "uses"), self.path(id, "uses.new"));
        fs::write(&new, uses.to_string())
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|error| Error::io(&error, format!("cannot write {}", path.display())))
    }

    fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn make(
        &self,
        staging: &Path,
        id: &str,
        record: &Record,
        root: RootAttributes,
    ) -> std::io::Result<()> {
        fs::DirBuilder::new().mode(0o710).create(staging)?;
        let diff = staging.join("diff");
        for name in ["diff", "work", "merged"] {
            fs::create_dir(staging.join(name))?;
        }
        std::os::unix::fs::chown(&diff, Some(root.uid), Some(root.gid))?;
        let mode = std::os::unix::fs::PermissionsExt::from_mode(root.mode & 0o7777);
        fs::set_permissions(&diff, mode)?;
        write_record(staging, record)?;
        self.link(id, record.number)?;
        fs::rename(staging, self.home.join("layers").join(id))?;
        sync_directory(&self.home.join("layers"))
    }

    fn link(&self, id: &str, number: u64) -> std::io::Result<()> {
        let link = self.home.join("numbers").join(number.to_string());
        let target = Path::new("../layers").join(id);
        if fs::read_link(&link).is_ok_and(|there| there == target) {
            return Ok(());
        }
        let _ = fs::remove_file(&link);
        symlink(target, link)
    }

    fn load(&self) -> std::io::Result<()> {
        let mut index = Index::default();
        for entry in fs::read_dir(self.home.join("layers"))? {
            let Ok(id) = entry?.file_name().into_string() else { continue };
            let record = read_record(&self.path(&id, "layer.json"));
            if let Some(record) = &record {
                index.next_number = index.next_number.max(record.number);
                self.link(&id, record.number)?;
            }
            index.records.insert(id, record.map(Arc::new));
        }
        let numbers: BTreeSet<String> =
            index.records.values().flatten().map(|record| record.number.to_string()).collect();
        for entry in fs::read_dir(self.home.join("numbers"))? {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(|name| numbers.contains(name)) {
                fs::remove_file(entry.path())?;
            }
        }
        *self.lock() = index;
        Ok(())
    }

    fn empty_scrap(&self) -> Result<()> {
        let failed = |errno: nix::Error| {
            let scrap = self.home.join("scrap");
            Error::system(errno as i32, format!("cannot empty {}", scrap.display()))
        };
        for name in beneath::names(&self.scrap).map_err(failed)? {
            beneath::remove(&self.scrap, &name, &self.scrap).map_err(failed)?;
        }
        Ok(())
    }

    /// Removes a directory in `scrap`.
    fn discard(&self, path: &Path) -> Result<()> {
        let name = path.file_name().map(std::os::unix::ffi::OsStrExt::as_bytes).unwrap_or_default();
        beneath::remove(&self.scrap, name, &self.scrap).map_err(|errno| {
            Error::system(errno as i32, format!("cannot empty {}", path.display()))
        })
    }
}

/// Identifiers become names of directories.
pub fn check_id(id: &str) -> Result<()> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let good = (1..=config::LAYER_ID_MAX_BYTES).contains(&id.len())
        && id.bytes().all(is_plain)
        && !id.starts_with('.');
    match good {
        true => Ok(()),
        false => Err(Error::Malformed(format!("{id:?} cannot name a layer"))),
    }
}

fn write_record(directory: &Path, record: &Record) -> std::io::Result<()> {
    let new = directory.join("layer.json.new");
    let mut file = File::create(&new)?;
    file.write_all(serde_json::to_string(record)?.as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, directory.join("layer.json"))?;
    sync_directory(directory)
}

fn read_record(path: &Path) -> Option<Record> {
    serde_json::from_slice(&fs::read(path).ok()?).ok()
}

fn sync_directory(path: &Path) -> std::io::Result<()> {
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: RootAttributes = RootAttributes { mode: 0o751, uid: 1, gid: 2 };

    fn names(home: &Path, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(home.join(directory)).expect("listed");
        let name = |entry: std::io::Result<fs::DirEntry>| {
            entry.expect("an entry").file_name().into_string().expect("text")
        };
        entries.map(name).collect()
    }

    #[test]
    fn layers_survive_a_restart_and_one_process_owns_them() {
        let home = tempfile::tempdir().expect("a directory");
        let layers = Layers::open(home.path()).expect("opens");
        layers.create("base", None, false, ROOT).expect("made");
        layers.create("top", Some("base"), true, ROOT).expect("made");
        let applied = Applied { size_bytes: 7, image: Some(ROOT), ..Applied::default() };
        layers.set_applied("base", applied.clone()).expect("recorded");
        layers.set_uses("top", 3).expect("noted");
        assert!(matches!(layers.create("top", None, true, ROOT), Err(Error::Exists(_))));
        assert!(matches!(Layers::open(home.path()), Err(Error::Busy(_))));
        drop(layers);
        let layers = Layers::open(home.path()).expect("opens");
        assert_eq!(layers.record("base").expect("there").applied, Some(applied));
        let ancestors = layers.ancestors("top").expect("there");
        assert_eq!(ancestors.iter().map(|(id, _)| id.as_str()).collect::<Vec<_>>(), ["base"]);
        assert_eq!((layers.uses("top"), layers.uses("base")), (Some(3), None));
        layers.create("third", None, false, ROOT).expect("made");
        assert_eq!(layers.record("third").expect("there").number, 3);
        for id in ["top", "base", "third", "third", "never"] {
            layers.remove(id).expect("removed");
        }
        for directory in ["layers", "numbers", "scrap"] {
            assert!(names(home.path(), directory).is_empty(), "{directory}");
        }
    }

    #[test]
    fn what_a_crash_left_is_swept_and_what_is_damaged_can_be_removed() {
        let home = tempfile::tempdir().expect("a directory");
        let layers = Layers::open(home.path()).expect("opens");
        layers.create("whole", None, false, ROOT).expect("made");
        layers.create("damaged", None, false, ROOT).expect("made");
        fs::write(layers.path("damaged", "layer.json"), "{\"par").expect("cut short");
        drop(layers);
        // Died while making one layer and while removing another.
        fs::create_dir_all(home.path().join("scrap/new-half/diff/d")).expect("made");
        fs::create_dir_all(home.path().join("scrap/old-half/diff/d")).expect("made");
        symlink("../layers/half", home.path().join("numbers/9")).expect("made");
        fs::remove_file(home.path().join("numbers/1")).expect("removed");
        let layers = Layers::open(home.path()).expect("opens");
        assert!(names(home.path(), "scrap").is_empty());
        assert!(fs::metadata(home.path().join("numbers/1/diff")).is_ok());
        assert!(fs::symlink_metadata(home.path().join("numbers/9")).is_err());
        assert!(layers.exists("damaged"));
        assert!(matches!(layers.record("damaged"), Err(Error::Malformed(_))));
        assert!(matches!(layers.ancestors("damaged"), Err(Error::Malformed(_))));
        layers.remove("damaged").expect("removed");
        assert!(!layers.exists("damaged") && layers.exists("whole"));
    }

    #[test]
    fn hostile_identifiers_are_refused() {
        let home = tempfile::tempdir().expect("a directory");
        let layers = Layers::open(home.path()).expect("opens");
        for id in ["", ".", "..", "a/b", "../x", ".hidden", "a b", "a\0", &"x".repeat(300)] {
            assert!(
                matches!(layers.create(id, None, true, ROOT), Err(Error::Malformed(_))),
                "{id}"
            );
        }
        layers.create(&"f".repeat(64), None, true, ROOT).expect("made");
        layers.create(&format!("{}-init", "f".repeat(64)), None, true, ROOT).expect("made");
    }

    #[test]
    fn a_circle_of_parents_ends() {
        let home = tempfile::tempdir().expect("a directory");
        let layers = Layers::open(home.path()).expect("opens");
        layers.create("a", Some("b"), false, ROOT).expect("made");
        layers.create("b", Some("a"), false, ROOT).expect("made");
        assert!(matches!(layers.ancestors("a"), Err(Error::Unsupported(_))));
    }
}
