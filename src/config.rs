//! Every limit of the program, with its sums.
//!
//! A queue, pool, loop, retry, buffer or wait that has no name here has no business existing.
//! Units stand last in each name.

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
