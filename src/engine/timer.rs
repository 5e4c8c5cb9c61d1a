//! Deadlines: an indexed binary heap with at most one deadline per operation slot.
//!
//! The heap never allocates after construction, and a deadline that is no longer wanted is removed
//! at once: with lazy removal, 30-second deadlines on short operations would pile up by the
//! thousand.

/// No place in the heap.
const ABSENT: u32 = u32::MAX;

/// The deadlines of a core's slots.
#[derive(Debug)]
pub struct Timers {
    /// (deadline in ns, slot index), a binary min-heap.
    heap: Vec<(u64, u32)>,
    /// Where each slot's deadline stands in `heap`.
    places: Vec<u32>,
}

impl Timers {
    /// Room for one deadline per slot.
    pub fn new(slot_count: usize) -> Self {
        Timers { heap: Vec::with_capacity(slot_count), places: vec![ABSENT; slot_count] }
    }

    /// Sets the deadline of a slot that has none.
    pub fn insert(&mut self, slot: u32, deadline_ns: u64) {
        assert_eq!(self.places[slot as usize], ABSENT, "a slot has one deadline");
        self.heap.push((deadline_ns, slot));
        self.places[slot as usize] = (self.heap.len() - 1) as u32;
        self.rise(self.heap.len() - 1);
    }

    /// Forgets the deadline of a slot, if it has one.
    pub fn remove(&mut self, slot: u32) {
        let place = self.places[slot as usize];
        if place == ABSENT {
            return;
        }
        let place = place as usize;
        let last = self.heap.len() - 1;
        self.swap(place, last);
        self.heap.pop();
        self.places[slot as usize] = ABSENT;
        if place < last {
            self.rise(place);
            self.sink(place);
        }
    }

    /// The earliest deadline.
    pub fn next(&self) -> Option<u64> {
        self.heap.first().map(|&(deadline_ns, _)| deadline_ns)
    }

    /// Takes out a slot whose deadline has passed.
    pub fn expire(&mut self, now_ns: u64) -> Option<u32> {
        let &(deadline_ns, slot) = self.heap.first()?;
        if deadline_ns > now_ns {
            return None;
        }
        self.remove(slot);
        Some(slot)
    }

    fn rise(&mut self, mut place: usize) {
        while place > 0 {
            let parent = (place - 1) / 2;
            if self.heap[parent].0 <= self.heap[place].0 {
                return;
            }
            self.swap(parent, place);
            place = parent;
        }
    }

    fn sink(&mut self, mut place: usize) {
        loop {
            let mut least = place;
            for child in [2 * place + 1, 2 * place + 2] {
                if child < self.heap.len() && self.heap[child].0 < self.heap[least].0 {
                    least = child;
                }
            }
            if least == place {
                return;
            }
            self.swap(least, place);
            place = least;
        }
    }

    fn swap(&mut self, a: usize, b: usize) {
        self.heap.swap(a, b);
        self.places[self.heap[a].1 as usize] = a as u32;
        self.places[self.heap[b].1 as usize] = b as u32;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn expires_in_order_and_never_what_was_removed(
            deadlines in proptest::collection::vec(0u64..100, 1..64),
            removed in proptest::collection::vec(any::<bool>(), 64),
        ) {
            let mut timers = Timers::new(64);
            for (slot, &deadline_ns) in deadlines.iter().enumerate() {
                timers.insert(slot as u32, deadline_ns);
            }
            let mut expected = Vec::new();
            for (slot, &deadline_ns) in deadlines.iter().enumerate() {
                if removed[slot] {
                    timers.remove(slot as u32);
                    timers.remove(slot as u32);
                } else {
                    expected.push(deadline_ns);
                }
            }
            expected.sort_unstable();
            prop_assert_eq!(timers.next(), expected.first().copied());
            let mut got = Vec::new();
            while let Some(slot) = timers.expire(50) {
                got.push(deadlines[slot as usize]);
            }
            prop_assert_eq!(&got, &expected[..got.len()]);
            prop_assert!(expected[got.len()..].iter().all(|&deadline_ns| deadline_ns > 50));
        }
    }
}
