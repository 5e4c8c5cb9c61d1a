//! Who may be served now, so that readers of a registry that is away leave room for everybody else.
//!
//! A read keeps its demand slot until its bytes are here or its deadline has come. Each repository
//! therefore has a number of seats on a core, and each host a larger one; a read that finds none
//! free waits without a slot until one of its own leaves. First come, first served among those who
//! may. Where no bytes come, those who sit leave at their deadlines, which are earlier than those
//! of who waits, and who finds its own past leaves at once. Whoever sits behind a read that was
//! served has its time anew: a read waits twice its time at most, and that while its registry
//! answers.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::open::OpenBlob;
use crate::config::{DEMAND_SLOTS, SEATS_PER_HOST, SEATS_PER_ROUTE, WAITING_READS_MAX};
use crate::registry::route::Route;

/// A read of a blob, with what its door needs to answer it.
pub struct Read<J> {
    /// The blob.
    pub blob: Arc<OpenBlob>,
    /// Which bytes of its address space.
    pub range: Range<u64>,
    /// Its time counts from here.
    pub since_ns: u64,
    /// The door's.
    pub job: J,
}

/// The seats of one door on one core, and who waits for one.
pub struct Seats<J> {
    taken: RefCell<Vec<Seat>>,
    waiting: RefCell<VecDeque<Read<J>>>,
}

/// Whose reader has it: a route and its host.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seat {
    route: u64,
    host: u64,
}

// The number stands at WAITING_READS_MAX; both doors' jobs have 32 bytes.
const _: () = assert!(size_of::<Read<[u64; 4]>>() == 64);

impl Seat {
    fn of(route: &Route) -> Seat {
        Seat { route: route.id, host: route.host }
    }
}

impl<J> Default for Seats<J> {
    fn default() -> Self {
        Seats {
            taken: RefCell::new(Vec::with_capacity(DEMAND_SLOTS)),
            waiting: RefCell::new(VecDeque::with_capacity(WAITING_READS_MAX)),
        }
    }
}

impl<J> Seats<J> {
    /// Gives the read back if it has a seat now; keeps it until it has one otherwise. One whose
    /// bytes are there already gets a seat too many, which it leaves at once, and so it is where
    /// even those who wait are too many.
    pub fn admit(&self, read: Read<J>, is_there: impl FnOnce(&Read<J>) -> bool) -> Option<Read<J>> {
        let (seat, mut taken) = (Seat::of(&read.blob.route), self.taken.borrow_mut());
        let mut waiting = self.waiting.borrow_mut();
        let is_full = waiting.len() == WAITING_READS_MAX;
        if has_room(&taken, seat) || is_full || is_there(&read) {
            taken.push(seat);
            return Some(read);
        }
        waiting.push_back(read);
        None
    }

    /// Leaves the seat of a read; gives who has it now. Behind a read that was served the next has
    /// its whole time from `now_ns` on: the registry answers, and has much to do.
    pub fn leave(&self, blob: &OpenBlob, was_served: bool, now_ns: u64) -> Option<Read<J>> {
        let (left, mut taken) = (Seat::of(&blob.route), self.taken.borrow_mut());
        let place = taken.iter().position(|&seat| seat == left).expect("left once");
        taken.swap_remove(place);
        let mut waiting = self.waiting.borrow_mut();
        // Those of one repository stand in rows: what holds for one holds for the row.
        let mut full = None;
        let place = waiting.iter().position(|read| {
            let seat = Seat::of(&read.blob.route);
            if seat.host != left.host || full == Some(seat) {
                return false;
            }
            let may_sit = has_room(&taken, seat);
            full = Some(seat).filter(|_| !may_sit);
            may_sit
        })?;
        let mut next = waiting.remove(place)?;
        taken.push(Seat::of(&next.blob.route));
        if was_served {
            next.since_ns = now_ns;
        }
        Some(next)
    }
}

fn has_room(taken: &[Seat], seat: Seat) -> bool {
    let (mut of_route, mut of_host) = (0, 0);
    for other in taken {
        of_route += usize::from(other.route == seat.route);
        of_host += usize::from(other.host == seat.host);
    }
    of_route < SEATS_PER_ROUTE && of_host < SEATS_PER_HOST
}
