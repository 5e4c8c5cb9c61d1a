//! Opens the doors an operator asked for, or those this machine has.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

use crossbeam_channel::Receiver;

use super::cookies::Cookies;
use super::cull::Culler;
use super::evictor::Evictor;
use super::keeper::FANOTIFY;
use super::succession_device::Heritage;
use crate::blob::crew::MakeRoom;
use crate::blob::journal::{Journal, Level};
use crate::config::{COMPLETED_QUEUE, Config, DoorChoice, EVENT_NUMBER_MAX};
use crate::error::{Error, Result};
use crate::registry::route::Shared;
use crate::store::segment::Segment;
use crate::store::segments::SegmentStore;
use crate::upcall::binder::{Binder, Origin};
use crate::upcall::device::{DEVICE_PATH, Device};
use crate::upcall::probe::probe;

/// The open doors.
#[derive(Default)]
pub struct Doors {
    /// The cachefiles door.
    pub cachefiles: Option<Cachefiles>,
    /// The fanotify door.
    pub fanotify: Option<FanotifyDoor>,
}

/// The cachefiles door.
#[derive(Clone)]
pub struct Cachefiles {
    /// /dev/cachefiles; none for as long as a supervisor has yet to give it.
    pub device: Arc<OnceLock<Arc<Device>>>,
    /// The directory it is bound to.
    pub directory: PathBuf,
}

/// The fanotify door with its housekeeping.
pub struct FanotifyDoor {
    /// Binds and mounts.
    pub binder: Arc<Binder>,
    /// Keeps the quota.
    pub evictor: Arc<Evictor>,
    /// Where complete segments come out.
    pub completed: Receiver<Arc<Segment>>,
}

impl Doors {
    /// Opens what `config` asks for. What `auto` finds missing is said in the log, unless nothing
    /// is left.
    ///
    /// # Errors
    /// A door that was asked for by name, or all of them, cannot be opened.
    pub fn open(
        config: &Config,
        heritage: &Heritage<'_>,
        routes: &Arc<Shared>,
        journal: &Arc<Journal>,
    ) -> Result<Doors> {
        let mut doors = Doors::default();
        match config.door {
            DoorChoice::Cachefiles => {
                doors.cachefiles = open_cachefiles(config, heritage, journal)?;
            }
            DoorChoice::Fanotify => {
                let is_awaited = heritage.is_awaited(config);
                let shared = (routes, journal);
                doors.fanotify = Some(open_fanotify(config, heritage, is_awaited, shared)?);
            }
            DoorChoice::Auto => {
                let cachefiles = open_cachefiles(config, heritage, journal);
                // A supervisor gives one file: the device, where there is one.
                let is_awaited = cachefiles.is_err() && heritage.is_awaited(config);
                let fanotify = open_fanotify(config, heritage, is_awaited, (routes, journal));
                let (fanotify, cachefiles) = match (fanotify, cachefiles) {
                    (Err(fanotify), Err(cachefiles)) => {
                        return Err(Error::Unsupported(format!(
                            "this machine has neither door. fanotify: {fanotify}. cachefiles: \
                             {cachefiles}"
                        )));
                    }
                    doors => doors,
                };
                doors.fanotify = said(journal, "fanotify", fanotify);
                doors.cachefiles = said(journal, "cachefiles", cachefiles).flatten();
            }
        }
        Ok(doors)
    }

    /// What a core asks when the disk is full.
    pub fn make_room(&self) -> MakeRoom {
        match &self.fanotify {
            Some(door) => {
                let evictor = Arc::clone(&door.evictor);
                Arc::new(move |wanted| evictor.make_room(wanted))
            }
            None => Arc::new(|_| 0),
        }
    }

    /// What removes cache files behind the cachefiles door.
    pub fn culler(&self) -> Option<Culler> {
        let Cachefiles { device, directory } = self.cachefiles.clone()?;
        let command = Arc::new(move |command: &str| {
            let none = || Error::unavailable("this daemon has no device yet");
            device.get().ok_or_else(none)?.command(command)
        });
        Some(Culler::new(&directory, Cookies::of_kernel(), command))
    }
}

fn said<T>(journal: &Journal, door: &str, opened: Result<T>) -> Option<T> {
    opened
        .inspect_err(|error| {
            journal.write(Level::Info, || format!("no {door} door: {error}"));
        })
        .ok()
}

fn open_cachefiles(
    config: &Config,
    heritage: &Heritage<'_>,
    journal: &Journal,
) -> Result<Option<Cachefiles>> {
    let directory = match (&config.fscache_dir, config.door) {
        (Some(directory), _) => directory.clone(),
        (None, DoorChoice::Auto) if std::path::Path::new(DEVICE_PATH).exists() => {
            config.cache_dir.join("fscache")
        }
        (None, DoorChoice::Auto) => {
            let text = format!("{DEVICE_PATH} is not there; `sluice doctor` tells what is missing");
            return Err(Error::NotFound(text));
        }
        // nydusd's way to run without a cache.
        (None, _) => return Ok(None),
    };
    std::fs::create_dir_all(&directory)
        .map_err(|error| Error::io(&error, format!("cannot make {}", directory.display())))?;
    let found = heritage.find_device(config, &directory, journal)?;
    let device = Arc::<OnceLock<_>>::default();
    if let Some(found) = found {
        device.get_or_init(|| Arc::new(found));
    }
    Ok(Some(Cachefiles { device, directory }))
}

fn open_fanotify(
    config: &Config,
    heritage: &Heritage<'_>,
    is_awaited: bool,
    (routes, journal): (&Arc<Shared>, &Arc<Journal>),
) -> Result<FanotifyDoor> {
    let (to_sealer, completed) = crossbeam_channel::bounded(COMPLETED_QUEUE);
    let store = SegmentStore::open(&config.cache_dir, to_sealer)?;
    store.space().set_quota(config.cache_quota_bytes);
    let keeper = heritage.keeper;
    let origin = match keeper.take(FANOTIFY) {
        Some(group) => Origin::Inherited(group),
        None if is_awaited => Origin::Awaited,
        None => {
            // Versions promise nothing here: a kernel that shows zeros for short files must not
            // serve. What a predecessor served with has been tried, and its readers wait.
            let report = probe(&config.cache_dir);
            match report.reason() {
                Some(reason) => return Err(Error::Unsupported(reason)),
                None => Origin::New { reads_directly: report.reads_directly },
            }
        }
    };
    let is_inherited = matches!(origin, Origin::Inherited(_));
    let binder = Binder::open(&config.cache_dir, store, Arc::clone(routes), origin)?;
    if is_inherited {
        let lost = binder.group().let_go(EVENT_NUMBER_MAX, heritage.events);
        if lost > 0 {
            journal.error(format!("{lost} readers of a former daemon get what is there"));
        }
    }
    if let Err(error) = keeper.put(FANOTIFY, binder.group().as_fd()) {
        journal.error(format!("without a keeper a crash costs readers: {error}"));
    }
    let binder = Arc::new(binder);
    let evictor = Evictor::new(&binder, journal);
    Ok(FanotifyDoor { binder, evictor, completed })
}
