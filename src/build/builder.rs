//! Builds an image, layer by layer.
//!
//! Owns the tree, the chunks and the blobs of one image. Layers are added from the lowest to the
//! highest, one at a time; each leaves a blob in the output directory, unless it has no data that
//! the image did not have before. [`Builder::finish`] writes the bootstrap and removes blobs that
//! the final tree does not need. A builder that is dropped before removes all its blobs.

use super::bootstrap;
use super::chunks::Chunks;
use super::directory::Walker;
use super::entry::{Entry, FileData};
use super::feeder::Feeder;
use super::options::{Options, Progress};
use super::pipeline;
use super::scribe::{BlobFile, Scribe, Tally};
use super::stream;
use super::tar::{Archive, FileShape, Member, MemberKind};
use super::tree::Tree;
use crate::error::{Error, Result};
use crate::image::inode_writer::xattr_area;
use crate::image::{BlobId, BlobRecord, Bootstrap};
use serde::Serialize;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

/// What a blob is in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobRole {
    /// Chunks of a layer, in a file the builder made.
    Data,
    /// A blob of another image that some chunks were found in: it must be in the same repository.
    Foreign,
}

/// A blob that an image needs.
#[derive(Clone, Debug)]
pub struct Blob {
    /// Its name: the SHA-256 of its file, in hexadecimal.
    pub id: BlobId,
    /// What it is.
    pub role: BlobRole,
    /// The layer it was made from, counted from 0; `None` for foreign ones.
    pub layer: Option<usize>,
    /// Its file in the output directory; `None` for foreign ones.
    pub path: Option<PathBuf>,
    /// Bytes of the file; of a foreign one, what its image says of it.
    pub size_bytes: u64,
    /// Bytes of its address space.
    pub uncompressed_bytes: u64,
}

/// What became of a layer.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LayerReport {
    /// Bytes of the layer as it came: of the stream, or of the files of a directory.
    pub read_bytes: u64,
    /// Entries of the layer, whiteouts included.
    pub entries: u64,
    /// Bytes of file data.
    pub data_bytes: u64,
    /// Pieces of file data, and how many of them found their chunk in this image or a dictionary.
    pub pieces: u64,
    /// Pieces that another piece or a dictionary had.
    pub shared_pieces: u64,
    /// Bytes of these.
    pub shared_bytes: u64,
    /// Chunks that were added.
    pub chunks: u64,
    /// Bytes of the blob's file; 0 without one.
    pub blob_bytes: u64,
    /// Extended attributes of classes that no image can hold.
    pub lost_xattrs: u64,
    /// Milliseconds it took.
    pub time_ms: u64,
}

/// What became of an image.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// Layers, from the lowest.
    pub layers: Vec<LayerReport>,
    /// Inodes of the final tree.
    pub inodes: u64,
    /// Bytes of its files, hard links counted once.
    pub data_bytes: u64,
    /// Chunks it uses.
    pub chunks: u64,
    /// Bytes of the bootstrap.
    pub bootstrap_bytes: u64,
    /// Bytes of the blob files made for it.
    pub blob_bytes: u64,
    /// Milliseconds from the builder's start.
    pub time_ms: u64,
}

/// A finished image.
#[derive(Debug)]
pub struct Image {
    /// The metadata, as it belongs into `image.boot`.
    pub bootstrap: Vec<u8>,
    /// The blobs it names, in its order.
    pub blobs: Vec<Blob>,
    /// Sizes and counts.
    pub report: Report,
}

/// An image in the making.
pub struct Builder {
    options: Options,
    directory: PathBuf,
    tree: Tree,
    chunks: Mutex<Chunks>,
    /// By the builder's number of a blob, as chunks have it.
    records: Vec<BlobRecord>,
    blobs: Vec<Blob>,
    report: Report,
    started: Instant,
}

impl Builder {
    /// Starts an image whose blobs go into `directory`, which exists.
    pub fn new(options: Options, directory: impl Into<PathBuf>) -> Result<Self> {
        options.check()?;
        Ok(Builder {
            options,
            directory: directory.into(),
            tree: Tree::new(),
            chunks: Mutex::default(),
            records: Vec::new(),
            blobs: Vec::new(),
            report: Report::default(),
            started: Instant::now(),
        })
    }

    /// Offers the chunks of another image for deduplication. Blobs that are used become part of
    /// this image.
    ///
    /// # Errors
    /// `Unsupported` if the other image has chunks of another size or other digests.
    pub fn add_dictionary(&mut self, bootstrap: &Bootstrap) -> Result<()> {
        let superblock = bootstrap.superblock();
        if superblock.chunk_size != self.options.chunk_size
            || superblock.digest_algorithm != self.options.digest
        {
            return Err(unsupported!(
                "the other image has chunks of {} bytes with {} digests: build with the same, or \
                 without this dictionary",
                superblock.chunk_size,
                superblock.digest_algorithm
            ));
        }
        let chunks = self.chunks.get_mut().unwrap_or_else(PoisonError::into_inner);
        for blob in bootstrap.blobs() {
            // What is stored otherwise than chunk by chunk needs more than the chunk table says.
            if blob.is_zran() || blob.is_batch() || blob.cipher.is_some() {
                continue;
            }
            let number = self.records.len() as u16;
            for record in bootstrap.chunks_of(blob.index) {
                chunks.offer(&record, number)?;
            }
            self.records.push(blob.clone());
            self.blobs.push(Blob {
                id: blob.id.clone(),
                role: BlobRole::Foreign,
                layer: None,
                path: None,
                size_bytes: blob.compressed_size,
                uncompressed_bytes: blob.uncompressed_size,
            });
        }
        Ok(())
    }

    /// Adds a layer: a tar, plain or compressed with gzip or zstd. The stream is read to its end.
    ///
    /// # Errors
    /// Says what is wrong with the layer, or with the disk. The builder is of no use afterwards.
    pub fn add_tar(
        &mut self,
        layer: impl Read,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<LayerReport> {
        let read = std::sync::atomic::AtomicU64::new(0);
        let counting = |step: Progress| {
            read.fetch_add(step.read_bytes, std::sync::atomic::Ordering::Relaxed);
            progress(step);
        };
        let mut counts = (0, 0);
        let mut report = self.add_layer(&counting, |tree, feeder| {
            let mut archive = Archive::new(stream::open(layer, &counting)?);
            while let Some(member) = archive.next()? {
                counts.0 += 1;
                counts.1 += member.lost_xattrs as u64;
                take_member(tree, feeder, &mut archive, member)?;
            }
            Ok(())
        })?;
        report.read_bytes = read.into_inner();
        (report.entries, report.lost_xattrs) = counts;
        self.report.layers.push(report.clone());
        Ok(report)
    }

    /// Adds a directory of this host as a layer.
    ///
    /// # Errors
    /// As `add_tar`; a file that changes while it is read is an error.
    pub fn add_directory(
        &mut self,
        root: &Path,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<LayerReport> {
        let read = |bytes| progress(Progress { read_bytes: bytes, written_bytes: 0 });
        let mut counts = (0, 0);
        let mut report = self.add_layer(progress, |tree, feeder| {
            let mut walker = Walker::new(tree, feeder, &read);
            walker.walk(root)?;
            counts = (walker.entry_count, walker.lost_xattrs);
            Ok(())
        })?;
        report.read_bytes = report.data_bytes;
        (report.entries, report.lost_xattrs) = counts;
        self.report.layers.push(report.clone());
        Ok(report)
    }

    fn add_layer(
        &mut self,
        progress: &(dyn Fn(Progress) + Sync),
        feed: impl FnOnce(&mut Tree, &mut Feeder) -> Result<()>,
    ) -> Result<LayerReport> {
        let started = Instant::now();
        let number = self.report.layers.len();
        let blob = u16::try_from(self.records.len())
            .map_err(|_| unsupported!("more than {} blobs", u16::MAX))?;
        let first = pipeline::lock(&self.chunks).len();
        let file = BlobFile::create(&self.directory, number)?;
        let mut scribe = Scribe::new(blob, Some(file), progress);
        let tree = &mut self.tree;
        tree.begin_layer();
        let feed = |feeder: &mut Feeder| feed(tree, feeder);
        pipeline::run(&self.options, &self.chunks, &mut scribe, feed)?;
        let mut chunks = pipeline::lock(&self.chunks);
        chunks.end_layer();
        let finished = scribe.finish(&self.options, &chunks, first)?;
        drop(chunks);
        let mut report = LayerReport::of(&scribe.tally, scribe.chunk_count());
        if let Some((record, path)) = finished {
            report.blob_bytes = record.compressed_size;
            self.blobs.push(Blob {
                id: record.id.clone(),
                role: BlobRole::Data,
                layer: Some(number),
                path: Some(path),
                size_bytes: record.compressed_size,
                uncompressed_bytes: record.uncompressed_size,
            });
            self.records.push(record);
        }
        report.time_ms = started.elapsed().as_millis() as u64;
        Ok(report)
    }

    /// Writes the bootstrap. Blobs no file needs are removed.
    pub fn finish(mut self) -> Result<Image> {
        let chunks = std::mem::take(&mut self.chunks);
        let chunks = chunks.into_inner().unwrap_or_else(PoisonError::into_inner);
        let written = bootstrap::write(&self.options, &mut self.tree, &chunks, &self.records)?;
        let mut made = std::mem::take(&mut self.blobs).into_iter().enumerate();
        let mut blobs = Vec::new();
        for (number, blob) in &mut made {
            match written.blobs.contains(&(number as u16)) {
                true => blobs.push(blob),
                false => remove(&blob),
            }
        }
        let mut report = std::mem::take(&mut self.report);
        report.inodes = written.inode_count;
        report.data_bytes = written.data_bytes;
        report.chunks = written.chunk_count;
        report.bootstrap_bytes = written.bytes.len() as u64;
        report.blob_bytes = blobs
            .iter()
            .filter(|blob| blob.role == BlobRole::Data)
            .map(|blob| blob.size_bytes)
            .sum();
        report.time_ms = self.started.elapsed().as_millis() as u64;
        Ok(Image { bootstrap: written.bytes, blobs, report })
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        self.blobs.iter().for_each(remove);
    }
}

fn remove(blob: &Blob) {
    if let Some(path) = &blob.path {
        let _ = std::fs::remove_file(path);
    }
}

impl LayerReport {
    fn of(tally: &Tally, chunk_count: u32) -> Self {
        LayerReport {
            data_bytes: tally.data_bytes,
            pieces: tally.pieces,
            shared_pieces: tally.shared_pieces,
            shared_bytes: tally.shared_bytes,
            chunks: chunk_count.into(),
            ..LayerReport::default()
        }
    }
}

/// Applies a member of a tar and feeds its data.
fn take_member(
    tree: &mut Tree,
    feeder: &mut Feeder,
    archive: &mut Archive<Box<dyn Read + '_>>,
    member: Member,
) -> Result<()> {
    let Member { path, attributes, kind, .. } = member;
    let name_it = |error: Error| error.context(format!("{:?}", String::from_utf8_lossy(&path)));
    xattr_area(attributes.xattrs.iter().map(|(name, value)| (&name[..], &value[..])))
        .map_err(name_it)?;
    let entry = match kind {
        MemberKind::File(shape) => {
            let data = take_data(feeder, archive, &shape).map_err(name_it)?;
            Entry::File(attributes, data)
        }
        MemberKind::Directory => Entry::Directory(attributes),
        MemberKind::Link(target) => Entry::Link(attributes, target),
        MemberKind::HardLink(target) => Entry::HardLink(target),
        MemberKind::Device(kind, major, minor) => Entry::Device(attributes, kind, major, minor),
        MemberKind::Pipe => Entry::Special(attributes, crate::image::FileKind::Pipe),
    };
    tree.apply(&path, entry)
}

fn take_data(
    feeder: &mut Feeder,
    archive: &mut Archive<Box<dyn Read + '_>>,
    shape: &FileShape,
) -> Result<FileData> {
    let data = feeder.begin(shape.size)?;
    let Some(segments) = &shape.segments else {
        let offset = archive.offset();
        feeder.bytes(archive, shape.size, offset)?;
        return Ok(data);
    };
    let mut at = 0;
    for &(start, length) in segments {
        feeder.zeros(start - at)?;
        let offset = archive.offset();
        feeder.bytes(archive, length, offset)?;
        at = start + length;
    }
    feeder.zeros(shape.size - at)?;
    Ok(data)
}
