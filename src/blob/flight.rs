//! Flights: fetches in progress on one core, and who waits for them.
//!
//! The table has a fixed number of places that are used again and again; nothing is allocated when
//! a flight begins. A place is found by the chunk somebody waits for. Being woken is a hint: the
//! waiter looks at the map.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use super::latency::Cause;
use super::open::OpenBlob;
use super::plan::Run;
use crate::config::{FLIGHT_SLOTS, REMOTE_WAITERS};
use crate::engine::sync::Notify;
use crate::engine::{Core, CoreId};
use crate::image::identity::ChunkIndex;
use crate::image::layout::Layout;

/// A place in the table.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FlightId(u32);

/// What a flight fetches.
#[derive(Clone)]
pub struct Plan {
    /// The blob.
    pub blob: Arc<OpenBlob>,
    /// Its layout when the flight was planned; unit numbers belong to it.
    pub layout: Arc<Layout>,
    /// The units, all claimed by this core at least in part.
    pub run: Run,
    /// For whom.
    pub cause: Cause,
    /// When it was planned.
    pub planned_ns: u64,
    /// It ends by this time.
    pub deadline_ns: u64,
}

/// Somebody on another core.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct RemoteWaiter {
    /// Which core.
    pub core: CoreId,
    /// What it waits for.
    pub chunk: ChunkIndex,
}

struct Place {
    plan: RefCell<Option<Plan>>,
    settled: Notify,
    remote: RefCell<Vec<RemoteWaiter>>,
}

/// The flights of one core.
pub struct Flights {
    places: Box<[Place]>,
    free: RefCell<Vec<FlightId>>,
    live_count: Cell<usize>,
}

impl Default for Flights {
    fn default() -> Self {
        let place = |_| Place {
            plan: RefCell::new(None),
            settled: Notify::default(),
            remote: RefCell::new(Vec::new()),
        };
        Flights {
            places: (0..FLIGHT_SLOTS).map(place).collect(),
            free: RefCell::new((0..FLIGHT_SLOTS as u32).rev().map(FlightId).collect()),
            live_count: Cell::new(0),
        }
    }
}

impl Flights {
    /// Begins a flight, or gives the plan back when all places are taken.
    pub fn begin(&self, plan: Plan) -> Result<FlightId, Plan> {
        let Some(id) = self.free.borrow_mut().pop() else { return Err(plan) };
        *self.place(id).plan.borrow_mut() = Some(plan);
        self.live_count.set(self.live_count.get() + 1);
        Ok(id)
    }

    /// What a flight fetches.
    pub fn plan(&self, id: FlightId) -> Plan {
        self.place(id).plan.borrow().clone().expect("a flight has a plan until it ends")
    }

    /// Tests a flight's plan, without taking it.
    pub fn matches(&self, id: FlightId, test: impl Fn(&Plan) -> bool) -> bool {
        self.place(id).plan.borrow().as_ref().is_some_and(test)
    }

    /// The flight that fetches a chunk, if one does.
    pub fn find(&self, blob: &Arc<OpenBlob>, chunk: ChunkIndex) -> Option<FlightId> {
        let fetches = |place: &Place| {
            place.plan.borrow().as_ref().is_some_and(|plan| {
                plan.run.chunks.contains(&chunk.0)
                    && (Arc::ptr_eq(&plan.blob, blob) || plan.blob.cache.shares(&blob.cache, chunk))
            })
        };
        self.places.iter().position(fetches).map(|index| FlightId(index as u32))
    }

    /// What tells of chunks that settled.
    pub fn settled(&self, id: FlightId) -> &Notify {
        &self.place(id).settled
    }

    /// Adds somebody on another core; false when too many wait.
    pub fn add_remote(&self, id: FlightId, waiter: RemoteWaiter) -> bool {
        let mut remote = self.place(id).remote.borrow_mut();
        let has_room = remote.len() < REMOTE_WAITERS;
        if has_room {
            remote.push(waiter);
        }
        has_room
    }

    /// Wakes this core's waiters; takes out those of other cores whose chunk `is_settled`.
    pub fn wake(
        &self,
        core: &Core,
        id: FlightId,
        is_settled: impl Fn(ChunkIndex) -> bool,
        mut tell: impl FnMut(RemoteWaiter),
    ) {
        self.settled(id).wake_all(core);
        self.place(id).remote.borrow_mut().retain(|waiter| {
            let settled = is_settled(waiter.chunk);
            if settled {
                tell(*waiter);
            }
            !settled
        });
    }

    /// Ends a flight; everybody has been woken.
    pub fn end(&self, id: FlightId) {
        let plan = self.place(id).plan.borrow_mut().take();
        assert!(plan.is_some(), "a flight ends once");
        self.place(id).remote.borrow_mut().clear();
        self.free.borrow_mut().push(id);
        self.live_count.set(self.live_count.get() - 1);
    }

    /// Flights in progress or waiting for a fetcher.
    pub fn live_count(&self) -> usize {
        self.live_count.get()
    }

    fn place(&self, id: FlightId) -> &Place {
        &self.places[id.0 as usize]
    }
}
