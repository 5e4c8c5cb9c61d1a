//! One core's crew: what its tasks share, and the messages cores send each other.
//!
//! Fixed at start: fetchers, a mail task, a prefetch task. A crew belongs to its core and is
//! passed as `&Rc<Crew>`; other cores reach it only through its mailbox.

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use super::catalog::Catalog;
use super::fetch::{Landing, LongBatch};
use super::fetchers::Fetchers;
use super::flight::{FlightId, Flights, Plan, RemoteWaiter};
use super::journal::{Journal, Level};
use super::latency::{Cause, Step};
use super::map::ChunkState;
use super::open::OpenBlob;
use super::prefetch::Wish;
use super::statistics::{CoreCounters, CoreStatistics, SnapshotRequest, Stage};
use super::workbench::Workbench;
use crate::config::{
    AHEAD_FETCHERS, DEMAND_FETCHERS, DIAL_DEADLINE_NS, DIAL_QUEUE, FLIGHT_SLOTS, LANDINGS,
    LARGE_LANDINGS, PREFETCH_QUEUE,
};
use crate::engine::mesh::{Receiver, Sender};
use crate::engine::offload::Errand;
use crate::engine::sync::{Gate, Notify, Permits, Queue};
use crate::engine::{Core, CoreId, Lane};
use crate::image::identity::{BlobId, ChunkIndex};
use crate::registry::client::{BlobRef, Client};
use crate::registry::route::Route;

/// A message to a core.
pub enum Mail {
    /// Tell `from` when this chunk, claimed by the receiver, has settled.
    Await {
        /// The blob.
        blob: Arc<OpenBlob>,
        /// Who waits for which chunk.
        waiter: RemoteWaiter,
    },
    /// A chunk the receiver waits for has settled.
    Settled,
    /// Get a token, a redirect and warm connections before the first fault.
    Dial {
        /// The way to the backend.
        route: Arc<Route>,
        /// A blob the backend has.
        blob: Option<BlobId>,
    },
    /// Fetch this blob in the background.
    Prefetch(Arc<OpenBlob>),
    /// Hand over a copy of the core's statistics.
    Snapshot(SnapshotRequest),
    /// Let nobody new in, finish, end.
    Stop {
        /// What is under way may take so long.
        within_ns: u64,
    },
}

/// What the cores of a daemon share, and what a crew is made of.
pub struct CrewParts {
    /// The registry client of this core.
    pub client: Rc<Client>,
    /// This core's counters.
    pub counters: CoreCounters,
    /// The log.
    pub journal: Arc<Journal>,
    /// What is registered.
    pub catalog: Arc<Catalog>,
    /// All cores' mailboxes by core number, the own one included.
    pub cores: Vec<Sender<Mail>>,
    /// A fault is answered within this time.
    pub fault_deadline_ns: u64,
    /// Frees at least so many bytes of the cache, if it can; gives how many. Blocks on the disk.
    pub make_room: MakeRoom,
}

/// Frees at least so many bytes, if it can; gives how many it was.
pub type MakeRoom = Arc<dyn Fn(u64) -> u64 + Send + Sync>;

/// What the tasks of one core share.
pub struct Crew {
    /// The core.
    pub core: Core,
    /// What was given at start.
    pub parts: CrewParts,
    /// This core's measurements.
    pub statistics: RefCell<CoreStatistics>,
    /// Fetches in progress.
    pub flights: Flights,
    /// Flights somebody waits for, not yet taken by a fetcher.
    pub demand: Queue<FlightId>,
    /// Flights nobody waits for yet.
    pub ahead: Queue<FlightId>,
    /// Blobs to prefetch.
    pub(super) prefetch: Queue<Wish>,
    /// Backends to dial ahead.
    pub dials: Queue<(Arc<Route>, Option<BlobId>)>,
    /// Bodies arriving at once.
    pub landings: Permits,
    /// Of these, the ones with large leases.
    pub large_landings: Permits,
    /// Workbenches that nobody uses at the moment.
    pub benches: RefCell<Vec<Box<Workbench>>>,
    /// Ways to a helper thread that nobody uses at the moment.
    pub(super) errands: RefCell<Vec<Errand<LongBatch, Landing>>>,
    /// Everything that must end before the core may go.
    pub gate: Gate,
    /// Set when the daemon stops.
    pub stopping: Notify,
    /// Woken when a chunk claimed by another core has settled.
    pub news: Notify,
    /// What the fetchers are at.
    pub(super) fetchers: Fetchers,
}

impl Crew {
    /// A crew that does nothing yet.
    pub fn new(core: &Core, parts: CrewParts) -> Rc<Crew> {
        Rc::new(Crew {
            core: core.clone(),
            parts,
            statistics: RefCell::default(),
            flights: Flights::default(),
            demand: Queue::new(FLIGHT_SLOTS),
            ahead: Queue::new(FLIGHT_SLOTS),
            prefetch: Queue::new(PREFETCH_QUEUE),
            dials: Queue::new(DIAL_QUEUE),
            landings: Permits::new(LANDINGS),
            large_landings: Permits::new(LARGE_LANDINGS),
            benches: RefCell::new(Vec::with_capacity(LANDINGS)),
            errands: RefCell::new(Vec::with_capacity(LANDINGS)),
            gate: Gate::default(),
            stopping: Notify::default(),
            news: Notify::default(),
            fetchers: Fetchers::default(),
        })
    }

    /// Spawns the crew's tasks. `is_over` is told when the core has stopped.
    pub fn start(self: &Rc<Self>, mail: Receiver<Mail>, is_over: Rc<dyn Fn()>) {
        for _ in 0..DEMAND_FETCHERS {
            let crew = Rc::clone(self);
            self.core.spawn(Lane::Demand, async move { crew.fetch_for(Lane::Demand).await });
        }
        for _ in 0..AHEAD_FETCHERS {
            let crew = Rc::clone(self);
            self.core
                .spawn(Lane::Background, async move { crew.fetch_for(Lane::Background).await });
        }
        let crew = Rc::clone(self);
        self.core.spawn(Lane::Background, async move { crew.prefetch_all().await });
        let crew = Rc::clone(self);
        self.core.spawn(Lane::Background, async move { crew.dial_all().await });
        let crew = Rc::clone(self);
        self.core.spawn(Lane::Demand, async move { crew.read_mail(mail, is_over).await });
        let crew = Rc::clone(self);
        self.core.spawn(Lane::Background, async move {
            crew.parts.client.maintain(&crew.core).await;
        });
    }

    /// This core's number.
    pub fn id(&self) -> CoreId {
        self.core.id()
    }

    /// Records how long a stage took.
    pub fn record(&self, stage: Stage, since_ns: u64) {
        let elapsed_ns = self.core.now().saturating_sub(since_ns);
        self.statistics.borrow_mut().record(stage, elapsed_ns);
    }

    /// Records how long a step of a read or fetch of this blob took.
    pub fn record_step(&self, blob: &OpenBlob, cause: Cause, step: Step, since_ns: u64) {
        let elapsed_ns = self.core.now().saturating_sub(since_ns);
        self.record_span(blob, cause, step, elapsed_ns);
    }

    /// The same, where the time is known.
    pub fn record_span(&self, blob: &OpenBlob, cause: Cause, step: Step, elapsed_ns: u64) {
        let mut statistics = self.statistics.borrow_mut();
        statistics.latencies.record(blob.cache.door(), cause, step, elapsed_ns);
    }

    /// Tells everybody who waits for chunks of a flight that some have settled.
    pub fn announce(&self, id: FlightId, plan: &Plan) {
        let me = self.id();
        let is_settled =
            |chunk| plan.blob.cache.state(&plan.layout, chunk) != ChunkState::Claimed(me);
        self.flights.wake(&self.core, id, is_settled, |waiter| {
            // A full mailbox loses the message; the waiter looks again by time.
            let _ = self.parts.cores[usize::from(waiter.core.0)].send(Mail::Settled);
        });
    }

    /// Asks the core that claimed a chunk for news of it; lost messages are made up for by time.
    pub fn ask(&self, owner: CoreId, blob: &Arc<OpenBlob>, chunk: ChunkIndex) {
        let waiter = RemoteWaiter { core: self.id(), chunk };
        let mail = Mail::Await { blob: Arc::clone(blob), waiter };
        let _ = self.parts.cores[usize::from(owner.0)].send(mail);
    }

    async fn dial_all(&self) {
        loop {
            let (route, blob) = self.dials.pop(&self.core, |_| true).await;
            let deadline_ns = self.core.now() + DIAL_DEADLINE_NS;
            let blob = blob.as_ref().map(|blob| BlobRef { id: blob.as_str() });
            let prepared = self.parts.client.prepare(&self.core, &route, blob, deadline_ns).await;
            if let Err(error) = prepared {
                // The image works all the same once its registry does.
                self.parts.journal.write(Level::Warn, || format!("dialling ahead: {error}"));
            }
        }
    }

    async fn read_mail(&self, mail: Receiver<Mail>, is_over: Rc<dyn Fn()>) {
        let mut within_ns = 0;
        while let Some(message) = mail.receive(&self.core).await {
            match message {
                Mail::Await { blob, waiter } => self.enlist(&blob, waiter),
                Mail::Dial { route, blob } => {
                    // A favour: when many wait already, the first read dials.
                    let _ = self.dials.push(&self.core, (route, blob));
                }
                Mail::Prefetch(blob) => self.prefetch_later(blob),
                Mail::Settled => self.news.wake_all(&self.core),
                Mail::Snapshot(request) => request.answer(&self.statistics.borrow()),
                Mail::Stop { within_ns: time_ns } => {
                    within_ns = time_ns;
                    break;
                }
            }
        }
        self.stopping.wake_all(&self.core);
        self.parts.client.hurry(&self.core);
        let deadline_ns = self.core.now() + within_ns;
        self.gate.close(&self.core, deadline_ns).await;
        self.parts.client.close();
        is_over();
    }

    /// Somebody waits for a flight now: if it was to be fetched ahead and has not begun, it goes to
    /// those who fetch on demand. Fetchers of read-ahead may all be held by a dead registry.
    pub fn promote(&self, flight: FlightId) {
        if let Some(id) = self.ahead.take(|&id| id == flight) {
            let pushed = self.demand.push(&self.core, id);
            pushed.expect("a queue has room for every flight place");
        }
    }

    fn enlist(&self, blob: &Arc<OpenBlob>, waiter: RemoteWaiter) {
        // A flight that is still there and has settled this chunk tells at its next word, or ends.
        let flight = self.flights.find(blob, waiter.chunk);
        let is_open = |id| {
            let claimed = ChunkState::Claimed(self.id());
            let is_open = |plan: &Plan| blob.cache.state(&plan.layout, waiter.chunk) == claimed;
            self.flights.matches(id, is_open)
        };
        if let Some(id) = flight.filter(|&id| is_open(id)) {
            self.promote(id);
            self.flights.add_remote(id, waiter);
        } else {
            let _ = self.parts.cores[usize::from(waiter.core.0)].send(Mail::Settled);
        }
    }
}
