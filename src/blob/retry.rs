//! How often bytes that did not come are asked for again, and after which pauses.
//!
//! Where a reader waits: for as long as it may, so that a registry which restarts costs it time and
//! no error. That is for images in use: where no byte has ever come from, something may be set up
//! wrong, and who starts a container (`plug/probe.rs`) wants to know soon. What is fetched ahead is
//! given up soon: nobody waits for it, and a reader who comes for it after all asks for itself.
//! Wrong bytes and answers are given up soon as well, because time does not mend them. Nothing
//! waits here once the daemon stops; once nobody has the blob open any more, a pause at most.

use std::sync::atomic::Ordering;

use super::crew::Crew;
use super::flight::FlightId;
use super::journal::Level;
use super::latency::Cause;
use super::open::OpenBlob;
use super::statistics::Counter;
use crate::config::{BODY_RETRY_PAUSE_NS_MAX, BODY_RETRY_PAUSES_NS};
use crate::error::Error;

/// Bytes of a blob that somebody wants, and what was tried in vain.
pub(super) struct Tries<'a> {
    blob: &'a OpenBlob,
    cause: Cause,
    deadline_ns: u64,
    /// Whose fetcher is free for others while it pauses.
    flight: Option<FlightId>,
    /// Failures since something came.
    failures: usize,
}

impl<'a> Tries<'a> {
    pub(super) fn new(blob: &'a OpenBlob, cause: Cause, deadline_ns: u64) -> Self {
        Tries { blob, cause, deadline_ns, flight: None, failures: 0 }
    }

    pub(super) fn of_flight(self, flight: FlightId) -> Self {
        Tries { flight: Some(flight), ..self }
    }

    /// Something came: what failed before says nothing about the next try.
    pub(super) fn progressed(&mut self) {
        self.failures = 0;
    }

    /// Whether time may mend it, and somebody waits who has the time.
    fn is_patient(&self, error: &Error) -> bool {
        let is_outage = matches!(error, Error::Unavailable { .. } | Error::Deadline(_));
        let was_well = self.blob.route.is_proven() || self.blob.image.touches.is_resumed();
        self.cause == Cause::Demand && is_outage && was_well
    }
}

/// The pause behind so many failures before it; nothing when it is time to give up.
fn pause_ns(failures: usize, is_patient: bool, random: u64) -> Option<u64> {
    let [.., last_ns] = BODY_RETRY_PAUSES_NS;
    let whole_ns = match (BODY_RETRY_PAUSES_NS.get(failures), is_patient) {
        (Some(&pause_ns), _) => pause_ns,
        (None, true) => {
            let doublings = failures - BODY_RETRY_PAUSES_NS.len() + 1;
            (last_ns << doublings.min(16)).min(BODY_RETRY_PAUSE_NS_MAX)
        }
        (None, false) => return None,
    };
    Some(whole_ns + random % (whole_ns / 2))
}

impl Crew {
    /// After a failure: waits as long as is good, and says whether to try again.
    pub(super) async fn try_again(&self, tries: &mut Tries<'_>, error: &Error) -> bool {
        if !error.is_transient() || self.is_in_vain(tries) {
            return false;
        }
        let is_patient = tries.is_patient(error);
        let pause_ns = pause_ns(tries.failures, is_patient, self.core.random());
        let Some(pause_ns) = pause_ns else { return false };
        if tries.failures == BODY_RETRY_PAUSES_NS.len() {
            let name = tries.blob.name();
            let text = || format!("{name}: its readers wait until their deadline: {error}");
            self.parts.journal.write(Level::Warn, text);
        }
        tries.failures += 1;
        self.parts.counters.count(Counter::Retries);
        let wake_ns = (self.core.now() + pause_ns).min(tries.deadline_ns);
        if let Some(flight) = tries.flight {
            self.fetchers.set_paused(flight, true);
            self.demand.wake_one(&self.core);
        }
        self.stopping.wait(&self.core).by(wake_ns).await;
        if let Some(flight) = tries.flight {
            self.fetchers.set_paused(flight, false);
        }
        !self.is_in_vain(tries)
    }

    fn is_in_vain(&self, tries: &Tries<'_>) -> bool {
        self.core.now() >= tries.deadline_ns
            || self.gate.is_closed()
            || tries.blob.is_closed.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MILLISECOND_NS;

    #[test]
    fn pauses_grow_while_a_reader_waits_and_end_soon_where_nobody_does() {
        let whole_ms = |failures, is_patient| {
            let halves = [0, u64::MAX].map(|random| pause_ns(failures, is_patient, random));
            let [Some(least_ns), Some(most_ns)] = halves else { return None };
            assert!(most_ns < least_ns + least_ns / 2);
            Some(least_ns / MILLISECOND_NS)
        };
        let expected_ms = [2, 20, 40, 80, 160, 320, 640, 1000, 1000];
        for (failures, pause_ms) in expected_ms.into_iter().enumerate() {
            assert_eq!(whole_ms(failures, true), Some(pause_ms), "{failures}");
            let hasty = Some(pause_ms).filter(|_| failures < BODY_RETRY_PAUSES_NS.len());
            assert_eq!(whole_ms(failures, false), hasty, "{failures}");
        }
        assert_eq!(whole_ms(1 << 20, true), Some(1000));
    }
}
