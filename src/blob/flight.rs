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
use crate::config::{DEMAND_FLIGHTS_PER_HOST, FLIGHT_SLOTS, REMOTE_WAITERS};
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
    remote: RefCell<RemoteWaiters>,
}

/// Who waits on other cores, each once however often it asks.
#[derive(Debug, Default)]
struct RemoteWaiters(Vec<RemoteWaiter>);

impl RemoteWaiters {
    /// When too many wait, one more is not told, and looks again by time: telling it at once would
    /// only make it ask again.
    fn add(&mut self, waiter: RemoteWaiter) {
        if self.0.len() < REMOTE_WAITERS && !self.0.contains(&waiter) {
            self.0.push(waiter);
        }
    }

    /// Takes out those whose chunk `is_settled` and tells them.
    fn tell(
        &mut self,
        is_settled: impl Fn(ChunkIndex) -> bool,
        mut tell: impl FnMut(RemoteWaiter),
    ) {
        self.0.retain(|waiter| {
            let settled = is_settled(waiter.chunk);
            if settled {
                tell(*waiter);
            }
            !settled
        });
    }
}

/// The flights of one core.
pub struct Flights {
    places: Box<[Place]>,
    free: RefCell<Vec<FlightId>>,
    live_count: Cell<usize>,
    /// Hosts of the flights that somebody waited for when they began.
    demanded: RefCell<Vec<u64>>,
}

impl Default for Flights {
    fn default() -> Self {
        let place = |_| Place {
            plan: RefCell::new(None),
            settled: Notify::default(),
            remote: RefCell::default(),
        };
        Flights {
            places: (0..FLIGHT_SLOTS).map(place).collect(),
            free: RefCell::new((0..FLIGHT_SLOTS as u32).rev().map(FlightId).collect()),
            live_count: Cell::new(0),
            demanded: RefCell::new(Vec::with_capacity(FLIGHT_SLOTS)),
        }
    }
}

impl Flights {
    /// Begins a flight, or gives the plan back when all places are taken, or all of its host.
    pub fn begin(&self, plan: Plan) -> Result<FlightId, Plan> {
        let (host, mut demanded) = (plan.blob.route.host, self.demanded.borrow_mut());
        let is_demanded = plan.cause == Cause::Demand;
        let of_host = || demanded.iter().filter(|&&other| other == host).count();
        if is_demanded && of_host() >= DEMAND_FLIGHTS_PER_HOST {
            return Err(plan);
        }
        let Some(id) = self.free.borrow_mut().pop() else { return Err(plan) };
        if is_demanded {
            demanded.push(host);
        }
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

    /// Adds somebody on another core.
    pub fn add_remote(&self, id: FlightId, waiter: RemoteWaiter) {
        self.place(id).remote.borrow_mut().add(waiter);
    }

    /// Wakes this core's waiters; takes out those of other cores whose chunk `is_settled`.
    pub fn wake(
        &self,
        core: &Core,
        id: FlightId,
        is_settled: impl Fn(ChunkIndex) -> bool,
        tell: impl FnMut(RemoteWaiter),
    ) {
        self.settled(id).wake_all(core);
        self.place(id).remote.borrow_mut().tell(is_settled, tell);
    }

    /// Ends a flight; everybody has been woken.
    pub fn end(&self, id: FlightId) {
        let plan = self.place(id).plan.borrow_mut().take().expect("a flight ends once");
        if plan.cause == Cause::Demand {
            let (host, mut demanded) = (plan.blob.route.host, self.demanded.borrow_mut());
            let place = demanded.iter().position(|&other| other == host);
            demanded.swap_remove(place.expect("it was there when it began"));
        }
        self.place(id).remote.borrow_mut().0.clear();
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

#[cfg(test)]
mod tests {
    use super::*;

    fn waiter(core: u8, chunk: u32) -> RemoteWaiter {
        RemoteWaiter { core: CoreId(core), chunk: ChunkIndex(chunk) }
    }

    #[test]
    fn one_who_asks_again_and_again_is_told_once_and_leaves_room_for_others() {
        let mut waiters = RemoteWaiters::default();
        (0..2 * REMOTE_WAITERS).for_each(|_| waiters.add(waiter(1, 7)));
        waiters.add(waiter(2, 7));
        waiters.add(waiter(1, 8));
        let mut told = Vec::new();
        waiters.tell(|chunk| chunk == ChunkIndex(7), |waiter| told.push(waiter));
        assert_eq!(told, [waiter(1, 7), waiter(2, 7)]);
        assert_eq!(waiters.0, [waiter(1, 8)]);
    }
}
