//! Every limit of the program, with its sums, and what an operator decides about a daemon.
//!
//! A queue, pool, loop, retry, buffer or wait that has no name here has no business existing.
//! Units stand last in each name.

use std::path::PathBuf;

use clap::ValueEnum;

/// How the workers share the kernel's requests at the cachefiles device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Intake {
    /// Every core polls the device and any core may take any message.
    Every,
    /// Every core polls, and the kernel wakes one of them.
    Exclusive,
    /// One core polls, serves while it has little to do, and hands the rest to its siblings.
    One,
    /// Every core polls and spins a little before it sleeps.
    Spin,
}

/// How much the daemon says about its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// What needs an operator.
    Error,
    /// What went wrong and was dealt with.
    Warn,
    /// Images come, go and change state.
    Info,
    /// One line per request to a registry.
    Debug,
    /// One line per upcall.
    Trace,
}

/// What an operator decides about one daemon; the command line makes it, nothing changes it later.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The cache directory handed to the kernel (`dir`); without one there is no cachefiles door.
    pub fscache_dir: Option<PathBuf>,
    /// The cache's name inside the kernel (`tag`); the kernel's own is "CacheFiles".
    pub fscache_tag: Option<String>,
    /// Where the control API listens; without one nobody can register an image.
    pub api_socket: Option<PathBuf>,
    /// The CPUs that get a worker each; never empty, no duplicates, at most `CORES_MAX`.
    pub cores: Vec<usize>,
    /// How the workers share the kernel's requests.
    pub intake: Intake,
    /// What must survive a restart: registered images and their bootstraps.
    pub state_dir: PathBuf,
    /// How much is logged.
    pub log_level: LogLevel,
    /// Where it is logged; standard error without one.
    pub log_file: Option<PathBuf>,
    /// The RLIMIT_NOFILE to ask for; 0 leaves it alone.
    pub nofile_limit: u64,
    /// A kernel request is answered within this time, with its bytes or without.
    pub fault_deadline_ms: u64,
    /// The identity a supervisor gave this daemon (nydusd's `--id`); only reported back.
    pub id: Option<String>,
    /// The supervisor's socket (nydusd's `--supervisor`).
    pub supervisor: Option<PathBuf>,
    /// Start in state INIT and wait for a takeover (nydusd's `--upgrade`).
    pub upgrade: bool,
    /// nydusd's `--config`: a file with a list of blobs to register at start.
    pub blobs_file: Option<PathBuf>,
}

/// One kibibyte.
pub const KIB: usize = 1024;
/// One mebibyte.
pub const MIB: usize = 1024 * KIB;
/// One second in the engine's unit of time.
pub const SECOND_NS: u64 = 1_000_000_000;
/// One millisecond in the engine's unit of time.
pub const MILLISECOND_NS: u64 = 1_000_000;

// Engine, per core.

/// Operations a core may have in flight; the completion queue is four times as long.
pub const OPERATION_SLOTS: usize = 1024;
/// Ready tasks polled in one turn of the loop before completions are looked at again.
pub const POLLS_PER_TURN: usize = 64;
/// One background task is polled for so many demand tasks.
pub const BACKGROUND_SHARE: usize = 8;
/// How long a core with operations in flight looks for completions before it sleeps.
pub const SPIN_DEFAULT_US: u64 = 0;
/// Threads for work that blocks or takes long (names, bootstraps, large chunks), per process.
pub const HELPER_THREADS: usize = 4;
/// Jobs that may wait for a helper thread.
pub const HELPER_QUEUE: usize = 1024;
/// Kernel workers a ring may start for operations that block: regular files, everything else.
pub const KERNEL_WORKERS: [u32; 2] = [8, 32];

/// Wire leases: what one receive brings, one request head, one small write.
pub const WIRE_LEASES: usize = 64;
/// Bytes of a wire lease.
pub const WIRE_LEASE_SIZE: usize = 64 * KIB;
/// Range leases: the compressed bytes of one GET, or the chunks made of them.
pub const RANGE_LEASES: usize = 48;
/// Bytes of a range lease: a GET of 1 MiB plus one incompressible chunk's overhead.
pub const RANGE_LEASE_SIZE: usize = MIB + 128 * KIB;
/// Large leases: units above a range lease (16 MiB chunks, contexts of many small files).
pub const LARGE_LEASES: usize = 4;
/// Bytes of a large lease; no unit may need more.
pub const LARGE_LEASE_SIZE: usize = 17 * MIB;
/// Address space of a core's arena; pages are touched only when used:
/// 64 x 64 KiB (wire) + 48 x 1.125 MiB (range) + 4 x 17 MiB (large) = 4 + 54 + 68 = 126 MiB.
pub const ARENA_SIZE: usize = WIRE_LEASES * WIRE_LEASE_SIZE
    + RANGE_LEASES * RANGE_LEASE_SIZE
    + LARGE_LEASES * LARGE_LEASE_SIZE;
// A class keeps its free buffers in one 64-bit word.
const _: () = assert!(WIRE_LEASES <= 64 && RANGE_LEASES <= 64 && LARGE_LEASES <= 64);
// Images: what one bootstrap, blob or chunk may ask of us. All of it is hostile input.

/// Data blobs per image: EROFS device ids are bytes, 0 is the bootstrap, and RAFS keeps one back.
pub const BLOBS_PER_IMAGE_MAX: usize = 254;
/// Chunks per blob: RAFS stores a chunk index in 24 bits.
pub const CHUNKS_PER_BLOB_MAX: u32 = 1 << 24;
/// Bytes of one decoded chunk.
pub const CHUNK_MAX_BYTES: usize = 16 * MIB;
/// Bytes of one unit as fetched. Encryption pads up to 18 bytes, but never a chunk this large.
pub const UNIT_COMPRESSED_MAX_BYTES: usize = 16 * MIB;
/// Bytes of the address space one unit covers: what a Large lease holds.
pub const UNIT_OUTPUT_MAX_BYTES: usize = 16 * MIB;
/// Bytes of a bootstrap. A million files cost about 200 MiB.
pub const BOOTSTRAP_MAX_BYTES: usize = 1024 * MIB;
/// Bytes of a decompressed context table: 32 KiB of dictionary per 0.5 MiB of tar.gz or so, which
/// allows layers of about 5 GiB.
pub const CONTEXT_TABLE_MAX_BYTES: usize = 512 * MIB;
/// Bytes a decoder takes when it is made: the decoded form of an ordinary ZRAN context (2 MiB).
pub const DECODER_SCRATCH_BYTES: usize = 2 * MIB;
/// Bytes a deflate dictionary can have: the window of the format.
pub const DEFLATE_DICTIONARY_MAX_BYTES: usize = 32 * KIB;
// ---- registry -------------------------------------------------------------------------------

/// Demand requests in flight per core and origin; background ones can never take these places.
pub const REGISTRY_DEMAND_CONNECTION_COUNT_MAX: usize = 8;
/// Background requests in flight per core and origin.
pub const REGISTRY_BACKGROUND_CONNECTION_COUNT_MAX: usize = 4;
/// Idle connections kept per core and origin: every connection may rest.
pub const REGISTRY_IDLE_CONNECTION_COUNT_MAX: usize =
    REGISTRY_DEMAND_CONNECTION_COUNT_MAX + REGISTRY_BACKGROUND_CONNECTION_COUNT_MAX;
/// An idle connection older than this is closed: load balancers drop theirs after a minute.
pub const REGISTRY_IDLE_LIFE_NS: u64 = 30 * SECOND_NS;
/// Origins a core keeps lines to; past it the lines without a connection are forgotten.
pub const REGISTRY_LINE_COUNT_MAX: usize = 64;
/// How often a core looks after its idle connections, tokens and mirrors.
pub const REGISTRY_MAINTAIN_INTERVAL_NS: u64 = SECOND_NS;

/// Connections dialled ahead when an image is registered.
pub const REGISTRY_WARM_CONNECTION_COUNT: usize = 2;
/// A core forgets a route it has not used for this long.
pub const REGISTRY_WAY_LIFE_NS: u64 = 600 * SECOND_NS;
/// Tokens of a route that was not used for this long are not renewed ahead.
pub const TOKEN_RENEWAL_PAUSE_NS: u64 = 300 * SECOND_NS;

/// A request head that does not fit here is refused: signed storage URLs stay below 4 KiB.
pub const HTTP_REQUEST_HEAD_SIZE_MAX: usize = 16 * KIB;
/// A response head that does not fit here is refused.
pub const HTTP_RESPONSE_HEAD_SIZE_MAX: usize = 16 * KIB;
/// Header lines in a response head.
pub const HTTP_HEADER_COUNT_MAX: usize = 64;
/// Interim (1xx) responses passed over before the final one.
pub const HTTP_INTERIM_COUNT_MAX: usize = 4;
/// Bytes asked for while the head is awaited: what comes with the head is copied once more.
pub const HTTP_HEAD_RECEIVE_SIZE: usize = 4 * KIB;
/// A chunk-size line with its extensions, and each trailer line.
pub const HTTP_CHUNK_LINE_SIZE_MAX: usize = 256;
/// Trailer bytes after the last chunk.
pub const HTTP_TRAILER_SIZE_MAX: usize = 4 * KIB;
/// Bytes that must arrive within one `timeout` of the backend, or a body counts as stalled.
pub const HTTP_BODY_PROGRESS_SIZE_MIN: usize = 4 * KIB;
/// The body of an answer that is not the one asked for: read this far for its text.
pub const HTTP_ERROR_BODY_SIZE_MAX: usize = 4 * KIB;

/// Redirects followed for one request.
pub const REGISTRY_REDIRECT_COUNT_MAX: usize = 5;
/// Cached redirects per core.
pub const REGISTRY_REDIRECT_CACHE_COUNT_MAX: usize = 256;
/// A redirect without an expiry of its own is believed this long.
pub const REGISTRY_REDIRECT_LIFE_DEFAULT_NS: u64 = 60 * SECOND_NS;
/// No redirect is believed longer than this, whatever its query says.
pub const REGISTRY_REDIRECT_LIFE_NS_MAX: u64 = 3600 * SECOND_NS;

/// Tries of one request beyond one per source, at least.
pub const REGISTRY_RETRY_COUNT_MIN: u32 = 2;
/// Tries of one request beyond one per source, whatever retry_limit says.
pub const REGISTRY_RETRY_COUNT_MAX: u32 = 10;
/// The first pause between tries; it doubles, and half of it is random.
pub const REGISTRY_RETRY_PAUSE_NS: u64 = 50 * MILLISECOND_NS;
/// The longest pause between tries that we choose ourselves.
pub const REGISTRY_RETRY_PAUSE_NS_MAX: u64 = 2 * SECOND_NS;
/// timeout and connect_timeout in seconds when the backend does not say.
pub const REGISTRY_TIMEOUT_DEFAULT_S: u64 = 5;
/// timeout and connect_timeout in seconds when the backend says 0 (nydus: none).
pub const REGISTRY_TIMEOUT_S_MAX: u64 = 120;
/// Mirrors of one backend.
pub const REGISTRY_MIRROR_COUNT_MAX: usize = 16;
/// Extra header lines of one mirror.
pub const REGISTRY_MIRROR_HEADER_COUNT_MAX: usize = 16;
/// After a failure a source is tried last for this long, even below its failure_limit.
pub const REGISTRY_SUSPECT_NS: u64 = SECOND_NS;
/// A ping that takes longer counts as failed.
pub const REGISTRY_PING_TIMEOUT_NS: u64 = 2 * SECOND_NS;

/// A token without expires_in lives this long (the distribution specification's default).
pub const TOKEN_LIFE_DEFAULT_S: u64 = 60;
/// No token is believed longer than this.
pub const TOKEN_LIFE_S_MAX: u64 = 24 * 3600;
/// The answer of a token server.
pub const TOKEN_RESPONSE_SIZE_MAX: usize = 64 * KIB;
/// One token text; it must fit a request head with room for the rest.
pub const TOKEN_SIZE_MAX: usize = 8 * KIB;
/// One token fetch, everything included.
pub const TOKEN_FETCH_TIMEOUT_NS: u64 = 10 * SECOND_NS;
/// How often a core looks whether another core has fetched the token both need.
pub const TOKEN_WAIT_STEP_NS: u64 = 2 * MILLISECOND_NS;
/// A failed token fetch is shared with the cores that waited for it this long.
pub const TOKEN_FAILURE_LIFE_NS: u64 = SECOND_NS / 2;
/// Challenges read from one WWW-Authenticate header.
pub const AUTH_CHALLENGE_COUNT_MAX: usize = 8;

/// A Docker configuration file larger than this is refused.
pub const DOCKER_CONFIG_SIZE_MAX: u64 = MIB as u64;
/// A credential helper that has not answered by then is ended.
pub const CREDENTIAL_HELPER_TIMEOUT_MS: u64 = 5_000;
/// What a credential helper may print.
pub const CREDENTIAL_HELPER_OUTPUT_SIZE_MAX: u64 = 64 * KIB as u64;

/// A resolved name is used this long before the resolver is asked again.
pub const RESOLVE_LIFE_NS: u64 = 60 * SECOND_NS;
/// A failed resolution is remembered this long, so that a storm asks once.
pub const RESOLVE_FAILURE_LIFE_NS: u64 = SECOND_NS;
/// Addresses of one name that are tried.
pub const RESOLVE_ADDRESS_COUNT_MAX: usize = 4;
/// Names kept resolved.
pub const RESOLVE_NAME_COUNT_MAX: usize = 256;
/// One resolution.
pub const RESOLVE_TIMEOUT_NS: u64 = 5 * SECOND_NS;

/// Files of localfs backends a core keeps open.
pub const LOCALFS_FILE_COUNT_MAX: usize = 64;
/// One read of a localfs file.
pub const LOCALFS_READ_SIZE_MAX: usize = MIB;

/// An HTTP response head must fit the Wire lease it is received into, beside the request head.
const _: () = assert!(HTTP_REQUEST_HEAD_SIZE_MAX + HTTP_RESPONSE_HEAD_SIZE_MAX <= 64 * KIB);
/// A token must fit its request head with room for path and host.
const _: () = assert!(TOKEN_SIZE_MAX + 4 * KIB <= HTTP_REQUEST_HEAD_SIZE_MAX);
// ---- catalog: what is registered. 16,384 images x about 3 KiB = 48 MiB at the very most.

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

// ---- statistics and journal: 7 histograms x 2,816 counts x 8 bytes = 154 KiB per core.

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
// Command line.

/// One worker per CPU up to here; more CPUs than this need `--cores`, and no list is longer.
pub const CORES_MAX: usize = 64;
/// Workers when nobody said: a node's other work needs its CPUs too.
pub const CORES_DEFAULT: usize = 8;
/// Where `sluice daemon` listens and the other commands call.
pub const API_SOCKET_DEFAULT: &str = "/run/sluice.sock";
/// Bootstraps and registrations.
pub const STATE_DIR_DEFAULT: &str = "/var/lib/sluice";
/// The kernel's requests are answered by then; half of the kernel's hung-task warning (120 s).
pub const FAULT_DEADLINE_DEFAULT_MS: u64 = 60_000;
/// The least that still covers a connection, a token and a chunk.
pub const FAULT_DEADLINE_MIN_MS: u64 = 1_000;
/// The open files nydusd asks for, and so do we.
pub const NOFILE_DEFAULT: u64 = 1_000_000;
/// A call to the daemon: no call waits for a registry, so this is generous.
pub const API_CALL_TIMEOUT_MS: u64 = 10_000;
/// The longest head of a daemon's answer.
pub const API_REPLY_HEAD_MAX_BYTES: usize = 16 * KIB;
/// The longest answer of a daemon: 16 MiB is a list of about 30,000 images.
pub const API_REPLY_MAX_BYTES: usize = 16 * MIB;
/// The header lines an answer may have.
pub const API_REPLY_HEADERS_MAX: usize = 32;
/// mount(2) takes one page of options, NUL included; longer device lists are left to the kernel.
pub const MOUNT_OPTIONS_MAX_BYTES: usize = 4095;
/// A text file of the kernel (`/proc`, `/boot/config-*`); the longest known is 300 KiB.
pub const SYSTEM_TEXT_MAX_BYTES: u64 = 8 * MIB as u64;
/// Open descriptors looked at while searching who holds the device.
pub const DESCRIPTORS_SCANNED_MAX: usize = 1_000_000;
/// Bytes of one name in a directory: the kernel's NAME_MAX.
pub const FILE_NAME_MAX_BYTES: usize = 255;
/// Bytes of a symbolic link's target: the kernel's PATH_MAX.
pub const LINK_TARGET_MAX_BYTES: u64 = 4096;
/// Bytes of a path met on a walk: deeper trees can be mounted, not inspected.
pub const TREE_PATH_MAX_BYTES: usize = 32 * KIB;
/// Bytes of a manifest or index: what registries commonly accept.
pub const MANIFEST_MAX_BYTES: usize = 4 * MIB;
/// Bytes of unpacked tar read in search of a bootstrap.
pub const LAYER_SCAN_MAX_BYTES: u64 = 4 * BOOTSTRAP_MAX_BYTES as u64;
/// Threads that read and verify blobs at the same time.
pub const CHECK_READERS_MAX: usize = 16;
/// Bytes of a blob read at once while it is verified, unless one unit is longer:
/// 16 readers x (16 MiB read + 16 MiB decoded + 32 MiB of decoder) = 1 GiB at the very worst.
pub const CHECK_BATCH_BYTES: u64 = 4 * MIB as u64;
/// Units closer together than this are read in one range.
pub const CHECK_GAP_BYTES: u64 = 64 * KIB as u64;
/// Bad chunks remembered per blob; more are counted.
pub const CHECK_BAD_CHUNKS_MAX: usize = 10_000;
/// Files named per bad chunk; more are counted.
pub const CHECK_FILES_MAX: usize = 10;
/// One range, manifest or bootstrap layer fetched by a command, retries included, apart from the
/// time its bytes take.
pub const CLI_FETCH_DEADLINE_NS: u64 = 60 * SECOND_NS;
/// Bytes per second below which a download is given up.
pub const CLI_FETCH_SLOWEST_BYTES: u64 = 64 * KIB as u64;
/// A bootstrap layer is a tar.gz; compressed it is smaller than what it holds.
pub const BOOTSTRAP_LAYER_MAX_BYTES: usize = 512 * MIB;
/// Faults of an image's structure shown; more are counted.
pub const CHECK_FAULTS_MAX: usize = 1000;
/// Files shown as an image's largest.
pub const INSPECT_LARGEST_FILES: usize = 10;

// ---- faults, per core.

/// Reads being served at once; further ones wait in the kernel. A slot is a task of about 1 KiB.
pub const DEMAND_SLOTS: usize = 256;
/// Opens being served at once: each parses a bootstrap on a helper thread.
pub const OPEN_SLOTS: usize = 4;
/// Opens read from the device and not yet begun.
pub const OPEN_QUEUE: usize = 64;
/// Fetches in progress or waiting for a fetcher.
pub const FLIGHT_SLOTS: usize = 512;
/// Tasks that fetch what somebody waits for.
pub const DEMAND_FETCHERS: usize = 48;
/// Tasks that fetch ahead.
pub const AHEAD_FETCHERS: usize = 6;
/// Demand fetchers one route may hold, so that dead registries leave room for healthy ones.
pub const FETCHERS_PER_ROUTE: usize = 8;
/// Fetches whose body is arriving: each holds a range lease for what arrives and one for the
/// result.
pub const LANDINGS: usize = 20;
/// Landings that need a large lease on either side.
pub const LARGE_LANDINGS: usize = 2;
// Every landing finds both its leases: no two wait for each other.
const _: () = assert!(2 * LANDINGS <= RANGE_LEASES && 2 * LARGE_LANDINGS <= LARGE_LEASES);
/// Compressed bytes one GET asks for, unless one unit alone is larger.
pub const GET_MAX_BYTES: u64 = MIB as u64;
/// Unwanted bytes between two units that are fetched rather than starting another GET.
pub const GET_GAP_MAX_BYTES: u64 = 16 * KIB as u64;
/// Tries for a unit whose bytes came and were wrong; another mirror may have right ones.
pub const DIGEST_TRIES: u32 = 3;
/// Tries for a body that broke off after its head was right.
pub const BODY_TRIES: u32 = 4;
/// Units above this many decoded bytes are decoded on a helper thread.
pub const DECODE_INLINE_MAX_BYTES: usize = 128 * KIB;
/// How long a fault waits for news before it looks at the map again, should a message be lost.
pub const SETTLE_LOOK_NS: u64 = 50 * MILLISECOND_NS;
/// How long a fault pauses when all flight slots are taken.
pub const FLIGHT_PAUSE_NS: u64 = 2 * MILLISECOND_NS;
/// Launches one fault makes for itself before it fails: others' fetches may fail for less.
pub const LAUNCHES_PER_FAULT: u32 = 2;
/// Readers on other cores that may wait for one flight; more look at the map by time.
pub const REMOTE_WAITERS: usize = 64;
/// Messages between two cores.
pub const MAILBOX_CAPACITY: usize = 4 * KIB;
/// Sequential streams told apart per blob.
pub const STREAMS_PER_BLOB: usize = 8;
/// The first read-ahead of a stream; it doubles with each step.
pub const AHEAD_MIN_BYTES: u64 = 256 * KIB as u64;
/// The longest read-ahead of a stream.
pub const AHEAD_MAX_BYTES: u64 = 8 * MIB as u64;
/// How long cores wait between looks at a layout another core is loading.
pub const LAYOUT_LOOK_NS: u64 = MILLISECOND_NS;
/// Blobs whose prefetch is in progress or waiting.
pub const PREFETCH_QUEUE: usize = 256;
/// Runs of prefetch waiting for a fetcher.
pub const PREFETCH_AHEAD: usize = 4;
/// Operations in flight at once never exceed the slots: a demand slot waits for a timer, a fetcher
/// for an operation and a timer.
const _: () = assert!(
    DEMAND_SLOTS * 2 + OPEN_SLOTS * 2 + (DEMAND_FETCHERS + AHEAD_FETCHERS) * 2 + 64
        <= OPERATION_SLOTS
);
// A core's number is kept in a claim byte: 0 is absent, 255 present.
const _: () = assert!(CORES_MAX < 254);
/// At a stop, readers that wait get so long before they are answered without data.
pub const STOP_DEADLINE_NS: u64 = 5 * SECOND_NS;
/// The first pause of a core that finds the device empty although it was said to be readable.
pub const INTAKE_PAUSE_NS: u64 = 20_000;
/// The longest such pause.
pub const INTAKE_PAUSE_MAX_NS: u64 = MILLISECOND_NS;
/// How long GET stat waits for the cores.
pub const STATISTICS_WAIT_MS: u64 = 500;

// ---- control API. Memory: 256 connections x (59 KiB in + answer) and 2 x 256 queued calls.

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

// ---- ledger: what the kernel's cache may hold. Read and written at registrations only.

/// One record: 36 bytes per chunk of a blob and 80 around them; the largest is 576 MiB.
pub const LEDGER_RECORD_MAX_BYTES: u64 = CHUNKS_PER_BLOB_MAX as u64 * 36 + 80;
/// A cookie that the kernel is taking leave of is waited for so long before it counts as in use.
pub const COOKIE_LEAVE_WAIT_MS: u64 = 5_000;
/// The pause between two looks at it.
pub const COOKIE_LOOK_MS: u64 = 10;
/// The kernel's lists of volumes and cookies: about 200 bytes for each of 300,000.
pub const COOKIE_LIST_MAX_BYTES: u64 = 64 * MIB as u64;
/// Reads in service above which a core that polls for all hands further ones to its siblings.
pub const HAND_OVER_READS: usize = 4;

// ---- building images. Memory of a build: BUILD_IN_FLIGHT_BYTES of jobs, 100 bytes per chunk, 200
// per file, and the compressors (a MiB or two per thread up to zstd level 12).

/// Threads that digest and compress.
pub const BUILD_THREADS_MAX: usize = 256;
/// Bytes of file data that travel together, unless one chunk is larger.
pub const BUILD_JOB_BYTES: usize = MIB;
/// Pieces of file data that travel together.
pub const BUILD_JOB_PIECES_MAX: usize = 4096;
/// Bytes of jobs on their way, plain and packed: with chunks of 16 MiB four jobs go round.
pub const BUILD_IN_FLIGHT_BYTES: usize = 128 * MIB;
/// What is collected before it is written to a blob file.
pub const BUILD_WRITE_BYTES: usize = 256 * KIB;
/// What is read of a layer at once.
pub const BUILD_READ_BYTES: usize = 256 * KIB;
/// Chunks of file data in all files of an image, duplicates included: 64 GiB in chunks of 4 KiB, or
/// 16 TiB of 1 MiB. A tar of one block can claim a hole of any size; this bounds what it costs.
pub const BUILD_REFERENCES_MAX: usize = 1 << 24;
/// Files of all layers of an image, those that later layers replace included.
pub const BUILD_INODES_MAX: usize = 1 << 24;
/// Bytes of a path in a layer: the kernel's PATH_MAX.
pub const PATH_MAX_BYTES: usize = 4096;
/// Symbolic links followed on the way along a path: the kernel's MAXSYMLINKS.
pub const LINKS_FOLLOWED_MAX: usize = 40;
/// Bytes of one extension header of a tar: an inode's attributes have at most 256 KiB.
pub const TAR_EXTENSION_MAX_BYTES: u64 = MIB as u64;
/// Extension headers in front of one entry.
pub const TAR_EXTENSIONS_MAX: usize = 16;
/// Segments of one sparse file.
pub const TAR_SEGMENTS_MAX: usize = 256 * KIB;
/// Directories of a walk may be nested so deep: each holds a descriptor, of 1024 by default.
pub const BUILD_DEPTH_MAX: usize = 512;
/// Names of one file's extended attributes: the kernel's XATTR_LIST_MAX.
pub const XATTR_LIST_MAX_BYTES: usize = 64 * KIB;
/// Bytes of a blob read at once while an image is unpacked, unless one unit is longer.
pub const UNPACK_READ_BYTES: u64 = MIB as u64;
