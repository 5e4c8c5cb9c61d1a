//! The daemon behind the fanotify door on the running kernel, the way a user has it: the built
//! program, a real registry process, mount commands, programs that read.
//!
//! Needs root, Linux 6.14 or later with file-backed EROFS, and python3.

mod support;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use sluice::image::{Bootstrap, Segmentation};
use support::built::Built;
use support::daemon::{Daemon, Disk, forget_pages};
use support::layouts::noise;
use support::registry::{IMAGES, Registry};
use support::tree::{assert_same_tree, files, source};
use support::truth::folder;

#[test]
fn every_image_equals_its_source_and_is_asked_for_once() {
    let registry = Registry::with_images(&[]);
    let daemon = Daemon::start(&[]);
    for image in IMAGES {
        let place = daemon.mount(image, registry.address(), image);
        assert_same_tree(&place);
        daemon.wait_until("all complete segments are ignored", |daemon| {
            let before = daemon.count("upcalls_read");
            forget_pages();
            assert_same_tree(&place);
            daemon.count("upcalls_read") == before
        });
        registry.forget();
        forget_pages();
        assert_same_tree(&place);
        assert_eq!(registry.blob_reads().len(), 0, "{image}: what is there is not fetched again");
        daemon.unmount(&place);
    }
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn an_image_is_mounted_twice_and_unmounted_in_any_order() {
    let registry = Registry::with_images(&[]);
    let daemon = Daemon::start(&[]);
    for (image, leaves) in [("zstd-64k", 0), ("lz4-1m", 1)] {
        let mount = |place: &str| daemon.mount(image, registry.address(), place);
        let places = [mount(&format!("{image}-one")), mount(&format!("{image}-two"))];
        let (left, stays) = (&places[leaves], &places[1 - leaves]);
        daemon.unmount(left);
        // What nobody has read yet is still asked for.
        assert_same_tree(stays);
        let (bytes, fetched) = (daemon.cached_bytes(), daemon.count("fetched_bytes"));
        mount(&format!("{image}-{}", ["one", "two"][leaves]));
        forget_pages();
        assert_same_tree(left);
        assert_eq!((daemon.cached_bytes(), daemon.count("fetched_bytes")), (bytes, fetched));
        daemon.unmount(stays);
        forget_pages();
        assert_same_tree(left);
        daemon.unmount(left);
    }
    let output = daemon.run(&["images"]);
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!shown.contains(&*daemon.home.path().to_string_lossy()), "{shown}");
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn programs_run_from_an_image_that_is_not_there_yet() {
    let program = std::fs::read("/bin/cat").expect("a program");
    let image = Built::of(vec![(PathBuf::from("cat"), program)]);
    let daemon = Daemon::start(&[]);
    let place = image.mount(&daemon, "image");
    for round in 0..2 {
        let said = Command::new(place.join("cat")).arg("/proc/self/comm").output().expect("runs");
        assert_eq!(said.stdout, b"cat\n", "{round}");
        forget_pages();
    }
    assert!(daemon.count("upcalls_read") > 0 && daemon.count("reads_failed") == 0);
    daemon.unmount(&place);
}

#[test]
fn images_that_share_a_blob_share_its_segments() {
    let registry = Registry::with_images(&[]);
    let daemon = Daemon::start(&[]);
    let one = daemon.mount_as("zstd-64k", registry.address(), "one", &["--id", "one"]);
    assert_same_tree(&one);
    let (bytes, fetched) = (daemon.cached_bytes(), daemon.count("fetched_bytes"));
    let two = daemon.mount_as("zstd-64k", registry.address(), "two", &["--id", "two"]);
    forget_pages();
    assert_same_tree(&two);
    assert_eq!((daemon.cached_bytes(), daemon.count("fetched_bytes")), (bytes, fetched));
    daemon.unmount(&one);
    forget_pages();
    assert_same_tree(&two);
}

#[test]
fn prefetch_brings_the_image_without_a_reader_and_readers_go_first() {
    let registry = Registry::with_images(&[]);
    registry.fault(json!([{"blob": "", "effect": {"latency_ms": 20}}]));
    let mut daemon = Daemon::start(&[]);
    let (address, options) = (registry.address(), ["--prefetch"]);
    let asked = daemon.mount_as("zstd-64k", address, "asked", &options);
    let plain = daemon.mount("zran", address, "plain");
    // Somebody reads meanwhile, of this image and of another.
    assert_same_tree(&asked);
    assert_same_tree(&plain);
    let unread = daemon.mount_as("lz4-1m", address, "unread", &options);
    daemon.wait_until("it begins by itself", |daemon| daemon.count("prefetch_bytes") > 0);
    // A successor goes on with it.
    daemon.kill();
    daemon.start_again();
    let (blob, whole) = blob_and_size("lz4-1m");
    daemon.wait_until("all of it is here", |daemon| daemon.blob_bytes(&blob) == whole);
    registry.forget();
    forget_pages();
    assert_same_tree(&unread);
    assert_eq!(registry.blob_reads().len(), 0, "it was here before anybody read it");
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn prefetch_begins_with_what_the_image_lists() {
    // More than is under way at once: the next file waits until some of this one is here.
    const SIZE: usize = 12 << 20;
    let files =
        ["a", "b", "c"].map(|name| (PathBuf::from(name), noise(SIZE, name.as_bytes()[0].into())));
    let image = Built::with(files.to_vec(), &["--prefetch", "/c", "--prefetch", "/b"]);
    let registry = image.registry();
    let daemon = Daemon::start(&[]);
    let url = format!("http://{}", registry.address());
    let options = ["--registry", &url, "--repo", "built", "--prefetch"];
    let place = image.mount_from(&daemon, "image", &options);
    daemon.wait_until("all of it is here", |daemon| daemon.cached_bytes() >= 3 * SIZE as u64);
    // Dialling ahead asks for one byte.
    let mut reads = registry.blob_reads();
    reads.retain(|read| read["bytes"].as_u64() > Some(1));
    let first_bytes = reads.into_iter().map(|read| {
        let range = read["range"].as_str().expect("a range").to_owned();
        let start = range.strip_prefix("bytes=").and_then(|it| it.split_once('-')?.0.parse().ok());
        start.unwrap_or_else(|| panic!("{range}"))
    });
    // Files lie in the blob by name.
    let files: Vec<usize> = first_bytes.map(|start: usize| start / SIZE).collect();
    let position = |file| files.iter().position(|&it| it == file).expect("it is fetched");
    assert!(position(2) < position(1) && position(1) < position(0), "{files:?}");
    image.assert_same(&place);
}

/// An image's only blob, and how many bytes its segments have.
fn blob_and_size(image: &str) -> (String, u64) {
    let bootstrap = std::fs::read(folder(image).join("image.boot")).expect("a bootstrap");
    let bootstrap = Bootstrap::parse(bootstrap).expect("a good one");
    let plans = Segmentation::of_image(&bootstrap).expect("it can be cut");
    let size = plans[0].segments().map(|segment| segment.size).sum();
    (bootstrap.blobs()[0].id.to_string(), size)
}

/// An overlay over an image, until dropped.
struct Overlay(PathBuf);

impl Overlay {
    fn over(lower: &Path, home: &Path) -> Overlay {
        let part = |name: &str| {
            let path = home.join(name);
            std::fs::create_dir_all(&path).expect("a folder");
            path
        };
        let (upper, work, merged) = (part("upper"), part("work"), part("merged"));
        let (lower, upper, work) = (lower.display(), upper.display(), work.display());
        let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
        let (source, kind) = (Some("overlay"), Some("overlay"));
        mount(source, &merged, kind, MsFlags::empty(), Some(options.as_str())).expect("an overlay");
        Overlay(merged)
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[test]
fn whatever_reads_a_file_gets_its_bytes() {
    let registry = Registry::with_images(&[]);
    let daemon = Daemon::start(&[]);
    let truth = files(&source(daemon.home.path()));
    let place = daemon.mount("zstd-64k", registry.address(), "image");
    let overlay = Overlay::over(&place, daemon.home.path());
    let big = truth.iter().max_by_key(|(_, bytes)| bytes.len()).expect("a file");
    // copy-up of a file nobody has read, through open for writing.
    let copied = overlay.0.join(&big.0);
    let file = File::options().write(true).open(&copied).expect("a copy");
    file.write_all_at(b"new", 0).expect("a write");
    let copy = std::fs::read(&copied).expect("a copy");
    assert!(copy.starts_with(b"new") && copy[3..] == big.1[3..]);
    // sendfile(2), which std::io::copy uses between files on Linux.
    for (path, bytes) in &truth {
        let target = daemon.path("sent");
        let mut from = File::open(overlay.0.join(path)).expect("a file");
        let mut to = File::create(&target).expect("a file");
        std::io::copy(&mut from, &mut to).expect("a copy");
        if *path != big.0 {
            assert_eq!(&std::fs::read(&target).expect("a file"), bytes, "{}", path.display());
        }
    }
    forget_pages();
    // mmap(2), by a program that maps what it reads.
    let script = "import mmap,sys,hashlib\n\
        f = open(sys.argv[1], 'rb')\n\
        print(hashlib.sha256(mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)).hexdigest())";
    let mapped = Command::new("python3").args(["-c", script]).arg(place.join(&big.0)).output();
    let mapped = String::from_utf8(mapped.expect("python3").stdout).expect("text");
    assert_eq!(mapped.trim(), sluice_sha256(&big.1));
    drop(overlay);
    daemon.unmount(&place);
}

fn sluice_sha256(bytes: &[u8]) -> String {
    sluice::image::DigestAlgorithm::Sha256.digest(bytes).to_string()
}

#[test]
fn many_readers_get_right_bytes_while_pages_are_dropped() {
    let registry = Registry::with_images(&[]);
    let daemon = Daemon::start(&[]);
    let truth = files(&source(daemon.home.path()));
    let place = daemon.mount("lz4-1m", registry.address(), "image");
    let (is_over, compared) = (AtomicBool::new(false), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..16usize)
            .map(|reader| {
                let (truth, place, compared) = (&truth, &place, &compared);
                scope.spawn(move || {
                    for round in 0..truth.len() {
                        let (path, bytes) = &truth[(round * 7 + reader * 31) % truth.len()];
                        let mut found = Vec::new();
                        let opened = File::open(place.join(path));
                        opened.and_then(|mut file| file.read_to_end(&mut found)).expect("readable");
                        assert_eq!(&found, bytes, "{}", path.display());
                        compared.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                forget_pages();
            }
        });
        let outcomes: Vec<_> = readers.into_iter().map(|reader| reader.join()).collect();
        is_over.store(true, Ordering::Relaxed);
        assert!(outcomes.iter().all(Result::is_ok));
    });
    assert_eq!(compared.into_inner(), 16 * truth.len());
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn a_registry_that_is_gone_or_lies_costs_an_error_and_heals() {
    let registry = Registry::with_images(&[]);
    let daemon = Daemon::start(&["--deadline-ms", "2000"]);
    let truth = files(&source(daemon.home.path()));
    let place = daemon.mount("zstd-64k", registry.address(), "image");
    for effect in [
        json!({"reset": 0}),
        json!({"flip_bit": 100_000}),
        json!({"status": 500}),
        json!({"truncate": 100}),
        json!({"full_200_for_range": true}),
    ] {
        registry.fault(json!([{"blob": "", "effect": effect}]));
        let mut refused = 0;
        for (path, bytes) in truth.iter().filter(|(_, bytes)| !bytes.is_empty()).take(8) {
            match std::fs::read(place.join(path)) {
                Ok(found) => assert_eq!(&found, bytes, "{effect}: {}", path.display()),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{effect}");
                    refused += 1;
                }
            }
        }
        eprintln!("{effect}: {refused} refused");
    }
    assert!(daemon.count("reads_failed") > 0, "the faults were felt");
    registry.heal();
    assert_same_tree(&place);
}

#[test]
fn a_crowd_at_a_registry_that_is_away_holds_up_no_other_image() {
    let (away, well) = (Registry::with_images(&[]), Registry::with_images(&[]));
    let daemon = Daemon::start(&["--deadline-ms", "120000"]);
    let truth = files(&source(daemon.home.path()));
    let mut truth = truth.iter().filter(|(_, bytes)| !bytes.is_empty()).take(200);
    let trace = daemon.path("trace");
    // While touches are recorded, the kernel asks for what is there, too.
    let recorded = ["--trace", trace.to_str().expect("text")];
    let mount = |name: &str| match name {
        "away0" => daemon.mount_as("zstd-64k", away.address(), name, &recorded),
        _ => daemon.mount("zstd-64k", away.address(), name),
    };
    // With 200 readers each, more than all cores serve at once.
    let places = ["away0", "away1", "away2", "away3"].map(mount);
    let (path, bytes) = truth.next().expect("there are files");
    assert_eq!(&std::fs::read(places[0].join(path)).expect("it has been well"), bytes);
    let healthy = daemon.mount("lz4-1m", well.address(), "healthy");
    away.fault(json!([{"blob": "", "effect": {"status": 503}}]));
    let served = AtomicUsize::new(0);
    let read = |path: PathBuf, bytes: &[u8]| {
        assert_eq!(std::fs::read(&path).expect("it came back"), bytes, "{}", path.display());
        served.fetch_add(1, Ordering::Relaxed);
    };
    std::thread::scope(|scope| {
        let read = &read;
        for (path, bytes) in truth {
            for place in &places {
                scope.spawn(move || read(place.join(path), bytes));
            }
        }
        daemon.wait_until("the crowd waits", |daemon| daemon.count("retries") > 50);
        let before = served.load(Ordering::Relaxed);
        assert_same_tree(&healthy);
        forget_pages();
        assert_eq!(&std::fs::read(places[0].join(path)).expect("it is there"), bytes);
        assert_eq!(served.load(Ordering::Relaxed), before, "the crowd waits");
        away.heal();
    });
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn a_quota_evicts_what_nobody_uses() {
    let registry = Registry::with_images(&[]);
    let daemon = Daemon::start(&["--cache-quota", "6M"]);
    for round in 0..2 {
        for image in IMAGES {
            let place = daemon.mount(image, registry.address(), &format!("{image}-{round}"));
            assert_same_tree(&place);
            daemon.unmount(&place);
        }
    }
    daemon.wait_until("the quota is kept", |daemon| daemon.cached_bytes() < 6 << 20);
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn a_quota_smaller_than_what_is_mounted_is_no_error() {
    let registry = Registry::with_images(&[]);
    let daemon = Daemon::start(&["--cache-quota", "4M"]);
    let places = IMAGES.map(|image| daemon.mount(image, registry.address(), image));
    for _ in 0..3 {
        for place in &places {
            forget_pages();
            assert_same_tree(place);
        }
    }
    daemon.wait_until("the quota is kept", |daemon| daemon.cached_bytes() < 4 << 20);
    forget_pages();
    places.iter().for_each(|place| assert_same_tree(place));
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn a_full_disk_costs_an_error_on_misses_only_and_heals() {
    let registry = Registry::with_images(&[]);
    let disk = Disk::new(64);
    let home = tempfile::TempDir::new_in(&disk.mountpoint).expect("a folder");
    let daemon = Daemon::over(home, &[]);
    let truth = files(&source(tempfile::tempdir().expect("a folder").path()));
    let place = daemon.mount("zstd-64k", registry.address(), "image");
    let read = |wanted: usize| -> Vec<bool> {
        // From the end: the first file is long and brings its neighbours with it.
        let files = truth.iter().rev().filter(|(_, bytes)| !bytes.is_empty()).take(wanted);
        let read = files.map(|(path, bytes)| match std::fs::read(place.join(path)) {
            Ok(found) => {
                assert_eq!(&found, bytes, "{}", path.display());
                true
            }
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "{}", path.display());
                false
            }
        });
        read.collect()
    };
    assert_eq!(read(2), [true; 2]);
    let junk = disk.mountpoint.join("junk");
    let mut filler = File::create(&junk).expect("a file");
    while std::io::Write::write_all(&mut filler, &[7; 4096]).is_ok() {}
    forget_pages();
    let outcomes = read(usize::MAX);
    assert_eq!(outcomes[..2], [true; 2], "what is there is read from a full disk, too");
    assert!(outcomes.contains(&false), "what is not there has no room");
    drop(filler);
    std::fs::remove_file(&junk).expect("ours");
    assert_same_tree(&place);
    daemon.unmount(&place);
}

#[test]
fn a_thousand_images_are_mounted_and_read_at_once() {
    const IMAGES_MOUNTED: usize = 1000;
    let registry = Registry::with_images(&[]);
    let mut daemon = Daemon::start(&["-l", "warn"]);
    let places = daemon.mount_copies("zstd-64k", registry.address(), IMAGES_MOUNTED);
    for number in [0, IMAGES_MOUNTED / 2, IMAGES_MOUNTED - 1] {
        assert_same_tree(&places[number]);
    }
    let resident = std::fs::read_to_string(format!("/proc/{}/status", daemon.pid()));
    let resident = resident.expect("it runs");
    eprintln!("{:?}", resident.lines().find(|line| line.starts_with("VmRSS")));
    assert_eq!(daemon.count("reads_failed"), 0);
    daemon.stop();
    for number in [1, IMAGES_MOUNTED - 2] {
        assert_same_tree(&places[number]);
    }
}
