//! Running a parser over mutated inputs, and noticing when it panics, hangs or takes too much.

use sluice::error::Result;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// A single run may not take longer: whatever the input, it is small.
const RUN_LIMIT: Duration = Duration::from_secs(10);
/// Address space of this process: an allocation by a wild length aborts it.
const MEMORY_LIMIT_BYTES: u64 = 8 << 30;
const POOL_MAX: usize = 4000;
/// Mutated inputs do not grow beyond.
const INPUT_MAX_BYTES: usize = 1 << 20;

/// Replays and mutates; panics with the path of the input when a run panics or takes too long.
pub fn fuzz(target: &str, mut pool: Vec<Vec<u8>>, run: fn(&[u8]) -> Result<()>) {
    let limit = nix::sys::resource::Resource::RLIMIT_AS;
    nix::sys::resource::setrlimit(limit, MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES).unwrap();
    pool.extend(corpus(target));
    assert!(!pool.is_empty(), "no seeds for {target}");
    let seed = match std::env::var("FUZZ_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
    };
    let seconds = std::env::var("FUZZ_SECONDS").map_or(3, |seconds| seconds.parse().unwrap());
    let mut seen = HashSet::new();
    for input in &pool {
        seen.insert(outcome(target, seed, input, run));
    }
    assert!(seen.contains("ok"), "no seed of {target} is right: mutations of it reach little");
    let (mut random, mut runs) = (Random(seed), 0u64);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(seconds) {
        let mut input = pool[random.below(pool.len())].clone();
        for _ in 0..1 + random.below(6) {
            mutate(&mut input, &pool, &mut random);
        }
        input.truncate(INPUT_MAX_BYTES);
        let outcome = outcome(target, seed, &input, run);
        if pool.len() < POOL_MAX && seen.insert(outcome) {
            pool.push(input);
        }
        runs += 1;
    }
    println!("{target}: seed {seed}, {runs} runs, {} outcomes", seen.len());
}

/// The kept inputs of a target.
pub fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target);
    let mut paths: Vec<PathBuf> = match std::fs::read_dir(&folder) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        Err(_) => Vec::new(),
    };
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

fn outcome(target: &str, seed: u64, input: &[u8], run: fn(&[u8]) -> Result<()>) -> String {
    let started = Instant::now();
    let result = std::panic::catch_unwind(|| run(input));
    let slow = started.elapsed() > RUN_LIMIT;
    let Ok(result) = result.map_err(drop).and_then(|ok| if slow { Err(()) } else { Ok(ok) }) else {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-{seed}"));
        std::fs::write(&path, input).unwrap();
        let what = if slow { "takes too long" } else { "panics" };
        panic!("{target} {what} on the input kept in {} (seed {seed})", path.display());
    };
    match result {
        Ok(()) => "ok".into(),
        Err(error) => {
            // Names and numbers would make every outcome new.
            let text = error.to_string();
            text.chars().filter(|letter| letter.is_ascii_lowercase()).take(120).collect()
        }
    }
}

fn mutate(input: &mut Vec<u8>, pool: &[Vec<u8>], random: &mut Random) {
    if input.is_empty() {
        input.push(random.next() as u8);
    }
    let at = random.below(input.len());
    let length = 1 + random.below(64.min(input.len() - at));
    match random.below(10) {
        0..=2 => input[at] ^= 1 << random.below(8),
        3 => input[at] = random.interesting() as u8,
        4 | 5 => {
            // A field of 2, 4 or 8 bytes at its natural place.
            let size = 2 << random.below(3);
            let at = at / size * size;
            let field = random.interesting().to_le_bytes();
            let end = (at + size).min(input.len());
            input[at..end].copy_from_slice(&field[..end - at]);
        }
        6 => input.truncate(at),
        7 => drop(input.drain(at..at + length)),
        8 => {
            let other = &pool[random.below(pool.len())];
            let from = random.below(other.len().max(1)).min(other.len());
            let piece = &other[from..(from + length).min(other.len())];
            input.splice(at..at, piece.iter().copied());
        }
        _ => {
            let to = random.below(input.len() - length + 1);
            input.copy_within(at..at + length, to);
        }
    }
}

/// splitmix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// A number near which things go wrong.
    fn interesting(&mut self) -> u64 {
        let power = 1u64 << self.below(64);
        match self.below(6) {
            0 => 0,
            1 => u64::MAX - self.below(600) as u64,
            2 => power,
            3 => power - 1,
            4 => power.wrapping_add(self.next() % 5),
            _ => self.next() >> self.below(64),
        }
    }
}
