//! A layer that stays as it is: a tar.gz whose chunks are found by entering its stream.
//!
//! Writes the small blob with the layer's context table (version 2): chunks, then contexts, then
//! the contexts' dictionaries. A context begins at an entry of the index and reaches as far as the
//! last chunk that begins before the next entry; entries no chunk needs are left out.

use super::chunks::{Chunk, Chunks};
use super::gzip_index::{Border, Entry, GzipIndex};
use super::options::Options;
use super::scribe::{BlobFile, Finished, Scribe, blank_record};
use crate::config::{CHUNK_MAX_BYTES, CONTEXT_TABLE_MAX_BYTES, UNIT_COMPRESSED_MAX_BYTES};
use crate::error::Result;
use crate::image::blob_table::BlobFeatures;
use crate::image::entry::{ContextEntry, Place, ZranContext};
use crate::image::{BlobId, BlobRecord, Compressor, Digest};
use std::io::{Read, Seek, SeekFrom, Write};

/// A layer's record and its context blob.
pub(super) struct Indexed {
    pub(super) record: BlobRecord,
    pub(super) meta: Finished,
}

/// A chunk of the layer and the context it is in.
struct Located {
    context: u32,
    inside: u32,
    /// Where its stored bytes roughly are.
    hint: (u64, u32),
}

/// The contexts of a layer, with the entries they begin at, and its chunks, in order.
#[derive(Default)]
struct Places {
    contexts: Vec<(ZranContext, Entry)>,
    chunks: Vec<Located>,
    dictionary_bytes: u64,
}

/// Writes the context table of a layer named `id`, of which the scribe has made the chunks from
/// `first` on.
pub(super) fn write(
    options: &Options,
    id: BlobId,
    index: &mut GzipIndex,
    scribe: &Scribe<'_>,
    chunks: &mut Chunks,
    mut file: BlobFile,
) -> Result<Indexed> {
    let first = chunks.len() - scribe.chunk_count() as usize;
    let mut places = Places::default();
    for (at, &place) in scribe.places.iter().enumerate() {
        let located = places.locate(index, place, chunks.chunk((first + at) as u32))?;
        chunks.set_stored(first + at, located.hint);
        places.chunks.push(located);
    }
    let (table, entries_end) = places.table(chunks.since(first));
    let size = table.len() as u64 + places.dictionary_bytes;
    if size > CONTEXT_TABLE_MAX_BYTES as u64 {
        return Err(unsupported!("a context table of {size} bytes: convert the layer instead"));
    }
    let mut record = BlobRecord {
        id,
        chunk_count: scribe.chunk_count(),
        uncompressed_size: scribe.space_bytes(),
        compressed_size: index.borders.last().map_or(0, |border| border.1),
        compressor: Compressor::Gzip,
        features: BlobFeatures(FEATURES),
        ..blank_record(options)
    };
    let windows = &mut index.windows.file;
    let copy = |out: &mut dyn Write| {
        out.write_all(&table)?;
        for (_, entry) in &places.contexts {
            windows.seek(SeekFrom::Start(entry.window_offset))?;
            std::io::copy(&mut windows.take(entry.window_size.into()), out)?;
        }
        Ok(())
    };
    let area = (entries_end, size - entries_end, places.contexts.len() as u32);
    file.stream_context_table(&mut record, size, copy, area)?;
    let meta = file.finish()?;
    record.meta_digest = Some(Digest::parse(meta.id.as_str())?);
    record.meta_size = meta.size_bytes;
    Ok(Indexed { record, meta })
}

const FEATURES: u32 = BlobFeatures::ALIGNED
    | BlobFeatures::CAP_TAR_TOC
    | BlobFeatures::CHUNK_INFO_V2
    | BlobFeatures::ZRAN
    | BlobFeatures::SEPARATE;

impl Places {
    /// Finds the context of a chunk that is at `place` of the plain layer. Places ascend.
    fn locate(&mut self, index: &GzipIndex, place: u64, chunk: &Chunk) -> Result<Located> {
        let behind = index.entries.partition_point(|entry| entry.plain_offset <= place);
        let entry = behind.checked_sub(1).map(|at| index.entries[at]);
        let entry = entry.ok_or_else(|| malformed!("file data before the start of the layer"))?;
        let stored_end = stored_after(&index.borders, place + u64::from(chunk.uncompressed_size));
        let output = place + u64::from(chunk.uncompressed_size) - entry.plain_offset;
        let input = stored_end - entry.stored_offset;
        if output > CHUNK_MAX_BYTES as u64 || input > UNIT_COMPRESSED_MAX_BYTES as u64 {
            return Err(unsupported!(
                "the layer's gzip stream can be entered too rarely (byte {place} of its tar is in \
                 {output} bytes, stored in {input}): convert the layer instead"
            ));
        }
        if self.contexts.last().is_none_or(|(_, last)| *last != entry) {
            self.contexts.push((open(&entry, self.dictionary_bytes), entry));
            self.dictionary_bytes += u64::from(entry.window_size);
        }
        let number = self.contexts.len() - 1;
        let context = &mut self.contexts[number].0;
        context.output_size = context.output_size.max(output as u32);
        context.input_size = context.input_size.max(input as u32);
        let start = stored_before(&index.borders, place).max(entry.stored_offset);
        let hint = (start, (stored_end - start) as u32 & 0xff_ffff);
        let inside = (place - entry.plain_offset) as u32;
        Ok(Located { context: number as u32, inside, hint })
    }

    /// The table without its dictionaries, and where its chunks end.
    fn table(&self, chunks: &[Chunk]) -> (Vec<u8>, u64) {
        let mut table = Vec::new();
        for (chunk, place) in chunks.iter().zip(&self.chunks) {
            let entry = ContextEntry {
                uncompressed_offset: chunk.uncompressed_offset,
                size: chunk.uncompressed_size,
                place: Place::Zran { context: place.context, inside: place.inside },
            };
            table.extend(entry.to_v2(place.hint));
        }
        let entries_end = table.len() as u64;
        table.extend(self.contexts.iter().flat_map(|(context, _)| context.to_bytes()));
        (table, entries_end)
    }
}

fn open(entry: &Entry, dictionary_offset: u64) -> ZranContext {
    ZranContext {
        input_offset: entry.stored_offset,
        input_size: 0,
        output_offset: entry.plain_offset,
        output_size: 0,
        dictionary_offset,
        dictionary_size: entry.window_size,
        entry_byte: entry.byte,
        entry_bits: entry.bits,
    }
}

/// The stored offset by which all plain bytes before `end` have been inflated.
fn stored_after(borders: &[Border], end: u64) -> u64 {
    let at = borders.partition_point(|border| border.0 < end);
    borders.get(at).or(borders.last()).map_or(0, |border| border.1)
}

/// A stored offset before which no byte from `place` on is inflated.
fn stored_before(borders: &[Border], place: u64) -> u64 {
    let behind = borders.partition_point(|border| border.0 <= place);
    behind.checked_sub(1).map_or(0, |at| borders[at].1)
}
