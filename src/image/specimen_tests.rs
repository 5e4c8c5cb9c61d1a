//! Images for tests: the ones in `tests/fixtures`, and ones made up to have what those lack.
//!
//! Test code: it panics where product code would answer an error.

use super::blob_table::BlobRecord;
use super::context::HEADER_BYTES;
use super::{Bootstrap, ContextTable, Decoder, Layout};
use std::path::PathBuf;

/// Where the fixtures are; `SLUICE_FIXTURES` names another directory of the same shape.
pub(crate) fn root() -> PathBuf {
    match std::env::var_os("SLUICE_FIXTURES") {
        Some(root) => root.into(),
        None => concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures").into(),
    }
}

/// The names of the fixture images.
pub(crate) const IMAGES: [&str; 3] = ["lz4-1m", "zstd-64k", "zran"];

/// An image with everything a registry would hold of it.
pub(crate) struct Specimen {
    pub(crate) bootstrap: Bootstrap,
    /// By blob index.
    pub(crate) blobs: Vec<Vec<u8>>,
    /// By blob index: the file that has the context table.
    pub(crate) metas: Vec<Vec<u8>>,
}

impl Specimen {
    /// A fixture image by name.
    pub(crate) fn fixture(name: &str) -> Self {
        let folder = root().join(name);
        let bootstrap = Bootstrap::parse(std::fs::read(folder.join("image.boot")).unwrap());
        let bootstrap = bootstrap.unwrap();
        let read = |blob: &BlobRecord| match blob.is_separate() {
            true => std::fs::read(root().join("source.tar.gz")).unwrap(),
            false => std::fs::read(folder.join(blob.id.as_str())).unwrap(),
        };
        let read_meta = |blob: &BlobRecord| {
            std::fs::read(folder.join(blob.context_blob().unwrap().as_str())).unwrap()
        };
        let blobs = bootstrap.blobs().iter().map(read).collect();
        let metas = bootstrap.blobs().iter().map(read_meta).collect();
        Specimen { bootstrap, blobs, metas }
    }

    /// The context table of a blob.
    pub(crate) fn context(&self, blob_index: usize) -> crate::error::Result<ContextTable> {
        let record = &self.bootstrap.blobs()[blob_index];
        let range = record.context_range();
        let stored = &self.metas[blob_index][range.start as usize..range.end as usize];
        let (table, header) = stored.split_at(stored.len() - HEADER_BYTES);
        ContextTable::parse(record, table, header)
    }

    /// The layout the daemon would build.
    pub(crate) fn layout(&self, blob_index: usize) -> Layout {
        let record = &self.bootstrap.blobs()[blob_index];
        let context = Layout::needs_context(record).then(|| self.context(blob_index).unwrap());
        Layout::build(&self.bootstrap, blob_index as u32, context.as_ref()).unwrap()
    }

    /// The whole address space of a blob, every listed chunk verified, the rest zero.
    pub(crate) fn address_space(&self, blob_index: usize) -> Vec<u8> {
        let layout = self.layout(blob_index);
        let mut decoder = Decoder::new();
        let mut space = vec![0; layout.uncompressed_size() as usize];
        for number in 0..layout.unit_count() {
            let unit = layout.unit(number);
            let start = unit.compressed_offset as usize;
            let stored = &self.blobs[blob_index][start..start + unit.compressed_size as usize];
            let start = unit.uncompressed_offset as usize;
            let output = &mut space[start..start + unit.output_size as usize];
            output.fill(0xaa);
            decoder.decode_unit(&layout, number, stored, output).unwrap();
            for index in unit.chunks {
                let chunk = layout.chunk(super::ChunkIndex(index));
                let start = chunk.uncompressed_offset as usize;
                let (bytes, padding) = space[start..start + chunk.padded_size() as usize]
                    .split_at(chunk.size as usize);
                let listed = chunk.digest.is_some();
                assert_eq!(layout.verify(super::ChunkIndex(index), bytes), listed);
                assert!(padding.iter().all(|&byte| byte == 0));
            }
        }
        space
    }
}

/// The 512-byte header that follows a part of a blob.
pub(crate) fn tar_header(name: &str, size: usize) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name).unwrap();
    header.set_size(size as u64);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_cksum();
    header.as_bytes().to_vec()
}

/// An entry of a table of contents for `part`, stored at (offset, length).
pub(crate) fn toc_entry(name: &str, flags: u32, part: &[u8], stored: (u64, u64)) -> Vec<u8> {
    let mut entry = vec![0; 128];
    entry[0..4].copy_from_slice(&flags.to_le_bytes());
    entry[8..8 + name.len()].copy_from_slice(name.as_bytes());
    entry[24..56].copy_from_slice(&super::DigestAlgorithm::Sha256.digest(part).0);
    entry[56..64].copy_from_slice(&stored.0.to_le_bytes());
    entry[64..72].copy_from_slice(&stored.1.to_le_bytes());
    entry[72..80].copy_from_slice(&(part.len() as u64).to_le_bytes());
    entry
}
