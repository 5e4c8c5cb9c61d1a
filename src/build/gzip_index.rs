//! Inflating a tar.gz while noting where inflating could begin.
//!
//! Gives the plain bytes through `Read`, member after member, checksums included. On the way it
//! collects *borders* (pairs of plain and stored offsets where blocks meet, at least
//! `BORDER_STEP_BYTES` of plain bytes apart) and *entries*: borders, about a MiB apart, whose
//! window is kept, so that a reader can begin there. Windows go to a file: they are 3 % of the
//! layer.

use super::scribe::{Partial, partial_name};
use crate::config::{BUILD_READ_BYTES, DEFLATE_DICTIONARY_MAX_BYTES};
use crate::error::{Error, Result};
use crate::image::codec::{GZIP_TRAILER_BYTES, gzip_header_bytes};
use crate::image::inflate::Inflater;
use crate::image::layer::GZIP_MAGIC;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

/// Plain bytes between two entries, at least.
const ENTRY_STEP_BYTES: u64 = 1 << 20;
/// The same where a gzip member begins: an entry there needs no window.
const MEMBER_STEP_BYTES: u64 = 1 << 19;
/// Plain bytes between two borders, at least: hostile streams have blocks without any.
const BORDER_STEP_BYTES: u64 = 4096;
/// A gzip header with its name and comment.
const HEADER_MAX_BYTES: usize = 64 << 10;

/// A place where inflating can begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) plain_offset: u64,
    pub(super) stored_offset: u64,
    /// Of the byte before `stored_offset`, so many high bits belong to what follows.
    pub(super) bits: u8,
    pub(super) byte: u8,
    /// In the windows' file.
    pub(super) window_offset: u64,
    pub(super) window_size: u32,
}

/// A place where two blocks meet: plain and stored offset.
pub(super) type Border = (u64, u64);

/// What was noted of a layer.
pub(super) struct GzipIndex {
    pub(super) entries: Vec<Entry>,
    /// Ascending; the last is the end of both.
    pub(super) borders: Vec<Border>,
    pub(super) windows: Windows,
}

/// The windows of all entries, one after the other.
pub(super) struct Windows {
    pub(super) file: File,
    _partial: Partial,
}

/// A tar.gz being inflated.
pub(super) struct GzipReader<R> {
    layer: R,
    input: Vec<u8>,
    /// The part of `input` that is not used yet.
    next: usize,
    end: usize,
    inflater: Inflater,
    checksum: flate2::Crc,
    is_inside: bool,
    stored_offset: u64,
    plain_offset: u64,
    last_byte: u8,
    entries: Vec<Entry>,
    borders: Vec<Border>,
    windows: BufWriter<File>,
    window_bytes: u64,
    partial: Partial,
}

impl<R: Read> GzipReader<R> {
    /// Windows go to a temporary file in `directory`.
    ///
    /// # Errors
    /// `Unsupported` when the layer is something else than gzip.
    pub(super) fn new(layer: R, directory: &Path, number: usize) -> Result<Self> {
        let partial = Partial::new(directory.join(partial_name("windows", number)));
        let file = partial.create()?;
        let mut reader = GzipReader {
            layer,
            input: vec![0; BUILD_READ_BYTES],
            next: 0,
            end: 0,
            inflater: Inflater::new(),
            checksum: flate2::Crc::new(),
            is_inside: false,
            stored_offset: 0,
            plain_offset: 0,
            last_byte: 0,
            entries: Vec::new(),
            borders: Vec::new(),
            windows: BufWriter::new(file),
            window_bytes: 0,
            partial,
        };
        // Before the first byte is given: what `Read` fails with has forgotten its kind.
        let is_whole = reader.refill(GZIP_MAGIC.len())?;
        if is_whole && !reader.input.starts_with(GZIP_MAGIC) {
            return Err(unsupported!("the layer is no gzip: convert it instead (--to rafs)"));
        }
        Ok(reader)
    }

    /// What was noted; the stream has been read to its end.
    pub(super) fn finish(mut self) -> Result<GzipIndex> {
        self.borders.push((self.plain_offset, self.stored_offset));
        let file = self.windows.into_inner();
        let file = file.map_err(|error| self.partial.failed(error.error()))?;
        let windows = Windows { file, _partial: self.partial };
        Ok(GzipIndex { entries: self.entries, borders: self.borders, windows })
    }

    /// Bytes of the layer so far.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.stored_offset
    }

    fn step(&mut self, output: &mut [u8]) -> Result<usize> {
        loop {
            if !self.is_inside && !self.begin_member()? {
                return Ok(0);
            }
            if self.next == self.end && !self.refill(1)? {
                return Err(malformed!("the layer is cut short: its gzip stream has no end"));
            }
            let input = &self.input[self.next..self.end];
            let (progress, border) = self.inflater.inflate_block(input, output)?;
            if let Some(last) = progress.consumed.checked_sub(1) {
                self.last_byte = input[last];
            }
            self.advance(progress.consumed);
            self.plain_offset += progress.produced as u64;
            self.checksum.update(&output[..progress.produced]);
            if let Some(bits) = border {
                self.note_border(bits)?;
            }
            if progress.ended {
                self.end_member()?;
            }
            if progress.produced > 0 {
                return Ok(progress.produced);
            }
        }
    }

    /// False at the end of the layer.
    fn begin_member(&mut self) -> Result<bool> {
        if !self.refill(HEADER_MAX_BYTES)? && self.next == self.end {
            return Ok(false);
        }
        let header = gzip_header_bytes(&self.input[self.next..self.end])?;
        self.last_byte = self.input[self.next + header - 1];
        self.advance(header);
        self.inflater.restart();
        self.checksum.reset();
        self.is_inside = true;
        let since = self.entries.last().map(|entry| self.plain_offset - entry.plain_offset);
        if since.is_none_or(|since| since >= MEMBER_STEP_BYTES) {
            self.push_entry(0, &[])?;
        }
        self.push_border();
        Ok(true)
    }

    fn end_member(&mut self) -> Result<()> {
        self.is_inside = false;
        if !self.refill(GZIP_TRAILER_BYTES)? {
            return Err(malformed!("the layer is cut short: a gzip member lacks its checksum"));
        }
        let trailer = &self.input[self.next..self.next + GZIP_TRAILER_BYTES];
        let expected = [self.checksum.sum().to_le_bytes(), self.checksum.amount().to_le_bytes()];
        if *trailer != *expected.as_flattened() {
            return Err(malformed!("a gzip member whose checksum is wrong"));
        }
        self.advance(GZIP_TRAILER_BYTES);
        Ok(())
    }

    fn note_border(&mut self, bits: u8) -> Result<()> {
        self.push_border();
        let since = self.entries.last().map_or(0, |entry| self.plain_offset - entry.plain_offset);
        if since >= ENTRY_STEP_BYTES {
            let mut window = [0; DEFLATE_DICTIONARY_MAX_BYTES];
            let length = self.inflater.window(&mut window)?;
            self.push_entry(bits, &window[..length])?;
        }
        Ok(())
    }

    fn push_border(&mut self) {
        let since = self.borders.last().map_or(u64::MAX, |border| self.plain_offset - border.0);
        if since >= BORDER_STEP_BYTES {
            self.borders.push((self.plain_offset, self.stored_offset));
        }
    }

    fn push_entry(&mut self, bits: u8, window: &[u8]) -> Result<()> {
        self.windows.write_all(window).map_err(|error| self.partial.failed(&error))?;
        self.entries.push(Entry {
            plain_offset: self.plain_offset,
            stored_offset: self.stored_offset,
            bits,
            byte: if bits == 0 { 0 } else { self.last_byte },
            window_offset: self.window_bytes,
            window_size: window.len() as u32,
        });
        self.window_bytes += window.len() as u64;
        Ok(())
    }

    fn advance(&mut self, count: usize) {
        self.next += count;
        self.stored_offset += count as u64;
    }

    /// Makes `wanted` bytes available; false if the layer ends before.
    fn refill(&mut self, wanted: usize) -> Result<bool> {
        if self.end - self.next >= wanted {
            return Ok(true);
        }
        self.input.copy_within(self.next..self.end, 0);
        (self.next, self.end) = (0, self.end - self.next);
        while self.end < wanted {
            match self.layer.read(&mut self.input[self.end..]) {
                Ok(0) => return Ok(false),
                Ok(count) => self.end += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(super::stream::unreadable(&error)),
            }
        }
        Ok(true)
    }
}

/// Errors of the format come wrapped, with their text.
impl<R: Read> Read for GzipReader<R> {
    fn read(&mut self, output: &mut [u8]) -> std::io::Result<usize> {
        if output.is_empty() {
            return Ok(0);
        }
        self.step(output).map_err(|error| match error {
            Error::System { errno, .. } => std::io::Error::from_raw_os_error(errno),
            error => std::io::Error::other(error),
        })
    }
}
