//! Where the time of a read goes: a histogram for each step, cause and door.
//!
//! Plain memory that one core owns, like the rest of its statistics; recording is an addition. A
//! read has the steps `Intake`, `Claim`, `Answer` and `Whole`; what it has fetched, or what is
//! fetched ahead of it, has the others, once per request (`Decode`, `Verify`, `Fill`: once per
//! batch of what has arrived). So the steps of one read do not add up to its whole: it leaves as
//! soon as its own chunks are in.

use hdrhistogram::Histogram;

use super::statistics::{histogram, named};
use crate::engine::Lane;

named! {
    /// A step on the way of a read or of a fetch.
    Step {
        /// From the kernel's message to a demand slot.
        Intake = "intake",
        /// Finding out what is missing, and claiming it.
        Claim = "claim",
        /// From the claim to a fetcher.
        Queue = "queue",
        /// From the fetcher to a connection that the request can go over.
        Connect = "connect",
        /// From the request to the head of its answer.
        FirstByte = "first_byte",
        /// Waiting for the body.
        Body = "body",
        /// Decompressing.
        Decode = "decode",
        /// Digesting.
        Verify = "verify",
        /// Writing into the cache.
        Fill = "fill",
        /// Telling the kernel.
        Answer = "answer",
        /// A read from the kernel's message to our answer; otherwise from the claim to the end.
        Whole = "whole",
    }
}

named! {
    /// Why something is fetched.
    Cause {
        /// Somebody waits for it.
        Demand = "demand",
        /// Somebody reads in order and will come to it.
        ReadAhead = "read_ahead",
        /// The image is to be here as a whole.
        Prefetch = "prefetch",
    }
}

named! {
    /// By which door the read came.
    DoorKind {
        /// /dev/cachefiles.
        Cachefiles = "cachefiles",
        /// Pre-content events.
        Fanotify = "fanotify",
    }
}

impl Cause {
    /// Whose work it is.
    pub fn lane(self) -> Lane {
        match self {
            Cause::Demand => Lane::Demand,
            Cause::ReadAhead | Cause::Prefetch => Lane::Background,
        }
    }
}

/// All histograms of one core.
#[derive(Clone, Debug)]
pub struct Latencies(Vec<Histogram<u64>>);

impl Default for Latencies {
    fn default() -> Self {
        Latencies((0..DoorKind::COUNT * Cause::COUNT * Step::COUNT).map(|_| histogram()).collect())
    }
}

impl Latencies {
    /// Records a step. Longer than the histogram's end counts as its end.
    pub fn record(&mut self, door: DoorKind, cause: Cause, step: Step, elapsed_ns: u64) {
        self.0[place(door, cause, step)].saturating_record(elapsed_ns);
    }

    /// Adds what another core measured.
    pub fn merge(&mut self, other: &Latencies) {
        for (mine, theirs) in self.0.iter_mut().zip(&other.0) {
            // Most are empty, and adding looks at every count.
            if !theirs.is_empty() {
                mine.add(theirs).expect("invariant: all histograms have the same bounds");
            }
        }
    }

    /// Those that have something to show, in the order of the steps.
    pub fn all(&self) -> impl Iterator<Item = (DoorKind, Cause, Step, &Histogram<u64>)> {
        let causes =
            DoorKind::ALL.iter().flat_map(|&door| Cause::ALL.iter().map(move |&at| (door, at)));
        let steps =
            causes.flat_map(|(door, cause)| Step::ALL.iter().map(move |&step| (door, cause, step)));
        steps
            .map(|(door, cause, step)| (door, cause, step, &self.0[place(door, cause, step)]))
            .filter(|(.., histogram)| !histogram.is_empty())
    }
}

fn place(door: DoorKind, cause: Cause, step: Step) -> usize {
    (door as usize * Cause::COUNT + cause as usize) * Step::COUNT + step as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_step_cause_and_door_has_its_own_place() {
        let mut latencies = Latencies::default();
        let (mut count, mut other) = (0, Latencies::default());
        for &door in DoorKind::ALL {
            for &cause in Cause::ALL {
                for &step in Step::ALL {
                    count += 1;
                    (0..count).for_each(|_| latencies.record(door, cause, step, 1_000_000));
                }
            }
        }
        other.merge(&latencies);
        let counts: Vec<_> = other.all().map(|(.., histogram)| histogram.len()).collect();
        assert_eq!(counts, (1..=count).collect::<Vec<_>>());
        assert_eq!(Latencies::default().all().count(), 0);
    }
}
