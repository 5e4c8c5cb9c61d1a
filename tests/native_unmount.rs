//! Mounts that go while somebody goes on to read: lazy unmounts, overlays that keep what they were
//! made of. On the running kernel.
//!
//! Needs root and Linux 6.14 or later with file-backed EROFS.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use support::built::Built;
use support::daemon::Daemon;

const FILES: usize = 4;
const FILE_BYTES: usize = 1 << 20;

/// An image's files, opened and not read.
struct Reader(Vec<File>);

impl Reader {
    fn of(image: &Built, place: &Path) -> Reader {
        let open = |(path, _): &(PathBuf, _)| File::open(place.join(path)).expect("a file");
        Reader(image.files.iter().map(open).collect())
    }

    /// Reads a file for the first time.
    fn reads(&self, image: &Built, number: usize) {
        let mut found = vec![0; FILE_BYTES];
        self.0[number].read_exact_at(&mut found, 0).unwrap_or_else(|e| panic!("{number}: {e}"));
        assert!(found == image.files[number].1, "{number} is wrong");
    }
}

/// The ids of the images that the daemon knows, once it has looked after its mounts.
fn known(daemon: &Daemon) -> Vec<String> {
    assert!(daemon.run(&["gc"]).status.success(), "{}", daemon.log());
    let images = daemon.run(&["images", "--json"]);
    let images: serde_json::Value = serde_json::from_slice(&images.stdout).expect("JSON");
    let id = |image: &serde_json::Value| image["id"].as_str().expect("an id").to_owned();
    images.as_array().expect("a list").iter().map(id).collect()
}

/// What is absent of an image is refused by whoever has unbound it; bytes that nobody uses go.
fn is_over(daemon: &Daemon) {
    daemon.wait_until("the image is over", |daemon| known(daemon).is_empty());
    daemon.wait_until("its bytes go", |daemon| {
        daemon.run(&["gc"]).status.success() && daemon.cached_bytes() == 0
    });
    let remembered = std::fs::read_dir(daemon.path("state/registered")).into_iter().flatten();
    let is_record = |path: &Path| path.extension().is_some_and(|ending| ending == "json");
    let records = remembered.flatten().filter(|entry| is_record(&entry.path()));
    assert_eq!(records.count(), 0, "nothing is remembered");
}

fn unmount_by_hand(place: &Path) {
    umount2(place, MntFlags::MNT_DETACH).expect("it is mounted");
}

fn unmount_by_command(daemon: &Daemon, place: &Path) {
    let output = daemon.run(&["umount", "--lazy", place.to_str().expect("text")]);
    assert!(output.status.success(), "{}", daemon.log());
}

#[test]
fn lazily_unmounted_image_is_read_until_its_last_file_is_closed() {
    let image = Built::new(FILES, FILE_BYTES, 1);
    let daemon = Daemon::start(&[]);
    for is_by_hand in [true, false] {
        let place = image.mount(&daemon, "image");
        let reader = Reader::of(&image, &place);
        match is_by_hand {
            true => unmount_by_hand(&place),
            false => unmount_by_command(&daemon, &place),
        }
        assert_eq!(known(&daemon).len(), 1, "by hand: {is_by_hand}");
        (0..FILES).for_each(|number| reader.reads(&image, number));
        assert_eq!(known(&daemon).len(), 1, "by hand: {is_by_hand}");
        drop(reader);
        is_over(&daemon);
    }
    let place = image.mount(&daemon, "image");
    unmount_by_command(&daemon, &place);
    is_over(&daemon);
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn successor_serves_who_reads_a_lazily_unmounted_image() {
    let image = Built::new(FILES, FILE_BYTES, 2);
    let mut daemon = Daemon::start(&[]);
    let place = image.mount(&daemon, "image");
    let reader = Reader::of(&image, &place);
    unmount_by_command(&daemon, &place);
    reader.reads(&image, 0);
    daemon.kill();
    daemon.start_again();
    reader.reads(&image, 1);
    daemon.stop();
    daemon.start_again();
    reader.reads(&image, 2);
    // Unmounted while no daemon lives.
    let again = image.mount(&daemon, "again");
    let other = Reader::of(&image, &again);
    daemon.kill();
    unmount_by_hand(&again);
    daemon.start_again();
    other.reads(&image, 3);
    assert_eq!(known(&daemon).len(), 1);
    drop((reader, other));
    is_over(&daemon);
}

#[test]
fn image_that_lingers_is_mounted_anew() {
    let image = Built::new(FILES, FILE_BYTES, 3);
    let daemon = Daemon::start(&[]);
    let place = image.mount(&daemon, "image");
    let reader = Reader::of(&image, &place);
    unmount_by_command(&daemon, &place);
    reader.reads(&image, 0);
    let place = image.mount(&daemon, "image");
    reader.reads(&image, 1);
    image.assert_same(&place);
    drop(reader);
    assert_eq!(known(&daemon).len(), 1);
    image.assert_same(&place);
    daemon.unmount(&place);
    is_over(&daemon);
    assert_eq!(daemon.count("reads_failed"), 0);
}

#[test]
fn plain_unmount_of_one_of_two_images_with_one_bootstrap_is_plain() {
    let image = Built::new(FILES, FILE_BYTES, 4);
    let daemon = Daemon::start(&[]);
    let mount = |id: &str| {
        let folder = image.folder();
        let options = ["--blobs", folder.to_str().expect("text"), "--id", id];
        image.mount_from(&daemon, id, &options)
    };
    let (one, two) = (mount("one"), mount("two"));
    daemon.unmount(&one);
    assert_eq!(known(&daemon), ["two"]);
    image.assert_same(&two);
    daemon.unmount(&two);
    is_over(&daemon);
}

/// An overlay clones the mounts it is made of: they can be unmounted, and are read on.
#[test]
fn overlay_goes_on_without_the_mount_it_was_made_of() {
    let image = Built::new(FILES, FILE_BYTES, 5);
    let daemon = Daemon::start(&[]);
    let place = image.mount(&daemon, "image");
    let (merged, empty) = (daemon.path("merged"), daemon.path("empty"));
    for path in [&merged, &empty] {
        std::fs::create_dir(path).expect("a folder");
    }
    let options = format!("lowerdir={}:{}", place.display(), empty.display());
    let (kind, flags) = (Some("overlay"), MsFlags::empty());
    mount(kind, &merged, kind, flags, Some(options.as_str())).expect("an overlay");
    daemon.unmount(&place);
    image.assert_same(&merged);
    assert_eq!(known(&daemon).len(), 1);
    let users = Command::new("umount").arg(&merged).status().expect("umount");
    assert!(users.success());
    is_over(&daemon);
    assert_eq!(daemon.count("reads_failed"), 0);
}
