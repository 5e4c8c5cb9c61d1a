//! Makes the reads of a plan and times each: in a closed loop, or at a fixed rate of arrivals.
//!
//! At a fixed rate a read's latency counts from when it was due, not from when a reader had time
//! for it: what queues up behind a slow read is part of the result (coordinated omission). In a
//! closed loop each reader makes its next read as soon as the last is done.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

use crate::plan::{Operation, Plan};

/// The longest latency told from longer ones.
const LATENCY_MAX_NS: u64 = 300_000_000_000;
/// Single reads kept for plots, over all readers.
const SAMPLES_MAX: usize = 20_000;

/// What a read met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Touch {
    /// All of it was there.
    Hit,
    /// Something had to be fetched.
    Miss,
    /// The reader got an error.
    Refused,
}

/// What can be read.
pub trait Target: Sync {
    /// Makes one read. An error ends the measurement; what a reader of a file system would be
    /// refused is [`Touch::Refused`].
    fn read(&self, reader: usize, operation: &Operation) -> io::Result<Touch>;
}

/// One read, for plots.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// When it was due, from the start of the run.
    pub at: Duration,
    /// How long it took.
    pub took: Duration,
    /// What it read.
    pub operation: Operation,
    /// What it met.
    pub touch: Touch,
}

/// What a run measured.
pub struct Run {
    /// From the first read due to the last one done.
    pub elapsed: Duration,
    /// All reads, in nanoseconds.
    pub all: Histogram<u64>,
    /// Those that had to fetch, or were refused.
    pub misses: Histogram<u64>,
    /// Reads that were refused.
    pub refused: u64,
    /// Bytes the reads asked for.
    pub bytes: u64,
    /// Some of the reads, evenly chosen.
    pub samples: Vec<Sample>,
}

/// Runs a plan with so many readers; `rate` is reads per second of all of them together.
pub fn run(target: &dyn Target, plan: &Plan, readers: usize, rate: Option<f64>) -> io::Result<Run> {
    let cursors: Vec<AtomicUsize> = plan.lanes.iter().map(|_| AtomicUsize::new(0)).collect();
    let keep_one_in = plan.count().div_ceil(SAMPLES_MAX).max(1);
    let started = Instant::now();
    let parts: Vec<io::Result<Run>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..readers)
            .map(|reader| {
                let cursor = &cursors[reader % cursors.len()];
                let job = Reader { target, plan, reader, rate, started, keep_one_in };
                scope.spawn(move || job.run(cursor))
            })
            .collect();
        let joined = threads.into_iter().map(|thread| thread.join().expect("a reader's thread"));
        joined.collect()
    });
    let mut whole = Run::new();
    for part in parts {
        whole.add(part?);
    }
    whole.samples.sort_by_key(|sample| sample.at);
    Ok(whole)
}

struct Reader<'a> {
    target: &'a dyn Target,
    plan: &'a Plan,
    reader: usize,
    rate: Option<f64>,
    started: Instant,
    keep_one_in: usize,
}

impl Reader<'_> {
    fn run(&self, cursor: &AtomicUsize) -> io::Result<Run> {
        let mut run = Run::new();
        nix::sys::prctl::set_timerslack(1)?;
        let lane_count = self.plan.lanes.len();
        let lane = self.reader % lane_count;
        let operations = &self.plan.lanes[lane];
        loop {
            let index = cursor.fetch_add(1, Ordering::Relaxed);
            let Some(operation) = operations.get(index) else { break };
            let due = match self.rate {
                Some(rate) => {
                    let number = (index * lane_count + lane) as f64;
                    let due = self.started + Duration::from_secs_f64(number / rate);
                    wait_until(due);
                    due
                }
                None => Instant::now(),
            };
            let touch = self.target.read(self.reader, operation)?;
            let done = Instant::now();
            run.note(operation, touch, done - due);
            run.elapsed = done - self.started;
            if index.is_multiple_of(self.keep_one_in) {
                let (at, took) = (due - self.started, done - due);
                run.samples.push(Sample { at, took, operation: *operation, touch });
            }
        }
        Ok(run)
    }
}

impl Run {
    fn new() -> Self {
        let histogram =
            || Histogram::new_with_bounds(1, LATENCY_MAX_NS, 3).expect("constants that make one");
        Run {
            elapsed: Duration::ZERO,
            all: histogram(),
            misses: histogram(),
            refused: 0,
            bytes: 0,
            samples: Vec::new(),
        }
    }

    fn note(&mut self, operation: &Operation, touch: Touch, took: Duration) {
        let took_ns = took.as_nanos() as u64;
        self.all.saturating_record(took_ns);
        if touch != Touch::Hit {
            self.misses.saturating_record(took_ns);
        }
        self.refused += u64::from(touch == Touch::Refused);
        self.bytes += operation.length;
    }

    fn add(&mut self, other: Run) {
        self.elapsed = self.elapsed.max(other.elapsed);
        self.all.add(&other.all).expect("the same bounds");
        self.misses.add(&other.misses).expect("the same bounds");
        self.refused += other.refused;
        self.bytes += other.bytes;
        self.samples.extend(other.samples);
    }
}

/// Sleeps most of the time and looks at the clock for the rest: a sleep alone ends 30 us late and
/// more, and that would count as latency.
fn wait_until(due: Instant) {
    const LATE: Duration = Duration::from_micros(80);
    let left = due.saturating_duration_since(Instant::now());
    if left > LATE {
        std::thread::sleep(left - LATE);
    }
    while Instant::now() < due {
        std::hint::spin_loop();
    }
}
