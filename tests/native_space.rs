//! A cache with a quota behind the fanotify door, under more bytes than it may keep; a full disk,
//! whose room others take.
//!
//! `QUOTA_MIB=200 cargo test --test native_space -- --nocapture` takes a larger one than usual, and
//! five times as many bytes.

mod support;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use support::built::Built;
use support::daemon::{Daemon, Disk, forget_pages};
use support::node::{Node, Options};
use support::registry::Registry;
use support::truth::Truth;

const QUOTA_MIB: usize = 16;
const IMAGES: usize = 5;
const MIB: usize = 1 << 20;

fn quota_mib() -> usize {
    std::env::var("QUOTA_MIB").ok().and_then(|size| size.parse().ok()).unwrap_or(QUOTA_MIB)
}

/// Does something while another thread looks at the cache; gives the most bytes it saw.
fn watched(daemon: &Daemon, work: impl FnOnce()) -> u64 {
    let (is_over, most) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                most.fetch_max(daemon.cached_bytes(), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20)); // tidy: polling
            }
        });
        let worked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        is_over.store(true, Ordering::Relaxed);
        worked.expect("all reads are right");
    });
    most.into_inner()
}

#[test]
fn a_working_set_of_five_quotas_is_served_without_an_error() {
    let quota = quota_mib() * MIB;
    let build = |seed| Built::new(quota / MIB, MIB, seed);
    let images: Vec<_> = (1..=IMAGES as u64).map(build).collect();
    let daemon = Daemon::start(&["--cache-quota", &format!("{}M", quota_mib())]);
    let below = |daemon: &Daemon| daemon.cached_bytes() < quota as u64;

    let most = watched(&daemon, || {
        for (number, image) in images.iter().enumerate() {
            let place = image.mount(&daemon, &format!("alone-{number}"));
            image.assert_same(&place);
            daemon.unmount(&place);
        }
    });
    eprintln!("one after the other: at most {} MiB of {}", most / MIB as u64, quota_mib());
    daemon.wait_until("the quota is kept", below);

    let mount = |(number, image): (usize, &Built)| image.mount(&daemon, &format!("all-{number}"));
    let places: Vec<_> = images.iter().enumerate().map(mount).collect();
    let most = watched(&daemon, || {
        for _ in 0..2 {
            forget_pages();
            images.iter().zip(&places).for_each(|(image, place)| image.assert_same(place));
        }
    });
    eprintln!("all mounted at once: at most {} MiB of {}", most / MIB as u64, quota_mib());
    daemon.wait_until("the quota is kept while all are mounted", below);
    forget_pages();
    images.iter().zip(&places).for_each(|(image, place)| image.assert_same(place));
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn reader_asks_for_room_again_when_others_were_faster() {
    const TAKEN: u64 = 4;
    let registry = Registry::with_images(&[]);
    let (disk, truth) = (Disk::new(64), Truth::of("zstd-64k"));
    let junk = disk.mountpoint.join("junk");
    let asked = Arc::new(AtomicU64::new(0));
    let (count, taken) = (Arc::clone(&asked), junk.clone());
    let make_room = move |wanted| {
        // Room is said to have been made, and somebody else has it, a few times.
        if count.fetch_add(1, Ordering::Relaxed) == TAKEN {
            std::fs::remove_file(&taken).expect("ours");
        }
        wanted
    };
    let options = Options { cores: 1, make_room: Arc::new(make_room), ..Options::default() };
    let node = Node::start(&disk.mountpoint, &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    let mut filler = std::fs::File::create(&junk).expect("a file");
    while filler.write_all(&[7; 4096]).is_ok() {}
    drop(filler);
    assert_eq!(node.read_all(&truth, &object, 3), 0);
    assert!(asked.load(Ordering::Relaxed) > TAKEN, "the disk was full");
}
