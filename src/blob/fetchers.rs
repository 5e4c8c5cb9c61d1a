//! What a core's fetchers are at, so that one registry's trouble does not take them all.
//!
//! A host keeps as many fetchers of a lane busy as it has connections. One of demand is not busy
//! while its flight pauses before another try, only held. What one repository and one host may hold
//! is bounded as well, further out: behind flights that pause, others of the same host go on.

use std::cell::RefCell;

use super::flight::FlightId;
use crate::config::{
    AHEAD_FETCHERS, DEMAND_FETCHERS, DEMAND_FETCHERS_PER_HOST, DEMAND_FETCHERS_PER_ROUTE,
    FETCHERS_PER_HOST,
};
use crate::engine::Lane;
use crate::registry::route::Route;

/// The fetchers of one core that have a flight.
pub struct Fetchers {
    held: RefCell<Vec<Held>>,
}

struct Held {
    flight: FlightId,
    route: u64,
    host: u64,
    lane: Lane,
    is_paused: bool,
}

impl Default for Fetchers {
    fn default() -> Self {
        Fetchers { held: RefCell::new(Vec::with_capacity(DEMAND_FETCHERS + AHEAD_FETCHERS)) }
    }
}

impl Fetchers {
    /// Whether one more of the lane may fetch from there.
    pub fn have_room(&self, route: &Route, lane: Lane) -> bool {
        let (mut busy, mut of_host, mut of_route) = (0, 0, 0);
        for held in self.held.borrow().iter().filter(|held| held.lane == lane) {
            let is_busy = !held.is_paused || lane != Lane::Demand;
            busy += usize::from(held.host == route.host && is_busy);
            of_host += usize::from(held.host == route.host);
            of_route += usize::from(held.route == route.id);
        }
        let is_bounded = lane == Lane::Demand;
        busy < FETCHERS_PER_HOST[lane as usize]
            && (!is_bounded || of_host < DEMAND_FETCHERS_PER_HOST)
            && (!is_bounded || of_route < DEMAND_FETCHERS_PER_ROUTE)
    }

    /// One of them takes a flight.
    pub fn begin(&self, flight: FlightId, route: &Route, lane: Lane) {
        let held = Held { flight, route: route.id, host: route.host, lane, is_paused: false };
        self.held.borrow_mut().push(held);
    }

    /// Its flight pauses, or goes on.
    pub fn set_paused(&self, flight: FlightId, is_paused: bool) {
        let mut held = self.held.borrow_mut();
        if let Some(held) = held.iter_mut().find(|held| held.flight == flight) {
            held.is_paused = is_paused;
        }
    }

    /// Its flight has ended.
    pub fn end(&self, flight: FlightId) {
        let mut held = self.held.borrow_mut();
        let place = held.iter().position(|held| held.flight == flight);
        held.swap_remove(place.expect("a flight that ends has begun"));
    }
}
