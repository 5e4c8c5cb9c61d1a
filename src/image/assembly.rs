//! Putting a [`Layout`] together: from a bootstrap, or from the layouts of two images that share
//! a blob.
//!
//! Refuses chunks that overlap, leave room where no chunk can be, or lie where the context table
//! says otherwise. Allocates in proportion to the listed chunks.

use super::blob_table::BlobRecord;
use super::bootstrap::Bootstrap;
use super::chunk_table::ChunkRecord;
use super::context::ContextTable;
use super::digest::Digest;
use super::entry::{ContextEntry, Place};
use super::layout::{Layout, Record, SharedUnit, Source, Traits};
use super::superblock::BLOCK_BYTES;
use crate::config::UNIT_OUTPUT_MAX_BYTES;
use crate::error::Result;
use std::sync::Arc;

/// One listed chunk on its way into a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Listed {
    index: u32,
    uncompressed_offset: u64,
    size: u32,
    digest: Digest,
    source: Source,
    /// Offset in the decoded form of the source.
    inside: u32,
}

impl Listed {
    fn end(&self) -> u64 {
        self.uncompressed_offset + u64::from(self.size).next_multiple_of(BLOCK_BYTES as u64)
    }
}

/// See [`Layout::build`].
pub(super) fn build(
    bootstrap: &Bootstrap,
    blob: &BlobRecord,
    context: Option<&ContextTable>,
) -> Result<Layout> {
    let needs_context = Layout::needs_context(blob);
    if needs_context && context.is_none() {
        return Err(malformed!("chunks of a BATCH or ZRAN blob are found by its context table"));
    }
    if context.is_some_and(|context| context.chunk_count() != blob.chunk_count) {
        return Err(malformed!("the context table is of another blob"));
    }
    let chunks = bootstrap.chunks_of(blob.index);
    let mut listed = Vec::with_capacity(chunks.len());
    for chunk in chunks {
        let located = match context {
            Some(context) => from_context(&chunk, context, blob),
            None => Ok(from_bootstrap(&chunk)),
        };
        listed.push(located.map_err(|error| error.context(format!("chunk {}", chunk.index)))?);
    }
    let traits = Traits {
        blob_id: blob.id.clone(),
        uncompressed_size: blob.uncompressed_size,
        chunk_count: blob.chunk_count,
        compressor: blob.compressor,
        digest_algorithm: blob.digest_algorithm,
        cipher: blob.cipher.clone(),
    };
    let dictionaries = match context.filter(|_| blob.is_zran()) {
        Some(context) => context.bytes().clone(),
        None => Arc::from([]),
    };
    assemble(traits, &listed, dictionaries, needs_context)
}

/// See [`Layout::merge_digests`].
pub(super) fn merge(left: &Layout, right: &Layout) -> Result<Layout> {
    if left.traits != right.traits {
        return Err(malformed!("two images disagree about its size, chunks, codecs or key"));
    }
    if left.dictionaries != right.dictionaries {
        return Err(malformed!("two images have different context tables of it"));
    }
    let mut listed = Vec::with_capacity(left.records.len().max(right.records.len()));
    let mut lefts = disassemble(left).peekable();
    let mut rights = disassemble(right).peekable();
    loop {
        let next = match (lefts.peek(), rights.peek()) {
            (Some(one), Some(other)) if one.index == other.index => {
                if one != other {
                    return Err(malformed!("two images disagree about chunk {}", one.index));
                }
                rights.next();
                lefts.next()
            }
            (Some(one), Some(other)) if other.index < one.index => rights.next(),
            (Some(_), _) => lefts.next(),
            (None, _) => rights.next(),
        };
        match next {
            Some(chunk) => listed.push(chunk),
            None => break,
        }
    }
    let shared = !left.units.is_empty() || !right.units.is_empty();
    assemble(left.traits.clone(), &listed, left.dictionaries.clone(), shared)
}

fn disassemble(layout: &Layout) -> impl Iterator<Item = Listed> {
    layout.records.iter().enumerate().map(|(position, record)| {
        let own = layout.units.is_empty();
        Listed {
            index: layout.index(position),
            uncompressed_offset: record.uncompressed_offset(),
            size: record.size(),
            digest: layout.digests[position],
            source: layout.source(if own { position as u32 } else { record.unit() }),
            inside: if own { 0 } else { record.inside() },
        }
    })
}

/// A chunk of a native blob: the chunk table has checked all of it.
fn from_bootstrap(chunk: &ChunkRecord) -> Listed {
    Listed {
        index: chunk.index.0,
        uncompressed_offset: chunk.uncompressed_offset,
        size: chunk.uncompressed_size,
        digest: chunk.digest,
        source: Source {
            compressed_offset: chunk.compressed_offset,
            compressed_size: chunk.compressed_size,
            decoded_size: chunk.uncompressed_size,
            flags: Source::storage(chunk.flags.is_compressed(), chunk.flags.is_encrypted()),
            ..Source::default()
        },
        inside: 0,
    }
}

/// A chunk located by the context table, which must agree with the chunk table.
fn from_context(chunk: &ChunkRecord, context: &ContextTable, blob: &BlobRecord) -> Result<Listed> {
    let entry = context.entry(chunk.index);
    let same = entry.uncompressed_offset == chunk.uncompressed_offset
        && entry.size == chunk.uncompressed_size;
    if !same {
        return Err(malformed!("bootstrap and context table put it in different places"));
    }
    let (source, inside) = locate(&entry, context);
    let listed = Listed { source, inside, ..from_bootstrap(chunk) };
    if !Layout::needs_context(blob) && listed != from_bootstrap(chunk) {
        return Err(malformed!("bootstrap and context table say it is stored differently"));
    }
    Ok(listed)
}

/// The source of a chunk and its offset in it. The context table has checked that both exist.
fn locate(entry: &ContextEntry, context: &ContextTable) -> (Source, u32) {
    const CHECKED: &str = "invariant: the context table has checked what its chunks point to";
    match entry.place {
        Place::Own { offset, size, compressed, encrypted } => {
            let source = Source {
                compressed_offset: offset,
                compressed_size: size,
                decoded_size: entry.size,
                flags: Source::storage(compressed, encrypted),
                ..Source::default()
            };
            (source, 0)
        }
        Place::Batch { offset, batch, inside, encrypted } => {
            let batch = context.batch(batch).expect(CHECKED);
            // Under 16 bytes nothing shrinks, and encryption pads.
            let padded = encrypted && batch.uncompressed_size < 16;
            let packed = batch.compressed_size != batch.uncompressed_size && !padded;
            let source = Source {
                compressed_offset: offset,
                compressed_size: batch.compressed_size,
                decoded_size: batch.uncompressed_size,
                flags: Source::storage(packed, encrypted) | Source::SHARED,
                ..Source::default()
            };
            (source, inside)
        }
        Place::Zran { context: number, inside } => {
            let zran = context.zran(number).expect(CHECKED);
            let dictionary = context.dictionary_range(&zran);
            let source = Source {
                compressed_offset: zran.input_offset,
                compressed_size: zran.input_size,
                decoded_size: zran.output_size,
                // The table is at most CONTEXT_TABLE_MAX_BYTES long.
                dictionary_offset: dictionary.start as u32,
                dictionary_size: dictionary.len() as u32,
                entry_byte: zran.entry_byte,
                entry_bits: zran.entry_bits,
                flags: Source::COMPRESSED | Source::ZRAN | Source::SHARED,
            };
            (source, inside)
        }
    }
}

/// Builds the arrays of a layout from chunks by ascending, distinct index.
fn assemble(
    traits: Traits,
    listed: &[Listed],
    dictionaries: Arc<[u8]>,
    shared: bool,
) -> Result<Layout> {
    let dense = listed.len() == traits.chunk_count as usize;
    let units = if shared { group(listed) } else { Vec::new() };
    let mut records = Vec::with_capacity(listed.len());
    if shared {
        for (number, unit) in units.iter().enumerate() {
            records.extend(listed[unit.first as usize..unit.end as usize].iter().map(|chunk| {
                let (start, inside) = (chunk.uncompressed_offset, chunk.inside);
                Record::member(start, chunk.size, number as u32, inside)
            }));
        }
    } else {
        let own =
            |chunk: &Listed| Record::own(chunk.uncompressed_offset, chunk.size, &chunk.source);
        records.extend(listed.iter().map(own));
    }
    let indexes = match dense {
        true => Vec::new(),
        false => listed.iter().map(|chunk| chunk.index).collect(),
    };
    let digests = listed.iter().map(|chunk| chunk.digest).collect();
    let layout = Layout { traits, records, digests, indexes, units, dictionaries };
    for position in 0..=layout.records.len() {
        layout.hole(position).check()?;
    }
    check_order(&layout)?;
    Ok(layout)
}

/// Makes one unit of neighbours with the same source, and cuts it where its output would be too
/// large to hold: the parts are then decoded one by one.
fn group(listed: &[Listed]) -> Vec<SharedUnit> {
    let mut units: Vec<SharedUnit> = Vec::new();
    let mut start = 0;
    for (position, chunk) in listed.iter().enumerate() {
        let fits = chunk.end().saturating_sub(start) <= UNIT_OUTPUT_MAX_BYTES as u64;
        match units.last_mut() {
            Some(unit) if unit.source == chunk.source && chunk.source.is_shared() && fits => {
                unit.end += 1;
            }
            _ => {
                let first = position as u32;
                units.push(SharedUnit { source: chunk.source, first, end: first + 1 });
                start = chunk.uncompressed_offset;
            }
        }
    }
    units
}

/// Units ascend in the blob file, as every builder writes them: whoever plans a fetch relies on
/// it. Units with one source, and ZRAN contexts, which share a byte or more, may overlap.
fn check_order(layout: &Layout) -> Result<()> {
    for unit in 1..layout.unit_count() {
        let (before, this) = (layout.source(unit - 1), layout.source(unit));
        let end = match this.is_zran() || before == this {
            true => before.compressed_offset,
            false => before.compressed_offset + u64::from(before.compressed_size),
        };
        if this.compressed_offset < end {
            let chunk = layout.unit(unit).chunks.start;
            return Err(malformed!("chunk {chunk} is stored before the end of its predecessor"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::codec::Compressor;
    use super::super::draft_tests::Draft;
    use super::super::identity::ChunkIndex;
    use super::*;
    use proptest::prelude::*;

    fn kinds() -> Vec<Draft> {
        let sizes = [5000, 1, 600, 65536, 20, 30, 4096, 8192];
        let native = Draft::new(&sizes);
        let second = Draft { version_2: true, ..native.clone() };
        let batch = Draft { batch: Some(4), ..second.clone() };
        let zran = Draft { zran_member: Some(1), ..second }.compressor(Compressor::Gzip);
        vec![native, batch, zran]
    }

    fn listing(draft: &Draft, listed: u8) -> Draft {
        let mut draft = draft.clone();
        for (index, chunk) in draft.chunks.iter_mut().enumerate() {
            chunk.1 = listed >> index & 1 != 0;
        }
        draft
    }

    fn chunk_at(layout: &Layout, byte: u64) -> u32 {
        let chunks = layout.chunks_in(byte..byte + 1);
        assert_eq!(chunks.len(), 1);
        chunks.start
    }

    proptest! {
        #[test]
        fn chunks_tile_the_address_space_whoever_is_listed(kind in 0..3usize, listed: u8) {
            let draft = listing(&kinds()[kind], listed);
            let layout = draft.build().layout(0);
            let mut end = 0;
            for index in 0..layout.chunk_count() {
                let chunk = layout.chunk(ChunkIndex(index));
                prop_assert_eq!(chunk.uncompressed_offset, end);
                prop_assert_eq!(chunk.digest.is_some(), draft.chunks[index as usize].1);
                prop_assert_eq!(chunk.digest.is_none(), chunk.unit == Layout::NO_UNIT);
                end += u64::from(chunk.padded_size());
                prop_assert_eq!(chunk_at(&layout, chunk.uncompressed_offset), index);
                prop_assert_eq!(chunk_at(&layout, end - 1), index);
                if chunk.digest.is_some() {
                    let unit = layout.unit(chunk.unit);
                    prop_assert!(unit.chunks.contains(&index));
                    let unit_end = unit.uncompressed_offset + u64::from(unit.output_size);
                    prop_assert!(unit.uncompressed_offset <= chunk.uncompressed_offset);
                    prop_assert!(unit_end >= end);
                }
            }
            prop_assert_eq!(end, layout.uncompressed_size());
            prop_assert_eq!(layout.chunks_in(0..u64::MAX), 0..layout.chunk_count());
            prop_assert!(layout.chunks_in(end..u64::MAX).is_empty());
        }

        #[test]
        fn merged_layouts_are_what_one_image_listing_both_would_have(
            kind in 0..3usize, left: u8, right: u8,
        ) {
            let draft = &kinds()[kind];
            let layout = |listed| listing(draft, listed).build().layout(0);
            let mut merged = layout(left);
            merged.merge_digests(&layout(right)).unwrap();
            let whole = layout(left | right);
            prop_assert_eq!(merged.records, whole.records);
            prop_assert_eq!(merged.digests, whole.digests);
            prop_assert_eq!(merged.indexes, whole.indexes);
            prop_assert_eq!(merged.units, whole.units);
        }
    }

    #[test]
    fn images_that_contradict_each_other_do_not_merge() {
        for draft in kinds() {
            let layout = draft.build().layout(0);
            let mut other = draft.build().layout(0);
            other.digests[2].0[0] ^= 1;
            let mut merged = layout.clone();
            let error = merged.merge_digests(&other).unwrap_err().to_string();
            assert!(error.contains("chunk 2") && error.contains(layout.blob_id().as_str()));
            assert_eq!(merged.digests, layout.digests, "nothing changed");
            other.traits.uncompressed_size += 4096;
            assert!(merged.merge_digests(&other).is_err());
        }
    }

    #[test]
    fn bytes_of_another_length_never_verify() {
        let mut layout = Draft::new(&[10]).build().layout(0);
        layout.digests[0] = layout.digest_algorithm().digest(b"short");
        assert!(!layout.verify(ChunkIndex(0), b"short"));
    }

    #[test]
    fn batch_and_zran_layouts_want_their_own_context_table() {
        for draft in &kinds()[1..] {
            let image = draft.build();
            assert!(Layout::build(&image.bootstrap, 0, None).is_err());
            let mut other = draft.clone();
            other.chunks[0].0.truncate(900);
            let context = other.build().context(0).unwrap();
            assert!(Layout::build(&image.bootstrap, 0, Some(&context)).is_err());
            other.chunks.pop();
            let context = other.build().context(0).unwrap();
            assert!(Layout::build(&image.bootstrap, 0, Some(&context)).is_err());
        }
    }

    #[test]
    fn units_whose_output_would_not_fit_a_buffer_are_cut() {
        // 5000 chunks of 100 bytes: 500 kB in one batch, 20 MB of address space.
        let sizes = vec![100; 5000];
        let draft = Draft { version_2: true, batch: Some(5000), ..Draft::new(&sizes) };
        let image = draft.build();
        let layout = image.layout(0);
        assert_eq!(layout.unit_count(), 2);
        for unit in 0..2 {
            assert!(layout.unit(unit).output_size as usize <= UNIT_OUTPUT_MAX_BYTES);
        }
        image.address_space(0);
    }
}
