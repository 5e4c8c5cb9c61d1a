//! A bootstrap's tree, walked whole: is every name readable, is every chunk a file uses listed.
//!
//! Owns what an image consists of by name: counts and faults. `Bootstrap::parse` has checked the
//! tables; this checks what refers to them. Memory: 16 bytes per listed chunk.

use std::collections::HashSet;

use crate::config;
use crate::error::{Error, Result};
use crate::image::{Bootstrap, ChunkIndex, FileChunk, FileKind, Inode};

/// What the walk found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Structure {
    /// Names, the root's included.
    pub name_count: u64,
    /// References of files to chunks, each file counted once.
    pub reference_count: u64,
    /// What is wrong, by path; at most `CHECK_FAULTS_MAX`.
    pub faults: Vec<String>,
    /// How much is wrong.
    pub fault_count: u64,
}

/// A bad chunk, and who uses it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Paths, at most `CHECK_FILES_MAX`.
    pub paths: Vec<String>,
    /// How many names use it.
    pub count: u64,
}

/// Where the chunk table says a chunk is.
struct Slot {
    index: u32,
    size: u32,
    uncompressed_offset: u64,
}

impl Structure {
    /// Walks the whole tree.
    pub fn of(bootstrap: &Bootstrap) -> Structure {
        let mut structure = Structure::default();
        let slots: Vec<Vec<Slot>> =
            (0..bootstrap.blobs().len() as u32).map(|blob| slots(bootstrap, blob)).collect();
        let mut linked = HashSet::new();
        for visit in bootstrap.tree().walk() {
            // The walk ends behind an error, which names the path.
            let visit = match visit {
                Ok(visit) => visit,
                Err(error) => {
                    structure.fault(error.to_string());
                    break;
                }
            };
            structure.name_count += 1;
            if visit.inode.link_count > 1
                && visit.inode.kind != FileKind::Directory
                && !linked.insert(visit.inode.nid)
            {
                continue;
            }
            if let Err(error) = structure.check(bootstrap, &visit.inode, &slots) {
                structure.fault(format!("{}: {error}", display(&visit.path)));
            }
        }
        structure
    }

    fn check(&mut self, bootstrap: &Bootstrap, inode: &Inode, slots: &[Vec<Slot>]) -> Result<()> {
        let tree = bootstrap.tree();
        tree.xattrs(inode)?;
        match inode.kind {
            FileKind::Link => tree.read_link(inode).map(drop),
            FileKind::File => {
                for chunk in tree.file_chunks(inode)? {
                    check_listed(&chunk?, slots)?;
                    self.reference_count += 1;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn fault(&mut self, text: String) {
        self.fault_count += 1;
        if self.faults.len() < config::CHECK_FAULTS_MAX {
            self.faults.push(text);
        }
    }
}

/// Which names use these chunks, in the order given. `bad` is sorted by blob and index.
pub fn users(bootstrap: &Bootstrap, bad: &[(u32, ChunkIndex)]) -> Vec<Users> {
    let mut users = vec![Users::default(); bad.len()];
    let tree = bootstrap.tree();
    let key = |&(blob, index): &(u32, ChunkIndex)| (blob, index.0);
    // What the first walk complained of is passed over here.
    for visit in tree.walk().map_while(Result::ok) {
        if visit.inode.kind != FileKind::File {
            continue;
        }
        let Ok(chunks) = tree.file_chunks(&visit.inode) else { continue };
        // A file may use a chunk twice and is still one user of it.
        let mut hit: Vec<usize> = chunks
            .map_while(Result::ok)
            .filter_map(|chunk| {
                bad.binary_search_by_key(&(chunk.blob_index, chunk.index.0), key).ok()
            })
            .collect();
        hit.sort_unstable();
        hit.dedup();
        for position in hit {
            let user = &mut users[position];
            user.count += 1;
            if user.paths.len() < config::CHECK_FILES_MAX {
                user.paths.push(display(&visit.path));
            }
        }
    }
    users
}

/// A path for people: absolute, and nothing in it can steer a terminal.
pub fn display(path: &[u8]) -> String {
    let text = String::from_utf8_lossy(path);
    let plain = |c: char| if c.is_control() { c.escape_default().collect() } else { c.to_string() };
    std::iter::once("/".to_owned()).chain(text.chars().map(plain)).collect()
}

fn slots(bootstrap: &Bootstrap, blob_index: u32) -> Vec<Slot> {
    let slot = |chunk: crate::image::ChunkRecord| Slot {
        index: chunk.index.0,
        size: chunk.uncompressed_size,
        uncompressed_offset: chunk.uncompressed_offset,
    };
    bootstrap.chunks_of(blob_index).map(slot).collect()
}

/// The kernel reads where the file's entry says; the digest is of what the chunk table says.
fn check_listed(chunk: &FileChunk, slots: &[Vec<Slot>]) -> Result<()> {
    let (blob, index) = (chunk.blob_index, chunk.index);
    let wrong = |why: String| {
        let at = chunk.file_offset;
        Err(Error::Malformed(format!("its byte {at} is chunk {index} of blob {blob}, {why}")))
    };
    let listed = slots.get(blob as usize).map_or(&[][..], Vec::as_slice);
    let Ok(position) = listed.binary_search_by_key(&index.0, |slot| slot.index) else {
        return wrong("which the chunk table does not list: it has no digest".to_owned());
    };
    let slot = &listed[position];
    if slot.uncompressed_offset != chunk.uncompressed_offset {
        return wrong(format!(
            "read at {:#x}, but the chunk table puts it at {:#x}",
            chunk.uncompressed_offset, slot.uncompressed_offset
        ));
    }
    if slot.size != chunk.size {
        return wrong(format!("of which it wants {} bytes; it has {}", chunk.size, slot.size));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> Vec<u8> {
        let path = format!("{}/tests/fixtures/{name}/image.boot", env!("CARGO_MANIFEST_DIR"));
        std::fs::read(path).expect("a fixture")
    }

    #[test]
    fn the_fixtures_are_sound() {
        for name in ["lz4-1m", "zstd-64k", "zran"] {
            let bootstrap = Bootstrap::parse(fixture(name)).expect("parses");
            let structure = Structure::of(&bootstrap);
            assert_eq!(structure.faults, Vec::<String>::new(), "{name}");
            assert_eq!(structure.name_count, 387, "{name}: lines of tree.txt");
            assert!(structure.reference_count > 0);
        }
    }

    #[test]
    fn a_file_that_reads_elsewhere_than_its_digest_is_found() {
        let mut bytes = fixture("zstd-64k");
        let bootstrap = Bootstrap::parse(bytes.clone()).expect("parses");
        let tree = bootstrap.tree();
        let single = tree.walk().map(|visit| visit.expect("sound")).find(|visit| {
            visit.inode.kind == FileKind::File && (1..=65536).contains(&visit.inode.size)
        });
        let visit = single.expect("a file of one chunk");
        let chunk = tree.file_chunks(&visit.inode).expect("chunks").next().expect("one");
        let chunk = chunk.expect("sound");
        let entry = [
            &(chunk.index.0 as u16).to_le_bytes()[..],
            &(chunk.blob_index as u16 + 1).to_le_bytes(),
            &((chunk.uncompressed_offset / 4096) as u32).to_le_bytes(),
        ]
        .concat();
        let start = (bootstrap.superblock().meta_offset + visit.inode.nid * 32) as usize;
        let at = (start..start + 4096).find(|&at| bytes[at..at + 8] == entry[..]).expect("there");
        // The address of another block of the same blob.
        bytes[at + 4] ^= 1;
        let structure = Structure::of(&Bootstrap::parse(bytes).expect("parses"));
        assert!(structure.fault_count >= 1);
        let fault = &structure.faults[0];
        assert!(fault.contains(&display(&visit.path)), "{fault}");
        assert!(fault.contains("the chunk table puts it at"), "{fault}");
    }

    #[test]
    fn users_of_a_chunk_are_named() {
        let bootstrap = Bootstrap::parse(fixture("lz4-1m")).expect("parses");
        let chunk = bootstrap.chunks_of(0).next().expect("a chunk");
        let found = users(&bootstrap, &[(0, chunk.index)]);
        assert!(found[0].count >= 1 && found[0].paths[0].starts_with('/'), "{found:?}");
        assert_eq!(users(&bootstrap, &[(9, ChunkIndex(0))])[0].count, 0);
    }

    #[test]
    fn damage_is_a_fault_and_never_a_panic() {
        for name in ["lz4-1m", "zstd-64k", "zran"] {
            let whole = fixture(name);
            let mut seed = 0x9e37_79b9_7f4a_7c15u64;
            for _ in 0..300 {
                let mut bytes = whole.clone();
                for _ in 0..4 {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let at = (seed >> 20) as usize % bytes.len();
                    bytes[at] ^= 1 << (seed >> 60 & 7);
                }
                let Ok(bootstrap) = Bootstrap::parse(bytes) else { continue };
                let structure = Structure::of(&bootstrap);
                assert!(structure.faults.len() as u64 <= structure.fault_count);
                users(&bootstrap, &[(0, ChunkIndex(0)), (0, ChunkIndex(1))]);
            }
        }
    }

    #[test]
    fn a_path_cannot_steer_the_terminal() {
        assert_eq!(display(b"a\x1b[2Jb"), "/a\\u{1b}[2Jb");
        assert_eq!(display("é".as_bytes()), "/é");
    }
}
