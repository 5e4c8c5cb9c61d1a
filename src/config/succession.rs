//! Limits of what outlives the daemon: registrations on disk, the keeper, a supervisor.
//!
//! Memory of a daemon: 16,384 records of about 2 KiB = 32 MiB at the very most. Of a keeper: one
//! message and 16 files.

use super::{KIB, MIB, SECOND_NS};

/// What outlives a daemon waits so long for a successor; then readers that wait get EIO.
pub const KEEP_DEFAULT_S: u64 = 60;
/// Longer than that nobody should wait for bytes: the kernel complains about hung tasks at 120 s.
pub const KEEP_MAX_S: u64 = 3600;
/// Files a keeper holds: device, fanotify group, journal of events, and room for more doors.
pub const KEEPER_FILES_MAX: usize = 16;
/// Bytes of the name of a file that is held; systemd allows 255.
pub const KEEPER_NAME_MAX_BYTES: usize = 32;
/// A message between daemon and keeper, which names every file at most once.
pub const KEEPER_MESSAGE_MAX_BYTES: usize = KIB;
const _: () =
    assert!(KEEPER_FILES_MAX * (KEEPER_NAME_MAX_BYTES + 1) + 64 < KEEPER_MESSAGE_MAX_BYTES);
/// A keeper answers at once; one that does not by then is given up.
pub const KEEPER_ANSWER_WAIT_MS: u64 = 2_000;
/// The request of a daemon that is refused is waited for so long.
pub const KEEPER_CALLER_WAIT_MS: u64 = 100;
/// How long a successor waits for its predecessor to be quite gone.
pub const KEEPER_TURN_WAIT_MS: u64 = 3_000;
/// The pause between two looks at that.
pub const KEEPER_LOOK_MS: u64 = 10;
/// Keepers that die while they are found or started, before the daemon gives up.
pub const KEEPER_TRIES_MAX: u32 = 8;
/// The pause before a keeper that died is replaced once more.
pub const KEEPER_RESTART_PAUSE_MS: u64 = 1_000;
/// The end of a keeper that has been told to go is waited for so long.
pub const KEEPER_END_WAIT_MS: u64 = 2_000;

/// A file that remembers one image: its entry (50 KiB at most over the API) and its mountpoints.
pub const REMEMBERED_FILE_MAX_BYTES: u64 = MIB as u64;
/// Threads that register remembered images: each parses a bootstrap.
pub const RESTORE_THREADS: usize = 4;
/// Pauses before a mounted image that did not come back is tried again, 10.5 s together: its
/// readers wait as long as a fault may take, which is more.
pub const RESTORE_PAUSES_MS: [u64; 5] = [100, 400, 1_000, 3_000, 6_000];
/// At a hand-over, reads in service get so long; what is not done then is done by the successor.
pub const HAND_OVER_NS: u64 = SECOND_NS / 2;
/// The first pause before the kernel is asked for a request again that came for an object the
/// predecessor had open.
pub const RESTORE_AGAIN_NS: u64 = SECOND_NS / 100;
/// The longest such pause.
pub const RESTORE_AGAIN_MAX_NS: u64 = SECOND_NS / 2;
/// How long the reads of an object that nobody knows are refused before it is looked up again.
pub const REFUSED_OBJECT_NS: u64 = SECOND_NS;

/// The state given to a supervisor: 16 MiB hold some thousand entries.
pub const SUPERVISOR_STATE_MAX_BYTES: usize = 16 * MIB;
/// A supervisor that has not taken or given the state by then is given up.
pub const SUPERVISOR_WAIT_MS: u64 = 10_000;
/// A witness answers within this, or its daemon lives and it has nothing to say.
pub const WITNESS_ANSWER_WAIT_MS: i64 = 1_000;
/// Files of events in one message; the kernel takes up to 253 (SCM_MAX_FD).
pub const WITNESS_FILES_PER_MESSAGE: usize = 128;
/// Numbers that an event of a dead daemon may have had: files get the lowest that are free, and a
/// daemon has few open besides events. 16,384 answers to nobody take 5 ms.
pub const EVENT_NUMBER_MAX: i32 = 16 * KIB as i32;
