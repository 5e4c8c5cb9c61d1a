//! The cachefiles door on one core: takes messages while it can serve them, serves, answers.
//!
//! Every core polls the device and may take any message; what it cannot serve yet stays in the
//! kernel. Reads go to a fixed crew of demand slots, opens to a small crew of their own
//! (`opening.rs`), closes are done at once. Each message that wants an answer gets exactly one, on
//! every path: by the slot that served it, or here when it cannot be understood.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cachefiles::{MESSAGE_MAX_BYTES, Message, open_fd, parse};
use super::device::Device;
use super::objects::{DoorMail, Objects, OpenBootstrap, Opened, ReadJob};
use super::opening::OpenJob;
use crate::blob::crew::Crew;
use crate::blob::journal::Level;
use crate::blob::latency::{Cause, Step};
use crate::blob::seats::{Read, Seats};
use crate::blob::statistics::{Counter, Stage};
use crate::config::{
    DEMAND_SLOTS, HAND_OVER_READS, INTAKE_PAUSE_MAX_NS, INTAKE_PAUSE_NS, INTAKE_TURN, Intake,
    LAYOUT_LOOK_NS, MAILBOX_CAPACITY, OPEN_QUEUE, OPEN_SLOTS, RANGE_LEASE_SIZE,
    RESTORE_AGAIN_MAX_NS, RESTORE_AGAIN_NS,
};
use crate::engine::mesh::{Receiver, Sender};
use crate::engine::sync::{Notify, Queue};
use crate::engine::{Class, Fd, Lane};
use crate::error::{Error, Result};
use crate::registry::route::Shared;

/// epoll's EPOLLEXCLUSIVE, which io_uring's poll understands too: wake one poller, not all.
const POLL_EXCLUSIVE: u32 = 1 << 28;

/// What the doors of all cores share.
pub struct DoorParts {
    /// The device; without one the door waits until it is told of it.
    pub device: Option<Arc<Device>>,
    /// Routes of backends.
    pub routes: Arc<Shared>,
    /// The doors' mailboxes by core number, the own one included.
    pub cores: Vec<Sender<DoorMail>>,
    /// How the cores share the device.
    pub intake: Intake,
}

/// The door on one core.
pub struct Door {
    pub(super) crew: Rc<Crew>,
    pub(super) device: Arc<Device>,
    pub(super) parts: DoorParts,
    pub(super) opens: Queue<OpenJob>,
    pub(super) slot_freed: Notify,
    pub(super) installed: Notify,
    objects: RefCell<Objects>,
    reads: Queue<ReadJob>,
    seats: Seats<ReadJob>,
    /// Demand slots that wait, less the reads queued for them.
    idle_slots: Cell<usize>,
    next_sibling: Cell<usize>,
    is_stopped: Cell<bool>,
    /// A successor serves what is not answered with data here.
    pub(super) is_handing_over: Cell<bool>,
    /// The pause before the kernel is asked to send requests again; none while one is under way.
    again_ns: Cell<Option<u64>>,
}

impl Door {
    /// Spawns the door's tasks on the crew's core, when there is a device.
    pub fn start(crew: &Rc<Crew>, parts: DoorParts, mail: Receiver<DoorMail>) {
        match parts.device.clone() {
            Some(device) => Door::begin(crew, device, parts, mail),
            None => {
                let waiting = Rc::clone(crew);
                crew.core.spawn(Lane::Demand, async move {
                    // Nothing else comes before a device, but for the end.
                    if let Some(DoorMail::Begin(device)) = mail.receive(&waiting.core).await {
                        Door::begin(&waiting, device, parts, mail);
                    }
                });
            }
        }
    }

    fn begin(crew: &Rc<Crew>, device: Arc<Device>, parts: DoorParts, mail: Receiver<DoorMail>) {
        let polls = parts.intake != Intake::One || crew.id().0 == 0;
        let door = Rc::new(Door {
            crew: Rc::clone(crew),
            device,
            parts,
            opens: Queue::new(OPEN_QUEUE),
            slot_freed: Notify::default(),
            installed: Notify::default(),
            objects: RefCell::default(),
            reads: Queue::new(DEMAND_SLOTS + MAILBOX_CAPACITY),
            seats: Seats::default(),
            idle_slots: Cell::new(DEMAND_SLOTS),
            next_sibling: Cell::new(0),
            is_stopped: Cell::new(false),
            is_handing_over: Cell::new(false),
            again_ns: Cell::new(Some(RESTORE_AGAIN_NS)),
        });
        for _ in 0..DEMAND_SLOTS {
            let door = Rc::clone(&door);
            crew.core.spawn(Lane::Demand, async move { door.serve_reads().await });
        }
        for _ in 0..OPEN_SLOTS {
            let door = Rc::clone(&door);
            crew.core.spawn(Lane::Demand, async move { door.serve_opens().await });
        }
        if polls {
            let door = Rc::clone(&door);
            crew.core.spawn(Lane::Demand, async move { door.take_messages().await });
        }
        crew.core.spawn(Lane::Demand, async move { door.read_mail(mail).await });
    }

    async fn take_messages(self: Rc<Self>) {
        let mut buffer = Box::new([0; MESSAGE_MAX_BYTES]);
        let (mut empty_count, mut taken_count) = (0, 0);
        while !self.is_stopped.get() {
            while self.idle_slots.get() == 0 || self.opens.len() == OPEN_QUEUE {
                self.slot_freed.wait(&self.crew.core).await;
            }
            match self.device.receive(&self.crew.core, &mut buffer) {
                Ok(Some(bytes)) => {
                    empty_count = 0;
                    self.take(bytes).await;
                    // Closes take no slot: the core's other work goes between.
                    taken_count += 1;
                    if taken_count % INTAKE_TURN == 0 {
                        self.crew.core.yield_now().await;
                    }
                    continue;
                }
                Ok(None) => {
                    empty_count += 1;
                    self.crew.parts.counters.count(Counter::IntakeEmpty);
                }
                Err(error) => {
                    empty_count += 1;
                    self.crew.parts.journal.error(error.to_string());
                }
            }
            self.wait_for_message(empty_count).await;
        }
    }

    /// Kernels before 6.8 report the device as readable while any request is unanswered: a core
    /// that finds nothing several times in a row pauses instead of spinning.
    async fn wait_for_message(&self, empty_count: u32) {
        let core = &self.crew.core;
        if empty_count > 2 {
            let pause_ns = (INTAKE_PAUSE_NS << (empty_count - 2).min(8)).min(INTAKE_PAUSE_MAX_NS);
            // A sleep ends by its time, whatever happens.
            let _ = core.sleep(pause_ns).await;
        }
        let exclusive = match self.parts.intake {
            Intake::Exclusive => POLL_EXCLUSIVE,
            Intake::Every | Intake::One | Intake::Spin => 0,
        };
        let events = libc::POLLIN as u32 | exclusive;
        if let Err(error) = core.poll(self.device.fd(), events).await {
            self.crew.parts.journal.error(format!("/dev/cachefiles: {error}"));
            let _ = core.sleep(INTAKE_PAUSE_MAX_NS).await;
        }
    }

    async fn take(&self, bytes: &[u8]) {
        let taken_ns = self.crew.core.now();
        let counters = &self.crew.parts.counters;
        match parse(bytes) {
            Ok(Message::Read { id, object, range }) => {
                self.dispatch(ReadJob { id, object, range, taken_ns });
            }
            Ok(Message::Open { id, object, fd, volume, cookie }) => {
                counters.count(Counter::UpcallsOpen);
                self.device.unanswered_opens().fetch_add(1, Ordering::Relaxed);
                let guard = self.device.adopt(Fd(fd));
                let job = OpenJob::new(id, object, (Fd(fd), guard), (volume, cookie), taken_ns);
                let pushed = self.opens.push(&self.crew.core, job);
                assert!(pushed.is_ok(), "take_messages() leaves room for one open");
            }
            Ok(Message::Close { object }) => {
                counters.count(Counter::UpcallsClose);
                self.tell_all(|| DoorMail::Remove(object)).await;
            }
            Err(error) => self.refuse(bytes, &error),
        }
    }

    /// Answers what can be answered of a message that makes no sense.
    fn refuse(&self, bytes: &[u8], error: &Error) {
        self.crew.parts.journal.error(error.to_string());
        if let Some((id, fd)) = open_fd(bytes) {
            drop(self.device.adopt(Fd(fd)));
            let answered = self.device.answer_open(&self.crew.core, id, Err(libc::EINVAL));
            if let Err(error) = answered {
                self.crew.parts.journal.error(error.to_string());
            }
        }
    }

    /// With one core polling, that core serves what it takes while it has little to do: a hand-over
    /// costs the wake-up of a core that sleeps.
    fn dispatch(&self, job: ReadJob) {
        let cores = &self.parts.cores;
        let in_service = DEMAND_SLOTS - self.idle_slots.get();
        if self.parts.intake == Intake::One && in_service >= HAND_OVER_READS {
            let turn = self.next_sibling.get();
            self.next_sibling.set((turn + 1) % cores.len());
            let is_mine = turn == usize::from(self.crew.id().0);
            if !is_mine && cores[turn].send(DoorMail::HandOver(job.clone())).is_ok() {
                return;
            }
        }
        self.enqueue(job);
    }

    fn enqueue(&self, job: ReadJob) {
        self.idle_slots.set(self.idle_slots.get().saturating_sub(1));
        if let Err(job) = self.reads.push(&self.crew.core, job) {
            // Only reads handed over while this core is stuck: EIO now rather than a wait unseen.
            self.crew.parts.counters.count(Counter::ReadsFailed);
            self.crew.parts.journal.error("a core has more reads than it can queue; one gets EIO");
            if let Some(opened) = self.objects.borrow().find(job.object) {
                let answered = self.device.answer_read(&self.crew.core, opened.fd(), job.id);
                drop(answered);
            }
        }
    }

    async fn serve_reads(self: Rc<Self>) {
        loop {
            let job = self.reads.pop(&self.crew.core, |_| true).await;
            let _inside = self.crew.gate.enter(&self.crew.core);
            self.serve_read(job).await;
            self.idle_slots.set((self.idle_slots.get() + 1).min(DEMAND_SLOTS));
            self.slot_freed.wake_all(&self.crew.core);
        }
    }

    async fn serve_read(&self, job: ReadJob) {
        let (counters, journal) = (&self.crew.parts.counters, &self.crew.parts.journal);
        let opened = self.objects.borrow().find(job.object).cloned();
        let Some(opened) = opened else {
            // The kernel ends all requests of an object it closes, so nobody waits for this one;
            // without the object's file it could not be answered anyway.
            let text = || format!("read {} of object {}, not open", job.id.0, job.object.0);
            journal.write(Level::Warn, text);
            self.ask_again().await;
            return;
        };
        match &opened {
            Opened::Data(blob) => {
                counters.count(Counter::UpcallsRead);
                counters.add(Counter::BytesAsked, job.range.end - job.range.start);
                self.crew.record_step(blob, Cause::Demand, Step::Intake, job.taken_ns);
                let (blob, range, since_ns) = (Arc::clone(blob), job.range.clone(), job.taken_ns);
                self.serve_data(Read { blob, range, since_ns, job }).await;
            }
            Opened::Bootstrap(bootstrap) => {
                counters.count(Counter::BootstrapReads);
                let outcome = self.fill_bootstrap(bootstrap).await;
                self.finish(&job, &opened, outcome, Stage::BootstrapRead);
            }
            Opened::Refused(refused) => {
                if self.crew.core.now() >= refused.until_ns {
                    // The next read has it opened anew, and perhaps it is known by then.
                    self.tell_all(|| DoorMail::Remove(job.object)).await;
                }
                let outcome = Err(Error::NotFound("nobody knows this object".into()));
                self.finish(&job, &opened, outcome, Stage::Read);
            }
        }
    }

    /// Serves a read, and then who had to wait for its seat; or leaves it waiting for one.
    async fn serve_data(&self, read: Read<ReadJob>) {
        let mut next = self.seats.admit(read, |read| self.crew.has(&read.blob, &read.range));
        while let Some(read) = next {
            let Read { blob, range, since_ns, job } = read;
            let outcome = self.crew.serve(&blob, range, since_ns).await;
            let is_served = outcome.is_ok();
            self.finish(&job, &Opened::Data(Arc::clone(&blob)), outcome, Stage::Read);
            next = self.seats.leave(&blob, is_served, self.crew.core.now());
        }
    }

    fn finish(&self, job: &ReadJob, opened: &Opened, outcome: Result<()>, stage: Stage) {
        let (counters, journal) = (&self.crew.parts.counters, &self.crew.parts.journal);
        if let Err(error) = outcome {
            if self.is_handing_over.get() {
                // The successor is asked for the same bytes.
                return;
            }
            counters.count(Counter::ReadsFailed);
            // The fetch that failed has said what and why, once; this is once per reader.
            let text = || format!("read at {} answered with EIO: {error}", job.range.start);
            journal.write(Level::Debug, text);
        }
        let began_ns = self.crew.core.now();
        let answered = self.device.answer_read(&self.crew.core, opened.fd(), job.id);
        if let Opened::Data(blob) = opened {
            self.crew.record_step(blob, Cause::Demand, Step::Answer, began_ns);
            self.crew.record_step(blob, Cause::Demand, Step::Whole, job.taken_ns);
        }
        if let Err(error) = answered {
            // The reader was killed, or the object was closed meanwhile.
            journal.write(Level::Debug, || error.to_string());
        }
        self.crew.record(stage, job.taken_ns);
    }

    /// A read of an object that only the predecessor had open: it was still on its way out when the
    /// kernel was asked to send its requests again. Asks once more, until it is gone.
    async fn ask_again(&self) {
        let core = &self.crew.core;
        let Some(pause_ns) = self.again_ns.get().filter(|_| self.device.is_inherited()) else {
            return;
        };
        self.again_ns.set(None);
        // A sleep ends by its time, whatever happens.
        let _ = core.sleep(pause_ns).await;
        while self.device.unanswered_opens().load(Ordering::Relaxed) > 0 {
            let _ = core.sleep(LAYOUT_LOOK_NS).await;
        }
        self.again_ns.set(Some((2 * pause_ns).min(RESTORE_AGAIN_MAX_NS)));
        if let Err(error) = self.device.restore() {
            self.crew.parts.journal.error(error.to_string());
        }
    }

    /// Fills the whole bootstrap at its first read: from then on the kernel has all metadata.
    /// Before its OPEN is answered the object takes no bytes (the kernel has not yet attached its
    /// file).
    async fn fill_bootstrap(&self, bootstrap: &Arc<OpenBootstrap>) -> Result<()> {
        while !bootstrap.is_filled.load(Ordering::Acquire) {
            if bootstrap.is_filling.swap(true, Ordering::AcqRel) {
                self.crew.core.sleep(LAYOUT_LOOK_NS).await?;
                continue;
            }
            let filled = self.copy_bootstrap(bootstrap).await;
            bootstrap.is_filled.store(filled.is_ok(), Ordering::Release);
            bootstrap.is_filling.store(false, Ordering::Release);
            filled?;
        }
        Ok(())
    }

    async fn copy_bootstrap(&self, bootstrap: &Arc<OpenBootstrap>) -> Result<()> {
        let core = &self.crew.core;
        let image = Arc::clone(&bootstrap.image);
        let bytes = core.offload(move || image.read_bootstrap()).await?;
        let mut lease = core.lease(Class::Range).await;
        for (number, piece) in bytes.chunks(RANGE_LEASE_SIZE).enumerate() {
            let padded = piece.len().next_multiple_of(4096);
            lease[..piece.len()].copy_from_slice(piece);
            lease[piece.len()..padded].fill(0);
            let offset = (number * RANGE_LEASE_SIZE) as u64;
            let filled;
            (lease, filled) = bootstrap.object.fill(core, lease, 0..padded, offset).await;
            filled?;
        }
        Ok(())
    }

    pub(super) async fn tell_all(&self, mail: impl Fn() -> DoorMail) {
        for core in &self.parts.cores {
            let mut message = mail();
            // Boxes are far longer than the opens and closes under way, and these messages must not
            // be lost. A core that has ended needs none; this one reads its own box meanwhile.
            while let Err(back) = core.send(message) {
                if core.is_closed() {
                    break;
                }
                message = back;
                self.crew.core.yield_now().await;
            }
        }
    }

    async fn read_mail(self: Rc<Self>, mail: Receiver<DoorMail>) {
        let core = &self.crew.core;
        while let Some(message) = mail.receive(core).await {
            match message {
                DoorMail::Install { object, opened, missing, opener } => {
                    self.objects.borrow_mut().install(object, opened);
                    // Release pairs with the opener's Acquire: the object is in our table.
                    missing.fetch_sub(1, Ordering::Release);
                    let _ = self.parts.cores[usize::from(opener.0)].send(DoorMail::Installed);
                }
                DoorMail::Installed => self.installed.wake_all(core),
                DoorMail::Remove(object) => {
                    let removed = self.objects.borrow_mut().remove(object);
                    if let Some(opened) = removed {
                        opened.close();
                    }
                }
                DoorMail::HandOver(job) => self.enqueue(job),
                DoorMail::Stop { is_hand_over } => {
                    self.is_stopped.set(true);
                    self.is_handing_over.set(is_hand_over);
                }
                // There is one already.
                DoorMail::Begin(_) => {}
            }
        }
    }
}
