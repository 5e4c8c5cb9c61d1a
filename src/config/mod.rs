//! Every limit of the program, with its sums, and what an operator decides about a daemon.
//!
//! One file per room that the limits are for; callers name them all as `config::`. A queue, pool,
//! loop, retry, buffer or wait that has no name here has no business existing. Units stand last in
//! each name.

mod build;
mod cli;
mod control;
mod convert;
mod docker;
mod door;
mod engine;
mod fault;
mod image;
mod registry;
mod snapshotter;
mod store;
mod succession;
mod tar;

use std::path::PathBuf;

use clap::ValueEnum;

pub use build::*;
pub use cli::*;
pub use control::*;
pub use convert::*;
pub use docker::*;
pub use door::*;
pub use engine::*;
pub use fault::*;
pub use image::*;
pub use registry::*;
pub use snapshotter::*;
pub use store::*;
pub use succession::*;
pub use tar::*;

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

/// Which kernel interfaces the daemon opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DoorChoice {
    /// Those this machine has.
    Auto,
    /// /dev/cachefiles: Linux 5.19 to 7.1.
    Cachefiles,
    /// Pre-content events of fanotify: Linux 6.14 and later.
    Fanotify,
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
    /// Which doors are opened.
    pub door: DoorChoice,
    /// Where the fanotify door keeps segments and views.
    pub cache_dir: PathBuf,
    /// Bytes the segments may take; 0 is no bound.
    pub cache_quota_bytes: u64,
    /// The cache directory handed to the kernel (`dir`); without one it is below `cache_dir`, or,
    /// where the cachefiles door was asked for by name, there is none.
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
    /// Whether an image's start is noted, and helped at the next.
    pub learns_starts: bool,
    /// What outlives the daemon waits so long for a successor; 0: nothing outlives it.
    pub keep_s: u64,
}

/// One kibibyte.
pub const KIB: usize = 1024;
/// One mebibyte.
pub const MIB: usize = 1024 * KIB;
/// One second in the engine's unit of time.
pub const SECOND_NS: u64 = 1_000_000_000;
/// One millisecond in the engine's unit of time.
pub const MILLISECOND_NS: u64 = 1_000_000;
