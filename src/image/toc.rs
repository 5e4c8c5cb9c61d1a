//! What stands at the end of a blob file: a table of contents, or a bootstrap alone.
//!
//! A tar header follows its data here, so a blob is read from its end: the last 512 bytes are the
//! header of what stands before them. Fetch the last [`TAIL_BYTES`] of a blob (or all of it) and
//! give them to [`Tail::parse`]; then fetch the range it names and give that to
//! [`TocEntry::extract`].

use super::codec::{Codec, Compressor};
use super::digest::{Digest, DigestAlgorithm};
use super::little::{bytes_at, u32_at, u64_at};
use crate::config::BOOTSTRAP_MAX_BYTES;
use crate::error::{Error, Result};
use std::ops::Range;

/// How much of the end of a blob to fetch.
pub const TAIL_BYTES: usize = 4096;
/// The name of the entry that holds the bootstrap.
pub const BOOTSTRAP_NAME: &str = "image.boot";
/// The name of the entry that holds the compressed context table, without its header.
pub const CONTEXT_TABLE_NAME: &str = "blob.meta";

const TAR_HEADER_BYTES: usize = 512;
const TOC_NAME: &str = "rafs.blob.toc";
const ENTRY_BYTES: usize = 128;

/// What a blob ends in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tail {
    /// A table of contents.
    Toc(Toc),
    /// A bootstrap as it is: these bytes of the blob.
    Bootstrap(Range<u64>),
    /// Neither: chunk data, or a context table.
    Plain,
}

/// A table of contents.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toc {
    entries: Vec<TocEntry>,
    /// Where the table starts: nothing it lists reaches beyond.
    start: u64,
}

/// One part of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TocEntry {
    /// `image.blob`, `blob.meta`, `blob.meta.header`, `blob.digest` or `image.boot`.
    pub name: String,
    /// How the part is stored.
    pub compressor: Compressor,
    /// SHA-256 of the part, decompressed.
    pub digest: Digest,
    /// Where it stands in the blob.
    pub offset: u64,
    /// Bytes as stored.
    pub compressed_size: u64,
    /// Bytes when decompressed.
    pub uncompressed_size: u64,
}

impl Tail {
    /// Reads the end of a blob of `blob_size` bytes. `tail`: its last [`TAIL_BYTES`], or all of
    /// it if it has fewer.
    pub fn parse(tail: &[u8], blob_size: u64) -> Result<Self> {
        if tail.len() as u64 > blob_size {
            return Err(malformed!("{} bytes of tail of a blob of {blob_size}", tail.len()));
        }
        let Some((before, header)) = tail.split_last_chunk::<TAR_HEADER_BYTES>() else {
            return Ok(Tail::Plain);
        };
        let header = tar::Header::from_byte_slice(header);
        if header.as_ustar().is_none() && header.as_gnu().is_none() || !checksum_matches(header) {
            return Ok(Tail::Plain);
        }
        let size =
            header.size().map_err(|_| malformed!("the tar header at its end has no size"))?;
        let end = blob_size - TAR_HEADER_BYTES as u64;
        let Some(start) = end.checked_sub(size) else {
            return Err(malformed!("the part before its end is larger than the blob"));
        };
        match &*header.path_bytes() {
            path if path == TOC_NAME.as_bytes() => {
                let table = (before.len() as u64).checked_sub(size);
                let table = table.map(|at| &before[at as usize..]);
                let table = table.ok_or_else(|| malformed!("a table of contents of {size} bytes"));
                Ok(Tail::Toc(Toc { entries: read_entries(table?)?, start }))
            }
            path if path == BOOTSTRAP_NAME.as_bytes() => Ok(Tail::Bootstrap(start..end)),
            _ => Ok(Tail::Plain),
        }
    }
}

impl Toc {
    /// All entries as stored. Builders are known to write an `image.blob` with offset and digest
    /// that make no sense; nothing here is checked before [`Toc::find`].
    pub fn entries(&self) -> &[TocEntry] {
        &self.entries
    }

    /// The entry with this name; its stored bytes are in the blob, before the table.
    pub fn find(&self, name: &str) -> Result<&TocEntry> {
        let entry = self.entries.iter().find(|entry| entry.name == name).ok_or_else(|| {
            Error::NotFound(format!("the blob's table of contents has no {name:?}"))
        })?;
        let end = entry.offset.checked_add(entry.compressed_size);
        match end {
            Some(end) if end <= self.start => Ok(entry),
            _ => Err(malformed!("table of contents: {name:?} is not inside the blob")),
        }
    }
}

impl TocEntry {
    /// Where the stored bytes are in the blob. In bounds for an entry from [`Toc::find`].
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.compressed_size)
    }

    /// Decompresses the stored bytes and checks their digest. Refuses more than a bootstrap may
    /// have.
    pub fn extract(&self, stored: &[u8]) -> Result<Vec<u8>> {
        if stored.len() as u64 != self.compressed_size {
            let (given, size) = (stored.len(), self.compressed_size);
            return Err(malformed!("{:?}: {given} bytes given, {size} stored", self.name));
        }
        if self.uncompressed_size > BOOTSTRAP_MAX_BYTES as u64 {
            return Err(unsupported!("{:?} of {} bytes", self.name, self.uncompressed_size));
        }
        let mut bytes = vec![0; self.uncompressed_size as usize];
        Codec::new()
            .decompress(self.compressor, stored, &mut bytes)
            .map_err(|error| error.context(format!("{:?}", self.name)))?;
        match DigestAlgorithm::Sha256.digest(&bytes) == self.digest {
            true => Ok(bytes),
            false => Err(Error::Digest(format!("{:?} does not match its digest", self.name))),
        }
    }
}

fn checksum_matches(header: &tar::Header) -> bool {
    const CHECKSUM: Range<usize> = 148..156;
    let byte = |(at, &byte): (usize, &u8)| if CHECKSUM.contains(&at) { b' ' } else { byte };
    let sum: u32 = header.as_bytes().iter().enumerate().map(byte).map(u32::from).sum();
    header.cksum().is_ok_and(|stored| stored == sum)
}

fn read_entries(table: &[u8]) -> Result<Vec<TocEntry>> {
    let (records, rest) = table.as_chunks::<ENTRY_BYTES>();
    if !rest.is_empty() {
        return Err(malformed!("a table of contents of {} bytes: no whole entries", table.len()));
    }
    records.iter().map(read_entry).collect()
}

fn read_entry(record: &[u8; ENTRY_BYTES]) -> Result<TocEntry> {
    let name: [u8; 16] = bytes_at(record, 8);
    let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
    Ok(TocEntry {
        name: String::from_utf8_lossy(name).into_owned(),
        compressor: match u32_at(record, 0) {
            1 => Compressor::None,
            2 => Compressor::Zstd,
            4 => Compressor::Lz4Block,
            flags => return Err(unsupported!("table of contents: entry flags {flags:#x}")),
        },
        digest: Digest(bytes_at(record, 24)),
        offset: u64_at(record, 56),
        compressed_size: u64_at(record, 64),
        uncompressed_size: u64_at(record, 72),
    })
}

#[cfg(test)]
mod tests {
    use super::super::specimen_tests::{tar_header, toc_entry};
    use super::*;

    fn blob_with_toc(part: &[u8], stored: &[u8], flags: u32) -> Vec<u8> {
        let mut blob = b"chunk data".to_vec();
        let offset = blob.len() as u64;
        blob.extend(stored);
        blob.extend(tar_header(BOOTSTRAP_NAME, stored.len()));
        // As one builder writes it: an offset wrapped around.
        let mut table = toc_entry("image.blob", 1, b"", (u64::MAX - 511, 1024));
        let place = (offset, stored.len() as u64);
        table.extend(toc_entry(BOOTSTRAP_NAME, flags, part, place));
        blob.extend(&table);
        blob.extend(tar_header(TOC_NAME, table.len()));
        blob
    }

    fn toc(blob: &[u8]) -> Toc {
        let tail = &blob[blob.len().saturating_sub(TAIL_BYTES)..];
        match Tail::parse(tail, blob.len() as u64).unwrap() {
            Tail::Toc(toc) => toc,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn bootstrap_is_found_and_unpacked_in_every_encoding() {
        let part = b"a bootstrap, say".repeat(1000);
        let mut streamed = zstd::stream::Encoder::new(Vec::new(), 3).unwrap();
        std::io::Write::write_all(&mut streamed, &part).unwrap();
        for (flags, stored) in [
            (1, part.clone()),
            (2, streamed.finish().unwrap()),
            (4, lz4_flex::block::compress(&part)),
        ] {
            let blob = blob_with_toc(&part, &stored, flags);
            let toc = toc(&blob);
            let entry = toc.find(BOOTSTRAP_NAME).unwrap();
            let range = entry.range();
            let stored = &blob[range.start as usize..range.end as usize];
            assert_eq!(entry.extract(stored).unwrap(), part);
            assert!(toc.find("image.blob").is_err(), "its offset is outside the blob");
            assert!(matches!(toc.find("absent"), Err(Error::NotFound(_))));
        }
    }

    #[test]
    fn changed_bytes_and_wrong_sizes_are_refused() {
        let part = b"a bootstrap, say".repeat(10);
        let toc = toc(&blob_with_toc(&part, &part, 1));
        let mut entry = toc.find(BOOTSTRAP_NAME).unwrap().clone();
        let mut wrong = part.clone();
        wrong[5] ^= 1;
        assert!(matches!(entry.extract(&wrong), Err(Error::Digest(_))));
        assert!(entry.extract(&part[1..]).is_err());
        entry.uncompressed_size = u64::MAX;
        assert!(matches!(entry.extract(&part), Err(Error::Unsupported(_))));
    }

    #[test]
    fn bare_bootstrap_behind_a_blob_is_found() {
        let mut blob = vec![9; 5000];
        blob.extend(tar_header(BOOTSTRAP_NAME, 4096));
        let tail = &blob[blob.len() - TAIL_BYTES..];
        let expected = Tail::Bootstrap(904..5000);
        assert_eq!(Tail::parse(tail, blob.len() as u64).unwrap(), expected);
    }

    #[test]
    fn ordinary_blobs_have_a_plain_tail() {
        for blob in [vec![], vec![0; 100], vec![0; 4096], vec![0xff; 5000]] {
            let tail = &blob[blob.len().saturating_sub(TAIL_BYTES)..];
            assert_eq!(Tail::parse(tail, blob.len() as u64).unwrap(), Tail::Plain);
        }
    }

    #[test]
    fn table_larger_than_the_tail_or_of_no_whole_entries_is_refused() {
        for size in [129usize, 8192, 1 << 30] {
            let mut blob = vec![0; 5000];
            blob.extend(tar_header(TOC_NAME, size));
            let tail = &blob[blob.len() - TAIL_BYTES..];
            assert!(Tail::parse(tail, blob.len() as u64).is_err(), "{size}");
        }
    }
}
