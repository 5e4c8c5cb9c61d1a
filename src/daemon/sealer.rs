//! Housekeeping of the fanotify door, on a thread of its own: what becomes of complete segments.
//!
//! A segment that has become complete raises no events from then on: its inode is ignored at once.
//! Its completion is written down once its bytes are on the disk, for many segments at a time; one
//! that the machine's end catches before that is fetched again, and so is one that the disk did not
//! take ([`super::durability`]). Images that nobody has read from
//! for a while give back the memory of what they know about their blobs.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use super::doors::FanotifyDoor;
use super::durability::{Unsealed, sync};
use super::evictor::Evictor;
use crate::blob::catalog::Catalog;
use crate::blob::journal::{Journal, Level};
use crate::config::{
    AWAKE_IDLE_NS, DOZE_INTERVAL_MS, EVICTION_PAUSE_MS, EVICTION_SEARCH_MS, SEAL_DELAY_MS,
    SPACE_COUNT_INTERVAL_MS,
};
use crate::error::{Error, Result};
use crate::store::segment::Segment;
use crate::upcall::binder::Binder;

/// The running thread.
pub struct Sealer {
    stop: Sender<()>,
    thread: JoinHandle<()>,
}

struct Sealing {
    binder: Arc<Binder>,
    evictor: Arc<Evictor>,
    catalog: Arc<Catalog>,
    journal: Arc<Journal>,
    /// When the bytes were counted.
    counted: Option<Instant>,
    /// When was last looked for blobs nobody uses: that reads a folder for each.
    searched: Option<Instant>,
    /// When bytes of mounted images last went: those that everybody reads are not fought for.
    evicted: Option<Instant>,
    /// Complete and ignored, not yet on record.
    unsealed: Unsealed,
}

impl Sealer {
    /// Starts the thread; `tick` is called from time to time.
    ///
    /// # Errors
    /// What the system says.
    pub fn start(
        door: FanotifyDoor,
        catalog: &Arc<Catalog>,
        journal: &Arc<Journal>,
        tick: Box<dyn Fn() + Send>,
    ) -> Result<Sealer> {
        let (stop, stopped) = crossbeam_channel::bounded(1);
        let completed = door.completed;
        let mut sealing = Sealing {
            binder: door.binder,
            evictor: door.evictor,
            catalog: Arc::clone(catalog),
            journal: Arc::clone(journal),
            counted: None,
            searched: None,
            evicted: None,
            unsealed: Unsealed::new(),
        };
        let thread = std::thread::Builder::new().name("sealer".into());
        let thread = thread
            .spawn(move || sealing.run(&completed, &stopped, &tick))
            .map_err(|error| Error::io(&error, "cannot start a thread for complete segments"))?;
        Ok(Sealer { stop, thread })
    }

    /// Seals what is complete and ends.
    pub fn stop(self) {
        let _ = self.stop.send(());
        let _ = self.thread.join();
    }
}

impl Sealing {
    fn run(&mut self, completed: &Receiver<Arc<Segment>>, stopped: &Receiver<()>, tick: &dyn Fn()) {
        let pause = Duration::from_millis(SEAL_DELAY_MS);
        let mut looked = Instant::now();
        loop {
            match completed.recv_timeout(pause) {
                Ok(segment) => self.take(segment),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.unsealed.is_due() {
                self.seal();
            }
            self.keep_quota();
            if looked.elapsed() >= Duration::from_millis(DOZE_INTERVAL_MS) {
                looked = Instant::now();
                self.doze();
                tick();
            }
            if stopped.try_recv().is_ok() {
                break;
            }
        }
        completed.try_iter().for_each(|segment| self.take(segment));
        self.seal();
    }

    fn take(&mut self, segment: Arc<Segment>) {
        // Whoever records wants to hear of its readers; after that it is let pass.
        let is_heeded = self.catalog.recorder.is_active();
        if !is_heeded && let Err(error) = self.binder.let_pass(&segment) {
            self.journal.error(format!("{}: {error}", segment.path().display()));
        }
        self.unsealed.push(segment);
    }

    fn seal(&mut self) {
        let take_away = |segments| self.evictor.empty_distrusted(segments);
        self.unsealed.seal(sync, take_away, &self.journal);
    }

    fn keep_quota(&mut self) {
        if is_due(self.counted, SPACE_COUNT_INTERVAL_MS) {
            self.counted = Some(Instant::now());
            if let Err(error) = self.evictor.count() {
                self.journal.error(format!("cannot count the cache's bytes: {error}"));
            }
            self.binder.bindings().store().space().report_shortage();
        }
        let space = Arc::clone(self.binder.bindings().store().space());
        if !is_due(self.searched, EVICTION_SEARCH_MS) || !space.take_shortage() {
            return;
        }
        self.searched = Some(Instant::now());
        if space.excess() == 0 {
            return;
        }
        // What waits to be sealed counts as in use.
        self.seal();
        self.evictor.remove_unused(space.excess());
        if space.excess() > 0 && is_due(self.evicted, EVICTION_PAUSE_MS) {
            self.evictor.keep_quota();
            self.evicted = Some(Instant::now());
        }
        if space.excess() > 0 {
            // What is in use now may not be later.
            space.report_shortage();
        }
    }

    fn doze(&self) {
        let now_ns = monotonic_ns();
        let dozing = self.binder.bindings().doze(now_ns.saturating_sub(AWAKE_IDLE_NS));
        if dozing > 0 {
            self.journal.write(Level::Debug, || format!("{dozing} blobs put to sleep"));
        }
    }
}

/// Whether something was never done, or so long ago.
fn is_due(done: Option<Instant>, interval_ms: u64) -> bool {
    done.is_none_or(|done| done.elapsed() >= Duration::from_millis(interval_ms))
}

/// The cores' clock.
pub fn monotonic_ns() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("the monotonic clock is always there");
    time.tv_sec() as u64 * crate::config::SECOND_NS + time.tv_nsec() as u64
}
