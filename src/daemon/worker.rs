//! The workers: a thread per core, pinned, each with its ring, its crew and its side of the door.
//!
//! All rings are made before any worker serves; if one cannot be, none does. A worker that panics
//! has broken an invariant: the process aborts, the kernel answers its readers with EIO, and a
//! successor starts from what is on disk.

use std::cell::Cell;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::rc::Rc;
use std::sync::Arc;
use std::thread::JoinHandle;

use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::blob::catalog::Catalog;
use crate::blob::crew::{Crew, CrewParts, Mail, MakeRoom};
use crate::blob::journal::Journal;
use crate::blob::statistics::{Counters, SnapshotRequest};
use crate::config::{
    HAND_OVER_NS, HELPER_THREADS, Intake, MAILBOX_CAPACITY, MILLISECOND_NS, SPIN_DEFAULT_US,
    SPIN_INTAKE_US, STOP_DEADLINE_NS,
};
use crate::daemon::keeper::Ending;
use crate::daemon::statistics::AskCore;
use crate::engine::mesh::{Receiver, Sender, Wake, mailbox};
use crate::engine::offload::Helpers;
use crate::engine::ring::RingDriver;
use crate::engine::{Core, CoreId, Driver, Fd, Parts};
use crate::error::{Error, Result};
use crate::registry::client::Client;
use crate::registry::route::Shared;
use crate::upcall::bindings::Bindings;
use crate::upcall::device::Device;
use crate::upcall::group::Group;
use crate::upcall::intake::{Door, DoorParts};
use crate::upcall::objects::DoorMail;
use crate::upcall::watch::{EventJob, Watch, WatchMail, WatchParts};

/// What all workers share.
#[derive(Clone)]
pub struct WorkerParts {
    /// The CPUs, one worker each.
    pub cpus: Vec<usize>,
    /// The cachefiles door, if it is open; without a device it waits ([`Workers::doors`]).
    pub device: Option<Arc<Device>>,
    /// How they share it.
    pub intake: Intake,
    /// The fanotify door, if it is open: its group and what is bound.
    pub watch: Option<(Arc<Group>, Arc<Bindings>)>,
    /// What is registered.
    pub catalog: Arc<Catalog>,
    /// The log.
    pub journal: Arc<Journal>,
    /// All counters.
    pub counters: Arc<Counters>,
    /// Routes, names, certificates, passwords.
    pub routes: Arc<Shared>,
    /// A read is answered within this time.
    pub fault_deadline_ms: u64,
    /// What a core asks when the disk is full.
    pub make_room: MakeRoom,
}

/// The running workers.
pub struct Workers {
    threads: Vec<JoinHandle<()>>,
    to: Mailboxes,
}

/// The mailboxes of all cores.
#[derive(Clone, Default)]
struct Mailboxes {
    mail: Vec<Sender<Mail>>,
    doors: Vec<Sender<DoorMail>>,
    watches: Vec<Sender<WatchMail>>,
}

/// The receiving ends of one core.
struct Boxes {
    wake: Arc<Wake>,
    mail: Receiver<Mail>,
    door: Receiver<DoorMail>,
    watch: Receiver<WatchMail>,
}

impl Workers {
    /// Starts a worker per CPU; back when all serve.
    ///
    /// # Errors
    /// What the first worker that cannot start says; the others have been stopped again.
    pub fn start(parts: &WorkerParts) -> Result<Workers> {
        let helpers = Helpers::start(HELPER_THREADS)?;
        let mut to = Mailboxes::default();
        let mut boxes = Vec::new();
        for _ in &parts.cpus {
            let wake = Wake::new()?;
            let (to_mail, mail) = mailbox(&wake, MAILBOX_CAPACITY);
            let (to_door, door) = mailbox(&wake, MAILBOX_CAPACITY);
            let (to_watch, watch) = mailbox(&wake, MAILBOX_CAPACITY);
            to.mail.push(to_mail);
            to.doors.push(to_door);
            to.watches.push(to_watch);
            boxes.push(Boxes { wake, mail, door, watch });
        }
        let mut workers = Workers { threads: Vec::new(), to };
        let (started, outcomes) = crossbeam_channel::bounded(parts.cpus.len());
        for (number, boxes) in boxes.into_iter().enumerate() {
            let (parts, helpers, started) = (parts.clone(), Arc::clone(&helpers), started.clone());
            let to = workers.to.clone();
            let thread = std::thread::Builder::new().name(format!("core-{number}"));
            let body = move || {
                let worker = || work(number, &parts, boxes, to, helpers, &started);
                if std::panic::catch_unwind(std::panic::AssertUnwindSafe(worker)).is_err() {
                    std::process::abort();
                }
            };
            let thread = thread
                .spawn(body)
                .map_err(|error| Error::io(&error, "cannot start a worker thread"))?;
            workers.threads.push(thread);
        }
        drop(started);
        // The threads keep their senders, so the channel never closes: one answer each is all
        // there is.
        let answers = outcomes.iter().take(workers.threads.len());
        let first_error = answers.filter_map(Result::err).next();
        match first_error {
            None => Ok(workers),
            Some(error) => {
                workers.stop(Ending::Done);
                Err(error)
            }
        }
    }

    /// How to ask each core for its statistics.
    pub fn ask_cores(&self) -> Vec<AskCore> {
        let ask = |mail: &Sender<Mail>| -> AskCore {
            let mail = mail.clone();
            Box::new(move |request: SnapshotRequest| mail.send(Mail::Snapshot(request)).is_ok())
        };
        self.to.mail.iter().map(ask).collect()
    }

    /// All cores' mailboxes.
    pub fn mailboxes(&self) -> Vec<Sender<Mail>> {
        self.to.mail.clone()
    }

    /// The fanotify doors' mailboxes.
    pub fn watches(&self) -> Vec<Sender<WatchMail>> {
        self.to.watches.clone()
    }

    /// The cachefiles doors' mailboxes; one that was started without a device waits there for it.
    pub fn doors(&self) -> Vec<Sender<DoorMail>> {
        self.to.doors.clone()
    }

    /// Takes nothing new, lets readers that wait be answered for a bounded time, ends. At a
    /// hand-over that time is short, and who has not got data by then is left to the successor.
    pub fn stop(self, ending: Ending) {
        let is_hand_over = ending == Ending::HandOver;
        let within_ns = if is_hand_over { HAND_OVER_NS } else { STOP_DEADLINE_NS };
        // A full box belongs to a core that ends by itself or is past caring.
        for door in &self.to.doors {
            let _ = door.send(DoorMail::Stop { is_hand_over });
        }
        for watch in &self.to.watches {
            let _ = watch.send(WatchMail::Stop { is_hand_over });
        }
        for mail in &self.to.mail {
            let _ = mail.send(Mail::Stop { within_ns });
        }
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// Has an event served that a daemon which died had read: all of the segment that `file` is. It is
/// answered by the number it had there.
pub fn serve_event(watches: &[Sender<WatchMail>], file: OwnedFd, number: RawFd) {
    let core = file.as_raw_fd() as usize % watches.len();
    let job = EventJob {
        file: Fd(file.as_raw_fd()),
        range: 0..u64::MAX,
        taken_ns: 0,
        number: Fd(number),
    };
    if watches[core].send(WatchMail::HandOver(job)).is_ok() {
        // The core that answers closes it.
        let _ = file.into_raw_fd();
    }
}

fn work(
    number: usize,
    parts: &WorkerParts,
    boxes: Boxes,
    to: Mailboxes,
    helpers: Arc<Helpers>,
    started: &crossbeam_channel::Sender<Result<()>>,
) {
    let core = match make_core(number, parts, &boxes, helpers) {
        Ok(core) => core,
        Err(error) => {
            // The receiver waits until all senders are gone.
            let _ = started.send(Err(error));
            return;
        }
    };
    let crew_parts = CrewParts {
        client: Client::new(Arc::clone(&parts.routes)),
        counters: parts.counters.of_core(number),
        journal: Arc::clone(&parts.journal),
        catalog: Arc::clone(&parts.catalog),
        cores: to.mail,
        fault_deadline_ns: parts.fault_deadline_ms * MILLISECOND_NS,
        make_room: Arc::clone(&parts.make_room),
    };
    let crew = Crew::new(&core, crew_parts);
    let is_over = Rc::new(Cell::new(false));
    let flag = Rc::clone(&is_over);
    crew.start(boxes.mail, Rc::new(move || flag.set(true)));
    let (device, routes) = (parts.device.clone(), Arc::clone(&parts.routes));
    let door_parts = DoorParts { device, routes, cores: to.doors, intake: parts.intake };
    Door::start(&crew, door_parts, boxes.door);
    if let Some((group, bindings)) = &parts.watch {
        let (group, bindings) = (Arc::clone(group), Arc::clone(bindings));
        Watch::start(&crew, WatchParts { group, bindings, cores: to.watches }, boxes.watch);
    }
    let _ = started.send(Ok(()));
    core.run(|| is_over.get());
    core.shut_down();
}

fn make_core(
    number: usize,
    parts: &WorkerParts,
    boxes: &Boxes,
    helpers: Arc<Helpers>,
) -> Result<Core> {
    let cpu = parts.cpus[number];
    let mut set = CpuSet::new();
    let pinned = set.set(cpu).and_then(|()| sched_setaffinity(Pid::from_raw(0), &set));
    pinned.map_err(|errno| Error::system(errno as i32, format!("cannot pin to CPU {cpu}")))?;
    let spin_us = match parts.intake {
        Intake::Spin => SPIN_INTAKE_US,
        Intake::Every | Intake::Exclusive | Intake::One => SPIN_DEFAULT_US,
    };
    let parts = Parts {
        driver: Driver::Ring(Box::new(RingDriver::new(Arc::clone(&boxes.wake))?)),
        wake: Arc::clone(&boxes.wake),
        helpers: Some(helpers),
        seed: u64::from(std::process::id()) << 8 | number as u64,
        spin_ns: spin_us * 1000,
    };
    Core::new(CoreId(number as u8), parts)
}
