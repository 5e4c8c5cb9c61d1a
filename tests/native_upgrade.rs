//! The daemon behind the fanotify door is replaced while readers read what is not there yet and
//! compare every byte: nobody may get an error, and how long anybody waits is printed.
//!
//! `UPGRADES=50 cargo test --test native_upgrade -- --nocapture` replaces it more often.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;
use support::built::Built;
use support::daemon::{Daemon, forget_pages};
use support::registry::Registry;
use support::supervisor::Supervisor;

const UPGRADES: usize = 4;
const READERS: usize = 8;
/// A chunk, and a segment: each is fetched for itself.
const BLOCK: usize = 64 << 10;
/// Reads between two replacements.
const READS_BETWEEN: usize = 40;
/// An image long enough to stay cold: what is read meanwhile, twice over.
const MIB_PER_UPGRADE: usize = 8;

/// Readers of one image, each block once and then again.
struct Load<'a> {
    image: &'a Built,
    place: &'a Path,
    next: AtomicUsize,
    is_over: AtomicBool,
    reads: AtomicUsize,
    errors: AtomicUsize,
    wrong: AtomicUsize,
    waits: Mutex<Vec<Duration>>,
}

impl Load<'_> {
    fn over<'a>(image: &'a Built, place: &'a Path) -> Load<'a> {
        Load {
            image,
            place,
            next: AtomicUsize::new(0),
            is_over: AtomicBool::new(false),
            reads: AtomicUsize::new(0),
            errors: AtomicUsize::new(0),
            wrong: AtomicUsize::new(0),
            waits: Mutex::default(),
        }
    }

    fn read(&self) {
        let blocks_per_file = self.image.files[0].1.len() / BLOCK;
        let blocks = blocks_per_file * self.image.files.len();
        let mut waits = Vec::new();
        let mut found = vec![0; BLOCK];
        while !self.is_over.load(Ordering::Relaxed) {
            let turn = self.next.fetch_add(1, Ordering::Relaxed);
            if turn % blocks == blocks - 1 {
                forget_pages();
            }
            // A prime step: every block comes, and none beside the one before.
            let block = (turn * 7919) % blocks;
            let (path, bytes) = &self.image.files[block / blocks_per_file];
            let at = block % blocks_per_file * BLOCK;
            let since = Instant::now();
            let opened = File::open(self.place.join(path));
            let read = opened.and_then(|file| file.read_exact_at(&mut found, at as u64));
            waits.push(since.elapsed());
            match read {
                Ok(()) if found == bytes[at..at + BLOCK] => {}
                Ok(()) => drop(self.wrong.fetch_add(1, Ordering::Relaxed)),
                Err(error) => {
                    eprintln!("{}: {error}", path.display());
                    self.errors.fetch_add(1, Ordering::Relaxed);
                }
            }
            self.reads.fetch_add(1, Ordering::Relaxed);
        }
        self.waits.lock().unwrap_or_else(PoisonError::into_inner).extend(waits);
    }

    /// Until so many more reads have ended.
    fn wait_for_reads(&self, more: usize) {
        let enough = self.reads.load(Ordering::Relaxed) + more;
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.reads.load(Ordering::Relaxed) < enough {
            assert!(Instant::now() < deadline, "readers wait for ever");
            std::thread::sleep(Duration::from_millis(1)); // tidy: polling
        }
    }
}

fn upgrades() -> usize {
    std::env::var("UPGRADES").ok().and_then(|count| count.parse().ok()).unwrap_or(UPGRADES)
}

/// An image in a registry that answers after so many milliseconds.
fn cold_image(latency_ms: u32) -> (Built, Registry) {
    let image = Built::new(upgrades() * MIB_PER_UPGRADE, 1 << 20, 7);
    let registry = image.registry();
    registry.fault(json!([{"blob": "", "effect": {"latency_ms": latency_ms}}]));
    (image, registry)
}

/// Replaces the daemon again and again, and says what readers saw.
fn under_load(name: &str, latency_ms: u32, options: &[&str], replace: impl Fn(&mut Daemon)) {
    let (image, registry) = cold_image(latency_ms);
    let mut daemon = Daemon::start(&[&["-l", "warn"], options].concat());
    let url = format!("http://{}", registry.address());
    let place = image.mount_from(&daemon, "image", &["--registry", &url, "--repo", "built"]);
    let load = Load::over(&image, &place);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..READERS).map(|_| scope.spawn(|| load.read())).collect();
        let replaced = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            for _ in 0..upgrades() {
                load.wait_for_reads(READS_BETWEEN);
                replace(&mut daemon);
            }
            load.wait_for_reads(READS_BETWEEN);
        }));
        load.is_over.store(true, Ordering::Relaxed);
        if replaced.is_err() {
            // Whoever still waits gets an error with the end of the group.
            daemon.kill_all();
        }
        readers.into_iter().for_each(|reader| reader.join().expect("it compares"));
        replaced.expect("it is replaced");
    });
    let (reads, errors, wrong) = (&load.reads, &load.errors, &load.wrong);
    let mut waits = load.waits.into_inner().expect("whole");
    waits.sort_unstable();
    let at = |part: f64| waits[((waits.len() - 1) as f64 * part) as usize].as_millis();
    eprintln!(
        "{name}: {} upgrades, {reads:?} reads, {errors:?} errors, {wrong:?} wrong; \
         p50 {} ms, p99 {} ms, longest {} ms",
        upgrades(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
    assert_eq!((errors.load(Ordering::Relaxed), wrong.load(Ordering::Relaxed)), (0, 0));
    let log = daemon.log();
    assert_eq!(daemon.count("reads_failed"), 0, "{log}");
    assert!(!log.contains("panicked"), "{log}");
}

#[test]
fn a_daemon_that_is_killed_and_started_again_costs_no_reader_an_error() {
    under_load("killed", 20, &[], |daemon| {
        daemon.kill();
        daemon.start_again();
    });
}

#[test]
fn a_daemon_that_is_stopped_and_started_again_costs_no_reader_an_error() {
    under_load("stopped", 20, &[], |daemon| {
        daemon.stop();
        daemon.start_again();
    });
}

/// Longer than a daemon that stops waits for what is under way.
#[test]
fn readers_whom_a_stopping_daemon_cannot_serve_are_left_to_the_next() {
    under_load("stopped, slow registry", 900, &[], |daemon| {
        daemon.stop();
        daemon.start_again();
    });
}

#[test]
fn a_supervisor_upgrades_a_daemon_and_no_reader_gets_an_error() {
    let supervisor = Supervisor::new();
    let path = supervisor.path();
    let options = ["--supervisor", path.to_str().expect("text"), "--id", "test"];
    under_load("upgraded", 20, &options, |daemon| supervisor.upgrade(daemon));
    under_load("upgraded, slow registry", 900, &options, |daemon| supervisor.upgrade(daemon));
}

#[test]
fn a_supervisor_recovers_a_killed_daemon_and_no_reader_gets_an_error() {
    let supervisor = Supervisor::new();
    let path = supervisor.path();
    let options = ["--supervisor", path.to_str().expect("text"), "--id", "test"];
    under_load("recovered", 20, &options, |daemon| supervisor.recover(daemon));
}
