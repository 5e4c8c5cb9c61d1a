//! The floor: what a reader would wait if nothing were between it and the origin.
//!
//! Each reader has a warm keep-alive connection and buffers of its own. A read GETs the chunks it
//! touches (with one range, like ours), decodes, verifies the digests, writes them to a file with
//! direct I/O, and nothing else: no daemon, no queue, no wake-up, no upcall. With `ahead`, a read
//! fetches as much in one GET; that is the floor of a sequential reader.

use std::fs::{File, OpenOptions};
use std::io;
use std::net::TcpStream;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use sluice::image::decode::Decoder;
use sluice::image::identity::ChunkIndex;
use sluice::image::layout::Layout;

use crate::http::Client;
use crate::image::Image;
use crate::load::{Target, Touch};
use crate::plan::Operation;

const PAGE_BYTES: usize = 4096;

/// The floor as a target.
pub struct Floor<'a> {
    image: &'a Image,
    path: String,
    file: File,
    /// Which chunks have been written.
    present: Vec<AtomicBool>,
    benches: Vec<Mutex<Bench>>,
    ahead: u64,
}

/// What one reader has.
struct Bench {
    client: Client<TcpStream>,
    decoder: Decoder,
    stored: Vec<u8>,
    output: Vec<u8>,
}

impl<'a> Floor<'a> {
    /// Connects every reader; the cache file is made in `work`.
    pub fn new(
        image: &'a Image,
        origin: &str,
        work: &Path,
        readers: usize,
        ahead: u64,
    ) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.custom_flags(nix::libc::O_DIRECT).open(work.join("floor"))?;
        file.set_len(image.size())?;
        let benches = (0..readers).map(|_| Bench::new(origin).map(Mutex::new));
        Ok(Floor {
            image,
            path: format!("/v2/measured/image/blobs/sha256:{}", image.blob_id),
            file,
            present: (0..image.layout.chunk_count()).map(|_| AtomicBool::new(false)).collect(),
            benches: benches.collect::<io::Result<_>>()?,
            ahead,
        })
    }

    /// Bytes written so far.
    pub fn filled_bytes(&self) -> u64 {
        let chunks = (0..).map(ChunkIndex).zip(&self.present);
        let written = chunks.filter(|(_, present)| present.load(Ordering::Relaxed));
        written.map(|(chunk, _)| u64::from(self.image.layout.chunk(chunk).padded_size())).sum()
    }

    /// Fetches and writes consecutive chunks, all absent and each a unit of its own.
    fn fetch(&self, bench: &mut Bench, chunks: Range<u32>) -> io::Result<()> {
        let layout = &self.image.layout;
        let unit = |chunk| layout.unit(layout.chunk(ChunkIndex(chunk)).unit);
        let (first, last) = (unit(chunks.start), unit(chunks.end - 1));
        let stored_end = last.compressed_offset + u64::from(last.compressed_size);
        bench.stored.resize((stored_end - first.compressed_offset) as usize, 0);
        bench.client.range(&self.path, first.compressed_offset, &mut bench.stored)?;
        let output_end = last.uncompressed_offset + u64::from(last.output_size);
        let size = (output_end - first.uncompressed_offset) as usize;
        bench.output.resize((size + PAGE_BYTES).max(bench.output.len()), 0);
        let aligned = bench.output.as_ptr().align_offset(PAGE_BYTES);
        let output = &mut bench.output[aligned..aligned + size];
        for index in chunks.clone().map(ChunkIndex) {
            let chunk = layout.chunk(index);
            let unit = layout.unit(chunk.unit);
            let from = (unit.compressed_offset - first.compressed_offset) as usize;
            let stored = &bench.stored[from..from + unit.compressed_size as usize];
            let start = (unit.uncompressed_offset - first.uncompressed_offset) as usize;
            let place = &mut output[start..start + unit.output_size as usize];
            bench
                .decoder
                .decode_unit(layout, chunk.unit, stored, place)
                .map_err(io::Error::other)?;
            if !layout.verify(index, &place[..chunk.size as usize]) {
                return Err(io::Error::other(format!("chunk {} is not right", index.0)));
            }
        }
        self.file.write_all_at(output, first.uncompressed_offset)?;
        for chunk in chunks {
            self.present[chunk as usize].store(true, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Bench {
    fn new(origin: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(origin)?;
        stream.set_nodelay(true)?;
        let (stored, output) = (Vec::new(), Vec::new());
        Ok(Bench { client: Client::new(stream, origin), decoder: Decoder::new(), stored, output })
    }
}

impl Target for Floor<'_> {
    fn read(&self, reader: usize, operation: &Operation) -> io::Result<Touch> {
        let layout: &Layout = &self.image.layout;
        let mut bench = self.benches[reader].lock().unwrap_or_else(PoisonError::into_inner);
        let range = operation.offset..operation.offset + operation.length;
        let wanted = layout.chunks_in(range.clone());
        let reach = range.start..range.end.max(range.start + self.ahead);
        let reach = layout.chunks_in(reach).end.max(wanted.end);
        let is_present = |chunk: u32| self.present[chunk as usize].load(Ordering::Relaxed);
        let Some(start) = wanted.clone().find(|&chunk| !is_present(chunk)) else {
            return Ok(Touch::Hit);
        };
        let end = (start..reach).find(|&chunk| is_present(chunk)).unwrap_or(reach);
        self.fetch(&mut bench, start..end)?;
        Ok(Touch::Miss)
    }
}
