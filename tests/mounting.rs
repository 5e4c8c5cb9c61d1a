//! Mounts in this and in other namespaces, private bind mounts, and what is said when they fail.
//!
//! Needs root and file-backed EROFS.

mod support;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use sluice::error::Error;
use sluice::image::Bootstrap;
use sluice::upcall::mountinfo;
use sluice::upcall::mounting::{self, Binding, Reading};
use support::segments::{Cache, Mounted, Planted};
use support::truth::Truth;

fn image(cache: &Cache) -> (Planted, Truth) {
    let truth = Truth::of("lz4-1m");
    let bootstrap =
        Bootstrap::parse(std::fs::read(&truth.bootstrap).expect("a file")).expect("good");
    let planted = cache.plant("view", bootstrap);
    planted.fill_all(&truth.bytes);
    (planted, truth)
}

fn is_mounted(path: &Path, process: Option<u32>) -> bool {
    mountinfo::at(&mountinfo::read(process).expect("a list"), path).is_some()
}

/// A process in a mount namespace of its own, until dropped.
struct Stranger {
    child: Child,
}

impl Stranger {
    fn new() -> Stranger {
        let mut child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-c", "echo ready; cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut line = String::new();
        let output = child.stdout.take().expect("a pipe");
        BufReader::new(output).read_line(&mut line).expect("it says so");
        assert_eq!(line, "ready\n");
        Stranger { child }
    }

    /// A path as it sees it.
    fn seen(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.child.id()));
        root.join(path.strip_prefix("/").expect("an absolute path"))
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn an_image_is_mounted_where_the_one_who_asked_sees_it() {
    let (cache, stranger) = (Cache::new(), Stranger::new());
    let (planted, _) = image(&cache);
    let pid = Some(stranger.child.id());
    let place = cache.mountpoint("mnt");
    let mounted = planted.mount_for(place.clone(), pid).expect("it mounts");
    assert!(is_mounted(&place, pid) && !is_mounted(&place, None));
    assert!(stranger.seen(&place).join("sizes").is_dir());
    assert!(!place.join("sizes").exists());

    // The same superblock once more, in our own namespace.
    let other = cache.mountpoint("other");
    let copy = mounting::another(&place, pid).expect("a copy");
    mounting::attach(copy, &other, None).expect("it mounts");
    let other = Mounted { path: other };
    let device = |path: &Path| nix::sys::stat::stat(path).expect("a file").st_dev;
    assert_eq!(device(&other.path), device(&stranger.seen(&place)));

    mounting::detach(&place, pid, false).expect("nobody uses it");
    assert!(!is_mounted(&place, pid));
    assert!(other.path.join("sizes").is_dir(), "the other mount stays");
    drop(mounted);
}

#[test]
fn peers_of_the_same_namespace_and_of_none_are_told_apart() {
    let cache = Cache::new();
    let (planted, _) = image(&cache);
    let own = Some(std::process::id());
    let mounted = planted.mount_for(cache.mountpoint("mnt"), own).expect("it mounts");
    assert!(mounted.path.join("sizes").is_dir());
    let error = mounting::detach(&mounted.path, Some(u32::MAX), false).unwrap_err();
    assert!(matches!(error, Error::NotFound(_)) && error.to_string().contains("has ended"));
    mounting::detach(&mounted.path, own, false).expect("nobody uses it");
    let error = mounting::detach(&mounted.path, None, false).unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error}");
}

#[test]
fn a_mount_in_use_stays_until_it_is_taken_lazily() {
    let cache = Cache::new();
    let (planted, _) = image(&cache);
    let mounted = planted.mount(cache.mountpoint("mnt"));
    let user = File::open(mounted.path.join("sizes")).expect("a folder");
    let error = mounting::detach(&mounted.path, None, false).unwrap_err();
    assert!(matches!(error, Error::Busy(_)), "{error}");
    mounting::detach(&mounted.path, None, true).expect("lazily");
    assert!(!is_mounted(&mounted.path, None));
    drop(user);
}

#[test]
fn what_cannot_be_mounted_says_why_and_leaves_nothing() {
    let cache = Cache::new();
    let (planted, _) = image(&cache);
    let absent = Path::new("/nonexistent/place");
    let error = planted.mount_for(absent.to_owned(), None).err().expect("no such directory");
    assert!(matches!(error, Error::NotFound(_)) && error.to_string().contains("make the dir"));

    std::fs::remove_file(planted.file(0)).expect("it was there");
    let error = planted.mount_for(cache.mountpoint("mnt"), None).err().expect("a file is missing");
    assert!(error.to_string().contains("a segment file is missing"), "{error}");

    let path = "/".repeat(256);
    let error = mounting::image_of_files(&path, [""; 0], Reading::Cached).unwrap_err();
    assert!(matches!(error, Error::Malformed(_)) && error.to_string().contains("255"), "{error}");
    let error = mounting::image_of_files("/dev/null", [""; 0], Reading::Cached).unwrap_err();
    assert!(error.to_string().contains("/dev/null"), "{error}");

    // Nobody serves such a cookie, if the kernel has fscache at all. It names the option.
    let error = mounting::image_of_cookies("demo", Some("d"), ["blob"]).unwrap_err();
    let text = error.to_string();
    assert!(text.contains("cannot mount demo"), "{text}");
    if !Path::new("/dev/cachefiles").exists() {
        assert!(matches!(error, Error::Unsupported(_)), "{text}");
        assert!(text.contains("fsid option not supported"), "the kernel's own words: {text}");
    }
}

#[test]
fn a_long_path_is_reached_through_its_directory() {
    let (cache, long) = (Cache::new(), "d".repeat(200));
    let (planted, _) = image(&cache);
    let deep = cache.path().join(&long).join(&long);
    std::fs::create_dir_all(deep.parent().expect("a folder")).expect("a folder");
    std::fs::rename(cache.segments(), &deep).expect("it moves");
    let mounted = planted.mount_through(&deep, cache.mountpoint("mnt")).expect("it mounts");
    assert!(mounted.path.join("sizes").is_dir());
}

#[test]
fn a_private_bind_mount_is_made_once_and_found_again() {
    let cache = Cache::new();
    let (planted, _) = image(&cache);
    // A link in the path, which the kernel's list does not have.
    std::os::unix::fs::symlink(cache.path(), cache.path().join("link")).expect("a link");
    let place = cache.path().join("link/door");
    let made = mounting::bind_private(&cache.segments(), &place).expect("it is made");
    let bound = Mounted { path: cache.path().join("door") };
    assert_eq!(made, Binding::Made);
    assert_eq!(mounting::bind_private(&cache.segments(), &place), Ok(Binding::Found));
    let mounts = mountinfo::read(None).expect("a list");
    let here = mounts.iter().filter(|mount| mount.mountpoint == bound.path);
    assert_eq!(here.map(|mount| mount.is_shared).collect::<Vec<_>>(), [false]);
    let error = mounting::bind_private(cache.path(), &place).unwrap_err();
    assert!(matches!(error, Error::Exists(_)), "{error}");

    let mounted = planted.mount_through(&place, cache.mountpoint("mnt")).expect("it mounts");
    let error = mounting::detach(&bound.path, None, false).unwrap_err();
    assert!(matches!(error, Error::Busy(_)), "an image has its files open through it: {error}");
    drop(mounted);
    mounting::detach(&bound.path, None, false).expect("nobody uses it");
    assert_eq!(mounting::bind_private(&cache.segments(), &place), Ok(Binding::Made));
}
