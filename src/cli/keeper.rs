//! `sluice keeper`: the process that holds a daemon's open files. Daemons start it by themselves.
//!
//! Makes itself a session of its own, so that signals to the daemon's group do not reach it, and a
//! name of its own in `ps`. All it ever says is how it ended, and only when readers paid for it.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::{Verdict, output};
use crate::config;
use crate::daemon::keeper_link::SOCKET_NAME;
use crate::daemon::keeper_process::{self, End};
use crate::error::{Error, Result};

/// The options of `sluice keeper`.
#[derive(Args)]
pub struct Options {
    /// Where the socket is that standard input listens at.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// How long to wait for a daemon.
    #[arg(long, value_name = "SECONDS", default_value_t = config::KEEP_DEFAULT_S)]
    keep: u64,
}

/// Keeps until told to go or until patience is over.
pub fn run(options: &Options) -> Result<Verdict> {
    let failed = |error: std::io::Error| Error::io(&error, "sluice keeper: started by hand?");
    keeper_process::close_inherited().map_err(failed)?;
    let listener = std::io::stdin().as_fd().try_clone_to_owned().map_err(failed)?;
    let directory = File::open(&options.state_dir).map_err(failed)?;
    // Neither is worth more than a try: the keeper works without.
    let _ = nix::unistd::setsid();
    let _ = std::fs::write("/proc/self/comm", "sluice-keeper");
    let _ = std::fs::write("/proc/self/oom_score_adj", "-900");
    let patience = Duration::from_secs(options.keep);
    if let End::Abandoned(count @ 1..) =
        keeper_process::run(listener, &directory, SOCKET_NAME, patience)?
    {
        output::complain(&format!(
            "sluice keeper: no daemon came in time; {count} files closed: readers get EIO"
        ));
    }
    Ok(Verdict::Good)
}
