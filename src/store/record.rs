//! One record of the ledger: under which digests a cache file may have been filled.
//!
//! A cache file is a row of chunks; of those that may have been filled the record holds a
//! fingerprint, 32 bytes that determine the chunk's place and bytes. A bootstrap is one chunk. The
//! same values in and out, no I/O. What cannot be read back exactly as it was written is no record.
//!
//! On disk, little endian: magic (16 bytes), ledger (16), size of the cache file (8), chunks in it
//! (4), chunks listed (4), per listed chunk its index (4) and fingerprint (32), blake3 of all
//! before.

/// Stands for a chunk's place and bytes.
pub type Fingerprint = [u8; 32];
/// Which ledger wrote a record.
pub type LedgerId = [u8; 16];

/// What one cache file may have been filled with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    size_bytes: u64,
    chunk_count: u32,
    /// By ascending index, each below `chunk_count`, none twice.
    chunks: Vec<(u32, Fingerprint)>,
}

const MAGIC: &[u8; 16] = b"sluice ledger 1\n";
const HEAD_BYTES: usize = 48;
const CHUNK_BYTES: usize = 36;
const DIGEST_BYTES: usize = 32;

impl Record {
    /// A cache file of `size_bytes` that is filled from one source, all of it.
    pub fn whole(size_bytes: u64, fingerprint: Fingerprint) -> Record {
        Record { size_bytes, chunk_count: 1, chunks: vec![(0, fingerprint)] }
    }

    /// A cache file of `size_bytes` in `chunk_count` chunks, some of which are listed.
    ///
    /// # Panics
    /// If the indexes do not ascend or are no chunk's.
    pub fn new(size_bytes: u64, chunk_count: u32, chunks: Vec<(u32, Fingerprint)>) -> Record {
        assert!(ascends(&chunks, chunk_count), "chunks are listed in order");
        Record { size_bytes, chunk_count, chunks }
    }

    /// The bytes on disk.
    pub fn encode(&self, ledger: &LedgerId) -> Vec<u8> {
        let size = HEAD_BYTES + self.chunks.len() * CHUNK_BYTES + DIGEST_BYTES;
        let mut bytes = Vec::with_capacity(size);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(ledger);
        bytes.extend_from_slice(&self.size_bytes.to_le_bytes());
        bytes.extend_from_slice(&self.chunk_count.to_le_bytes());
        bytes.extend_from_slice(&(self.chunks.len() as u32).to_le_bytes());
        for (index, fingerprint) in &self.chunks {
            bytes.extend_from_slice(&index.to_le_bytes());
            bytes.extend_from_slice(fingerprint);
        }
        let digest = blake3::hash(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        bytes
    }

    /// The record that `encode` made of it, or `None`: damaged, or another ledger's.
    pub fn decode(bytes: &[u8], ledger: &LedgerId) -> Option<Record> {
        let (body, digest) = bytes.split_at_checked(bytes.len().checked_sub(DIGEST_BYTES)?)?;
        let (head, table) = body.split_at_checked(HEAD_BYTES)?;
        if blake3::hash(body).as_bytes() != digest || !head.starts_with(MAGIC) {
            return None;
        }
        let word = |at: usize| Some(u32::from_le_bytes(*head.get(at..)?.first_chunk()?));
        let (entries, rest) = table.as_chunks::<CHUNK_BYTES>();
        if head[16..32] != *ledger || !rest.is_empty() || entries.len() != word(44)? as usize {
            return None;
        }
        let chunks = entries.iter().filter_map(|entry| {
            let (index, fingerprint) = entry.split_first_chunk()?;
            Some((u32::from_le_bytes(*index), fingerprint.try_into().ok()?))
        });
        let (chunks, chunk_count) = (chunks.collect::<Vec<_>>(), word(40)?);
        let size_bytes = u64::from_le_bytes(*head.get(32..)?.first_chunk()?);
        ascends(&chunks, chunk_count).then_some(Record { size_bytes, chunk_count, chunks })
    }

    /// Whether a file filled under both could hold what one of them calls wrong.
    pub fn contradicts(&self, other: &Record) -> bool {
        !self.has_shape_of(other) || {
            let mut theirs = other.chunks.iter().peekable();
            self.chunks.iter().any(|(index, fingerprint)| {
                while theirs.next_if(|chunk| chunk.0 < *index).is_some() {}
                theirs.next_if(|chunk| chunk.0 == *index).is_some_and(|its| its.1 != *fingerprint)
            })
        }
    }

    /// What is known after `newer`, whose word counts where both have one. Chunks that only this
    /// record lists stay: registered images may go on to fill them.
    #[must_use]
    pub fn overlaid(&self, newer: Record) -> Record {
        if !self.has_shape_of(&newer) {
            return newer;
        }
        let mut chunks = Vec::with_capacity(self.chunks.len().max(newer.chunks.len()));
        let mut older = self.chunks.iter().copied().peekable();
        for chunk in newer.chunks {
            while let Some(before) = older.next_if(|old| old.0 < chunk.0) {
                chunks.push(before);
            }
            older.next_if(|old| old.0 == chunk.0);
            chunks.push(chunk);
        }
        chunks.extend(older);
        Record { chunks, ..*self }
    }

    fn has_shape_of(&self, other: &Record) -> bool {
        (self.size_bytes, self.chunk_count) == (other.size_bytes, other.chunk_count)
    }
}

fn ascends(chunks: &[(u32, Fingerprint)], chunk_count: u32) -> bool {
    chunks.is_sorted_by(|a, b| a.0 < b.0) && chunks.last().is_none_or(|last| last.0 < chunk_count)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEDGER: LedgerId = [9; 16];

    fn record(chunks: &[(u32, u8)]) -> Record {
        let chunks = chunks.iter().map(|(index, byte)| (*index, [*byte; 32]));
        Record::new(1 << 20, 8, chunks.collect())
    }

    #[test]
    fn what_was_written_is_read_back() {
        for record in [record(&[]), record(&[(0, 1), (7, 2)]), Record::whole(5, [3; 32])] {
            assert_eq!(Record::decode(&record.encode(&LEDGER), &LEDGER), Some(record));
        }
    }

    #[test]
    fn a_damaged_record_is_none() {
        let bytes = record(&[(1, 1), (2, 2)]).encode(&LEDGER);
        for size in 0..bytes.len() {
            assert_eq!(Record::decode(&bytes[..size], &LEDGER), None, "{size} bytes");
        }
        for at in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x10;
            assert_eq!(Record::decode(&damaged, &LEDGER), None, "byte {at}");
        }
        assert_eq!(Record::decode(&[bytes.as_slice(), &[0]].concat(), &LEDGER), None);
    }

    #[test]
    fn another_ledgers_record_is_none() {
        assert_eq!(Record::decode(&record(&[(1, 1)]).encode(&LEDGER), &[8; 16]), None);
    }

    #[test]
    fn impossible_lists_are_none_even_with_a_right_digest() {
        for chunks in [vec![(8, [0; 32])], vec![(2, [0; 32]), (2, [0; 32])]] {
            let bad = Record { chunks, ..record(&[]) };
            assert_eq!(Record::decode(&bad.encode(&LEDGER), &LEDGER), None);
        }
    }

    #[test]
    fn contradictions_are_found_both_ways() {
        let known = record(&[(1, 1), (3, 3), (5, 5)]);
        for (other, expected) in [
            (record(&[]), false),
            (record(&[(0, 9), (2, 9), (6, 9)]), false),
            (record(&[(0, 9), (3, 3)]), false),
            (record(&[(0, 9), (3, 4)]), true),
            (record(&[(5, 1)]), true),
            (Record { size_bytes: 1, ..known.clone() }, true),
            (Record { chunk_count: 9, ..known.clone() }, true),
        ] {
            assert_eq!(known.contradicts(&other), expected, "{other:?}");
            assert_eq!(other.contradicts(&known), expected, "{other:?}");
        }
    }

    #[test]
    fn the_newer_word_counts_and_nothing_else_is_lost() {
        let known = record(&[(1, 1), (3, 3), (5, 5)]);
        let merged = known.overlaid(record(&[(0, 9), (3, 4), (7, 9)]));
        assert_eq!(merged, record(&[(0, 9), (1, 1), (3, 4), (5, 5), (7, 9)]));
        let other = Record { chunk_count: 9, ..record(&[(2, 2)]) };
        assert_eq!(known.overlaid(other.clone()), other);
    }
}
