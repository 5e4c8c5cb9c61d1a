//! How far a conversion has come, counted where the work is done and read by whoever shows it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters that only grow. The order between them does not matter.
#[derive(Debug, Default)]
pub struct Tally {
    /// Layers to be read, of all images.
    pub layers: Count,
    /// Layers read to their end.
    pub layers_done: Count,
    /// Bytes of them.
    pub source_bytes: Count,
    /// Bytes of them read.
    pub source_bytes_done: Count,
    /// Bytes handed to the destination.
    pub stored_bytes: Count,
    /// Bytes that are there.
    pub stored_bytes_done: Count,
    /// Blobs that were sent or written, and their bytes.
    pub blobs_sent: Count,
    /// See `blobs_sent`.
    pub bytes_sent: Count,
    /// Blobs that were there before, and their bytes.
    pub blobs_existing: Count,
    /// See `blobs_existing`.
    pub bytes_existing: Count,
    /// Blobs the registry had elsewhere, and their bytes.
    pub blobs_mounted: Count,
    /// See `blobs_mounted`.
    pub bytes_mounted: Count,
}

/// One counter.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// So many more.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// As of now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
