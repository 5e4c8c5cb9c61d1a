//! The record of which segments are complete on the disk itself. Pure.
//!
//! A file's size tells what a running kernel may read; after a power cut it may tell more than the
//! disk kept (buffered fills left zero pages inside the size of 21 files in 8,000). So a completion
//! is written down only after the segment's bytes have been synced, and after another boot only
//! segments with a record are believed. The record is a log that is only appended to: the last
//! entry of a name counts, an entry of size 0 takes the name out, and what is damaged or torn ends
//! the log.
//!
//! An entry, little endian: size of the name (u8), 0 (u8), name (46 bytes of room), size of the
//! segment (u64), crc32c of all before (u32): 60 bytes, which a torn write cannot make by chance.

use std::collections::HashMap;

/// Bytes of an entry.
pub const ENTRY_BYTES: usize = 2 + NAME_ROOM + 8 + 4;
/// Room for a name: eight digits of number, a dash, 32 digits of recipe.
const NAME_ROOM: usize = 46;

/// The completions of one blob's segments, by name.
#[derive(Debug, Default)]
pub struct Completions {
    sizes: HashMap<Box<str>, u64>,
    /// Entries read or made, superseded ones included.
    entry_count: usize,
}

impl Completions {
    /// What a log says. Entries behind the first damaged one are not believed.
    pub fn parse(log: &[u8]) -> Completions {
        let mut completions = Completions::default();
        for entry in log.chunks(ENTRY_BYTES) {
            let Some((name, size)) = decode(entry) else { break };
            completions.apply(name, size);
        }
        completions
    }

    /// The size a segment is known to have on the disk, if it is complete there.
    pub fn size_of(&self, name: &str) -> Option<u64> {
        self.sizes.get(name).copied()
    }

    /// Takes an entry in.
    pub fn apply(&mut self, name: &str, size: u64) {
        self.entry_count += 1;
        if size == 0 {
            self.sizes.remove(name);
        } else {
            self.sizes.insert(name.into(), size);
        }
    }

    /// Bytes of the log that are good.
    pub fn log_size(&self) -> u64 {
        (self.entry_count * ENTRY_BYTES) as u64
    }

    /// A log that says the same in fewer entries, when that is worth writing.
    pub fn compacted(&self) -> Option<Vec<u8>> {
        if self.entry_count < 64 + 2 * self.sizes.len() {
            return None;
        }
        let mut names: Vec<_> = self.sizes.iter().collect();
        names.sort_unstable();
        Some(names.into_iter().flat_map(|(name, size)| encode(name, *size)).collect())
    }

    /// Complete segments.
    pub fn len(&self) -> usize {
        self.sizes.len()
    }

    /// Whether none is complete.
    pub fn is_empty(&self) -> bool {
        self.sizes.is_empty()
    }
}

/// The bytes of an entry; size 0 takes the name out.
///
/// # Panics
/// If the name is longer than a segment's.
pub fn encode(name: &str, size: u64) -> [u8; ENTRY_BYTES] {
    assert!(name.len() <= NAME_ROOM, "a segment's name fits an entry");
    let mut entry = [0; ENTRY_BYTES];
    entry[0] = name.len() as u8;
    entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
    entry[2 + NAME_ROOM..][..8].copy_from_slice(&size.to_le_bytes());
    let sum = crc32c::crc32c(&entry[..ENTRY_BYTES - 4]);
    entry[ENTRY_BYTES - 4..].copy_from_slice(&sum.to_le_bytes());
    entry
}

fn decode(entry: &[u8]) -> Option<(&str, u64)> {
    let entry: &[u8; ENTRY_BYTES] = entry.try_into().ok()?;
    let (body, sum) = entry.split_last_chunk::<4>()?;
    if crc32c::crc32c(body) != u32::from_le_bytes(*sum) {
        return None;
    }
    let name = std::str::from_utf8(body.get(2..2 + usize::from(body[0]))?).ok()?;
    let (_, size) = body.split_last_chunk::<8>()?;
    Some((name, u64::from_le_bytes(*size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "0000001f-00112233445566778899aabbccddeeff";

    #[test]
    fn the_last_entry_of_a_name_counts() {
        let log = [encode("a", 5), encode("b", 7), encode("a", 0), encode("b", 8)].concat();
        let completions = Completions::parse(&log);
        assert_eq!((completions.size_of("a"), completions.size_of("b")), (None, Some(8)));
        assert_eq!(completions.log_size(), log.len() as u64);
    }

    #[test]
    fn nothing_behind_a_torn_or_damaged_entry_is_believed() {
        let log = [encode(NAME, 4096), encode("b", 7)].concat();
        for size in 0..log.len() {
            let known = Completions::parse(&log[..size]);
            assert_eq!(known.len(), size / ENTRY_BYTES, "{size} bytes");
        }
        for at in 0..ENTRY_BYTES {
            let mut damaged = log.clone();
            damaged[at] ^= 4;
            assert!(Completions::parse(&damaged).is_empty(), "byte {at}");
        }
    }

    #[test]
    fn a_long_log_of_few_names_is_written_anew() {
        let mut completions = Completions::default();
        assert!(completions.compacted().is_none());
        for round in 0..100 {
            completions.apply(NAME, 4096 + round);
        }
        let log = completions.compacted().unwrap();
        assert_eq!(log.len(), ENTRY_BYTES);
        assert_eq!(Completions::parse(&log).size_of(NAME), Some(4195));
    }
}
