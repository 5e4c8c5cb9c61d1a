//! Every chunk of a blob against its digest, over all cores, in bounded memory.
//!
//! Owns the plan (which bytes are read together) and the workers. Reads each unit once, decodes it
//! as the daemon would, and reports each chunk that is not what the bootstrap says. Knows nothing
//! of files; who uses a bad chunk is found by walking the tree afterwards.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use super::blobs::{Blobs, Reader};
use super::progress::Progress;
use crate::config;
use crate::error::{Error, Result};
use crate::image::context::HEADER_BYTES;
use crate::image::{BlobRecord, Bootstrap, ChunkIndex, ContextTable, Decoder, Layout};

/// A chunk that cannot be had as the bootstrap says it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadChunk {
    /// Which one.
    pub index: ChunkIndex,
    /// What is wrong with it.
    pub reason: String,
}

/// What was found in one blob.
#[derive(Debug, Default)]
pub struct Report {
    /// Chunks whose bytes are right.
    pub good_count: u64,
    /// Decoded bytes of these.
    pub good_bytes: u64,
    /// Chunks that are not, by ascending index; at most `CHECK_BAD_CHUNKS_MAX`.
    pub bad: Vec<BadChunk>,
    /// How many there are.
    pub bad_count: u64,
}

/// The units that are read at once.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Batch {
    units: Range<u32>,
    range: Range<u64>,
}

/// Reads the blob's context table from where the record says it is.
///
/// # Errors
/// What the reader says; `Malformed` for what stands there.
pub fn context(record: &BlobRecord, reader: &Reader) -> Result<ContextTable> {
    let holder = match record.meta_digest.filter(|_| record.is_separate()) {
        Some(digest) => digest.to_string(),
        None => record.id.to_string(),
    };
    let table_end = record.ci_offset.saturating_add(record.ci_compressed_size);
    let end = table_end.saturating_add(HEADER_BYTES as u64);
    if end - record.ci_offset > config::CONTEXT_TABLE_MAX_BYTES as u64 {
        return Err(Error::Malformed(format!(
            "blob {}: a context table of {} bytes is more than we read",
            record.id,
            end - record.ci_offset
        )));
    }
    let bytes = reader.read(&holder, record.ci_offset..end)?;
    let (table, header) = bytes.split_at((table_end - record.ci_offset) as usize);
    ContextTable::parse(record, table, header)
}

/// Verifies every chunk the image uses of blob `blob_index`.
///
/// # Errors
/// The blob is absent, or its context table is not what the bootstrap says: nothing of it can be
/// verified then.
pub fn blob(
    bootstrap: &Bootstrap,
    blob_index: u32,
    blobs: &Blobs,
    progress: &Progress,
) -> Result<Report> {
    let record = &bootstrap.blobs()[blob_index as usize];
    let context = context(record, &blobs.reader()?)?;
    let layout = Layout::build(bootstrap, blob_index, Some(&context))?;
    let batches = plan(&layout);
    progress.expect(batches.iter().map(Batch::size_bytes).sum());
    let next = Mutex::new(batches.iter());
    let total = Mutex::new(Report::default());
    let absent = Mutex::new(None);
    let stop = AtomicBool::new(false);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..blobs.readers_wanted(cores).min(batches.len()) {
            scope.spawn(|| {
                let result = blobs.reader().and_then(|reader| {
                    let mut worker = Worker::new(&layout, reader);
                    while !stop.load(Ordering::Relaxed) {
                        let Some(batch) = lock(&next).next() else { break };
                        worker.check(batch)?;
                        progress.advance(batch.size_bytes());
                    }
                    worker.report.merge_into(&mut lock(&total));
                    Ok(())
                });
                if let Err(error) = result {
                    stop.store(true, Ordering::Relaxed);
                    *lock(&absent) = Some(error);
                }
            });
        }
    });
    if let Some(error) = lock(&absent).take() {
        return Err(error);
    }
    let mut report = std::mem::take(&mut *lock(&total));
    report.bad.sort_unstable_by_key(|bad| bad.index.0);
    Ok(report)
}

/// A worker that panicked leaves counts, not half a count.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Neighbouring units are read together, up to `CHECK_BATCH_BYTES`: a registry answers few long
/// ranges faster than many short ones.
fn plan(layout: &Layout) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    for number in 0..layout.unit_count() {
        let unit = layout.unit(number);
        let end = unit.compressed_offset + u64::from(unit.compressed_size);
        match batches.last_mut() {
            Some(batch)
                if unit.compressed_offset <= batch.range.end + config::CHECK_GAP_BYTES
                    && end.max(batch.range.end) - batch.range.start
                        <= config::CHECK_BATCH_BYTES =>
            {
                batch.units.end = number + 1;
                batch.range.end = batch.range.end.max(end);
            }
            _ => batches
                .push(Batch { units: number..number + 1, range: unit.compressed_offset..end }),
        }
    }
    batches
}

impl Batch {
    fn size_bytes(&self) -> u64 {
        self.range.end - self.range.start
    }
}

struct Worker<'a> {
    layout: &'a Layout,
    reader: Reader,
    decoder: Decoder,
    decoded: Vec<u8>,
    report: Report,
}

impl<'a> Worker<'a> {
    fn new(layout: &'a Layout, reader: Reader) -> Self {
        let decoder = Decoder::new();
        Worker { layout, reader, decoder, decoded: Vec::new(), report: Report::default() }
    }

    /// Only an absent blob ends the work; what cannot be read or decoded is a bad chunk.
    fn check(&mut self, batch: &Batch) -> Result<()> {
        let blob_id = self.layout.blob_id().to_string();
        match self.reader.read(&blob_id, batch.range.clone()) {
            Ok(bytes) => {
                for unit in batch.units.clone() {
                    self.check_unit(unit, &bytes, batch.range.start);
                }
                Ok(())
            }
            Err(error @ (Error::NotFound(_) | Error::Denied(_) | Error::Shutdown)) => Err(error),
            // A cut blob still has its front: try the units one by one.
            Err(_) if batch.units.len() > 1 => {
                for unit in batch.units.clone() {
                    let extent = self.layout.unit(unit);
                    let end = extent.compressed_offset + u64::from(extent.compressed_size);
                    let range = extent.compressed_offset..end;
                    self.check(&Batch { units: unit..unit + 1, range })?;
                }
                Ok(())
            }
            Err(error) => {
                self.condemn(batch.units.start, &error.to_string());
                Ok(())
            }
        }
    }

    fn check_unit(&mut self, number: u32, bytes: &[u8], start: u64) {
        let unit = self.layout.unit(number);
        let first = (unit.compressed_offset - start) as usize;
        let stored = &bytes[first..first + unit.compressed_size as usize];
        self.decoded.resize(unit.output_size as usize, 0);
        let decoded = self.decoder.decode_unit(self.layout, number, stored, &mut self.decoded);
        if let Err(error) = decoded {
            return self.condemn(number, &format!("cannot be decoded: {error}"));
        }
        for index in unit.chunks.map(ChunkIndex) {
            let chunk = self.layout.chunk(index);
            if chunk.digest.is_none() {
                continue;
            }
            let at = (chunk.uncompressed_offset - unit.uncompressed_offset) as usize;
            if self.layout.verify(index, &self.decoded[at..at + chunk.size as usize]) {
                self.report.good_count += 1;
                self.report.good_bytes += u64::from(chunk.size);
            } else {
                self.report.add(index, "its bytes do not have the bootstrap's digest");
            }
        }
    }

    /// All chunks of a unit are bad for the same reason.
    fn condemn(&mut self, unit: u32, reason: &str) {
        for index in self.layout.unit(unit).chunks.map(ChunkIndex) {
            if self.layout.chunk(index).digest.is_some() {
                self.report.add(index, reason);
            }
        }
    }
}

impl Report {
    fn add(&mut self, index: ChunkIndex, reason: &str) {
        self.bad_count += 1;
        if self.bad.len() < config::CHECK_BAD_CHUNKS_MAX {
            self.bad.push(BadChunk { index, reason: reason.to_owned() });
        }
    }

    fn merge_into(self, total: &mut Report) {
        total.good_count += self.good_count;
        total.good_bytes += self.good_bytes;
        total.bad_count += self.bad_count;
        let room = config::CHECK_BAD_CHUNKS_MAX - total.bad.len();
        total.bad.extend(self.bad.into_iter().take(room));
    }
}
