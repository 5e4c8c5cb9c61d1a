//! Every chunk an image can use, and which ones its files do use.
//!
//! Owns the chunks of all blobs (finished, in the making, and of other images offered for
//! deduplication), the index from digest to chunk, the claims of workers on chunks being
//! compressed, and the references: one per piece of file data, in the order of the files.
//!
//! Which of two equal pieces becomes the chunk is decided by their order in the image alone, so
//! that the result does not depend on threads: a worker may claim a digest before an earlier piece
//! does, but only the scribe, which sees pieces in order, makes chunks.

use crate::config::{BUILD_REFERENCES_MAX, CHUNKS_PER_BLOB_MAX};
use crate::error::Result;
use crate::image::{ChunkRecord, Digest};
use hashbrown::HashTable;
use std::collections::HashMap;

/// A chunk in a blob.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub(super) digest: Digest,
    pub(super) uncompressed_offset: u64,
    pub(super) compressed_offset: u64,
    pub(super) uncompressed_size: u32,
    pub(super) compressed_size: u32,
    /// Position in its blob.
    pub(super) index: u32,
    /// The builder's number of its blob.
    pub(super) blob: u16,
    pub(super) is_compressed: bool,
}

/// The order of a piece in its layer: number of the job << 32 | position in it.
pub(super) type PieceOrder = u64;

/// What a worker learns of a digest it computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// A chunk has it already, or an earlier piece will make one.
    Known,
    /// No earlier piece is known to have it: compress this one.
    Ours,
}

/// All chunks and references of an image.
#[derive(Debug, Default)]
pub(super) struct Chunks {
    chunks: Vec<Chunk>,
    /// Positions in `chunks`.
    by_digest: HashTable<u32>,
    /// Digests no chunk has yet, with the earliest piece that has one.
    claims: HashMap<Digest, PieceOrder>,
    /// A position in `chunks` for each piece of every file.
    references: Vec<u32>,
}

impl Chunks {
    /// Decides whether a worker compresses a piece.
    pub(super) fn claim(&mut self, digest: &Digest, order: PieceOrder) -> Claim {
        if self.find(digest).is_some() {
            return Claim::Known;
        }
        match self.claims.entry(*digest) {
            std::collections::hash_map::Entry::Occupied(mut entry) => {
                if *entry.get() < order {
                    return Claim::Known;
                }
                // The piece that claimed it first turns out to be a duplicate of this one.
                entry.insert(order);
            }
            std::collections::hash_map::Entry::Vacant(entry) => drop(entry.insert(order)),
        }
        Claim::Ours
    }

    /// The chunk with a digest.
    pub(super) fn find(&self, digest: &Digest) -> Option<u32> {
        let same = |&at: &u32| self.chunks[at as usize].digest == *digest;
        self.by_digest.find(hash(digest), same).copied()
    }

    /// Adds a chunk nobody had.
    pub(super) fn add(&mut self, chunk: Chunk) -> Result<u32> {
        if chunk.index >= CHUNKS_PER_BLOB_MAX {
            return Err(unsupported!(
                "more than {CHUNKS_PER_BLOB_MAX} chunks in one layer: choose larger chunks"
            ));
        }
        self.claims.remove(&chunk.digest);
        let at = self.chunks.len() as u32;
        self.chunks.push(chunk);
        let chunks = &self.chunks;
        self.by_digest
            .insert_unique(hash(&chunk.digest), at, |&other| hash(&chunks[other as usize].digest));
        Ok(at)
    }

    /// Notes that the next piece is this chunk.
    pub(super) fn refer(&mut self, chunk: u32) -> Result<()> {
        if self.references.len() >= BUILD_REFERENCES_MAX {
            return Err(unsupported!("more than {BUILD_REFERENCES_MAX} chunks of file data"));
        }
        self.references.push(chunk);
        Ok(())
    }

    /// How many pieces there have been.
    pub(super) fn reference_count(&self) -> usize {
        self.references.len()
    }

    /// The chunks of a file: `count` references from `first` on.
    pub(super) fn of_file(&self, first: u32, count: usize) -> &[u32] {
        &self.references[first as usize..first as usize + count]
    }

    /// One chunk by its position.
    pub(super) fn chunk(&self, at: u32) -> &Chunk {
        &self.chunks[at as usize]
    }

    /// How many chunks there are, in all blobs.
    pub(super) fn len(&self) -> usize {
        self.chunks.len()
    }

    /// The chunks from a position on.
    pub(super) fn since(&self, first: usize) -> &[Chunk] {
        &self.chunks[first..]
    }

    /// Says where the stored form of a chunk is, if its layer did not know when it was made.
    pub(super) fn set_stored(&mut self, at: usize, (offset, size): (u64, u32)) {
        self.chunks[at].compressed_offset = offset;
        self.chunks[at].compressed_size = size;
    }

    /// Forgets the claims of a layer: all of them have become chunks, or the layer failed.
    pub(super) fn end_layer(&mut self) {
        self.claims = HashMap::new();
    }

    /// Offers a chunk of another image, unless its digest is known already.
    pub(super) fn offer(&mut self, record: &ChunkRecord, blob: u16) -> Result<()> {
        if self.find(&record.digest).is_none() {
            self.add(Chunk {
                digest: record.digest,
                uncompressed_offset: record.uncompressed_offset,
                compressed_offset: record.compressed_offset,
                uncompressed_size: record.uncompressed_size,
                compressed_size: record.compressed_size,
                index: record.index.0,
                blob,
                is_compressed: record.flags.is_compressed(),
            })?;
        }
        Ok(())
    }
}

/// Any eight bytes of a digest are a hash.
fn hash(digest: &Digest) -> u64 {
    digest.0.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}
