//! What an image's start needed is known at its next start: the daemon notes, keeps, fetches ahead
//! and tells, on the running kernel.
//!
//! Needs root and Linux 6.14 or later with file-backed EROFS.

mod support;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use support::built::Built;
use support::daemon::{Daemon, forget_pages};
use support::registry::Registry;

const FILES: usize = 24;
const FILE_BYTES: usize = 1 << 20;

/// An image in a registry, and a daemon.
struct Scene {
    image: Built,
    registry: Registry,
    daemon: Daemon,
}

impl Scene {
    fn new(seed: u64, options: &[&str]) -> Scene {
        let image = Built::new(FILES, FILE_BYTES, seed);
        let registry = image.registry();
        Scene { image, registry, daemon: Daemon::start(options) }
    }

    /// Mounts the image; the registry's journal begins.
    fn mount(&self) -> PathBuf {
        forget_pages();
        self.registry.forget();
        let url = format!("http://{}", self.registry.address());
        self.image.mount_from(&self.daemon, "image", &["--registry", &url, "--repo", "built"])
    }

    /// Unmounts it, and gives its bytes back.
    fn leave(&self, place: &Path) {
        self.daemon.unmount(place);
        self.daemon.wait_until("nothing is cached", |daemon| {
            daemon.run(&["gc"]).status.success() && daemon.cached_bytes() == 0
        });
    }

    /// Reads files whole.
    fn read(&self, place: &Path, numbers: &[usize]) {
        for &number in numbers {
            let (name, bytes) = &self.image.files[number];
            assert!(&std::fs::read(place.join(name)).expect("a file") == bytes, "{number}");
        }
    }

    /// The first byte of each file.
    fn touch(&self, place: &Path, numbers: &[usize]) {
        for &number in numbers {
            let (name, bytes) = &self.image.files[number];
            let mut byte = [0];
            let mut file = std::fs::File::open(place.join(name)).expect("a file");
            file.read_exact(&mut byte).expect("a byte");
            assert_eq!(byte[0], bytes[0], "{number}");
        }
    }

    /// The files that were fetched of, in the order of the first requests.
    fn fetched(&self) -> Vec<usize> {
        let mut files = Vec::new();
        for read in self.registry.blob_reads() {
            // Dialling ahead asks for one byte.
            if read["bytes"].as_u64() <= Some(1) {
                continue;
            }
            let range = read["range"].as_str().expect("a range").strip_prefix("bytes=");
            let (first, last) = range.and_then(|it| it.split_once('-')).expect("first and last");
            let file = |at: &str| at.parse::<usize>().expect("a number") / FILE_BYTES;
            files.extend(file(first)..=file(last));
        }
        let mut seen = std::collections::HashSet::new();
        files.retain(|file| seen.insert(*file));
        files
    }

    fn id(&self) -> String {
        let images = self.daemon.run(&["images", "--json"]);
        let images: Value = serde_json::from_slice(&images.stdout).expect("JSON");
        images[0]["id"].as_str().expect("an id").to_owned()
    }

    /// What `sluice trace` says.
    fn trace(&self) -> (String, Vec<Value>) {
        let output = self.daemon.run(&["trace", &self.id()]);
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).expect("text");
        let lines = text.lines().map(|line| serde_json::from_str(line).expect("JSON"));
        (text.clone(), lines.collect())
    }

    fn kept(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.daemon.path("state/starts")).into_iter().flatten();
        files.map(|file| file.expect("a file").path()).collect()
    }
}

fn sorted(mut files: Vec<usize>) -> Vec<usize> {
    files.sort_unstable();
    files
}

#[test]
fn second_start_finds_what_the_first_needed() {
    let scene = Scene::new(1, &[]);
    let place = scene.mount();
    scene.touch(&place, &[17, 3, 9]);
    let needed = scene.daemon.cached_bytes();
    scene.leave(&place);
    assert_eq!(scene.kept().len(), 1);

    let place = scene.mount();
    scene.daemon.wait_until("it comes by itself", |daemon| daemon.cached_bytes() >= needed);
    assert_eq!(sorted(scene.fetched()), [3, 9, 17]);
    scene.registry.forget();
    scene.touch(&place, &[17, 3, 9]);
    assert_eq!(scene.registry.blob_reads().len(), 0, "it is there");
    // What this start needs beside it the third one finds as well.
    scene.touch(&place, &[5]);
    scene.leave(&place);

    let place = scene.mount();
    scene.daemon.wait_until("more comes by itself", |daemon| daemon.cached_bytes() > needed);
    scene.touch(&place, &[5, 17, 3, 9]);
    assert_eq!(sorted(scene.fetched()), [3, 5, 9, 17]);
    scene.image.assert_same(&place);
    scene.leave(&place);
    assert_eq!(scene.kept().len(), 1);
    assert_eq!(scene.daemon.count("reads_failed"), 0);
}

#[test]
fn known_start_is_an_image_optimizers_trace() {
    let scene = Scene::new(2, &[]);
    let place = scene.mount();
    scene.touch(&place, &[20, 4]);
    let (text, lines) = scene.trace();
    let path = |line: &Value| line["path"].as_str().expect("a path").to_owned();
    let mut paths: Vec<String> = lines.iter().map(path).collect();
    paths.dedup();
    assert_eq!(paths, ["/file-0020", "/file-0004"]);
    assert!(lines.iter().all(|line| line["t_ms"].as_f64().is_some_and(|at| at < 30_000.0)));
    // The same is told by a later daemon, of an image that has not been read since.
    scene.leave(&place);
    scene.mount();
    assert_eq!(scene.trace().0, text);
    let (trace, image) = (scene.daemon.path("start.jsonl"), scene.image.folder());
    std::fs::write(&trace, &text).expect("room");
    let optimized = Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(["optimize", "--json", "--trace"])
        .args([&trace, &image])
        .output()
        .expect("the program is built");
    assert!(optimized.status.success(), "{}", String::from_utf8_lossy(&optimized.stderr));
    let report: Value = serde_json::from_slice(&optimized.stdout).expect("JSON");
    assert_eq!((&report["files"], &report["missed"]), (&2.into(), &0.into()), "{report}");
    let unknown = scene.daemon.run(&["trace", "nobody"]);
    let said = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(!unknown.status.success() && said.contains("mount it first"), "{said}");
}

#[test]
fn image_that_was_read_before_a_restart_is_not_in_a_start() {
    let mut scene = Scene::new(3, &[]);
    let place = scene.mount();
    scene.touch(&place, &[1]);
    scene.leave(&place);
    let kept = std::fs::read(&scene.kept()[0]).expect("a kept start");

    let place = scene.mount();
    scene.touch(&place, &[1]);
    scene.daemon.kill();
    scene.registry.forget();
    scene.daemon.start_again();
    scene.touch(&place, &[1, 8]);
    assert_eq!(scene.fetched(), [8]);
    scene.daemon.stop();
    assert_eq!(std::fs::read(&scene.kept()[0]).expect("a kept start"), kept);
}

#[test]
fn daemon_that_stops_keeps_starts_that_go_on() {
    let mut scene = Scene::new(4, &[]);
    let place = scene.mount();
    scene.touch(&place, &[2, 22]);
    assert_eq!(scene.kept().len(), 0);
    scene.daemon.stop();
    assert_eq!(scene.kept().len(), 1);
}

#[test]
fn kept_start_that_makes_no_sense_costs_nothing_but_itself() {
    let scene = Scene::new(5, &[]);
    let place = scene.mount();
    scene.touch(&place, &[6]);
    scene.leave(&place);
    let kept = scene.kept().remove(0);
    std::fs::write(&kept, "{\"blob\":0,\"offset\":0").expect("ours");
    let place = scene.mount();
    scene.touch(&place, &[7]);
    assert_eq!(scene.fetched(), [7]);
    assert!(scene.daemon.log().contains("a kept start is passed over"), "{}", scene.daemon.log());
    scene.leave(&place);

    // It was written anew. Now there is something in its place that cannot be.
    let place = scene.mount();
    scene.daemon.wait_until("it comes by itself", |daemon| daemon.cached_bytes() > 0);
    assert_eq!(scene.fetched(), [7]);
    std::fs::remove_file(&kept).expect("ours");
    std::fs::create_dir(&kept).expect("room");
    scene.read(&place, &[10]);
    scene.leave(&place);
    assert!(scene.daemon.log().contains("cannot write"), "{}", scene.daemon.log());
    let place = scene.mount();
    scene.read(&place, &[11]);
    scene.leave(&place);
}

#[test]
fn nothing_is_learned_by_a_daemon_that_shall_not() {
    let scene = Scene::new(6, &["--learn-starts", "false"]);
    let place = scene.mount();
    scene.touch(&place, &[12]);
    scene.leave(&place);
    let place = scene.mount();
    scene.touch(&place, &[13]);
    assert_eq!(scene.fetched(), [13]);
    assert!(!scene.daemon.path("state/starts").exists());
    let told = scene.daemon.run(&["trace", &scene.id()]);
    assert!(!told.status.success() && told.stdout.is_empty(), "nothing was noted");
    let said = String::from_utf8_lossy(&told.stderr);
    assert!(said.contains("--learn-starts"), "{said}");
}
