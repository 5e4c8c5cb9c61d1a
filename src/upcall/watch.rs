//! The fanotify door on one core: takes events while it can serve them, serves, answers.
//!
//! One core polls the group; above a few events in service it hands further ones to its siblings.
//! What the file holds already is answered on the spot: the file's size says so, no table is asked,
//! and so cached data is served whatever else is wrong. Anything else goes to a fixed crew of
//! demand slots. An event gets exactly one answer, on every path, by the task that has it: ALLOW
//! when the bytes are in the file, EIO when they are not. Even an ALLOW given wrongly could show
//! nobody a wrong byte: what the file does not hold, the kernel cannot read.

use std::cell::{Cell, RefCell};
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use super::bindings::{Bindings, Holder, SegmentName, unknown};
use super::fanotify::{Answer, EVENT_BYTES, Event, parse};
use super::group::Group;
use super::sys;
use crate::blob::cache::Cache;
use crate::blob::crew::Crew;
use crate::blob::journal::Level;
use crate::blob::latency::{Cause, DoorKind, Step};
use crate::blob::open::OpenBlob;
use crate::blob::seats::{Read, Seats};
use crate::blob::statistics::{Counter, Stage};
use crate::config::{
    DEMAND_SLOTS, HAND_OVER_READS, INTAKE_PAUSE_MAX_NS, INTAKE_TURN, LAYOUT_LOOK_NS,
    MAILBOX_CAPACITY, SEGMENT_PATH_MAX_BYTES,
};
use crate::engine::mesh::{Receiver, Sender};
use crate::engine::sync::{Notify, Queue};
use crate::engine::{Fd, Lane};
use crate::error::{Error, Result};

/// What the watches of all cores share.
pub struct WatchParts {
    /// The group.
    pub group: Arc<Group>,
    /// What is bound.
    pub bindings: Arc<Bindings>,
    /// The watches' mailboxes by core number, the own one included.
    pub cores: Vec<Sender<WatchMail>>,
}

/// An event that has been read from the group.
#[derive(Clone, Debug)]
pub struct EventJob {
    /// The file the kernel opened for us; also what the event is answered by.
    pub file: Fd,
    /// Which bytes of the file.
    pub range: Range<u64>,
    /// When it was read; all cores have one clock.
    pub taken_ns: u64,
    /// What to answer by: `file`, or the number it had in a daemon that died.
    pub number: Fd,
}

/// A message between the watches of two cores.
pub enum WatchMail {
    /// Serve an event: from the core that polls, or of a daemon that died.
    HandOver(EventJob),
    /// Begin to take events: of a group that was awaited.
    Begin,
    /// Take nothing new.
    Stop {
        /// What cannot be answered with data is left to a successor, not refused.
        is_hand_over: bool,
    },
}

/// The door on one core.
pub struct Watch {
    crew: Rc<Crew>,
    parts: WatchParts,
    jobs: Queue<EventJob>,
    seats: Seats<EventJob>,
    slot_freed: Notify,
    begun: Notify,
    /// Demand slots that wait, less the events queued for them.
    idle_slots: Cell<usize>,
    next_sibling: Cell<usize>,
    is_stopped: Cell<bool>,
    is_handing_over: Cell<bool>,
    /// Where a file's path is read into.
    path: RefCell<Box<[u8; SEGMENT_PATH_MAX_BYTES]>>,
}

impl Watch {
    /// Spawns the door's tasks on the crew's core.
    pub fn start(crew: &Rc<Crew>, parts: WatchParts, mail: Receiver<WatchMail>) {
        let watch = Rc::new(Watch {
            crew: Rc::clone(crew),
            parts,
            jobs: Queue::new(DEMAND_SLOTS + MAILBOX_CAPACITY),
            seats: Seats::default(),
            slot_freed: Notify::default(),
            begun: Notify::default(),
            idle_slots: Cell::new(DEMAND_SLOTS),
            next_sibling: Cell::new(0),
            is_stopped: Cell::new(false),
            is_handing_over: Cell::new(false),
            path: RefCell::new(Box::new([0; SEGMENT_PATH_MAX_BYTES])),
        });
        for _ in 0..DEMAND_SLOTS {
            let watch = Rc::clone(&watch);
            crew.core.spawn(Lane::Demand, async move { watch.serve_events().await });
        }
        if crew.id().0 == 0 {
            let watch = Rc::clone(&watch);
            crew.core.spawn(Lane::Demand, async move { watch.take_events().await });
        }
        crew.core.spawn(Lane::Demand, async move { watch.read_mail(mail).await });
    }

    async fn take_events(self: Rc<Self>) {
        let (core, journal) = (&self.crew.core, &self.crew.parts.journal);
        if self.parts.group.is_awaited() {
            self.begun.wait(core).await;
        }
        let (mut buffer, mut taken_count) = ([0; EVENT_BYTES], 0);
        while !self.is_stopped.get() {
            while self.idle_slots.get() == 0 {
                self.slot_freed.wait(core).await;
            }
            // Room for one event: the next is read when there is a slot for it.
            match self.parts.group.receive(core, &mut buffer) {
                Ok([]) => self.crew.parts.counters.count(Counter::IntakeEmpty),
                Ok(bytes) => {
                    self.take(bytes);
                    // What is answered at once takes no slot: the core's other work goes between.
                    taken_count += 1;
                    if taken_count % INTAKE_TURN == 0 {
                        core.yield_now().await;
                    }
                    continue;
                }
                Err(error) => {
                    journal.error(error.to_string());
                    let _ = core.sleep(INTAKE_PAUSE_MAX_NS).await;
                }
            }
            let group = self.parts.group.fd();
            if let Err(error) = core.poll(group, libc::POLLIN as u32).await {
                journal.error(format!("the fanotify group: {error}"));
                let _ = core.sleep(INTAKE_PAUSE_MAX_NS).await;
            }
        }
    }

    fn take(&self, bytes: &[u8]) {
        let (taken_ns, journal) = (self.crew.core.now(), &self.crew.parts.journal);
        for event in parse(bytes) {
            match event {
                Ok(Event { file: Some(file), range, .. }) => {
                    self.crew.parts.counters.count(Counter::UpcallsRead);
                    let job = EventJob { file, range, taken_ns, number: file };
                    if !self.answer_if_there(&job) {
                        self.dispatch(job);
                    }
                }
                // The kernel could not open it for us and has refused its reader.
                Ok(_) => journal.error("an event of the fanotify group came without its file"),
                Err(error) => journal.error(error.to_string()),
            }
        }
    }

    /// Answers at once when the file reaches over the range.
    fn answer_if_there(&self, job: &EventJob) -> bool {
        if self.parts.bindings.store().space().is_evicting()
            || self.crew.parts.catalog.recorder.is_active()
        {
            // The file may be emptied any moment, or somebody records who reads it: its owner is
            // asked.
            return false;
        }
        let is_there = sys::file_size(job.file).is_ok_and(|size| job.range.end <= size);
        if is_there {
            self.answer(job, Answer::Allow);
            self.crew.record(Stage::Present, job.taken_ns);
        }
        is_there
    }

    /// To a slot of this core, or, when it has much to do, to a sibling's.
    fn dispatch(&self, job: EventJob) {
        let counters = &self.crew.parts.counters;
        counters.add(Counter::BytesAsked, job.range.end - job.range.start);
        let in_service = DEMAND_SLOTS - self.idle_slots.get();
        let siblings = self.parts.cores.len();
        if in_service < HAND_OVER_READS || siblings == 1 {
            return self.enqueue(job);
        }
        let next = self.next_sibling.get();
        self.next_sibling.set(next.wrapping_add(1));
        let sibling = next % siblings;
        if sibling == usize::from(self.crew.id().0) {
            return self.enqueue(job);
        }
        if let Err(WatchMail::HandOver(job)) =
            self.parts.cores[sibling].send(WatchMail::HandOver(job))
        {
            self.enqueue(job);
        }
    }

    fn enqueue(&self, job: EventJob) {
        self.idle_slots.set(self.idle_slots.get().saturating_sub(1));
        if let Err(job) = self.jobs.push(&self.crew.core, job) {
            self.crew.parts.journal.error("a core has more events than it can queue; one gets EIO");
            self.refuse(&job);
        }
    }

    async fn serve_events(self: Rc<Self>) {
        loop {
            let job = self.jobs.pop(&self.crew.core, |_| true).await;
            let _inside = self.crew.gate.enter(&self.crew.core);
            self.record(Step::Intake, job.taken_ns);
            match self.find(&job).await {
                Ok((blob, range)) => {
                    let since_ns = job.taken_ns;
                    self.serve(Read { blob, range, since_ns, job }).await;
                }
                Err(error) => self.finish(&job, Err(error)),
            }
            self.idle_slots.set((self.idle_slots.get() + 1).min(DEMAND_SLOTS));
            self.slot_freed.wake_all(&self.crew.core);
        }
    }

    /// Serves a read, and then who had to wait for its seat; or leaves it waiting for one.
    async fn serve(&self, read: Read<EventJob>) {
        let mut next = self.seats.admit(read, |read| self.crew.has(&read.blob, &read.range));
        while let Some(read) = next {
            let Read { blob, range, since_ns, job } = read;
            let served = self.crew.serve(&blob, range, since_ns).await;
            let is_served = served.is_ok();
            self.finish(&job, served);
            next = self.seats.leave(&blob, is_served, self.crew.core.now());
        }
    }

    fn finish(&self, job: &EventJob, served: Result<()>) {
        let began_ns = self.crew.core.now();
        match served {
            Ok(()) => self.answer(job, Answer::Allow),
            // Its file stays open, so it is left to the successor, who has the time for it.
            Err(_) if self.is_handing_over.get() => {}
            Err(error) => {
                // The fetch that failed has said what and why, once; this is once per reader.
                let text = || format!("event at {} answered with EIO: {error}", job.range.start);
                self.crew.parts.journal.write(Level::Debug, text);
                self.refuse(job);
            }
        }
        self.record(Step::Answer, began_ns);
        self.record(Step::Whole, job.taken_ns);
        self.crew.record(Stage::Read, job.taken_ns);
    }

    fn record(&self, step: Step, since_ns: u64) {
        let elapsed_ns = self.crew.core.now().saturating_sub(since_ns);
        let mut statistics = self.crew.statistics.borrow_mut();
        statistics.latencies.record(DoorKind::Fanotify, Cause::Demand, step, elapsed_ns);
    }

    /// The blob that fills the event's file, once its image is bound.
    async fn find(&self, job: &EventJob) -> Result<(Arc<OpenBlob>, Range<u64>)> {
        let deadline_ns = job.taken_ns + self.crew.parts.fault_deadline_ns;
        loop {
            // Read before the look: the image may be bound, as the last one, right behind it.
            let is_restored = self.parts.bindings.is_restored();
            let error = match self.locate(job).await {
                Ok(found) => return Ok(found),
                Err(error) => error,
            };
            let may_come = matches!(error, Error::NotFound(_)) && !is_restored;
            if !may_come || self.crew.core.now() >= deadline_ns || self.crew.gate.is_closed() {
                return Err(error);
            }
            // An image of a former daemon that is yet to be bound again.
            self.crew.core.sleep(LAYOUT_LOOK_NS).await?;
        }
    }

    /// The blob that fills the event's file, and the event's range in the blob's address space.
    async fn locate(&self, job: &EventJob) -> Result<(Arc<OpenBlob>, Range<u64>)> {
        let mut place = 0;
        loop {
            let holder = self.with_name(job, |name| {
                self.parts.bindings.holder(name.blob_id, place).ok_or_else(|| unknown(name))
            })?;
            holder.touch(job.taken_ns);
            let blob = self.awake(&holder, job).await?;
            let found = self.with_name(job, |name| Ok(place_of(&blob, name, job)))?;
            match found {
                Some(range) => return Ok((blob, range)),
                None => place += 1,
            }
        }
    }

    async fn awake(&self, holder: &Holder, job: &EventJob) -> Result<Arc<OpenBlob>> {
        let core = &self.crew.core;
        let deadline_ns = job.taken_ns + self.crew.parts.fault_deadline_ns;
        loop {
            if let Some(blob) = holder.awake() {
                return Ok(blob);
            }
            if holder.begin_waking() {
                let (waker, bindings) = (holder.clone(), Arc::clone(&self.parts.bindings));
                let woken = core.offload(move || waker.wake(&bindings)).await;
                holder.end_waking();
                return woken;
            }
            if core.now() >= deadline_ns {
                let id = &holder.bound.image.id;
                return Err(Error::Deadline(format!("image {id} does not wake")));
            }
            core.sleep(LAYOUT_LOOK_NS).await?;
        }
    }

    /// Hands the name of the event's file to `look`.
    fn with_name<T>(
        &self,
        job: &EventJob,
        look: impl FnOnce(&SegmentName<'_>) -> Result<T>,
    ) -> Result<T> {
        let mut buffer = self.path.borrow_mut();
        let path = sys::file_path(job.file, &mut buffer[..])
            .map_err(|errno| Error::system(errno as i32, "an event's file has no path"))?;
        match SegmentName::parse(path) {
            Some(name) => look(&name),
            None => {
                let path = String::from_utf8_lossy(path);
                Err(Error::Malformed(format!("an event of {path}, which is no segment")))
            }
        }
    }

    fn refuse(&self, job: &EventJob) {
        self.crew.parts.counters.count(Counter::ReadsFailed);
        self.answer(job, Answer::Deny);
    }

    /// Answers, and lets the file go. In this order: while the file is open, no other event can
    /// have its number.
    fn answer(&self, job: &EventJob, answer: Answer) {
        if let Err(error) = self.parts.group.answer(&self.crew.core, job.number, answer) {
            // The reader was killed meanwhile, or a daemon that died had answered.
            self.crew.parts.journal.write(Level::Debug, || error.to_string());
        }
        self.crew.core.close(job.file);
    }

    async fn read_mail(self: Rc<Self>, mail: Receiver<WatchMail>) {
        while let Some(message) = mail.receive(&self.crew.core).await {
            match message {
                WatchMail::HandOver(job) => {
                    // An event of a daemon that died has its time from now on.
                    let taken_ns =
                        if job.taken_ns > 0 { job.taken_ns } else { self.crew.core.now() };
                    self.enqueue(EventJob { taken_ns, ..job });
                }
                WatchMail::Begin => self.begun.wake_all(&self.crew.core),
                WatchMail::Stop { is_hand_over } => {
                    self.is_stopped.set(true);
                    self.is_handing_over.set(is_hand_over);
                }
            }
        }
    }
}

/// The range of the blob's address space that an event's range in a segment is, if the blob has
/// this segment.
fn place_of(blob: &OpenBlob, name: &SegmentName<'_>, job: &EventJob) -> Option<Range<u64>> {
    let Cache::Segments(segments) = &blob.cache else { return None };
    let place = segments.plan().place_of_number(name.number)?;
    let file = &segments.files()[place as usize];
    if file.name() != name.name {
        return None;
    }
    file.note_read();
    // Read before the file's own, which may grow meanwhile.
    let known = file.size();
    match sys::file_size(job.file) {
        // Somebody made it shorter behind our back: it is filled again.
        Ok(size) if size < known => file.believe(size),
        _ => {}
    }
    let plan = segments.plan().segment(place);
    // The kernel may ask for pages behind the last chunk, which nobody has.
    let end = job.range.end.min(plan.size);
    Some(plan.base + job.range.start.min(end)..plan.base + end)
}
