//! The cachefiles device over the lives of several daemons.
//!
//! It is found in one of three ways: opened and bound; inherited from a keeper; or awaited from a
//! supervisor. The kernel has one device, bound to one directory, for as long as anybody holds it,
//! so what it was bound to is noted beside the registrations: a daemon with another directory must
//! not take it for its own.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::cookies::Cookies;
use super::keeper::{CACHEFILES, Keeper};
use crate::blob::journal::{Journal, Level};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::upcall::device::Device;

/// What a daemon may have from another.
pub struct Heritage<'a> {
    /// What holds files.
    pub keeper: &'a Keeper,
    /// Whether the API's socket was left by a daemon that died.
    pub after_crash: bool,
    /// The numbers of events that a dead daemon had read and that can be served.
    pub events: &'a [i32],
}

/// What the device was bound to.
#[derive(Debug, PartialEq, Eq, Deserialize, Serialize)]
struct Note {
    fscache_dir: PathBuf,
    tag: Option<String>,
}

const NOTE_FILE: &str = "cachefiles.json";

impl Heritage<'_> {
    /// Whether a supervisor is to give what this daemon serves: as it was told, or because it holds
    /// that since the last daemon died.
    pub fn is_awaited(&self, config: &Config) -> bool {
        config.upgrade || self.after_crash && config.supervisor.is_some()
    }

    /// Finds the device for a cache directory; none when a supervisor is to give it.
    ///
    /// # Errors
    /// `Busy` when another process has it, or when it is bound to another directory and in use.
    pub fn find_device(
        &self,
        config: &Config,
        directory: &Path,
        journal: &Journal,
    ) -> Result<Option<Device>> {
        if config.upgrade {
            return Ok(None);
        }
        let keeper = self.keeper;
        let note = Note { fscache_dir: canonical(directory)?, tag: config.fscache_tag.clone() };
        if let Some(file) = keeper.take(CACHEFILES)
            && let Some(device) = inherit(file, &note, &config.state_dir, keeper)?
        {
            journal.write(Level::Info, || "the device was held for us".to_owned());
            return Ok(Some(device));
        }
        match Device::bind(directory, config.fscache_tag.as_deref()) {
            Ok(device) => {
                if let Err(error) = hold(&device, &note, &config.state_dir, keeper, journal) {
                    journal.error(format!("without a keeper a crash costs readers: {error}"));
                }
                Ok(Some(device))
            }
            // The supervisor holds it since the last daemon died, as nydusd's managers expect.
            Err(Error::Busy(_)) if self.after_crash && config.supervisor.is_some() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Refuses what a supervisor gave if it is of another cache than ours.
pub fn check_same(ours: &Path, theirs: &Path) -> Result<()> {
    let ours = canonical(ours)?;
    match ours == theirs {
        true => Ok(()),
        false => Err(Error::Unsupported(format!(
            "the state is of the cache directory {}, this daemon's is {}",
            theirs.display(),
            ours.display()
        ))),
    }
}

/// The path by which the kernel knows a cache directory.
pub fn canonical(directory: &Path) -> Result<PathBuf> {
    let failed = |error| Error::io(&error, format!("cache directory {}", directory.display()));
    directory.canonicalize().map_err(failed)
}

/// A device that was held, or `None` when it was of no use and has been let go.
fn inherit(
    file: OwnedFd,
    note: &Note,
    state_dir: &Path,
    keeper: &Keeper,
) -> Result<Option<Device>> {
    let path = state_dir.join(NOTE_FILE);
    let known = std::fs::read(&path).ok();
    let known = known.and_then(|bytes| serde_json::from_slice::<Note>(&bytes).ok());
    if known.as_ref() == Some(note) {
        let device = Device::of(file).inherited();
        // Refused by a cache that the kernel has given up, after an I/O error of its disk.
        if device.restore().is_ok() {
            return Ok(Some(device));
        }
        drop(device);
        keeper.release(CACHEFILES)?;
        return Ok(None);
    }
    if Cookies::of_kernel().any_in_use() {
        let known = known.map_or("another".into(), |it| it.fscache_dir.display().to_string());
        return Err(Error::Busy(format!(
            "images are mounted whose bytes are in {known}, not in {}: start with --fscache \
             {known} and the same tag, or unmount them first",
            note.fscache_dir.display()
        )));
    }
    drop(file);
    keeper.release(CACHEFILES)?;
    Ok(None)
}

/// Has a device held that was just bound. On a kernel that cannot restore it would do harm: what
/// the dead daemon had taken would never be answered.
fn hold(
    device: &Device,
    note: &Note,
    state_dir: &Path,
    keeper: &Keeper,
    journal: &Journal,
) -> Result<()> {
    if !keeper.is_there() {
        return Ok(());
    }
    // There is nothing to restore yet, so this only asks whether the kernel knows the word.
    if let Err(error) = device.restore() {
        journal.write(Level::Warn, || {
            format!(
                "mounted images will get EIO when this daemon ends: before Linux 6.8 nobody can \
                     take over ({error})"
            )
        });
        return Ok(());
    }
    let path = state_dir.join(NOTE_FILE);
    let unfinished = state_dir.join(format!("{NOTE_FILE}.{}", std::process::id()));
    // Losing it with the power costs nothing: then nothing is held any more.
    serde_json::to_vec(note)
        .map_err(std::io::Error::other)
        .and_then(|bytes| std::fs::write(&unfinished, bytes))
        .and_then(|()| std::fs::rename(&unfinished, &path))
        .map_err(|error| Error::io(&error, path.display().to_string()))?;
    match device.file() {
        Some(file) => keeper.put(CACHEFILES, file.as_fd()),
        None => Ok(()),
    }
}
