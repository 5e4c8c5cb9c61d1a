//! Layers with every trick, built and read back by every way there is, against what umoci or GNU
//! tar make of them as root.
//!
//! tests/layers/make.py writes the layers and unpacks them with the tool it trusts. Needs root,
//! python3, umoci, tar, gzip and zstd, and a kernel that mounts EROFS files.

mod support;

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use sluice::build::{Builder, Compression, Options};
use support::image::{Folder, list};

fn options(threads: usize) -> Options {
    Options {
        compression: Compression::Zstd(3),
        chunk_size: 64 << 10,
        threads,
        ..Options::default()
    }
}

fn make(arguments: &[&str]) -> String {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/layers/make.py");
    let output = Command::new("python3").arg(script).args(arguments).output().expect("it runs");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    String::from_utf8(output.stdout).expect("text")
}

/// Builds the image of the layers 1.tar, 2.tar, ... of a folder.
fn build(work: &Path) -> Folder {
    let out = work.join("image");
    std::fs::create_dir(&out).expect("a folder");
    let mut builder = Builder::new(options(2), &out).expect("good options");
    for number in 1.. {
        let Ok(layer) = File::open(work.join(format!("{number}.tar"))) else { break };
        builder.add_tar(layer, &|_| ()).expect("a layer");
    }
    Folder::of(&out, &builder.finish().expect("an image"))
}

/// Directories that no layer describes have no time in an image; other tools give them today's.
fn without_times_of(lines: &[String], undescribed: &HashSet<String>) -> Vec<String> {
    let blur = |line: &String| match undescribed.get(&key(line)) {
        Some(key) => key.clone(),
        None => line.clone(),
    };
    let mut lines: Vec<String> = lines.iter().map(blur).collect();
    lines.sort();
    lines
}

/// Path, mode and owner: what stands before the time.
fn key(line: &str) -> String {
    let quote = line.chars().next().expect("a line");
    let end = line[1..].rfind(quote).map_or(0, |at| at + 2);
    let fields: Vec<&str> = line[end..].split(' ').collect();
    format!("{} {}", &line[..end], fields[1..3].join(" "))
}

fn assert_same(found: &[String], expected: &[String], what: &str) {
    let undescribed: HashSet<String> = found
        .iter()
        .filter(|line| line.contains(" 0o40") && line.ends_with(" 0"))
        .map(|line| key(line))
        .collect();
    let (found, expected) =
        (without_times_of(found, &undescribed), without_times_of(expected, &undescribed));
    let differ = found.iter().zip(&expected).find(|(found, expected)| found != expected);
    assert_eq!(differ, None, "{what}");
    assert_eq!(found.len(), expected.len(), "{what}");
}

#[test]
fn images_of_layers_are_what_other_tools_unpack() {
    for scenario in make(&[]).lines() {
        let work = tempfile::tempdir().expect("a folder");
        make(&[scenario, work.path().to_str().expect("text")]);
        let expected_at = work.path().join("expected");
        let expected = list(&expected_at);
        assert!(expected.len() > 2, "{scenario}: {expected:?}");
        let image = build(work.path());
        assert_same(&image.unpacked(), &expected, &format!("{scenario}, unpacked"));
        let mounted = image.mount();
        assert_same(&list(&mounted.0), &expected, &format!("{scenario}, mounted"));
        if scenario == "times" {
            assert_times(&expected_at, &mounted.0);
        }
    }
}

fn assert_times(expected: &Path, found: &Path) {
    let mut compared = 0;
    for entry in std::fs::read_dir(expected).expect("a folder") {
        let name = entry.expect("an entry").file_name();
        let time = |root: &Path| {
            let metadata = std::fs::symlink_metadata(root.join(&name)).expect("it is there");
            (metadata.mtime(), metadata.mtime_nsec())
        };
        assert_eq!(time(expected), time(found), "{name:?}");
        compared += usize::from(time(found).1 != 0);
    }
    assert!(compared > 2, "times have nanoseconds");
}
