//! One layer's data from the feeder through the workers to the scribe.
//!
//! ```text
//! feeder (the caller's thread) -> work -> workers -> done -> scribe -> free -> feeder
//! ```
//! A fixed number of jobs goes round, so memory is bounded and everybody waits for the slowest. A
//! worker packs a job into a buffer of its own and keeps the job's for the next one.
//! Workers take jobs as they come; the scribe puts them in order again. The first error ends all:
//! channels break in both directions, and the scribe's error wins over the breakage it causes.

use super::chunks::{Chunks, Claim, PieceOrder};
use super::compress::{Packer, room};
use super::feeder::{Feeder, Job, Packing};
use super::options::Options;
use super::scribe::Scribe;
use crate::config::{BUILD_IN_FLIGHT_BYTES, BUILD_JOB_BYTES};
use crate::error::{Error, Result};
use crate::image::Digest;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// Runs `feed` and everything behind it; answers when the scribe has written all of it.
pub(super) fn run(
    options: &Options,
    chunks: &Mutex<Chunks>,
    scribe: &mut Scribe<'_>,
    feed: impl FnOnce(&mut Feeder) -> Result<()>,
) -> Result<()> {
    let capacity = BUILD_JOB_BYTES.max(options.chunk_size as usize);
    // A buffer for each job, and one for each worker, of which there are no more.
    let affordable = (BUILD_IN_FLIGHT_BYTES / (2 * capacity)).max(2);
    // One for each worker, one being filled, one being written.
    let job_count = affordable.min(options.threads + 2);
    let (give_back, free) = bounded(job_count);
    let (work, jobs) = bounded(job_count);
    let (done, results) = bounded(job_count + options.threads);
    for _ in 0..job_count {
        give_back.send(Job::new(capacity)).map_err(|_| Error::Shutdown)?;
    }
    let first_piece = lock(chunks).reference_count();
    let bench = Bench::new(options, chunks);
    let feeder = Feeder::new(options.chunk_size, first_piece, free, work);
    std::thread::scope(|scope| {
        for _ in 0..options.threads.min(job_count) {
            let (jobs, done) = (jobs.clone(), done.clone());
            let bench = &bench;
            scope.spawn(move || bench.work(jobs, done));
        }
        drop((jobs, done));
        let bench = &bench;
        let writer = scope.spawn(move || write(bench, scribe, results, give_back));
        let mut feeder = feeder;
        let fed = feed(&mut feeder).and_then(|()| feeder.finish());
        let written = match writer.join() {
            Ok(written) => written,
            Err(panic) => std::panic::resume_unwind(panic),
        };
        match fed {
            Err(error) if error != Error::Shutdown => Err(error),
            fed => written.and(fed),
        }
    })
}

/// A panic elsewhere ends the whole build; what the lock guards is not used any more then.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What all workers share.
pub(super) struct Bench<'a> {
    options: &'a Options,
    pub(super) chunks: &'a Mutex<Chunks>,
    /// A chunk of zeros; pages nobody wrote to cost nothing.
    pub(super) zeros: Vec<u8>,
    zero_digest: OnceLock<Digest>,
}

impl<'a> Bench<'a> {
    fn new(options: &'a Options, chunks: &'a Mutex<Chunks>) -> Self {
        let zeros = vec![0; options.chunk_size as usize];
        Bench { options, chunks, zeros, zero_digest: OnceLock::new() }
    }

    fn work(&self, jobs: Receiver<Job>, done: Sender<Result<Job>>) {
        let _alarm = Alarm(&done);
        let mut packer = Packer::new(self.options.compression);
        let mut spare = Vec::new();
        for mut job in jobs {
            let worked = match &mut packer {
                Ok(packer) => self.work_on(&mut job, packer, &mut spare),
                Err(error) => Err(error.clone()),
            };
            if done.send(worked.map(|()| job)).is_err() {
                break;
            }
        }
    }

    fn work_on(&self, job: &mut Job, packer: &mut Packer, spare: &mut Vec<u8>) -> Result<()> {
        for at in 0..job.pieces.len() {
            let piece = job.pieces[at];
            job.pieces[at].digest = match piece.is_hole {
                true => *self.zero_digest.get_or_init(|| self.options.digest.digest(&self.zeros)),
                false => self.options.digest.digest(job.plain(&piece, &self.zeros)),
            };
        }
        let mut chunks = lock(self.chunks);
        for (at, piece) in job.pieces.iter_mut().enumerate() {
            let order = PieceOrder::from(job.number) << 32 | at as PieceOrder;
            piece.packing = match chunks.claim(&piece.digest, order) {
                Claim::Known => Packing::Known,
                Claim::Ours => Packing::Plain,
            };
        }
        drop(chunks);
        if !packer.is_idle() {
            self.pack(job, packer, spare)?;
            std::mem::swap(&mut job.bytes, spare);
        }
        Ok(())
    }

    /// Writes into `packed` what is to be stored of a job, one piece behind the other.
    fn pack(&self, job: &mut Job, packer: &mut Packer, packed: &mut Vec<u8>) -> Result<()> {
        // It becomes the job's buffer, which the feeder expects to be as large.
        packed.resize(packed.len().max(job.bytes.len()), 0);
        let mut end = 0;
        for at in 0..job.pieces.len() {
            let mut piece = job.pieces[at];
            if piece.packing == Packing::Known {
                continue;
            }
            let plain = job.plain(&piece, &self.zeros);
            if let Some(size) = packer.pack(plain, packed, end)? {
                piece.packing = Packing::Packed { start: end as u32, size: size as u32 };
                end += size;
            } else if !piece.is_hole {
                room(packed, end, plain.len()).copy_from_slice(plain);
                piece.start = end as u32;
                end += plain.len();
            }
            job.pieces[at] = piece;
        }
        Ok(())
    }
}

/// Ends the pipeline when a worker panics: the others would wait for its job for ever. There is
/// room for the message, as fewer jobs than messages go round.
struct Alarm<'a>(&'a Sender<Result<Job>>);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = self.0.send(Err(Error::Shutdown));
        }
    }
}

fn write(
    bench: &Bench<'_>,
    scribe: &mut Scribe<'_>,
    results: Receiver<Result<Job>>,
    give_back: Sender<Job>,
) -> Result<()> {
    // Jobs that came before their turn: fewer than go round.
    let mut early: BTreeMap<u32, Job> = BTreeMap::new();
    let mut next = 0;
    for result in results {
        let job = result?;
        early.insert(job.number, job);
        while let Some(job) = early.remove(&next) {
            scribe.write(&job, bench)?;
            next += 1;
            // Refused only when the feeder is gone: there is nothing left to feed.
            let _ = give_back.send(job);
        }
    }
    Ok(())
}
