//! `sluice build` and `sluice unpack` as a user runs them. Needs root.

mod support;

use std::fs;
use std::path::Path;

use serde_json::Value;
use support::program::{sluice, stderr, stdout};
use tempfile::TempDir;

/// A folder with a small tree in `tree`.
fn work() -> TempDir {
    let work = tempfile::tempdir().expect("a folder");
    let tree = work.path().join("tree");
    fs::create_dir_all(tree.join("sub")).expect("a folder");
    fs::write(tree.join("a"), vec![7; 200_000]).expect("written");
    fs::write(tree.join("sub/b"), b"some text").expect("written");
    fs::hard_link(tree.join("sub/b"), tree.join("c")).expect("linked");
    work
}

fn at(work: &TempDir, name: &str) -> String {
    work.path().join(name).to_str().expect("text").to_owned()
}

#[test]
fn what_is_built_is_checked_inspected_and_unpacked_by_its_directory() {
    let work = work();
    let (tree, image, back) = (at(&work, "tree"), at(&work, "image"), at(&work, "back"));
    let built = sluice(&["build", &tree, "-o", &image, "--chunk-size", "64K"]);
    assert!(built.status.success(), "{}", stderr(&built));
    // Three whole chunks of `a` are one, its rest and the text are others.
    assert!(stdout(&built).contains("chunks     3, 2 shared"), "{}", stdout(&built));
    let checked = sluice(&["check", &image]);
    assert!(checked.status.success(), "{}", stdout(&checked));
    assert!(stdout(&checked).contains("ok: 3 chunks"), "{}", stdout(&checked));
    assert!(sluice(&["inspect", &image]).status.success());
    let unpacked = sluice(&["unpack", &image, &back, "--json"]);
    let report: Value = serde_json::from_slice(&unpacked.stdout).expect("JSON");
    assert_eq!((report["names"].as_u64(), report["data_bytes"].as_u64()), (Some(5), Some(200_009)));
    for name in ["a", "c", "sub/b"] {
        let same = |root: &str| fs::read(Path::new(root).join(name)).expect("readable");
        assert_eq!(same(&tree), same(&back), "{name}");
    }
}

#[test]
fn the_report_is_json_on_demand_and_the_result_the_same_with_any_threads() {
    let work = work();
    let mut before: Option<String> = None;
    for threads in ["1", "3"] {
        let image = at(&work, &format!("image-{threads}"));
        let arguments = ["build", &at(&work, "tree"), "-o", &image, "--json", "--threads", threads];
        let report: Value = serde_json::from_slice(&sluice(&arguments).stdout).expect("JSON");
        assert_eq!(report["report"]["data_bytes"].as_u64(), Some(200_009));
        let id = report["blobs"][0]["id"].as_str().expect("an id").to_owned();
        let blob = fs::read(Path::new(&image).join(&id)).expect("the blob");
        assert_eq!(report["blobs"][0]["size"].as_u64(), Some(blob.len() as u64));
        assert!(before.is_none_or(|before| before == id));
        before = Some(id);
    }
}

#[test]
fn arguments_that_make_no_sense_are_refused() {
    let work = work();
    let (tree, image) = (at(&work, "tree"), at(&work, "image"));
    for arguments in [
        &["build", &tree][..],
        &["build", &tree, "-o", &image, "--chunk-size", "3K"],
        &["build", &tree, "-o", &image, "--compressor", "gzip"],
        &["build", &tree, "-o", &image, "--level", "0"],
        &["build", &tree, "-o", &image, "--level", "23"],
        &["build", &tree, "-o", &image, "--threads", "0"],
        &["convert", "oci:", &format!("dir:{image}")],
        &["convert", &format!("dir:{tree}"), "docker-archive:"],
        &["convert", &format!("dir:{tree}"), "a.b/c", "--also-docker=latest"],
        &["convert", &format!("dir:{tree}"), "a.b/c", "--also-docker=a b"],
    ] {
        assert_eq!(sluice(arguments).status.code(), Some(2), "{arguments:?}");
    }
    let inside = at(&work, "tree/deep/out");
    for arguments in [
        &["build", &tree, "-o", &inside][..],
        &["build", &at(&work, "absent"), "-o", &image],
        &["build", &tree, "-o", &image, "--chunk-dict", &at(&work, "tree/a")],
    ] {
        let output = sluice(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}");
        assert!(stderr(&output).starts_with("sluice: "), "{}", stderr(&output));
        // Neither inside of the source nor where an image was to be.
        assert!(!Path::new(&at(&work, "tree/deep")).exists());
        assert!(arguments.contains(&"--chunk-dict") || !Path::new(&image).exists());
    }
}

#[test]
fn what_an_interrupted_build_left_goes_with_the_next() {
    let work = work();
    let (tree, image) = (at(&work, "tree"), at(&work, "image"));
    let abandoned = Path::new(&image).join(".sluice-work-1-0");
    fs::create_dir_all(&abandoned).expect("a folder");
    fs::write(abandoned.join(".blob-1-0.partial"), b"half a blob").expect("written");
    let built = sluice(&["build", &tree, "-o", &image, "--chunk-size", "64K"]);
    assert!(built.status.success(), "{}", stderr(&built));
    let mut names: Vec<String> = fs::read_dir(&image)
        .expect("a folder")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    assert_eq!((names.len(), names[1].as_str()), (2, "image.boot"), "{names:?}");
}

#[test]
fn an_interrupted_build_leaves_nothing_unfinished() {
    let work = work();
    let (tree, image) = (at(&work, "tree"), at(&work, "image"));
    // A pipe for a dictionary: the build has its directory and waits for its first byte.
    let pipe = at(&work, "pipe");
    nix::unistd::mkfifo(pipe.as_str(), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let mut build = std::process::Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(["build", &tree, "-o", &image, "--chunk-dict", &pipe])
        .spawn()
        .expect("the program runs");
    // Opens when the build does.
    let end = fs::OpenOptions::new().write(true).open(&pipe).expect("a pipe");
    assert_eq!(fs::read_dir(&image).expect("a folder").count(), 1);
    let pid = nix::unistd::Pid::from_raw(build.id() as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("it lives");
    assert_eq!(build.wait().expect("it ends").code(), Some(143));
    drop(end);
    assert_eq!(fs::read_dir(&image).expect("a folder").count(), 0);
}

#[test]
fn unpacking_refuses_wrong_bytes_and_places_that_are_not_empty() {
    let work = work();
    let (tree, image, back) = (at(&work, "tree"), at(&work, "image"), at(&work, "back"));
    let built = sluice(&["build", &tree, "-o", &image, "--compressor", "none", "--json"]);
    let report: Value = serde_json::from_slice(&built.stdout).expect("JSON");
    let blob = Path::new(&image).join(report["blobs"][0]["id"].as_str().expect("an id"));
    let full = sluice(&["unpack", &image, &tree]);
    assert_eq!(full.status.code(), Some(1));
    assert!(stderr(&full).contains("is not empty"), "{}", stderr(&full));
    let whole = fs::read(&blob).expect("the blob");
    let mut wrong = whole.clone();
    wrong[100] ^= 1;
    fs::write(&blob, wrong).expect("written");
    let refused = sluice(&["unpack", &image, &back]);
    assert_eq!(refused.status.code(), Some(1));
    assert!(stderr(&refused).contains("/a: "), "{}", stderr(&refused));
    assert!(stderr(&refused).contains("digest"), "{}", stderr(&refused));
    fs::write(&blob, &whole[..50]).expect("written");
    let cut = sluice(&["unpack", &image, &at(&work, "other")]);
    assert!(stderr(&cut).contains("it is cut short"), "{}", stderr(&cut));
    fs::remove_file(&blob).expect("removed");
    let absent = sluice(&["unpack", &image, &at(&work, "third")]);
    assert!(stderr(&absent).contains("there is no blob"), "{}", stderr(&absent));
}
