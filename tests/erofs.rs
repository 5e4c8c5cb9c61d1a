//! The kernel's view of an image, mounted for real: needs root and file-backed EROFS.
//!
//! Segments are filled by the tests with decoded and verified chunks; nobody listens for events.

mod support;

use std::path::{Path, PathBuf};
use std::process::Command;

use sluice::image::Bootstrap;
use support::registry::IMAGES;
use support::segments::Cache;
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
