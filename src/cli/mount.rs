//! `sluice mount`: from an image's name to a mounted image, in one step.
//!
//! Finds the bootstrap, stores it, and asks the daemon to register and mount; a mount that fails
//! leaves the machine as it was, except for the bootstrap, which is kept as a cache.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;
use serde_json::{Value, json};

use super::output::Output;
use super::source::{Place, Source};
use super::{Daemon, Verdict, bootstraps};
use crate::blob::registration::PrefetchConfig;
use crate::config;
use crate::daemon::mounts::Door;
use crate::error::{Error, Result};
use crate::image::Bootstrap;

/// The options of `sluice mount`.
#[derive(Args)]
#[command(
    override_usage = "sluice mount [OPTIONS] HOST/REPO:TAG MOUNTPOINT\n       \
        sluice mount [OPTIONS] --bootstrap FILE --registry URL --repo REPO MOUNTPOINT",
    after_help = "Examples:\n  \
        sluice mount registry.example/team/app:1.0-nydus /mnt\n  \
        sluice mount --plain-http 127.0.0.1:5000/app:latest /mnt\n  \
        sluice mount --bootstrap image.boot --registry http://127.0.0.1:5000 --repo app /mnt\n  \
        sluice mount --bootstrap image.boot --blobs /srv/blobs /mnt\n  \
        sluice mount --trace start.jsonl registry.example/team/app:1.0-nydus /mnt"
)]
pub struct Options {
    /// The image (unless --bootstrap is given) and where to mount it.
    #[arg(hide = true, value_name = "IMAGE MOUNTPOINT", num_args = 1..=2, required = true)]
    names: Vec<PathBuf>,
    /// Use this image.boot instead of fetching one.
    #[arg(long, value_name = "FILE")]
    bootstrap: Option<PathBuf>,
    #[command(flatten)]
    place: Place,
    /// The image's id (EROFS's fsid); made from the bootstrap's digest if absent, and new with
    /// --trace.
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Share blobs with the other images of this domain (Linux 6.1 or later).
    #[arg(long, value_name = "DOMAIN")]
    domain: Option<String>,
    /// The kernel interface to mount through; the daemon chooses if absent.
    #[arg(long, value_enum, value_name = "DOOR")]
    door: Option<Door>,
    /// Fetch the whole image in the background; what is read goes first.
    #[arg(long)]
    prefetch: bool,
    /// Record what is touched first, for `sluice optimize`; written when the image is unmounted.
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Where bootstraps are kept.
    #[arg(long, value_name = "DIR", default_value = config::STATE_DIR_DEFAULT)]
    state_dir: PathBuf,
    #[command(flatten)]
    daemon: Daemon,
}

/// Mounts.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let (origin, mountpoint) = names(options)?;
    let mountpoint = directory(mountpoint)?;
    let api = options.daemon.api();
    // Before the download: without a daemon nothing else is worth a try.
    api.fetch("/api/v1/daemon")?;
    let source = match origin {
        Origin::Image(name) => Source::of_image(name, &options.place)?,
        Origin::Bootstrap(file) => Source::of_bootstrap(file, &options.place)?,
    };
    check_named(&source.bootstrap)?;
    let stored = bootstraps::store(&options.state_dir, &source.bootstrap)?;
    let fsid = options.id.clone().unwrap_or_else(|| {
        let usual = format!("sluice-{}", &stored.digest[..16]);
        // What the kernel's cache holds of an id it does not ask for, and so it is not recorded.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        if options.trace.is_some() { id_of_its_own(&usual, now, std::process::id()) } else { usual }
    });
    check_name("--id", &fsid)?;
    if let Some(domain) = &options.domain {
        check_name("--domain", domain)?;
    }
    let (domain_id, prefetch) = (options.domain.as_deref(), options.prefetch);
    let image = Named { fsid: &fsid, domain_id, prefetch };
    let entry = registration(&image, &source.backend, &stored.path)?;
    let door = options.door.map(Door::name);
    let trace = options.trace.as_deref().map(std::path::absolute).transpose();
    let trace = trace.map_err(|error| Error::io(&error, "--trace"))?;
    let path = trace.as_deref().map(utf8).transpose()?;
    let wish = json!({
        "entry": entry, "mountpoint": utf8(&mountpoint)?, "door": door, "trace": path,
    });
    let mounted = api.put("/api/sluice/v1/mounts", &wish)?;
    let door = mounted["door"].as_str().unwrap_or("?");
    out.line(format!("mounted {fsid} at {} ({door} door)", mountpoint.display()))?;
    if let Some(trace) = trace {
        out.line(format!("its first touches go to {} when it is unmounted", trace.display()))?;
    }
    Ok(Verdict::Good)
}

/// An id that no other trace has, be it begun at the same moment or the next one of this process.
fn id_of_its_own(usual: &str, now: Duration, process: u32) -> String {
    format!("{usual}-{:x}-{process:x}", now.as_nanos())
}

/// What an image is registered as.
struct Named<'a> {
    fsid: &'a str,
    domain_id: Option<&'a str>,
    prefetch: bool,
}

/// What the first name stands for.
enum Origin<'a> {
    Image(&'a Path),
    Bootstrap(&'a Path),
}

fn names(options: &Options) -> Result<(Origin<'_>, &Path)> {
    match (options.names.as_slice(), &options.bootstrap) {
        ([image, mountpoint], None) => Ok((Origin::Image(image), mountpoint)),
        ([mountpoint], Some(file)) => Ok((Origin::Bootstrap(file), mountpoint)),
        ([_], None) => Err(Error::Malformed(
            "give an image and a mountpoint, or --bootstrap FILE and a mountpoint".to_owned(),
        )),
        _ => Err(Error::Malformed(
            "with --bootstrap there is no image to name, only a mountpoint".to_owned(),
        )),
    }
}

/// The kernel shows the resolved path in its mount table, so that is the one to remember.
fn directory(mountpoint: &Path) -> Result<PathBuf> {
    let shown = mountpoint.display();
    let resolved = std::fs::canonicalize(mountpoint)
        .map_err(|error| Error::io(&error, format!("mountpoint {shown}: make it first")))?;
    match resolved.is_dir() {
        true => Ok(resolved),
        false => Err(Error::Malformed(format!("mountpoint {shown} is not a directory"))),
    }
}

/// Names go into mount options and paths: nothing there may split them.
fn check_name(option: &str, name: &str) -> Result<()> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:@+".contains(&byte);
    match (1..=128).contains(&name.len()) && name.bytes().all(is_plain) {
        true => Ok(()),
        false => Err(Error::Malformed(format!(
            "{option} {name:?}: 1 to 128 letters, digits and . _ - : @ + are allowed"
        ))),
    }
}

fn check_named(bootstrap: &[u8]) -> Result<()> {
    let bootstrap = Bootstrap::parse(bootstrap.to_vec())?;
    match bootstrap.blobs().iter().any(|blob| blob.id.is_inlined_placeholder()) {
        true => Err(Error::Unsupported(
            "this bootstrap was taken out of its blob and does not know the blob's id; name the \
             file after it (<blob id>.boot)"
                .to_owned(),
        )),
        false => Ok(()),
    }
}

/// A path as the API takes it.
fn utf8(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| {
        Error::Malformed(format!("{}: the path is not UTF-8; choose another", path.display()))
    })
}

/// The legacy form of the entry: every daemon of this API reads it.
fn registration(image: &Named<'_>, backend: &Value, bootstrap: &Path) -> Result<Value> {
    let work_dir = utf8(bootstrap.parent().unwrap_or(Path::new("/")))?;
    let prefetch = PrefetchConfig::default();
    Ok(json!({
        "type": "bootstrap",
        "id": image.fsid,
        "domain_id": image.domain_id.unwrap_or(image.fsid),
        "config": {
            "id": image.fsid,
            "backend_type": backend["type"],
            "backend_config": backend["config"],
            "cache_type": "fscache",
            "cache_config": { "work_dir": work_dir },
            "metadata_path": utf8(bootstrap)?,
            "prefetch_config": {
                "enable": image.prefetch,
                "threads_count": prefetch.threads,
                "merging_size": prefetch.merging_size_bytes,
                "bandwidth_rate": prefetch.bandwidth_bytes_per_second,
            },
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(domain_id: Option<&str>) -> Named<'_> {
        Named { fsid: "demo", domain_id, prefetch: false }
    }

    #[test]
    fn an_image_outside_a_shared_domain_is_its_own_domain() {
        let backend = json!({"type": "localfs", "config": {"dir": "/b"}});
        let entry = registration(&image(None), &backend, Path::new("/s/x/image.boot"));
        let entry = entry.expect("an entry");
        assert_eq!((&entry["id"], &entry["domain_id"]), (&json!("demo"), &json!("demo")));
        assert_eq!(entry["config"]["cache_config"]["work_dir"], "/s/x");
        assert_eq!(entry["config"]["backend_config"]["dir"], "/b");
        let shared = registration(&image(Some("d")), &backend, Path::new("/s/x/image.boot"));
        assert_eq!(shared.expect("an entry")["domain_id"], "d");
    }

    #[test]
    fn traces_begun_within_a_second_have_ids_of_their_own() {
        let id = |nanoseconds, process| {
            id_of_its_own("sluice-0123456789abcdef", Duration::from_nanos(nanoseconds), process)
        };
        let ids = [id(1_700_000_000_000_000_001, 7), id(1_700_000_000_000_000_002, 7)];
        assert_ne!(ids[0], ids[1]);
        assert_ne!(ids[0], id(1_700_000_000_000_000_001, 8));
        assert!(check_name("--id", &id(u64::MAX, u32::MAX)).is_ok());
    }

    #[test]
    fn names_that_would_split_an_option_are_refused() {
        assert!(check_name("--id", "app:1.0").is_ok());
        for name in ["", "a,b", "a/b", "a b", "a=b", "\n", &"x".repeat(129)] {
            assert!(check_name("--id", name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_mountpoint_must_be_a_directory() {
        assert!(directory(Path::new("/nonexistent/x")).is_err());
        assert!(directory(Path::new("/proc/version")).is_err());
    }
}
