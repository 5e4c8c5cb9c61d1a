//! Builds an image, layer by layer.
//!
//! Owns the tree, the chunks and the blobs of one image. Layers are added from the lowest to the
//! highest, one at a time; each leaves a blob in the output directory, unless it has no data that
//! the image did not have before. [`Builder::finish`] writes the bootstrap and removes blobs that
//! the final tree does not need. A builder that is dropped before removes all its blobs.

use super::bootstrap;
use super::chunks::Chunks;
use super::directory::Walker;
use super::entry::{Attributes, Entry, FileData};
use super::feeder::Feeder;
use super::gzip_index::GzipReader;
use super::options::{Compression, Options, Progress};
use super::pipeline;
use super::scribe::{BlobFile, Finished, Scribe, Tally};
use super::stream::{self, Counted};
use super::tree::Tree;
use super::zran;
use crate::error::{Error, Result};
use crate::image::inode_writer::{split_xattr_name, xattr_area};
use crate::image::{BlobId, BlobRecord, Bootstrap, FileKind};
use crate::tar::{Archive, Kind, Member};
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
    /// The layer as it came, a tar.gz; the builder made a small blob that says where chunks are.
    Layer,
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
    /// The file in the output directory that was made for it: itself, or the context table of a
    /// layer that stays as it is. `None` for foreign ones.
    pub path: Option<PathBuf>,
    /// Whether this build made that file; the output directory may have had it before.
    pub is_new: bool,
    /// For a layer that stays as it is: name and size of the blob in that file.
    pub context: Option<(BlobId, u64)>,
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
    /// Bytes of the blob files made for it, context tables of layers that stay among them.
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
        for blob in bootstrap.blobs() {
            // What is stored otherwise than chunk by chunk needs more than the chunk table says.
            if blob.is_zran() || blob.is_batch() || blob.cipher.is_some() {
                continue;
            }
            let number = self.next_blob()?;
            let chunks = self.chunks.get_mut().unwrap_or_else(PoisonError::into_inner);
            for record in bootstrap.chunks_of(blob.index) {
                chunks.offer(&record, number)?;
            }
            self.push_blob(blob.clone(), BlobRole::Foreign, None)?;
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
        let mut counts = (0, 0);
        let counted = Counted::new(layer, progress);
        let read = counted.count();
        let (mut report, started) = self.convert_layer(progress, |tree, feeder| {
            take_members(tree, feeder, stream::open(counted)?, &mut counts)
        })?;
        report.read_bytes = read.get();
        Ok(self.push_report(report, counts, started))
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
        let (mut report, started) = self.convert_layer(progress, |tree, feeder| {
            let mut walker = Walker::new(tree, feeder, &read);
            walker.walk(root)?;
            counts = (walker.entry_count, walker.lost_xattrs);
            Ok(())
        })?;
        report.read_bytes = report.data_bytes;
        Ok(self.push_report(report, counts, started))
    }

    /// Adds a gzip layer that stays as it is: its digest becomes the blob's name, and what is
    /// written is only where its chunks are. The stream is read to its end.
    ///
    /// # Errors
    /// As `add_tar`; `Unsupported` for layers that are no gzip, hold sparse files or can be entered
    /// too rarely: convert those.
    pub fn add_gzip_as_is(
        &mut self,
        layer: impl Read,
        id: BlobId,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<LayerReport> {
        let number = self.report.layers.len();
        let table = BlobFile::create(&self.directory, number)?;
        let counted = Counted::new(layer, progress);
        let mut reader = GzipReader::new(counted, &self.directory, number)?;
        let mut counts = (0, 0);
        let plain = Options { compression: Compression::None, ..self.options.clone() };
        let run = self.run_layer(&plain, None, progress, |tree, feeder| {
            feeder.refuse_holes();
            take_members(tree, feeder, &mut reader, &mut counts)
        })?;
        let LayerRun { scribe, started } = run;
        let mut report = LayerReport::of(&scribe.tally, scribe.chunk_count());
        report.read_bytes = reader.stored_bytes();
        let mut index = reader.finish()?;
        if scribe.chunk_count() > 0 {
            let chunks = self.chunks.get_mut().unwrap_or_else(PoisonError::into_inner);
            let indexed = zran::write(&self.options, id, &mut index, &scribe, chunks, table)?;
            report.blob_bytes = indexed.meta.size_bytes;
            self.push_blob(indexed.record, BlobRole::Layer, Some(indexed.meta))?;
        }
        Ok(self.push_report(report, counts, started))
    }

    /// Feeds a layer through the pipeline.
    fn run_layer<'a>(
        &mut self,
        options: &Options,
        file: Option<BlobFile>,
        progress: &'a (dyn Fn(Progress) + Sync),
        feed: impl FnOnce(&mut Tree, &mut Feeder) -> Result<()>,
    ) -> Result<LayerRun<'a>> {
        let started = Instant::now();
        let blob = self.next_blob()?;
        let mut scribe = Scribe::new(blob, file, progress);
        let tree = &mut self.tree;
        tree.begin_layer();
        let feed = |feeder: &mut Feeder| feed(tree, feeder);
        pipeline::run(options, &self.chunks, &mut scribe, feed)?;
        pipeline::lock(&self.chunks).end_layer();
        Ok(LayerRun { scribe, started })
    }

    /// Feeds a layer whose chunks go into a blob of their own.
    fn convert_layer(
        &mut self,
        progress: &(dyn Fn(Progress) + Sync),
        feed: impl FnOnce(&mut Tree, &mut Feeder) -> Result<()>,
    ) -> Result<(LayerReport, Instant)> {
        let file = BlobFile::create(&self.directory, self.report.layers.len())?;
        let first = pipeline::lock(&self.chunks).len();
        let options = self.options.clone();
        let LayerRun { mut scribe, started } =
            self.run_layer(&options, Some(file), progress, feed)?;
        let mut report = LayerReport::of(&scribe.tally, scribe.chunk_count());
        let finished = scribe.finish(&options, &pipeline::lock(&self.chunks), first)?;
        if let Some((record, file)) = finished {
            report.blob_bytes = record.compressed_size;
            self.push_blob(record, BlobRole::Data, Some(file))?;
        }
        Ok((report, started))
    }

    /// The number the next blob gets.
    fn next_blob(&self) -> Result<u16> {
        u16::try_from(self.records.len()).map_err(|_| unsupported!("more than {} blobs", u16::MAX))
    }

    /// `file`: the blob, or the context table of a layer that stays as it is.
    fn push_blob(
        &mut self,
        record: BlobRecord,
        role: BlobRole,
        file: Option<Finished>,
    ) -> Result<()> {
        self.next_blob()?;
        let context = file.as_ref().filter(|_| role == BlobRole::Layer);
        self.blobs.push(Blob {
            id: record.id.clone(),
            role,
            layer: (role != BlobRole::Foreign).then_some(self.report.layers.len()),
            context: context.map(|file| (file.id.clone(), file.size_bytes)),
            is_new: file.as_ref().is_some_and(|file| file.is_new),
            path: file.map(|file| file.path),
            size_bytes: record.compressed_size,
            uncompressed_bytes: record.uncompressed_size,
        });
        self.records.push(record);
        Ok(())
    }

    fn push_report(
        &mut self,
        mut report: LayerReport,
        (entries, lost_xattrs): (u64, u64),
        started: Instant,
    ) -> LayerReport {
        (report.entries, report.lost_xattrs) = (entries, lost_xattrs);
        report.time_ms = started.elapsed().as_millis() as u64;
        self.report.layers.push(report.clone());
        report
    }

    /// Writes the bootstrap. Blobs no file needs are removed.
    pub fn finish(mut self) -> Result<Image> {
        let chunks = std::mem::take(&mut self.chunks);
        let chunks = chunks.into_inner().unwrap_or_else(PoisonError::into_inner);
        let written = bootstrap::write(&self.options, &mut self.tree, &chunks, &self.records)?;
        let mut blobs = Vec::new();
        for (number, blob) in std::mem::take(&mut self.blobs).into_iter().enumerate() {
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
        let made = |blob: &Blob| match (blob.role, &blob.context) {
            (BlobRole::Data, _) => blob.size_bytes,
            (_, Some((_, size))) => *size,
            _ => 0,
        };
        report.blob_bytes = blobs.iter().map(made).sum();
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
    if let Some(path) = blob.path.as_ref().filter(|_| blob.is_new) {
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

/// A layer that has been through the pipeline.
struct LayerRun<'a> {
    scribe: Scribe<'a>,
    started: Instant,
}

/// Applies the members of a tar and feeds their data; counts entries and lost attributes.
fn take_members(
    tree: &mut Tree,
    feeder: &mut Feeder,
    tar: impl Read,
    counts: &mut (u64, u64),
) -> Result<()> {
    let mut archive = Archive::new(tar);
    while let Some(member) = archive.next_member()? {
        counts.0 += 1;
        counts.1 += take_member(tree, feeder, &mut archive, member)? as u64;
    }
    Ok(())
}

/// Says how many of its attributes no image can hold.
fn take_member(
    tree: &mut Tree,
    feeder: &mut Feeder,
    archive: &mut Archive<impl Read>,
    mut member: Member,
) -> Result<usize> {
    let stated = member.xattrs.len();
    member.xattrs.retain(|(name, _)| split_xattr_name(name).is_some());
    let lost = stated - member.xattrs.len();
    let name_it =
        |error: Error| error.context(format!("{:?}", String::from_utf8_lossy(&member.path)));
    xattr_area(member.xattrs.iter().map(|(name, value)| (&name[..], &value[..])))
        .map_err(name_it)?;
    let data = match member.kind {
        Kind::File => take_data(feeder, archive, &member).map_err(name_it)?,
        _ => FileData::default(),
    };
    let (path, link) = (std::mem::take(&mut member.path), std::mem::take(&mut member.link));
    let (kind, (major, minor)) = (member.kind, member.device);
    let attributes = attributes(member);
    let entry = match kind {
        Kind::File => Entry::File(attributes, data),
        Kind::Directory => Entry::Directory(attributes),
        Kind::Symlink => Entry::Link(attributes, link),
        Kind::HardLink => Entry::HardLink(link),
        Kind::Character => Entry::Device(attributes, FileKind::CharacterDevice, major, minor),
        Kind::Block => Entry::Device(attributes, FileKind::BlockDevice, major, minor),
        Kind::Fifo => Entry::Special(attributes, FileKind::Pipe),
    };
    tree.apply(&path, entry)?;
    Ok(lost)
}

fn attributes(member: Member) -> Attributes {
    let (mtime_seconds, mtime_nanoseconds) = member.mtime;
    Attributes {
        permissions: member.mode as u16,
        uid: member.uid,
        gid: member.gid,
        mtime_seconds,
        mtime_nanoseconds,
        xattrs: member
            .xattrs
            .into_iter()
            .map(|(name, value)| (name.into(), value.into()))
            .collect(),
    }
}

fn take_data(
    feeder: &mut Feeder,
    archive: &mut Archive<impl Read>,
    member: &Member,
) -> Result<FileData> {
    let data = feeder.begin(member.size)?;
    let Some(segments) = &member.segments else {
        let offset = archive.offset();
        feeder.bytes(archive, member.size, offset)?;
        return Ok(data);
    };
    let mut at = 0;
    for &(start, length) in segments {
        feeder.zeros(start - at)?;
        let offset = archive.offset();
        feeder.bytes(archive, length, offset)?;
        at = start + length;
    }
    feeder.zeros(member.size - at)?;
    Ok(data)
}
