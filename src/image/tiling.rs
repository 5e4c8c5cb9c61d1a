//! How chunks nobody listed share the hole they leave in the address space.
//!
//! Chunks tile the address space in blocks of 4 KiB, and a chunk table lists only those an image
//! uses. Where `count` chunks are missing between two listed ones, their common extent is known
//! and their borders are not. They cannot be read, so any borders do, as long as everybody
//! answers with the same: here they share the hole evenly. Example: 10 blocks for 4 chunks give
//! borders 0, 2, 5, 7, 10.

use super::superblock::BLOCK_BYTES;
use crate::config::CHUNK_MAX_BYTES;
use crate::error::Result;
use std::ops::Range;

const BLOCKS_PER_CHUNK_MAX: u64 = (CHUNK_MAX_BYTES / BLOCK_BYTES) as u64;

/// A run of missing chunks and the blocks they occupy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hole {
    /// Indexes of the missing chunks.
    pub(super) chunks: Range<u32>,
    /// Blocks of the address space they share.
    pub(super) blocks: Range<u64>,
}

impl Hole {
    /// Whether so many chunks can lie in so many blocks: each in 1 block to 16 MiB; no chunk in
    /// no block.
    pub(super) fn check(&self) -> Result<()> {
        let blocks = self.blocks.end.checked_sub(self.blocks.start);
        let count = u64::from(self.chunks.end - self.chunks.start);
        match blocks {
            Some(blocks) if blocks >= count && blocks <= count * BLOCKS_PER_CHUNK_MAX => Ok(()),
            Some(blocks) => Err(malformed!(
                "{count} chunks between listed ones cannot fill {blocks} blocks (before chunk {})",
                self.chunks.end
            )),
            None => Err(malformed!("chunk {} starts before its predecessor ends", self.chunks.end)),
        }
    }

    /// The blocks of a missing chunk, never none.
    pub(super) fn blocks_of(&self, index: u32) -> Range<u64> {
        debug_assert!(self.chunks.contains(&index));
        let position = u64::from(index - self.chunks.start);
        self.border(position)..self.border(position + 1)
    }

    /// The missing chunk that has a block.
    pub(super) fn chunk_at(&self, block: u64) -> u32 {
        debug_assert!(self.blocks.contains(&block));
        let inside = block - self.blocks.start;
        // The last position whose border is not behind the block.
        let position = ((inside + 1) * self.count() - 1) / self.length();
        self.chunks.start + position as u32
    }

    fn border(&self, position: u64) -> u64 {
        // Both factors are below 2^32.
        self.blocks.start + position * self.length() / self.count()
    }

    fn count(&self) -> u64 {
        (self.chunks.end - self.chunks.start).into()
    }

    fn length(&self) -> u64 {
        self.blocks.end - self.blocks.start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_belongs_to_the_chunk_that_claims_it() {
        for count in 1..12u32 {
            for length in u64::from(count)..40 {
                let hole = Hole { chunks: 5..5 + count, blocks: 100..100 + length };
                hole.check().unwrap();
                let mut end = 100;
                for index in hole.chunks.clone() {
                    let blocks = hole.blocks_of(index);
                    assert_eq!(blocks.start, end);
                    assert!(!blocks.is_empty());
                    for block in blocks.clone() {
                        assert_eq!(hole.chunk_at(block), index);
                    }
                    end = blocks.end;
                }
                assert_eq!(end, hole.blocks.end);
            }
        }
    }

    #[test]
    fn impossible_holes_are_refused() {
        for (chunks, blocks) in [(0..2, 0..1), (0..0, 0..1), (0..1, 0..4097)] {
            assert!(Hole { chunks, blocks }.check().is_err());
        }
        let backwards = Range { start: 5, end: 3 };
        assert!(Hole { chunks: 0..0, blocks: backwards }.check().is_err());
    }
}
