//! `sluice daemon` and `sluice singleton`: options to a `Config`, and on to the daemon.
//!
//! Refuses what cannot work before anything is started: a core this process may not run on, a
//! deadline too short for one request. Never touches the kernel's cache itself.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;

use super::{Verdict, output};
use crate::config::{self, Config, DoorChoice, Intake, LogLevel};
use crate::daemon::options;
use crate::error::{Error, Result};

/// The options of `sluice daemon`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice daemon\n  \
    sluice daemon --cache /cache --apisock /run/sluice.sock --cores 2-5 --log-level debug\n  \
    sluice daemon --door cachefiles --fscache /var/lib/sluice/fscache\n\n\
    Needs root, and Linux 6.14 or later or /dev/cachefiles; `sluice doctor` says what is missing.")]
pub struct Options {
    /// Where cached bytes are kept, on ext4, xfs or btrfs; made if absent.
    #[arg(long, value_name = "DIR", default_value = config::STATE_DIR_DEFAULT)]
    cache: PathBuf,
    /// Bytes the cache may take behind the fanotify door ("200M", "50G"); unused images go first.
    #[arg(long, value_name = "SIZE", default_value = "0", value_parser = output::parse_size)]
    cache_quota: u64,
    /// The kernel interface to serve: what this machine has, or one by name.
    #[arg(long, value_enum, value_name = "DOOR", default_value_t = DoorChoice::Auto)]
    door: DoorChoice,
    /// The directory the kernel uses behind the cachefiles door, on ext4 or xfs; below --cache if
    /// absent.
    #[arg(long, value_name = "DIR")]
    fscache: Option<PathBuf>,
    /// Where the control API listens (mode 0600).
    #[arg(long, value_name = "PATH", default_value = config::API_SOCKET_DEFAULT)]
    apisock: PathBuf,
    /// CPUs for the workers: a list ("0-3,8"), or a plain number for that many ("4").
    #[arg(long, value_name = "LIST|N")]
    cores: Option<String>,
    /// How the workers share the kernel's requests.
    #[arg(long, value_enum, value_name = "MODE", default_value_t = Intake::One)]
    intake: Intake,
    /// The cache's name inside the kernel.
    #[arg(long, value_name = "NAME")]
    tag: Option<String>,
    /// How much to log.
    #[arg(short = 'l', long, value_enum, value_name = "LEVEL", default_value_t = LogLevel::Info)]
    log_level: LogLevel,
    /// Log to this file instead of standard error.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Where registered images and their bootstraps survive a restart.
    #[arg(long, value_name = "DIR", default_value = config::STATE_DIR_DEFAULT)]
    state_dir: PathBuf,
    /// A read is answered within this time, with its bytes or with EIO.
    #[arg(long, value_name = "MS", default_value_t = config::FAULT_DEADLINE_DEFAULT_MS)]
    deadline_ms: u64,
    /// Open files to ask the kernel for (0 leaves the limit alone).
    #[arg(long, value_name = "N", default_value_t = config::NOFILE_DEFAULT)]
    rlimit_nofile: u64,
    /// When this daemon dies or is stopped, readers wait so long for the next one; then they get
    /// EIO. 0: they get it at once.
    #[arg(long, value_name = "SECONDS", default_value_t = config::KEEP_DEFAULT_S,
          value_parser = clap::value_parser!(u64).range(..=config::KEEP_MAX_S))]
    keep: u64,
    /// Remember what images need at their starts, and fetch that first at the next ones.
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    learn_starts: bool,
    /// What the supervisor calls this daemon.
    #[arg(long, value_name = "ID", requires = "supervisor")]
    id: Option<String>,
    /// The socket of a supervisor, which holds the door for a successor (nydusd's protocol).
    #[arg(long, value_name = "PATH")]
    supervisor: Option<PathBuf>,
    /// Wait for the supervisor to give this daemon what another one serves.
    #[arg(long, requires = "supervisor")]
    upgrade: bool,
}

/// Serves until a signal or an API call ends it.
pub fn run(options: &Options) -> Result<Verdict> {
    let config = configure(options, &cores_allowed()?)?;
    for directory in [&options.cache, &options.state_dir] {
        std::fs::create_dir_all(directory).map_err(|error| {
            Error::io(&error, format!("cannot make the directory {}", directory.display()))
        })?;
    }
    serve(&config)
}

/// The same, with nydusd's options (program name excluded).
pub fn run_nydusd(arguments: &[OsString]) -> Result<Verdict> {
    let options = match options::parse(arguments, &cores_allowed()?) {
        Ok(options) => options,
        // Help and version are among them; a reader that hung up is no news.
        Err(error) => {
            let _ = error.print();
            return Ok(if error.use_stderr() { Verdict::Misuse } else { Verdict::Good });
        }
    };
    for remark in &options.remarks {
        output::complain(&format!("sluice: {remark}"));
    }
    serve(&options.config)
}

/// Hands over to the daemon; back when it has stopped.
fn serve(config: &Config) -> Result<Verdict> {
    crate::daemon::run(config)?;
    Ok(Verdict::Good)
}

/// The CPUs this process may run on, ascending.
pub fn cores_allowed() -> Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(0))
        .map_err(|errno| Error::system(errno as i32, "cannot read this process's CPU list"))?;
    Ok((0..CpuSet::count()).filter(|&cpu| set.is_set(cpu).unwrap_or(false)).collect())
}

/// Reads `--cores`: "0-3,8" is a list, "4" the first four allowed CPUs, nothing the default number.
///
/// # Errors
/// Malformed text, a CPU outside `allowed`, none at all, or more than `CORES_MAX`.
pub fn parse_cores(text: Option<&str>, allowed: &[usize]) -> Result<Vec<usize>> {
    let Some(text) = text else {
        return Ok(allowed.iter().copied().take(config::CORES_DEFAULT).collect());
    };
    let wrong = |why: String| Error::Malformed(format!("--cores {text}: {why}"));
    let cores = match text.parse::<usize>() {
        Ok(count) if count > allowed.len() => {
            return Err(wrong(format!("this process may run on {} CPUs only", allowed.len())));
        }
        Ok(count) => allowed[..count].to_vec(),
        Err(_) => parse_list(text).map_err(&wrong)?,
    };
    if let Some(cpu) = cores.iter().find(|cpu| !allowed.contains(cpu)) {
        return Err(wrong(format!("this process may not run on CPU {cpu} (of {allowed:?})")));
    }
    match cores.len() {
        0 => Err(wrong("at least one CPU must be left".to_owned())),
        1..=config::CORES_MAX => Ok(cores),
        count => Err(wrong(format!("{count} CPUs are more than {}", config::CORES_MAX))),
    }
}

fn parse_list(text: &str) -> std::result::Result<Vec<usize>, String> {
    let number = |part: &str| {
        part.trim()
            .parse::<usize>()
            .ok()
            .filter(|cpu| *cpu < CpuSet::count())
            .ok_or_else(|| format!("{part:?} is no CPU; write a list like 0-3,8 or a number"))
    };
    let mut cores = Vec::new();
    for part in text.split(',').filter(|part| !part.trim().is_empty()) {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(format!("{part} runs backwards"));
        }
        cores.extend(first..=last);
    }
    cores.sort_unstable();
    cores.dedup();
    Ok(cores)
}

fn configure(options: &Options, allowed: &[usize]) -> Result<Config> {
    if options.deadline_ms < config::FAULT_DEADLINE_MIN_MS {
        return Err(Error::Malformed(format!(
            "--deadline-ms {}: no registry answers that fast; give at least {}",
            options.deadline_ms,
            config::FAULT_DEADLINE_MIN_MS
        )));
    }
    Ok(Config {
        door: options.door,
        cache_dir: options.cache.clone(),
        cache_quota_bytes: options.cache_quota,
        fscache_dir: match (&options.fscache, options.door) {
            (None, DoorChoice::Cachefiles) => Some(options.cache.join("fscache")),
            (directory, _) => directory.clone(),
        },
        fscache_tag: options.tag.clone(),
        api_socket: Some(options.apisock.clone()),
        cores: parse_cores(options.cores.as_deref(), allowed)?,
        intake: options.intake,
        state_dir: options.state_dir.clone(),
        log_level: options.log_level,
        log_file: options.log_file.clone(),
        nofile_limit: options.rlimit_nofile,
        fault_deadline_ms: options.deadline_ms,
        id: options.id.clone(),
        supervisor: options.supervisor.clone(),
        upgrade: options.upgrade,
        blobs_file: None,
        learns_starts: options.learn_starts,
        keep_s: options.keep,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: [usize; 6] = [0, 1, 2, 3, 6, 7];

    #[test]
    fn a_list_names_cpus_and_a_number_counts_them() {
        assert_eq!(parse_cores(Some("0-2,6"), &ALLOWED), Ok(vec![0, 1, 2, 6]));
        assert_eq!(parse_cores(Some("7,1,1-2"), &ALLOWED), Ok(vec![1, 2, 7]));
        assert_eq!(parse_cores(Some("6,"), &ALLOWED), Ok(vec![6]));
        assert_eq!(parse_cores(Some("5"), &ALLOWED), Ok(vec![0, 1, 2, 3, 6]));
    }

    #[test]
    fn without_a_word_the_default_is_bounded() {
        assert_eq!(parse_cores(None, &ALLOWED), Ok(ALLOWED.to_vec()));
        let many: Vec<usize> = (0..128).collect();
        assert_eq!(parse_cores(None, &many).map(|c| c.len()), Ok(config::CORES_DEFAULT));
    }

    #[test]
    fn impossible_cores_are_refused_by_name() {
        for text in ["", ",", "0", "7-6", "x", "1-", "-3", "4-5", "9", "0-99999999999", "1-2-3"] {
            let error = parse_cores(Some(text), &ALLOWED).expect_err(text);
            assert!(error.to_string().starts_with(&format!("--cores {text}: ")), "{error}");
        }
        let many: Vec<usize> = (0..128).collect();
        assert!(parse_cores(Some("0-127"), &many).is_err());
    }

    #[test]
    fn this_process_runs_somewhere() {
        assert!(!cores_allowed().expect("a list").is_empty());
    }
}
