//! A layer of 4 GiB is built within 256 MiB of memory.
//!
//! The only test of its program: the measure is the peak of the whole process. The layer is made
//! as it is read and is on no disk.

use std::io::Read;

use sluice::build::{Builder, Compression, Options};

const FILE_BYTES: u64 = 96 << 20;
const FILES: u64 = 43;
const LIMIT_KIB: u64 = 256 << 10;

/// A tar of large files whose every 4 KiB are different and compress well.
struct Layer {
    at: u64,
    header: Vec<u8>,
}

impl Layer {
    fn new() -> Self {
        Layer { at: 0, header: Vec::new() }
    }

    fn header(file: u64) -> Vec<u8> {
        let mut header = tar::Header::new_gnu();
        header.set_path(format!("file-{file}")).expect("short");
        header.set_size(FILE_BYTES);
        header.set_mode(0o644);
        header.set_cksum();
        header.as_bytes().to_vec()
    }
}

impl Read for Layer {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let member = 512 + FILE_BYTES;
        let (file, inside) = (self.at / member, self.at % member);
        if file == FILES {
            return Ok(0);
        }
        if inside == 0 {
            self.header = Layer::header(file);
        }
        let count = if inside < 512 {
            let count = buffer.len().min(512 - inside as usize);
            buffer[..count].copy_from_slice(&self.header[inside as usize..][..count]);
            count
        } else {
            let left = 4096 - (inside - 512) % 4096;
            let count = buffer.len().min(left as usize);
            buffer[..count].fill((self.at >> 7) as u8);
            if left == 4096 && count > 16 {
                buffer[..8].copy_from_slice(&self.at.to_le_bytes());
            }
            count
        };
        self.at += count as u64;
        Ok(count)
    }
}

/// The most memory this process ever had, in KiB.
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("the kernel says");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn large_layers_are_built_in_little_memory() {
    // The largest chunks and many threads are the worst there is.
    let out = tempfile::tempdir().expect("a folder");
    let compression = Compression::Zstd(3);
    let options = Options { compression, chunk_size: 16 << 20, threads: 16, ..Options::default() };
    let mut builder = Builder::new(options, out.path()).expect("good options");
    let report = builder.add_tar(Layer::new(), &|_| ()).expect("a layer");
    assert!(report.data_bytes > 4 << 30, "{} bytes", report.data_bytes);
    assert_eq!(report.shared_pieces, 0);
    let image = builder.finish().expect("an image");
    let peak = peak_kib();
    println!("{peak} KiB, {:?}", image.report);
    assert!(peak < LIMIT_KIB, "{peak} KiB");
}
