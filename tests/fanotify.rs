//! What the fanotify door relies on, seen on the kernel this runs on: which reads raise events,
//! what a reader gets after each answer, and what ends it. Needs root, Linux 6.14 and
//! file-backed EROFS.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use sluice::error::Error;
use sluice::image::{Bootstrap, FileKind};
use sluice::upcall::fanotify::Answer;
use sluice::upcall::group::Group;
use sluice::upcall::mountinfo;
use sluice::upcall::mounting;
use sluice::upcall::probe::probe;
use support::listener::Listener;
use support::segments::{Cache, Mounted, Planted, forget};
use support::truth::Truth;

/// An image over empty segments, mounted through a marked private bind mount.
struct Scene {
    listener: Listener,
    mounted: Mounted,
    _door: Mounted,
    image: Planted,
    truth: Truth,
    cache: Cache,
}

/// The name in the image of a file of one chunk, and the position of its segment.
const FILE: &str = "sizes/4096";

impl Scene {
    fn new(answer: impl FnOnce(&Planted, &Truth) -> Box<Answers>) -> Scene {
        let (cache, truth) = (Cache::new(), Truth::of("zstd-64k"));
        let bytes = fs::read(&truth.bootstrap).expect("a file");
        let image = cache.plant("view", Bootstrap::parse(bytes).expect("good"));
        let listener = Listener::start(answer(&image, &truth));
        let place = cache.path().join("door");
        mounting::bind_private(&cache.segments(), &place).expect("a bind mount");
        let door = Mounted { path: place.clone() };
        listener.group.mark_mount(&place).expect("a mark");
        let mounted = image.mount_through(&place, cache.mountpoint("mnt")).expect("it mounts");
        Scene { listener, mounted, _door: door, image, truth, cache }
    }

    fn file(&self) -> PathBuf {
        self.mounted.path.join(FILE)
    }

    /// The position of the device that has the file.
    fn position(&self) -> usize {
        let tree = self.image.bootstrap.tree();
        let inode = tree.lookup(FILE.as_bytes()).expect("it is there");
        assert_eq!(inode.kind, FileKind::File);
        let chunk = tree.file_chunks(&inode).expect("chunks").next().expect("one").expect("good");
        let place = self.image.segmentations[0].place_of(chunk.index).expect("a segment");
        let is_it = |device: &sluice::image::DeviceRef| device.place == place;
        self.image.view.devices.iter().position(is_it).expect("a device")
    }

    fn right(&self) -> Vec<u8> {
        let tree = self.image.bootstrap.tree();
        let inode = tree.lookup(FILE.as_bytes()).expect("it is there");
        let chunk = tree.file_chunks(&inode).expect("chunks").next().expect("one").expect("good");
        let start = chunk.uncompressed_offset as usize;
        self.truth.bytes[start..start + chunk.size as usize].to_vec()
    }
}

type Answers = dyn Fn(&File, std::ops::Range<u64>) -> Answer + Send;

fn errno(result: std::io::Result<Vec<u8>>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

/// Fills the whole segment through the event's own file, then lets the reader go.
fn filling(image: &Planted, truth: &Truth) -> Box<Answers> {
    let mut segments = Vec::new();
    for (position, device) in image.view.devices.iter().enumerate() {
        let inode = image.file(position).metadata().expect("a file").ino();
        let segment = image.segmentations[0].segment(device.place);
        let range = segment.base as usize..(segment.base + segment.size) as usize;
        segments.push((inode, truth.bytes[range].to_vec()));
    }
    Box::new(move |file, _| {
        let inode = file.metadata().expect("a file").ino();
        let (_, bytes) = segments.iter().find(|(other, _)| *other == inode).expect("a segment");
        file.write_all_at(bytes, 0).expect("it is filled");
        Answer::Allow
    })
}

#[test]
fn event_comes_before_the_read_and_what_is_filled_then_is_read() {
    let scene = Scene::new(filling);
    let segment = scene.image.file(scene.position());
    assert_eq!(scene.listener.take_all(), 0, "mounting reads nothing of the segments");
    assert_eq!(segment.metadata().expect("a file").len(), 0);
    assert_eq!(fs::read(scene.file()).expect("it is filled"), scene.right());
    let ranges = scene.listener.take(&segment);
    assert!(!ranges.is_empty());
    let size = segment.metadata().expect("a file").len();
    for range in ranges {
        assert!(range.start % 4096 == 0 && range.end % 4096 == 0 && range.end <= size, "{range:?}");
    }
    assert_eq!(fs::read(scene.file()).expect("in memory"), scene.right());
    assert_eq!(scene.listener.take_all(), 0, "what is in memory raises nothing");
    forget(&scene.file());
    assert_eq!(fs::read(scene.file()).expect("on disk"), scene.right());
    assert!(!scene.listener.take(&segment).is_empty(), "what is not does, complete or not");
}

#[test]
fn metadata_is_read_without_events() {
    let scene = Scene::new(|_, _| Box::new(|_, _| Answer::Deny));
    let mut folders = vec![scene.mounted.path.clone()];
    let mut count = 0;
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a folder") {
            let entry = entry.expect("an entry");
            let kind = entry.file_type().expect("a type");
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_symlink() {
                fs::read_link(entry.path()).expect("a link");
            }
            count += 1;
        }
    }
    assert!(count > 100);
    assert_eq!(scene.listener.take_all(), 0);
}

#[test]
fn refused_reader_gets_eio_and_a_later_one_is_served() {
    let refuse = Arc::new(AtomicBool::new(true));
    let (refused, heard) = (Arc::clone(&refuse), Arc::clone(&refuse));
    let scene = Scene::new(move |image, truth| {
        let fill = filling(image, truth);
        Box::new(move |file, range| match heard.load(Ordering::Relaxed) {
            true => Answer::Deny,
            false => fill(file, range),
        })
    });
    for _ in 0..2 {
        assert_eq!(errno(fs::read(scene.file())), Some(nix::libc::EIO));
    }
    refused.store(false, Ordering::Relaxed);
    assert_eq!(fs::read(scene.file()).expect("it is filled"), scene.right());
}

#[test]
fn short_file_is_eio_for_its_readers_never_zeros() {
    let scene = Scene::new(|_, _| Box::new(|_, _| Answer::Allow));
    assert_eq!(errno(fs::read(scene.file())), Some(nix::libc::EIO));
    // Half of it, cut inside the file that is read.
    let (position, right) = (scene.position(), scene.right());
    scene.image.fill(position, &scene.truth.bytes);
    assert_eq!(fs::read(scene.file()).expect("it is filled"), right);
    scene.image.empty(position);
    forget(&scene.file());
    assert_eq!(errno(fs::read(scene.file())), Some(nix::libc::EIO));
}

#[test]
fn ignored_file_raises_nothing_and_the_others_do() {
    let scene = Scene::new(filling);
    let (group, position) = (&scene.listener.group, scene.position());
    let directory = mounting::open_directory(&scene.cache.segments()).expect("a folder");
    let name = scene.image.device(position);
    fs::read(scene.file()).expect("it is filled");
    use std::os::fd::AsFd;
    group.ignore(directory.as_fd(), &name).expect("a mark");
    group.ignore(directory.as_fd(), &name).expect("a mark again");
    let reread = |mounted: &Path| {
        scene.listener.take_all();
        forget(&mounted.join(FILE));
        forget(&scene.image.file(position));
        assert_eq!(fs::read(mounted.join(FILE)).expect("it is there"), scene.right());
        scene.listener.take(&scene.image.file(position)).len()
    };
    assert_eq!(reread(&scene.mounted.path), 0);
    // Writes do not end it, and another image over the same files has it, too.
    scene.image.fill(position, &scene.truth.bytes);
    assert_eq!(reread(&scene.mounted.path), 0);
    let door = scene.cache.path().join("door");
    let other = scene.image.mount_through(&door, scene.cache.mountpoint("other")).expect("mounts");
    assert_eq!(reread(&other.path), 0);
    let any = (0..scene.image.view.devices.len()).find(|&other| other != position);
    assert_eq!(fs::metadata(scene.image.file(any.expect("another"))).expect("a file").len(), 0);

    group.unignore(directory.as_fd(), &name).expect("no mark");
    assert!(reread(&scene.mounted.path) > 0);
    group.unignore(directory.as_fd(), &name).expect("there was none");
    group.unignore(directory.as_fd(), "nothing/there").expect("there was none");
    let error = group.ignore(directory.as_fd(), "nothing/there").unwrap_err();
    assert_eq!(error.errno(), nix::libc::ENOENT);
}

#[test]
fn second_group_takes_over_a_mounted_image() {
    let scene = Scene::new(|_, _| Box::new(|_, _| Answer::Deny));
    let Scene { listener, mounted, _door, image, truth, cache } = scene;
    drop(listener);
    // Nobody listens: what is not there is EIO all the same.
    assert_eq!(errno(fs::read(mounted.path.join(FILE))), Some(nix::libc::EIO));
    let next = Listener::start(filling(&image, &truth));
    let place = cache.path().join("door");
    assert_eq!(
        mounting::bind_private(&cache.segments(), &place),
        Ok(mounting::Binding::Found),
        "the same mount: the image's files are open through it"
    );
    next.group.mark_mount(&place).expect("a mark");
    fs::read(mounted.path.join(FILE)).expect("it is filled");
    assert!(next.take_all() > 0);
}

#[test]
fn file_systems_without_pre_content_events_are_named() {
    let group = Group::open().expect("a group");
    let error = group.mark_mount(Path::new("/dev/shm")).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)));
    assert!(error.to_string().contains("not tmpfs"), "{error}");
    let error = group.mark_mount(Path::new("/nonexistent")).unwrap_err();
    assert_eq!(error.errno(), nix::libc::ENOENT);
}

#[test]
fn this_kernel_passes_the_probe_and_nothing_is_left_of_it() {
    let cache = Cache::new();
    let report = probe(cache.path());
    for finding in &report.findings {
        println!("{}: {}", finding.check, finding.text);
    }
    assert!(report.is_good(), "{:?}", report.reason());
    assert_eq!(report.findings.len(), 8);
    assert!(report.reads_directly, "{:?}", report.findings.last());
    assert_eq!(fs::read_dir(cache.path()).expect("a folder").count(), 0);
    let mounts = mountinfo::read(None).expect("a list");
    assert!(mounts.iter().all(|mount| !mount.mountpoint.starts_with(cache.path())));
}

#[test]
fn probe_says_what_is_in_the_way() {
    let report = probe(Path::new("/dev/shm"));
    assert!(!report.is_good());
    let reason = report.reason().expect("a reason");
    assert!(reason.contains("not tmpfs"), "{reason}");
    assert!(!probe(Path::new("/nonexistent")).is_good());
}
