//! The image that is read: its bootstrap, its blob's layout, and the truth about its bytes.
//!
//! An image is a folder with `image.boot` and the blob, named by its id. One blob, stored as chunks
//! that the bootstrap alone describes: what the measurements are about, and no more.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use sluice::image::bootstrap::Bootstrap;
use sluice::image::decode::Decoder;
use sluice::image::identity::ChunkIndex;
use sluice::image::layout::Layout;

/// An image on disk.
pub struct Image {
    /// Where `image.boot` is.
    pub bootstrap: PathBuf,
    /// Bytes of it.
    pub bootstrap_size: u64,
    /// The blob's name.
    pub blob_id: String,
    /// Where its chunks are.
    pub layout: Layout,
    blob: File,
}

impl Image {
    /// Reads the folder.
    pub fn open(folder: &Path) -> io::Result<Self> {
        let bootstrap = folder.join("image.boot").canonicalize()?;
        let bytes = std::fs::read(&bootstrap)?;
        let bootstrap_size = bytes.len() as u64;
        let parsed = Bootstrap::parse(bytes).map_err(io::Error::other)?;
        let [record] = parsed.blobs() else {
            return Err(io::Error::other("only images of one blob are measured"));
        };
        if Layout::needs_context(record) {
            return Err(io::Error::other("images with a context table are not measured"));
        }
        let layout = Layout::build(&parsed, 0, None).map_err(io::Error::other)?;
        let blob_id = record.id.to_string();
        let blob = File::open(folder.join(&blob_id))?;
        Ok(Image { bootstrap, bootstrap_size, blob_id, layout, blob })
    }

    /// Bytes of the blob's address space.
    pub fn size(&self) -> u64 {
        self.layout.uncompressed_size()
    }

    /// Compares what a cache file holds of `data` with what the image says, whole chunks only.
    /// Gives how many bytes were compared.
    pub fn verify(&self, cache: &File, data: Range<u64>) -> io::Result<u64> {
        let mut decoder = Decoder::new();
        let (mut stored, mut right, mut found) = (Vec::new(), Vec::new(), Vec::new());
        let mut compared = 0;
        for chunk in self.layout.chunks_in(data.clone()).map(ChunkIndex) {
            let chunk = self.layout.chunk(chunk);
            let end = chunk.uncompressed_offset + u64::from(chunk.padded_size());
            let is_whole = chunk.uncompressed_offset >= data.start && end <= data.end;
            if !is_whole || chunk.unit == Layout::NO_UNIT {
                continue;
            }
            let unit = self.layout.unit(chunk.unit);
            stored.resize(unit.compressed_size as usize, 0);
            right.resize(unit.output_size as usize, 0);
            found.resize(unit.output_size as usize, 0);
            self.blob.read_exact_at(&mut stored, unit.compressed_offset)?;
            decoder
                .decode_unit(&self.layout, chunk.unit, &stored, &mut right)
                .map_err(io::Error::other)?;
            cache.read_exact_at(&mut found, unit.uncompressed_offset)?;
            if found != right {
                let text = format!("wrong bytes in the cache at {}", unit.uncompressed_offset);
                return Err(io::Error::other(text));
            }
            compared += u64::from(unit.output_size);
        }
        Ok(compared)
    }
}
