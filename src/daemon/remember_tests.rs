//! What is on disk survives restarts, and nothing on disk ends a daemon.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::comeback::Queue;
use super::control::{ControlPlane, Hooks};
use super::control_tests::{control, entry, fixture};
use super::entry::Entry;
use super::remember::{Remembered, RememberedMount};
use super::succession::{Outcome, Restoration, bring_back};
use crate::error::Error;

/// A node: a state directory that outlives its daemons.
struct Node {
    directory: tempfile::TempDir,
}

/// One daemon of it.
struct Daemon {
    control: Arc<ControlPlane>,
    remembered: Arc<Remembered>,
    flaws: Vec<Error>,
}

impl Node {
    fn new() -> Node {
        Node { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A daemon's start, up to the moment when all has come back.
    fn start(&self) -> Daemon {
        let (remembered, flaws) = Remembered::open(self.directory.path()).unwrap();
        let remembered = Arc::new(remembered);
        let catalog = Arc::<crate::blob::catalog::Catalog>::default();
        let (writing, forgetting) = (Arc::clone(&remembered), Arc::clone(&remembered));
        let (there, gone) = (Arc::clone(&catalog), Arc::clone(&catalog));
        let hooks = Hooks {
            registered: Box::new(move |image, body| {
                let is_there = || there.object(&image.domain_id, &image.id).is_some();
                writing.remember(image, body, is_there)
            }),
            forgotten: Box::new(move |domain, id| {
                forgetting.forget(domain, id, |d, i| gone.object(d, i).is_none()).unwrap();
            }),
            ..Hooks::idle()
        };
        let control = Arc::new(ControlPlane { catalog, ..control(hooks) });
        Restoration::begin(&control, &remembered).finish();
        Daemon { control, remembered, flaws }
    }

    /// A private copy of a test image's bootstrap, and its entry.
    fn entry(&self, domain: &str, id: &str) -> Value {
        let bootstrap = self.path(&format!("{id}.boot"));
        std::fs::copy(fixture("zran"), &bootstrap).unwrap();
        entry(domain, id, &bootstrap, self.directory.path())
    }

    fn files(&self, below: &str) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.path(below)) else { return Vec::new() };
        let files = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_file());
        files.collect()
    }
}

impl Daemon {
    fn put(&self, entry: &Value) -> crate::error::Result<()> {
        let body = entry.to_string().into_bytes();
        self.control.register(Entry::parse(&body).unwrap(), &body).map(drop)
    }

    fn delete(&self, domain: &str, id: Option<&str>) {
        match id {
            Some(id) => self.control.catalog.unregister(domain, id).unwrap(),
            None => self.control.catalog.unregister_domain(domain),
        }
        (self.control.hooks.forgotten)(domain, id);
    }

    fn images(&self) -> Vec<String> {
        let images = self.control.catalog.images();
        images.iter().map(|image| format!("{}/{}", image.domain_id, image.id)).collect()
    }
}

#[test]
fn what_was_registered_is_there_after_a_restart_and_what_was_removed_is_not() {
    let node = Node::new();
    let daemon = node.start();
    for (domain, id) in [("a", "x"), ("a", "y"), ("b", "z"), ("", "alone")] {
        daemon.put(&node.entry(domain, id)).unwrap();
    }
    daemon.delete("a", Some("x"));
    daemon.delete("b", None);
    drop(daemon);
    let daemon = node.start();
    assert_eq!(daemon.images(), ["a/y", "alone/alone"]);
    assert_eq!(node.files("registered").len(), 2);
    for file in node.files("registered") {
        assert_eq!(file.metadata().unwrap().permissions().mode() & 0o7777, 0o600);
    }
    daemon.delete("a", None);
    daemon.delete("alone", Some("alone"));
    assert!(node.files("registered").is_empty());
    assert!(node.start().images().is_empty());
}

#[test]
fn a_client_may_register_everything_again_as_if_there_had_been_no_restart() {
    let node = Node::new();
    let first = node.entry("a", "x");
    node.start().put(&first).unwrap();
    let daemon = node.start();
    let known = daemon.control.catalog.images()[0].clone();
    daemon.put(&first).unwrap();
    assert!(Arc::ptr_eq(&known, &daemon.control.catalog.images()[0]), "nothing has changed");
    let twice = daemon.put(&first);
    assert!(matches!(twice, Err(Error::Exists(_))), "{twice:?}: as without a restart");

    let daemon = node.start();
    let mut other = first.clone();
    other["config"]["backend_config"]["host"] = "127.0.0.2:5000".into();
    daemon.put(&other).unwrap();
    assert!(!Arc::ptr_eq(&known, &daemon.control.catalog.images()[0]));
    assert_eq!(node.start().remembered.find("a", "x").unwrap().entry, other);
}

#[test]
fn an_image_whose_bootstrap_changed_after_the_restart_is_registered_anew() {
    let node = Node::new();
    let entry = node.entry("a", "x");
    node.start().put(&entry).unwrap();
    let daemon = node.start();
    std::fs::copy(fixture("lz4-1m"), node.path("x.boot")).unwrap();
    daemon.put(&entry).unwrap();
    daemon.control.catalog.images()[0].read_bootstrap().unwrap();
    assert_eq!(node.start().images(), ["a/x"]);
}

#[test]
fn bootstraps_that_are_gone_or_changed_are_said_and_put_aside() {
    let node = Node::new();
    let daemon = node.start();
    for id in ["gone", "changed", "damaged", "good"] {
        daemon.put(&node.entry("d", id)).unwrap();
    }
    std::fs::remove_file(node.path("gone.boot")).unwrap();
    std::fs::copy(fixture("lz4-1m"), node.path("changed.boot")).unwrap();
    std::fs::write(node.path("damaged.boot"), "no image").unwrap();
    let daemon = node.start();
    assert_eq!(daemon.images(), ["d/good"]);
    assert_eq!(daemon.control.restored.document(), json!({"images": 1, "skipped": 3}));
    let said = daemon.control.journal.errors().texts.into_iter().collect::<Vec<_>>().join("\n");
    for id in ["d/gone", "d/changed", "d/damaged"] {
        assert!(
            said.contains(&format!("image {id} does not come back, it is put aside")),
            "{said}"
        );
    }
    assert_eq!((node.files("registered").len(), node.files("registered/aside").len()), (1, 3));
    // Said once; and the client may register it again at any time.
    let daemon = node.start();
    assert_eq!(daemon.control.journal.errors().texts.len(), 0);
    daemon.put(&node.entry("d", "gone")).unwrap();
    assert_eq!(node.start().images(), ["d/gone", "d/good"]);
}

#[test]
fn no_file_ends_a_daemon() {
    let node = Node::new();
    let daemon = node.start();
    daemon.put(&node.entry("d", "i")).unwrap();
    let directory = node.path("registered");
    let good = std::fs::read(&node.files("registered")[0]).unwrap();
    let name = |index: usize| directory.join(format!("{index}.json"));
    let bad: [&[u8]; 7] =
        [b"", b"{", b"[]", b"\xff\xfe", b"{\"version\":1}", b"{\"version\":1,\"id\":7}", &good];
    for (index, bytes) in bad.iter().enumerate() {
        std::fs::write(name(index), bytes).unwrap();
    }
    std::fs::write(name(10), b"{\"version\":2,\"new\":true}").unwrap();
    std::fs::write(name(11), vec![b' '; 2 << 20]).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", name(12)).unwrap();
    nix::unistd::mkfifo(&name(13), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::create_dir(name(14)).unwrap();
    std::fs::write(directory.join("unfinished.999999999"), "x").unwrap();
    let daemon = node.start();
    assert_eq!(daemon.images(), ["d/i"]);
    assert_eq!(daemon.flaws.len(), 12, "{:?}", daemon.flaws);
    assert!(!directory.join("unfinished.999999999").exists());
    // Another version's file is left to that version.
    assert!(name(10).exists());
    let daemon = node.start();
    assert_eq!(daemon.images(), ["d/i"]);
    assert_eq!(daemon.flaws.len(), 1, "{:?}", daemon.flaws);
}

#[test]
fn an_entry_under_a_false_name_does_not_come_back() {
    let node = Node::new();
    node.start().put(&node.entry("d", "i")).unwrap();
    let file = &node.files("registered")[0];
    let mut record: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    record["entry"]["id"] = "other".into();
    std::fs::write(file, record.to_string()).unwrap();
    assert!(node.start().images().is_empty());
    assert_eq!(node.files("registered/aside").len(), 1);
}

#[test]
fn relative_paths_mean_what_they_meant_when_they_were_registered() {
    let node = Node::new();
    let daemon = node.start();
    let mut entry = node.entry("d", "i");
    let here = std::env::current_dir().unwrap();
    let up = "../".repeat(here.components().count() - 1);
    let relative =
        format!("{up}{}", node.path("i.boot").display().to_string().trim_start_matches('/'));
    entry["config"]["metadata_path"] = relative.into();
    daemon.put(&entry).unwrap();
    let record = daemon.remembered.find("d", "i").unwrap();
    assert_eq!(record.directory, here);
    assert_eq!(node.start().images(), ["d/i"]);
}

#[test]
fn mounts_are_remembered_with_their_image() {
    let node = Node::new();
    let daemon = node.start();
    daemon.put(&node.entry("d", "i")).unwrap();
    let (key, remembered) = (("d".to_owned(), "i".to_owned()), &daemon.remembered);
    let mount = |at: &str| RememberedMount {
        namespace: 1,
        mountpoint: at.into(),
        door: "fanotify".to_owned(),
    };
    remembered.set_mounts(&key, vec![mount("/a"), mount("/b")]).unwrap();
    let (again, flaws) = Remembered::open(node.directory.path()).unwrap();
    assert!(flaws.is_empty());
    let record = again.find("d", "i").unwrap();
    assert_eq!(record.mounts, [mount("/a"), mount("/b")]);
    assert!(again.is_any_mounted());
    remembered.set_mounts(&key, Vec::new()).unwrap();
    assert!(!node.start().remembered.is_any_mounted());
    // Unregistered meanwhile: nothing comes back by this.
    daemon.delete("d", None);
    remembered.set_mounts(&key, vec![mount("/a")]).unwrap();
    assert!(node.start().images().is_empty());
}

#[test]
fn a_mounted_image_that_fails_once_is_tried_again_and_one_that_is_not_waits_for_the_next_start() {
    let node = Node::new();
    let daemon = node.start();
    let key = |id: &str| ("d".to_owned(), id.to_owned());
    for id in ["mounted", "other"] {
        daemon.put(&node.entry("d", id)).unwrap();
        // What cannot be opened may be there the next time: this is no file.
        std::fs::remove_file(node.path(&format!("{id}.boot"))).unwrap();
        drop(std::os::unix::net::UnixListener::bind(node.path(&format!("{id}.boot"))).unwrap());
        daemon.control.catalog.unregister("d", id).unwrap();
    }
    let mount =
        RememberedMount { namespace: 1, mountpoint: "/a".into(), door: "fanotify".to_owned() };
    daemon.remembered.set_mounts(&key("mounted"), vec![mount]).unwrap();
    let queue = Queue::of(daemon.remembered.records());
    let restored = || daemon.control.restored.document();
    let next = || queue.next(|| Some("d".to_owned())).unwrap();
    let try_next = || bring_back(&daemon.control, &daemon.remembered, &queue, next());
    assert_eq!([try_next(), try_next()], [Outcome::Later, Outcome::Settled]);
    assert_eq!(restored(), json!({"images": 0, "skipped": 1}));
    std::fs::remove_file(node.path("mounted.boot")).unwrap();
    node.entry("d", "mounted");
    assert_eq!(try_next(), Outcome::Settled);
    assert_eq!(restored(), json!({"images": 1, "skipped": 1}));
    assert!(queue.next(|| None).is_none());
}

#[test]
fn no_image_is_tried_for_ever_or_after_the_end() {
    let node = Node::new();
    let daemon = node.start();
    daemon.put(&node.entry("d", "i")).unwrap();
    let queue = Queue::of(daemon.remembered.records());
    assert!(queue.again(queue.next(|| None).unwrap()));
    let comeback = queue.next(|| None).unwrap();
    queue.close();
    assert!(!queue.again(comeback) && queue.next(|| None).is_none());
}

#[test]
fn crossing_calls_leave_the_truth_on_disk() {
    let node = Arc::new(Node::new());
    let daemon = node.start();
    let entries: Vec<Value> = (0..2).map(|id| node.entry("d", &format!("i{id}"))).collect();
    let turn = Mutex::new(());
    std::thread::scope(|scope| {
        for number in 0..4 {
            let (daemon, entry, turn) = (&daemon, &entries[number % 2], &turn);
            scope.spawn(move || {
                for _ in 0..40 {
                    let _ = daemon.put(entry);
                    drop(turn.lock());
                    let id = entry["id"].as_str().unwrap();
                    let _ = daemon.control.catalog.unregister("d", id);
                    (daemon.control.hooks.forgotten)("d", Some(id));
                }
            });
        }
    });
    daemon.put(&entries[0]).unwrap();
    assert_eq!(daemon.images(), node.start().images());
    assert_eq!(node.files("registered").len(), 1);
}

#[test]
fn a_registration_that_cannot_be_remembered_fails_and_is_taken_back() {
    let node = Node::new();
    let daemon = node.start();
    let entry = node.entry("d", "i");
    std::fs::remove_dir_all(node.path("registered")).unwrap();
    let error = daemon.put(&entry).unwrap_err();
    assert_eq!(error.errno(), libc::ENOENT, "{error}");
    assert!(daemon.images().is_empty());
}
