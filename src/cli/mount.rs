//! `sluice mount`: from an image's name to a mounted image, in one step.
//!
//! Bootstrap, store, register, mount(2); when a step fails, the steps before it are undone and the
//! machine is as it was, except for the bootstrap, which is kept as a cache. Mounting an image that
//! is mounted already makes a bind mount: the kernel gives an image's volume to one mount only.

use std::path::{Path, PathBuf};

use clap::Args;
use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};

use super::client::Api;
use super::mounts::{self, ImageMount};
use super::output::Output;
use super::source::{Place, Source};
use super::{Daemon, Verdict, bootstraps, umount};
use crate::config;
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
        sluice mount --bootstrap image.boot --blobs /srv/blobs /mnt"
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
    /// The image's id (EROFS's fsid); made from the bootstrap's digest if absent.
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Share blobs with the other images of this domain (Linux 6.1 or later).
    #[arg(long, value_name = "DOMAIN")]
    domain: Option<String>,
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
    let blobs = blob_ids(&source.bootstrap)?;
    let stored = bootstraps::store(&options.state_dir, &source.bootstrap)?;
    let fsid = options.id.clone().unwrap_or_else(|| format!("sluice-{}", &stored.digest[..16]));
    check_name("--id", &fsid)?;
    if let Some(domain) = &options.domain {
        check_name("--domain", domain)?;
    }
    let image = ImageMount {
        mountpoint: mountpoint.clone(),
        fsid,
        domain_id: options.domain.clone(),
        whole: true,
    };
    if !bind_existing(&image)? {
        let entry = registration(&image, &source.backend, &stored.path)?;
        register_and_mount(&api, &image, &entry, &blobs)?;
    }
    out.line(format!("mounted {} at {}", image.fsid, mountpoint.display()))?;
    Ok(Verdict::Good)
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

fn blob_ids(bootstrap: &[u8]) -> Result<Vec<String>> {
    let bootstrap = Bootstrap::parse(bootstrap.to_vec())?;
    if bootstrap.blobs().iter().any(|blob| blob.id.is_inlined_placeholder()) {
        return Err(Error::Unsupported(
            "this bootstrap was taken out of its blob and does not know the blob's id; name the \
             file after it (<blob id>.boot)"
                .to_owned(),
        ));
    }
    Ok(bootstrap.blobs().iter().map(|blob| blob.id.to_string()).collect())
}

/// The legacy form of the entry: every daemon of this API reads it.
fn registration(image: &ImageMount, backend: &Value, bootstrap: &Path) -> Result<Value> {
    let path = |path: &Path| {
        path.to_str().map(str::to_owned).ok_or_else(|| {
            Error::Malformed(format!("{}: the path is not UTF-8; use --state-dir", path.display()))
        })
    };
    let work_dir = path(bootstrap.parent().unwrap_or(Path::new("/")))?;
    Ok(json!({
        "type": "bootstrap",
        "id": image.fsid,
        "domain_id": image.domain(),
        "config": {
            "id": image.fsid,
            "backend_type": backend["type"],
            "backend_config": backend["config"],
            "cache_type": "fscache",
            "cache_config": { "work_dir": work_dir },
            "metadata_path": path(bootstrap)?,
        },
    }))
}

/// True if the image was mounted already and is now seen at the new place, too.
fn bind_existing(image: &ImageMount) -> Result<bool> {
    let mounts = mounts::read()?;
    if let Some(there) = mounts::at(&mounts, &image.mountpoint) {
        return Err(Error::Exists(format!(
            "{} is mounted at {} already; `sluice umount` it first",
            there.fsid,
            image.mountpoint.display()
        )));
    }
    let Some(other) = mounts.iter().find(|other| other.same_image(image) && other.whole) else {
        return Ok(false);
    };
    let none: Option<&str> = None;
    mount(Some(&other.mountpoint), &image.mountpoint, none, MsFlags::MS_BIND, none).map_err(
        |errno| Error::system(errno as i32, format!("cannot bind {}", other.mountpoint.display())),
    )?;
    Ok(true)
}

fn register_and_mount(
    api: &Api,
    image: &ImageMount,
    entry: &Value,
    blobs: &[String],
) -> Result<()> {
    const PATH: &str = "/api/v2/blobs";
    match api.put(PATH, entry) {
        // Left there by a mount that went away without us. Its bytes are the same, its registry may
        // not be: what is said now counts. Objects that are open keep what they were opened with.
        Err(Error::Exists(_)) => {
            umount::unregister(api, image)?;
            api.put(PATH, entry)?
        }
        result => result?,
    };
    let Err(error) = mount_image(image, blobs) else { return Ok(()) };
    // Somebody else may have mounted it meanwhile; the kernel has one volume per image.
    if matches!(error, Error::System { errno: libc::EBUSY | libc::EEXIST, .. })
        && bind_existing(image).unwrap_or(false)
    {
        return Ok(());
    }
    match umount::unregister(api, image) {
        Err(left) => Err(error.context(format!("(and it stays registered: {left})"))),
        Ok(()) => Err(error),
    }
}

fn mount_image(image: &ImageMount, blobs: &[String]) -> Result<()> {
    let options = mount_options(image, blobs)?;
    let flags = MsFlags::MS_RDONLY;
    mount(Some("none"), &image.mountpoint, Some("erofs"), flags, Some(options.as_str())).map_err(
        |errno| {
            let advice = match errno {
                nix::Error::ENODEV => "this kernel has no EROFS",
                nix::Error::EINVAL => {
                    "this kernel has no EROFS over fscache (or, with --domain, no shared domains)"
                }
                nix::Error::ENOENT | nix::Error::ENOBUFS => "the daemon does not have the device",
                nix::Error::EPERM => "run as root",
                _ => "see dmesg",
            };
            let place = image.mountpoint.display();
            let what =
                format!("cannot mount {} at {place}: {advice}; try `sluice doctor`", image.fsid);
            Error::system(errno as i32, what)
        },
    )
}

/// One device= per blob, in the order of the blob table, as long as a page holds them. Without any
/// the kernel takes the names from the image's own device table (erofs_init_device,
/// fs/erofs/super.c), which are the same: an image of 60 and more blobs mounts that way.
fn mount_options(image: &ImageMount, blobs: &[String]) -> Result<String> {
    let mut base = format!("fsid={}", image.fsid);
    if let Some(domain) = &image.domain_id {
        base.push_str(&format!(",domain_id={domain}"));
    }
    let devices: String = blobs.iter().map(|id| format!(",device={id}")).collect();
    Ok(match base.len() + devices.len() <= config::MOUNT_OPTIONS_MAX_BYTES {
        true => base + &devices,
        false => base,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(domain_id: Option<&str>) -> ImageMount {
        ImageMount {
            mountpoint: PathBuf::from("/mnt"),
            fsid: "demo".to_owned(),
            domain_id: domain_id.map(str::to_owned),
            whole: true,
        }
    }

    #[test]
    fn devices_follow_the_blob_table() {
        let blobs = ["b".to_owned(), "a".to_owned()];
        assert_eq!(mount_options(&image(None), &blobs), Ok("fsid=demo,device=b,device=a".into()));
        assert_eq!(mount_options(&image(Some("d")), &[]), Ok("fsid=demo,domain_id=d".into()));
    }

    #[test]
    fn more_devices_than_a_page_holds_are_left_to_the_kernel() {
        let blobs = |count| vec!["0".repeat(64); count];
        let fits = mount_options(&image(None), &blobs(56)).expect("options");
        assert!(fits.len() <= config::MOUNT_OPTIONS_MAX_BYTES && fits.ends_with('0'));
        assert_eq!(mount_options(&image(None), &blobs(57)), Ok("fsid=demo".into()));
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
