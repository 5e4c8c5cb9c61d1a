//! What the cores count and measure while they serve.
//!
//! Two kinds. [`Counters`] are atomic, one block of cache lines per core, and may be read at any
//! time by anybody. [`CoreStatistics`] (histograms) are plain memory that one core owns; control
//! asks for them with a [`SnapshotRequest`] through the core's mailbox and the core copies them
//! into memory that control brought along: nothing is allocated on a core after start.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crossbeam_channel::Sender;
use hdrhistogram::Histogram;

use super::latency::Latencies;
use crate::config::{HISTOGRAM_DIGITS, HISTOGRAM_MAX_NS, HISTOGRAM_RESOLUTION_NS};

macro_rules! named {
    ($(#[$about:meta])* $kind:ident { $($(#[$doc:meta])* $variant:ident = $name:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $kind { $($(#[$doc])* $variant,)* }

        impl $kind {
            /// Every variant, in order.
            pub const ALL: &[$kind] = &[$($kind::$variant),*];
            /// How many there are.
            pub const COUNT: usize = $kind::ALL.len();

            /// The key in JSON, unit last.
            pub fn name(self) -> &'static str {
                match self { $($kind::$variant => $name,)* }
            }
        }
    };
}

pub(super) use named;

named! {
    /// What is counted. Only ever grows, except where it says otherwise.
    Counter {
        /// Objects the kernel asked us to open.
        UpcallsOpen = "upcalls_open",
        /// Of these, the ones that were answered with an error.
        OpensRefused = "opens_refused",
        /// Objects the kernel closed.
        UpcallsClose = "upcalls_close",
        /// Looks at the device that found no message: another core had been faster.
        IntakeEmpty = "intake_empty",
        /// Reads of data blobs.
        UpcallsRead = "upcalls_read",
        /// Reads of bootstraps.
        BootstrapReads = "bootstrap_reads",
        /// Reads that were answered without data: the reader got EIO.
        ReadsFailed = "reads_failed",
        /// Bytes data reads asked for.
        BytesAsked = "asked_bytes",
        /// Verified bytes put into the cache.
        BytesFilled = "filled_bytes",
        /// Bytes of bodies taken from registries, as compressed.
        BytesFetched = "fetched_bytes",
        /// Requests made to registries, retries included.
        Requests = "requests",
        /// Requests that ended in an error.
        RequestsFailed = "requests_failed",
        /// Requests made again after one failed.
        Retries = "retries",
        /// Requests made once more because the first answer was late.
        RequestsRepeated = "requests_repeated",
        /// Connections opened to registries.
        ConnectionsOpened = "connections_opened",
        /// Chunks decoded, found right and put into the cache.
        ChunksFilled = "chunks_filled",
        /// Chunks whose bytes were not what the digest says.
        DigestFailures = "digest_failures",
        /// Chunks that could not be decoded at all.
        BadChunks = "bad_chunks",
        /// Fetches nobody had asked for yet: read-ahead.
        ReadAheadRequests = "read_ahead_requests",
        /// Fetches of the prefetch lane.
        PrefetchRequests = "prefetch_requests",
        /// Verified bytes the prefetch lane put into the cache.
        PrefetchBytes = "prefetch_bytes",
        /// Images that could be read when first wanted, as container services tell it.
        StartsLazy = "starts_lazy",
        /// Images that had to wait for the daemon or the registry.
        StartsWaited = "starts_waited",
        /// Images that were fetched whole after such a wait.
        StartsFull = "starts_full",
        /// Images that could not be used.
        StartsFailed = "starts_failed",
        /// Log lines that were lost because the journal was full.
        LinesDropped = "log_lines_dropped",
    }
}

named! {
    /// What is timed, in nanoseconds.
    Stage {
        /// A data read, from the kernel's message to our answer.
        Read = "read_ns",
        /// An event whose bytes were there, from the kernel's message to our answer.
        Present = "present_ns",
        /// A read of a bootstrap, the same way.
        BootstrapRead = "bootstrap_read_ns",
        /// An open, the same way.
        Open = "open_ns",
        /// From a request sent to the last byte of its body.
        Request = "request_ns",
    }
}

/// Bounds of nydus's size classes in bytes; the last class has none.
pub const SIZE_CLASS_BYTES: [u64; 7] =
    [1 << 10, 4 << 10, 16 << 10, 64 << 10, 128 << 10, 512 << 10, 1 << 20];
/// Bounds (inclusive) of nydus's latency classes in milliseconds; the last class has none.
pub const LATENCY_CLASS_MS: [u64; 7] = [1, 20, 50, 100, 500, 1000, 2000];

/// The counters of all cores.
#[derive(Debug)]
pub struct Counters {
    blocks: Box<[Block]>,
}

/// One core's counters: it alone adds to them. 128 bytes: two lines, which processors fetch in
/// pairs.
#[derive(Debug)]
#[repr(align(128))]
struct Block([AtomicU64; Counter::COUNT]);

/// The handle with which one core counts.
#[derive(Clone, Debug)]
pub struct CoreCounters {
    counters: Arc<Counters>,
    core_index: usize,
}

impl Counters {
    /// Counters for `core_count` cores (and any control thread, which adds as core 0).
    pub fn new(core_count: usize) -> Arc<Counters> {
        let block = || Block(std::array::from_fn(|_| AtomicU64::new(0)));
        Arc::new(Counters { blocks: (0..core_count.max(1)).map(|_| block()).collect() })
    }

    /// The handle of a core.
    pub fn of_core(self: &Arc<Self>, core_index: usize) -> CoreCounters {
        CoreCounters { counters: self.clone(), core_index: core_index % self.blocks.len() }
    }

    /// The sum over all cores.
    pub fn total(&self, counter: Counter) -> u64 {
        let values =
            self.blocks.iter().map(|block| block.0[counter as usize].load(Ordering::Relaxed));
        values.fold(0, u64::wrapping_add)
    }
}

impl CoreCounters {
    /// Adds `amount`.
    pub fn add(&self, counter: Counter, amount: u64) {
        let block = &self.counters.blocks[self.core_index];
        block.0[counter as usize].fetch_add(amount, Ordering::Relaxed);
    }

    /// Adds one.
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }
}

/// What one core measures; owned by that core.
#[derive(Clone, Debug)]
pub struct CoreStatistics {
    stages: Vec<Histogram<u64>>,
    /// Where the time of reads and fetches went.
    pub latencies: Latencies,
    /// Requests to registries by size class, then latency class.
    pub requests: [[u64; 8]; 8],
    /// The time all requests of a size class took together.
    pub request_ns: [u64; 8],
}

impl Default for CoreStatistics {
    fn default() -> Self {
        Self {
            stages: (0..Stage::COUNT).map(|_| histogram()).collect(),
            latencies: Latencies::default(),
            requests: [[0; 8]; 8],
            request_ns: [0; 8],
        }
    }
}

/// An empty histogram with the bounds that all of them have.
pub(super) fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(HISTOGRAM_RESOLUTION_NS, HISTOGRAM_MAX_NS, HISTOGRAM_DIGITS)
        .expect("invariant: the bounds are constants that make a histogram")
}

impl CoreStatistics {
    /// Records how long a stage took. Longer than the histogram's end counts as its end.
    pub fn record(&mut self, stage: Stage, elapsed_ns: u64) {
        self.stages[stage as usize].saturating_record(elapsed_ns);
    }

    /// Records one finished request to a registry: in [`Stage::Request`] and in nydus's classes.
    pub fn record_request(&mut self, size_bytes: u64, elapsed_ns: u64) {
        self.record(Stage::Request, elapsed_ns);
        let size_class = SIZE_CLASS_BYTES.partition_point(|&bound| bound <= size_bytes);
        let elapsed_ms = elapsed_ns.div_ceil(1_000_000);
        let latency_class = LATENCY_CLASS_MS.partition_point(|&bound| bound < elapsed_ms);
        self.requests[size_class][latency_class] += 1;
        self.request_ns[size_class] = self.request_ns[size_class].saturating_add(elapsed_ns);
    }

    /// Adds what another core measured.
    pub fn merge(&mut self, other: &CoreStatistics) {
        for (mine, theirs) in self.stages.iter_mut().zip(&other.stages) {
            mine.add(theirs).expect("invariant: all histograms have the same bounds");
        }
        self.latencies.merge(&other.latencies);
        for (mine, theirs) in self.requests.iter_mut().zip(&other.requests) {
            mine.iter_mut().zip(theirs).for_each(|(mine, theirs)| *mine += theirs);
        }
        for (mine, theirs) in self.request_ns.iter_mut().zip(&other.request_ns) {
            *mine = mine.saturating_add(*theirs);
        }
    }

    /// The histogram of a stage.
    pub fn stage(&self, stage: Stage) -> &Histogram<u64> {
        &self.stages[stage as usize]
    }
}

/// Control's question to one core. Travels through the core's mailbox.
#[derive(Debug)]
pub struct SnapshotRequest {
    copy: Box<CoreStatistics>,
    reply: Sender<Box<CoreStatistics>>,
}

impl SnapshotRequest {
    /// A request whose answer arrives on the receiver of `reply`, which must have room for it.
    pub fn new(reply: Sender<Box<CoreStatistics>>) -> Self {
        Self { copy: Box::default(), reply }
    }

    /// Called on the core: copies what it measured and hands it over. Allocates nothing, never
    /// waits; an asker that gave up is no error.
    pub fn answer(mut self, own: &CoreStatistics) {
        // The copy is empty, so adding is copying.
        self.copy.merge(own);
        let _ = self.reply.try_send(self.copy);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_all_cores_add_up() {
        let counters = Counters::new(3);
        for core in 0..3 {
            counters.of_core(core).add(Counter::BytesFilled, 10);
        }
        counters.of_core(1).count(Counter::Retries);
        assert_eq!(counters.total(Counter::BytesFilled), 30);
        assert_eq!(counters.total(Counter::Retries), 1);
        assert_eq!(counters.total(Counter::Requests), 0);
    }

    #[test]
    fn names_are_distinct() {
        let mut names: Vec<_> = Counter::ALL.iter().map(|counter| counter.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Counter::COUNT);
    }

    #[test]
    fn requests_fall_into_nydus_classes_at_their_bounds() {
        let mut core = CoreStatistics::default();
        let ms = 1_000_000;
        core.record_request(1023, ms);
        core.record_request(1024, ms + 1);
        core.record_request((1 << 20) - 1, 2000 * ms);
        core.record_request(1 << 20, 2000 * ms + 1);
        assert_eq!(core.requests[0][0], 1);
        assert_eq!(core.requests[1][1], 1);
        assert_eq!(core.requests[6][6], 1);
        assert_eq!(core.requests[7][7], 1);
    }

    #[test]
    fn a_snapshot_is_a_copy_and_the_core_goes_on() {
        let (reply, answers) = crossbeam_channel::bounded(1);
        let mut core = CoreStatistics::default();
        core.record(Stage::Read, 1_000_000);
        SnapshotRequest::new(reply.clone()).answer(&core);
        core.record(Stage::Read, u64::MAX);
        let copy = answers.try_recv().unwrap();
        assert_eq!(copy.stage(Stage::Read).len(), 1);
        assert_eq!(core.stage(Stage::Read).len(), 2);
        // Nobody listens any more: no panic, no wait.
        drop(answers);
        SnapshotRequest::new(reply).answer(&core);
    }
}
