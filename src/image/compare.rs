//! What differs between two images, by their bootstraps alone.
//!
//! Files are compared by name; their data by the digests of their chunks, which says nothing when
//! the images cut or digest differently: then equal sizes count as undecided.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::bootstrap::Bootstrap;
use super::digest::Digest;
use super::inode::{FileKind, Inode};
use super::walk::Visit;
use crate::error::Result;

/// What differs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Names only the second image has, ascending.
    pub added: Vec<Name>,
    /// Names only the first image has, ascending.
    pub removed: Vec<Name>,
    /// Names both have, ascending, and what of them differs.
    pub changed: Vec<(Name, Vec<Aspect>)>,
    /// Names of which everything is equal.
    pub equal_count: u64,
    /// Files of equal size whose data could not be compared.
    pub undecided_count: u64,
    /// Chunks of the first image only, of both, of the second only.
    pub chunks: [ChunkSum; 3],
    /// Blobs both images need.
    pub shared_blobs: Vec<String>,
}

/// A name in an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name {
    /// From the root, without a leading `/`.
    pub path: Vec<u8>,
    /// What it is, in the later image that has it.
    pub kind: FileKind,
    /// Bytes of a regular file, 0 of everything else.
    pub size: u64,
}

/// Something two files can differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Aspect {
    /// What it is.
    Kind,
    /// Permissions.
    Mode,
    /// User or group.
    Owner,
    /// The last modification.
    Time,
    /// Extended attributes.
    Attributes,
    /// Data of a file, target of a link, number of a device.
    Content,
}

/// Distinct chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkSum {
    /// How many.
    pub count: u64,
    /// Bytes of data.
    pub bytes: u64,
    /// Bytes as stored.
    pub stored_bytes: u64,
}

/// One image while it is compared.
struct Side<'a> {
    bootstrap: &'a Bootstrap,
    /// By blob and position in it.
    digests: HashMap<(u32, u32), Digest>,
}

/// Compares an image with a later one.
pub fn compare(before: &Bootstrap, after: &Bootstrap) -> Result<Comparison> {
    let mut comparison = Comparison {
        chunks: compare_chunks(before, after),
        shared_blobs: shared_blobs(before, after),
        ..Comparison::default()
    };
    let (left, right) = (Side::of(before), Side::of(after));
    let mut known: BTreeMap<Vec<u8>, Inode> = BTreeMap::new();
    for visit in before.tree().walk() {
        let Visit { path, inode } = visit?;
        known.insert(path, inode);
    }
    for visit in after.tree().walk() {
        let Visit { path, inode } = visit?;
        let Some(old) = known.remove(&path) else {
            comparison.added.push(Name::of(path, &inode));
            continue;
        };
        let mut aspects = metadata(&left, &old, &right, &inode)?;
        match same_content(&left, &old, &right, &inode)? {
            Some(true) => {}
            Some(false) => aspects.push(Aspect::Content),
            None => comparison.undecided_count += 1,
        }
        match aspects.is_empty() {
            true => comparison.equal_count += 1,
            false => comparison.changed.push((Name::of(path, &inode), aspects)),
        }
    }
    comparison.removed = known.into_iter().map(|(path, inode)| Name::of(path, &inode)).collect();
    comparison.added.sort_by(|a, b| a.path.cmp(&b.path));
    comparison.changed.sort_by(|(a, _), (b, _)| a.path.cmp(&b.path));
    Ok(comparison)
}

impl Name {
    fn of(path: Vec<u8>, inode: &Inode) -> Self {
        let size = if inode.kind == FileKind::File { inode.size } else { 0 };
        Name { path, kind: inode.kind, size }
    }
}

impl<'a> Side<'a> {
    fn of(bootstrap: &'a Bootstrap) -> Self {
        let digest = |chunk: super::ChunkRecord| ((chunk.blob_index, chunk.index.0), chunk.digest);
        Side { bootstrap, digests: bootstrap.chunks().map(digest).collect() }
    }

    /// The digests of a file's chunks; `None` in the place of one the bootstrap does not list.
    fn file(&self, file: &Inode) -> Result<Vec<Option<Digest>>> {
        let chunks = self.bootstrap.tree().file_chunks(file)?;
        let digest =
            |chunk: super::FileChunk| self.digests.get(&(chunk.blob_index, chunk.index.0)).copied();
        chunks.map(|chunk| chunk.map(digest)).collect()
    }

    fn xattrs(&self, inode: &Inode) -> Result<Vec<(Vec<u8>, Vec<u8>)>> {
        let xattrs = self.bootstrap.tree().xattrs(inode)?;
        let mut pairs: Vec<_> =
            xattrs.into_iter().map(|xattr| (xattr.name, xattr.value.to_vec())).collect();
        pairs.sort();
        Ok(pairs)
    }
}

fn metadata(left: &Side<'_>, old: &Inode, right: &Side<'_>, new: &Inode) -> Result<Vec<Aspect>> {
    let time = |inode: &Inode| (inode.mtime_seconds, inode.mtime_nanoseconds);
    let facts = [
        (Aspect::Kind, old.kind == new.kind),
        (Aspect::Mode, old.mode & 0o7777 == new.mode & 0o7777),
        (Aspect::Owner, (old.uid, old.gid) == (new.uid, new.gid)),
        (Aspect::Time, time(old) == time(new)),
        (Aspect::Attributes, left.xattrs(old)? == right.xattrs(new)?),
    ];
    Ok(facts.into_iter().filter(|(_, is_same)| !is_same).map(|(aspect, _)| aspect).collect())
}

/// `None` when only reading the data could tell.
fn same_content(
    left: &Side<'_>,
    old: &Inode,
    right: &Side<'_>,
    new: &Inode,
) -> Result<Option<bool>> {
    if old.kind != new.kind {
        return Ok(Some(false));
    }
    match old.kind {
        FileKind::File if old.size != new.size => Ok(Some(false)),
        FileKind::File if old.size == 0 => Ok(Some(true)),
        FileKind::File => {
            let (one, other) = (left.bootstrap.superblock(), right.bootstrap.superblock());
            let is_comparable = one.chunk_size == other.chunk_size
                && one.digest_algorithm == other.digest_algorithm;
            match is_comparable {
                true => Ok(Some(left.file(old)? == right.file(new)?)),
                false => Ok(None),
            }
        }
        FileKind::Link => {
            let (old, new) =
                (left.bootstrap.tree().read_link(old)?, right.bootstrap.tree().read_link(new)?);
            Ok(Some(old == new))
        }
        _ => Ok(Some(old.device() == new.device())),
    }
}

fn compare_chunks(before: &Bootstrap, after: &Bootstrap) -> [ChunkSum; 3] {
    let old: HashSet<Digest> = before.chunks().map(|chunk| chunk.digest).collect();
    let mut new = HashSet::new();
    let mut sums = [ChunkSum::default(); 3];
    for chunk in after.chunks().filter(|chunk| new.insert(chunk.digest)) {
        sums[if old.contains(&chunk.digest) { 1 } else { 2 }].add(&chunk);
    }
    let mut seen = HashSet::new();
    for chunk in before.chunks() {
        if !new.contains(&chunk.digest) && seen.insert(chunk.digest) {
            sums[0].add(&chunk);
        }
    }
    sums
}

fn shared_blobs(before: &Bootstrap, after: &Bootstrap) -> Vec<String> {
    let old: HashSet<&str> = before.blobs().iter().map(|blob| blob.id.as_str()).collect();
    let shared = after.blobs().iter().map(|blob| blob.id.as_str()).filter(|id| old.contains(id));
    shared.map(str::to_owned).collect()
}

impl ChunkSum {
    fn add(&mut self, chunk: &super::ChunkRecord) {
        self.count += 1;
        self.bytes += u64::from(chunk.uncompressed_size);
        self.stored_bytes += u64::from(chunk.compressed_size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> Bootstrap {
        let path = format!("{}/tests/fixtures/{name}/image.boot", env!("CARGO_MANIFEST_DIR"));
        Bootstrap::parse(std::fs::read(path).unwrap()).unwrap()
    }

    #[test]
    fn an_image_does_not_differ_from_itself() {
        let image = fixture("lz4-1m");
        let found = compare(&image, &image).unwrap();
        assert_eq!((found.added.len(), found.removed.len(), found.changed.len()), (0, 0, 0));
        assert_eq!((found.equal_count, found.undecided_count), (387, 0));
        assert_eq!((found.chunks[0].count, found.chunks[2].count), (0, 0));
        assert!(found.chunks[1].count > 0 && found.shared_blobs.len() == image.blobs().len());
    }

    #[test]
    fn the_same_tree_cut_otherwise_is_undecided_but_for_small_things() {
        let found = compare(&fixture("lz4-1m"), &fixture("zstd-64k")).unwrap();
        assert!(found.added.is_empty() && found.removed.is_empty());
        assert!(found.undecided_count > 0);
        assert!(found.changed.iter().all(|(_, aspects)| !aspects.contains(&Aspect::Content)));
    }
}
