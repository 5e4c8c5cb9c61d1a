//! Tests of the store with a stand-in for the daemon: who mounts what, when, and what if not.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::beneath;
use super::labels::{self, Labels};
use super::snapshot_images::{Mounter, Plan};
use super::snapshot_records::Kind;
use super::snapshot_store::{START_LABEL, Store};
use super::start::{Policy, Starts};
use crate::blob::journal::{Journal, Level};
use crate::error::{Error, Result};

/// A daemon that "mounts" by making a file in the mountpoint, and fails as often as told.
#[derive(Clone, Default)]
struct StandIn {
    mounted: Arc<Mutex<BTreeSet<PathBuf>>>,
    entries: Arc<Mutex<Vec<Value>>>,
    failures: Arc<Mutex<usize>>,
    /// Started anew, it knows of no mount.
    is_ignorant: Arc<Mutex<bool>>,
    /// How starts went.
    told: Arc<Mutex<Vec<Value>>>,
    /// Somebody is in every image: none can be unmounted.
    is_busy: Arc<Mutex<bool>>,
}

impl StandIn {
    fn mounter(&self) -> Mounter {
        let (on_mount, on_unmount) = (self.clone(), self.clone());
        let (on_look, on_ask, on_tell) = (self.clone(), self.clone(), self.clone());
        Mounter {
            mount: Box::new(move |entry, place| on_mount.mount(entry, place)),
            unmount: Box::new(move |place| {
                if *on_unmount.is_busy.lock().unwrap() {
                    return Err(Error::Busy(place.display().to_string()));
                }
                fs::remove_file(place.join("etc/passwd")).unwrap();
                fs::remove_dir(place.join("etc")).unwrap();
                let was = on_unmount.mounted.lock().unwrap().remove(place);
                if was { Ok(()) } else { Err(Error::NotFound(place.display().to_string())) }
            }),
            is_mounted: Box::new(move |place| Ok(on_look.mounted.lock().unwrap().contains(place))),
            is_served: Box::new(move |_| Ok(!*on_ask.is_ignorant.lock().unwrap())),
            starts: Starts::new(Box::new(move |news| {
                on_tell.told.lock().unwrap().push(news.clone());
                Ok(())
            })),
        }
    }

    fn mount(&self, entry: &Value, place: &Path) -> Result<()> {
        self.entries.lock().unwrap().push(entry.clone());
        let mut failures = self.failures.lock().unwrap();
        if *failures > 0 {
            *failures -= 1;
            return Err(Error::NotFound("no registry".to_owned()));
        }
        fs::create_dir_all(place.join("etc")).unwrap();
        fs::write(place.join("etc/passwd"), "root").unwrap();
        let is_new = self.mounted.lock().unwrap().insert(place.to_owned());
        assert!(is_new || *self.is_ignorant.lock().unwrap(), "mounted twice");
        Ok(())
    }

    fn count(&self) -> usize {
        self.mounted.lock().unwrap().len()
    }
}

struct Scene {
    root: tempfile::TempDir,
    daemon: StandIn,
    store: Arc<Store>,
    runtime: tokio::runtime::Runtime,
}

fn plan(policy: Policy, wait_ms: u64) -> Plan {
    Plan {
        name: "nydus".to_owned(),
        policies: vec![("r.example/fail/*".to_owned(), Policy::Fail)],
        policy,
        wait_ms,
        domain: None,
        prefetch: false,
        plain_http: Vec::new(),
    }
}

impl Scene {
    fn new(plan: Plan) -> Scene {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().to_owned();
        Scene::at(root, &path, plan)
    }

    fn at(root: tempfile::TempDir, path: &Path, plan: Plan) -> Scene {
        let daemon = StandIn::default();
        let journal = Journal::new(Level::Off).0;
        let store = Store::open(path, daemon.mounter(), plan, journal).expect("opens");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Scene { root, daemon, store, runtime: runtime.expect("a runtime") }
    }

    /// The same root with another store, as after a crash.
    fn restart(self, plan: Plan) -> Scene {
        let Scene { root, daemon, store, runtime } = self;
        drop(store);
        let journal = Journal::new(Level::Off).0;
        let store = Store::open(root.path(), daemon.mounter(), plan, journal).expect("opens");
        Scene { root, daemon, store, runtime }
    }

    fn create(&self, kind: Kind, key: &str, parent: &str, labels: Labels) -> Result<Vec<String>> {
        let store = Arc::clone(&self.store);
        let made = store.create(kind, key.to_owned(), parent.to_owned(), labels);
        let mounts = self.runtime.block_on(made)?;
        Ok(mounts
            .into_iter()
            .flat_map(|it| [vec![it.kind, it.source], it.options].concat())
            .collect())
    }

    fn commit(&self, key: &str, name: &str, labels: Labels) -> Result<()> {
        let store = Arc::clone(&self.store);
        self.runtime.block_on(store.commit(name.to_owned(), key.to_owned(), labels))
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.runtime.block_on(Arc::clone(&self.store).remove(key.to_owned()))
    }

    fn start_of(&self, key: &str) -> String {
        let stat = Arc::clone(&self.store).stat(key.to_owned());
        let info = self.runtime.block_on(stat).expect("there");
        info.labels.get(START_LABEL).cloned().unwrap_or_default()
    }

    /// A lazily loadable image of `repo`, as containerd's CRI service makes one.
    fn image(&self, name: &str, repo: &str) {
        let reference = format!("r.example/{repo}:1");
        let labelled = |own: &str| -> Labels {
            let chain = format!("sha256:{name}");
            let pairs = [(labels::CRI_IMAGE_REF, reference.as_str()), (own, "true")];
            let pairs = pairs.into_iter().chain([(labels::SNAPSHOT_REF, chain.as_str())]);
            pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
        };
        let blob = self.create(Kind::Active, "blob", "", labelled(labels::NYDUS_BLOB));
        assert!(matches!(blob, Err(Error::Exists(_))), "{blob:?}");
        let list = Arc::clone(&self.store).list(vec![format!(
            "labels.\"{}\"==sha256:{name},labels.\"{}\"==true",
            labels::SNAPSHOT_REF,
            labels::NYDUS_BLOB
        )]);
        let below = self.runtime.block_on(list).expect("a list").remove(0).name;
        let key = format!("{name}-active");
        let marked = labelled(labels::NYDUS_BOOTSTRAP);
        let mounts = self.create(Kind::Active, &key, &below, marked.clone()).expect("made");
        assert_eq!(
            (mounts[0].as_str(), &mounts[2..]),
            ("bind", &["rw".into(), "rbind".into()][..])
        );
        let mut bytes = vec![0; 4096];
        bytes[1024..1028].copy_from_slice(&0xe0f5_e1e2_u32.to_le_bytes());
        fs::create_dir(Path::new(&mounts[1]).join("image")).unwrap();
        fs::write(Path::new(&mounts[1]).join("image/image.boot"), bytes).unwrap();
        self.commit(&key, name, marked).expect("committed");
    }
}

#[test]
fn an_image_is_mounted_once_and_until_its_last_user_goes() {
    let scene = Scene::new(plan(Policy::Fail, 0));
    scene.image("app", "team/app");
    assert_eq!(scene.daemon.count(), 0, "a pull mounts nothing");
    let first = scene.create(Kind::Active, "one", "app", Labels::new()).unwrap();
    let lower = scene.daemon.mounted.lock().unwrap().first().expect("mounted").clone();
    assert!(first.contains(&format!("lowerdir={}", lower.display())), "{first:?}");
    let view = scene.create(Kind::View, "two", "app", Labels::new()).unwrap();
    assert_eq!(view, ["bind", &lower.display().to_string(), "ro", "rbind"]);
    assert_eq!(scene.start_of("app"), "lazy");
    scene.remove("one").unwrap();
    assert_eq!(scene.daemon.count(), 1);
    scene.remove("two").unwrap();
    assert_eq!(scene.daemon.count(), 0);
    scene.create(Kind::Active, "three", "app", Labels::new()).unwrap();
    assert_eq!(scene.daemon.count(), 1);
    scene.commit("three", "layer", Labels::new()).unwrap();
    assert_eq!(scene.daemon.count(), 0, "a layer is no user");
}

#[test]
fn the_entry_says_where_the_image_comes_from() {
    let scene = Scene::new(Plan { prefetch: true, ..plan(Policy::Fail, 0) });
    scene.image("app", "team/app");
    scene.create(Kind::Active, "one", "app", Labels::new()).unwrap();
    let entry = scene.daemon.entries.lock().unwrap().remove(0);
    assert_eq!(entry["config"]["backend_config"]["host"], "r.example");
    assert_eq!(entry["config"]["backend_config"]["repo"], "team/app");
    assert_eq!(entry["id"], entry["domain_id"]);
    assert_eq!(entry["config"]["prefetch_config"]["enable"], true);
    let body = serde_json::to_vec(&entry).unwrap();
    let spec = crate::daemon::entry::Entry::parse(&body).expect("an entry").into_spec();
    let spec = spec.expect("an image");
    assert!(spec.metadata_path.is_file() && spec.work_dir.is_dir());
}

#[test]
fn a_policy_of_failing_fails_at_once_and_leaves_nothing() {
    let scene = Scene::new(plan(Policy::Wait, 60_000));
    scene.image("app", "fail/app");
    *scene.daemon.failures.lock().unwrap() = 1;
    let failed = scene.create(Kind::Active, "one", "app", Labels::new());
    // Not what the daemon said: containerd would take NotFound for a missing snapshot.
    assert!(
        matches!(&failed, Err(Error::Unavailable { what, .. }) if what.contains("no registry"))
    );
    assert!(scene.start_of("app").starts_with("failed: "), "{}", scene.start_of("app"));
    // Within a moment others share the failure; the key is free again.
    assert!(scene.create(Kind::Active, "one", "app", Labels::new()).is_err());
    assert_eq!(scene.daemon.entries.lock().unwrap().len(), 1);
}

#[test]
fn a_policy_of_waiting_succeeds_when_the_trouble_ends() {
    for (policy, start, told) in [
        (Policy::Wait, "lazy, after waiting", json!({"waited": 1})),
        (Policy::Full, "full: ", json!({"full": 1})),
    ] {
        let scene = Scene::new(plan(policy, 60_000));
        scene.image("app", "team/app");
        *scene.daemon.failures.lock().unwrap() = 2;
        scene.create(Kind::Active, "one", "app", Labels::new()).unwrap();
        assert!(scene.start_of("app").starts_with(start), "{}", scene.start_of("app"));
        scene.create(Kind::Active, "two", "app", Labels::new()).unwrap();
        assert!(scene.start_of("app").starts_with(start), "{}", scene.start_of("app"));
        assert_eq!(*scene.daemon.told.lock().unwrap(), [told], "a second user is no start");
    }
}

#[test]
fn waiting_ends() {
    let scene = Scene::new(plan(Policy::Wait, 300));
    scene.image("app", "team/app");
    *scene.daemon.failures.lock().unwrap() = usize::MAX;
    let failed = scene.create(Kind::Active, "one", "app", Labels::new());
    assert!(matches!(&failed, Err(Error::Unavailable { what, .. }) if what.contains("300 ms")));
    *scene.daemon.failures.lock().unwrap() = 0;
    assert!(matches!(scene.remove("one"), Err(Error::NotFound(_))), "nothing stayed behind");
}

#[test]
fn a_restart_finds_mounts_and_unmounts_what_nobody_uses() {
    let scene = Scene::new(plan(Policy::Fail, 0));
    scene.image("used", "team/used");
    scene.image("left", "team/left");
    scene.create(Kind::Active, "one", "used", Labels::new()).unwrap();
    scene.create(Kind::Active, "two", "left", Labels::new()).unwrap();
    // A crash between forgetting the last user and unmounting.
    let records = scene.root.path().join("records");
    let record = fs::read_dir(&records).unwrap().map(|entry| entry.unwrap().path());
    let two = record.filter(|path| fs::read_to_string(path).unwrap().contains("\"name\":\"two\""));
    two.for_each(|path| fs::remove_file(path).unwrap());
    let scene = scene.restart(plan(Policy::Fail, 0));
    assert_eq!(scene.daemon.count(), 1);
    let before = scene.daemon.entries.lock().unwrap().len();
    let mounts = Arc::clone(&scene.store).mounts("one".to_owned());
    scene.runtime.block_on(mounts).expect("mounted still");
    assert_eq!(scene.daemon.entries.lock().unwrap().len(), before, "it was mounted already");
    // After a reboot nothing is mounted, and asking for the mounts brings them back.
    for place in std::mem::take(&mut *scene.daemon.mounted.lock().unwrap()) {
        fs::remove_dir_all(place.join("etc")).unwrap();
    }
    let mounts = Arc::clone(&scene.store).mounts("one".to_owned());
    scene.runtime.block_on(mounts).expect("mounted again");
    assert_eq!(scene.daemon.count(), 1);
}

#[test]
fn a_daemon_that_does_not_know_of_a_mount_is_asked_to_mount_again() {
    let scene = Scene::new(plan(Policy::Fail, 0));
    scene.image("app", "team/app");
    scene.create(Kind::Active, "one", "app", Labels::new()).unwrap();
    scene.create(Kind::Active, "two", "app", Labels::new()).unwrap();
    assert_eq!(scene.daemon.entries.lock().unwrap().len(), 1);
    *scene.daemon.is_ignorant.lock().unwrap() = true;
    scene.create(Kind::Active, "three", "app", Labels::new()).unwrap();
    assert_eq!(scene.daemon.entries.lock().unwrap().len(), 2);
}

#[test]
fn cleanup_removes_what_removed_snapshots_left() {
    let scene = Scene::new(plan(Policy::Fail, 0));
    scene.image("app", "team/app");
    scene.create(Kind::Active, "one", "app", Labels::new()).unwrap();
    scene.remove("one").unwrap();
    scene.remove("app").unwrap();
    let list = Arc::clone(&scene.store).list(Vec::new());
    let blob = scene.runtime.block_on(list).expect("a list").remove(0).name;
    scene.remove(&blob).unwrap();
    let snapshots = scene.root.path().join("snapshots");
    assert!(fs::read_dir(&snapshots).unwrap().count() > 0);
    scene.runtime.block_on(Arc::clone(&scene.store).cleanup()).unwrap();
    assert_eq!(fs::read_dir(&snapshots).unwrap().count(), 0);
    assert_eq!(scene.daemon.count(), 0);
}

#[test]
fn cleanup_removes_a_tree_of_any_depth() {
    let scene = Scene::new(plan(Policy::Fail, 0));
    let mounts = scene.create(Kind::Active, "one", "", Labels::new()).unwrap();
    let mut at = beneath::Beneath::open(Path::new(&mounts[1])).unwrap().directory(b"").unwrap();
    // A container makes as many as it likes, one below the other.
    for _ in 0..15_000 {
        nix::sys::stat::mkdirat(&at, "d", nix::sys::stat::Mode::S_IRWXU).unwrap();
        at = beneath::open_directory(&at, b"d").unwrap();
    }
    scene.remove("one").unwrap();
    scene.runtime.block_on(Arc::clone(&scene.store).cleanup()).unwrap();
    assert_eq!(fs::read_dir(scene.root.path().join("snapshots")).unwrap().count(), 0);
}

#[test]
fn a_root_behind_a_link_goes_by_the_name_the_kernel_gives_it() {
    let place = tempfile::tempdir().expect("a directory");
    let (real, link) = (place.path().join("real"), place.path().join("link"));
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink("real", &link).unwrap();
    let scene = Scene::at(place, &link, plan(Policy::Fail, 0));
    scene.image("app", "team/app");
    scene.create(Kind::Active, "one", "app", Labels::new()).unwrap();
    let mounted = scene.daemon.mounted.lock().unwrap().first().expect("mounted").clone();
    // Where the daemon finds another name in the mount table, it takes the image for unmounted.
    assert_eq!(mounted, mounted.canonicalize().unwrap());
}

#[test]
fn an_image_that_cannot_be_unmounted_keeps_nobody_else_from_work() {
    let scene = Scene::new(plan(Policy::Fail, 0));
    scene.image("app", "team/app");
    scene.create(Kind::Active, "one", "app", Labels::new()).unwrap();
    *scene.daemon.is_busy.lock().unwrap() = true;
    scene.remove("one").unwrap();
    let scene = scene.restart(plan(Policy::Fail, 0));
    assert_eq!(scene.daemon.count(), 1);
    *scene.daemon.is_busy.lock().unwrap() = false;
    scene.runtime.block_on(Arc::clone(&scene.store).cleanup()).unwrap();
    assert_eq!(scene.daemon.count(), 0, "the next cleanup makes up for it");
}

#[test]
fn the_root_directory_looks_like_the_one_it_covers() {
    use std::os::unix::fs::PermissionsExt;
    let scene = Scene::new(plan(Policy::Fail, 0));
    let mounts = scene.create(Kind::Active, "base-active", "", Labels::new()).unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
    fs::set_permissions(&mounts[1], fs::Permissions::from_mode(0o1711)).unwrap();
    scene.commit("base-active", "base", Labels::new()).unwrap();
    let mounts = scene.create(Kind::Active, "one", "base", Labels::new()).unwrap();
    let upper = mounts.iter().find_map(|it| it.strip_prefix("upperdir=")).expect("an upper");
    assert_eq!(mode(Path::new(upper)), 0o1711);
}

#[test]
fn how_an_image_started_is_shown_and_never_stored() {
    let scene = Scene::new(plan(Policy::Fail, 0));
    scene.image("app", "team/app");
    scene.create(Kind::View, "one", "app", Labels::new()).unwrap();
    let stat = Arc::clone(&scene.store).stat("app".to_owned());
    let info = scene.runtime.block_on(stat).unwrap();
    assert!(info.labels.contains_key(START_LABEL));
    let update = Arc::clone(&scene.store).update(info, Vec::new());
    scene.runtime.block_on(update).unwrap();
    let scene = scene.restart(plan(Policy::Fail, 0));
    assert_eq!(scene.start_of("app"), "");
}
