//! `sluice umount`: takes an image's mount away and, with its last mount, its registration.
//!
//! The daemon does it for what it has mounted. Of mounts by hand through fscache the kernel's own
//! mount table says which image it is, so this works for them too, and after any restart. A daemon
//! that does not answer does not keep the mount from going; it is said, and the exit code is 1.

use std::path::{Path, PathBuf};

use clap::Args;
use nix::mount::{MntFlags, umount2};

use super::client::{Api, query_value};
use super::mounts::{self, ImageMount};
use super::output::{self, Output};
use super::{Daemon, Verdict};
use crate::error::{Error, Result};

/// The options of `sluice umount`.
#[derive(Args)]
#[command(after_help = "Example:\n  sluice umount /mnt")]
pub struct Options {
    /// Where the image is mounted.
    #[arg(value_name = "MOUNTPOINT")]
    mountpoint: PathBuf,
    /// Detach it now and let go of it when its last user does.
    #[arg(long)]
    lazy: bool,
    /// Leave it registered, so that it can be mounted again at once.
    #[arg(long)]
    keep: bool,
    #[command(flatten)]
    daemon: Daemon,
}

/// Unmounts, then unregisters.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let mountpoint = std::fs::canonicalize(&options.mountpoint)
        .map_err(|error| Error::io(&error, options.mountpoint.display().to_string()))?;
    let api = options.daemon.api();
    let (place, lazy, keep) =
        (query_value(&mountpoint.to_string_lossy()), options.lazy, options.keep);
    let query = format!("mountpoint={place}&lazy={lazy}&keep={keep}");
    match api.delete(&format!("/api/sluice/v1/mounts?{query}")) {
        Ok(_) => {
            out.line(format!("unmounted {}", mountpoint.display()))?;
            return Ok(Verdict::Good);
        }
        // The daemon is not there, or it was not the one who mounted.
        Err(Error::Unavailable { .. } | Error::System { .. } | Error::NotFound(_)) => {}
        Err(error) => return Err(error),
    }
    let mount = mounts::at(&mounts::read()?, &mountpoint).cloned().ok_or_else(|| {
        Error::NotFound(format!(
            "{}: no lazily loaded image is mounted there (see `findmnt -t erofs`)",
            mountpoint.display()
        ))
    })?;
    unmount(&mountpoint, options.lazy)?;
    let mounted_elsewhere = mounts::read()?.iter().any(|other| other.same_image(&mount));
    if options.keep || mounted_elsewhere {
        out.line(format!("unmounted {}; {} stays registered", mountpoint.display(), mount.fsid))?;
        return Ok(Verdict::Good);
    }
    match unregister(&options.daemon.api(), &mount) {
        Ok(()) | Err(Error::NotFound(_)) => {
            out.line(format!("unmounted {}", mountpoint.display()))?;
            Ok(Verdict::Good)
        }
        Err(error) => {
            output::complain(&format!(
                "sluice: {} is unmounted, but {} is still registered: {error}",
                mountpoint.display(),
                mount.fsid
            ));
            Ok(Verdict::Bad)
        }
    }
}

/// umount(2) of exactly this place.
pub fn unmount(mountpoint: &Path, lazy: bool) -> Result<()> {
    let flags = if lazy { MntFlags::MNT_DETACH } else { MntFlags::empty() };
    umount2(mountpoint, flags | MntFlags::UMOUNT_NOFOLLOW).map_err(|errno| {
        let what = format!("cannot unmount {}", mountpoint.display());
        let advice = match errno {
            nix::Error::EBUSY => "; stop what uses it (see `fuser -vm`), or give --lazy",
            nix::Error::EPERM => "; run as root",
            _ => "",
        };
        Error::system(errno as i32, format!("{what}{advice}"))
    })
}

/// Makes the daemon forget the image; its blobs go with their last image.
pub fn unregister(api: &Api, mount: &ImageMount) -> Result<()> {
    let (domain, id) = (query_value(mount.domain()), query_value(&mount.fsid));
    api.delete(&format!("/api/v2/blobs?domain_id={domain}&blob_id={id}")).map(|_| ())
}
