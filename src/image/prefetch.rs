//! What an image's builder wants fetched first: the files of its prefetch table, and all that is
//! below the directories in it, as ranges of one blob; and whether a blob is nothing but that.

use std::collections::HashSet;
use std::ops::Range;

use super::bootstrap::Bootstrap;
use super::erofs::Tree;
use super::files::ENTRY_BYTES;
use super::inode::{DataLayout, FileKind, Inode};
use crate::config::{PREFETCH_GAP_BYTES, START_TOUCHED_MAX_BYTES};
use crate::error::Result;

/// Ranges of a blob's address space in the order of the table. What follows closely behind the one
/// before is joined to it, with what is between. Empty if nothing is listed.
///
/// # Errors
/// `Malformed` for a table, an inode or a directory that is; no input takes longer than the
/// bootstrap is large.
pub fn listed_ranges(bootstrap: &Bootstrap, blob_index: u32) -> Result<Vec<Range<u64>>> {
    let mut listing = Listing {
        tree: bootstrap.tree(),
        blob_index,
        ranges: Vec::new(),
        seen: HashSet::new(),
        budget_bytes: bootstrap.size_bytes(),
    };
    for nid in bootstrap.prefetch_nids() {
        listing.add(nid)?;
    }
    Ok(listing.ranges)
}

/// The size of an image's first blob when that is a start, as `build/optimize.rs` makes them: it
/// has nothing but what the listed files need, there are other blobs for the rest, and it is no
/// larger than what is fetched for a start. 0 otherwise.
///
/// An image that lists a directory asks for a prefetch of much or of everything, which is for the
/// one who mounts it to allow.
///
/// # Errors
/// As [`listed_ranges`].
pub fn start_bytes(bootstrap: &Bootstrap) -> Result<u64> {
    let [first, _, ..] = bootstrap.blobs() else { return Ok(0) };
    let is_short = first.uncompressed_size <= START_TOUCHED_MAX_BYTES;
    if !is_short || bootstrap.prefetch_nids().next().is_none() {
        return Ok(0);
    }
    for nid in bootstrap.prefetch_nids() {
        if bootstrap.tree().inode(nid)?.kind != FileKind::File {
            return Ok(0);
        }
    }
    let mut ranges = listed_ranges(bootstrap, first.index)?;
    ranges.sort_unstable_by_key(|range| range.start);
    let mut ranges = ranges.into_iter().peekable();
    let is_listed = bootstrap.chunks_of(first.index).all(|chunk| {
        // Chunks come by their offsets, so that no range is needed twice.
        while ranges.next_if(|range| range.end <= chunk.uncompressed_offset).is_some() {}
        ranges.peek().is_some_and(|range| range.start <= chunk.uncompressed_offset)
    });
    Ok(if is_listed { first.uncompressed_size } else { 0 })
}

struct Listing<'a> {
    tree: Tree<'a>,
    blob_index: u32,
    ranges: Vec<Range<u64>>,
    /// Inodes that have been added: one that is listed twice, or has two names, counts once.
    seen: HashSet<u64>,
    /// Bytes that directories and tables of chunks may still have, all together.
    budget_bytes: u64,
}

impl Listing<'_> {
    /// Adds an inode and all below it, names ascending.
    fn add(&mut self, nid: u64) -> Result<()> {
        let mut waiting = vec![nid];
        while let Some(nid) = waiting.pop() {
            if !self.seen.insert(nid) {
                continue;
            }
            let inode = self.tree.inode(nid)?;
            match inode.kind {
                FileKind::Directory => {
                    self.spend(inode.size)?;
                    let entries = self.tree.read_dir(&inode)?;
                    waiting.extend(entries.iter().rev().map(|entry| entry.nid));
                }
                FileKind::File if inode.layout == DataLayout::Chunked => self.add_file(&inode)?,
                // It has no data, or has it in the bootstrap.
                _ => {}
            }
        }
        Ok(())
    }

    fn add_file(&mut self, file: &Inode) -> Result<()> {
        let chunks = self.tree.file_chunks(file)?;
        self.spend((chunks.len() * ENTRY_BYTES) as u64)?;
        for chunk in chunks {
            let chunk = chunk?;
            if chunk.blob_index != self.blob_index {
                continue;
            }
            let start = chunk.uncompressed_offset;
            let end = start + u64::from(chunk.size);
            match self.ranges.last_mut() {
                Some(last) if (last.end..=last.end + PREFETCH_GAP_BYTES).contains(&start) => {
                    last.end = end;
                }
                _ => self.ranges.push(start..end),
            }
        }
        Ok(())
    }

    fn spend(&mut self, bytes: u64) -> Result<()> {
        let left = self.budget_bytes.checked_sub(bytes);
        self.budget_bytes =
            left.ok_or_else(|| malformed!("what is listed for prefetch overlaps itself"))?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::draft_tests::put;
    use super::super::specimen_tests::Specimen;
    use super::super::superblock::BLOCK_BYTES;
    use super::*;

    /// Where the superblock says where the table is, and how long.
    const TABLE: usize = 1152 + 40;

    /// The fixture with another prefetch table.
    fn listing(nids: &[u64]) -> Bootstrap {
        let mut bytes = Specimen::fixture("zstd-64k").bootstrap.bytes().to_vec();
        let at = bytes.len();
        bytes.extend(nids.iter().flat_map(|&nid| (nid as u32).to_le_bytes()));
        bytes.resize(bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        put(&mut bytes, TABLE, &(at as u64).to_le_bytes());
        put(&mut bytes, TABLE + 8, &(nids.len() as u32 * 4).to_le_bytes());
        Bootstrap::parse(bytes).expect("a good bootstrap")
    }

    /// The fixture's regular files with data, and the number of its root.
    fn files() -> (Vec<Inode>, u64) {
        let image = Specimen::fixture("zstd-64k").bootstrap;
        let inodes = image.tree().walk().map(|visit| visit.expect("a good tree").inode);
        let has_data = |it: &Inode| it.kind == FileKind::File && it.size > 0;
        (inodes.filter(has_data).collect(), image.superblock().root_nid)
    }

    fn starts(bootstrap: &Bootstrap, file: &Inode) -> Vec<u64> {
        let chunks = bootstrap.tree().file_chunks(file).expect("it has chunks");
        chunks.map(|chunk| chunk.expect("a good one").uncompressed_offset).collect()
    }

    #[test]
    fn a_directory_stands_for_all_below_it() {
        let (files, root) = files();
        let image = listing(&[root]);
        let ranges = listed_ranges(&image, 0).expect("a good list");
        let is_in = |at: &u64| ranges.iter().any(|range| range.contains(at));
        for file in files {
            assert!(starts(&image, &file).iter().all(is_in), "inode {}", file.nid);
        }
        assert_eq!(listed_ranges(&image, 1), Ok(vec![]), "there is no such blob");
        assert_eq!(listed_ranges(&listing(&[]), 0), Ok(vec![]));
    }

    #[test]
    fn files_come_in_the_order_of_the_table_and_once() {
        let (files, _) = files();
        let far = |it: &&Inode| {
            let image = listing(&[]);
            starts(&image, it)[0].abs_diff(starts(&image, &files[0])[0]) > 2 * PREFETCH_GAP_BYTES
        };
        let (one, two) = (&files[0], files.iter().find(far).expect("the blob is long"));
        let image = listing(&[two.nid, one.nid, two.nid]);
        let ranges = listed_ranges(&image, 0).expect("a good list");
        assert_eq!(ranges.len(), 2);
        let [first, second] = [two, one].map(|file| starts(&image, file)[0]);
        assert_eq!((ranges[0].start, ranges[1].start), (first, second));
    }

    #[test]
    fn an_image_of_one_blob_has_no_start_in_it() {
        let (files, root) = files();
        let every: Vec<u64> = files.iter().map(|file| file.nid).collect();
        for nids in [&[][..], &[root], &every] {
            assert_eq!(start_bytes(&listing(nids)), Ok(0));
        }
    }

    #[test]
    fn a_table_of_nonsense_is_an_error() {
        let outside = listed_ranges(&listing(&[u32::MAX.into()]), 0);
        assert!(outside.is_err(), "{outside:?}");
        // Every 32 bytes may look like an inode.
        let every: Vec<u64> = (1..20_000).collect();
        assert!(listed_ranges(&listing(&every), 0).is_err());
    }

    #[test]
    fn what_is_listed_ends_with_the_bytes_there_are() {
        let (files, root) = files();
        let image = listing(&[root]);
        let listed_within = |budget_bytes, nid| {
            let (tree, ranges, seen) = (image.tree(), Vec::new(), HashSet::new());
            let mut listing = Listing { tree, blob_index: 0, ranges, seen, budget_bytes };
            listing.add(nid).map_err(|error| error.to_string())
        };
        let file = files.iter().max_by_key(|file| file.size).expect("there are files");
        let entries_bytes = (starts(&image, file).len() * ENTRY_BYTES) as u64;
        let root_bytes = image.tree().root().expect("a directory").size;
        assert_eq!(listed_within(entries_bytes, file.nid), Ok(()));
        for refused in [listed_within(entries_bytes - 1, file.nid), listed_within(root_bytes, root)]
        {
            assert!(refused.is_err_and(|error| error.contains("overlaps itself")));
        }
    }
}
