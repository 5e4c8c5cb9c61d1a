//! Presence and claims: what is in the cache, and who fetches what is not.
//!
//! One atomic byte per chunk: 0 absent, 1..=254 claimed by core n-1, 255 present. This is the only
//! memory of the fault path that more than one core writes. Whoever turns 0 into its own number
//! owns the chunk until it publishes or releases it; nobody else changes a claimed byte. So there
//! is one fetch per chunk, however many readers and cores want it.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::engine::CoreId;
use crate::image::identity::ChunkIndex;

const ABSENT: u8 = 0;
const PRESENT: u8 = u8::MAX;

/// Where a chunk stands.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ChunkState {
    /// Not in the cache, and nobody fetches it.
    Absent,
    /// This core fetches it.
    Claimed(CoreId),
    /// Verified and in the cache.
    Present,
    /// Its bytes are being taken away; in a moment it is absent or present.
    Leaving,
}

/// The chunks of one open blob.
#[derive(Debug)]
pub struct Map {
    cells: Box<[AtomicU8]>,
    present_count: AtomicU32,
}

impl Map {
    /// All absent.
    pub fn new(chunk_count: u32) -> Self {
        let cells = (0..chunk_count).map(|_| AtomicU8::new(ABSENT)).collect();
        Map { cells, present_count: AtomicU32::new(0) }
    }

    /// Where a chunk stands now. A present chunk stays so until the kernel says otherwise.
    pub fn state(&self, chunk: ChunkIndex) -> ChunkState {
        // Acquire pairs with the Release in publish(): who sees the chunk sees its fill as done.
        state_of(self.cell(chunk).load(Ordering::Acquire))
    }

    /// Takes an absent chunk for this core; otherwise says where it stands.
    pub fn claim(&self, chunk: ChunkIndex, core: CoreId) -> Result<(), ChunkState> {
        self.cell(chunk)
            .compare_exchange(ABSENT, core.0 + 1, Ordering::Acquire, Ordering::Acquire)
            .map(drop)
            .map_err(state_of)
    }

    /// Its bytes are verified and in the cache. False when this core no longer holds the claim,
    /// because another of its flights for the same unit has settled the chunk.
    pub fn publish(&self, chunk: ChunkIndex, core: CoreId) -> bool {
        let published = self.settle(chunk, core, PRESENT);
        if published {
            self.present_count.fetch_add(1, Ordering::Relaxed);
        }
        published
    }

    /// The fetch failed; somebody else may try. Leaves alone what this core does not claim.
    pub fn release(&self, chunk: ChunkIndex, core: CoreId) {
        self.settle(chunk, core, ABSENT);
    }

    fn settle(&self, chunk: ChunkIndex, core: CoreId, to: u8) -> bool {
        let cell = self.cell(chunk);
        cell.compare_exchange(core.0 + 1, to, Ordering::Release, Ordering::Relaxed).is_ok()
    }

    /// Marks a chunk that the cache holds already, at the time the blob is opened.
    pub fn found(&self, chunk: ChunkIndex) {
        let cell = self.cell(chunk);
        if cell.compare_exchange(ABSENT, PRESENT, Ordering::Release, Ordering::Relaxed).is_ok() {
            self.present_count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The cache lost a chunk (culled, or it never reached the disk).
    pub fn forget(&self, chunk: ChunkIndex) {
        let cell = self.cell(chunk);
        if cell.compare_exchange(PRESENT, ABSENT, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            self.present_count.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Chunks in the cache.
    pub fn present_count(&self) -> u32 {
        self.present_count.load(Ordering::Relaxed)
    }

    /// Chunks of the blob.
    pub fn chunk_count(&self) -> u32 {
        self.cells.len() as u32
    }

    fn cell(&self, chunk: ChunkIndex) -> &AtomicU8 {
        &self.cells[chunk.0 as usize]
    }
}

fn state_of(byte: u8) -> ChunkState {
    match byte {
        ABSENT => ChunkState::Absent,
        PRESENT => ChunkState::Present,
        claimed => ChunkState::Claimed(CoreId(claimed - 1)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: ChunkIndex = ChunkIndex(3);

    #[test]
    fn one_of_many_threads_gets_the_claim() {
        let map = Map::new(1000);
        let wins: u32 = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4u8)
                .map(|core| {
                    let map = &map;
                    let won = move || {
                        (0..1000)
                            .filter(|&chunk| map.claim(ChunkIndex(chunk), CoreId(core)).is_ok())
                            .count() as u32
                    };
                    scope.spawn(won)
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(wins, 1000);
    }

    #[test]
    fn claimed_chunk_names_its_core_and_released_chunk_is_free_again() {
        let map = Map::new(8);
        map.claim(CHUNK, CoreId(5)).unwrap();
        assert_eq!(map.claim(CHUNK, CoreId(6)), Err(ChunkState::Claimed(CoreId(5))));
        map.release(CHUNK, CoreId(5));
        map.claim(CHUNK, CoreId(6)).unwrap();
        map.publish(CHUNK, CoreId(6));
        assert_eq!(map.claim(CHUNK, CoreId(5)), Err(ChunkState::Present));
        assert_eq!(map.present_count(), 1);
        map.forget(CHUNK);
        assert_eq!((map.state(CHUNK), map.present_count()), (ChunkState::Absent, 0));
    }

    #[test]
    fn nobody_settles_what_another_core_claims() {
        let map = Map::new(8);
        map.claim(CHUNK, CoreId(1)).unwrap();
        assert!(!map.publish(CHUNK, CoreId(0)));
        map.release(CHUNK, CoreId(0));
        assert_eq!(map.state(CHUNK), ChunkState::Claimed(CoreId(1)));
    }
}
