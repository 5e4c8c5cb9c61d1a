//! Keeps the cache behind the fanotify door within its quota, and finds room when the disk is full.
//!
//! Blobs that no bound image has go first, whole. If that is not enough, segments of bound images
//! go that nobody reads: each is heard of again for a while (it was ignored when it became
//! complete); who is read then stays. The others are claimed, which makes new readers wait, and
//! given time in which readers that were let in before are done; only then they are emptied. So
//! nobody gets an error for it, and nobody a wrong byte whatever happens: a file that is too short
//! cannot be read.
//!
//! Blocks on the disk and sleeps: called on the housekeeping thread. Only room is also asked for on
//! helper threads, and that does not wait for the rest ([`Clearing`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::clearing::Clearing;
use super::durability;
use crate::blob::journal::{Journal, Level};
use crate::config::{EVICTION_BATCH, EVICTION_GRACE_MS, EVICTION_LISTEN_MS};
use crate::error::Result;
use crate::store::segment::Segment;
use crate::store::segments::SegmentStore;
use crate::upcall::binder::Binder;

/// Takes bytes away, on one thread. Shared by `Arc`.
pub struct Evictor {
    binder: Arc<Binder>,
    journal: Arc<Journal>,
    clearing: Clearing,
    /// A file that was to be emptied is as long as it was: no file's size alone is an answer until
    /// this process ends.
    is_torn: AtomicBool,
}

impl Evictor {
    /// An evictor of the door's cache.
    pub fn new(binder: &Arc<Binder>, journal: &Arc<Journal>) -> Arc<Evictor> {
        let (binder, journal) = (Arc::clone(binder), Arc::clone(journal));
        let clearing = Clearing::new(binder.bindings().store(), &journal);
        Arc::new(Evictor { binder, journal, clearing, is_torn: AtomicBool::new(false) })
    }

    /// Counts the bytes on the disk anew.
    ///
    /// # Errors
    /// What the disk says.
    pub fn count(&self) -> Result<()> {
        let usage = self.store().usage()?;
        self.store().space().set_used(usage.iter().map(|blob| blob.bytes).sum());
        Ok(())
    }

    /// Frees at least `wanted` bytes of blobs that nobody uses, if there are so many. Gives how
    /// many it was, or `wanted` while others make room.
    pub fn make_room(&self, wanted: u64) -> u64 {
        self.clearing.make_room(wanted)
    }

    /// The same; gives how many bytes went.
    pub fn remove_unused(&self, wanted: u64) -> u64 {
        self.clearing.remove_unused(wanted)
    }

    /// Frees what the quota demands: unused blobs, then what nobody reads of the others.
    pub fn keep_quota(&self) {
        let excess = self.store().space().excess();
        if excess == 0 {
            return;
        }
        let freed = self.remove_unused(excess);
        if freed < excess {
            self.empty_unread(excess - freed);
        }
    }

    /// Empties segments that the disk did not take. Gives those that somebody fills just now.
    pub fn empty_distrusted(&self, segments: Vec<Arc<Segment>>) -> Vec<Arc<Segment>> {
        self.store().space().set_evicting(true);
        let emptied = durability::empty(segments, |segment| self.heed(segment), &self.journal);
        self.is_torn.fetch_or(emptied.is_torn, Ordering::Relaxed);
        self.end_evicting();
        emptied.busy
    }

    fn end_evicting(&self) {
        self.store().space().set_evicting(self.is_torn.load(Ordering::Relaxed));
    }

    fn store(&self) -> &Arc<SegmentStore> {
        self.binder.bindings().store()
    }

    /// The second half: complete segments of bound images, some at a time.
    fn empty_unread(&self, wanted: u64) {
        let mut freed = 0;
        let candidates = self.binder.bindings().complete_segments();
        self.store().space().set_evicting(true);
        for batch in candidates.chunks(EVICTION_BATCH) {
            if freed >= wanted {
                break;
            }
            freed += self.empty_batch(batch, wanted - freed);
        }
        self.end_evicting();
        self.journal.write(Level::Info, || {
            format!("{freed} bytes of mounted images evicted, {wanted} were to go")
        });
    }

    fn empty_batch(&self, batch: &[Arc<Segment>], wanted: u64) -> u64 {
        for segment in batch {
            segment.take_read();
            self.heed(segment);
        }
        std::thread::sleep(Duration::from_millis(EVICTION_LISTEN_MS));
        let (read, unread): (Vec<_>, Vec<_>) =
            batch.iter().partition(|segment| segment.take_read());
        read.into_iter().for_each(|segment| self.ignore(segment));
        let mut bytes = 0;
        let mut claimed = Vec::new();
        for segment in unread {
            let is_wanted = bytes < wanted && segment.claim_for_eviction();
            if is_wanted {
                // Somebody may have let it pass between the first time and the claim.
                self.heed(segment);
                bytes += segment.size();
                claimed.push(segment);
            } else {
                self.ignore(segment);
            }
        }
        // Whoever was let in before the claim is done after this.
        std::thread::sleep(Duration::from_millis(EVICTION_GRACE_MS));
        claimed.into_iter().map(|segment| self.empty(segment)).sum()
    }

    /// Empties a claimed segment, unless somebody has read it after all. Gives its bytes.
    fn empty(&self, segment: &Arc<Segment>) -> u64 {
        let bytes = segment.size();
        let unrecorded = match segment.take_read() {
            true => Ok(false),
            false => segment.directory.unrecord(std::iter::once(segment.name())).map(|()| true),
        };
        match unrecorded {
            Ok(true) => match segment.empty() {
                Ok(()) => return bytes,
                Err(error) => self.journal.error(error.to_string()),
            },
            Ok(false) => {
                segment.spare();
                self.ignore(segment);
            }
            Err(error) => {
                segment.spare();
                self.ignore(segment);
                self.journal.error(error.to_string());
            }
        }
        0
    }

    fn heed(&self, segment: &Segment) {
        let group = self.binder.group();
        if let Err(error) = group.unignore(segment.directory.fd(), segment.name()) {
            self.journal.error(error.to_string());
        }
    }

    fn ignore(&self, segment: &Segment) {
        if let Err(error) = self.binder.let_pass(segment) {
            self.journal.error(error.to_string());
        }
    }
}
