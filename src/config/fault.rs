//! Limits of the fault path, per core: slots, flights, GETs, read-ahead, intake.

use super::*;

/// Reads being served at once; further ones wait in the kernel. A slot is a task of about 1 KiB.
pub const DEMAND_SLOTS: usize = 256;
/// Slots that readers of one host may hold, so that dead registries leave room for healthy ones.
/// Four times its connections: those whose bytes come keep these busy.
pub const SEATS_PER_HOST: usize = 64;
/// Slots that readers of one repository may hold: one that fails leaves others of its host room.
pub const SEATS_PER_ROUTE: usize = 32;
/// Reads that wait for one of these, each of 64 bytes and an open file.
pub const WAITING_READS_MAX: usize = KIB;
/// Opens being served at once: each parses a bootstrap on a helper thread.
pub const OPEN_SLOTS: usize = 4;
/// Opens read from the device and not yet begun.
pub const OPEN_QUEUE: usize = 64;
/// Fetches in progress or waiting for a fetcher.
pub const FLIGHT_SLOTS: usize = 512;
/// Flights somebody waits for that one host may have: readers of many small pieces need many.
pub const DEMAND_FLIGHTS_PER_HOST: usize = 2 * SEATS_PER_HOST;
/// Tasks that fetch what somebody waits for.
pub const DEMAND_FETCHERS: usize = 192;
/// Tasks that fetch ahead.
pub const AHEAD_FETCHERS: usize = 24;
/// Fetchers of a lane one host may keep busy, so that dead registries leave room for healthy ones.
/// More would only wait for its connections.
pub const FETCHERS_PER_HOST: [usize; 2] =
    [REGISTRY_DEMAND_CONNECTION_COUNT_MAX, REGISTRY_BACKGROUND_CONNECTION_COUNT_MAX];
/// Fetchers of demand one repository may hold, those that pause before another try included.
pub const DEMAND_FETCHERS_PER_ROUTE: usize = REGISTRY_DEMAND_CONNECTION_COUNT_MAX;
/// The same of one host.
pub const DEMAND_FETCHERS_PER_HOST: usize = 48;
/// Fetches whose body is arriving: each holds a range lease for what arrives and one for the
/// result.
pub const LANDINGS: usize = 32;
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
/// Pauses before bytes that did not come are asked for again, from where they broke off; up to half
/// as much is added. The first is short: one connection that breaks says nothing about the next.
/// What is fetched ahead gets so many; for a reader they go on doubling until its deadline.
pub const BODY_RETRY_PAUSES_NS: [u64; 4] =
    [2 * MILLISECOND_NS, 20 * MILLISECOND_NS, 40 * MILLISECOND_NS, 80 * MILLISECOND_NS];
/// The longest such pause, apart from what is added: how much later than its registry a reader goes
/// on. Each is followed by a round of the registry client's own few tries.
pub const BODY_RETRY_PAUSE_NS_MAX: u64 = SECOND_NS;
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
/// What a reader must have read in order, after its first fault, before anything is fetched ahead.
pub const AHEAD_EARN_BYTES: u64 = 256 * KIB as u64;
/// The longest read-ahead of a stream: 20 ms to the first byte at 1.6 GB/s.
pub const AHEAD_MAX_BYTES: u64 = 32 * MIB as u64;
/// What is fetched ahead is topped up by at least so much at once.
pub const AHEAD_STEP_BYTES: u64 = 2 * MIB as u64;
/// A reader that leaves out so much still reads in order: holes, other files' tails.
pub const AHEAD_GAP_BYTES: u64 = 64 * KIB as u64;
/// How long cores wait between looks at a layout another core is loading, at first.
pub const LAYOUT_LOOK_NS: u64 = MILLISECOND_NS;
/// Blobs whose prefetch is in progress or waiting.
pub const PREFETCH_QUEUE: usize = 256;
/// Runs of prefetch, of one host, waiting for a fetcher.
pub const PREFETCH_AHEAD: usize = 4;
/// The least that one step of prefetch looks at, whatever an image's configuration says.
pub const PREFETCH_STEP_MIN_BYTES: u64 = 64 * KIB as u64;
/// How long prefetch of a blob waits for its route while blobs of other hosts wait for their turn.
pub const PREFETCH_TURN_NS: u64 = 50 * MILLISECOND_NS;
/// How long prefetch waits for a layout that has to come from the registry.
pub const PREFETCH_LAYOUT_NS: u64 = 5 * SECOND_NS;
/// How often prefetch of a blob begins anew after failures, and the first pause; each further one
/// is twice as long.
pub const PREFETCH_TRIES: u32 = 6;
/// See there.
pub const PREFETCH_PAUSE_NS: u64 = SECOND_NS;
/// After so long without a failure prefetch has as many tries as at first.
pub const PREFETCH_FORGIVEN_NS: u64 = 120 * SECOND_NS;
/// Bytes that are not listed for prefetch, between two ranges that are, fetched with them.
pub const PREFETCH_GAP_BYTES: u64 = 64 * KIB as u64;
/// Compressed bytes that prefetch may have in flight on a route nobody else uses.
pub const PREFETCH_BUDGET_MAX_BYTES: u64 = 8 * MIB as u64;
/// What it may have in flight however long readers wait: a chunk or two.
pub const PREFETCH_BUDGET_MIN_BYTES: u64 = 64 * KIB as u64;
/// What its budget grows by with each request of a reader that was answered as fast as ever.
pub const PREFETCH_BUDGET_STEP_BYTES: u64 = 16 * KIB as u64;
/// Requests of readers that are larger say little about how long they waited.
pub const PACE_REQUEST_MAX_BYTES: u64 = 128 * KIB as u64;
/// A request this much later than half as long again as the best counts as late.
pub const PACE_SLACK_NS: u64 = MILLISECOND_NS / 2;
/// Without readers for so long, prefetch has a route to itself.
pub const PACE_QUIET_NS: u64 = 200 * MILLISECOND_NS;
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
/// Messages of the kernel that a core takes before its other work has a turn.
pub const INTAKE_TURN: u32 = 32;
/// The first pause of a core that finds the device empty although it was said to be readable.
pub const INTAKE_PAUSE_NS: u64 = 20_000;
/// The longest such pause.
pub const INTAKE_PAUSE_MAX_NS: u64 = MILLISECOND_NS;
/// How long GET stat waits for the cores.
pub const STATISTICS_WAIT_MS: u64 = 500;
/// Reads in service above which a core that polls for all hands further ones to its siblings.
pub const HAND_OVER_READS: usize = 4;
/// Tries for a fill that somebody waits for when the disk is full: as long as others make room, or
/// take what was made. Bytes of mounted images take 2 s to go (`EVICTION_LISTEN_MS` and
/// `EVICTION_GRACE_MS`); this waits for 6.
pub const FILL_TRIES: u32 = 62;
/// Tries for one that nobody waits for: what it needs is better left to readers.
pub const FILL_TRIES_AHEAD: u32 = 2;
/// The pause before each but the first two.
pub const FILL_PAUSE_NS: u64 = 100 * MILLISECOND_NS;
/// What is freed at least when the disk is full: the next fills need room, too.
pub const ROOM_MIN_BYTES: u64 = 16 * MIB as u64;
