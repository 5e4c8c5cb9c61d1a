//! The kernel's view of an image, mounted for real: needs root and file-backed EROFS.
//!
//! Segments are filled by the tests with decoded and verified chunks; nobody listens for events.

mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use nix::libc;
use sluice::image::{Bootstrap, KernelView, Segmentation};
use support::registry::IMAGES;
use support::segments::{Cache, Planted};
use support::synthetic::Synthetic;
use support::truth::{Truth, folder};

fn bootstrap(truth: &Truth) -> Bootstrap {
    Bootstrap::parse(std::fs::read(&truth.bootstrap).expect("it is there")).expect("it is good")
}

/// What tests/fixtures/list.py says of a tree, without the root: the root of an image has no time,
/// that of its source has.
fn list(root: &Path) -> Vec<String> {
    let script = folder("list.py");
    let output = Command::new("python3").arg(script).arg(root).output().expect("python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    sorted(&String::from_utf8(output.stdout).expect("text"))
}

fn sorted(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| !line.starts_with("'.' "));
    let mut lines: Vec<_> = lines.map(str::to_owned).collect();
    lines.sort();
    lines
}

/// The small images and, where somebody has them, larger ones of the same shape.
fn images() -> Vec<PathBuf> {
    let mut roots = vec![folder("")];
    roots.extend(std::env::var_os("SLUICE_FIXTURES").map(PathBuf::from));
    roots.iter().flat_map(|root| IMAGES.map(|name| root.join(name))).collect()
}

#[test]
fn every_fixture_is_the_tree_it_was_made_from() {
    for folder in images() {
        let (cache, truth) = (Cache::new(), Truth::read(&folder));
        let image = cache.plant("view", bootstrap(&truth));
        image.fill_all(&truth.bytes);
        let mounted = image.mount(cache.mountpoint("mnt"));
        let expected = folder.parent().expect("a folder").join("tree.txt");
        let expected = std::fs::read_to_string(expected).expect("what it was made from");
        let (found, expected) = (list(&mounted.path), sorted(&expected));
        let differ = found.iter().zip(&expected).find(|(found, expected)| found != expected);
        assert_eq!(differ, None, "{}", folder.display());
        assert_eq!(found.len(), expected.len());
    }
}

/// A file of four small ones of two chunks each, the third left out where an upper layer hid it.
fn layered(hidden: bool) -> Synthetic {
    let mut files = [0..2, 2..4, 4..6, 6..8].to_vec();
    if hidden {
        files.remove(2);
    }
    Synthetic { chunk_size: 65_536, chunk_count: 8, files }
}

fn space(synthetic: &Synthetic) -> Vec<u8> {
    (0..synthetic.chunk_count).flat_map(|chunk| synthetic.data(chunk)).collect()
}

#[test]
fn images_that_list_the_same_chunks_share_the_files() {
    let cache = Cache::new();
    let (lower, upper) = (layered(false), layered(true));
    let (one, two) = (cache.plant("one", lower.build()), cache.plant("two", upper.build()));
    let names = |image: &Planted| {
        (0..image.view.devices.len()).map(|at| image.device(at)).collect::<Vec<_>>()
    };
    let (all, fewer) = (names(&one), names(&two));
    assert_eq!((all.len(), fewer.len()), (8, 6));
    assert!(fewer.iter().all(|name| all.contains(name)));
    // Filled once, through the first image's names only.
    one.fill_all(&space(&lower));
    let (one, two) = (one.mount(cache.mountpoint("1")), two.mount(cache.mountpoint("2")));
    for (image, mounted) in [(&lower, &one), (&upper, &two)] {
        for (number, chunks) in image.files.iter().enumerate() {
            let right: Vec<u8> = chunks.clone().flat_map(|chunk| image.data(chunk)).collect();
            let found = std::fs::read(mounted.path.join(format!("f{number:02}"))).expect("bytes");
            assert!(found == right, "file {number}");
        }
    }
}

#[test]
fn file_of_another_recipe_is_another_file() {
    // Two chunks to a segment: hiding one of them makes it a different one.
    let make = |files| Synthetic { chunk_size: 32_768, chunk_count: 4, files };
    let (whole, part) = (make(vec![0..2, 2..4]), make(vec![0..2, 2..3]));
    let cache = Cache::new();
    let (whole, part) = (cache.plant("whole", whole.build()), cache.plant("part", part.build()));
    assert_eq!(whole.device(0), part.device(0));
    assert_ne!(whole.device(1), part.device(1));
}

#[test]
fn segment_that_is_not_there_is_eio_on_exactly_its_chunks() {
    let (cache, synthetic) = (Cache::new(), layered(false));
    let image = cache.plant("view", synthetic.build());
    image.fill_all(&space(&synthetic));
    image.empty(5);
    let mounted = image.mount(cache.mountpoint("mnt"));
    let mut page = [0; 4096];
    for chunk in 0..8u32 {
        let file = File::open(mounted.path.join(format!("f{:02}", chunk / 2))).expect("a file");
        for at in [0, 61_440] {
            let read = file.read_exact_at(&mut page, u64::from(chunk % 2) * 65_536 + at);
            match read {
                Ok(()) => {
                    assert!(chunk != 5 && synthetic.data(chunk)[at as usize..][..4096] == page)
                }
                Err(error) => assert_eq!((chunk, error.raw_os_error()), (5, Some(libc::EIO))),
            }
        }
    }
    // Errors are not remembered.
    image.fill(5, &space(&synthetic));
    let found = std::fs::read(mounted.path.join("f02")).expect("bytes");
    assert!(found == [synthetic.data(4), synthetic.data(5)].concat());
}

/// Mounts an image of one file over so many segments and reads a filled and an absent one. Prints
/// what it takes.
fn mount_many(synthetic: &Synthetic, devices: usize) {
    let cache = Cache::new();
    let bootstrap = synthetic.build();
    let started = Instant::now();
    let segmentations = Segmentation::of_image(&bootstrap).expect("segments");
    let view = KernelView::derive(&bootstrap, &segmentations).expect("a view");
    let derived = started.elapsed();
    assert_eq!(view.devices.len(), devices);
    drop((segmentations, view));
    let image = cache.plant_sharing("view", bootstrap);
    let last = synthetic.chunk_count - 1;
    let file = OpenOptions::new().write(true).open(image.file(devices - 1)).expect("a file");
    let chunk = synthetic.data(last);
    let segment = image.segmentations[0].segment(image.view.devices[devices - 1].place);
    let inside = u64::from(last) * u64::from(synthetic.chunk_size) - segment.base;
    file.write_all_at(&chunk, inside).expect("it is filled");
    let started = Instant::now();
    let mounted = image.mount(cache.mountpoint("mnt"));
    let took = started.elapsed();
    let file = File::open(mounted.path.join("f00")).expect("a file");
    let size = u64::from(synthetic.chunk_size) * u64::from(synthetic.chunk_count);
    assert_eq!(file.metadata().expect("it is there").len(), size);
    let mut found = vec![0; chunk.len()];
    file.read_exact_at(&mut found, size - chunk.len() as u64).expect("it is filled");
    assert!(found == chunk);
    let absent = file.read_exact_at(&mut found, 0).expect_err("it is empty");
    assert_eq!(absent.raw_os_error(), Some(libc::EIO));
    drop(file);
    let started = Instant::now();
    drop(mounted);
    let gone = started.elapsed();
    println!("{devices} devices: view {derived:.1?}, mount {took:.1?}, unmount {gone:.1?}");
}

#[test]
fn devices_of_small_and_large_blobs_mount() {
    mount_many(&Synthetic::whole(64 << 10, 1600), 1600);
    mount_many(&Synthetic::whole(256 << 10, 8192), 8192);
    // 10 GiB.
    mount_many(&Synthetic::whole(1 << 20, 10_240), 10_240);
}

#[test]
fn devices_as_many_as_there_can_be_mount_and_one_more_grows_the_segments() {
    mount_many(&Synthetic::whole(2 << 20, 65_535), 65_535);
    mount_many(&Synthetic::whole(2 << 20, 65_536), 32_768);
}
