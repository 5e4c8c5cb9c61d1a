//! The members of a tar, one after the other, as a stream.
//!
//! ustar, PAX and GNU with long names, sparse files of all versions and extended attributes.
//! Owns the position in the stream; after `next` a caller may read the member's data through
//! `Read`, and what it leaves is skipped. Everything a member says is checked for being possible,
//! not for being sensible: paths are the tree's business.
//!
//! An archive may end without its two blocks of zeros, as container runtimes allow, but never
//! within a member. Global PAX headers say nothing about files and are passed over, as they do.

use super::entry::Attributes;
use super::pax::{self, Extension};
use super::tar_header::{BLOCK_BYTES, Header, Segment, sparse_extension};
use crate::config::{TAR_EXTENSION_MAX_BYTES, TAR_EXTENSIONS_MAX, TAR_SEGMENTS_MAX};
use crate::error::{Error, Result};
use crate::image::FileKind;
use crate::image::inode_writer::split_xattr_name;
use std::io::Read;

/// A member of an archive; paths as stored.
#[derive(Clone, Debug)]
pub(super) struct Member {
    pub(super) path: Vec<u8>,
    pub(super) attributes: Attributes,
    pub(super) kind: MemberKind,
    /// Extended attributes no image can hold, by name.
    pub(super) lost_xattrs: usize,
}

/// What a member is.
#[derive(Clone, Debug)]
pub(super) enum MemberKind {
    File(FileShape),
    Directory,
    /// With its target.
    Link(Vec<u8>),
    /// With the path of the other name.
    HardLink(Vec<u8>),
    Device(FileKind, u32, u32),
    Pipe,
}

/// Bytes of a file, and which of them are in the archive.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct FileShape {
    pub(super) size: u64,
    /// `None`: all of them. Ascending and apart; between them are zeros.
    pub(super) segments: Option<Vec<Segment>>,
}

/// A tar being read.
pub(super) struct Archive<R> {
    stream: R,
    /// Bytes taken from the stream.
    offset: u64,
    /// Bytes of data and of padding before the next header.
    data: u64,
    padding: u64,
    is_over: bool,
}

impl<R: Read> Archive<R> {
    pub(super) fn new(stream: R) -> Self {
        Archive { stream, offset: 0, data: 0, padding: 0, is_over: false }
    }

    /// Where in the tar the next byte of data is.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next member; `None` at the end. The stream is then used up to its own end, so that
    /// whoever checks its digest has seen all of it.
    pub(super) fn next(&mut self) -> Result<Option<Member>> {
        let mut extension = Extension::default();
        for _ in 0..TAR_EXTENSIONS_MAX {
            let Some(header) = self.header()? else { return Ok(None) };
            let size = header.size()?;
            match header.kind() {
                b'x' | b'X' => extension.read(&self.extension_data(size)?)?,
                b'L' => extension.path = Some(self.long_name(size)?),
                b'K' => extension.link = Some(self.long_name(size)?),
                // Global headers and volume labels.
                b'g' | b'V' => self.begin_data(size),
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

    fn member(&mut self, header: &Header, extension: Extension) -> Result<Member> {
        let path = extension.path.clone().unwrap_or_else(|| header.path());
        let link = extension.link.clone().unwrap_or_else(|| header.link());
        let size = extension.size.map_or_else(|| header.size(), Ok)?;
        let (attributes, lost_xattrs) = attributes(header, &extension)?;
        let kind = match header.kind() {
            // Before ustar, directories were files whose names end in a slash.
            b'\0' | b'0' if path.ends_with(b"/") => {
                self.begin_data(size);
                MemberKind::Directory
            }
            b'\0' | b'0' | b'7' => {
                self.begin_data(size);
                MemberKind::File(self.file_shape(size, &extension)?)
            }
            b'S' => MemberKind::File(self.old_sparse(header, size)?),
            b'1' => MemberKind::HardLink(link),
            b'2' => MemberKind::Link(link),
            b'3' | b'4' => {
                let (major, minor) = header.device()?;
                let character = header.kind() == b'3';
                let kind =
                    if character { FileKind::CharacterDevice } else { FileKind::BlockDevice };
                MemberKind::Device(kind, major, minor)
            }
            b'5' => MemberKind::Directory,
            // GNU's incremental dumps: a directory, with a list of names that is for restoring.
            b'D' => {
                self.begin_data(size);
                MemberKind::Directory
            }
            b'6' => MemberKind::Pipe,
            other => {
                return Err(unsupported!("a member of type {:?}", char::from(other)));
            }
        };
        let path = extension.sparse.path.unwrap_or(path);
        Ok(Member { path, attributes, kind, lost_xattrs })
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

    fn begin_data(&mut self, size: u64) {
        self.data = size;
        self.padding = size.wrapping_neg() % BLOCK_BYTES as u64;
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
        self.begin_data(size);
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
    fn file_shape(&mut self, stored: u64, extension: &Extension) -> Result<FileShape> {
        let sparse = &extension.sparse;
        if !sparse.map_in_data && sparse.segments.is_none() {
            return Ok(FileShape { size: stored, segments: None });
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

    fn old_sparse(&mut self, header: &Header, stored: u64) -> Result<FileShape> {
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
        self.begin_data(stored);
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
fn sparse_shape(size: u64, mut segments: Vec<Segment>, stored: u64) -> Result<FileShape> {
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
    Ok(FileShape { size, segments: Some(segments) })
}

fn attributes(header: &Header, extension: &Extension) -> Result<(Attributes, usize)> {
    let owner = |stated: Option<i64>, header: Result<i64>| {
        let id = stated.map_or(header, Ok)?;
        u32::try_from(id).map_err(|_| malformed!("owner or group {id} is out of range"))
    };
    let (mtime_seconds, mtime_nanoseconds) = match extension.mtime {
        Some(mtime) => mtime,
        None => (header.mtime()?, 0),
    };
    let kept = extension.xattrs.iter().filter(|(name, _)| split_xattr_name(name).is_some());
    let kept = kept.map(|(name, value)| (name[..].into(), value[..].into()));
    let attributes = Attributes {
        permissions: (header.mode()? & 0o7777) as u16,
        uid: owner(extension.uid, header.uid())?,
        gid: owner(extension.gid, header.gid())?,
        mtime_seconds,
        mtime_nanoseconds,
        xattrs: kept.collect(),
    };
    let lost = extension.xattrs.len() - attributes.xattrs.len();
    Ok((attributes, lost))
}

fn broken(error: &std::io::Error) -> Error {
    match error.kind() {
        std::io::ErrorKind::UnexpectedEof => cut_short(),
        _ => super::stream::unreadable(error),
    }
}

fn cut_short() -> Error {
    malformed!("the layer is cut short: its tar ends within a member")
}
