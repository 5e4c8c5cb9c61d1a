//! The records inside a context table: chunks of both versions, batches, ZRAN contexts.
//!
//! Decoding only: whether a record makes sense is decided by [`super::context`].

use super::little::{u32_at, u64_at};

/// Where one chunk of a blob is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContextEntry {
    /// Offset in the blob's address space.
    pub uncompressed_offset: u64,
    /// Bytes of the chunk.
    pub size: u32,
    /// Where its stored form is.
    pub place: Place,
}

/// The stored form of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Stored by itself.
    Own {
        /// Offset in the blob file.
        offset: u64,
        /// Bytes as stored.
        size: u32,
        /// The stored form is compressed.
        compressed: bool,
        /// The stored form is encrypted.
        encrypted: bool,
    },
    /// A slice of a decoded batch.
    Batch {
        /// Offset of the batch in the blob file.
        offset: u64,
        /// Number of the batch.
        batch: u32,
        /// Offset in the decoded batch.
        inside: u32,
        /// The batch is encrypted.
        encrypted: bool,
    },
    /// A slice of the output of a ZRAN context.
    Zran {
        /// Number of the context.
        context: u32,
        /// Offset in its output.
        inside: u32,
    },
}

impl Place {
    /// Whether the stored form is (compressed, encrypted), as far as the entry says.
    pub(super) fn storage(&self) -> (bool, bool) {
        match *self {
            Place::Own { compressed, encrypted, .. } => (compressed, encrypted),
            // A batch says by its sizes whether it is compressed.
            Place::Batch { encrypted, .. } => (false, encrypted),
            Place::Zran { .. } => (true, false),
        }
    }
}

const V1_BYTES: usize = 16;
const V2_BYTES: usize = 24;
const OFFSET_MASK: u64 = (1 << 40) - 1;

/// Flag bits of a v2 chunk.
mod flag {
    pub(super) const COMPRESSED: u64 = 1;
    pub(super) const ZRAN: u64 = 2;
    pub(super) const BATCH: u64 = 4;
    pub(super) const ENCRYPTED: u64 = 8;
}

impl ContextEntry {
    /// Bytes of a record of version 1 or 2.
    pub(super) fn bytes(version_2: bool) -> usize {
        if version_2 { V2_BYTES } else { V1_BYTES }
    }

    /// Decodes a record; its length says the version.
    pub(super) fn read(record: &[u8]) -> Self {
        let (uncompressed, compressed) = (u64_at(record, 0), u64_at(record, 8));
        match record.len() {
            V1_BYTES => Self::read_v1(uncompressed, compressed),
            _ => Self::read_v2(uncompressed, compressed, u64_at(record, 16)),
        }
    }

    fn read_v1(uncompressed: u64, compressed: u64) -> Self {
        // Sizes less one, 24 bits in two pieces: 20 low ones on top, 4 high ones further down.
        let size = |word: u64, high_shift: u64| {
            ((word >> 44 | (word >> high_shift & 0xf) << 20) + 1) as u32
        };
        let (plain, stored) = (size(uncompressed, 8), size(compressed, 40));
        ContextEntry {
            uncompressed_offset: uncompressed & 0xfff_ffff_f000,
            size: plain,
            place: Place::Own {
                offset: compressed & OFFSET_MASK,
                size: stored,
                compressed: plain != stored,
                encrypted: false,
            },
        }
    }

    fn read_v2(uncompressed: u64, compressed: u64, data: u64) -> Self {
        let flags = uncompressed >> 56;
        let offset = compressed & OFFSET_MASK;
        let (high, low) = ((data >> 32) as u32, data as u32);
        let encrypted = flags & flag::ENCRYPTED != 0;
        let place = if flags & flag::ZRAN != 0 {
            Place::Zran { context: high, inside: low }
        } else if flags & flag::BATCH != 0 {
            Place::Batch { offset, batch: high, inside: low, encrypted }
        } else {
            let compressed = (flags & flag::COMPRESSED != 0, (compressed >> 40) as u32);
            Place::Own { offset, size: compressed.1, compressed: compressed.0, encrypted }
        };
        ContextEntry {
            uncompressed_offset: (uncompressed & u64::from(u32::MAX)) << 12,
            size: (uncompressed >> 32 & 0xff_ffff) as u32 + 1,
            place,
        }
    }
}

/// Several small chunks compressed as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchContext {
    /// Bytes as stored.
    pub compressed_size: u32,
    /// Bytes when decoded; the stored form is not compressed if it has as many.
    pub uncompressed_size: u32,
}

impl BatchContext {
    pub(super) fn read(record: &[u8; ZranContext::BYTES]) -> Self {
        BatchContext { compressed_size: u32_at(record, 0), uncompressed_size: u32_at(record, 4) }
    }
}

/// A place in a tar.gz where inflating can start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZranContext {
    /// Offset in the tar.gz.
    pub input_offset: u64,
    /// Bytes of tar.gz needed.
    pub input_size: u32,
    /// Offset in the tar.
    pub output_offset: u64,
    /// Bytes of tar that come out.
    pub output_size: u32,
    /// Offset of its dictionary in the dictionary area.
    pub dictionary_offset: u64,
    /// Bytes of dictionary, at most 32 KiB.
    pub dictionary_size: u32,
    /// The byte before `input_offset`.
    pub entry_byte: u8,
    /// How many high bits of it belong to this context.
    pub entry_bits: u8,
}

impl ZranContext {
    /// Bytes of a record, also of a batch's.
    pub(super) const BYTES: usize = 40;

    pub(super) fn read(record: &[u8; Self::BYTES]) -> Self {
        ZranContext {
            input_offset: u64_at(record, 0),
            output_offset: u64_at(record, 8),
            dictionary_offset: u64_at(record, 16),
            input_size: u32_at(record, 24),
            output_size: u32_at(record, 28),
            dictionary_size: u32_at(record, 32),
            entry_byte: record[36],
            entry_bits: record[37],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn version_1_bytes_of_a_real_table() {
        let record = [0, 0, 0, 0, 0, 0xf0, 0xbd, 0, 0, 0, 0, 0, 0, 0x70, 0x4b, 0];
        let place = Place::Own { offset: 0, size: 1208, compressed: true, encrypted: false };
        let expected = ContextEntry { uncompressed_offset: 0, size: 3040, place };
        assert_eq!(ContextEntry::read(&record), expected);
    }

    #[test]
    fn version_1_sizes_use_all_twenty_four_bits() {
        let mut record = [0xff; 16];
        let entry = ContextEntry::read(&record);
        assert_eq!((entry.size, entry.uncompressed_offset), (1 << 24, 0xfff_ffff_f000));
        // Only the high four bits of the stored size less.
        record[13] = 0x0f;
        record[14] = 0;
        record[15] = 0;
        let Place::Own { size, compressed, .. } = ContextEntry::read(&record).place else {
            panic!("a chunk of its own");
        };
        assert_eq!((size, compressed), (0xf0_0001, true));
    }
}
