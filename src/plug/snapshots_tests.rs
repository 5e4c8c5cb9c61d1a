//! Tests of the rules of snapshots, and that they hold across restarts and crashes.

use std::fs;
use std::path::Path;

use super::labels::{Labels, NYDUS_BLOB, SNAPSHOT_REF};
use super::snapshot_filter::Filters;
use super::snapshot_records::{Contents, Kind, Usage};
use super::snapshots::{Lower, Snapshots};
use crate::error::{Error, Result};

fn root() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// Makes the layer `name` on `parent` and returns its id.
fn layer(snapshots: &mut Snapshots, name: &str, parent: &str, contents: Contents) -> u64 {
    let key = format!("{name}-active");
    let unpacking = labels(&[(SNAPSHOT_REF, name)]);
    let made = snapshots.create(Kind::Active, &key, parent, unpacking).expect("created");
    let usage = Usage { bytes: 1, inodes: 1 };
    snapshots.commit(&key, name, Labels::new(), usage, contents).expect("committed");
    made.snapshot.id
}

fn names(snapshots: &Snapshots, filters: &[&str]) -> Vec<String> {
    let texts: Vec<String> = filters.iter().map(|text| (*text).to_owned()).collect();
    let filters = Filters::parse(&texts).expect("a filter");
    snapshots.list(&filters).map(|snapshot| snapshot.name.clone()).collect()
}

#[test]
fn keys_are_unique_and_parents_committed() {
    let root = root();
    let mut all = Snapshots::open(root.path()).unwrap();
    layer(&mut all, "base", "", Contents::Files);
    all.create(Kind::Active, "a", "base", Labels::new()).unwrap();
    let mut make = |kind, key: &str, parent: &str| all.create(kind, key, parent, Labels::new());
    assert!(matches!(make(Kind::Active, "a", "base"), Err(Error::Exists(_))));
    assert!(matches!(make(Kind::View, "base", ""), Err(Error::Exists(_))));
    assert!(matches!(make(Kind::View, "b", "absent"), Err(Error::NotFound(_))));
    assert!(matches!(make(Kind::View, "b", "a"), Err(Error::Malformed(_))));
    assert!(matches!(make(Kind::View, "", "base"), Err(Error::Malformed(_))));
}

#[test]
fn only_an_active_snapshot_is_committed_and_under_a_new_name() {
    let root = root();
    let mut all = Snapshots::open(root.path()).unwrap();
    layer(&mut all, "base", "", Contents::Files);
    all.create(Kind::View, "view", "base", Labels::new()).unwrap();
    all.create(Kind::Active, "a", "base", labels(&[("old", "1")])).unwrap();
    let mut commit = |key: &str, name: &str| {
        all.commit(key, name, labels(&[("new", "2")]), Usage::default(), Contents::Files)
    };
    assert!(matches!(commit("absent", "x"), Err(Error::NotFound(_))));
    assert!(matches!(commit("view", "x"), Err(Error::Busy(_))));
    assert!(matches!(commit("base", "x"), Err(Error::Busy(_))));
    assert!(matches!(commit("a", "base"), Err(Error::Exists(_))));
    assert_eq!(commit("a", "top"), Ok(()));
    assert!(matches!(all.stat("a"), Err(Error::NotFound(_))));
    let top = all.stat("top").unwrap();
    assert_eq!((top.kind, top.parent.as_str()), (Kind::Committed, "base"));
    assert_eq!(top.labels, labels(&[("new", "2")]), "labels are replaced, not inherited");
    assert!(matches!(all.stack("top"), Err(Error::Busy(_))));
}

#[test]
fn what_others_stand_on_stays() {
    let root = root();
    let mut all = Snapshots::open(root.path()).unwrap();
    layer(&mut all, "base", "", Contents::Files);
    layer(&mut all, "top", "base", Contents::Files);
    all.create(Kind::View, "view", "top", Labels::new()).unwrap();
    for held in ["base", "top"] {
        assert!(matches!(all.remove(held), Err(Error::Busy(_))), "{held}");
    }
    assert!(all.remove("view").is_ok() && all.remove("top").is_ok() && all.remove("base").is_ok());
    assert!(matches!(all.remove("base"), Err(Error::NotFound(_))));
}

#[test]
fn a_stack_ends_at_the_first_image_and_passes_over_blobs() {
    let root = root();
    let mut all = Snapshots::open(root.path()).unwrap();
    let blob = labels(&[(NYDUS_BLOB, "true"), (SNAPSHOT_REF, "sha256:1")]);
    all.commit_blob("sha256:1", "", &blob).unwrap();
    let blob_name = names(&all, &["labels.\"containerd.io/snapshot.ref\"==sha256:1"]).remove(0);
    // What unpacks the bootstrap stands on blobs only: on nothing.
    let reference = labels(&[(SNAPSHOT_REF, "sha256:2")]);
    let unpacking = all.create(Kind::Active, "u", &blob_name, reference).unwrap();
    assert_eq!(unpacking.lowers, []);
    let image = layer(&mut all, "image", &blob_name, Contents::Image("00".into()));
    let over = layer(&mut all, "over", "image", Contents::Files);
    let stack = all.create(Kind::Active, "container", "over", Labels::new()).unwrap();
    assert_eq!(stack.image().map(|layer| layer.id), Some(image));
    assert_eq!(stack.lowers.len(), 2);
    assert_eq!(stack.lowers[0], Lower::Files(over));
    assert!(all.is_image_used(image));
    all.remove("container").unwrap();
    assert!(!all.is_image_used(image), "a layer is no user");
}

#[test]
fn what_lacks_the_files_of_a_blob_layer_is_not_handed_out() {
    let root = root();
    let mut all = Snapshots::open(root.path()).unwrap();
    // By a manifest that calls the lowest layer of somebody else's image a blob.
    let blob = labels(&[(NYDUS_BLOB, "true"), (SNAPSHOT_REF, "sha256:1")]);
    all.commit_blob("sha256:1", "", &blob).unwrap();
    let blob_name = names(&all, &["labels.\"containerd.io/snapshot.ref\"==sha256:1"]).remove(0);
    layer(&mut all, "top", &blob_name, Contents::Files);
    for (kind, parent) in
        [(Kind::Active, "top"), (Kind::View, "top"), (Kind::Active, blob_name.as_str())]
    {
        let made = all.create(kind, "container", parent, Labels::new());
        let said = made.expect_err("refused").to_string();
        assert!(said.contains("sha256:1") && said.contains("pull"), "{said}");
    }
    layer(&mut all, "image", "top", Contents::Image("00".into()));
    all.create(Kind::Active, "container", "image", Labels::new()).expect("all of it is there");
}

#[test]
fn a_blob_layer_is_one_however_often_it_is_asked_for() {
    let root = root();
    let mut all = Snapshots::open(root.path()).unwrap();
    let blob = labels(&[(SNAPSHOT_REF, "sha256:1")]);
    for _ in 0..3 {
        all.commit_blob("sha256:1", "", &blob).unwrap();
    }
    let found = names(&all, &["labels.\"containerd.io/snapshot.ref\"==sha256:1,parent==\"\""]);
    assert_eq!(found.len(), 1);
    all.commit_blob("sha256:1", &found[0], &blob).unwrap();
    assert_eq!(names(&all, &[]).len(), 2, "on another parent it is another layer");
    assert!(all.commit_blob("sha256:1", "absent", &blob).is_err());
}

#[test]
fn labels_change_as_the_mask_says() {
    let root = root();
    let mut all = Snapshots::open(root.path()).unwrap();
    all.create(Kind::Active, "a", "", labels(&[("x", "1"), ("y", "1")])).unwrap();
    let mut update = |paths: &[&str]| {
        let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        all.update("a", &labels(&[("x", "2")]), &paths).map(|it| it.labels)
    };
    assert_eq!(update(&["labels.x"]).unwrap(), labels(&[("x", "2"), ("y", "1")]));
    assert_eq!(update(&["labels.y"]).unwrap(), labels(&[("x", "2")]));
    assert_eq!(update(&["labels"]).unwrap(), labels(&[("x", "2")]));
    assert_eq!(update(&[]).unwrap(), labels(&[("x", "2")]));
    assert!(matches!(update(&["parent"]), Err(Error::Malformed(_))));
    assert!(matches!(all.update("absent", &Labels::new(), &[]), Err(Error::NotFound(_))));
    drop(all);
    let all = Snapshots::open(root.path()).unwrap();
    assert_eq!(all.stat("a").unwrap().labels, labels(&[("x", "2")]));
}

#[test]
fn everything_is_there_after_a_restart() {
    let root = root();
    let mut all = Snapshots::open(root.path()).unwrap();
    layer(&mut all, "base", "", Contents::Files);
    layer(&mut all, "image", "base", Contents::Image("00".into()));
    all.create(Kind::Active, "container", "image", labels(&[("x", "1")])).unwrap();
    all.create(Kind::View, "gone", "image", Labels::new()).unwrap();
    let gone = all.remove("gone").unwrap().snapshot.id;
    let before: Vec<_> = all.list(&Filters::parse(&[]).unwrap()).cloned().collect();
    drop(all);
    let mut all = Snapshots::open(root.path()).unwrap();
    let after: Vec<_> = all.list(&Filters::parse(&[]).unwrap()).cloned().collect();
    assert_eq!(before, after);
    assert!(all.is_image_used(all.stat("image").unwrap().id));
    assert!(matches!(all.remove("image"), Err(Error::Busy(_))), "children are known");
    let new = all.create(Kind::Active, "new", "image", Labels::new()).unwrap();
    assert!(new.snapshot.id > gone, "an id came back");
}

#[test]
fn directories_without_a_record_are_orphans() {
    let root = root();
    let mut all = Snapshots::open(root.path()).unwrap();
    let id = all.create(Kind::Active, "a", "", Labels::new()).unwrap().snapshot.id;
    assert_eq!(all.orphans().unwrap(), Vec::<std::path::PathBuf>::new());
    let place = all.directories().of(id);
    all.remove("a").unwrap();
    // And one of a creation that did not come to its record.
    let torn = root.path().join("snapshots/4711");
    fs::create_dir(&torn).unwrap();
    let mut orphans = all.orphans().unwrap();
    orphans.sort();
    assert_eq!(orphans, [place, torn]);
}

/// Opens the root after `break_it` did something to the record of `base`'s child.
fn reopened(break_it: impl Fn(&Path)) -> Result<Snapshots> {
    let root = root();
    let mut all = Snapshots::open(root.path())?;
    layer(&mut all, "base", "", Contents::Files);
    layer(&mut all, "top", "base", Contents::Files);
    drop(all);
    break_it(&root.path().join("records"));
    Snapshots::open(root.path())
}

#[test]
fn a_missing_parent_is_noticed_at_the_start() {
    assert!(reopened(|_| ()).is_ok());
    let error = reopened(|records| fs::remove_file(records.join("1.json")).unwrap());
    let said = error.expect_err("refused").to_string();
    assert!(said.contains("\"top\" stands on \"base\""), "{said}");
    assert!(said.contains("records/2.json") && said.contains("move"), "what to do: {said}");
}
