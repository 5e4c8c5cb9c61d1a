//! Compressors: from stored bytes to exactly as many plain bytes as were declared.
//!
//! The output is a slice of the declared size, so no input can make it larger; an input that
//! yields less, or would yield more, is an error. Nothing allocates after [`Codec::new`].

use super::inflate::Inflater;
use crate::error::Result;
use std::fmt;

/// How bytes are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compressor {
    /// Stored as they are.
    None,
    /// One LZ4 block without a size in front.
    Lz4Block,
    /// gzip members.
    Gzip,
    /// zstd frames.
    Zstd,
}

impl Compressor {
    /// The compressor a blob table names by number.
    pub(super) fn from_number(number: u32) -> Result<Self> {
        match number {
            0 => Ok(Compressor::None),
            1 => Ok(Compressor::Lz4Block),
            2 => Ok(Compressor::Gzip),
            3 => Ok(Compressor::Zstd),
            _ => Err(unsupported!("compressor {number} (known: none, lz4_block, gzip, zstd)")),
        }
    }

    /// The number that stands for it on disk.
    pub(super) fn number(self) -> u32 {
        match self {
            Compressor::None => 0,
            Compressor::Lz4Block => 1,
            Compressor::Gzip => 2,
            Compressor::Zstd => 3,
        }
    }
}

impl fmt::Display for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Compressor::None => "none",
            Compressor::Lz4Block => "lz4_block",
            Compressor::Gzip => "gzip",
            Compressor::Zstd => "zstd",
        })
    }
}

/// Where in a deflate stream to start, and what came before it.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// How many bits of `byte` belong to what follows, 0 to 7: its high ones.
    pub bits: u8,
    /// The byte before the input.
    pub byte: u8,
    /// The plain bytes before the entry, at most 32 KiB.
    pub dictionary: &'a [u8],
}

/// The states of all decompressors, for reuse.
pub struct Codec {
    zstd: zstd::bulk::Decompressor<'static>,
    inflater: Inflater,
}

impl Codec {
    /// Allocates the states: about 200 KiB.
    pub fn new() -> Self {
        let zstd = zstd::bulk::Decompressor::new();
        Codec {
            zstd: zstd.expect("invariant: a context without dictionary needs only memory"),
            inflater: Inflater::new(),
        }
    }

    /// Fills `output` from `input`; anything but an exact fit is `Malformed`.
    pub fn decompress(
        &mut self,
        compressor: Compressor,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<()> {
        let produced = match compressor {
            Compressor::None if input.len() == output.len() => {
                output.copy_from_slice(input);
                input.len()
            }
            Compressor::None => input.len(),
            Compressor::Lz4Block => lz4_flex::block::decompress_into(input, output)
                .map_err(|error| malformed!("the lz4 block is broken: {error}"))?,
            Compressor::Zstd => self
                .zstd
                .decompress_to_buffer(input, output)
                .map_err(|error| malformed!("the zstd frame is broken: {error}"))?,
            Compressor::Gzip => return self.gunzip(input, output),
        };
        if produced != output.len() {
            return Err(malformed!("{produced} bytes came out, not {}", output.len()));
        }
        Ok(())
    }

    /// Fills `output` from the middle of a tar.gz. The input may run over the end of gzip members
    /// into later ones, and may have more than is needed at its end.
    pub fn inflate_from(
        &mut self,
        entry: Entry<'_>,
        input: &[u8],
        output: &mut [u8],
    ) -> Result<()> {
        self.inflater.restart();
        if entry.bits != 0 {
            if entry.bits > 7 {
                return Err(malformed!("{} bits left of a byte", entry.bits));
            }
            self.inflater.prime(entry.bits, entry.byte >> (8 - entry.bits))?;
        }
        if !entry.dictionary.is_empty() {
            self.inflater.set_dictionary(entry.dictionary)?;
        }
        self.inflate_members(input, output)?;
        Ok(())
    }

    fn gunzip(&mut self, input: &[u8], output: &mut [u8]) -> Result<()> {
        self.inflater.restart();
        let header = gzip_header_bytes(input)?;
        let rest = self.inflate_members(&input[header..], output)?;
        // The digest says whether the bytes are right; this catches a stream that goes on.
        match rest {
            Some(rest) if self.inflater.inflate(rest, &mut [0])?.produced != 0 => {
                Err(malformed!("the gzip member has more than {} bytes", output.len()))
            }
            _ => Ok(()),
        }
    }

    /// Fills `output`; answers the unused input if the stream has not ended there. Every turn
    /// uses up a member: at least the 18 bytes of trailer and header.
    fn inflate_members<'a>(
        &mut self,
        mut input: &'a [u8],
        mut output: &mut [u8],
    ) -> Result<Option<&'a [u8]>> {
        loop {
            let wanted = output.len();
            let progress = self.inflater.inflate(input, output)?;
            if progress.produced == wanted {
                return Ok((!progress.ended).then(|| &input[progress.consumed..]));
            }
            if !progress.ended {
                let missing = wanted - progress.produced;
                return Err(malformed!("the deflate stream is {missing} bytes short"));
            }
            output = &mut output[progress.produced..];
            input = input[progress.consumed..]
                .get(GZIP_TRAILER_BYTES..)
                .ok_or_else(|| malformed!("a gzip member ends without its trailer"))?;
            input = &input[gzip_header_bytes(input)?..];
            self.inflater.restart();
        }
    }
}

impl Default for Codec {
    fn default() -> Self {
        Codec::new()
    }
}

impl fmt::Debug for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Codec")
    }
}

/// Checksum and length of the plain bytes.
pub const GZIP_TRAILER_BYTES: usize = 8;
const GZIP_FIXED_BYTES: usize = 10;
const GZIP_MAGIC: [u8; 3] = [0x1f, 0x8b, 8];

/// The length of the gzip header at the start of `input` (RFC 1952, section 2.3).
pub fn gzip_header_bytes(input: &[u8]) -> Result<usize> {
    let fields = input.get(..GZIP_FIXED_BYTES).filter(|fixed| fixed.starts_with(&GZIP_MAGIC));
    let Some(fields) = fields else {
        return Err(malformed!("no gzip header where a member starts"));
    };
    let flags = fields[3];
    let mut at = GZIP_FIXED_BYTES;
    let cut = || malformed!("a gzip header is cut short");
    if flags & 0x4 != 0 {
        let length = input.get(at..at + 2).ok_or_else(cut)?;
        at += 2 + usize::from(u16::from_le_bytes([length[0], length[1]]));
    }
    // File name, then comment.
    for bit in [0x8, 0x10] {
        if flags & bit != 0 {
            let text = input.get(at..).ok_or_else(cut)?;
            at += text.iter().position(|&byte| byte == 0).ok_or_else(cut)? + 1;
        }
    }
    if flags & 0x2 != 0 {
        at += 2;
    }
    if at > input.len() { Err(cut()) } else { Ok(at) }
}
