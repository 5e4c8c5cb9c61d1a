//! A walk over every name of an image.
//!
//! Ends on any input: no directory is entered twice, paths have a limit, and all directories
//! together are not larger than the bootstrap they are in.

use super::erofs::{DirectoryEntry, Tree};
use super::inode::{FileKind, Inode};
use crate::config::TREE_PATH_MAX_BYTES;
use crate::error::Result;
use std::collections::HashSet;

/// One name met on a walk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visit {
    /// From the root, without a leading `/`; empty for the root itself.
    pub path: Vec<u8>,
    /// What is there. Hard links are visited once for each name, with one `nid`.
    pub inode: Inode,
}

/// All names of an image: a directory before what is in it, names ascending. Ends behind the
/// first error.
#[derive(Clone, Debug)]
pub struct Walk<'a> {
    tree: Tree<'a>,
    started: bool,
    path: Vec<u8>,
    /// Directories being read, the length of their paths with them.
    open: Vec<(usize, std::vec::IntoIter<DirectoryEntry<'a>>)>,
    entered: HashSet<u64>,
    /// Bytes that directories may still have.
    budget_bytes: u64,
}

impl<'a> Tree<'a> {
    /// Visits every name.
    pub fn walk(self) -> Walk<'a> {
        Walk {
            tree: self,
            started: false,
            path: Vec::new(),
            open: Vec::new(),
            entered: HashSet::new(),
            budget_bytes: self.bootstrap.size_bytes(),
        }
    }
}

impl<'a> Walk<'a> {
    fn step(&mut self) -> Result<Option<Visit>> {
        if !self.started {
            self.started = true;
            let inode = self.tree.root()?;
            self.enter(&inode)?;
            return Ok(Some(Visit { path: Vec::new(), inode }));
        }
        while let Some((length, entries)) = self.open.last_mut() {
            self.path.truncate(*length);
            let Some(entry) = entries.next() else {
                self.open.pop();
                continue;
            };
            return self.visit(entry).map(Some);
        }
        Ok(None)
    }

    fn visit(&mut self, entry: DirectoryEntry<'a>) -> Result<Visit> {
        if !self.path.is_empty() {
            self.path.push(b'/');
        }
        self.path.extend_from_slice(entry.name);
        if self.path.len() > TREE_PATH_MAX_BYTES {
            return Err(unsupported!("a path longer than {TREE_PATH_MAX_BYTES} bytes"));
        }
        let inode = self.tree.inode(entry.nid)?;
        if inode.kind != entry.kind {
            return Err(malformed!("a directory says {}, inode {}", entry.kind, inode.kind));
        }
        if inode.kind == FileKind::Directory {
            self.enter(&inode)?;
        }
        Ok(Visit { path: self.path.clone(), inode })
    }

    fn enter(&mut self, directory: &Inode) -> Result<()> {
        if !self.entered.insert(directory.nid) {
            return Err(malformed!("directory inode {} is in two places", directory.nid));
        }
        let left = self.budget_bytes.checked_sub(directory.size);
        self.budget_bytes =
            left.ok_or_else(|| malformed!("directories larger than the bootstrap they are in"))?;
        self.open.push((self.path.len(), self.tree.read_dir(directory)?.into_iter()));
        Ok(())
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Visit>;

    fn next(&mut self) -> Option<Self::Item> {
        let step = self
            .step()
            .map_err(|error| error.context(format!("at /{}", String::from_utf8_lossy(&self.path))));
        if step.is_err() {
            self.open.clear();
        }
        step.transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::super::specimen_tests::{IMAGES, Specimen, root};
    use super::super::{DigestAlgorithm, Layout};
    use super::*;
    use std::collections::HashMap;

    /// A line of tree.txt, as tests/fixtures/list.py prints it.
    fn describe(
        image: &Specimen,
        spaces: &[(Layout, Vec<u8>)],
        visit: &Visit,
        first: &str,
    ) -> String {
        let tree = image.bootstrap.tree();
        let (inode, path) = (&visit.inode, display_path(&visit.path));
        // The root of an image has no time; the source's has.
        let mtime = if visit.path.is_empty() { 1_700_000_000 } else { inode.mtime_seconds };
        let mut line = format!("{path} {:#o} {}:{} {mtime}", inode.mode, inode.uid, inode.gid);
        line.push(' ');
        match inode.kind {
            FileKind::File => {
                let mut data = Vec::new();
                for chunk in tree.file_chunks(inode).unwrap() {
                    let chunk = chunk.unwrap();
                    let (layout, space) = &spaces[chunk.blob_index as usize];
                    let layout_chunk = layout.chunk(chunk.index);
                    assert_eq!(layout_chunk.uncompressed_offset, chunk.uncompressed_offset);
                    assert_eq!(layout_chunk.size, chunk.size);
                    let start = chunk.uncompressed_offset as usize;
                    data.extend_from_slice(&space[start..start + chunk.size as usize]);
                }
                let digest = DigestAlgorithm::Sha256.digest(&data);
                let link = if inode.link_count > 1 { first } else { "-" };
                line.push_str(&format!("{} {digest} link={link}", data.len()));
            }
            FileKind::Link => {
                let target = tree.read_link(inode).unwrap();
                line.push_str(&format!("-> {}", String::from_utf8(target).unwrap()));
            }
            FileKind::CharacterDevice | FileKind::BlockDevice => {
                let (major, minor) = inode.device().unwrap();
                line.push_str(&format!("{major}:{minor}"));
            }
            _ => {}
        }
        let mut xattrs: Vec<String> = Vec::new();
        for xattr in tree.xattrs(inode).unwrap() {
            let value: String = xattr.value.iter().map(|byte| format!("{byte:02x}")).collect();
            xattrs.push(format!("{}={value}", String::from_utf8(xattr.name).unwrap()));
        }
        xattrs.sort();
        if matches!(inode.kind, FileKind::File | FileKind::Directory) {
            line.push_str(&format!(" {}", xattrs.join(",")));
        }
        line.trim_end().to_string()
    }

    fn display_path(path: &[u8]) -> String {
        // As Python prints a string.
        let text = if path.is_empty() { b"." } else { path };
        let text = String::from_utf8(text.to_vec()).unwrap();
        let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
        let text = text.replace('\\', "\\\\").replace('\n', "\\n").replace('\t', "\\t");
        format!("{quote}{text}{quote}")
    }

    #[test]
    fn every_fixture_has_exactly_the_tree_it_was_made_from() {
        let expected = std::fs::read_to_string(root().join("tree.txt")).unwrap();
        // The name a hard link is listed under depends on the order of a walk.
        let blur = |line: &str| match line.find(" link=") {
            Some(at) if !line[at..].starts_with(" link=-") => {
                let rest = line[at + 1..].split_once(' ').map_or("", |(_, rest)| rest);
                format!("{} {rest}", &line[..at]).trim_end().to_string()
            }
            _ => line.to_string(),
        };
        let mut expected: Vec<String> = expected.lines().map(blur).collect();
        expected.sort();
        for name in IMAGES {
            let image = Specimen::fixture(name);
            let blobs = image.bootstrap.blobs().len();
            let spaces: Vec<_> =
                (0..blobs).map(|blob| (image.layout(blob), image.address_space(blob))).collect();
            let mut first: HashMap<u64, String> = HashMap::new();
            let mut found = Vec::new();
            for visit in image.bootstrap.tree().walk() {
                let visit = visit.unwrap();
                let name = display_path(&visit.path);
                let first = first.entry(visit.inode.nid).or_insert(name).clone();
                found.push(blur(&describe(&image, &spaces, &visit, &first)));
            }
            found.sort();
            let differ = found.iter().zip(&expected).find(|(found, expected)| found != expected);
            assert_eq!(differ, None, "{name}");
            assert_eq!(found.len(), expected.len());
        }
    }
}
