//! From complete to durable: segments are brought to the disk, then written down, many at a time.
//!
//! What cannot be brought to the disk is taken away. After a write-back that failed the kernel
//! calls the pages clean; once it has dropped them, reads inside the file's size find zeros. It
//! says so once, to the sync that comes next: nobody may trust these files from then on.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::blob::journal::Journal;
use crate::config::{
    SEAL_BATCH, SEAL_DELAY_MS, SEAL_FILES_SYNCED_ONE_BY_ONE, SEAL_RECORD_RETRY_MS,
};
use crate::error::{Error, Result};
use crate::store::segment::Segment;

/// Complete segments that are not on record.
pub struct Unsealed {
    segments: Vec<Arc<Segment>>,
    /// When the first of them came, or could not be written down.
    since: Instant,
    /// How long they wait for others.
    pause_ms: u64,
    /// Not brought to the disk, and not emptied yet: somebody is filling them again.
    distrusted: Vec<Arc<Segment>>,
}

/// What became of segments that were to be emptied.
pub struct Emptied {
    /// Those that somebody fills: to be tried again.
    pub busy: Vec<Arc<Segment>>,
    /// Whether a file is still as long as it was: its size is no answer any more.
    pub is_torn: bool,
}

impl Unsealed {
    /// None yet.
    pub fn new() -> Unsealed {
        Unsealed {
            segments: Vec::with_capacity(SEAL_BATCH),
            since: Instant::now(),
            pause_ms: SEAL_DELAY_MS,
            distrusted: Vec::new(),
        }
    }

    /// One more.
    pub fn push(&mut self, segment: Arc<Segment>) {
        if self.segments.is_empty() {
            self.since = Instant::now();
        }
        self.segments.push(segment);
    }

    /// Whether it is time to seal.
    pub fn is_due(&self) -> bool {
        let has_waited = self.since.elapsed() >= Duration::from_millis(self.pause_ms);
        !self.distrusted.is_empty()
            || self.segments.len() >= SEAL_BATCH
            || (has_waited && !self.segments.is_empty())
    }

    /// Syncs and writes down; `take_away` empties what cannot be synced and gives what it could not
    /// empty yet.
    pub fn seal(
        &mut self,
        sync: impl Fn(&[Arc<Segment>]) -> Result<()>,
        take_away: impl Fn(Vec<Arc<Segment>>) -> Vec<Arc<Segment>>,
        journal: &Journal,
    ) {
        if !self.distrusted.is_empty() {
            self.distrusted = take_away(std::mem::take(&mut self.distrusted));
        }
        let mut batch = std::mem::take(&mut self.segments);
        self.pause_ms = SEAL_DELAY_MS;
        // What was evicted meanwhile is not complete any more.
        batch.retain(|segment| segment.is_complete());
        if batch.is_empty() {
            return;
        }
        batch.sort_unstable_by_key(|segment| Arc::as_ptr(&segment.directory));
        if let Err(error) = sync(&batch) {
            let count = batch.len();
            journal.error(format!(
                "the disk did not take {count} complete segments, which are fetched again: \
                 {error}; look at the disk"
            ));
            self.distrusted.extend(take_away(batch));
            return;
        }
        for segments in batch.chunk_by(|one, two| Arc::ptr_eq(&one.directory, &two.directory)) {
            let names = segments.iter().map(|segment| (segment.name(), segment.full_size));
            if let Err(error) = segments[0].directory.record(names) {
                let count = segments.len();
                journal.error(format!(
                    "{count} complete segments are not on record and would be fetched again after \
                     a power cut: {error}"
                ));
                // Not only their record: what is evicted and filled anew until then is not synced.
                self.segments.extend_from_slice(segments);
            }
        }
        if !self.segments.is_empty() {
            (self.since, self.pause_ms) = (Instant::now(), SEAL_RECORD_RETRY_MS);
            // Bounded, with room for others before the next try is due. The bytes of those that go
            // are on the disk; only their record is missing, and the next bind finds that out.
            self.segments.truncate(SEAL_BATCH / 2);
        }
    }
}

/// Empties segments whose bytes are not to be trusted, at once: a reader that was let in before
/// finds the file too short and gets an error, which is better than a wrong byte. `heed` has the
/// kernel ask for a segment again.
pub fn empty(segments: Vec<Arc<Segment>>, heed: impl Fn(&Segment), journal: &Journal) -> Emptied {
    let mut emptied = Emptied { busy: Vec::new(), is_torn: false };
    for segment in segments {
        if !segment.claim_for_eviction() {
            emptied.busy.push(segment);
            continue;
        }
        // Whoever lets it pass from now on sees the claim.
        heed(&segment);
        // It has a record only if it was there once before. That would be believed after a power
        // cut; the bytes that are in the file would be read now.
        if let Err(error) = segment.directory.unrecord(std::iter::once(segment.name())) {
            journal.error(error.to_string());
        }
        if let Err(error) = segment.empty() {
            emptied.is_torn = true;
            journal.error(format!("{error}; it is fetched again, and asked for at each read"));
        }
    }
    emptied
}

/// Brings the segments' bytes to the disk: few of them one by one, many with the whole file system,
/// which is one flush of the disk instead of one for each.
pub fn sync(batch: &[Arc<Segment>]) -> Result<()> {
    if batch.len() <= SEAL_FILES_SYNCED_ONE_BY_ONE {
        return batch.iter().try_for_each(|segment| segment.sync());
    }
    let directory = batch[0].directory.fd();
    nix::unistd::syncfs(directory)
        .map_err(|errno| Error::system(errno as i32, "cannot sync the cache's file system"))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::blob::journal::Level;
    use crate::engine::CoreId;
    use crate::store::segments::{BlobDirectory, SegmentStore};

    const CORE: CoreId = CoreId(0);

    fn complete(directory: &Arc<BlobDirectory>, name: &str) -> Arc<Segment> {
        let segment = directory.segment(name, 5).unwrap();
        assert!(segment.claim(CORE));
        std::fs::write(segment.path(), "bytes").unwrap();
        segment.publish(CORE, 5);
        segment.release(CORE);
        segment
    }

    fn folder() -> (tempfile::TempDir, Arc<BlobDirectory>) {
        let folder = tempfile::tempdir().unwrap();
        let (completed, _) = crossbeam_channel::bounded(8);
        let store = SegmentStore::open(folder.path(), completed).unwrap();
        let directory = store.directory("blob").unwrap();
        (folder, directory)
    }

    fn nothing_is_taken(segments: Vec<Arc<Segment>>) -> Vec<Arc<Segment>> {
        panic!("{} segments taken away", segments.len())
    }

    #[test]
    fn what_the_disk_did_not_take_is_emptied_and_heard_of_again() {
        let (_folder, directory) = folder();
        let journal = Journal::new(Level::Info).0;
        let segments = ["1-a", "2-b"].map(|name| complete(&directory, name));
        let mut unsealed = Unsealed::new();
        segments.iter().for_each(|segment| unsealed.push(Arc::clone(segment)));
        let heeded = RefCell::new(Vec::new());
        let take_away = |segments| {
            let heed = |segment: &Segment| heeded.borrow_mut().push(segment.name().to_owned());
            empty(segments, heed, &journal).busy
        };
        unsealed.seal(|_| Err(Error::system(libc::EIO, "sync")), take_away, &journal);
        for segment in &segments {
            assert_eq!(segment.size(), 0, "its bytes are fetched again");
            assert_eq!(std::fs::metadata(segment.path()).unwrap().len(), 0);
            assert!(!directory.is_recorded(segment.name(), 5));
            assert!(segment.claim(CORE), "somebody may fill it");
        }
        heeded.borrow_mut().sort();
        assert_eq!(*heeded.borrow(), ["1-a", "2-b"]);
        assert_eq!(journal.errors().texts.len(), 1);
        assert!(!unsealed.is_due());
    }

    #[test]
    fn what_is_being_filled_is_emptied_later() {
        let (_folder, directory) = folder();
        let journal = Journal::new(Level::Info).0;
        let segment = complete(&directory, "1-a");
        let mut unsealed = Unsealed::new();
        unsealed.push(Arc::clone(&segment));
        let take_away = |segments| empty(segments, |_| {}, &journal).busy;
        assert!(segment.claim(CORE));
        unsealed.seal(|_| Err(Error::system(libc::ENOSPC, "sync")), take_away, &journal);
        assert!(segment.is_complete() && unsealed.is_due());
        segment.release(CORE);
        unsealed.seal(|_| Ok(()), take_away, &journal);
        assert_eq!(segment.size(), 0);
        assert!(!unsealed.is_due());
    }

    #[test]
    fn what_cannot_be_written_down_is_synced_and_written_down_later() {
        let (_folder, directory) = folder();
        let journal = Journal::new(Level::Info).0;
        let segment = complete(&directory, "1-a");
        let mut unsealed = Unsealed::new();
        unsealed.push(Arc::clone(&segment));
        let record = directory.path().join("complete");
        std::fs::create_dir(&record).unwrap();
        unsealed.seal(|_| Ok(()), nothing_is_taken, &journal);
        assert!(segment.is_complete(), "its bytes are on the disk");
        assert_eq!(unsealed.segments.len(), 1);
        assert!(!unsealed.is_due(), "not at once");
        std::fs::remove_dir(&record).unwrap();
        let synced = RefCell::new(0);
        let sync = |batch: &[Arc<Segment>]| {
            *synced.borrow_mut() += batch.len();
            Ok(())
        };
        unsealed.seal(sync, nothing_is_taken, &journal);
        assert_eq!(*synced.borrow(), 1);
        assert!(directory.is_recorded("1-a", 5) && unsealed.segments.is_empty());
    }

    #[test]
    fn a_file_that_stays_as_long_as_it_was_is_told() {
        let (_folder, directory) = folder();
        let journal = Journal::new(Level::Info).0;
        let segment = complete(&directory, "1-a");
        std::fs::remove_file(segment.path()).unwrap();
        assert!(empty(vec![segment], |_| {}, &journal).is_torn);
    }
}
