//! The bytes of a layer: counted as they come, decompressed as their first ones say.

use super::options::Progress;
use crate::config::BUILD_READ_BYTES;
use crate::error::{Error, Result};
use crate::image::layer::{GZIP_MAGIC, ZSTD_MAGIC, is_zstd};
use std::cell::Cell;
use std::io::{BufReader, Read};
use std::rc::Rc;

/// The largest window a zstd layer may ask memory for: 128 MiB, what `zstd` itself accepts.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;

/// The tar inside a layer: plain, gzip or zstd.
pub(super) fn open<'a>(mut layer: impl Read + 'a) -> Result<Box<dyn Read + 'a>> {
    let front = front(&mut layer).map_err(|error| unreadable(&error))?;
    let whole = std::io::Cursor::new(front.clone()).chain(layer);
    let buffered = BufReader::with_capacity(BUILD_READ_BYTES, whole);
    if front.starts_with(GZIP_MAGIC) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(buffered)));
    }
    if is_zstd(&front) {
        let mut decoder =
            zstd::stream::Decoder::with_buffer(buffered).map_err(|error| unreadable(&error))?;
        decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(|error| unreadable(&error))?;
        return Ok(Box::new(decoder));
    }
    Ok(Box::new(buffered))
}

pub(super) fn unreadable(error: &std::io::Error) -> Error {
    Error::io(error, "the layer cannot be read")
}

/// The first bytes: enough for a magic, fewer if the layer is shorter.
fn front(layer: &mut impl Read) -> std::io::Result<Vec<u8>> {
    let mut front = Vec::with_capacity(ZSTD_MAGIC.len());
    layer.take(ZSTD_MAGIC.len() as u64).read_to_end(&mut front)?;
    Ok(front)
}

/// Counts and reports what is read.
pub(super) struct Counted<'a, R> {
    layer: R,
    count: Rc<Cell<u64>>,
    progress: &'a (dyn Fn(Progress) + Sync),
}

impl<'a, R: Read> Counted<'a, R> {
    pub(super) fn new(layer: R, progress: &'a (dyn Fn(Progress) + Sync)) -> Self {
        Counted { layer, count: Rc::default(), progress }
    }

    /// How many bytes have been read, now and later.
    pub(super) fn count(&self) -> Rc<Cell<u64>> {
        Rc::clone(&self.count)
    }
}

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.layer.read(buffer)? as u64;
        self.count.set(self.count.get() + count);
        (self.progress)(Progress { read_bytes: count, written_bytes: 0 });
        Ok(count as usize)
    }
}
