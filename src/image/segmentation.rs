//! How a blob's address space is cut into segments, the files behind the fanotify door.
//!
//! Segment `k` of a blob holds the listed chunks that *start* in `[k << shift, (k + 1) << shift)`.
//! So where a chunk lies depends on the chunk and the shift alone: in file `k`, at its offset in
//! the address space less `k << shift`. A chunk that starts near the end of a segment reaches
//! beyond `1 << shift`; the next file then has a hole at its front that nobody reads, like any
//! other that chunks nobody lists leave. A segment without a listed chunk does not exist.
//!
//! The *recipe* of a segment is a digest of everything that decides which bytes are right in it.
//! Images that list the same chunks have the same recipe and share the file; where an upper layer
//! hid a file they differ and do not. Nothing here depends on the order images are seen in.
//!
//! Worked example, shift 16 and three chunks of 65,000 bytes: they start at 0, 65,536 and 131,072,
//! so each is alone in a file of 65,536 bytes. Were the first 70,000 bytes long, the second would
//! start at 73,728: in segment 1, at offset 8,192.

use super::bootstrap::Bootstrap;
use super::chunk_table::ChunkRecord;
use super::digest::DigestAlgorithm;
use super::identity::ChunkIndex;
use super::superblock::BLOCK_BYTES;
use super::{BlobFeatures, BlobRecord};
use crate::config::{
    DEVICES_PER_IMAGE_MAX, SEGMENT_SHARED_SHIFT_MIN, SEGMENT_SHIFT_MAX, SEGMENT_SHIFT_MIN,
};
use crate::error::Result;
use std::fmt;
use std::ops::Range;

/// What decides the bytes of a segment, in 16 bytes: shift, and of each of its listed chunks the
/// index, offset, size and digest.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Recipe(pub [u8; 16]);

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Recipe({self})")
    }
}

/// One segment of a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentPlan {
    /// Its number: chunks that start in `[number << shift, (number + 1) << shift)` are in it.
    pub number: u32,
    /// Offset in the address space of the file's first byte.
    pub base: u64,
    /// From its first listed chunk to behind its last; the bootstrap may not list all between.
    pub chunks: Range<u32>,
    /// Bytes of the complete file: to the padded end of its last listed chunk.
    pub size: u64,
    /// Which bytes may be in it.
    pub recipe: Recipe,
}

impl SegmentPlan {
    /// The name of its file, and of its device: up to 41 characters, no other bytes of the blob
    /// may be under it.
    pub fn file_name(&self) -> String {
        format!("{:x}-{}", self.number, self.recipe)
    }
}

/// The segments of one blob as one image sees it: 32 bytes for each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segmentation {
    shift: u32,
    /// By ascending number, hence by ascending chunk.
    segments: Vec<Segment>,
}

/// A [`SegmentPlan`] in little room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    number: u32,
    first_chunk: u32,
    end_chunk: u32,
    /// Below `2^SEGMENT_SHIFT_MAX` and one chunk.
    size: u32,
    recipe: Recipe,
}

const _: () = assert!(size_of::<Segment>() == 32);

impl Segmentation {
    /// Cuts every blob of an image, in the order of the blob table.
    ///
    /// `Malformed` where chunks overlap or are out of order, `Unsupported` if the image needs more
    /// devices than EROFS has.
    pub fn of_image(bootstrap: &Bootstrap) -> Result<Vec<Segmentation>> {
        let growth = find_growth(bootstrap)?;
        let blobs = bootstrap.blobs().iter();
        blobs
            .map(|blob| {
                Segmentation::cut(bootstrap, blob, grown(blob, growth))
                    .map_err(|error| error.context(format!("blob {}", blob.id)))
            })
            .collect()
    }

    /// Base two logarithm of the address space a segment's chunks start in.
    pub fn shift(&self) -> u32 {
        self.shift
    }

    /// How many segments exist.
    pub fn count(&self) -> u32 {
        // At most DEVICES_PER_IMAGE_MAX.
        self.segments.len() as u32
    }

    /// The segment at a place among those that exist, counted from 0.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn segment(&self, place: u32) -> SegmentPlan {
        self.plan(&self.segments[place as usize])
    }

    /// All segments, ascending.
    pub fn segments(&self) -> impl ExactSizeIterator<Item = SegmentPlan> {
        self.segments.iter().map(|segment| self.plan(segment))
    }

    /// The place of the segment that has a listed chunk. A chunk the image does not list has no
    /// place, or that of its neighbours.
    pub fn place_of(&self, chunk: ChunkIndex) -> Option<u32> {
        let behind = self.segments.partition_point(|segment| segment.first_chunk <= chunk.0);
        let place = behind.checked_sub(1)?;
        (chunk.0 < self.segments[place].end_chunk).then_some(place as u32)
    }

    /// How many segments begin before a chunk.
    pub fn places_before(&self, chunk: ChunkIndex) -> u32 {
        self.segments.partition_point(|segment| segment.first_chunk < chunk.0) as u32
    }

    /// The place of the segment with a number.
    pub fn place_of_number(&self, number: u32) -> Option<u32> {
        let place = self.segments.binary_search_by_key(&number, |segment| segment.number);
        place.ok().map(|place| place as u32)
    }

    /// The place of the segment for chunks that start at `offset` of the address space.
    pub fn place_at(&self, offset: u64) -> Option<u32> {
        self.place_of_number(u32::try_from(offset >> self.shift).ok()?)
    }

    /// The places of the segments whose files have a part of a range of the address space.
    pub fn places_within(&self, range: &Range<u64>) -> Range<u32> {
        let base = |segment: &Segment| u64::from(segment.number) << self.shift;
        // Chunks do not overlap: files end in the order in which they begin.
        let ends_before =
            |segment: &Segment| base(segment) + u64::from(segment.size) <= range.start;
        let first = self.segments.partition_point(ends_before);
        let end = self.segments.partition_point(|segment| base(segment) < range.end);
        first as u32..end as u32
    }

    /// Bytes this occupies.
    pub fn memory_bytes(&self) -> usize {
        self.segments.capacity() * size_of::<Segment>()
    }

    fn plan(&self, segment: &Segment) -> SegmentPlan {
        SegmentPlan {
            number: segment.number,
            base: u64::from(segment.number) << self.shift,
            chunks: segment.first_chunk..segment.end_chunk,
            size: segment.size.into(),
            recipe: segment.recipe,
        }
    }

    fn cut(bootstrap: &Bootstrap, blob: &BlobRecord, shift: u32) -> Result<Segmentation> {
        let mut segments = Vec::with_capacity(count_segments(bootstrap, blob, shift));
        let mut open: Option<Growing> = None;
        let mut end = 0;
        for chunk in bootstrap.chunks_of(blob.index) {
            if chunk.uncompressed_offset < end {
                return Err(malformed!("chunk {} starts before its predecessor ends", chunk.index));
            }
            end = chunk.padded_end();
            let number = number_of(&chunk, shift);
            match &mut open {
                Some(growing) if growing.number == number => growing.add(&chunk),
                _ => {
                    let growing = Growing::start(&chunk, shift, blob.digest_algorithm);
                    segments.extend(open.replace(growing).map(Growing::finish));
                }
            }
        }
        segments.extend(open.map(Growing::finish));
        Ok(Segmentation { shift, segments })
    }
}

/// The shift of a blob in an image whose devices need no growth.
///
/// `shift` of the smallest power of two `s`, at least 64 KiB, with `s * s >= 32 * size`: files and
/// their number grow alike. 64 KiB up to 128 MiB, 256 KiB up to 2 GiB, 1 MiB up to 32 GiB. Where
/// several chunks are decoded together a segment has room for what one unit decodes to, 2 MiB.
pub fn natural_shift(blob: &BlobRecord) -> u32 {
    // At most 16 TiB: five more bits fit.
    let wanted = (blob.uncompressed_size * 32).next_power_of_two().ilog2().div_ceil(2);
    let shared = BlobFeatures::ZRAN | BlobFeatures::BATCH;
    let least = match blob.features.0 & shared {
        0 => SEGMENT_SHIFT_MIN,
        _ => SEGMENT_SHARED_SHIFT_MIN,
    };
    wanted.clamp(least, SEGMENT_SHIFT_MAX)
}

fn grown(blob: &BlobRecord, growth: u32) -> u32 {
    (natural_shift(blob) + growth).min(SEGMENT_SHIFT_MAX)
}

/// How much all shifts must grow until the devices of the image are few enough.
fn find_growth(bootstrap: &Bootstrap) -> Result<u32> {
    let devices = |growth| -> usize {
        let blobs = bootstrap.blobs().iter();
        blobs.map(|blob| count_segments(bootstrap, blob, grown(blob, growth))).sum()
    };
    let growths = 0..=SEGMENT_SHIFT_MAX - SEGMENT_SHIFT_MIN;
    let fits = growths.clone().find(|&growth| devices(growth) <= DEVICES_PER_IMAGE_MAX);
    fits.ok_or_else(|| {
        unsupported!(
            "the image needs {} devices even with segments of {} MiB, EROFS has \
             {DEVICES_PER_IMAGE_MAX}: split the image, or serve it through the cachefiles door",
            devices(*growths.end()),
            1 << (SEGMENT_SHIFT_MAX - 20)
        )
    })
}

fn count_segments(bootstrap: &Bootstrap, blob: &BlobRecord, shift: u32) -> usize {
    let mut before = None;
    let starts_one = |chunk: &ChunkRecord| {
        before.replace(number_of(chunk, shift)) != Some(number_of(chunk, shift))
    };
    bootstrap.chunks_of(blob.index).filter(starts_one).count()
}

/// Address spaces end at 16 TiB: with shifts of 16 and more, 28 bits.
fn number_of(chunk: &ChunkRecord, shift: u32) -> u32 {
    (chunk.uncompressed_offset >> shift) as u32
}

impl ChunkRecord {
    /// Where the next chunk may start.
    pub(super) fn padded_end(&self) -> u64 {
        let size = u64::from(self.uncompressed_size);
        self.uncompressed_offset + size.next_multiple_of(BLOCK_BYTES as u64)
    }
}

/// A segment while its chunks are met.
struct Growing {
    number: u32,
    base: u64,
    chunks: Range<u32>,
    end: u64,
    recipe: blake3::Hasher,
}

impl Growing {
    fn start(chunk: &ChunkRecord, shift: u32, algorithm: DigestAlgorithm) -> Self {
        let number = number_of(chunk, shift);
        let mut recipe = blake3::Hasher::new();
        // The number in front is that of this list of fields.
        let algorithm = match algorithm {
            DigestAlgorithm::Blake3 => 0,
            DigestAlgorithm::Sha256 => 1,
        };
        recipe.update(b"segment recipe 1").update(&[shift as u8, algorithm]);
        let mut growing = Growing {
            number,
            base: u64::from(number) << shift,
            chunks: chunk.index.0..chunk.index.0,
            end: 0,
            recipe,
        };
        growing.add(chunk);
        growing
    }

    fn add(&mut self, chunk: &ChunkRecord) {
        let mut fields = [0; 48];
        fields[..4].copy_from_slice(&chunk.index.0.to_le_bytes());
        fields[4..12].copy_from_slice(&chunk.uncompressed_offset.to_le_bytes());
        fields[12..16].copy_from_slice(&chunk.uncompressed_size.to_le_bytes());
        fields[16..].copy_from_slice(&chunk.digest.0);
        self.recipe.update(&fields);
        self.chunks.end = chunk.index.0 + 1;
        self.end = chunk.padded_end();
    }

    fn finish(self) -> Segment {
        let mut recipe = [0; 16];
        recipe.copy_from_slice(&self.recipe.finalize().as_bytes()[..16]);
        Segment {
            number: self.number,
            first_chunk: self.chunks.start,
            end_chunk: self.chunks.end,
            size: (self.end - self.base) as u32,
            recipe: Recipe(recipe),
        }
    }
}
