//! An image whose start is one blob: what a recorded start touched, in its order, side by side.
//!
//! Nothing else is made anew: the chunks that were touched are copied into a blob of their own, the
//! bootstrap leads there for them, and everything else stays where it is. The blob comes first in
//! the image's table, and the touched files are listed for prefetch in the order of their first
//! touch. Every chunk that is copied is verified against the bootstrap.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::Path;

use super::bootstrap;
use super::builder::{Blob, BlobRole};
use super::chunks::{Chunk, Chunks};
use super::compress::Packer;
use super::entry::{Attributes, Entry, FileData};
use super::options::{Compression, Options};
use super::scribe::{BlobFile, blank_record, context_entry};
use super::trace::Touch;
use super::tree::Tree;
use super::unpack::{Contents, ReadBlob};
use crate::error::{Error, Result};
use crate::image::superblock::BLOCK_BYTES;
use crate::image::{
    BlobRecord, Bootstrap, ChunkRecord, Compressor, Digest, FileChunk, FileKind, Inode, Layout,
};

/// What an optimised image is made of, besides the blobs it had.
#[derive(Debug)]
pub struct Optimized {
    /// The new metadata.
    pub bootstrap: Vec<u8>,
    /// The blob for the start.
    pub blob: Blob,
    /// Chunks in it.
    pub chunk_count: u64,
    /// Bytes of data in it.
    pub data_bytes: u64,
    /// Files that are listed for prefetch.
    pub file_count: u64,
    /// Touches of paths or ranges that the image does not have.
    pub missed_count: u64,
}

/// Makes an image start from one blob, which goes into `directory`. `layouts` are those of the
/// image's blobs, in order.
pub fn optimize(
    bootstrap: &Bootstrap,
    layouts: &[Layout],
    read: ReadBlob<'_>,
    touches: &[Touch],
    directory: &Path,
) -> Result<Optimized> {
    let refuse = |blob: &&BlobRecord| blob.is_batch() || blob.cipher.is_some();
    if let Some(blob) = bootstrap.blobs().iter().find(refuse) {
        return Err(unsupported!("blob {} is batched or encrypted; convert the image", blob.id));
    }
    let digests = Digests::of(bootstrap);
    let start = Start::of(bootstrap, &digests, touches)?;
    if start.chunks.is_empty() {
        return Err(Error::NotFound("the trace touches no data of this image".to_owned()));
    }
    let options = options(bootstrap, start.paths);
    let mut chunks = Chunks::default();
    let mut contents = Contents::new(layouts, read);
    let (record, blob) =
        copy(&options, &digests, &start.chunks, &mut contents, &mut chunks, directory)?;
    let data_bytes = chunks.since(0).iter().map(|chunk| u64::from(chunk.uncompressed_size)).sum();
    let chunk_count = chunks.len() as u64;
    for chunk in bootstrap.chunks() {
        chunks.offer(&chunk, chunk.blob_index as u16 + 1)?;
    }
    let mut tree = import(bootstrap, &digests, &mut chunks)?;
    let records: Vec<BlobRecord> =
        [&record].into_iter().chain(bootstrap.blobs()).cloned().collect();
    let written = bootstrap::write(&options, &mut tree, &chunks, &records)?;
    Ok(Optimized {
        bootstrap: written.bytes,
        blob,
        chunk_count,
        data_bytes,
        file_count: options.prefetch.len() as u64,
        missed_count: start.missed_count,
    })
}

/// The digest of every chunk, by blob and position in it.
struct Digests(HashMap<(u32, u32), Digest>);

impl Digests {
    fn of(bootstrap: &Bootstrap) -> Self {
        let digest = |chunk: ChunkRecord| ((chunk.blob_index, chunk.index.0), chunk.digest);
        Digests(bootstrap.chunks().map(digest).collect())
    }

    fn find(&self, chunk: &FileChunk) -> Result<Digest> {
        let found = self.0.get(&(chunk.blob_index, chunk.index.0)).copied();
        found.ok_or_else(|| malformed!("the bootstrap does not list a chunk of its files"))
    }
}

/// What a start needs.
#[derive(Default)]
struct Start {
    /// Each once, in the order of first touches.
    chunks: Vec<FileChunk>,
    paths: Vec<Vec<u8>>,
    missed_count: u64,
}

impl Start {
    fn of(bootstrap: &Bootstrap, digests: &Digests, touches: &[Touch]) -> Result<Start> {
        let tree = bootstrap.tree();
        let mut start = Start::default();
        let (mut seen, mut named) = (HashSet::new(), HashSet::new());
        let mut files: HashMap<&[u8], Option<Vec<FileChunk>>> = HashMap::new();
        for touch in touches {
            if !files.contains_key(&touch.path[..]) {
                let inode = tree.lookup(&touch.path).ok();
                let file = inode.filter(|inode| inode.kind == FileKind::File && inode.size > 0);
                let chunks = file.map(|file| tree.file_chunks(&file)?.collect()).transpose()?;
                files.insert(&touch.path, chunks);
            }
            let chunks = files.get(&touch.path[..]).and_then(Option::as_ref);
            let end = touch.offset.saturating_add(touch.length);
            let touched = |chunk: &&FileChunk| {
                chunk.file_offset < end && chunk.file_offset + u64::from(chunk.size) > touch.offset
            };
            let mut found = chunks.into_iter().flatten().filter(touched).peekable();
            if found.peek().is_none() {
                start.missed_count += 1;
                continue;
            }
            if named.insert(&touch.path) {
                start.paths.push(touch.path.clone());
            }
            for chunk in found {
                if seen.insert(digests.find(chunk)?) {
                    start.chunks.push(*chunk);
                }
            }
        }
        Ok(start)
    }
}

/// Stores like the image itself; untouched layers have no form of their own that could be taken.
fn options(bootstrap: &Bootstrap, prefetch: Vec<Vec<u8>>) -> Options {
    let superblock = bootstrap.superblock();
    let fallback = Options::default();
    Options {
        compression: match superblock.compressor {
            Compressor::None => Compression::None,
            Compressor::Lz4Block => Compression::Lz4Block,
            Compressor::Gzip | Compressor::Zstd => fallback.compression,
        },
        chunk_size: superblock.chunk_size,
        digest: superblock.digest_algorithm,
        prefetch,
        ..fallback
    }
}

/// Writes the blob for the start.
fn copy(
    options: &Options,
    digests: &Digests,
    wanted: &[FileChunk],
    contents: &mut Contents<'_>,
    chunks: &mut Chunks,
    directory: &Path,
) -> Result<(BlobRecord, Blob)> {
    let mut file = BlobFile::create(directory, 0)?;
    let mut packer = Packer::new(options.compression)?;
    let (mut packed, mut space, mut written) = (Vec::new(), 0, 0);
    for (index, wanted) in wanted.iter().enumerate() {
        let plain = contents.chunk(wanted)?;
        let stored = match packer.pack(plain, &mut packed, 0)? {
            Some(size) => &packed[..size],
            None => plain,
        };
        let chunk = Chunk {
            digest: digests.find(wanted)?,
            uncompressed_offset: space,
            compressed_offset: written,
            uncompressed_size: wanted.size,
            compressed_size: stored.len() as u32,
            index: index as u32,
            blob: 0,
            is_compressed: stored.len() < plain.len(),
        };
        let failed = |error: std::io::Error| Error::io(&error, "cannot write the new blob");
        (&mut file).write_all(stored).map_err(failed)?;
        written += stored.len() as u64;
        space += u64::from(wanted.size).next_multiple_of(BLOCK_BYTES as u64);
        chunks.add(chunk)?;
    }
    let table: Vec<u8> = chunks.since(0).iter().flat_map(context_entry).collect();
    let mut record = BlobRecord {
        chunk_count: wanted.len() as u32,
        uncompressed_size: space,
        ..blank_record(options)
    };
    file.write_context_table(&mut record, &table, (0, 0, 0))?;
    let finished = file.finish()?;
    record.id = finished.id.clone();
    record.compressed_size = finished.size_bytes;
    let blob = Blob {
        id: finished.id,
        role: BlobRole::Data,
        layer: None,
        path: Some(finished.path),
        is_new: finished.is_new,
        context: None,
        size_bytes: record.compressed_size,
        uncompressed_bytes: space,
    };
    Ok((record, blob))
}

/// The tree of an image, its files referring to the first chunk of each digest.
fn import(bootstrap: &Bootstrap, digests: &Digests, chunks: &mut Chunks) -> Result<Tree> {
    let image = bootstrap.tree();
    let mut tree = Tree::new();
    let mut first_names: HashMap<u64, Vec<u8>> = HashMap::new();
    for visit in image.walk() {
        let visit = visit?;
        let (path, inode) = (visit.path, visit.inode);
        if let Some(first) = first_names.get(&inode.nid) {
            tree.put(&path, Entry::HardLink(first.clone()))?;
            continue;
        }
        let attributes = attributes(image, &inode)?;
        let entry = match inode.kind {
            FileKind::Directory => Entry::Directory(attributes),
            FileKind::File => {
                let first = chunks.reference_count() as u32;
                if inode.size > 0 {
                    refer(image, &inode, digests, chunks)?;
                }
                Entry::File(attributes, FileData { size: inode.size, first })
            }
            FileKind::Link => Entry::Link(attributes, image.read_link(&inode)?),
            FileKind::CharacterDevice | FileKind::BlockDevice => {
                let (major, minor) = inode.device().unwrap_or_default();
                Entry::Device(attributes, inode.kind, major, minor)
            }
            FileKind::Pipe | FileKind::Socket => Entry::Special(attributes, inode.kind),
        };
        tree.put(&path, entry)?;
        if inode.kind != FileKind::Directory && inode.link_count > 1 {
            first_names.insert(inode.nid, path);
        }
    }
    Ok(tree)
}

fn refer(
    image: crate::image::Tree<'_>,
    file: &Inode,
    digests: &Digests,
    chunks: &mut Chunks,
) -> Result<()> {
    for chunk in image.file_chunks(file)? {
        let chunk = chunk?;
        let at = chunks.find(&digests.find(&chunk)?);
        let same = |at: &u32| chunks.chunk(*at).uncompressed_size == chunk.size;
        let at = at.filter(same).ok_or_else(|| malformed!("one digest for two sizes"))?;
        chunks.refer(at)?;
    }
    Ok(())
}

fn attributes(image: crate::image::Tree<'_>, inode: &Inode) -> Result<Attributes> {
    let xattrs = image.xattrs(inode)?.into_iter();
    let mut xattrs: Vec<_> =
        xattrs.map(|xattr| (xattr.name.into(), Box::<[u8]>::from(xattr.value))).collect();
    xattrs.sort();
    Ok(Attributes {
        permissions: inode.mode & 0o7777,
        uid: inode.uid,
        gid: inode.gid,
        mtime_seconds: inode.mtime_seconds as i64,
        mtime_nanoseconds: inode.mtime_nanoseconds,
        xattrs: xattrs.into(),
    })
}
