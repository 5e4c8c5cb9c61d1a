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
    use super::super::codec::Compressor;
    use super::super::draft_tests::Draft;
    use super::super::identity::ChunkIndex;
    use super::super::specimen_tests::{IMAGES, Specimen};
    use super::*;

    const SIZES: [usize; 12] = [1, 15, 16, 17, 999, 4096, 65536, 5, 700, 4097, 2, 9];

    fn compressors() -> [Compressor; 4] {
        [Compressor::None, Compressor::Lz4Block, Compressor::Gzip, Compressor::Zstd]
    }

    /// Decodes and verifies everything and compares it with what the image was made of.
    fn assert_round_trip(draft: &Draft) {
        let image = draft.build();
        let space = image.address_space(0);
        image.context(0).expect("the context table is right, needed or not");
        let mut start = 0;
        for (data, listed) in &draft.chunks {
            let found = &space[start..start + data.len()];
            let blank = found.iter().all(|&byte| byte == 0);
            assert!(if *listed { found == data } else { blank });
            start += data.len().next_multiple_of(4096);
        }
        assert_eq!(start, space.len());
    }

    fn drafts() -> Vec<Draft> {
        let mut drafts = Vec::new();
        for compressor in compressors() {
            let plain = Draft::new(&SIZES).compressor(compressor);
            let second = Draft { version_2: true, ..plain.clone() };
            let batch = Draft { batch: Some(3), ..second.clone() };
            let key = Some((std::array::from_fn(|at| at as u8), [9; 16]));
            let sealed_batch = Draft { key, ..batch.clone() };
            drafts.extend([plain, Draft { key, ..second.clone() }, second, batch, sealed_batch]);
        }
        let zran = Draft { version_2: true, zran_member: Some(2), ..Draft::new(&SIZES) };
        drafts.push(zran.compressor(Compressor::Gzip));
        drafts
    }

    #[test]
    fn every_chunk_of_every_fixture_verifies() {
        for name in IMAGES {
            let image = Specimen::fixture(name);
            for blob in 0..image.bootstrap.blobs().len() {
                assert!(!image.address_space(blob).is_empty());
            }
        }
    }

    #[test]
    fn zran_fixture_enters_streams_between_bits_with_dictionaries() {
        let layout = Specimen::fixture("zran").layout(0);
        let sources: Vec<_> = (0..layout.unit_count()).map(|unit| layout.source(unit)).collect();
        assert!(sources.iter().any(|source| source.entry_bits > 0 && source.dictionary_size > 0));
    }

    #[test]
    fn every_kind_of_blob_decodes_to_what_it_was_made_of() {
        for draft in drafts() {
            assert_round_trip(&draft);
        }
    }

    #[test]
    fn chunks_nobody_lists_are_left_zero_and_never_verify() {
        for mut draft in drafts() {
            for unlisted in [0, 3, 4, 8, 11] {
                draft.chunks[unlisted].1 = false;
            }
            assert_round_trip(&draft);
        }
    }

    #[test]
    fn wrong_length_or_bytes_are_refused_or_fail_to_verify() {
        let mut decoder = Decoder::new();
        for draft in drafts() {
            let image = draft.build();
            let layout = image.layout(0);
            for number in 0..layout.unit_count() {
                let unit = layout.unit(number);
                let start = unit.compressed_offset as usize;
                let end = start + unit.compressed_size as usize;
                let stored = &image.blobs[0][start..end];
                let mut output = vec![0; unit.output_size as usize];
                let short = &stored[1..];
                assert!(decoder.decode_unit(&layout, number, short, &mut output).is_err());
                for at in 0..stored.len().min(64) {
                    let mut wrong = stored.to_vec();
                    wrong[at] ^= 1 << (at % 8);
                    // Some flips change nothing a reader sees: a gzip time stamp, a tar header.
                    if decoder.decode_unit(&layout, number, &wrong, &mut output).is_ok() {
                        assert_verified_is_right(&layout, &draft, &unit, &output);
                    }
                }
            }
        }
    }

    /// Whatever verifies is what the image was made of.
    fn assert_verified_is_right(layout: &Layout, draft: &Draft, unit: &Unit, output: &[u8]) {
        for index in unit.chunks.clone() {
            let chunk = layout.chunk(ChunkIndex(index));
            let at = (chunk.uncompressed_offset - unit.uncompressed_offset) as usize;
            let bytes = &output[at..at + chunk.size as usize];
            let same = bytes == draft.chunks[index as usize].0;
            assert_eq!(layout.verify(ChunkIndex(index), bytes), same);
        }
    }

    #[test]
    fn output_that_would_be_longer_than_declared_is_refused() {
        let mut decoder = Decoder::new();
        for compressor in compressors() {
            // A chunk that says 5000 bytes and is stored as 6000.
            let image = Draft::new(&[5000]).compressor(compressor).build();
            let layout = image.layout(0);
            let stored = super::super::draft_tests::pack(compressor, &[3; 6000]).0;
            let mut output = [0; 5000];
            let source = layout.source(0);
            let result = decoder.decode_source(&layout, &source, &stored, &mut output);
            assert!(result.is_err(), "{compressor}");
        }
    }
}
