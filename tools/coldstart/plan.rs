//! Which reads are made, in which order: random, sequential, or as a trace says. Pure.
//!
//! A plan is a list of lanes. Readers that share a lane take its reads in turn; a sequential plan
//! has a lane per reader, a stripe of the whole each. The same seed gives the same plan.

use std::io;
use std::ops::Range;

/// The unit in which reads are placed.
pub const PAGE_BYTES: u64 = 4096;

/// One read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    /// Which file; 0 of a bare blob.
    pub file: u32,
    /// Where in it.
    pub offset: u64,
    /// How much.
    pub length: u64,
    /// Where it is when all files stand in a row, for plots.
    pub place: u64,
}

/// A file that is read from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its name; empty for a bare blob.
    pub name: String,
    /// Its size.
    pub size: u64,
}

/// How reads are chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// One read of `block` bytes at a random page of every `slot` bytes, in random order.
    Random { block: u64, slot: u64, seed: u64 },
    /// Everything, `block` bytes at a time.
    Sequential { block: u64 },
    /// Lines of `[NAME] OFFSET LENGTH`.
    Trace(String),
}

/// The reads of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Reader r takes from lane r modulo their number.
    pub lanes: Vec<Vec<Operation>>,
}

impl Plan {
    /// Chooses reads of `files` for so many readers, at most `limit` of them.
    ///
    /// # Errors
    /// A trace that names no file, or makes no sense.
    pub fn new(
        pattern: &Pattern,
        files: &[Extent],
        readers: usize,
        limit: usize,
    ) -> io::Result<Plan> {
        let mut lanes = match pattern {
            Pattern::Random { block, slot, seed } => vec![random(files, *block, *slot, *seed)],
            Pattern::Sequential { block } => {
                let all = sequential(files, *block);
                let share = all.len().div_ceil(readers).max(1);
                all.chunks(share).map(<[Operation]>::to_vec).collect()
            }
            Pattern::Trace(text) => vec![trace(text, files)?],
        };
        let share = limit.div_ceil(lanes.len().max(1));
        lanes.iter_mut().for_each(|lane| lane.truncate(share));
        Ok(Plan { lanes })
    }

    /// Reads in all lanes.
    pub fn count(&self) -> usize {
        self.lanes.iter().map(Vec::len).sum()
    }
}

fn random(files: &[Extent], block: u64, slot: u64, seed: u64) -> Vec<Operation> {
    let total: u64 = files.iter().map(|file| file.size).sum();
    let mut random = Random(seed);
    let mut places: Vec<u64> = (0..total / slot)
        .map(|index| {
            let pages = slot.saturating_sub(block) / PAGE_BYTES + 1;
            index * slot + random.next() % pages * PAGE_BYTES
        })
        .collect();
    for at in (1..places.len()).rev() {
        places.swap(at, random.next() as usize % (at + 1));
    }
    let starts = starts(files);
    places
        .into_iter()
        .map(|place| {
            let file = starts.partition_point(|start| *start <= place) - 1;
            let inside = place - starts[file];
            // A read stays within its file and begins with a page of it.
            let offset = inside / PAGE_BYTES * PAGE_BYTES;
            let length = block.min(files[file].size - offset);
            Operation { file: file as u32, offset, length, place }
        })
        .collect()
}

fn sequential(files: &[Extent], block: u64) -> Vec<Operation> {
    let (mut all, starts) = (Vec::new(), starts(files));
    for (file, extent) in files.iter().enumerate() {
        for offset in (0..extent.size).step_by(block as usize) {
            let length = block.min(extent.size - offset);
            let place = starts[file] + offset;
            all.push(Operation { file: file as u32, offset, length, place });
        }
    }
    all
}

fn trace(text: &str, files: &[Extent]) -> io::Result<Vec<Operation>> {
    let (mut all, starts) = (Vec::new(), starts(files));
    for (number, line) in text.lines().enumerate() {
        let wrong = |why: &str| io::Error::other(format!("trace, line {}: {why}", number + 1));
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let mut words = line.rsplitn(3, ' ');
        let mut number = || words.next().and_then(|word| word.parse::<u64>().ok());
        let (length, offset) = (number(), number());
        let (Some(length), Some(offset)) = (length, offset) else {
            return Err(wrong("it ends with no two numbers"));
        };
        let name = words.next().unwrap_or("");
        let file = files.iter().position(|file| file.name == name);
        let file = file.ok_or_else(|| wrong("no such file"))?;
        let bounds: Range<u64> = 0..files[file].size;
        if length == 0 || !bounds.contains(&offset) {
            return Err(wrong("outside the file"));
        }
        let length = length.min(bounds.end - offset);
        let place = starts[file] + offset;
        all.push(Operation { file: file as u32, offset, length, place });
    }
    Ok(all)
}

/// Where each file begins when all stand in a row. Empty files begin where the next one does, and
/// are never found: the last of equal starts wins.
fn starts(files: &[Extent]) -> Vec<u64> {
    let mut at = 0;
    let start = |file: &Extent| {
        let start = at;
        at += file.size;
        start
    };
    files.iter().map(start).collect()
}

/// splitmix64: the same numbers everywhere.
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut state = self.0;
        state = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        state = (state ^ state >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^ state >> 31
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files() -> Vec<Extent> {
        let file = |(name, size): (&str, u64)| Extent { name: name.to_owned(), size };
        [("a", 10 << 20), ("b c", 5000), ("d", 3 << 20)].map(file).to_vec()
    }

    #[test]
    fn random_reads_take_one_place_per_slot_and_stay_in_their_files() {
        let pattern = Pattern::Random { block: 4096, slot: 1 << 20, seed: 7 };
        let plan = Plan::new(&pattern, &files(), 4, usize::MAX).unwrap();
        assert_eq!((plan.lanes.len(), plan.count()), (1, 13));
        let mut slots: Vec<_> = plan.lanes[0].iter().map(|read| read.place >> 20).collect();
        assert_ne!(slots, (0..13).collect::<Vec<_>>());
        slots.sort_unstable();
        assert_eq!(slots, (0..13).collect::<Vec<_>>());
        for read in &plan.lanes[0] {
            let size = files()[read.file as usize].size;
            assert!(read.offset % PAGE_BYTES == 0 && read.offset + read.length <= size);
        }
        assert_eq!(plan, Plan::new(&pattern, &files(), 4, usize::MAX).unwrap());
    }

    #[test]
    fn sequential_reads_cover_everything_once_in_stripes() {
        let pattern = Pattern::Sequential { block: 128 << 10 };
        let plan = Plan::new(&pattern, &files(), 4, usize::MAX).unwrap();
        assert_eq!(plan.lanes.len(), 4);
        let mut at = 0;
        for read in plan.lanes.iter().flatten() {
            assert_eq!(read.place, at);
            at += read.length;
        }
        assert_eq!(at, files().iter().map(|file| file.size).sum::<u64>());
    }

    #[test]
    fn a_trace_says_what_is_read_and_nonsense_is_an_error() {
        let plan = |text: &str| Plan::new(&Pattern::Trace(text.into()), &files(), 1, 9);
        let lanes = plan("# first\nb c 4096 8192\n\na 0 1\n").unwrap().lanes;
        let place = (10 << 20) + 4096;
        let first = Operation { file: 1, offset: 4096, length: 904, place };
        assert_eq!(lanes, [[first, Operation { file: 0, offset: 0, length: 1, place: 0 }]]);
        for wrong in ["x 0 1", "a 0", "a 0 0", "b c 5000 1", "a -1 1", "a"] {
            assert!(plan(wrong).is_err(), "{wrong}");
        }
    }
}
