//! A disk with a volatile cache: what was not flushed is at the mercy of the power.
//!
//! Owns the file that stands for the platters, and every unflushed version of every sector. A flush
//! writes the newest version of each; a write with FUA is on the platters when it returns, and no
//! older write to the same sectors can come back over it. A power cut decides for each write on
//! its own whether it got there whole, not at all, or torn between two sectors: later writes may
//! survive earlier ones, as on a disk that sorts its queue. A sector is never torn. The same seed
//! and the same writes make the same cut. The file itself is not synced: the machine that is cut
//! off is emulated, the one that runs this is not.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What a disk promises to write whole or not at all.
pub const SECTOR: usize = 512;
/// A cache that is full is written out whole, as if flushed.
const CACHE_SECTORS_MAX: usize = 256 * 1024;
/// Of the writes that a cut finds in the cache, the part that is torn.
const TORN_IN: u64 = 8;

pub struct Disk {
    platters: File,
    size: u64,
    /// By sector number; the newest version is the last.
    cache: BTreeMap<u64, Vec<Version>>,
    cached_sectors: usize,
    writes: u64,
    dice: Dice,
}

struct Version {
    /// The number of the write it came with.
    write: u64,
    bytes: Box<[u8; SECTOR]>,
}

/// What became of the writes that were in the cache when the power went.
#[derive(Debug, Default, serde::Serialize)]
pub struct Cut {
    kept: u64,
    lost: u64,
    torn: u64,
    /// Sectors that hold something else than was last written to them.
    stale_sectors: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Kept,
    Lost,
    Torn,
}

impl Disk {
    /// `size` in bytes, a multiple of a sector; the file is made as large.
    pub fn new(platters: File, size: u64, seed: u64) -> io::Result<Disk> {
        platters.set_len(size)?;
        let (cache, dice) = (BTreeMap::new(), Dice(seed));
        Ok(Disk { platters, size, cache, cached_sectors: 0, writes: 0, dice })
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether a request is whole sectors inside the disk.
    pub fn holds(&self, offset: u64, length: u64) -> bool {
        let aligned = (offset | length).is_multiple_of(SECTOR as u64);
        aligned && offset.checked_add(length).is_some_and(|end| end <= self.size)
    }

    /// As the machine sees it: with everything that it has written. The request must be inside.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.platters.read_exact_at(bytes, offset)?;
        let first = offset / SECTOR as u64;
        let end = first + (bytes.len() / SECTOR) as u64;
        for (sector, versions) in self.cache.range(first..end) {
            let at = (sector - first) as usize * SECTOR;
            if let Some(newest) = versions.last() {
                bytes[at..at + SECTOR].copy_from_slice(&newest.bytes[..]);
            }
        }
        Ok(())
    }

    /// Into the cache, or with `fua` through it. The request must be inside.
    pub fn write(&mut self, offset: u64, bytes: &[u8], fua: bool) -> io::Result<()> {
        let first = offset / SECTOR as u64;
        if fua {
            for sector in first..first + (bytes.len() / SECTOR) as u64 {
                let gone = self.cache.remove(&sector);
                self.cached_sectors -= gone.map_or(0, |versions| versions.len());
            }
            return self.platters.write_all_at(bytes, offset);
        }
        self.writes += 1;
        let write = self.writes;
        for (sector, bytes) in (first..).zip(bytes.as_chunks::<SECTOR>().0) {
            let version = Version { write, bytes: Box::new(*bytes) };
            self.cache.entry(sector).or_default().push(version);
            self.cached_sectors += 1;
        }
        if self.cached_sectors > CACHE_SECTORS_MAX { self.flush() } else { Ok(()) }
    }

    /// Everything that was written is on the platters when it returns.
    pub fn flush(&mut self) -> io::Result<()> {
        self.settle(|_, versions| versions.len())
    }

    /// The power goes: only what fate leaves of the cache reaches the platters.
    pub fn cut(&mut self) -> io::Result<Cut> {
        // From all lost to all kept: a power supply dies early or late in the disk's work.
        let survive = self.dice.below(101);
        let mut fates = HashMap::new();
        let mut cut = Cut::default();
        let mut dice = Dice(self.dice.next());
        let writes: std::collections::BTreeSet<u64> =
            self.cache.values().flatten().map(|version| version.write).collect();
        for write in writes {
            let fate = match dice.below(TORN_IN) {
                0 => Fate::Torn,
                _ if dice.below(100) < survive => Fate::Kept,
                _ => Fate::Lost,
            };
            *cut.count(fate) += 1;
            fates.insert(write, fate);
        }
        let mut stale = 0;
        self.settle(|_, versions| {
            let mut survives = |version: &Version| match fates[&version.write] {
                Fate::Kept => true,
                Fate::Lost => false,
                Fate::Torn => dice.below(2) == 0,
            };
            let newest = versions.iter().rposition(&mut survives).map_or(0, |index| index + 1);
            stale += u64::from(newest < versions.len());
            newest
        })?;
        cut.stale_sectors = stale;
        Ok(cut)
    }

    /// Writes of each sector's versions the one that `choose` counts to, 0 for none; empties the
    /// cache.
    fn settle(&mut self, mut choose: impl FnMut(u64, &[Version]) -> usize) -> io::Result<()> {
        self.cached_sectors = 0;
        for (sector, versions) in std::mem::take(&mut self.cache) {
            if let Some(index) = choose(sector, &versions).checked_sub(1) {
                self.platters.write_all_at(&versions[index].bytes[..], sector * SECTOR as u64)?;
            }
        }
        Ok(())
    }
}

impl Cut {
    fn count(&mut self, fate: Fate) -> &mut u64 {
        match fate {
            Fate::Kept => &mut self.kept,
            Fate::Lost => &mut self.lost,
            Fate::Torn => &mut self.torn,
        }
    }
}

/// SplitMix64 (Steele, Lea and Flood, 2014): any seed is a good one.
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}
