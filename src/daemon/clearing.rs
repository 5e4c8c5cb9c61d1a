//! Room on the disk: blobs that nobody uses go, whole, the longest unused one first.
//!
//! Whoever has no room for verified bytes asks for some and tries once more. Does not wait while
//! segments of mounted images are emptied, which takes seconds: there are few helper threads.

use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use crate::blob::journal::{Journal, Level};
use crate::error::Error;
use crate::store::segments::SegmentStore;
use crate::store::space::choose;

/// Removes blobs of a store.
pub struct Clearing {
    store: Arc<SegmentStore>,
    journal: Arc<Journal>,
    /// One at a time: two would choose the same.
    turn: Mutex<()>,
}

impl Clearing {
    /// Of a door's cache.
    pub fn new(store: &Arc<SegmentStore>, journal: &Arc<Journal>) -> Clearing {
        let (store, journal) = (Arc::clone(store), Arc::clone(journal));
        Clearing { store, journal, turn: Mutex::default() }
    }

    /// Frees at least `wanted` bytes, if there are so many that nobody uses. Gives how many it was,
    /// or `wanted` if somebody else has made or is making room: it is worth another try.
    pub fn make_room(&self, wanted: u64) -> u64 {
        let turn = match self.turn.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                // Blobs go, which takes no longer than to remove others; what went may be enough.
                drop(self.turn.lock());
                return wanted;
            }
        };
        let freed = self.remove(wanted);
        drop(turn);
        if self.store.space().is_evicting() { freed.max(wanted) } else { freed }
    }

    /// The same; gives how many bytes went.
    pub fn remove_unused(&self, wanted: u64) -> u64 {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        self.remove(wanted)
    }

    fn remove(&self, wanted: u64) -> u64 {
        let chosen = match self.store.usage().map(|usage| choose(usage, wanted)) {
            Ok(chosen) => chosen,
            Err(error) => {
                self.journal.error(format!("cannot look for unused blobs: {error}"));
                return 0;
            }
        };
        let mut freed = 0;
        for blob in chosen {
            match self.store.remove(&blob.blob_id) {
                Ok(bytes) => {
                    freed += bytes;
                    let text = || format!("blob {} evicted: {bytes} bytes", blob.blob_id);
                    self.journal.write(Level::Info, text);
                }
                // Somebody has mounted it meanwhile.
                Err(Error::Busy(_)) => {}
                Err(error) => self.journal.error(format!("blob {}: {error}", blob.blob_id)),
            }
        }
        freed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_worth_a_try_while_mounted_images_are_emptied_and_nobody_waits_for_that() {
        let folder = tempfile::tempdir().unwrap();
        let (completed, _) = crossbeam_channel::bounded(8);
        let store = SegmentStore::open(folder.path(), completed).unwrap();
        let clearing = Clearing::new(&store, &Journal::new(Level::Info).0);
        assert_eq!(clearing.make_room(10), 0, "nothing is there");
        store.space().set_evicting(true);
        assert_eq!(clearing.make_room(10), 10);
        store.space().set_evicting(false);
        let unused = store.root().join("blob");
        std::fs::create_dir(&unused).unwrap();
        std::fs::write(unused.join("1-a"), [0; 20]).unwrap();
        assert_eq!(clearing.make_room(10), 20);
        assert!(!unused.exists());
    }
}
