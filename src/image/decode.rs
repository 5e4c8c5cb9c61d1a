//! From the stored bytes of a unit to the bytes the kernel reads.
//!
//! A [`Decoder`] owns all scratch memory and decompressor states of one core. Decoding says
//! nothing about whether bytes are right: only [`Layout::verify`] does, and nothing may be shown
//! to a reader before it has answered true for that chunk.

use super::cipher::Cipher;
use super::codec::{Codec, Compressor, Entry};
use super::layout::{Layout, Source, Unit};
use super::superblock::BLOCK_BYTES;
use crate::config::DECODER_SCRATCH_BYTES;
use crate::error::Result;

/// Decompressors and scratch memory for one core.
///
/// Takes about 4 MiB when made. Grows, up to 16 MiB for each of its two buffers, when it meets a
/// larger encrypted unit, batch or ZRAN context than any before; allocates nothing otherwise.
#[derive(Debug)]
pub struct Decoder {
    codec: Codec,
    /// Decrypted, still compressed bytes.
    decrypted: Vec<u8>,
    /// The decoded form of a unit that several chunks share.
    decoded: Vec<u8>,
}

impl Decoder {
    /// Allocates everything ordinary units need.
    pub fn new() -> Self {
        Decoder {
            codec: Codec::new(),
            decrypted: vec![0; DECODER_SCRATCH_BYTES],
            decoded: vec![0; DECODER_SCRATCH_BYTES],
        }
    }

    /// Decodes a unit.
    ///
    /// `compressed` is the whole unit as fetched, `output` has exactly `output_size` bytes: each
    /// listed chunk is written at its offset in the address space less that of the unit, and
    /// everything else of `output` is zero. `Malformed` names blob and unit; `output` is then
    /// undefined.
    ///
    /// # Panics
    /// If there is no such unit or `output` has another length.
    pub fn decode_unit(
        &mut self,
        layout: &Layout,
        unit: u32,
        compressed: &[u8],
        output: &mut [u8],
    ) -> Result<()> {
        let extent = layout.unit(unit);
        assert_eq!(output.len(), extent.output_size as usize, "the output is one whole unit");
        let decoded = match compressed.len() == extent.compressed_size as usize {
            true => self.decode(layout, unit, &extent, compressed, output),
            false => Err(malformed!(
                "{} bytes stored, {} bytes given",
                extent.compressed_size,
                compressed.len()
            )),
        };
        decoded.map_err(|error| {
            let first = extent.chunks.start;
            error.context(format!("blob {}, unit {unit} (chunk {first})", layout.blob_id()))
        })
    }

    fn decode(
        &mut self,
        layout: &Layout,
        unit: u32,
        extent: &Unit,
        compressed: &[u8],
        output: &mut [u8],
    ) -> Result<()> {
        let source = layout.source(unit);
        let members = layout.members(unit);
        if !source.is_shared() {
            let (chunk, padding) = output.split_at_mut(source.decoded_size as usize);
            padding.fill(0);
            return self.decode_source(layout, &source, compressed, chunk);
        }
        // The part of the decoded form that somebody listed needs.
        let needed = members.clone().map(|member| member.offset + member.size as usize).max();
        let needed = match source.is_zran() {
            true => needed.unwrap_or(0),
            false => source.decoded_size as usize,
        };
        let mut decoded = std::mem::take(&mut self.decoded);
        let result = self.decode_source(layout, &source, compressed, room(&mut decoded, needed));
        self.decoded = decoded;
        result?;
        let mut end = 0;
        for member in members {
            let start = (member.uncompressed_offset - extent.uncompressed_offset) as usize;
            let size = member.size as usize;
            output[end..start].fill(0);
            output[start..start + size]
                .copy_from_slice(&self.decoded[member.offset..member.offset + size]);
            end = start + size;
        }
        output[end..].fill(0);
        Ok(())
    }

    /// Fills `plain`, which has the decoded size of the source (ZRAN: any front part of it).
    fn decode_source(
        &mut self,
        layout: &Layout,
        source: &Source,
        compressed: &[u8],
        plain: &mut [u8],
    ) -> Result<()> {
        if source.is_zran() {
            let dictionary = layout.dictionary(source);
            let entry = Entry { bits: source.entry_bits, byte: source.entry_byte, dictionary };
            return self.codec.inflate_from(entry, compressed, plain);
        }
        let compressor = match source.is_compressed() {
            true => layout.compressor(),
            false => Compressor::None,
        };
        let stored = match layout.cipher().filter(|_| source.is_encrypted()) {
            Some(cipher) => {
                let known = (!source.is_compressed()).then_some(plain.len());
                decrypt(&mut self.decrypted, cipher, compressed, known)?
            }
            None => compressed,
        };
        self.codec.decompress(compressor, stored, plain)
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder::new()
    }
}

fn decrypt<'a>(
    scratch: &'a mut Vec<u8>,
    cipher: &Cipher,
    stored: &[u8],
    plain_size: Option<usize>,
) -> Result<&'a [u8]> {
    let object = room(scratch, stored.len());
    object.copy_from_slice(stored);
    let size = cipher.decrypt(object, plain_size)?;
    Ok(&object[..size])
}

/// The first `size` bytes of a buffer, grown in steps if it is smaller. Sizes are bounded by
/// `UNIT_COMPRESSED_MAX_BYTES` and `CHUNK_MAX_BYTES` when a layout is built.
fn room(buffer: &mut Vec<u8>, size: usize) -> &mut [u8] {
    if buffer.len() < size {
        buffer.resize(size.next_power_of_two().max(BLOCK_BYTES), 0);
    }
    &mut buffer[..size]
}

#[cfg(test)]
mod tests {
    use super::super::specimen::{IMAGES, Specimen};

    #[test]
    fn every_chunk_of_every_fixture_verifies() {
        for name in IMAGES {
            let image = Specimen::fixture(name);
            for blob in 0..image.bootstrap.blobs().len() {
                let space = image.address_space(blob);
                assert!(!space.is_empty());
                let layout = image.layout(blob);
                eprintln!(
                    "{name}: {} of {} chunks, {} units, {} bytes of layout",
                    layout.listed_count(),
                    layout.chunk_count(),
                    layout.unit_count(),
                    layout.memory_bytes()
                );
            }
        }
    }
}
