//! The members of an archive, one after the other, as a stream.
//!
//! Owns the position in the stream; after `next_member` a caller may read the member's data through
//! `Read` or `copy`, and what it leaves is skipped. Nothing is kept but one header and its
//! extensions.
//!
//! An archive may end without its two blocks of zeros, as container runtimes allow, but never
//! within a member. Global PAX headers say nothing about files and are passed over, as they do.

use super::header::{Header, sparse_extension};
use super::pax::{self, Extension};
use super::{BLOCK_BYTES, Kind, Member, Segment};
use crate::config::{
    TAR_COPY_BYTES, TAR_EXTENSION_MAX_BYTES, TAR_EXTENSIONS_MAX, TAR_SEGMENTS_MAX,
};
use crate::error::{Error, Result};
use std::io::Read;

/// Bytes of a file, and which of them are in the archive.
type Shape = (u64, Option<Vec<Segment>>);

/// A tar being read.
#[derive(Debug)]
pub struct Archive<R> {
    stream: R,
    /// Bytes taken from the stream.
    offset: u64,
    /// Bytes of data and of padding before the next header.
    data: u64,
    padding: u64,
    is_over: bool,
}

impl<R: Read> Archive<R> {
    /// Reads from the first byte of `stream`.
    pub fn new(stream: R) -> Self {
        Archive { stream, offset: 0, data: 0, padding: 0, is_over: false }
    }

    /// Where in the tar the next byte of data is.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The next member; `None` at the end. The stream is then used up to its own end, so that
    /// whoever checks its digest has seen all of it.
    pub fn next_member(&mut self) -> Result<Option<Member>> {
        let mut extension = Extension::default();
        for _ in 0..TAR_EXTENSIONS_MAX {
            let Some(header) = self.header()? else { return Ok(None) };
            let size = header.size()?;
            match header.kind() {
                b'x' | b'X' => extension.read(&self.extension_data(size)?)?,
                b'L' => extension.path = Some(self.long_name(size)?),
                b'K' => extension.link = Some(self.long_name(size)?),
                // Global headers and volume labels.
                b'g' | b'V' => self.begin_data(size)?,
                _ => {
                    let path = extension.path.clone().unwrap_or_else(|| header.path());
                    let member = self.member(&header, extension);
                    let shown = String::from_utf8_lossy(&path);
                    return member.map(Some).map_err(|error| error.context(format!("{shown:?}")));
                }
            }
        }
        Err(malformed!("more than {TAR_EXTENSIONS_MAX} extension headers before a file"))
    }

    /// Hands what the archive holds of a file's content to `sink`, with its place in the file.
    ///
    /// # Errors
    /// The archive's, and the sink's.
    pub fn copy(
        &mut self,
        member: &Member,
        mut sink: impl FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let whole = [(0, member.size)];
        let mut buffer = vec![0; member.size.min(TAR_COPY_BYTES as u64) as usize];
        for &(mut offset, mut left) in member.segments.as_deref().unwrap_or(&whole) {
            while left > 0 {
                let wanted = left.min(buffer.len() as u64) as usize;
                let count = match self.read(&mut buffer[..wanted]) {
                    Ok(0) => return Err(cut_short()),
                    Ok(count) => count,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    Err(error) => return Err(broken(&error)),
                };
                sink(offset, &buffer[..count])?;
                offset += count as u64;
                left -= count as u64;
            }
        }
        Ok(())
    }

    /// The member of a header, its extensions applied. Only files have content, whatever the size
    /// field of another kind says.
    fn member(&mut self, header: &Header, extension: Extension) -> Result<Member> {
        let path = extension.path.clone().unwrap_or_else(|| header.path());
        let stored = extension.size.map_or_else(|| header.size(), Ok)?;
        let kind = match header.kind() {
            // Before there were flags, a slash at the end made a directory.
            b'\0' if path.ends_with(b"/") => Kind::Directory,
            b'\0' | b'0' | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::Character,
            b'4' => Kind::Block,
            b'5' | b'D' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => {
                return Err(unsupported!("a member of the unknown type {:?}", char::from(other)));
            }
        };
        // GNU's incremental dumps: a directory, with a list of names that is for restoring.
        if kind == Kind::File || matches!(header.kind(), b'\0' | b'D') {
            self.begin_data(stored)?;
        }
        let (size, segments) = match (kind, header.kind()) {
            (Kind::File, b'S') => self.old_sparse(header, stored)?,
            (Kind::File, _) => self.file_shape(stored, &extension)?,
            _ => (0, None),
        };
        let owner = |stated: Option<i64>, header: Result<i64>| {
            let id = stated.map_or(header, Ok)?;
            u32::try_from(id).map_err(|_| malformed!("owner or group {id} is out of range"))
        };
        Ok(Member {
            link: extension.link.unwrap_or_else(|| header.link()),
            mode: (header.mode()? & 0o7777) as u32,
            uid: owner(extension.uid, header.uid())?,
            gid: owner(extension.gid, header.gid())?,
            mtime: match extension.mtime {
                Some(mtime) => mtime,
                None => (header.mtime()?, 0),
            },
            device: match kind {
                Kind::Character | Kind::Block => header.device()?,
                _ => (0, 0),
            },
            xattrs: extension.xattrs.into_iter().collect(),
            path: extension.sparse.path.unwrap_or(path),
            kind,
            size,
            segments,
        })
    }

    /// The next header that is none of zeros.
    fn header(&mut self) -> Result<Option<Header>> {
        if self.is_over {
            return Ok(None);
        }
        self.skip_data()?;
        let mut block = [0; BLOCK_BYTES];
        match self.read_block(&mut block)? {
            true => {}
            false => return self.finish(),
        }
        if let Some(header) = Header::parse(&block)? {
            return Ok(Some(header));
        }
        if self.read_block(&mut block)? && Header::parse(&block)?.is_some() {
            return Err(malformed!("a block of zeros between the members of the tar"));
        }
        self.finish()
    }

    fn finish(&mut self) -> Result<Option<Header>> {
        self.is_over = true;
        std::io::copy(&mut self.stream, &mut std::io::sink()).map_err(|error| broken(&error))?;
        Ok(None)
    }

    fn begin_data(&mut self, size: u64) -> Result<()> {
        // With its padding it is still a position in a file.
        if size > i64::MAX as u64 - BLOCK_BYTES as u64 {
            return Err(malformed!("a length of {size}"));
        }
        self.data = size;
        self.padding = size.wrapping_neg() % BLOCK_BYTES as u64;
        Ok(())
    }

    fn skip_data(&mut self) -> Result<()> {
        let left = self.data + self.padding;
        let skipped = std::io::copy(&mut (&mut self.stream).take(left), &mut std::io::sink())
            .map_err(|error| broken(&error))?;
        self.offset += skipped;
        if skipped < left {
            return Err(cut_short());
        }
        (self.data, self.padding) = (0, 0);
        Ok(())
    }

    /// False at the end of the stream.
    fn read_block(&mut self, block: &mut [u8; BLOCK_BYTES]) -> Result<bool> {
        let mut filled = 0;
        while filled < BLOCK_BYTES {
            match self.stream.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(cut_short()),
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(broken(&error)),
            }
        }
        self.offset += BLOCK_BYTES as u64;
        Ok(true)
    }

    fn extension_data(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > TAR_EXTENSION_MAX_BYTES {
            return Err(unsupported!("an extension header of {size} bytes"));
        }
        self.begin_data(size)?;
        let mut data = Vec::new();
        self.take(size).read_to_end(&mut data).map_err(|error| broken(&error))?;
        if data.len() as u64 != size {
            return Err(cut_short());
        }
        Ok(data)
    }

    fn long_name(&mut self, size: u64) -> Result<Vec<u8>> {
        let mut name = self.extension_data(size)?;
        name.truncate(name.iter().position(|&byte| byte == 0).unwrap_or(name.len()));
        Ok(name)
    }

    /// What a regular header and its extensions say of a file's data.
    fn file_shape(&mut self, stored: u64, extension: &Extension) -> Result<Shape> {
        let sparse = &extension.sparse;
        if !sparse.map_in_data && sparse.segments.is_none() {
            return Ok((stored, None));
        }
        let size = sparse.size.ok_or_else(|| malformed!("a sparse file without its size"))?;
        let segments = match &sparse.segments {
            Some(segments) if !sparse.map_in_data => segments.clone(),
            _ => self.map_in_data()?,
        };
        sparse_shape(size, segments, self.data)
    }

    /// The map of a version 1.0 sparse file: numbers on lines of their own, in whole blocks.
    fn map_in_data(&mut self) -> Result<Vec<Segment>> {
        let mut lines = Lines { archive: self, block: [0; BLOCK_BYTES], at: BLOCK_BYTES };
        let count = lines.number()?;
        if count > TAR_SEGMENTS_MAX as u64 {
            return Err(pax::too_many());
        }
        (0..count).map(|_| Ok((lines.number()?, lines.number()?))).collect()
    }

    /// GNU's old form: the first of the map in the header, the rest in blocks of its own.
    fn old_sparse(&mut self, header: &Header, stored: u64) -> Result<Shape> {
        let (mut segments, size, mut more) = header.sparse()?;
        while more {
            let mut block = [0; BLOCK_BYTES];
            if !self.read_block(&mut block)? {
                return Err(cut_short());
            }
            let (further, again) = sparse_extension(&block)?;
            segments.extend(further);
            more = again;
            if segments.len() > TAR_SEGMENTS_MAX {
                return Err(pax::too_many());
            }
        }
        sparse_shape(size, segments, stored)
    }
}

/// The data of the current member.
impl<R: Read> Read for Archive<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.data).unwrap_or(usize::MAX));
        let count = self.stream.read(&mut buffer[..wanted])?;
        self.data -= count as u64;
        self.offset += count as u64;
        Ok(count)
    }
}

/// Reads the numbers in front of a sparse file's data.
struct Lines<'a, R> {
    archive: &'a mut Archive<R>,
    block: [u8; BLOCK_BYTES],
    at: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> Result<u64> {
        let mut digits = Vec::new();
        loop {
            match self.byte()? {
                b'\n' => return pax::decimal(&digits),
                _ if digits.len() > 19 => return Err(malformed!("a sparse map of long numbers")),
                digit => digits.push(digit),
            }
        }
    }

    fn byte(&mut self) -> Result<u8> {
        if self.at == BLOCK_BYTES {
            if self.archive.data < BLOCK_BYTES as u64 {
                return Err(malformed!("a sparse map longer than the data it is in"));
            }
            if !self.archive.read_block(&mut self.block)? {
                return Err(cut_short());
            }
            self.archive.data -= BLOCK_BYTES as u64;
            self.at = 0;
        }
        self.at += 1;
        Ok(self.block[self.at - 1])
    }
}

/// Checks a map: segments ascend, end inside the file and are all there is in the archive. Empty
/// ones, which mark a file's end, are left out.
fn sparse_shape(size: u64, mut segments: Vec<Segment>, stored: u64) -> Result<Shape> {
    segments.retain(|&(_, length)| length > 0);
    let (mut end, mut sum) = (0u64, 0u64);
    for &(offset, length) in &segments {
        let next = offset.checked_add(length).filter(|&next| offset >= end && next <= size);
        end = next.ok_or_else(|| malformed!("a sparse map whose segments overlap or leave it"))?;
        sum += length;
    }
    if sum != stored {
        return Err(malformed!("a sparse map of {sum} bytes with {stored} bytes of data"));
    }
    Ok((size, Some(segments)))
}

fn broken(error: &std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => cut_short(),
        _ => Error::io(error, "the layer cannot be read"),
    }
}

fn cut_short() -> Error {
    malformed!("the layer is cut short: its tar ends within a member")
}
