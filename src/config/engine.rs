//! Limits of the engine, per core: slots, buffers, helper threads.

use super::*;

/// Operations a core may have in flight; the completion queue is four times as long.
pub const OPERATION_SLOTS: usize = 1024;
/// Ready tasks polled in one turn of the loop before completions are looked at again.
pub const POLLS_PER_TURN: usize = 64;
/// One background task is polled for so many demand tasks.
pub const BACKGROUND_SHARE: usize = 8;
/// How long a core with operations in flight looks for completions before it sleeps.
pub const SPIN_DEFAULT_US: u64 = 0;
/// Threads for work that takes long (bootstraps, large chunks), per process.
pub const HELPER_THREADS: usize = 4;
/// Jobs that may wait for a helper thread.
pub const HELPER_QUEUE: usize = 1024;
/// Threads for questions that may stay without an answer (names, credentials), per process.
pub const ASKER_THREADS: usize = 4;
/// Such questions that may wait for a thread; one more is refused.
pub const ASKER_QUEUE: usize = 256;
/// Tasks that may wait for the same thing before its list grows.
pub const NOTIFY_WAITERS: usize = 8;
/// Kernel workers a ring may start for operations that block: regular files, everything else.
pub const KERNEL_WORKERS: [u32; 2] = [8, 32];

/// Wire leases: what one receive brings, one request head, one small write.
pub const WIRE_LEASES: usize = 64;
/// Bytes of a wire lease.
pub const WIRE_LEASE_SIZE: usize = 64 * KIB;
/// Range leases: the compressed bytes of one GET, or the chunks made of them.
pub const RANGE_LEASES: usize = 64;
/// Bytes of a range lease: a GET of 1 MiB plus one incompressible chunk's overhead.
pub const RANGE_LEASE_SIZE: usize = MIB + 128 * KIB;
/// Large leases: units above a range lease (16 MiB chunks, contexts of many small files).
pub const LARGE_LEASES: usize = 4;
/// Bytes of a large lease; no unit may need more.
pub const LARGE_LEASE_SIZE: usize = 17 * MIB;
/// Address space of a core's arena; pages are touched only when used:
/// 64 x 64 KiB (wire) + 64 x 1.125 MiB (range) + 4 x 17 MiB (large) = 4 + 72 + 68 = 144 MiB.
pub const ARENA_SIZE: usize = WIRE_LEASES * WIRE_LEASE_SIZE
    + RANGE_LEASES * RANGE_LEASE_SIZE
    + LARGE_LEASES * LARGE_LEASE_SIZE;
// A class keeps its free buffers in one 64-bit word.
const _: () = assert!(WIRE_LEASES <= 64 && RANGE_LEASES <= 64 && LARGE_LEASES <= 64);
