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
