//! The tree the test images were made from, and whether a mounted one equals it.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::truth::folder;

/// The tree the test images were made from, unpacked.
pub fn source(home: &Path) -> PathBuf {
    let place = home.join("source");
    std::fs::create_dir_all(&place).expect("a folder");
    let mut unpack = Command::new("tar");
    unpack.arg("-xpzf").arg(folder("source.tar.gz")).arg("-C").arg(&place);
    assert!(unpack.status().expect("tar").success());
    place
}

/// Regular files of a tree with their bytes, by path below the root.
pub fn files(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let (mut found, mut folders) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder").flatten() {
            let kind = entry.file_type().expect("a kind");
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                let bytes = std::fs::read(entry.path()).expect("a file");
                let path = entry.path().strip_prefix(root).expect("below the root").to_owned();
                found.push((path, bytes));
            }
        }
    }
    found.sort();
    found
}

/// What list.py says of a tree, sorted, without the root, whose time an image does not keep.
pub fn list(root: &Path) -> Vec<String> {
    let output = Command::new("python3").arg(folder("list.py")).arg(root).output();
    let output = output.expect("python3");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    sorted(&String::from_utf8(output.stdout).expect("text"))
}

/// What it says of the tree the test images were made from.
pub fn listed_source() -> Vec<String> {
    sorted(&std::fs::read_to_string(folder("tree.txt")).expect("a fixture"))
}

fn sorted(text: &str) -> Vec<String> {
    let lines = text.lines().filter(|line| !line.starts_with("'.' "));
    let mut lines: Vec<_> = lines.map(str::to_owned).collect();
    lines.sort();
    lines
}

/// Fails with the first line that differs.
pub fn assert_same_tree(root: &Path) {
    let (found, expected) = (list(root), listed_source());
    let differ = found.iter().zip(&expected).find(|(found, expected)| found != expected);
    assert_eq!(differ, None, "{}", root.display());
    assert_eq!(found.len(), expected.len(), "{}", root.display());
}
