//! `sluice snapshotter`: containerd's snapshots, with images that the daemon mounts lazily.
//!
//! Options to a plan, sockets and roots, one per name; the rest is in `plug`. Needs no daemon to
//! start: an image that cannot be mounted is met by its policy.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::client::{Api, query_value};
use super::{Daemon, Verdict, output, umount};
use crate::blob::journal::Journal;
use crate::config::{self, LogLevel};
use crate::daemon::log;
use crate::daemon::socket::ControlSocket;
use crate::error::{Error, Result};
use crate::plug::snapshot_images::{Mounter, Plan};
use crate::plug::snapshot_records::private_directory;
use crate::plug::snapshot_store::Store;
use crate::plug::snapshotter;
use crate::plug::start::{Policy, Starts};

/// Where the daemon takes mounts.
const MOUNTS: &str = "/api/sluice/v1/mounts";
/// Where it counts how images started.
pub const STARTS: &str = "/api/sluice/v1/starts";

/// The options of `sluice snapshotter`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice snapshotter\n  \
    sluice snapshotter --name nydus --on-failure fail --image-policy 'r.example/db/*=full'\n\n\
    containerd's side is in tools/deploy/containerd-1.6.toml and containerd-2.toml. Each name has \
    its own socket and its own root: one name of one containerd, and never two on one root.")]
pub struct Options {
    /// What containerd calls this snapshotter; may be given more than once.
    #[arg(long = "name", value_name = "NAME", default_values = ["nydus", "sluice"])]
    names: Vec<String>,
    /// Where the sockets are, NAME.sock each (mode 0600).
    #[arg(long, value_name = "DIR", default_value = config::SNAPSHOTTER_RUN_DIR_DEFAULT)]
    run_dir: PathBuf,
    /// Where snapshots are kept, in NAME each; a file system that overlay can write to.
    #[arg(long, value_name = "DIR", default_value = config::SNAPSHOTTER_ROOT_DEFAULT)]
    root: PathBuf,
    /// What to do when the daemon or the registry fails at an image's start: wait, fail, or full
    /// (wait, and then bring all of the image to this node first).
    #[arg(long, value_name = "POLICY", default_value = "wait")]
    on_failure: Policy,
    /// The same for images of this name, * standing for anything; the first that matches counts.
    #[arg(long = "image-policy", value_name = "PATTERN=POLICY", value_parser = parse_policy)]
    image_policies: Vec<(String, Policy)>,
    /// How long a snapshot waits for its image.
    #[arg(long, value_name = "MS", default_value_t = config::IMAGE_WAIT_DEFAULT_MS)]
    wait_ms: u64,
    /// Talk to this registry (HOST[:PORT]) without TLS; those on this machine are anyway.
    #[arg(long = "plain-http", value_name = "HOST")]
    plain_http: Vec<String>,
    /// Share blobs among all images of this domain (Linux 6.1 or later).
    #[arg(long, value_name = "DOMAIN")]
    domain: Option<String>,
    /// Let the daemon fetch every image whole, in the background.
    #[arg(long)]
    prefetch: bool,
    /// How much to log.
    #[arg(short = 'l', long, value_enum, value_name = "LEVEL", default_value_t = LogLevel::Info)]
    log_level: LogLevel,
    /// Log to this file instead of standard error.
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// Only say whether the options make sense.
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    daemon: Daemon,
}

/// Serves until a signal ends it.
pub fn run(options: &Options) -> Result<Verdict> {
    for name in &options.names {
        check_name(name)?;
    }
    if options.check {
        return Ok(Verdict::Good);
    }
    // containerd puts these into mount options, seen from its own directory.
    let root = std::path::absolute(&options.root)
        .map_err(|error| Error::io(&error, format!("--root {}", options.root.display())))?;
    private_directory(&root)?;
    private_directory(&options.run_dir)?;
    let (journal, lines) = Journal::new(options.log_level);
    let writer = log::start(lines, options.log_file.as_deref())?;
    let mut sockets = Vec::new();
    let mut services = Vec::new();
    for name in &options.names {
        let mounter = mounter(options.daemon.clone());
        let store = Store::open(&root.join(name), mounter, plan(name, options), journal.clone())?;
        let socket = ControlSocket::bind(&options.run_dir.join(format!("{name}.sock")))?;
        let listener = socket.listener().try_clone().map_err(|error| {
            Error::io(&error, format!("cannot listen on {}", socket.path().display()))
        })?;
        journal.write(LogLevel::Info, || format!("serving {}", socket.path().display()));
        sockets.push(socket);
        services.push((listener, store));
    }
    let served = snapshotter::serve(services);
    drop((sockets, journal));
    if writer.join().is_err() {
        output::complain("sluice: the log's thread broke off");
    }
    served.map(|()| Verdict::Good)
}

fn plan(name: &str, options: &Options) -> Plan {
    Plan {
        name: name.to_owned(),
        policies: options.image_policies.clone(),
        policy: options.on_failure,
        wait_ms: options.wait_ms,
        domain: options.domain.clone(),
        prefetch: options.prefetch,
        plain_http: options.plain_http.clone(),
    }
}

/// The daemon mounts and unmounts; what it does not know of (it was started anew, it is gone) the
/// kernel still does.
fn mounter(daemon: Daemon) -> Mounter {
    let api = daemon.api();
    let mount = move |entry: &serde_json::Value, place: &Path| {
        api.put(MOUNTS, &json!({ "entry": entry, "mountpoint": place })).map(drop)
    };
    let api = daemon.api();
    let is_served = move |place: &Path| {
        let mounts = api.fetch(MOUNTS)?;
        let mut mounts = mounts.as_array().into_iter().flatten();
        Ok(mounts.any(|mount| mount["mountpoint"].as_str().map(Path::new) == Some(place)))
    };
    let api = daemon.api();
    let unmount = move |place: &Path| match forget(&api, place) {
        Ok(()) => Ok(()),
        Err(_) if !is_mounted(place)? => Ok(()),
        Err(_) => umount::unmount(place, false),
    };
    let api = daemon.api();
    let tell = move |news: &serde_json::Value| api.put(STARTS, news).map(drop);
    Mounter {
        mount: Box::new(mount),
        unmount: Box::new(unmount),
        is_mounted: Box::new(is_mounted),
        is_served: Box::new(is_served),
        starts: Starts::new(Box::new(tell)),
    }
}

fn forget(api: &Api, place: &Path) -> Result<()> {
    let place = query_value(&place.display().to_string());
    api.delete(&format!("{MOUNTS}?mountpoint={place}")).map(drop)
}

/// A mounted directory is on another device than its parent.
fn is_mounted(place: &Path) -> Result<bool> {
    let device = |path: &Path| {
        let metadata = std::fs::symlink_metadata(path);
        metadata.map(|it| it.dev()).map_err(|error| Error::io(&error, path.display().to_string()))
    };
    match place.parent() {
        Some(parent) => Ok(device(place)? != device(parent)?),
        None => Ok(true),
    }
}

/// A name becomes a file's and a directory's.
fn check_name(name: &str) -> Result<()> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
    match (1..=64).contains(&name.len()) && name.bytes().all(is_plain) {
        true => Ok(()),
        false => Err(Error::Malformed(format!(
            "--name {name:?}: 1 to 64 letters, digits, _ and - are allowed"
        ))),
    }
}

fn parse_policy(text: &str) -> Result<(String, Policy)> {
    match text.rsplit_once('=') {
        Some((pattern, policy)) if !pattern.is_empty() => Ok((pattern.to_owned(), policy.parse()?)),
        _ => Err(Error::Malformed(format!("{text:?}: write PATTERN=wait, =fail or =full"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_names_its_images() {
        let parsed = parse_policy("r.example/a=b/*=full").unwrap();
        assert_eq!(parsed, ("r.example/a=b/*".to_owned(), Policy::Full));
        for text in ["", "=full", "r.example", "r.example=", "r.example=lazy"] {
            assert!(parse_policy(text).is_err(), "{text}");
        }
    }

    #[test]
    fn names_that_would_be_paths_are_refused() {
        for name in ["", ".", "..", "a/b", "a b", &"x".repeat(65)] {
            assert!(check_name(name).is_err(), "{name}");
        }
        assert!(check_name("nydus").is_ok());
    }

    #[test]
    fn proc_is_mounted_and_its_directories_are_not() {
        assert_eq!(is_mounted(Path::new("/proc")), Ok(true));
        assert_eq!(is_mounted(Path::new("/proc/sys/kernel")), Ok(false));
        assert!(is_mounted(Path::new("/nonexistent/x")).is_err());
    }
}
