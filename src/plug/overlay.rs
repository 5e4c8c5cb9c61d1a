//! Mounting a stack of layers, and finding out whether something is mounted.
//!
//! Options fit one page: layers are named `/proc/self/fd/N/NUMBER/diff`, through a descriptor of
//! the directory of short names. That also makes colons and commas in the home directory's path
//! harmless, which overlayfs would take for separators (Docker's home contains the plugin's tag).

use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;

use crate::config;
use crate::error::{Error, Result};

/// One overlay: directories by their short names, as in `12/diff`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Read-only layers, topmost first; at least one.
    pub lower: Vec<String>,
    /// The layer that is written to.
    pub upper: String,
    /// Overlayfs's own directory beside it.
    pub work: String,
    /// An SELinux label for everything in it; empty for none.
    pub label: String,
}

impl Overlay {
    /// Mounts it at `target`; `numbers` is the directory of short names.
    pub fn mount(&self, numbers: &Path, target: &Path) -> Result<()> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let directory = open(numbers, flags, Mode::empty()).map_err(|errno| {
            Error::system(errno as i32, format!("cannot open {}", numbers.display()))
        })?;
        let options = self.options(&format!("/proc/self/fd/{}", directory.as_raw_fd()))?;
        mount(Some("overlay"), target, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
            .map_err(|errno| {
                let advice = match errno {
                    Errno::ENODEV => "; this kernel has no overlayfs",
                    Errno::EINVAL => "; the file system below cannot carry overlayfs (see dmesg)",
                    _ => "",
                };
                let what = format!("cannot mount an overlay at {}{advice}", target.display());
                Error::system(errno as i32, what)
            })
    }

    /// What a committed layer is made of must be in its own directory: no file may keep its data
    /// in a lower layer (metacopy), no directory its name (redirect_dir), no link its inode
    /// elsewhere (index).
    fn options(&self, base: &str) -> Result<String> {
        let lower: Vec<String> = self.lower.iter().map(|name| format!("{base}/{name}")).collect();
        let mut options = format!(
            "index=off,metacopy=off,redirect_dir=off,lowerdir={lower},upperdir={base}/{upper},\
             workdir={base}/{work}",
            lower = lower.join(":"),
            upper = self.upper,
            work = self.work
        );
        if !self.label.is_empty() {
            if self.label.contains(['"', '\0']) {
                return Err(Error::Malformed(format!("the mount label {:?}", self.label)));
            }
            options.push_str(&format!(",context=\"{}\"", self.label));
        }
        match options.len() <= config::MOUNT_OPTIONS_MAX_BYTES {
            true => Ok(options),
            false => Err(Error::Unsupported(format!(
                "{} layers on top of each other: their names do not fit the mount options",
                self.lower.len()
            ))),
        }
    }
}

/// Whether something is mounted at `path`, which lies in a directory that is not itself a mount of
/// the same kind.
pub fn is_mounted(path: &Path) -> bool {
    let device = |path: &Path| path.symlink_metadata().map(|status| status.dev());
    match (device(path), path.parent().map(device)) {
        (Ok(own), Some(Ok(parent))) => own != parent,
        // A mount whose server died is still one.
        (Err(error), _) => error.raw_os_error() != Some(libc::ENOENT),
        _ => false,
    }
}

/// Takes away all that is mounted at `path`. What is still used there is detached, and goes with
/// its last user.
pub fn unmount(path: &Path) -> Result<()> {
    let failed =
        |errno: Errno| Error::system(errno as i32, format!("cannot unmount {}", path.display()));
    for _ in 0..config::MOUNTS_STACKED_MAX {
        if !is_mounted(path) {
            return Ok(());
        }
        match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::EBUSY) => {
                let flags = MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH;
                umount2(path, flags).map_err(failed)?;
            }
            Err(Errno::EINVAL) => return Ok(()),
            Err(errno) => return Err(failed(errno)),
        }
    }
    Err(failed(Errno::EBUSY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_holds_more_layers_than_docker_stacks() {
        let overlay = |count: u64| Overlay {
            lower: (0..count).map(|number| format!("{}/diff", 1000 + number)).collect(),
            upper: "2000/diff".to_owned(),
            work: "2000/work".to_owned(),
            label: String::new(),
        };
        assert!(overlay(127).options("/proc/self/fd/1000").is_ok());
        assert!(matches!(overlay(300).options("/proc/self/fd/9"), Err(Error::Unsupported(_))));
    }

    #[test]
    fn a_label_is_quoted_and_cannot_leave_its_quotes() {
        let overlay = |label: &str| Overlay {
            lower: vec!["1/diff".to_owned()],
            upper: "2/diff".to_owned(),
            work: "2/work".to_owned(),
            label: label.to_owned(),
        };
        let options = overlay("system_u:object_r:t:s0:c1,c2").options("/b").expect("options");
        assert_eq!(
            options,
            "index=off,metacopy=off,redirect_dir=off,lowerdir=/b/1/diff,upperdir=/b/2/diff,\
             workdir=/b/2/work,context=\"system_u:object_r:t:s0:c1,c2\""
        );
        assert!(overlay("a\",upperdir=/etc,x=\"").options("/b").is_err());
    }

    #[test]
    fn only_a_mount_is_a_mount() {
        assert!(is_mounted(Path::new("/proc")));
        assert!(!is_mounted(Path::new("/proc/self")));
        assert!(!is_mounted(Path::new("/nonexistent/x")));
    }
}
