//! The compression context table of a blob ("blob.meta"): where every chunk is stored.
//!
//! Needed only where the bootstrap's own chunk table does not say enough: for BATCH and ZRAN
//! blobs. A [`ContextTable`] that exists agrees with its blob record; its chunks tile the address
//! space without a gap; every batch, context and dictionary it points to is inside it, and every
//! extent is inside the blob's chunk data. Nothing in it is signed: what it leads to is verified
//! by digest, chunk by chunk.

use super::blob_table::{BlobFeatures, BlobRecord};
use super::codec::{Codec, Compressor};
use super::entry::{BatchContext, ContextEntry, Place, ZranContext};
use super::identity::ChunkIndex;
use super::little::{u32_at, u64_at};
use super::superblock::BLOCK_BYTES;
use crate::config::{CHUNK_MAX_BYTES, DEFLATE_DICTIONARY_MAX_BYTES, UNIT_COMPRESSED_MAX_BYTES};
use crate::error::Result;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of the header that stands behind the compressed table.
pub const HEADER_BYTES: usize = 4096;

const MAGIC: u32 = 0xb10b_b10b;
/// The second magic stands in the last four bytes.
const MAGIC_AGAIN_OFFSET: usize = 4092;

/// The context table of one blob, decompressed and checked.
#[derive(Clone, Debug)]
pub struct ContextTable {
    bytes: Arc<[u8]>,
    entry_bytes: usize,
    chunk_count: u32,
    batches: Range<usize>,
    zran: Range<usize>,
    dictionary: Range<usize>,
}

impl ContextTable {
    /// Parses what stands at `record.ci_offset`: `ci_compressed_size` bytes of table, then
    /// [`HEADER_BYTES`] of header. Both are in the blob itself, or in its meta blob if the blob is
    /// SEPARATE.
    pub fn parse(record: &BlobRecord, compressed_ci: &[u8], header: &[u8]) -> Result<Self> {
        parse(record, compressed_ci, header)
            .map_err(|error| error.context(format!("context table of blob {}", record.id)))
    }

    /// Number of chunks in the blob.
    pub fn chunk_count(&self) -> u32 {
        self.chunk_count
    }

    /// Where a chunk is.
    ///
    /// # Panics
    /// If there is no such chunk.
    pub fn entry(&self, index: ChunkIndex) -> ContextEntry {
        assert!(index.0 < self.chunk_count, "chunk {index} of {}", self.chunk_count);
        let start = index.0 as usize * self.entry_bytes;
        ContextEntry::read(&self.bytes[start..start + self.entry_bytes])
    }

    /// All chunks in order.
    pub fn entries(&self) -> impl Iterator<Item = ContextEntry> {
        (0..self.chunk_count).map(|index| self.entry(ChunkIndex(index)))
    }

    /// The batch with this number, if there is one.
    pub fn batch(&self, number: u32) -> Option<BatchContext> {
        let (records, _) = self.bytes[self.batches.clone()].as_chunks();
        records.get(number as usize).map(BatchContext::read)
    }

    /// The ZRAN context with this number, if there is one.
    pub fn zran(&self, number: u32) -> Option<ZranContext> {
        let (records, _) = self.bytes[self.zran.clone()].as_chunks();
        records.get(number as usize).map(ZranContext::read)
    }

    /// The decompressed table; `dictionary_range` is a part of it.
    pub(super) fn bytes(&self) -> &Arc<[u8]> {
        &self.bytes
    }

    /// Where the dictionary of a ZRAN context lies in `bytes`. The offset of an empty one means
    /// nothing, is not checked and may be anything.
    pub(super) fn dictionary_range(&self, context: &ZranContext) -> Range<usize> {
        if context.dictionary_size == 0 {
            return 0..0;
        }
        let start = self.dictionary.start + context.dictionary_offset as usize;
        start..start + context.dictionary_size as usize
    }

    fn check(&self, record: &BlobRecord) -> Result<()> {
        for number in 0..(self.zran.len() / ZranContext::BYTES) as u32 {
            let context = self.zran(number).expect("invariant: the number is in the table");
            check_zran(&context, record, self.dictionary.len() as u64)
                .map_err(|error| error.context(format!("ZRAN context {number}")))?;
        }
        let mut end = 0;
        for (index, entry) in self.entries().enumerate() {
            let checked = match entry.uncompressed_offset == end {
                true => self.check_entry(&entry, record),
                false => Err(malformed!("at {}, not {end}", entry.uncompressed_offset)),
            };
            checked.map_err(|error| error.context(format!("chunk {index}")))?;
            end += u64::from(entry.size).next_multiple_of(BLOCK_BYTES as u64);
        }
        if end != record.uncompressed_size {
            return Err(malformed!("chunks end at {end}, not {}", record.uncompressed_size));
        }
        Ok(())
    }

    fn check_entry(&self, entry: &ContextEntry, record: &BlobRecord) -> Result<()> {
        let stored = match entry.place {
            Place::Own { offset, size, .. } => (offset, size),
            Place::Batch { offset, batch, inside, .. } => {
                let context = self.batch(batch).ok_or_else(|| malformed!("no batch {batch}"))?;
                check_inside(inside, entry.size, context.uncompressed_size)?;
                if context.uncompressed_size as usize > CHUNK_MAX_BYTES {
                    return Err(malformed!("batch {batch} decodes to more than 16 MiB"));
                }
                (offset, context.compressed_size)
            }
            Place::Zran { context, inside } => {
                let context =
                    self.zran(context).ok_or_else(|| malformed!("no ZRAN context {context}"))?;
                return check_inside(inside, entry.size, context.output_size);
            }
        };
        if record.is_zran() {
            return Err(malformed!("a chunk of its own in a ZRAN blob"));
        }
        let (compressed, encrypted) = entry.place.storage();
        record.check_storage(compressed, encrypted)?;
        check_stored(stored.0, stored.1, record)
    }
}

fn parse(record: &BlobRecord, compressed_ci: &[u8], header: &[u8]) -> Result<ContextTable> {
    let header: [u8; HEADER_BYTES] = header
        .try_into()
        .map_err(|_| malformed!("a header of {} bytes, not {HEADER_BYTES}", header.len()))?;
    let header = open_header(record, header)?;
    if compressed_ci.len() as u64 != record.ci_compressed_size {
        return Err(malformed!(
            "{} bytes, the blob table says {}",
            compressed_ci.len(),
            record.ci_compressed_size
        ));
    }
    let entry_bytes = ContextEntry::bytes(record.features.has(BlobFeatures::CHUNK_INFO_V2));
    let entries_end = record.chunk_count as usize * entry_bytes;
    let (contexts, dictionary) = contexts(record, &header, entries_end)?;
    let (batches, zran) = match record.is_zran() {
        true => (0..0, contexts),
        false => (contexts, 0..0),
    };
    let bytes = decompress(record, compressed_ci)?;
    let chunk_count = record.chunk_count;
    let table = ContextTable { bytes, entry_bytes, chunk_count, batches, zran, dictionary };
    table.check(record)?;
    Ok(table)
}

/// Decrypts the header and holds it against the blob record. Features are not compared: a merge
/// of bootstraps changes them in the record only.
fn open_header(record: &BlobRecord, mut header: [u8; HEADER_BYTES]) -> Result<[u8; HEADER_BYTES]> {
    if let Some(cipher) = &record.cipher {
        cipher.decrypt(&mut header, Some(HEADER_BYTES))?;
    }
    if u32_at(&header, 0) != MAGIC || u32_at(&header, MAGIC_AGAIN_OFFSET) != MAGIC {
        return Err(malformed!("no magic at both ends of the header"));
    }
    let stated = [
        ("chunk count", u32_at(&header, 12).into(), u64::from(record.chunk_count)),
        ("offset", u64_at(&header, 16), record.ci_offset),
        ("compressed size", u64_at(&header, 24), record.ci_compressed_size),
        ("uncompressed size", u64_at(&header, 32), record.ci_uncompressed_size),
    ];
    for (field, header, table) in stated {
        if header != table {
            return Err(malformed!("{field} is {header} in the header, {table} in the blob table"));
        }
    }
    if Compressor::from_number(u32_at(&header, 8))? != record.ci_compressor {
        return Err(malformed!("header and blob table name different compressors"));
    }
    Ok(header)
}

/// Where contexts and dictionaries lie in the decompressed table.
fn contexts(
    record: &BlobRecord,
    header: &[u8; HEADER_BYTES],
    entries_end: usize,
) -> Result<(Range<usize>, Range<usize>)> {
    let size = record.ci_uncompressed_size;
    if !record.is_zran() && !record.is_batch() {
        let encrypted = record.cipher.is_some();
        return match size == entries_end as u64 || encrypted && size > entries_end as u64 {
            true => Ok((0..0, 0..0)),
            false => Err(malformed!("{size} bytes, {entries_end} for the chunks alone")),
        };
    }
    let (start, length) = (u64_at(header, 40), u64_at(header, 48));
    let count = u64::from(u32_at(header, 56));
    // `record.check` has bounded the size of the table: no sum below overflows after this.
    if start < entries_end as u64 || start > size || length > size - start {
        return Err(malformed!("contexts at {start}, {length} bytes, leave {size} bytes of table"));
    }
    let table_bytes = count * ZranContext::BYTES as u64;
    if table_bytes > length {
        return Err(malformed!("{count} contexts do not fit {length} bytes"));
    }
    let (start, middle) = (start as usize, (start + table_bytes) as usize);
    Ok((start..middle, middle..start + length as usize))
}

fn decompress(record: &BlobRecord, compressed: &[u8]) -> Result<Arc<[u8]>> {
    let size = record.ci_uncompressed_size as usize;
    let decrypted = match &record.cipher {
        Some(cipher) => {
            let mut object = compressed.to_vec();
            let known = (record.ci_compressor == Compressor::None).then_some(size);
            let length = cipher.decrypt(&mut object, known)?;
            object.truncate(length);
            Some(object)
        }
        None => None,
    };
    let stored = decrypted.as_deref().unwrap_or(compressed);
    // Made in place: a table can be large enough that a copy would hurt.
    let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, size).collect();
    let output = Arc::get_mut(&mut bytes).expect("invariant: nobody else has it yet");
    Codec::new().decompress(record.ci_compressor, stored, output)?;
    Ok(bytes)
}

fn check_inside(inside: u32, size: u32, decoded: u32) -> Result<()> {
    match inside.checked_add(size) {
        Some(end) if end <= decoded => Ok(()),
        _ => Err(malformed!("{size} bytes at {inside} of {decoded} decoded ones")),
    }
}

fn check_stored(offset: u64, size: u32, record: &BlobRecord) -> Result<()> {
    let fits = offset.checked_add(size.into()).is_some_and(|end| end <= record.data_end());
    if size == 0 || size as usize > UNIT_COMPRESSED_MAX_BYTES || !fits {
        return Err(malformed!(
            "stored at {offset}, {size} bytes long: chunk data ends at {}",
            record.data_end()
        ));
    }
    Ok(())
}

fn check_zran(context: &ZranContext, record: &BlobRecord, dictionaries: u64) -> Result<()> {
    check_stored(context.input_offset, context.input_size, record)?;
    if context.output_size as usize > CHUNK_MAX_BYTES {
        return Err(malformed!("{} bytes decoded, above 16 MiB", context.output_size));
    }
    let size = u64::from(context.dictionary_size);
    let end = context.dictionary_offset.checked_add(size);
    let fits = size == 0 || end.is_some_and(|end| end <= dictionaries);
    if size as usize > DEFLATE_DICTIONARY_MAX_BYTES || !fits || context.entry_bits > 7 {
        return Err(malformed!("its dictionary or its left-over bits are out of range"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::draft_tests::{Draft, put};
    use super::super::specimen_tests::{IMAGES, Specimen};
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn fixtures_agree_with_their_bootstraps() {
        for name in IMAGES {
            let image = Specimen::fixture(name);
            let context = image.context(0).unwrap();
            let layout = super::super::Layout::build(&image.bootstrap, 0, Some(&context));
            assert_eq!(layout.unwrap().chunk_count(), context.chunk_count());
        }
    }

    fn draft() -> Draft {
        let zran = Draft::new(&[5000, 100, 65536, 7]);
        let zran = Draft { version_2: true, zran_member: Some(2), ..zran };
        zran.compressor(Compressor::Gzip)
    }

    /// The table and the header as stored, of an image whose table is not compressed.
    fn parts(image: &Specimen) -> (Vec<u8>, Vec<u8>) {
        let record = &image.bootstrap.blobs()[0];
        let start = record.ci_offset as usize;
        let end = start + record.ci_compressed_size as usize;
        (image.metas[0][start..end].to_vec(), image.metas[0][end..end + HEADER_BYTES].to_vec())
    }

    #[test]
    fn header_that_contradicts_the_blob_table_is_refused() {
        let image = draft().build();
        let record = &image.bootstrap.blobs()[0];
        let (table, header) = parts(&image);
        ContextTable::parse(record, &table, &header).unwrap();
        for at in [0, 8, 12, 16, 24, 32, 40, 47, 48, 55, 4092] {
            let mut wrong = header.clone();
            wrong[at] ^= 1;
            assert!(ContextTable::parse(record, &table, &wrong).is_err(), "{at}");
        }
        assert!(ContextTable::parse(record, &table, &header[1..]).is_err());
        assert!(ContextTable::parse(record, &table[1..], &header).is_err());
    }

    #[test]
    fn entries_that_point_outside_are_refused() {
        let draft = Draft { compressor: Compressor::None, ..draft() };
        let image = draft.build();
        let record = &image.bootstrap.blobs()[0];
        let (table, header) = parts(&image);
        ContextTable::parse(record, &table, &header).unwrap();
        let contexts = 4 * 24;
        let fields: [(usize, &[u8]); 10] = [
            // The first chunk's block, its size, its flags, its context and its place in it.
            (0, &[1]),
            (4, &[0xff, 0xff]),
            (7, &[1]),
            (20, &[9]),
            (16, &[0xff, 0xff, 0xff]),
            // The first context's input, output, dictionary and bits.
            (contexts, &[0xff; 8]),
            (contexts + 24, &[0xff; 4]),
            (contexts + 28, &[0xff; 4]),
            (contexts + 32, &[1]),
            (contexts + 37, &[8]),
        ];
        for (at, field) in fields {
            let mut wrong = table.clone();
            put(&mut wrong, at, field);
            assert!(ContextTable::parse(record, &wrong, &header).is_err(), "{at}");
        }
    }

    #[test]
    fn empty_dictionary_has_no_place() {
        let draft = Draft { compressor: Compressor::None, ..draft() };
        let mut image = draft.build();
        // The offset of the first context's dictionary, whose size is 0.
        for offset in [1 << 20, u64::from(u32::MAX), u64::MAX] {
            put(&mut image.metas[0], 4 * 24 + 16, &offset.to_le_bytes());
            image.address_space(0);
        }
    }

    proptest! {
        #[test]
        fn damaged_tables_never_panic(
            flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..9),
        ) {
            let draft = Draft { compressor: Compressor::None, ..draft() };
            let image = draft.build();
            let (mut table, header) = parts(&image);
            for (at, value) in flips {
                let at = at.index(table.len());
                table[at] ^= value;
            }
            let record = &image.bootstrap.blobs()[0];
            if let Ok(context) = ContextTable::parse(record, &table, &header) {
                let _ = super::super::Layout::build(&image.bootstrap, 0, Some(&context));
            }
        }
    }
}
