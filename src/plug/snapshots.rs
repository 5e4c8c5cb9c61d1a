//! The rules of snapshots: keys, parents, kinds, and what an image's layers come to.
//!
//! Owns the records of one root and the directories beside them: `snapshots/<id>/{fs,work,image}`,
//! `image` being where the lazily loaded image of that layer is mounted. Every change is durable
//! before it is visible. Mounts nothing, removes no contents: a snapshot without a record is an
//! orphan, and its directory goes at the next cleanup.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::labels::{Labels, SNAPSHOT_REF};
use super::snapshot_filter::Filters;
use super::snapshot_records::{Contents, Kind, Records, Snapshot, Time, Usage};
use crate::config::SNAPSHOTS_MAX;
use crate::error::{Error, Result};

/// All snapshots of one root.
#[derive(Debug)]
pub struct Snapshots {
    records: Records,
    by_name: BTreeMap<String, Snapshot>,
    /// How many snapshots lie directly on top of each name; no entry is none.
    children: BTreeMap<String, usize>,
    /// How many views and active snapshots stand on each image; no entry is none.
    users: BTreeMap<u64, usize>,
    directories: Directories,
}

/// Where a root keeps the contents of its snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Directories(PathBuf);

/// A snapshot and what is below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stack {
    /// The snapshot itself.
    pub snapshot: Snapshot,
    /// What it stands on, nearest first.
    pub lowers: Vec<Lower>,
}

/// One lower layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lower {
    /// The files of this snapshot.
    Files(u64),
    /// The image that this snapshot's bootstrap describes.
    Image(Box<Snapshot>),
}

impl Stack {
    /// The lazily loaded image at the bottom, if there is one.
    pub fn image(&self) -> Option<&Snapshot> {
        match self.lowers.last() {
            Some(Lower::Image(snapshot)) => Some(snapshot),
            _ => None,
        }
    }
}

impl Directories {
    /// Everything of one snapshot.
    pub fn of(&self, id: u64) -> PathBuf {
        self.0.join(id.to_string())
    }

    /// Its own files: the upper directory while it is active.
    pub fn files(&self, id: u64) -> PathBuf {
        self.of(id).join("fs")
    }

    /// The overlay's scratch directory.
    pub fn work(&self, id: u64) -> PathBuf {
        self.of(id).join("work")
    }

    /// Where its lazily loaded image is mounted.
    pub fn image(&self, id: u64) -> PathBuf {
        self.of(id).join("image")
    }

    fn make(&self, id: u64, kind: Kind) -> Result<()> {
        let make = |path: PathBuf, mode| {
            let made = DirBuilder::new().mode(mode).create(&path);
            made.map_err(|error| Error::io(&error, format!("cannot make {}", path.display())))
        };
        make(self.of(id), 0o700)?;
        make(self.files(id), 0o755)?;
        match kind {
            Kind::Active => make(self.work(id), 0o711),
            Kind::View | Kind::Committed => Ok(()),
        }
    }
}

impl Snapshots {
    /// Opens a root, or makes it. Its directories go by the names that the kernel shows in its
    /// mount table, without links: the daemon finds what it has mounted there.
    ///
    /// # Errors
    /// Those of [`Records::open`], and `Malformed` when a parent is missing.
    pub fn open(root: &Path) -> Result<Snapshots> {
        let (records, by_name) = Records::open(root)?;
        let root = root
            .canonicalize()
            .map_err(|error| Error::io(&error, format!("cannot find {}", root.display())))?;
        let mut children = BTreeMap::new();
        for snapshot in by_name.values().filter(|snapshot| !snapshot.parent.is_empty()) {
            let parent = by_name.get(&snapshot.parent);
            if parent.is_none_or(|parent| parent.kind != Kind::Committed) {
                return Err(Error::Malformed(format!(
                    "{}: snapshot {:?} stands on {:?}, which is no committed snapshot here; put \
                     that one's record back, or move records/{}.json away to lose this one, too",
                    root.display(),
                    snapshot.name,
                    snapshot.parent,
                    snapshot.id
                )));
            }
            *children.entry(snapshot.parent.clone()).or_default() += 1;
        }
        let directories = Directories(root.join("snapshots"));
        let users = BTreeMap::new();
        let mut all = Snapshots { records, by_name, children, users, directories };
        let images = all.by_name.values().filter_map(|snapshot| all.image_used_by(snapshot));
        for image in images.collect::<Vec<_>>() {
            *all.users.entry(image).or_default() += 1;
        }
        Ok(all)
    }

    /// Where the contents are.
    pub fn directories(&self) -> &Directories {
        &self.directories
    }

    /// The snapshot with this name.
    pub fn stat(&self, name: &str) -> Result<&Snapshot> {
        self.by_name
            .get(name)
            .ok_or_else(|| Error::NotFound(format!("snapshot {name:?} does not exist")))
    }

    /// All that match, by name.
    pub fn list<'a>(&'a self, filters: &'a Filters) -> impl Iterator<Item = &'a Snapshot> {
        self.by_name.values().filter(|snapshot| filters.matches(|path| field(snapshot, path)))
    }

    /// Changes labels: all of them, or those that `paths` name as `labels.KEY`.
    pub fn update(&mut self, name: &str, labels: &Labels, paths: &[String]) -> Result<Snapshot> {
        let mut snapshot = self.stat(name)?.clone();
        if paths.is_empty() {
            snapshot.labels.clone_from(labels);
        }
        for path in paths {
            match path.strip_prefix("labels.") {
                Some(key) => match labels.get(key) {
                    Some(value) => drop(snapshot.labels.insert(key.to_owned(), value.clone())),
                    None => drop(snapshot.labels.remove(key)),
                },
                None if path == "labels" => snapshot.labels.clone_from(labels),
                None => {
                    return Err(Error::Malformed(format!(
                        "snapshot {name:?}: the field {path:?} cannot be changed, only labels"
                    )));
                }
            }
        }
        snapshot.updated = now();
        self.records.save(&snapshot)?;
        self.by_name.insert(name.to_owned(), snapshot.clone());
        Ok(snapshot)
    }

    /// Makes a view or an active snapshot with its directories.
    pub fn create(&mut self, kind: Kind, key: &str, parent: &str, labels: Labels) -> Result<Stack> {
        self.check_new(key)?;
        self.check_room()?;
        self.check_parent(parent)?;
        if kind == Kind::View || !labels.contains_key(SNAPSHOT_REF) {
            self.check_whole(parent)?;
        }
        let id = self.records.new_id()?;
        self.directories.make(id, kind)?;
        let snapshot = fresh(id, key, parent, kind, labels, Contents::Files);
        self.insert(snapshot)?;
        self.stack(key)
    }

    /// Makes a committed snapshot for a blob layer, which has no files here. One that is there
    /// already under this chain id and on this parent will do.
    ///
    /// containerd looks for the result by these two (`createSnapshot`, metadata/snapshot.go), not
    /// by name; the name is ours and unlike any key of containerd's, so that two namespaces can
    /// share a layer.
    pub fn commit_blob(&mut self, chain: &str, parent: &str, labels: &Labels) -> Result<()> {
        self.check_parent(parent)?;
        let same = |snapshot: &Snapshot| {
            snapshot.kind == Kind::Committed
                && snapshot.parent == parent
                && snapshot.labels.get(SNAPSHOT_REF).is_some_and(|other| other == chain)
        };
        if self.by_name.values().any(same) {
            return Ok(());
        }
        self.check_room()?;
        let id = self.records.new_id()?;
        let name = format!("blob-layer/{id}/{chain}");
        let labels = labels.clone();
        self.insert(fresh(id, &name, parent, Kind::Committed, labels, Contents::Blob))
    }

    /// An active snapshot becomes a layer under a new name; labels are replaced, not inherited.
    pub fn commit(
        &mut self,
        key: &str,
        name: &str,
        labels: Labels,
        usage: Usage,
        contents: Contents,
    ) -> Result<()> {
        let active = self.active(key)?;
        if name != key {
            self.check_new(name)?;
        }
        let (id, parent) = (active.id, active.parent.clone());
        let layer = fresh(id, name, &parent, Kind::Committed, labels, contents);
        let layer = Snapshot { usage, ..layer };
        self.records.save(&layer)?;
        if let Some(active) = self.by_name.remove(key) {
            self.drop_user(&active);
        }
        self.by_name.insert(name.to_owned(), layer);
        Ok(())
    }

    /// The snapshot, which must be active.
    pub fn active(&self, key: &str) -> Result<&Snapshot> {
        let snapshot = self.stat(key)?;
        match snapshot.kind {
            Kind::Active => Ok(snapshot),
            _ => Err(Error::Busy(format!("snapshot {key:?} is not active"))),
        }
    }

    /// Forgets a snapshot that nothing stands on. Its directory is an orphan from here on.
    pub fn remove(&mut self, name: &str) -> Result<Stack> {
        let stack = self.lowers_of(self.stat(name)?);
        if self.children.contains_key(name) {
            return Err(Error::Busy(format!(
                "cannot remove snapshot {name:?}: other snapshots stand on it"
            )));
        }
        self.records.remove(stack.snapshot.id)?;
        self.by_name.remove(name);
        self.drop_user(&stack.snapshot);
        let parent = &stack.snapshot.parent;
        if let Some(count) = self.children.get_mut(parent) {
            *count -= 1;
            if *count == 0 {
                self.children.remove(parent);
            }
        }
        Ok(stack)
    }

    /// What a view or an active snapshot is mounted from.
    pub fn stack(&self, key: &str) -> Result<Stack> {
        let snapshot = self.stat(key)?;
        match snapshot.kind {
            Kind::View | Kind::Active => Ok(self.lowers_of(snapshot)),
            Kind::Committed => Err(Error::Busy(format!("snapshot {key:?} is committed already"))),
        }
    }

    /// Whether a view or an active snapshot stands on this image.
    pub fn is_image_used(&self, id: u64) -> bool {
        self.users.contains_key(&id)
    }

    /// The image a view or an active snapshot stands on, which never changes.
    fn image_used_by(&self, snapshot: &Snapshot) -> Option<u64> {
        if snapshot.kind == Kind::Committed {
            return None;
        }
        let is_image = |layer: &&Snapshot| matches!(layer.contents, Contents::Image(_));
        self.down_from(&snapshot.parent).find(is_image).map(|layer| layer.id)
    }

    /// A snapshot and those it stands on. A parent is older than its child, so the walk ends.
    fn down_from(&self, name: &str) -> impl Iterator<Item = &Snapshot> {
        let first = self.by_name.get(name);
        std::iter::successors(first, |layer| self.by_name.get(&layer.parent))
    }

    fn drop_user(&mut self, snapshot: &Snapshot) {
        let Some(image) = self.image_used_by(snapshot) else { return };
        if let Some(count) = self.users.get_mut(&image) {
            *count -= 1;
            if *count == 0 {
                self.users.remove(&image);
            }
        }
    }

    /// Directories that belong to no record: of removed snapshots, of unfinished creations.
    pub fn orphans(&self) -> Result<Vec<PathBuf>> {
        let directory = &self.directories.0;
        let failed = |error| Error::io(&error, format!("cannot read {}", directory.display()));
        let known: BTreeSet<PathBuf> =
            self.by_name.values().map(|snapshot| self.directories.of(snapshot.id)).collect();
        let mut orphans = Vec::new();
        for entry in fs::read_dir(directory).map_err(failed)? {
            orphans.push(entry.map_err(failed)?.path());
        }
        orphans.retain(|path| !known.contains(path));
        Ok(orphans)
    }

    /// Walks down to the bottom, or to the first image: that one has everything below it.
    fn lowers_of(&self, snapshot: &Snapshot) -> Stack {
        let mut lowers = Vec::new();
        for below in self.down_from(&snapshot.parent) {
            match below.contents {
                Contents::Files => lowers.push(Lower::Files(below.id)),
                Contents::Blob => {}
                Contents::Image(_) => {
                    lowers.push(Lower::Image(Box::new(below.clone())));
                    break;
                }
            }
        }
        Stack { snapshot: snapshot.clone(), lowers }
    }

    fn insert(&mut self, snapshot: Snapshot) -> Result<()> {
        self.records.save(&snapshot)?;
        if !snapshot.parent.is_empty() {
            *self.children.entry(snapshot.parent.clone()).or_default() += 1;
        }
        if let Some(image) = self.image_used_by(&snapshot) {
            *self.users.entry(image).or_default() += 1;
        }
        self.by_name.insert(snapshot.name.clone(), snapshot);
        Ok(())
    }

    fn check_new(&self, name: &str) -> Result<()> {
        if name.is_empty() {
            return Err(Error::Malformed("a snapshot needs a name".to_owned()));
        }
        if self.by_name.contains_key(name) {
            return Err(Error::Exists(format!("snapshot {name:?} exists already")));
        }
        Ok(())
    }

    /// No start reads more records than this.
    fn check_room(&self) -> Result<()> {
        match self.by_name.len() < SNAPSHOTS_MAX {
            true => Ok(()),
            false => Err(Error::Busy(format!(
                "there are {SNAPSHOTS_MAX} snapshots already: remove images or containers"
            ))),
        }
    }

    /// What a layer is unpacked into, and only that, may stand on a blob layer without the image
    /// that reads it: to a container its files would just not be there. A manifest can call any
    /// layer a blob, and containerd then takes that for this layer in other images, too.
    fn check_whole(&self, parent: &str) -> Result<()> {
        for layer in self.down_from(parent) {
            match layer.contents {
                Contents::Files => {}
                Contents::Image(_) => return Ok(()),
                Contents::Blob => {
                    return Err(Error::Malformed(format!(
                        "layer {:?} holds a data blob, and above it is no bootstrap to read it by: \
                         remove all images with this layer and pull again",
                        layer.name
                    )));
                }
            }
        }
        Ok(())
    }

    fn check_parent(&self, parent: &str) -> Result<()> {
        if parent.is_empty() {
            return Ok(());
        }
        match self.stat(parent).map_err(|error| error.context("parent"))?.kind {
            Kind::Committed => Ok(()),
            _ => Err(Error::Malformed(format!("parent {parent:?} is not committed"))),
        }
    }
}

fn fresh(
    id: u64,
    name: &str,
    parent: &str,
    kind: Kind,
    labels: Labels,
    contents: Contents,
) -> Snapshot {
    let (name, parent, created) = (name.to_owned(), parent.to_owned(), now());
    let usage = Usage::default();
    Snapshot { id, name, parent, kind, labels, created, updated: created, usage, contents }
}

fn now() -> Time {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    Time { seconds, nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0) }
}

/// A field as the filter language names it (`adaptSnapshot`, snapshots/storage/bolt.go).
fn field<'a>(snapshot: &'a Snapshot, path: &[String]) -> Option<&'a str> {
    match path.first().map(String::as_str) {
        Some("name") => Some(&snapshot.name),
        Some("parent") => Some(&snapshot.parent),
        Some("kind") => Some(match snapshot.kind {
            Kind::View => "view",
            Kind::Active => "active",
            Kind::Committed => "committed",
        }),
        Some("labels") => snapshot.labels.get(&path[1..].join(".")).map(String::as_str),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_root_takes_no_blob_layer_and_still_commits() {
        let root = tempfile::tempdir().expect("a directory");
        let mut all = Snapshots::open(root.path()).unwrap();
        all.create(Kind::Active, "a", "", Labels::new()).unwrap();
        for id in 2..=SNAPSHOTS_MAX as u64 {
            let (name, labels) = (id.to_string(), Labels::new());
            let other = fresh(id, &name, "", Kind::Committed, labels, Contents::Files);
            all.by_name.insert(name, other);
        }
        // One more, and the next start would refuse the root.
        let blob = all.commit_blob("sha256:1", "", &Labels::new());
        assert!(matches!(blob, Err(Error::Busy(_))), "{blob:?}");
        let made = all.create(Kind::View, "b", "", Labels::new());
        assert!(matches!(made, Err(Error::Busy(_))), "{made:?}");
        let committed = all.commit("a", "c", Labels::new(), Usage::default(), Contents::Files);
        assert_eq!(committed, Ok(()), "that makes none more");
    }
}
