//! What a user decides about an image to be built.

use crate::config::{BUILD_THREADS_MAX, CHUNK_MAX_BYTES};
use crate::error::Result;
use crate::image::superblock::CHUNK_MIN_BYTES;
use crate::image::{Compressor, DigestAlgorithm};

/// How chunks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Not at all.
    None,
    /// One LZ4 block each.
    Lz4Block,
    /// One zstd frame each; levels 1 to 22, 3 is what other builders use. Above 19 every thread
    /// takes hundreds of MiB.
    Zstd(i32),
}

impl Compression {
    /// The compressor, without its level.
    pub fn compressor(self) -> Compressor {
        match self {
            Compression::None => Compressor::None,
            Compression::Lz4Block => Compressor::Lz4Block,
            Compression::Zstd(_) => Compressor::Zstd,
        }
    }
}

/// What a user decides about an image.
#[derive(Clone, Debug)]
pub struct Options {
    /// How chunks are compressed.
    pub compression: Compression,
    /// Bytes of file data per chunk: a power of two, 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// How chunk digests are made.
    pub digest: DigestAlgorithm,
    /// Threads that digest and compress. Says nothing about the result.
    pub threads: usize,
    /// Paths to list for prefetch, in this order; those the image lacks are left out.
    pub prefetch: Vec<Vec<u8>>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            compression: Compression::Zstd(3),
            chunk_size: 1 << 20,
            digest: DigestAlgorithm::Blake3,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            prefetch: Vec::new(),
        }
    }
}

impl Options {
    /// Refuses what no image can have; called by the builder.
    pub(super) fn check(&self) -> Result<()> {
        let size = self.chunk_size;
        if !size.is_power_of_two() || size < CHUNK_MIN_BYTES || size > CHUNK_MAX_BYTES as u32 {
            return Err(malformed!(
                "chunk size {size}: choose a power of two from 4 KiB to 16 MiB"
            ));
        }
        if let Compression::Zstd(level) = self.compression
            && !(1..=22).contains(&level)
        {
            return Err(malformed!("zstd level {level}: choose 1 to 22"));
        }
        if self.threads == 0 || self.threads > BUILD_THREADS_MAX {
            return Err(malformed!("{} threads: choose 1 to {BUILD_THREADS_MAX}", self.threads));
        }
        Ok(())
    }
}

/// How far a layer has come, reported often and from several threads. Both are increments.
#[derive(Clone, Copy, Debug, Default)]
pub struct Progress {
    /// Bytes taken from the layer's stream, or from the files of a directory.
    pub read_bytes: u64,
    /// Bytes written to the layer's blob.
    pub written_bytes: u64,
}
