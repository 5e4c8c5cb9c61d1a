//! A made-up file tree for test images: the same bytes everywhere, as compressible as a
//! distribution's.
//!
//! Three kinds of files in turn: text of some thousand words, records with fixed and varying
//! fields (programs and libraries look like that to a compressor), and noise (pictures, archives).
//! Sizes are spread evenly over their logarithm, from 2 KiB to 4 MiB.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::plan::Random;

const SIZE_BITS_MIN: u64 = 11;
const SIZE_BITS_MAX: u64 = 22;
const FILES_PER_FOLDER: u64 = 40;
const WORDS: usize = 6000;
const RECORD_BYTES: usize = 48;

/// Makes the tree in a new folder; files come to `mib` MiB.
pub fn make(folder: &Path, mib: u64, seed: u64) -> io::Result<()> {
    std::fs::create_dir(folder)?;
    let mut random = Random(seed);
    let words = words(&mut random);
    let mut left = mib << 20;
    for number in 0.. {
        if left == 0 {
            break;
        }
        let bits = SIZE_BITS_MIN + random.next() % (SIZE_BITS_MAX - SIZE_BITS_MIN);
        let size = ((1 << bits) + random.next() % (1 << bits)).min(left);
        left -= size;
        let inside = folder.join(format!("folder-{:03}", number / FILES_PER_FOLDER));
        std::fs::create_dir_all(&inside)?;
        let mut file = BufWriter::new(File::create(inside.join(format!("file-{number:05}")))?);
        let mut writer = Limited { file: &mut file, left: size };
        match random.next() % 20 {
            0..8 => text(&mut writer, &words, &mut random)?,
            8..16 => records(&mut writer, &mut random)?,
            _ => noise(&mut writer, &mut random)?,
        }
        file.flush()?;
    }
    Ok(())
}

/// Takes so many bytes and lets the rest fall.
struct Limited<'a> {
    file: &'a mut BufWriter<File>,
    left: u64,
}

impl Limited<'_> {
    fn take(&mut self, bytes: &[u8]) -> io::Result<()> {
        let count = self.left.min(bytes.len() as u64);
        self.left -= count;
        self.file.write_all(&bytes[..count as usize])
    }
}

fn words(random: &mut Random) -> Vec<String> {
    let word = |_| {
        let length = 2 + random.next() % 9;
        (0..length).map(|_| char::from(b'a' + (random.next() % 26) as u8)).collect()
    };
    (0..WORDS).map(word).collect()
}

fn text(file: &mut Limited<'_>, words: &[String], random: &mut Random) -> io::Result<()> {
    while file.left > 0 {
        // The product of two draws prefers the first words, as languages do.
        let number = random.next();
        let (a, b) = (number as u32 as u64 % 1000, (number >> 32) % 1000);
        let word = &words[(a * b) as usize * WORDS / 1_000_000];
        file.take(word.as_bytes())?;
        file.take(if number.is_multiple_of(11) { b"\n" } else { b" " })?;
    }
    Ok(())
}

fn records(file: &mut Limited<'_>, random: &mut Random) -> io::Result<()> {
    let mut record = [0; RECORD_BYTES];
    let mut address = random.next() % (1 << 40);
    while file.left > 0 {
        let number = random.next();
        address += number % 4096;
        record[..8].copy_from_slice(&address.to_le_bytes());
        record[8..16].copy_from_slice(&(number % 64).to_le_bytes());
        record[16..22].copy_from_slice(&random.next().to_le_bytes()[..6]);
        record[22..26].copy_from_slice(&(number as u32 % 50_000).to_le_bytes());
        record[32..40].copy_from_slice(&(address ^ 0xfff).to_le_bytes());
        file.take(&record)?;
    }
    Ok(())
}

fn noise(file: &mut Limited<'_>, random: &mut Random) -> io::Result<()> {
    while file.left > 0 {
        file.take(&random.next().to_le_bytes())?;
    }
    Ok(())
}
