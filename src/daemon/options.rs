//! nydusd's command line, for managers that were written for it.
//!
//! `nydusd singleton ...` and `sluice singleton ...` come here. Every option of nydusd's singleton
//! mode is taken with its default and its rules; what has no meaning for us is remarked on, never
//! passed over in silence. Looks at the disk only to check that DIR is there.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use super::entry::{self, Entry, Refusal};
use crate::config::{
    BLOBS_FILE_MAX_BYTES, CORES_MAX, Config, DoorChoice, FAULT_DEADLINE_DEFAULT_MS, Intake,
    KEEP_DEFAULT_S, LogLevel, NOFILE_DEFAULT, NYDUSD_THREADS_MAX, STATE_DIR_DEFAULT,
};
use crate::error::{Error, Result};

/// What nydusd's options come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NydusdOptions {
    /// The daemon they ask for.
    pub config: Config,
    /// Sentences for the log: what was asked for and is not done.
    pub remarks: Vec<String>,
}

/// The options of `nydusd singleton`.
#[derive(Parser, Debug)]
#[command(
    name = "nydusd",
    version,
    about = "Serve EROFS images on demand, with the options of nydusd's singleton mode"
)]
struct Raw {
    /// The mode; only "singleton" is served.
    #[arg(value_name = "MODE", default_value = "singleton")]
    mode: String,
    /// The cache directory the kernel uses; must exist.
    #[arg(long, value_name = "DIR")]
    fscache: Option<PathBuf>,
    /// The cache's name inside the kernel.
    #[arg(long, value_name = "TAG", requires = "fscache")]
    fscache_tag: Option<String>,
    /// Worker threads; here the number of CPUs to use, at most those there are.
    #[arg(long, value_name = "N", default_value_t = 4,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(NYDUSD_THREADS_MAX)))]
    fscache_threads: u32,
    /// Where the control API listens.
    #[arg(short = 'A', long, value_name = "PATH")]
    apisock: Option<PathBuf>,
    /// A JSON file with a list of blobs to register at start.
    #[arg(short = 'C', long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// What the supervisor calls this daemon.
    #[arg(long, value_name = "ID", requires = "supervisor")]
    id: Option<String>,
    /// The supervisor's socket.
    #[arg(long, value_name = "SOCK", requires = "id")]
    supervisor: Option<PathBuf>,
    /// Wait for a takeover from the supervisor.
    #[arg(long)]
    upgrade: bool,
    /// How much to log.
    #[arg(short = 'l', long, value_enum, value_name = "LEVEL", default_value_t = LogLevel::Info)]
    log_level: LogLevel,
    /// Log to this file instead of standard error.
    #[arg(short = 'L', long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Rotate the log file at this size (not done here).
    #[arg(long, value_name = "MB", default_value_t = 0)]
    log_rotation_size: u64,
    /// Open files to ask the kernel for (0 leaves the limit alone).
    #[arg(long, value_name = "N", default_value_t = NOFILE_DEFAULT)]
    rlimit_nofile: u64,
}

/// Reads nydusd's arguments, without the program name. `cores_allowed` are the CPUs this process
/// may run on, at least one.
///
/// # Errors
/// clap's own: it prints itself and knows the exit code; help and version are among them.
pub fn parse(
    arguments: &[OsString],
    cores_allowed: &[usize],
) -> std::result::Result<NydusdOptions, clap::Error> {
    let name = OsString::from("nydusd");
    let raw = Raw::try_parse_from(std::iter::once(&name).chain(arguments))?;
    raw.check(cores_allowed).map_err(|(kind, text)| Raw::command().error(kind, text))
}

/// Reads the entries of nydusd's `--config FILE`, each with its own JSON. One bad entry is an error
/// for all.
pub fn read_blobs_file(path: &Path) -> Result<Vec<(Entry, Vec<u8>)>> {
    use std::io::Read;
    let failed = |error: std::io::Error| Error::io(&error, path.display().to_string());
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    let limit = BLOBS_FILE_MAX_BYTES as u64;
    file.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(Error::Unsupported(format!(
            "{}: larger than {limit} bytes; register the images over the API",
            path.display()
        )));
    }
    entry::parse_list(&bytes).map_err(|refusal| {
        let reason = match refusal {
            Refusal::Parse(error) => error.to_string(),
            Refusal::Refused(reason) => reason,
        };
        Error::Malformed(format!("{}: {reason}", path.display()))
    })
}

impl Raw {
    fn check(
        self,
        cores_allowed: &[usize],
    ) -> std::result::Result<NydusdOptions, (ErrorKind, String)> {
        if self.mode != "singleton" {
            return Err((
                ErrorKind::InvalidValue,
                format!("mode {:?} is not served here; only \"singleton\" is", self.mode),
            ));
        }
        let fscache_dir = self.fscache.as_deref().map(cache_directory).transpose()?;
        let wanted = self.fscache_threads as usize;
        let cores: Vec<usize> = cores_allowed.iter().copied().take(wanted.min(CORES_MAX)).collect();
        let mut remarks = Vec::new();
        if cores.len() < wanted {
            remarks.push(format!(
                "--fscache-threads {wanted}: one thread per CPU is enough, {} are used",
                cores.len()
            ));
        }
        if self.log_rotation_size > 0 {
            remarks.push("--log-rotation-size: the log is not rotated; use logrotate".to_owned());
        }
        let config = Config {
            door: DoorChoice::Cachefiles,
            cache_dir: PathBuf::from(STATE_DIR_DEFAULT),
            cache_quota_bytes: 0,
            fscache_dir,
            fscache_tag: self.fscache_tag,
            api_socket: self.apisock,
            cores,
            intake: Intake::One,
            state_dir: PathBuf::from(STATE_DIR_DEFAULT),
            log_level: self.log_level,
            log_file: self.log_file,
            nofile_limit: self.rlimit_nofile,
            fault_deadline_ms: FAULT_DEADLINE_DEFAULT_MS,
            id: self.id,
            supervisor: self.supervisor,
            upgrade: self.upgrade,
            blobs_file: self.config,
            learns_starts: true,
            keep_s: KEEP_DEFAULT_S,
        };
        Ok(NydusdOptions { config, remarks })
    }
}

/// nydusd makes the path canonical before the kernel gets it.
fn cache_directory(path: &Path) -> std::result::Result<PathBuf, (ErrorKind, String)> {
    let refused = |why: String| (ErrorKind::InvalidValue, why);
    let canonical = path
        .canonicalize()
        .map_err(|error| refused(format!("--fscache {}: {error}", path.display())))?;
    match canonical.is_dir() {
        true => Ok(canonical),
        false => Err(refused(format!("--fscache {}: not a directory", path.display()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CORES: [usize; 6] = [0, 1, 2, 3, 8, 9];

    fn read(arguments: &[&str]) -> std::result::Result<NydusdOptions, clap::Error> {
        let arguments: Vec<OsString> = arguments.iter().map(OsString::from).collect();
        parse(&arguments, &CORES)
    }

    #[test]
    fn a_managers_command_line_becomes_a_config() {
        let directory = tempfile::tempdir().unwrap();
        let dir = directory.path().to_str().unwrap();
        let dotted = format!("{dir}/./");
        let options = read(&[
            "singleton",
            "--fscache",
            &dotted,
            "--fscache-tag",
            "t",
            "--fscache-threads",
            "3",
            "--apisock",
            "/run/n.sock",
            "--log-level",
            "debug",
            "--log-file",
            "/n.log",
            "--rlimit-nofile",
            "0",
            "--id",
            "d1",
            "--supervisor",
            "/s.sock",
            "--upgrade",
            "--config",
            "/c.json",
        ]);
        let NydusdOptions { config, remarks } = options.unwrap();
        assert_eq!(config.fscache_dir, Some(directory.path().canonicalize().unwrap()));
        assert_eq!(config.fscache_tag.as_deref(), Some("t"));
        assert_eq!(config.cores, [0, 1, 2]);
        assert_eq!(config.api_socket, Some("/run/n.sock".into()));
        assert_eq!((config.log_level, config.log_file), (LogLevel::Debug, Some("/n.log".into())));
        assert_eq!(config.nofile_limit, 0);
        assert_eq!((config.id.as_deref(), config.upgrade), (Some("d1"), true));
        assert_eq!(config.supervisor, Some("/s.sock".into()));
        assert_eq!(config.blobs_file, Some("/c.json".into()));
        assert!(remarks.is_empty());
    }

    #[test]
    fn defaults_are_those_of_nydusd() {
        let options = read(&[]).unwrap();
        assert_eq!(options, read(&["singleton"]).unwrap());
        assert_eq!(options.config.cores.len(), 4);
        assert_eq!(options.config.nofile_limit, 1_000_000);
        assert_eq!(options.config.log_level, LogLevel::Info);
        assert_eq!((options.config.api_socket, options.config.upgrade), (None, false));
        assert!(read(&["-A", "/a", "singleton", "-l", "warn"]).is_ok());
    }

    #[test]
    fn what_is_asked_for_and_not_done_is_remarked_on() {
        let options =
            read(&["singleton", "--fscache-threads", "64", "--log-rotation-size", "10"]).unwrap();
        assert_eq!(options.config.cores, CORES);
        assert_eq!(options.remarks.len(), 2);
    }

    #[test]
    fn impossible_options_are_refused() {
        for arguments in [
            &["fuse"][..],
            &["virtiofs", "--fscache", "/"],
            &["--fscache-threads", "0"],
            &["--fscache-threads", "1025"],
            &["--fscache-tag", "t"],
            &["--id", "a"],
            &["--supervisor", "/s"],
            &["--fscache", "/nonexistent"],
            &["--fscache", "/etc/passwd"],
            &["--log-level", "loud"],
            &["--mountpoint", "/m"],
            &["singleton", "singleton"],
        ] {
            let error = read(arguments).expect_err(&format!("{arguments:?}"));
            assert_eq!(error.exit_code(), 2, "{error}");
        }
        assert_eq!(read(&["--version"]).unwrap_err().exit_code(), 0);
    }

    #[test]
    fn blobs_file_gives_each_entry_with_its_json() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.json");
        let entry = r#"{"type":"bootstrap","id":"i","config_v2":{"version":2,
            "backend":{"type":"localfs","localfs":{"dir":"/b"}},"cache":{"type":"fscache"},
            "metadata_path":"/m"}}"#;
        std::fs::write(&path, format!("{{\"other\":1,\"blobs\":[{entry}]}}")).unwrap();
        let entries = read_blobs_file(&path).unwrap();
        let spec = Entry::parse(&entries[0].1).unwrap().into_spec().unwrap();
        assert_eq!(spec.id, "i");
        std::fs::write(&path, "{}").unwrap();
        assert!(read_blobs_file(&path).unwrap().is_empty());
        for (text, word) in [
            ("{\"blobs\":[{\"type\":\"bootstrap\",\"id\":\"i\"}]}", "blobs[0]: config_v2"),
            ("{\"blobs\":[{\"type\":\"bootstrap\"}]}", "blobs[0]: missing field `id`"),
            ("[", "c.json"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = read_blobs_file(&path).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        assert!(read_blobs_file(Path::new("/nonexistent")).is_err());
    }
}
