//! Compressing chunks, with contexts kept from one chunk to the next.
//!
//! The compressed form of a chunk depends on the chunk and the options only, never on what the
//! thread compressed before: images would differ from run to run otherwise. zstd promises that of
//! a context, and the test here checks it.
//!
//! LZ4 is compressed by the reference library, as by nydus-image: a Debian root of 510 MiB
//! comes out as large as theirs (309.9 MiB, `tools/compare build`). lz4_flex decodes: hostile
//! input is no place for C.

use super::options::Compression;
use crate::error::{Error, Result};

/// Compresses chunks on one thread.
pub(super) enum Packer {
    None,
    Lz4Block,
    Zstd(zstd::bulk::Compressor<'static>),
}

impl Packer {
    pub(super) fn new(compression: Compression) -> Result<Self> {
        Ok(match compression {
            Compression::None => Packer::None,
            Compression::Lz4Block => Packer::Lz4Block,
            Compression::Zstd(level) => {
                let context = zstd::bulk::Compressor::new(level);
                Packer::Zstd(context.map_err(|error| Error::io(&error, "no zstd context"))?)
            }
        })
    }

    /// Whether it never makes anything shorter.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self, Packer::None)
    }

    /// Writes the compressed form of `plain` into `packed`, from `at` on, and answers its length;
    /// `None` if it is not shorter than `plain`: then it is stored as it is.
    pub(super) fn pack(
        &mut self,
        plain: &[u8],
        packed: &mut Vec<u8>,
        at: usize,
    ) -> Result<Option<usize>> {
        let length = match self {
            Packer::None => return Ok(None),
            Packer::Lz4Block => {
                let failed = |error| Error::io(&error, "lz4 cannot compress");
                let bound = lz4::block::compress_bound(plain.len()).map_err(failed)?;
                let output = room(packed, at, bound);
                lz4::block::compress_to_buffer(plain, None, false, output).map_err(failed)?
            }
            Packer::Zstd(context) => {
                let output = room(packed, at, zstd::zstd_safe::compress_bound(plain.len()));
                context
                    .compress_to_buffer(plain, output)
                    .map_err(|error| Error::io(&error, "zstd cannot compress"))?
            }
        };
        Ok((length < plain.len()).then_some(length))
    }
}

/// `size` bytes from `at` on, grown if need be; buffers are recycled, so growing is rare.
pub(super) fn room(buffer: &mut Vec<u8>, at: usize, size: usize) -> &mut [u8] {
    if buffer.len() < at + size {
        buffer.resize(at + size, 0);
    }
    &mut buffer[at..at + size]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Text-like bytes of several sizes, all different.
    fn inputs() -> Vec<Vec<u8>> {
        let text = |(number, &size): (usize, &usize)| -> Vec<u8> {
            let word = |at: usize| (at * 7 + number) * (at % 91 + 3) / (number + 2);
            (0..size).map(|at| b"etaoin shrdlu\n"[word(at / 3) % 14]).collect()
        };
        [300_000, 70_000, 20_000, 65_534, 65_535, 9000, 500].iter().enumerate().map(text).collect()
    }

    #[test]
    fn packed_form_does_not_depend_on_what_was_packed_before() {
        let levels = (1..=19).map(Compression::Zstd);
        for compression in levels.chain([Compression::Lz4Block]) {
            let pack = |packer: &mut Packer, plain: &[u8]| {
                let mut packed = Vec::new();
                let length = packer.pack(plain, &mut packed, 0).unwrap().unwrap();
                packed[..length].to_vec()
            };
            let alone: Vec<_> = inputs()
                .iter()
                .map(|plain| pack(&mut Packer::new(compression).unwrap(), plain))
                .collect();
            let mut used = Packer::new(compression).unwrap();
            for _ in 0..3 {
                for (plain, alone) in inputs().iter().zip(&alone).rev() {
                    assert!(pack(&mut used, plain) == *alone, "{compression:?}");
                }
            }
        }
    }

    #[test]
    fn what_does_not_shrink_is_stored() {
        for compression in [Compression::None, Compression::Lz4Block, Compression::Zstd(3)] {
            let mut packer = Packer::new(compression).unwrap();
            assert_eq!(packer.pack(b"x", &mut Vec::new(), 0), Ok(None));
        }
    }
}
