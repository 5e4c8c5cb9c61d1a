//! Recordings of what is asked for: which bytes of which blobs, in the order of their faults.
//!
//! Costs a load when nobody records. While somebody does, the doors ask for every range, whether
//! it is there or not, and nothing is fetched ahead of its readers (`serve.rs`, `watch.rs` and the
//! sealer ask [`Recorder::is_active`]). A recording is bounded; what comes later is counted only.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::registration::Image;
use crate::config::RECORDED_FAULTS_MAX;
use crate::image::identity::BlobId;

/// Who records. Shared by `Arc` with the catalog it is part of.
#[derive(Debug, Default)]
pub struct Recorder {
    /// How many record; the list is looked at only when there are some.
    active_count: AtomicUsize,
    recordings: Mutex<Vec<Arc<Recording>>>,
}

/// What was asked of one image's blobs.
#[derive(Debug)]
pub struct Recording {
    image: Arc<Image>,
    began_ns: u64,
    faults: Mutex<Faults>,
}

/// Bytes of a blob that somebody waited for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The blob's index in the image.
    pub blob_index: u32,
    /// In the blob's address space.
    pub range: Range<u64>,
    /// Since the recording began.
    pub elapsed_ns: u64,
}

/// In the order in which they came.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// At most [`RECORDED_FAULTS_MAX`].
    pub list: Vec<Fault>,
    /// How many found no room.
    pub lost_count: u64,
}

impl Recorder {
    /// Whether anybody records anything.
    pub fn is_active(&self) -> bool {
        self.active_count.load(Ordering::Relaxed) > 0
    }

    /// Begins to record an image's blobs.
    pub fn begin(&self, image: &Arc<Image>, now_ns: u64) -> Arc<Recording> {
        let list = Vec::with_capacity(RECORDED_FAULTS_MAX);
        let faults = Mutex::new(Faults { list, lost_count: 0 });
        let recording = Arc::new(Recording { image: Arc::clone(image), began_ns: now_ns, faults });
        let mut recordings = self.recordings.lock().unwrap_or_else(PoisonError::into_inner);
        recordings.push(Arc::clone(&recording));
        self.active_count.store(recordings.len(), Ordering::Relaxed);
        recording
    }

    /// Ends a recording and gives what it has.
    pub fn end(&self, recording: &Arc<Recording>) -> Faults {
        let mut recordings = self.recordings.lock().unwrap_or_else(PoisonError::into_inner);
        recordings.retain(|other| !Arc::ptr_eq(other, recording));
        self.active_count.store(recordings.len(), Ordering::Relaxed);
        drop(recordings);
        std::mem::take(&mut *recording.faults.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Somebody asks for `range` of a blob. Says whether it is recorded. Allocates nothing; the
    /// locks are those of a measurement, held for a look-up and a push.
    pub fn note(&self, blob: &BlobId, range: &Range<u64>, now_ns: u64) -> bool {
        if !self.is_active() {
            return false;
        }
        let recordings = self.recordings.lock().unwrap_or_else(PoisonError::into_inner);
        let noted = recordings.iter().filter(|recording| recording.note(blob, range, now_ns));
        noted.count() > 0
    }
}

impl Recording {
    /// What is recorded.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    fn note(&self, blob: &BlobId, range: &Range<u64>, now_ns: u64) -> bool {
        let Some(index) = self.image.blobs.iter().position(|own| own.id == *blob) else {
            return false;
        };
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        match faults.list.len() < RECORDED_FAULTS_MAX {
            true => faults.list.push(Fault {
                blob_index: index as u32,
                range: range.clone(),
                elapsed_ns: now_ns.saturating_sub(self.began_ns),
            }),
            false => faults.lost_count += 1,
        }
        true
    }
}
