//! The driver on real overlay mounts, with a stand-in for the daemon that mounts a tmpfs where an
//! image would be. Needs root.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use serde_json::json;

use super::docker_origin::{ImageStore, Settings};
use super::driver::Driver;
use super::driver_images::Service;
use super::overlay;
use super::pack;
use super::start::Starts;
use crate::error::{Error, Result};

/// A home directory, the daemon's stand-in, and a driver that can be started anew.
struct Bench {
    home: tempfile::TempDir,
    daemon: Arc<Daemon>,
    driver: Option<Driver>,
    policy: &'static str,
}

/// What the stand-in was asked and how it answers.
#[derive(Default)]
struct Daemon {
    calls: Mutex<Vec<String>>,
    /// So many of the next mounts fail as if no daemon were there.
    away: AtomicU32,
    /// So many of the next looks at the registry find it down.
    registry_down: AtomicU32,
    /// How starts went.
    told: Mutex<Vec<String>>,
    /// Mounts are refused.
    refuses: AtomicBool,
    /// Unmounts fail.
    stuck: AtomicBool,
}

impl Daemon {
    fn mount(&self, place: &Path) -> Result<()> {
        if self.away.load(Ordering::Relaxed) > 0 {
            self.away.fetch_sub(1, Ordering::Relaxed);
            return Err(Error::unavailable("no daemon listens there"));
        }
        if self.refuses.load(Ordering::Relaxed) {
            return Err(Error::Unsupported("this image is refused".to_owned()));
        }
        self.calls.lock().unwrap().push("mount".to_owned());
        let (flags, none) = (MsFlags::empty(), None::<&str>);
        mount(Some("image"), place, Some("tmpfs"), flags, none).unwrap();
        fs::create_dir(place.join("lazy")).unwrap();
        fs::write(place.join("lazy/file"), "from the image").unwrap();
        Ok(())
    }

    fn reach(&self) -> Result<()> {
        match self.registry_down.load(Ordering::Relaxed) {
            0 => Ok(()),
            _ => {
                self.registry_down.fetch_sub(1, Ordering::Relaxed);
                Err(Error::unavailable("the registry is down"))
            }
        }
    }

    fn unmount(&self, place: &Path) -> Result<()> {
        if self.stuck.load(Ordering::Relaxed) {
            return Err(Error::unavailable("no daemon listens there"));
        }
        self.calls.lock().unwrap().push("unmount".to_owned());
        overlay::unmount(place)
    }

    fn calls(&self) -> String {
        self.calls.lock().unwrap().join(" ")
    }
}

impl Bench {
    fn new() -> Bench {
        Bench::with("wait")
    }

    fn with(policy: &'static str) -> Bench {
        let home = tempfile::Builder::new().prefix("home:").tempdir().unwrap();
        let mut bench = Bench { home, daemon: Arc::default(), driver: None, policy };
        bench.start();
        bench
    }

    fn start(&mut self) {
        self.driver = None;
        let (mounter, unmounter) = (self.daemon.clone(), self.daemon.clone());
        let (asked, teller) = (self.daemon.clone(), self.daemon.clone());
        let service = Service {
            mount: Box::new(move |_, place| mounter.mount(place)),
            unmount: Box::new(move |place| unmounter.unmount(place)),
            reach: Box::new(move |_| asked.reach()),
            starts: Starts::new(Box::new(move |news| {
                teller.told.lock().unwrap().push(news.to_string());
                Ok(())
            })),
            say: Box::new(|_| ()),
            domain: String::new(),
        };
        let place = json!({"registry": "http://127.0.0.1:5000", "repo": "r", "start": self.policy});
        let settings: Settings = serde_json::from_value(json!({"default": place})).unwrap();
        let store = ImageStore::beside(self.home.path(), None, settings);
        self.driver = Some(Driver::open(self.home.path(), store, Arc::new(service)).unwrap());
    }

    fn driver(&self) -> &Driver {
        self.driver.as_ref().unwrap()
    }

    /// An image layer with files.
    fn image(&self, id: &str, parent: Option<&str>, files: &[(&str, &[u8])]) {
        self.driver().create(id, parent, false).unwrap();
        self.driver().apply(id, &tar_of(files)[..]).unwrap();
    }

    /// A lazily loaded image.
    fn lazy(&self, id: &str) {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/lz4-1m/image.boot");
        self.image(id, None, &[("image/image.boot", &fs::read(path).unwrap())]);
    }

    fn container(&self, id: &str, parent: &str) -> PathBuf {
        self.driver().create(id, Some(parent), true).unwrap();
        self.driver().get(id, "").unwrap()
    }

    fn is_mounted(&self, id: &str, name: &str) -> bool {
        overlay::is_mounted(&self.home.path().join("layers").join(id).join(name))
    }

    fn sweep(&self) {
        self.driver().sweep(Duration::ZERO, Duration::ZERO).unwrap();
    }

    fn nothing_is_left(&self) {
        for directory in ["layers", "numbers", "scrap"] {
            let path = self.home.path().join(directory);
            assert_eq!(fs::read_dir(path).unwrap().count(), 0, "{directory}");
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(driver) = &self.driver {
            let _ = driver.cleanup();
        }
    }
}

fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, data) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(data.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

#[test]
fn a_layer_is_seen_as_long_as_somebody_has_it() {
    let bench = Bench::new();
    bench.image("base", None, &[("a", b"1"), ("b", b"1")]);
    bench.image("top", Some("base"), &[("b", b"2"), (".wh.a", b"")]);
    let merged = bench.container("box", "top");
    assert_eq!(fs::read(merged.join("b")).unwrap(), b"2");
    assert!(!merged.join("a").exists());
    fs::write(merged.join("c"), b"3").unwrap();
    assert_eq!(bench.driver().get("box", "").unwrap(), merged);
    bench.driver().put("box").unwrap();
    assert!(bench.is_mounted("box", "merged"));
    bench.driver().put("box").unwrap();
    assert!(!bench.is_mounted("box", "merged"));
    bench.driver().put("box").unwrap();
    let merged = bench.driver().get("box", "").unwrap();
    assert_eq!(fs::read(merged.join("c")).unwrap(), b"3");
    assert_eq!(bench.driver().diff_size("box", Some("top")).unwrap(), 1);
    let mut tar = Vec::new();
    pack::pack(bench.driver().diff("box", Some("base")).unwrap(), &mut tar).unwrap();
    let names: Vec<String> = tar::Archive::new(&tar[..])
        .entries()
        .unwrap()
        .map(|entry| entry.unwrap().path().unwrap().display().to_string())
        .collect();
    assert_eq!(names, [".wh.a", "b", "c"]);
    assert!(matches!(bench.driver().diff("base", Some("box")), Err(Error::Unsupported(_))));
    for id in ["box", "top", "base"] {
        bench.driver().remove(id).unwrap();
    }
    bench.nothing_is_left();
}

#[test]
fn a_restart_finds_what_is_mounted_and_how_often_it_is_used() {
    let mut bench = Bench::new();
    bench.image("base", None, &[("a", b"1")]);
    bench.container("box", "base");
    bench.driver().get("box", "").unwrap();
    bench.start();
    bench.driver().put("box").unwrap();
    assert!(bench.is_mounted("box", "merged"), "it was got twice");
    bench.driver().put("box").unwrap();
    assert!(!bench.is_mounted("box", "merged"));
    bench.driver().get("box", "").unwrap();
    bench.driver().get("box", "").unwrap();
    bench.start();
    // A Docker that was killed never puts back its second one.
    bench.driver().docker_started().unwrap();
    bench.driver().put("box").unwrap();
    assert!(!bench.is_mounted("box", "merged"));
}

#[test]
fn a_lazy_image_is_mounted_once_and_goes_with_its_last_user() {
    let mut bench = Bench::new();
    bench.lazy("image");
    bench.image("top", Some("image"), &[("mine", b"1")]);
    let first = bench.container("one", "top");
    bench.container("two", "top");
    assert_eq!(bench.daemon.calls(), "mount");
    assert_eq!(fs::read(first.join("lazy/file")).unwrap(), b"from the image");
    assert!(!first.join("image").exists(), "the bootstrap is not part of the image");
    bench.start();
    bench.driver().put("one").unwrap();
    bench.sweep();
    assert!(bench.is_mounted("image", "image"), "the other still uses it");
    bench.driver().put("two").unwrap();
    assert!(bench.is_mounted("image", "image"), "it may be wanted again at once");
    bench.driver().get("two", "").unwrap();
    bench.sweep();
    assert!(bench.is_mounted("image", "image"));
    bench.driver().put("two").unwrap();
    bench.sweep();
    assert!(!bench.is_mounted("image", "image"));
    assert_eq!(bench.daemon.calls(), "mount unmount");
    let saved = bench.driver().get("image", "").unwrap();
    assert!(saved.join("image/image.boot").is_file(), "it is saved as its tar was");
}

#[test]
fn changes_are_told_from_the_image_too() {
    let bench = Bench::new();
    bench.lazy("image");
    let merged = bench.container("box", "image");
    fs::write(merged.join("lazy/file"), "changed").unwrap();
    fs::write(merged.join("new"), "").unwrap();
    bench.driver().put("box").unwrap();
    bench.sweep();
    let changes = bench.driver().changes("box", Some("image")).unwrap();
    let lines: Vec<String> = changes
        .iter()
        .map(|change| format!("{} {}", change.kind as u8, String::from_utf8_lossy(&change.path)))
        .collect();
    assert_eq!(lines, ["0 /lazy", "0 /lazy/file", "1 /new"]);
    bench.sweep();
    assert!(!bench.is_mounted("image", "image"));
}

#[test]
fn a_daemon_that_comes_in_time_is_waited_for() {
    let bench = Bench::new();
    bench.lazy("image");
    bench.daemon.away.store(2, Ordering::Relaxed);
    bench.container("box", "image");
    assert_eq!(bench.daemon.calls(), "mount");
    let start = &bench.driver().metadata("box").unwrap()["LazyStart"];
    assert!(start.starts_with("lazy, after waiting: ") && start.contains("no daemon"), "{start}");
    assert_eq!(*bench.daemon.told.lock().unwrap(), [r#"{"waited":1}"#]);
}

#[test]
fn who_wants_to_fail_is_told_at_once() {
    let bench = Bench::with("fail");
    bench.lazy("image");
    bench.daemon.registry_down.store(1, Ordering::Relaxed);
    bench.driver().create("box", Some("image"), true).unwrap();
    let error = bench.driver().get("box", "").unwrap_err();
    assert!(error.to_string().contains("the registry is down"), "{error}");
    assert!(bench.driver().metadata("box").unwrap()["LazyStart"].starts_with("failed: "));
    bench.driver().get("box", "").unwrap();
    assert_eq!(bench.driver().metadata("box").unwrap()["LazyStart"], "lazy");
    assert_eq!(bench.daemon.told.lock().unwrap().join(""), r#"{"failed":1}{"lazy":1}"#);
    let starts = bench.driver().status().pop().unwrap();
    assert_eq!(starts[1], "1 lazy, 0 waited, 0 full, 1 failed");
}

#[test]
fn after_a_failure_all_of_an_image_is_brought_if_that_is_wanted() {
    let bench = Bench::with("full");
    bench.lazy("image");
    bench.container("one", "image");
    assert_eq!(bench.driver().metadata("one").unwrap()["LazyStart"], "lazy");
    bench.driver().remove("one").unwrap();
    bench.sweep();
    bench.daemon.registry_down.store(2, Ordering::Relaxed);
    bench.container("two", "image");
    let start = &bench.driver().metadata("two").unwrap()["LazyStart"];
    assert_eq!(start, "full: the registry is down");
    assert_eq!(bench.daemon.told.lock().unwrap().join(""), r#"{"lazy":1}{"full":1}"#);
}

#[test]
fn a_failed_start_leaves_nothing() {
    let bench = Bench::new();
    bench.lazy("image");
    bench.daemon.refuses.store(true, Ordering::Relaxed);
    bench.driver().create("box-init", Some("image"), true).unwrap();
    let error = bench.driver().get("box-init", "").unwrap_err();
    assert!(error.to_string().contains("lazily: this image is refused"), "{error}");
    assert!(!bench.driver().exists("box-init"), "Docker would not remove it");
    bench.driver().create("box", Some("image"), true).unwrap();
    assert!(bench.driver().get("box", "").is_err());
    assert!(bench.driver().exists("box"), "Docker will try again");
    bench.driver().remove("box").unwrap();
    bench.driver().remove("image").unwrap();
    bench.nothing_is_left();
}

#[test]
fn what_the_daemon_cannot_unmount_is_unmounted_all_the_same() {
    let bench = Bench::new();
    bench.lazy("image");
    bench.container("box", "image");
    bench.daemon.stuck.store(true, Ordering::Relaxed);
    bench.driver().remove("box").unwrap();
    bench.sweep();
    assert!(!bench.is_mounted("image", "image"));
    bench.container("box", "image");
    bench.driver().cleanup().unwrap();
    assert!(!bench.is_mounted("image", "image") && !bench.is_mounted("box", "merged"));
}

#[test]
fn nothing_is_unpacked_into_a_layer_in_use() {
    let bench = Bench::new();
    bench.image("base", None, &[("a", b"1")]);
    bench.container("box", "base");
    let error = bench.driver().apply("box", &tar_of(&[("a", b"1")])[..]).unwrap_err();
    assert!(matches!(error, Error::Busy(_)));
}

#[test]
fn a_layer_that_hides_everything_ends_the_stack() {
    let bench = Bench::new();
    bench.image("base", None, &[("below", b"1")]);
    bench.image("top", Some("base"), &[(".wh..wh..opq", b""), ("above", b"1")]);
    let merged = bench.container("box", "top");
    assert!(merged.join("above").exists() && !merged.join("below").exists());
    let mut tar = Vec::new();
    pack::pack(bench.driver().diff("top", Some("base")).unwrap(), &mut tar).unwrap();
    assert!(tar.starts_with(b".wh..wh..opq\0"));
}

#[test]
fn a_hundred_and_twenty_layers_are_stacked() {
    let bench = Bench::new();
    bench.image("layer-0", None, &[("file-0", b"0")]);
    for number in 1..120 {
        let (id, parent) = (format!("layer-{number}"), format!("layer-{}", number - 1));
        bench.image(&id, Some(&parent), &[(&format!("file-{number}"), b"x")]);
    }
    let merged = bench.container("box", "layer-119");
    assert_eq!(fs::read_dir(&merged).unwrap().count(), 120);
}

#[test]
fn a_layer_torn_by_a_crash_is_removed_with_its_mounts() {
    let mut bench = Bench::new();
    bench.lazy("image");
    bench.container("box", "image");
    for id in ["box", "image"] {
        let record = bench.home.path().join("layers").join(id).join("layer.json");
        fs::File::create(record).unwrap().write_all(b"{").unwrap();
    }
    bench.start();
    assert!(bench.driver().exists("box"));
    assert!(matches!(bench.driver().get("box", ""), Err(Error::Malformed(_))));
    assert!(bench.driver().metadata("box").is_err());
    bench.driver().remove("box").unwrap();
    bench.driver().remove("image").unwrap();
    bench.nothing_is_left();
}

#[test]
fn a_layer_whose_use_cannot_be_noted_is_not_left_mounted() {
    let bench = Bench::new();
    bench.lazy("base");
    bench.driver().create("c", Some("base"), true).unwrap();
    // As a full disk would.
    let obstacle = bench.home.path().join("layers/c/uses.new");
    fs::create_dir(&obstacle).unwrap();
    assert!(bench.driver().get("c", "").is_err());
    assert!(!bench.is_mounted("c", "merged"), "Docker will not put back what it did not get");
    fs::remove_dir(&obstacle).unwrap();
    bench.driver().get("c", "").unwrap();
    fs::create_dir(&obstacle).unwrap();
    assert!(bench.driver().put("c").is_err());
    assert!(!bench.is_mounted("c", "merged"));
    bench.sweep();
    assert!(!bench.is_mounted("base", "image"), "nobody uses it");
}
