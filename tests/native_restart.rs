//! The daemon behind the fanotify door dies, or is stopped, and is started again with the same
//! arguments: mounted images go on, and nobody registers anything again.

mod support;

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use support::built::Built;
use support::daemon::{Daemon, forget_pages};
use support::registry::Registry;
use support::tree::assert_same_tree;

fn remembered(daemon: &Daemon) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(daemon.path("state/registered")).into_iter().flatten();
    let files = entries.flatten().map(|entry| entry.path());
    files.filter(|path| path.extension().is_some_and(|it| it == "json")).collect()
}

fn mounts(daemon: &Daemon) -> String {
    let output = daemon.run(&["images"]);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Everything that is asked for from now on comes from the daemon that runs now.
fn serves(place: &Path) {
    forget_pages();
    assert_same_tree(place);
}

#[test]
fn mounted_images_go_on_after_a_crash_and_after_a_stop() {
    let registry = Registry::with_images(&[]);
    let mut daemon = Daemon::start(&[]);
    let read = daemon.mount("lz4-1m", registry.address(), "read");
    let unread = daemon.mount("zstd-64k", registry.address(), "unread");
    assert_same_tree(&read);
    assert_eq!(remembered(&daemon).len(), 2);

    daemon.kill();
    daemon.start_again();
    daemon.wait_until("all has come back", |daemon| {
        daemon.stat()["daemon"]["restored"] == json!({"images": 2, "skipped": 0})
    });
    serves(&read);
    daemon.stop();
    daemon.start_again();
    serves(&unread);
    assert!(daemon.count("fetched_bytes") > 0, "it was read for the first time");
    let shown = mounts(&daemon);
    assert!(shown.contains("unread") && shown.contains("/read"), "{shown}");

    daemon.unmount(&read);
    daemon.unmount(&unread);
    assert!(remembered(&daemon).is_empty());
    daemon.kill();
    daemon.start_again();
    assert_eq!(daemon.stat()["daemon"]["restored"], json!({"images": 0, "skipped": 0}));
}

/// Whether the kernel reads the files of a mounted image past their page cache.
fn is_direct(place: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("it can be read");
    let is_it = |line: &&str| line.contains(&format!(" {} ", place.display()));
    mounts.lines().find(is_it).expect("it is mounted").contains("directio")
}

#[test]
fn whole_image_is_read_directly_at_its_first_mount_and_not_at_the_next() {
    let registry = Registry::with_images(&[]);
    // As after another boot: without a keeper the kernel is tried anew.
    let mut daemon = Daemon::start(&["--keep", "0"]);
    let mount = |daemon: &mut Daemon, is_new: bool, name: &str| {
        if is_new {
            daemon.stop();
            daemon.start_again();
        }
        let place = daemon.mount("zstd-64k", registry.address(), name);
        serves(&place);
        let was_direct = is_direct(&place);
        daemon.unmount(&place);
        was_direct
    };
    assert!(!mount(&mut daemon, false, "absent"), "nothing is there yet");
    assert!(mount(&mut daemon, true, "first"));
    assert!(!mount(&mut daemon, false, "second"), "what is mounted again is kept in memory");
    assert_eq!(daemon.count("fetched_bytes"), 0, "all of it was there");
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn what_is_evicted_of_an_image_that_is_read_directly_is_fetched_again() {
    const IMAGE_MIB: usize = 12;
    let [first, second] = [1, 2].map(|seed| Built::new(IMAGE_MIB, 1 << 20, seed));
    let mut daemon = Daemon::start(&["--keep", "0", "--cache-quota", "16M"]);
    let place = first.mount(&daemon, "filled");
    first.assert_same(&place);
    daemon.unmount(&place);
    daemon.stop();
    daemon.start_again();
    let place = first.mount(&daemon, "first");
    assert!(is_direct(&place));
    let other = second.mount(&daemon, "second");
    second.assert_same(&other);
    daemon.wait_until("the quota is kept", |daemon| daemon.cached_bytes() < 16 << 20);
    forget_pages();
    first.assert_same(&place);
    second.assert_same(&other);
    let fetched = daemon.count("fetched_bytes");
    assert!(fetched > (IMAGE_MIB << 20) as u64, "not only the second: {fetched}");
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn what_was_unmounted_while_no_daemon_lived_is_forgotten() {
    let registry = Registry::with_images(&[]);
    let mut daemon = Daemon::start(&[]);
    let place = daemon.mount("zstd-64k", registry.address(), "a");
    let bound = daemon.mount("zstd-64k", registry.address(), "b");
    let gone = daemon.mount("lz4-1m", registry.address(), "c");
    daemon.kill();
    for place in [&bound, &gone] {
        nix::mount::umount2(place, nix::mount::MntFlags::empty()).expect("nobody uses it");
    }
    daemon.start_again();
    daemon.wait_until("one image is left", |daemon| remembered(daemon).len() == 1);
    serves(&place);
    // Mounted nowhere any more, so it can be mounted as if for the first time.
    let again = daemon.mount("lz4-1m", registry.address(), "c");
    serves(&again);
    for place in [&place, &again] {
        daemon.unmount(place);
    }
    assert!(remembered(&daemon).is_empty());
}

#[test]
fn a_thousand_images_serve_what_is_cached_while_their_registry_is_down() {
    const IMAGES_MOUNTED: usize = 1000;
    let mut registry = Registry::with_images(&[]);
    let mut daemon = Daemon::start(&["-l", "warn"]);
    let address = registry.address().to_owned();
    let places = daemon.mount_copies("zstd-64k", &address, IMAGES_MOUNTED);
    assert_same_tree(&places[0]);
    registry.kill();
    daemon.kill_all();
    forget_pages();

    let since = Instant::now();
    let (first, answers) = std::thread::scope(|scope| {
        // Nobody waits for the daemon: what is there is read without it.
        let reader = scope.spawn(|| {
            assert_same_tree(places.last().expect("a thousand"));
            since.elapsed()
        });
        daemon.start_again();
        let answers = since.elapsed();
        (reader.join().expect("it compares"), answers)
    });
    // A container that starts now needs the daemon, and not the images before it.
    let place = daemon.mount("zstd-64k", &address, "new");
    assert_same_tree(&place);
    let mounted = since.elapsed();
    daemon.wait_until("all has come back", |daemon| {
        daemon.stat()["daemon"]["restored"] == json!({"images": IMAGES_MOUNTED, "skipped": 0})
    });
    eprintln!(
        "from exec: mounted image read whole {first:?}, API {answers:?}, another image mounted and \
         read {mounted:?}, all images back {:?}",
        since.elapsed()
    );
    forget_pages();
    assert_same_tree(&places[IMAGES_MOUNTED / 2]);
    assert_eq!(daemon.count("reads_failed"), 0);
}
