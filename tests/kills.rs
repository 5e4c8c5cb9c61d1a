//! Never a wrong byte, whoever is killed when: the daemon under readers who compare every byte,
//! with and without what is to outlive it; and the control, which shows that such a test can fail.
//!
//! `KILLS=1000 cargo test --test kills` kills longer than the usual 200 times.

mod support;

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use sluice::image::Bootstrap;
use sluice::upcall::fanotify::Answer;
use sluice::upcall::mounting;
use support::daemon::{Daemon, forget_pages};
use support::listener::Listener;
use support::registry::Registry;
use support::segments::Cache;
use support::tree::{files, source};
use support::truth::Truth;

const READERS: usize = 8;
const KILLS: usize = 200;

type Files = Vec<(PathBuf, Vec<u8>)>;

/// Who is killed.
#[derive(Clone, Copy, PartialEq)]
enum Victims {
    /// The daemon; its keeper and its witness live.
    Daemon,
    /// All of them, at once.
    Everybody,
}

/// What readers saw.
#[derive(Default)]
struct Tally {
    kills: usize,
    compared: AtomicUsize,
    refused: AtomicUsize,
    wrong: AtomicUsize,
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963);
        (self.0 >> 33) % sides
    }
}

impl Tally {
    /// One file, read whole and compared.
    fn read(&self, place: &Path, (path, bytes): &(PathBuf, Vec<u8>)) {
        let mut found = Vec::new();
        let opened = File::open(place.join(path));
        match opened.and_then(|mut file| file.read_to_end(&mut found)) {
            Ok(_) if &found == bytes => self.compared.fetch_add(1, Ordering::Relaxed),
            Ok(_) => {
                eprintln!("wrong: {}", path.display());
                self.wrong.fetch_add(1, Ordering::Relaxed)
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "{}", path.display());
                self.refused.fetch_add(1, Ordering::Relaxed)
            }
        };
    }

    fn reads(&self) -> usize {
        let counts = [&self.compared, &self.refused, &self.wrong];
        counts.iter().map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

/// One cold image under readers until each has read everything, with kills in between. A slow
/// registry keeps it cold for long enough.
fn scene(victims: Victims, truth: &Files, dice: &mut Dice, tally: &mut Tally) {
    let registry = Registry::with_images(&[]);
    registry.fault(json!([{"blob": "", "effect": {"latency_ms": 20}}]));
    let mut daemon = Daemon::start(&["-l", "warn"]);
    let place = daemon.mount("zstd-64k", registry.address(), "image");
    let done = AtomicUsize::new(0);
    let mut kills = 0;
    std::thread::scope(|scope| {
        let (tally, done, place) = (&*tally, &done, &place);
        for reader in 0..READERS {
            scope.spawn(move || {
                for round in 0..truth.len() {
                    tally.read(place, &truth[(round * 7 + reader * 41) % truth.len()]);
                }
                done.fetch_add(1, Ordering::Relaxed);
            });
        }
        while done.load(Ordering::Relaxed) < READERS {
            wait_for_reads(tally, done, 1 + dice.roll(60) as usize);
            match victims {
                Victims::Daemon => daemon.kill(),
                Victims::Everybody => daemon.kill_all(),
            }
            kills += 1;
            forget_pages();
            daemon.start_again();
        }
    });
    tally.kills += kills;
    let log = daemon.log();
    assert!(!log.contains("panicked"), "{log}");
}

/// Until so many more reads have ended; or a while, since readers may all wait.
fn wait_for_reads(tally: &Tally, done: &AtomicUsize, more: usize) {
    let (since, enough) = (Instant::now(), tally.reads() + more);
    while tally.reads() < enough
        && done.load(Ordering::Relaxed) < READERS
        && since.elapsed() < Duration::from_millis(400)
    {
        std::thread::sleep(Duration::from_millis(1)); // tidy: polling
    }
}

fn kills_wanted() -> usize {
    std::env::var("KILLS").ok().and_then(|count| count.parse().ok()).unwrap_or(KILLS)
}

fn kill(victims: Victims) -> Tally {
    let home = tempfile::tempdir().expect("a folder");
    let truth = files(&source(home.path()));
    let (mut tally, mut dice) = (Tally::default(), Dice(victims as u64 + 1));
    while tally.kills < kills_wanted() {
        scene(victims, &truth, &mut dice, &mut tally);
    }
    let Tally { kills, compared, refused, wrong } = &tally;
    eprintln!("{kills} kills: {compared:?} files right, {refused:?} refused, {wrong:?} wrong");
    tally
}

#[test]
fn a_killed_daemon_costs_its_readers_nothing() {
    let tally = kill(Victims::Daemon);
    assert_eq!((tally.wrong.into_inner(), tally.refused.into_inner()), (0, 0));
    assert!(tally.compared.into_inner() > tally.kills * READERS);
}

#[test]
fn when_everybody_is_killed_readers_get_errors_and_never_wrong_bytes() {
    let tally = kill(Victims::Everybody);
    assert_eq!(tally.wrong.into_inner(), 0);
    assert!(tally.refused.into_inner() > 0, "the kills were felt");
    assert!(tally.compared.into_inner() > 0);
}

/// A private bind mount, until dropped.
struct Door(PathBuf);

impl Drop for Door {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// The layout of those who serve zeros: files of full size with holes, filled on demand. As long as
/// somebody fills, all is well; then he dies.
#[test]
fn the_control_with_sparse_files_shows_zeros() {
    let (truth, cache) = (Truth::of("zstd-64k"), Cache::new());
    let bootstrap = std::fs::read(&truth.bootstrap).expect("a file");
    let image = cache.plant("view", Bootstrap::parse(bootstrap).expect("good"));
    image.fill_all(&truth.bytes);
    let paths: Vec<_> = (0..image.view.devices.len()).map(|place| image.file(place)).collect();
    let contents: HashMap<u64, Vec<u8>> = paths
        .iter()
        .map(|path| {
            let bytes = std::fs::read(path).expect("a segment");
            let hole = File::create(path).expect("it is emptied");
            hole.set_len(bytes.len() as u64).expect("a hole");
            (path.metadata().expect("a file").ino(), bytes)
        })
        .collect();
    let door = Door(cache.mountpoint("door"));
    mounting::bind_private(&cache.segments(), &door.0).expect("a bind mount");
    let filler = Listener::start(move |file, range| {
        let bytes = &contents[&file.metadata().expect("a file").ino()];
        let end = bytes.len().min(range.end as usize);
        file.write_all_at(&bytes[range.start as usize..end], range.start).expect("it is filled");
        Answer::Allow
    });
    filler.group.mark_mount(&door.0).expect("a mark");
    let mounted = image.mount_through(&door.0, cache.mountpoint("mnt")).expect("it mounts");
    let home = tempfile::tempdir().expect("a folder");
    let (files, tally) = (files(&source(home.path())), Tally::default());
    let (before, after) = files.split_at(files.len() / 10);
    before.iter().for_each(|file| tally.read(&mounted.path, file));
    assert_eq!(tally.wrong.load(Ordering::Relaxed), 0);
    drop(filler);
    std::thread::scope(|scope| {
        for reader in 0..READERS {
            let (tally, mounted) = (&tally, &mounted);
            scope.spawn(move || {
                let mine = after.iter().skip(reader).step_by(READERS);
                mine.for_each(|file| tally.read(&mounted.path, file));
            });
        }
    });
    let wrong = tally.wrong.into_inner();
    eprintln!("control: {wrong} of {} files wrong", after.len());
    assert!(wrong > after.len() / 2, "this is what the other tests look for");
}
