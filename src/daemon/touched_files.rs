//! From bytes of blobs to bytes of files: what a start touched, in the words of `sluice optimize`.
//!
//! A line is a JSON object: path, offset, length, t_ms. Ranges are those the kernel asked for, cut
//! at chunks; each chunk is told of once. Reads the bootstrap: blocks on the disk.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Value, json};

use crate::blob::recorder::Fault;
use crate::blob::registration::Image;
use crate::config::MILLISECOND_NS;
use crate::error::Result;
use crate::image::bootstrap::Bootstrap;
use crate::image::inode::FileKind;

/// The lines of a trace.
///
/// # Errors
/// A bootstrap that is gone or has changed.
pub fn lines(image: &Image, faults: &[Fault]) -> Result<Vec<Value>> {
    let bootstrap = Bootstrap::parse(image.read_bootstrap()?)?;
    let names = Names::of(&bootstrap)?;
    let touches = names.touches(faults);
    let line = |touch: &Touch<'_>| {
        json!({
            "path": format!("/{}", String::from_utf8_lossy(touch.path)),
            "offset": touch.offset,
            "length": touch.length,
            "t_ms": touch.elapsed_ns as f64 / MILLISECOND_NS as f64,
        })
    };
    Ok(touches.iter().map(line).collect())
}

/// The files whose bytes lie where in the blobs; of several with one chunk the first.
struct Names {
    paths: Vec<Vec<u8>>,
    /// By blob and place in its address space.
    chunks: BTreeMap<(u32, u64), Piece>,
}

struct Piece {
    path: usize,
    file_offset: u64,
    size: u64,
}

/// The first touch of a chunk.
#[derive(Debug, PartialEq, Eq)]
struct Touch<'a> {
    path: &'a [u8],
    offset: u64,
    length: u64,
    elapsed_ns: u64,
}

impl Names {
    fn of(bootstrap: &Bootstrap) -> Result<Names> {
        let tree = bootstrap.tree();
        let mut names = Names { paths: Vec::new(), chunks: BTreeMap::new() };
        for visit in tree.walk() {
            let visit = visit?;
            if visit.inode.kind != FileKind::File || visit.inode.size == 0 {
                continue;
            }
            for chunk in tree.file_chunks(&visit.inode)? {
                let chunk = chunk?;
                let (path, file_offset) = (names.paths.len(), chunk.file_offset);
                let piece = Piece { path, file_offset, size: chunk.size.into() };
                let place = (chunk.blob_index, chunk.uncompressed_offset);
                names.chunks.entry(place).or_insert(piece);
            }
            names.paths.push(visit.path);
        }
        Ok(names)
    }

    /// The chunks that faults touched, each once.
    fn touches(&self, faults: &[Fault]) -> Vec<Touch<'_>> {
        let (mut seen, mut touches) = (HashSet::new(), Vec::new());
        for fault in faults {
            let (blob, start, end) = (fault.blob_index, fault.range.start, fault.range.end);
            // The last chunk that begins before the range, and all that begin in it.
            let before = self.chunks.range(..=(blob, start)).next_back();
            let first = before.map_or((blob, start), |(place, _)| *place).max((blob, 0));
            for (&(_, at), piece) in self.chunks.range(first..(blob, end.max(first.1))) {
                let (from, to) = (start.max(at), end.min(at + piece.size));
                if from >= to || !seen.insert((blob, at)) {
                    continue;
                }
                touches.push(Touch {
                    path: &self.paths[piece.path],
                    offset: piece.file_offset + (from - at),
                    length: to - from,
                    elapsed_ns: fault.elapsed_ns,
                });
            }
        }
        touches
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        let piece = |path, file_offset, size| Piece { path, file_offset, size };
        let chunks = [
            ((0, 0), piece(0, 0, 4096)),
            ((0, 4096), piece(0, 4096, 100)),
            ((0, 8192), piece(1, 0, 5000)),
            ((1, 0), piece(2, 0, 10)),
        ];
        let paths = ["a", "b", "c"].map(|path| path.into()).to_vec();
        Names { paths, chunks: chunks.into() }
    }

    fn fault(blob_index: u32, range: std::ops::Range<u64>, elapsed_ns: u64) -> Fault {
        Fault { blob_index, range, elapsed_ns }
    }

    #[test]
    fn faults_become_the_first_touches_of_files() {
        let names = names();
        let touch = |path: &'static str, offset, length, elapsed_ns| Touch {
            path: path.as_bytes(),
            offset,
            length,
            elapsed_ns,
        };
        let faults = [
            fault(0, 12288..16384, 1),
            fault(0, 0..12288, 2),
            fault(1, 0..4096, 3),
            fault(2, 0..4096, 4),
            fault(0, 0..4096, 5),
            fault(0, 5000..5001, 6),
        ];
        let expected = [
            // A page of the second half of b, then all of a in its two chunks.
            touch("b", 4096, 904, 1),
            touch("a", 0, 4096, 2),
            touch("a", 4096, 100, 2),
            touch("c", 0, 10, 3),
        ];
        assert_eq!(names.touches(&faults), expected);
        assert!(names.touches(&[fault(0, 4096 + 100..8192, 1)]).is_empty(), "a gap is no file's");
    }
}
