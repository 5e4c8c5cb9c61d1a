//! A layer that stays as it is: a tar.gz whose chunks are found by entering its stream.
//!
//! Writes the small blob with the layer's context table (version 2): chunks, then contexts, then
//! the contexts' dictionaries. A context begins at an entry of the index and reaches as far as the
//! last chunk that begins before the next entry; entries no chunk needs are left out.

use super::chunks::Chunks;
use super::gzip_index::{Border, Entry, GzipIndex};
use super::options::Options;
use super::scribe::{BlobFile, Scribe, blank_record};
use crate::config::{CHUNK_MAX_BYTES, CONTEXT_TABLE_MAX_BYTES, UNIT_COMPRESSED_MAX_BYTES};
use crate::error::{Error, Result};
use crate::image::blob_table::BlobFeatures;
use crate::image::entry::{ContextEntry, Place, ZranContext};
use crate::image::{BlobId, BlobRecord, Compressor, Digest};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

/// A layer's record and its context blob.
pub(super) struct Indexed {
    pub(super) record: BlobRecord,
    pub(super) meta: (BlobId, PathBuf, u64),
}

/// A chunk of the layer and the context it is in.
struct Located {
    context: u32,
    inside: u32,
    /// Where its stored bytes roughly are.
    hint: (u64, u32),
}

/// Writes the context table of a layer named `id`, of which the scribe has made chunks.
pub(super) fn write(
    options: &Options,
    id: BlobId,
    index: &mut GzipIndex,
    scribe: &Scribe<'_>,
    chunks: &mut Chunks,
    first: usize,
    mut file: BlobFile,
) -> Result<Indexed> {
    let sizes: Vec<u32> = chunks.since(first).iter().map(|chunk| chunk.uncompressed_size).collect();
    let (contexts, located) = locate(index, &scribe.places, &sizes)?;
    for (at, place) in located.iter().enumerate() {
        chunks.set_stored(first + at, place.hint);
    }
    let mut table = Vec::new();
    for (chunk, place) in chunks.since(first).iter().zip(&located) {
        let entry = ContextEntry {
            uncompressed_offset: chunk.uncompressed_offset,
            size: chunk.uncompressed_size,
            place: Place::Zran { context: place.context, inside: place.inside },
        };
        table.extend(entry.to_v2(place.hint));
    }
    let entries_end = table.len() as u64;
    table.extend(contexts.iter().flat_map(|(context, _)| context.to_bytes()));
    let dictionaries: u64 = contexts.iter().map(|(_, entry)| u64::from(entry.window_size)).sum();
    let size = table.len() as u64 + dictionaries;
    if size > CONTEXT_TABLE_MAX_BYTES as u64 {
        return Err(unsupported!("a context table of {size} bytes: convert the layer instead"));
    }
    let stored_end = index.borders.last().map_or(0, |border| border.1);
    let mut record = BlobRecord {
        id,
        chunk_count: scribe.chunk_count(),
        uncompressed_size: scribe.space_bytes(),
        compressed_size: stored_end,
        compressor: Compressor::Gzip,
        features: BlobFeatures(
            BlobFeatures::ALIGNED
                | BlobFeatures::CAP_TAR_TOC
                | BlobFeatures::CHUNK_INFO_V2
                | BlobFeatures::ZRAN
                | BlobFeatures::SEPARATE,
        ),
        ..blank_record(options)
    };
    let windows = &mut index.windows.file;
    let copy = |out: &mut dyn Write| {
        out.write_all(&table)?;
        for (_, entry) in &contexts {
            windows.seek(SeekFrom::Start(entry.window_offset))?;
            std::io::copy(&mut windows.take(entry.window_size.into()), out)?;
        }
        Ok(())
    };
    let area = (entries_end, size - entries_end, contexts.len() as u32);
    file.stream_context_table(&mut record, size, copy, area)?;
    let meta_size = file.size();
    let (meta_id, path) = file.finish()?;
    record.meta_digest = Some(Digest::parse(meta_id.as_str())?);
    record.meta_size = meta_size;
    Ok(Indexed { record, meta: (meta_id, path, meta_size) })
}

/// Finds the context of each chunk. `places`: where each is in the plain layer, ascending.
fn locate(
    index: &GzipIndex,
    places: &[u64],
    sizes: &[u32],
) -> Result<(Vec<(ZranContext, Entry)>, Vec<Located>)> {
    let mut contexts: Vec<(ZranContext, Entry)> = Vec::new();
    let mut located = Vec::with_capacity(places.len());
    let mut dictionary_offset = 0;
    for (&place, &size) in places.iter().zip(sizes) {
        let behind = index.entries.partition_point(|entry| entry.plain_offset <= place);
        let entry = *index
            .entries
            .get(behind.wrapping_sub(1))
            .ok_or_else(|| malformed!("file data before the start of the layer"))?;
        let end = place + u64::from(size);
        if contexts.last().is_none_or(|(_, last)| *last != entry) {
            contexts.push((open(&entry, dictionary_offset), entry));
            dictionary_offset += u64::from(entry.window_size);
        }
        let number = contexts.len() as u32 - 1;
        let (context, _) = contexts.last_mut().ok_or(Error::Shutdown)?;
        let stored_end = stored_after(&index.borders, end);
        let output = end - entry.plain_offset;
        let input = stored_end - entry.stored_offset;
        if output > CHUNK_MAX_BYTES as u64 || input > UNIT_COMPRESSED_MAX_BYTES as u64 {
            return Err(unsupported!(
                "the layer's gzip stream can be entered too rarely ({output} bytes apart at byte \
                 {place} of its tar): convert the layer instead, or choose smaller chunks"
            ));
        }
        context.output_size = context.output_size.max(output as u32);
        context.input_size = context.input_size.max(input as u32);
        let start = stored_before(&index.borders, place).max(entry.stored_offset);
        let hint = (start, (stored_end - start) as u32 & 0xff_ffff);
        let inside = (place - entry.plain_offset) as u32;
        located.push(Located { context: number, inside, hint });
    }
    Ok((contexts, located))
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
