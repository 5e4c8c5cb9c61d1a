//! Limits of the daemon: what is registered, what is counted and logged, who may call.

use super::*;

// Catalog: what is registered. 16,384 images x about 3 KiB = 48 MiB at the very most.

/// Registered images, all domains together.
pub const CATALOG_IMAGES_MAX: usize = 16 * KIB;
/// A bootstrap as a file; one is held per registration in progress and per open image.
pub const CATALOG_BOOTSTRAP_MAX_BYTES: usize = 1024 * MIB;
/// An image or blob id: NAME_MAX minus cachefiles' one-letter prefix.
pub const CATALOG_ID_MAX_BYTES: usize = 254;
/// A domain id: NAME_MAX minus cachefiles' `I` and EROFS's `erofs,`.
pub const CATALOG_DOMAIN_MAX_BYTES: usize = 248;
/// How often a registration starts over because others came in while it compared digests.
pub const CATALOG_INSERT_TRIES_MAX: usize = 64;
/// Unfinished files of dead registrations that are stepped over beside an extracted bootstrap.
pub const INLINED_WRITE_TRIES_MAX: u32 = 16;
/// Prefetch threads a client may ask for.
pub const PREFETCH_THREADS_MAX: u32 = 1024;
/// The largest fetch a client may ask prefetch to make.
pub const PREFETCH_MERGING_MAX_BYTES: usize = 256 * MIB;

// Recordings: 2.5 MiB each, for as long as an image is mounted with --trace.

/// Faults of one recording: 64 Ki x 40 bytes.
pub const RECORDED_FAULTS_MAX: usize = 64 * KIB;
/// Recordings at once.
pub const RECORDINGS_MAX: usize = 16;
/// How long prefetch rests before it looks whether somebody still records.
pub const RECORDING_LOOK_NS: u64 = SECOND_NS;

// What images need at their starts: 8 KiB for each that was opened, in memory and on disk about
// 60 bytes for each touch.

/// Touches of one start: nginx needs 21, a JVM that compiles and runs a program 88, python3 111.
pub const START_TOUCHES_MAX: usize = KIB;
/// Bytes of them, and what is prefetched for the next start.
pub const START_TOUCHED_MAX_BYTES: u64 = 128 * MIB as u64;
/// A start is over so long after its first touch.
pub const START_WINDOW_NS: u64 = 30 * SECOND_NS;
/// How often is looked for starts that are over.
pub const START_LOOK_MS: u64 = 5_000;
/// Images whose starts are kept on disk; the oldest go first.
pub const STARTS_KEPT_MAX: usize = 4 * KIB;
/// The file of one: with all its touches.
pub const START_FILE_MAX_BYTES: u64 = 128 * START_TOUCHES_MAX as u64;

// Statistics and journal: histograms of 2,816 counts x 8 bytes = 22 KiB; per core 5 of stages and
// 2 doors x 3 causes x 11 steps = 1.5 MiB, touched only where something was measured.

/// The finest difference a histogram keeps.
pub const HISTOGRAM_RESOLUTION_NS: u64 = 1_000;
/// The longest time a histogram tells from longer ones.
pub const HISTOGRAM_MAX_NS: u64 = 120 * SECOND_NS;
/// Significant decimal digits a histogram keeps.
pub const HISTOGRAM_DIGITS: u8 = 2;
/// Log lines waiting to be written.
pub const JOURNAL_LINES_MAX: usize = 1024;
/// Errors kept for GET /api/v1/daemon/events, as in nydusd.
pub const JOURNAL_ERRORS_MAX: usize = 500;
/// Bytes of these errors, as in nydusd.
pub const JOURNAL_ERRORS_MAX_BYTES: usize = 51_200;
/// The same error is said once in this time.
pub const JOURNAL_REPEAT_MS: u64 = 60_000;
/// Errors remembered for that.
pub const JOURNAL_REPEATS_MAX: usize = 64;

// Control API. Memory: 256 connections x (59 KiB in + answer) and 2 x 256 queued calls.

/// A request's head; nydusd's HTTP library stops at the same order.
pub const CONTROL_HEAD_MAX_BYTES: usize = 8 * KIB;
/// Header lines of a request.
pub const CONTROL_HEADER_COUNT_MAX: usize = 64;
/// A request's body, as in nydusd.
pub const CONTROL_BODY_MAX_BYTES: usize = 51_200;
/// Looks at the lock on the socket's directory: 200 x 10 ms is 2 s.
pub const CONTROL_BIND_TRIES_MAX: u32 = 200;
/// The pause between two looks.
pub const CONTROL_BIND_PAUSE_MS: u64 = 10;
/// Open client connections.
pub const CONTROL_CONNECTIONS_MAX: usize = 256;
/// Threads for calls that only look at memory.
pub const CONTROL_QUICK_THREADS: usize = 4;
/// Threads for calls that may wait for a disk or another process.
pub const CONTROL_SLOW_THREADS: usize = 8;
/// Calls waiting for each kind of thread. A connection has at most one, so only calls whose
/// clients have left can make it too many; those are answered 503 at once.
pub const CONTROL_QUEUE_MAX: usize = CONTROL_CONNECTIONS_MAX;
/// A call that no thread took by then is answered 503.
pub const CONTROL_QUEUE_WAIT_MS: u64 = 10_000;
/// From the first byte of a request to its last.
pub const CONTROL_REQUEST_WAIT_MS: u64 = 10_000;
/// A client takes its whole answer within this.
pub const CONTROL_RESPONSE_WAIT_MS: u64 = 10_000;
/// A refused client's bytes are thrown away this long, so that it gets to read why.
pub const CONTROL_LEAVE_WAIT_MS: u64 = 1_000;
/// A connection without a request is kept this long.
pub const CONTROL_IDLE_MS: u64 = 300_000;
/// Accepting rests so long after the process ran out of descriptors.
pub const CONTROL_ACCEPT_PAUSE_MS: u64 = 100;
/// What is under way at the end may take so long.
pub const CONTROL_STOP_WAIT_MS: u64 = 2_000;
/// Cache files one call removes: 256 hash directories in each of some thousand volumes.
pub const CULL_FILES_MAX: usize = 64 * KIB;
/// How long cores look for completions before they sleep when the intake mode is to spin.
pub const SPIN_INTAKE_US: u64 = 50;
/// Connections to dial ahead for newly registered images, waiting per core.
pub const DIAL_QUEUE: usize = 64;
/// How long dialling ahead may take.
pub const DIAL_DEADLINE_NS: u64 = 10 * SECOND_NS;
/// nydusd's own bound of --fscache-threads.
pub const NYDUSD_THREADS_MAX: u32 = 1024;
/// nydusd's --config file: 16 MiB is a list of some ten thousand images.
pub const BLOBS_FILE_MAX_BYTES: usize = 16 * MIB;
