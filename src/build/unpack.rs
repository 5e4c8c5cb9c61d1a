//! An image back into a directory: the inverse of building.
//!
//! Restores everything an image has: data (verified chunk by chunk against the bootstrap's
//! digests), owners, permissions, times, extended attributes, devices, hard links. Chunks of zeros
//! become holes. Reads blobs through a function it is handed, about a MiB at a time and in the
//! order of the files, which is mostly that of the blobs.

use super::target::{Looks, Target};
use crate::config::{PATH_MAX_BYTES, UNPACK_READ_BYTES};
use crate::error::{Error, Result};
use crate::image::{BlobId, Bootstrap, Decoder, FileChunk, FileKind, Inode, Layout, Tree};
use serde::Serialize;
use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What has been restored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Unpacked {
    /// Names, that of the root included.
    pub names: u64,
    /// Bytes of files; hard links counted once.
    pub data_bytes: u64,
    /// Bytes read of blobs.
    pub read_bytes: u64,
}

/// Reads a range of a blob.
pub type ReadBlob<'a> = &'a dyn Fn(&BlobId, Range<u64>) -> Result<Vec<u8>>;

/// Unpacks an image into `target`, which is empty or not there. `layouts` are those of the image's
/// blobs, in order; `progress` is told about each restored byte of data.
///
/// # Errors
/// `Digest` for a chunk that is not what the bootstrap says, naming it and the file. What has been
/// restored by then stays.
pub fn unpack(
    bootstrap: &Bootstrap,
    layouts: &[Layout],
    read: ReadBlob<'_>,
    target: &Path,
    progress: &dyn Fn(u64),
) -> Result<Unpacked> {
    let tree = bootstrap.tree();
    let mut target = Target::open(target)?;
    let mut contents = Contents::new(layouts, read);
    let mut done = Unpacked::default();
    let mut first_names: HashMap<u64, Vec<u8>> = HashMap::new();
    let mut directories: Vec<(Vec<u8>, Inode)> = Vec::new();
    for visit in tree.walk() {
        let visit = visit?;
        let (path, inode) = (visit.path, visit.inode);
        done.names += 1;
        if path.len() > PATH_MAX_BYTES {
            return Err(unsupported!("a path of {} bytes", path.len()));
        }
        if inode.kind == FileKind::Directory {
            if !path.is_empty() {
                target.make_directory(&path)?;
            }
            directories.push((path, inode));
            continue;
        }
        if let Some(first) = first_names.get(&inode.nid) {
            target.link(first, &path)?;
            continue;
        }
        match inode.kind {
            FileKind::File => {
                let file = target.make_file(&path)?;
                restore(&mut contents, tree, &inode, &file, progress).map_err(|error| {
                    error.context(format!("/{}", String::from_utf8_lossy(&path)))
                })?;
                done.data_bytes += inode.size;
            }
            FileKind::Link => target.make_link(&path, &tree.read_link(&inode)?)?,
            _ => target.make_special(&path, &inode)?,
        }
        target.dress(&path, &looks(tree, &inode)?)?;
        if inode.link_count > 1 {
            first_names.insert(inode.nid, path);
        }
    }
    // A directory's time changes with every name put into it: they come last, the innermost first.
    for (path, inode) in directories.iter().rev() {
        target.dress(path, &looks(tree, inode)?)?;
    }
    done.read_bytes = contents.read_bytes;
    Ok(done)
}

fn looks<'a>(tree: Tree<'a>, inode: &'a Inode) -> Result<Looks<'a>> {
    let xattrs = tree.xattrs(inode)?;
    let xattrs = xattrs.into_iter().map(|xattr| (xattr.name, xattr.value)).collect();
    Ok(Looks { inode, xattrs })
}

fn restore(
    contents: &mut Contents<'_>,
    tree: Tree<'_>,
    inode: &Inode,
    file: &File,
    progress: &dyn Fn(u64),
) -> Result<()> {
    for chunk in tree.file_chunks(inode)? {
        let chunk = chunk?;
        let bytes = contents.chunk(&chunk)?;
        if bytes.iter().any(|&byte| byte != 0) {
            file.write_all_at(bytes, chunk.file_offset)
                .map_err(|error| Error::io(&error, "cannot write"))?;
        }
        progress(chunk.size.into());
    }
    // A hole at the end is not written.
    file.set_len(inode.size).map_err(|error| Error::io(&error, "cannot set its size"))
}

/// The chunks of an image's blobs, one at a time.
pub(super) struct Contents<'a> {
    layouts: &'a [Layout],
    read: ReadBlob<'a>,
    decoder: Decoder,
    /// Bytes of a blob that have been read: blob, offset, bytes.
    window: (usize, u64, Vec<u8>),
    /// The unit decoded last: blob and number.
    unit: Option<(usize, u32)>,
    decoded: Vec<u8>,
    read_bytes: u64,
}

impl<'a> Contents<'a> {
    pub(super) fn new(layouts: &'a [Layout], read: ReadBlob<'a>) -> Self {
        Contents {
            layouts,
            read,
            decoder: Decoder::new(),
            window: (0, 0, Vec::new()),
            unit: None,
            decoded: Vec::new(),
            read_bytes: 0,
        }
    }

    /// The verified bytes of a chunk.
    pub(super) fn chunk(&mut self, wanted: &FileChunk) -> Result<&[u8]> {
        let blob = wanted.blob_index as usize;
        let layout = &self.layouts[blob];
        let chunk = layout.chunk(wanted.index);
        if chunk.unit == Layout::NO_UNIT || chunk.size != wanted.size {
            return Err(malformed!("the chunk table does not have its chunk {}", wanted.index));
        }
        let unit = layout.unit(chunk.unit);
        if self.unit != Some((blob, chunk.unit)) {
            self.unit = None;
            self.fill(blob, chunk.unit)?;
            let (_, start, window) = &self.window;
            let at = (unit.compressed_offset - start) as usize;
            self.decoded.resize(unit.output_size as usize, 0);
            let stored = &window[at..at + unit.compressed_size as usize];
            self.decoder.decode_unit(layout, chunk.unit, stored, &mut self.decoded)?;
            self.unit = Some((blob, chunk.unit));
        }
        let at = (chunk.uncompressed_offset - unit.uncompressed_offset) as usize;
        let bytes = &self.decoded[at..at + chunk.size as usize];
        match layout.verify(wanted.index, bytes) {
            true => Ok(bytes),
            false => Err(Error::Digest(format!(
                "blob {}, chunk {}: its bytes do not have the bootstrap's digest",
                layout.blob_id(),
                wanted.index
            ))),
        }
    }

    /// Makes the window hold a unit, and the units behind it as far as is worth a read.
    fn fill(&mut self, blob: usize, number: u32) -> Result<()> {
        let layout = &self.layouts[blob];
        let extent = |number: u32| {
            let unit = layout.unit(number);
            let start = unit.compressed_offset;
            start..start + u64::from(unit.compressed_size)
        };
        let wanted = extent(number);
        let (held, start, bytes) = &self.window;
        let end = start + bytes.len() as u64;
        if *held == blob && wanted.start >= *start && wanted.end <= end {
            return Ok(());
        }
        let mut range = wanted;
        for next in number + 1..layout.unit_count() {
            let next = extent(next);
            if next.start < range.start || next.end.max(range.end) - range.start > UNPACK_READ_BYTES
            {
                break;
            }
            range.end = range.end.max(next.end);
        }
        let bytes = (self.read)(layout.blob_id(), range.clone())?;
        self.read_bytes += bytes.len() as u64;
        self.window = (blob, range.start, bytes);
        Ok(())
    }
}
