//! Snapshots on disk: one small JSON file each, `<root>/records/<id>.json`.
//!
//! A record is written under another name, synced and renamed, and its directory is synced, so that
//! after a crash at any instant every record is the old one or the new one. Ids only grow:
//! `<root>/sequence` holds a number none has reached, and is moved ahead in steps before it is.
//! One process owns a root; a lock sees to that. Never removes a snapshot's contents.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::labels::Labels;
use crate::config::{
    SNAPSHOT_IDS_STEP, SNAPSHOT_LOCK_LOOK_MS, SNAPSHOT_LOCK_WAIT_MS, SNAPSHOT_RECORD_MAX_BYTES,
    SNAPSHOTS_MAX,
};
use crate::error::{Error, Result};

/// What a snapshot is to its clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, on top of a committed one.
    View,
    /// Being written.
    Active,
    /// A layer; never changes again.
    Committed,
}

/// What a committed snapshot holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Contents {
    /// Files in its directory.
    #[default]
    Files,
    /// Nothing: a data blob that the image above it reads from its registry.
    Blob,
    /// `image/image.boot`, with its SHA-256: the image that stands for all layers up to here.
    Image(String),
}

/// A point in time, as protobuf has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds of the second.
    pub nanos: i32,
}

/// Disk space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Bytes allocated.
    pub bytes: u64,
    /// Files, directories and everything else that has a name, hard links once.
    pub inodes: u64,
}

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// Names its directory; never used again.
    pub id: u64,
    /// The client's key, or the name it was committed under.
    pub name: String,
    /// The name of the committed snapshot below it; empty without one.
    pub parent: String,
    /// What it is.
    pub kind: Kind,
    /// What clients said of it.
    pub labels: Labels,
    /// When it came into being, or was committed.
    pub created: Time,
    /// When its labels last changed.
    pub updated: Time,
    /// What a committed one takes.
    pub usage: Usage,
    /// What a committed one holds.
    pub contents: Contents,
}

/// The records of one root.
#[derive(Debug)]
pub struct Records {
    root: PathBuf,
    /// The next id, and the first that `sequence` does not cover.
    ids: std::ops::Range<u64>,
    _lock: Flock<File>,
}

impl Records {
    /// Takes the root, makes what is missing, and reads what is there.
    ///
    /// # Errors
    /// `Busy` when another process has it; `Malformed` for a record that is damaged, by name:
    /// dropping it in silence would lose a container's files at the next garbage collection.
    pub fn open(root: &Path) -> Result<(Records, BTreeMap<String, Snapshot>)> {
        for directory in [root.to_owned(), root.join("records"), root.join("snapshots")] {
            private_directory(&directory)?;
        }
        let lock = take(&root.join("lock"))?;
        let mut records = Records { root: root.to_owned(), ids: 1..1, _lock: lock };
        let snapshots = records.read()?;
        let first = snapshots.values().map(|snapshot| snapshot.id + 1).max().unwrap_or(1);
        let first = first.max(records.reserved()?);
        records.ids = first..first;
        Ok((records, snapshots))
    }

    /// An id nobody had before, whatever happens to this process.
    pub fn new_id(&mut self) -> Result<u64> {
        if self.ids.is_empty() {
            let end = self.ids.start + SNAPSHOT_IDS_STEP;
            write_synced(&self.root, "sequence", end.to_string().as_bytes())?;
            self.ids.end = end;
        }
        self.ids.start += 1;
        Ok(self.ids.start - 1)
    }

    /// Puts a record in place, or in the place of the one with its id.
    pub fn save(&self, snapshot: &Snapshot) -> Result<()> {
        let text = serde_json::to_vec(snapshot)
            .map_err(|error| Error::Malformed(format!("snapshot {}: {error}", snapshot.name)))?;
        if text.len() as u64 > SNAPSHOT_RECORD_MAX_BYTES {
            return Err(Error::Malformed(format!(
                "snapshot {}: labels of {} bytes are more than {SNAPSHOT_RECORD_MAX_BYTES}",
                snapshot.name,
                text.len()
            )));
        }
        write_synced(&self.root.join("records"), &file_name(snapshot.id), &text)
    }

    /// Forgets a record.
    pub fn remove(&self, id: u64) -> Result<()> {
        let directory = self.root.join("records");
        let file = directory.join(file_name(id));
        fs::remove_file(&file)
            .and_then(|()| File::open(&directory)?.sync_all())
            .map_err(|error| Error::io(&error, format!("cannot remove {}", file.display())))
    }

    fn read(&self) -> Result<BTreeMap<String, Snapshot>> {
        let directory = self.root.join("records");
        let failed = |error| Error::io(&error, format!("cannot read {}", directory.display()));
        let mut snapshots = BTreeMap::new();
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            // What a write that did not come to its end left behind.
            if path.extension().is_some_and(|extension| extension == "new") {
                fs::remove_file(&path).map_err(failed)?;
                continue;
            }
            let snapshot = read_record(&path).map_err(|error| {
                error.context(format!(
                    "the record {} is damaged; move it away to lose this one snapshot",
                    path.display()
                ))
            })?;
            if snapshots.len() == SNAPSHOTS_MAX {
                return Err(Error::Unsupported(format!("more than {SNAPSHOTS_MAX} snapshots")));
            }
            if let Some(other) = snapshots.insert(snapshot.name.clone(), snapshot) {
                return Err(Error::Malformed(format!(
                    "{}: {:?} is the name of snapshot {}, too",
                    path.display(),
                    other.name,
                    other.id
                )));
            }
        }
        Ok(snapshots)
    }

    fn reserved(&self) -> Result<u64> {
        let path = self.root.join("sequence");
        match fs::read_to_string(&path) {
            Ok(text) => text.trim().parse().map_err(|_| {
                Error::Malformed(format!("{} holds no number; write a large one", path.display()))
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(1),
            Err(error) => Err(Error::io(&error, format!("cannot read {}", path.display()))),
        }
    }
}

/// Makes a directory that nobody else may enter, or finds it: layers hold setuid programs.
pub fn private_directory(path: &Path) -> Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| Error::io(&error, format!("cannot make {}", path.display())))
}

/// A process that was killed lets go of its lock only when the last of its threads is gone, so a
/// successor gives it a moment.
fn take(path: &Path) -> Result<Flock<File>> {
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path);
    let mut file = file.map_err(|error| Error::io(&error, path.display().to_string()))?;
    let deadline = Instant::now() + Duration::from_millis(SNAPSHOT_LOCK_WAIT_MS);
    loop {
        file = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => return Ok(lock),
            Err((file, nix::Error::EWOULDBLOCK)) if Instant::now() < deadline => file,
            Err((_, nix::Error::EWOULDBLOCK)) => {
                return Err(Error::Busy(format!(
                    "{}: another snapshotter has these snapshots; stop it or choose another --root",
                    path.display()
                )));
            }
            Err((_, errno)) => {
                let what = format!("cannot lock {}", path.display());
                return Err(Error::system(errno as i32, what));
            }
        };
        std::thread::sleep(Duration::from_millis(SNAPSHOT_LOCK_LOOK_MS));
    }
}

fn read_record(path: &Path) -> Result<Snapshot> {
    let mut text = Vec::new();
    let file = File::open(path).map_err(|error| Error::io(&error, "open"))?;
    let limit = SNAPSHOT_RECORD_MAX_BYTES + 1;
    file.take(limit).read_to_end(&mut text).map_err(|error| Error::io(&error, "read"))?;
    let snapshot: Snapshot =
        serde_json::from_slice(&text).map_err(|error| Error::Malformed(error.to_string()))?;
    match path.file_name().is_some_and(|name| name == file_name(snapshot.id).as_str()) {
        true => Ok(snapshot),
        false => Err(Error::Malformed(format!("it is that of snapshot {}", snapshot.id))),
    }
}

fn file_name(id: u64) -> String {
    format!("{id}.json")
}

fn write_synced(directory: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let (place, new) = (directory.join(name), directory.join(format!("{name}.new")));
    let write = || {
        let options =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
        let mut file = options?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, &place)?;
        File::open(directory)?.sync_all()
    };
    write().map_err(|error| {
        let _ = fs::remove_file(&new);
        Error::io(&error, format!("cannot write {}", place.display()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot(id: u64, name: &str) -> Snapshot {
        Snapshot {
            id,
            name: name.to_owned(),
            parent: String::new(),
            kind: Kind::Active,
            labels: Labels::new(),
            created: Time { seconds: 7, nanos: 8 },
            updated: Time::default(),
            usage: Usage::default(),
            contents: Contents::Image("00".into()),
        }
    }

    #[test]
    fn records_come_back_as_they_were_written() {
        let root = tempfile::tempdir().expect("a directory");
        let (mut records, empty) = Records::open(root.path()).unwrap();
        assert!(empty.is_empty());
        let one = snapshot(records.new_id().unwrap(), "one");
        records.save(&one).unwrap();
        let renamed = Snapshot { name: "two".into(), kind: Kind::Committed, ..one.clone() };
        records.save(&renamed).unwrap();
        let gone = snapshot(records.new_id().unwrap(), "gone");
        records.save(&gone).unwrap();
        records.remove(gone.id).unwrap();
        drop(records);
        let (mut records, found) = Records::open(root.path()).unwrap();
        assert_eq!(found, BTreeMap::from([("two".to_owned(), renamed)]));
        assert!(records.new_id().unwrap() > gone.id, "an id came back");
    }

    #[test]
    fn what_a_crash_leaves_is_passed_over() {
        let root = tempfile::tempdir().expect("a directory");
        let (mut records, _) = Records::open(root.path()).unwrap();
        let one = snapshot(records.new_id().unwrap(), "one");
        records.save(&one).unwrap();
        drop(records);
        let torn = root.path().join("records/1.json.new");
        fs::write(&torn, "{\"id\":1,").unwrap();
        let (_, found) = Records::open(root.path()).unwrap();
        assert_eq!(found.len(), 1);
        assert!(!torn.exists());
    }

    #[test]
    fn a_root_has_one_owner() {
        let root = tempfile::tempdir().expect("a directory");
        let owner = Records::open(root.path()).unwrap();
        assert!(matches!(Records::open(root.path()), Err(Error::Busy(_))));
        drop(owner);
        assert!(Records::open(root.path()).is_ok());
    }

    #[test]
    fn a_successor_waits_for_an_owner_that_is_going() {
        let root = tempfile::tempdir().expect("a directory");
        let owner = Records::open(root.path()).unwrap();
        let path = root.path().to_owned();
        let successor = std::thread::spawn(move || Records::open(&path).map(drop));
        // Whether it has begun to wait or not: it gets the root either way.
        drop(owner);
        assert_eq!(successor.join().expect("no panic"), Ok(()));
    }

    #[test]
    fn damage_is_an_error_that_names_the_file() {
        for (text, name) in [
            ("", "5.json"),
            ("{}", "5.json"),
            (&serde_json::to_string(&snapshot(6, "six")).unwrap(), "5.json"),
            (&serde_json::to_string(&snapshot(1, "one")).unwrap(), "1.json"),
        ] {
            let root = tempfile::tempdir().expect("a directory");
            let (records, _) = Records::open(root.path()).unwrap();
            records.save(&snapshot(3, "one")).unwrap();
            drop(records);
            fs::write(root.path().join("records").join(name), text).unwrap();
            let error = Records::open(root.path()).expect_err(text);
            assert!(matches!(error, Error::Malformed(_)) && error.to_string().contains(".json"));
        }
    }

    #[test]
    fn labels_without_end_are_refused() {
        let root = tempfile::tempdir().expect("a directory");
        let (records, _) = Records::open(root.path()).unwrap();
        let mut large = snapshot(1, "one");
        large.labels.insert("a".into(), "b".repeat(SNAPSHOT_RECORD_MAX_BYTES as usize));
        assert!(records.save(&large).is_err());
    }
}
