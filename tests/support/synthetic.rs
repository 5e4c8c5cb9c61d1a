//! Bootstraps of any size without data: one blob of equal chunks, and files made of some of them.

use std::ops::Range;

use sluice::image::{Bootstrap, DigestAlgorithm};

/// An image over one blob of `chunk_count` chunks of `chunk_size` bytes.
pub struct Synthetic {
    pub chunk_size: u32,
    pub chunk_count: u32,
    /// The chunks of each file, named `f00`, `f01` and so on. Only these are listed.
    pub files: Vec<Range<u32>>,
}

const META: usize = 8192;
const ROOT_NID: u64 = 128;

impl Synthetic {
    /// One file of all chunks.
    pub fn whole(chunk_size: u32, chunk_count: u32) -> Synthetic {
        Synthetic { chunk_size, chunk_count, files: vec![Range { start: 0, end: chunk_count }] }
    }

    /// The bytes of a chunk.
    pub fn data(&self, chunk: u32) -> Vec<u8> {
        let seed = chunk.wrapping_mul(2_654_435_761);
        (0..self.chunk_size).map(|at| ((at / 9).wrapping_add(seed) >> (at % 9)) as u8).collect()
    }

    /// The bootstrap; chunks have digests of their numbers, not of their bytes.
    pub fn build(&self) -> Bootstrap {
        let space = u64::from(self.chunk_count) * u64::from(self.chunk_size);
        let mut out = vec![0; META + ROOT_NID as usize * 32];
        put(&mut out, 1024, &0xe0f5_e1e2u32.to_le_bytes());
        put(&mut out, 1032, &0x4000_0000u32.to_le_bytes());
        put(&mut out, 1036, &[12, 0, ROOT_NID as u8, 0]);
        put(&mut out, 1040, &(1 + self.files.len() as u64).to_le_bytes());
        put(&mut out, 1064, &((META / 4096) as u32).to_le_bytes());
        put(&mut out, 1104, &0xcu32.to_le_bytes());
        put(&mut out, 1110, &1u16.to_le_bytes());
        put(&mut out, 1112, &11u16.to_le_bytes());
        // No compressor, BLAKE3, explicit owners.
        put(&mut out, 1152, &0x15u64.to_le_bytes());
        put(&mut out, 1160, &4096u64.to_le_bytes());
        put(&mut out, 1168, &256u32.to_le_bytes());
        put(&mut out, 1172, &self.chunk_size.to_le_bytes());
        for at in [1408, 4096] {
            put(&mut out, at, "cd".repeat(32).as_bytes());
        }
        put(&mut out, 1472, &((space / 4096) as u32).to_le_bytes());
        put(&mut out, 4164, &self.chunk_size.to_le_bytes());
        put(&mut out, 4168, &self.chunk_count.to_le_bytes());
        put(&mut out, 4180, &0x4000_0001u32.to_le_bytes());
        for at in [4184, 4192, 4208] {
            put(&mut out, at, &space.to_le_bytes());
        }
        self.write_tree(&mut out);
        out.resize(out.len().next_multiple_of(4096), 0);
        let table = out.len() as u64;
        self.files.iter().cloned().flatten().for_each(|chunk| self.write_chunk(&mut out, chunk));
        put(&mut out, 1176, &table.to_le_bytes());
        let size = out.len() as u64 - table;
        put(&mut out, 1184, &size.to_le_bytes());
        out.resize(out.len().next_multiple_of(4096), 0);
        Bootstrap::parse(out).expect("a good bootstrap")
    }

    fn write_tree(&self, out: &mut Vec<u8>) {
        // Two digits: the directory stays behind its inode.
        assert!(self.files.len() <= 50);
        let mut nid = ROOT_NID + 64;
        let mut names = vec![(".".to_owned(), ROOT_NID, 2), ("..".to_owned(), ROOT_NID, 2)];
        for (number, chunks) in self.files.iter().enumerate() {
            names.push((format!("f{number:02}"), nid, 1));
            nid += (64 + 8 * chunks.len() as u64).div_ceil(32);
        }
        let mut directory = Vec::new();
        let mut name_at = names.len() * 12;
        for (name, nid, kind) in &names {
            directory.extend(nid.to_le_bytes());
            directory.extend((name_at as u16).to_le_bytes());
            directory.extend([*kind, 0u8]);
            name_at += name.len();
        }
        names.iter().for_each(|(name, ..)| directory.extend(name.as_bytes()));
        out.extend(inode(2, 0o40_755, directory.len() as u64, 0));
        out.extend(directory);
        for ((_, nid, _), chunks) in names[2..].iter().zip(&self.files) {
            out.resize(META + *nid as usize * 32, 0);
            let size = chunks.len() as u64 * u64::from(self.chunk_size);
            out.extend(inode(4, 0o100_644, size, 0x20 | (self.chunk_size / 4096).ilog2()));
            for chunk in chunks.clone() {
                out.extend((chunk as u16).to_le_bytes());
                out.extend([1, (chunk >> 16) as u8]);
                let block = u64::from(chunk) * u64::from(self.chunk_size) / 4096;
                out.extend((block as u32).to_le_bytes());
            }
        }
    }

    fn write_chunk(&self, out: &mut Vec<u8>, chunk: u32) {
        let offset = u64::from(chunk) * u64::from(self.chunk_size);
        out.extend(DigestAlgorithm::Blake3.digest(&chunk.to_le_bytes()).0);
        for word in [0, 0, self.chunk_size, self.chunk_size] {
            out.extend(word.to_le_bytes());
        }
        for long in [offset, offset, 0] {
            out.extend(long.to_le_bytes());
        }
        out.extend(chunk.to_le_bytes());
        out.extend([0; 4]);
    }
}

fn inode(layout: u16, mode: u16, size: u64, address: u32) -> Vec<u8> {
    let mut out = vec![0; 64];
    put(&mut out, 0, &(layout << 1 | 1).to_le_bytes());
    put(&mut out, 4, &mode.to_le_bytes());
    put(&mut out, 8, &size.to_le_bytes());
    put(&mut out, 16, &address.to_le_bytes());
    put(&mut out, 44, &1u32.to_le_bytes());
    out
}

fn put(out: &mut [u8], at: usize, field: &[u8]) {
    out[at..at + field.len()].copy_from_slice(field);
}
