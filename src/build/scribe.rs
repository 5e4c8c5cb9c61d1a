//! The end of the pipeline: makes chunks of pieces, in order, and writes a layer's blob.
//!
//! Owns the blob in the making: a file under a temporary name in the output directory, renamed to
//! its digest when it is whole and removed if it never is. Only the scribe adds chunks, and it sees
//! pieces in the order of the layer: so equal inputs give equal blobs.
//!
//! A blob is its chunks, the compressed context table (version 1: half as large as version 2, and
//! every reader knows it) and the table's header. It has no table of contents and no digest array:
//! the bootstrap has a digest for every chunk already, and readers of ours check against that.

use super::chunks::{Chunk, Chunks};
use super::feeder::{Job, Packing, Piece};
use super::options::{Options, Progress};
use super::pipeline::{Bench, lock};
use crate::config::BUILD_WRITE_BYTES;
use crate::error::{Error, Result};
use crate::image::blob_table::BlobFeatures;
use crate::image::entry::ContextEntry;
use crate::image::superblock::BLOCK_BYTES;
use crate::image::{BlobId, BlobRecord, Compressor, Digest};
use sha2::Digest as _;
use std::fs::File;
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// zstd level of context tables: they are small, and read once per blob.
const TABLE_LEVEL: i32 = 9;

/// Counts of one layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    /// Bytes of file data.
    pub(super) data_bytes: u64,
    /// Pieces of file data.
    pub(super) pieces: u64,
    /// Pieces that found their chunk present.
    pub(super) shared_pieces: u64,
    /// Bytes of these.
    pub(super) shared_bytes: u64,
}

/// Makes the chunks of one layer.
pub(super) struct Scribe<'a> {
    /// The builder's number of the blob.
    blob: u16,
    /// Where chunks go; `None` for a layer that stays as it is and holds them already.
    file: Option<BlobFile>,
    /// For a layer that stays as it is: where each of its chunks is in the layer's plain bytes.
    pub(super) places: Vec<u64>,
    pub(super) tally: Tally,
    /// End of the address space so far.
    space_bytes: u64,
    chunk_count: u32,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl<'a> Scribe<'a> {
    /// `file` is `None` if the layer itself is the blob.
    pub(super) fn new(
        blob: u16,
        file: Option<BlobFile>,
        progress: &'a (dyn Fn(Progress) + Sync),
    ) -> Self {
        Scribe {
            blob,
            file,
            places: Vec::new(),
            tally: Tally::default(),
            space_bytes: 0,
            chunk_count: 0,
            progress,
        }
    }

    /// Takes the next job: new chunks are written, all pieces referred to.
    pub(super) fn write(&mut self, job: &Job, bench: &Bench<'_>) -> Result<()> {
        let mut written = self.file.as_ref().map_or(0, |file| file.size);
        let mut fresh = Vec::new();
        let mut chunks = lock(bench.chunks);
        for piece in &job.pieces {
            self.tally.pieces += 1;
            self.tally.data_bytes += u64::from(piece.size);
            let at = match chunks.find(&piece.digest) {
                Some(at) => {
                    self.tally.shared_pieces += 1;
                    self.tally.shared_bytes += u64::from(piece.size);
                    at
                }
                None => {
                    let chunk = self.make_chunk(piece, written);
                    written += u64::from(chunk.compressed_size);
                    fresh.push(*piece);
                    chunks.add(chunk)?
                }
            };
            chunks.refer(at)?;
        }
        drop(chunks);
        self.store(job, &fresh, bench)
    }

    fn make_chunk(&mut self, piece: &Piece, offset: u64) -> Chunk {
        let (stored, is_compressed) = match piece.packing {
            Packing::Packed { size, .. } => (size, true),
            // A layer that stays as it is: the context table says where, not the chunk.
            Packing::Plain if self.file.is_none() => (0, true),
            Packing::Plain => (piece.size, false),
            Packing::Known => unreachable!("the earlier piece of this digest has made a chunk"),
        };
        let chunk = Chunk {
            digest: piece.digest,
            uncompressed_offset: self.space_bytes,
            compressed_offset: offset,
            uncompressed_size: piece.size,
            compressed_size: stored,
            index: self.chunk_count,
            blob: self.blob,
            is_compressed,
        };
        self.chunk_count += 1;
        self.space_bytes += u64::from(piece.size).next_multiple_of(BLOCK_BYTES as u64);
        chunk
    }

    fn store(&mut self, job: &Job, fresh: &[Piece], bench: &Bench<'_>) -> Result<()> {
        let Some(file) = &mut self.file else {
            self.places.extend(fresh.iter().map(|piece| piece.source_offset));
            return Ok(());
        };
        let before = file.size;
        for piece in fresh {
            file.write(job.stored(piece, &bench.zeros))?;
        }
        (self.progress)(Progress { read_bytes: 0, written_bytes: file.size - before });
        Ok(())
    }

    /// How many chunks the layer added.
    pub(super) fn chunk_count(&self) -> u32 {
        self.chunk_count
    }

    /// Bytes of the blob's address space.
    pub(super) fn space_bytes(&self) -> u64 {
        self.space_bytes
    }

    /// Completes the blob: context table, header, name. `None` if the layer added no chunk.
    /// `first`: how many chunks there were before this layer.
    pub(super) fn finish(
        &mut self,
        options: &Options,
        chunks: &Chunks,
        first: usize,
    ) -> Result<Option<(BlobRecord, Finished)>> {
        let Some(mut file) = self.file.take().filter(|_| self.chunk_count > 0) else {
            return Ok(None);
        };
        let table: Vec<u8> = chunks.since(first).iter().flat_map(context_entry).collect();
        let mut record = BlobRecord {
            chunk_count: self.chunk_count,
            uncompressed_size: self.space_bytes,
            ..blank_record(options)
        };
        file.write_context_table(&mut record, &table, (0, 0, 0))?;
        record.compressed_size = file.size;
        let finished = file.finish()?;
        record.id = finished.id.clone();
        Ok(Some((record, finished)))
    }
}

pub(super) fn context_entry(chunk: &Chunk) -> [u8; 16] {
    let (plain, stored) = (chunk.uncompressed_size, chunk.compressed_size);
    ContextEntry::to_v1(chunk.uncompressed_offset, plain, chunk.compressed_offset, stored)
}

/// A blob record that only has what the options say.
pub(super) fn blank_record(options: &Options) -> BlobRecord {
    BlobRecord {
        id: BlobId::of_digest(&Digest([0; 32])),
        index: 0,
        chunk_size: options.chunk_size,
        chunk_count: 0,
        compressor: options.compression.compressor(),
        digest_algorithm: options.digest,
        features: BlobFeatures(BlobFeatures::ALIGNED | BlobFeatures::CAP_TAR_TOC),
        compressed_size: 0,
        uncompressed_size: 0,
        ci_compressor: Compressor::Zstd,
        ci_offset: 0,
        ci_compressed_size: 0,
        ci_uncompressed_size: 0,
        toc_size: 0,
        toc_digest: None,
        meta_digest: None,
        meta_size: 0,
        cipher: None,
    }
}

/// A blob being written.
pub(super) struct BlobFile {
    out: BufWriter<File>,
    hasher: sha2::Sha256,
    size: u64,
    /// Where it is until it is whole.
    partial: Partial,
}

impl BlobFile {
    /// Starts a blob in a directory; `number` tells those of one build apart.
    pub(super) fn create(directory: &Path, number: usize) -> Result<Self> {
        let partial = Partial::new(directory.join(partial_name("blob", number)));
        Ok(BlobFile {
            out: BufWriter::with_capacity(BUILD_WRITE_BYTES, partial.create()?),
            hasher: sha2::Sha256::new(),
            size: 0,
            partial,
        })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|error| self.partial.failed(&error))
    }

    /// Appends a context table and its header, and notes in the record where.
    pub(super) fn write_context_table(
        &mut self,
        record: &mut BlobRecord,
        table: &[u8],
        contexts: (u64, u64, u32),
    ) -> Result<()> {
        let packed = zstd::bulk::compress(table, TABLE_LEVEL)
            .map_err(|error| Error::io(&error, "the context table cannot be compressed"))?;
        let (compressor, stored) = match packed.len() < table.len() {
            true => (Compressor::Zstd, &packed[..]),
            false => (Compressor::None, table),
        };
        record.ci_compressor = compressor;
        record.ci_offset = self.size;
        record.ci_compressed_size = stored.len() as u64;
        record.ci_uncompressed_size = table.len() as u64;
        self.write(stored)?;
        self.write(&record.context_header(contexts)[..])
    }

    /// The same for a table too large to be held: `copy` writes its `size` bytes, twice if they do
    /// not get smaller.
    pub(super) fn stream_context_table(
        &mut self,
        record: &mut BlobRecord,
        size: u64,
        mut copy: impl FnMut(&mut dyn Write) -> std::io::Result<()>,
        contexts: (u64, u64, u32),
    ) -> Result<()> {
        let (start, hasher) = (self.size, self.hasher.clone());
        let packed = (|| {
            let mut encoder = zstd::stream::write::Encoder::new(&mut *self, TABLE_LEVEL)?;
            encoder.set_pledged_src_size(Some(size))?;
            copy(&mut encoder)?;
            encoder.finish().map(drop)?;
            if self.size - start < size {
                return Ok(Compressor::Zstd);
            }
            // Windows of bytes that were random grow, and readers refuse a table that did.
            self.out.flush()?;
            self.out.get_mut().set_len(start)?;
            self.out.seek(SeekFrom::Start(start))?;
            (self.size, self.hasher) = (start, hasher);
            copy(&mut &mut *self)?;
            Ok(Compressor::None)
        })();
        record.ci_compressor = packed.map_err(|error| self.partial.failed(&error))?;
        record.ci_offset = start;
        record.ci_compressed_size = self.size - start;
        record.ci_uncompressed_size = size;
        self.write(&record.context_header(contexts)[..])
    }

    /// Gives the blob its name: the digest of its bytes. One that is there already is replaced, in
    /// case it is damaged, but not new: it may belong to another image.
    pub(super) fn finish(mut self) -> Result<Finished> {
        self.out.flush().map_err(|error| self.partial.failed(&error))?;
        let id = BlobId::of_digest(&Digest(self.hasher.finalize().into()));
        let path = self.partial.0.with_file_name(id.as_str());
        let is_there = std::fs::metadata(&path).is_ok_and(|there| there.len() == self.size);
        std::fs::rename(&self.partial.0, &path).map_err(|error| self.partial.failed(&error))?;
        Ok(Finished { id, path, size_bytes: self.size, is_new: !is_there })
    }
}

/// A blob that has its name.
#[derive(Clone, Debug)]
pub(super) struct Finished {
    pub(super) id: BlobId,
    pub(super) path: PathBuf,
    pub(super) size_bytes: u64,
    /// Whether this build made the file.
    pub(super) is_new: bool,
}

impl Write for &mut BlobFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        self.out.write_all(bytes).map(|()| bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// The name of a file in the making; several builds may share an output directory.
pub(super) fn partial_name(what: &str, number: usize) -> String {
    format!(".{what}-{}-{number}.partial", std::process::id())
}

/// A file that goes away unless it has been renamed.
pub(super) struct Partial(PathBuf);

impl Partial {
    pub(super) fn new(path: PathBuf) -> Self {
        Partial(path)
    }

    /// Makes the file, for writing and reading.
    pub(super) fn create(&self) -> Result<File> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        options.open(&self.0).map_err(|error| self.failed(&error))
    }

    /// An error about the file.
    pub(super) fn failed(&self, error: &std::io::Error) -> Error {
        Error::io(error, format!("cannot write {}", self.0.display()))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
