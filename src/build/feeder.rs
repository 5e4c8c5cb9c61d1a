//! Cutting file data into pieces and packing pieces into jobs for the workers.
//!
//! A piece is the data of one chunk, should it become one: `chunk_size` bytes of a file, or the
//! rest of it. A job is a buffer with as many pieces as fit, so that small files do not cost a
//! message each. Bytes are read straight into a job's buffer and not copied again.
//!
//! The number of jobs is fixed when a layer begins; the feeder waits for a free one.

use super::entry::FileData;
use crate::config::{BUILD_JOB_PIECES_MAX, BUILD_REFERENCES_MAX};
use crate::error::{Error, Result};
use crate::image::Digest;
use crossbeam_channel::{Receiver, Sender};
use std::io::{ErrorKind, Read};

/// The data of one chunk in a job.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// Where it is in `Job::bytes`, while it is there as it is; unused if the piece is a hole.
    pub(super) start: u32,
    pub(super) size: u32,
    /// A whole chunk of zeros that is nowhere in memory.
    pub(super) is_hole: bool,
    /// For layers that stay as they are: where the piece is in the layer.
    pub(super) source_offset: u64,
    /// The worker's: what it found out.
    pub(super) digest: Digest,
    pub(super) packing: Packing,
}

/// What a worker did with a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// Nothing: there is a chunk with its digest, or there will be before its turn comes.
    Known,
    /// Its packed form is in `Job::bytes`.
    Packed { start: u32, size: u32 },
    /// Its packed form is no shorter.
    Plain,
}

/// A buffer of pieces on its way through the pipeline.
#[derive(Debug)]
pub(super) struct Job {
    /// Its position among the jobs of the layer.
    pub(super) number: u32,
    pub(super) pieces: Vec<Piece>,
    /// The data of its pieces: on the way to a worker as it is, behind it as it is stored.
    pub(super) bytes: Vec<u8>,
    /// How much of the buffer the feeder may fill.
    capacity: usize,
}

impl Job {
    /// A job with room for `capacity` bytes.
    pub(super) fn new(capacity: usize) -> Self {
        Job { number: 0, pieces: Vec::new(), bytes: vec![0; capacity], capacity }
    }

    /// The bytes of a piece, as they are.
    pub(super) fn plain<'a>(&'a self, piece: &Piece, zeros: &'a [u8]) -> &'a [u8] {
        match piece.is_hole {
            true => &zeros[..piece.size as usize],
            false => &self.bytes[piece.start as usize..][..piece.size as usize],
        }
    }

    /// What becomes of a piece in the blob. Behind the worker.
    pub(super) fn stored<'a>(&'a self, piece: &Piece, zeros: &'a [u8]) -> &'a [u8] {
        match piece.packing {
            Packing::Packed { start, size } => &self.bytes[start as usize..][..size as usize],
            Packing::Known | Packing::Plain => self.plain(piece, zeros),
        }
    }
}

/// The beginning of the pipeline: takes file data, in order.
pub(super) struct Feeder {
    chunk_size: usize,
    free: Receiver<Job>,
    work: Sender<Job>,
    job: Option<Job>,
    /// Bytes taken in the current job's buffer.
    filled: usize,
    next_job: u32,
    /// Pieces so far, of all layers.
    piece_count: u64,
    /// Bytes of the current file still to come.
    left: u64,
    /// Bytes the current piece has and lacks.
    open: (usize, usize),
    /// Where the open piece is in the layer.
    source_offset: u64,
    /// Zeros that are not in the layer cannot be chunks of it.
    refuses_holes: bool,
}

impl Feeder {
    /// `first_piece`: how many pieces earlier layers had.
    pub(super) fn new(
        chunk_size: u32,
        first_piece: usize,
        free: Receiver<Job>,
        work: Sender<Job>,
    ) -> Self {
        Feeder {
            chunk_size: chunk_size as usize,
            free,
            work,
            job: None,
            filled: 0,
            next_job: 0,
            piece_count: first_piece as u64,
            left: 0,
            open: (0, 0),
            source_offset: 0,
            refuses_holes: false,
        }
    }

    /// From now on every byte of a file must be in the layer.
    pub(super) fn refuse_holes(&mut self) {
        self.refuses_holes = true;
    }

    /// Begins a file. Exactly `size` bytes must follow, by `bytes` and `zeros`.
    pub(super) fn begin(&mut self, size: u64) -> Result<FileData> {
        assert_eq!(self.left, 0, "the file before is complete");
        let pieces = size.div_ceil(self.chunk_size as u64);
        if self.piece_count + pieces > BUILD_REFERENCES_MAX as u64 {
            return Err(unsupported!(
                "a file of {size} bytes: the image would have more than {BUILD_REFERENCES_MAX} \
                 chunks of file data; choose larger chunks"
            ));
        }
        let first = self.piece_count as u32;
        self.piece_count += pieces;
        self.left = size;
        Ok(FileData { size, first })
    }

    /// Takes the next `count` bytes of the file from `source`, which must have them.
    /// `source_offset` says where in the layer they are.
    pub(super) fn bytes(
        &mut self,
        source: &mut dyn Read,
        count: u64,
        source_offset: u64,
    ) -> Result<()> {
        let (mut rest, mut at) = (count, source_offset);
        while rest > 0 {
            let gap = self.gap(at)?;
            let wanted = gap.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
            let got = match source.read(&mut gap[..wanted]) {
                Ok(0) => return Err(malformed!("it ends {rest} bytes too early")),
                Ok(got) => got,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::io(&error, "its data cannot be read")),
            };
            rest -= got as u64;
            at += got as u64;
            self.filled(got);
        }
        Ok(())
    }

    /// Takes `count` zero bytes as the next of the file.
    pub(super) fn zeros(&mut self, count: u64) -> Result<()> {
        if self.refuses_holes && count > 0 {
            return Err(unsupported!(
                "a sparse file in a layer that is to stay as it is: convert the layer instead"
            ));
        }
        let mut rest = count;
        while rest > 0 {
            let whole = self.chunk_size as u64;
            if self.open == (0, 0) && rest >= whole && self.left >= whole {
                self.hole()?;
                rest -= whole;
                continue;
            }
            let gap = self.gap(0)?;
            let size = gap.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
            gap[..size].fill(0);
            rest -= size as u64;
            self.filled(size);
        }
        Ok(())
    }

    /// Hands over what is left; the pipeline ends when it has worked on it.
    pub(super) fn finish(mut self) -> Result<()> {
        assert_eq!(self.left, 0, "the last file is complete");
        self.submit()
    }

    /// The room for the rest of the open piece; opens one if none is.
    fn gap(&mut self, source_offset: u64) -> Result<&mut [u8]> {
        assert!(self.left > 0, "no more bytes than the file has");
        if self.open == (0, 0) {
            let size = self.chunk_size.min(usize::try_from(self.left).unwrap_or(usize::MAX));
            self.reserve(size)?;
            self.open = (0, size);
            self.source_offset = source_offset;
        }
        let job = self.job.as_mut().ok_or(Error::Shutdown)?;
        Ok(&mut job.bytes[self.filled..self.filled + self.open.1])
    }

    /// So many bytes have been put into the gap.
    fn filled(&mut self, count: usize) {
        self.filled += count;
        self.left -= count as u64;
        self.open = (self.open.0 + count, self.open.1 - count);
        if self.open.1 == 0 {
            let size = self.open.0;
            self.push(self.filled - size, size, false);
            self.open = (0, 0);
        }
    }

    fn hole(&mut self) -> Result<()> {
        self.reserve(0)?;
        self.push(0, self.chunk_size, true);
        self.left -= self.chunk_size as u64;
        Ok(())
    }

    fn push(&mut self, start: usize, size: usize, is_hole: bool) {
        let piece = Piece {
            start: start as u32,
            size: size as u32,
            is_hole,
            source_offset: self.source_offset,
            digest: Digest([0; 32]),
            packing: Packing::Known,
        };
        let job = self.job.as_mut().expect("invariant: room was reserved in a job");
        job.pieces.push(piece);
    }

    /// Makes sure that the current job has room for a piece.
    fn reserve(&mut self, size: usize) -> Result<()> {
        let full = |job: &Job| {
            job.capacity - self.filled < size || job.pieces.len() >= BUILD_JOB_PIECES_MAX
        };
        if self.job.as_ref().is_some_and(full) {
            self.submit()?;
        }
        if self.job.is_none() {
            // The channel breaks when the scribe has failed; its error is the one to report.
            let mut job = self.free.recv().map_err(|_| Error::Shutdown)?;
            job.pieces.clear();
            job.number = self.next_job;
            self.next_job += 1;
            self.filled = 0;
            self.job = Some(job);
        }
        Ok(())
    }

    fn submit(&mut self) -> Result<()> {
        match self.job.take() {
            Some(job) => self.work.send(job).map_err(|_| Error::Shutdown),
            None => Ok(()),
        }
    }
}
