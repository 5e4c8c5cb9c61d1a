//! How blobs are cut, and which changes of an image change a segment's name.

use super::draft_tests::{Draft, put};
use super::segmentation::{Segmentation, natural_shift};
use super::specimen_tests::{IMAGES, Specimen};
use super::{BlobRecord, Bootstrap, ChunkIndex, Compressor, DigestAlgorithm, Layout};
use crate::config::MIB;
use crate::error::Error;
use proptest::prelude::*;

const GIB: u64 = 1024 * MIB as u64;

fn cut(draft: &Draft) -> (Layout, Segmentation) {
    let image = draft.build();
    let mut cut = Segmentation::of_image(&image.bootstrap).unwrap();
    assert_eq!(cut.len(), 1);
    (image.layout(0), cut.remove(0))
}

/// A bootstrap whose one blob has `size` bytes of address space and lists these chunks: index,
/// offset and size.
pub(crate) fn listing(size: u64, chunks: impl Iterator<Item = (u32, u64, u32)>) -> Bootstrap {
    let mut bytes = Draft::new(&[1]).write().0;
    let table = bytes.len();
    for (index, offset, size) in chunks {
        let mut record = [0; 80];
        put(&mut record, 0, &DigestAlgorithm::Blake3.digest(&index.to_le_bytes()).0);
        put(&mut record, 36, &1u32.to_le_bytes());
        put(&mut record, 40, &1u32.to_le_bytes());
        put(&mut record, 44, &size.to_le_bytes());
        put(&mut record, 56, &offset.to_le_bytes());
        put(&mut record, 72, &index.to_le_bytes());
        bytes.extend(record);
    }
    let table_size = (bytes.len() - table) as u64;
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    put(&mut bytes, 1152 + 24, &(table as u64).to_le_bytes());
    put(&mut bytes, 1152 + 32, &table_size.to_le_bytes());
    put(&mut bytes, 1408 + 64, &((size / 4096) as u32).to_le_bytes());
    let count = (size / 4096).min(1 << 24) as u32;
    put(&mut bytes, 4096 + 72, &count.to_le_bytes());
    put(&mut bytes, 4096 + 96, &size.to_le_bytes());
    Bootstrap::parse(bytes).unwrap()
}

#[test]
fn shift_follows_the_size_of_the_blob_alone() {
    let draft = Draft { version_2: true, ..Draft::new(&[1]) };
    let plain = draft.build().bootstrap.blobs()[0].clone();
    let batch = Draft { batch: Some(2), ..draft }.build().bootstrap.blobs()[0].clone();
    let sizes = [
        (4096, 16),
        (128 * MIB as u64, 16),
        (128 * MIB as u64 + 4096, 17),
        (512 * MIB as u64, 17),
        (2 * GIB, 18),
        (2 * GIB + 4096, 19),
        (8 * GIB, 19),
        (32 * GIB, 20),
        (16 * 1024 * GIB - 4096, 25),
    ];
    for (size, shift) in sizes {
        let with = |blob: &BlobRecord| BlobRecord { uncompressed_size: size, ..blob.clone() };
        assert_eq!(natural_shift(&with(&plain)), shift, "{size} bytes");
        assert_eq!(natural_shift(&with(&batch)), shift.max(21), "{size} bytes");
    }
}

#[test]
fn chunk_that_reaches_beyond_leaves_a_hole_at_the_front_of_the_next_file() {
    let (_, cut) = cut(&Draft::new(&[60_000, 20_000, 8192]));
    let found: Vec<_> = cut.segments().map(|plan| (plan.number, plan.chunks, plan.size)).collect();
    // At 0, 61,440 and 81,920.
    assert_eq!(found, [(0, 0..2, 61_440 + 20_480), (1, 2..3, 81_920 - 65_536 + 8192)]);
    assert_eq!(cut.segment(1).base, 65_536);
    assert_eq!(cut.place_at(81_920), Some(1));
    assert_eq!(cut.place_at(131_072), None);
    assert_eq!(cut.place_at(u64::MAX), None);
    assert_eq!(cut.place_of(ChunkIndex(3)), None);
}

#[test]
fn every_listed_chunk_of_every_fixture_is_in_the_segment_it_starts_in() {
    for name in IMAGES {
        let image = Specimen::fixture(name);
        let cut = Segmentation::of_image(&image.bootstrap).unwrap();
        for (blob, cut) in image.bootstrap.blobs().iter().zip(&cut) {
            assert_eq!(cut.shift(), if blob.is_zran() { 21 } else { 16 });
            let mut sizes = vec![0; cut.count() as usize];
            for chunk in image.bootstrap.chunks_of(blob.index) {
                let place = cut.place_of(chunk.index).unwrap();
                assert_eq!(cut.place_at(chunk.uncompressed_offset), Some(place));
                let plan = cut.segment(place);
                assert!(plan.chunks.contains(&chunk.index.0));
                assert_eq!(chunk.uncompressed_offset >> cut.shift(), u64::from(plan.number));
                sizes[place as usize] = chunk.padded_end() - plan.base;
            }
            assert_eq!(cut.segments().map(|plan| plan.size).collect::<Vec<_>>(), sizes);
            assert_eq!(cut.memory_bytes(), 32 * sizes.len());
            for start in (0..blob.uncompressed_size + 100_000).step_by(50_021) {
                for range in [start..start + 1, start..start + 300_000] {
                    let has_part = |place: &u32| {
                        let plan = cut.segment(*place);
                        plan.base < range.end && range.start < plan.base + plan.size
                    };
                    let expected: Vec<_> = (0..cut.count()).filter(has_part).collect();
                    assert_eq!(cut.places_within(&range).collect::<Vec<_>>(), expected);
                }
            }
        }
    }
}

#[test]
fn recipe_depends_on_every_listed_chunk_of_the_segment_and_on_no_other() {
    let draft = Draft::new(&[30_000, 30_000, 30_000, 30_000, 30_000]);
    let recipes = |draft: &Draft| {
        let (_, cut) = cut(draft);
        cut.segments().map(|plan| plan.recipe).collect::<Vec<_>>()
    };
    // Two chunks of 32,768 bytes each in the first segments, one in the last.
    let whole = recipes(&draft);
    assert_eq!(whole.len(), 3);
    let changes: [fn(&mut Draft); 2] =
        [|draft| draft.chunks[2].1 = false, |draft| draft.chunks[2].0[7] ^= 1];
    for change in changes {
        let mut other = draft.clone();
        change(&mut other);
        let found = recipes(&other);
        assert_eq!((found[0], found[2]), (whole[0], whole[2]));
        assert_ne!(found[1], whole[1]);
    }
    let sha256 = Draft { digest: DigestAlgorithm::Sha256, ..draft.clone() };
    assert!(recipes(&sha256).iter().all(|recipe| !whole.contains(recipe)));
    // How a chunk is stored does not matter to whoever reads it.
    assert_eq!(recipes(&draft.compressor(Compressor::None)), whole);
}

#[test]
fn names_are_fixed_for_ever() {
    // A cache on disk is found again under these. Computed apart from this program.
    let (_, cut) = cut(&Draft::new(&[60_000, 20_000, 8192]));
    let names: Vec<_> = cut.segments().map(|plan| plan.file_name()).collect();
    assert_eq!(names, ["0-d1a8f68530698627d814ca8c171668b6", "1-34498da0ed0041525260290166b8f4fe"]);
}

#[test]
fn segments_without_listed_chunks_do_not_exist() {
    let mut draft = Draft::new(&[65_536; 5]);
    for hidden in [0, 2, 3] {
        draft.chunks[hidden].1 = false;
    }
    let numbers = |draft: &Draft| cut(draft).1.segments().map(|plan| plan.number).collect();
    let found: Vec<u32> = numbers(&draft);
    assert_eq!(found, [1, 4]);
    draft.chunks.iter_mut().for_each(|chunk| chunk.1 = false);
    let found: Vec<u32> = numbers(&draft);
    assert!(found.is_empty());
}

#[test]
fn segments_grow_until_the_devices_are_few_enough() {
    let chunks = |count: u32, step: u64| {
        (0..count).map(move |number| (number, u64::from(number) * step, 4096))
    };
    let shift = |size, count, step| {
        let cut = Segmentation::of_image(&listing(size, chunks(count, step)))?;
        Ok::<_, Error>((cut[0].shift(), cut[0].count()))
    };
    // 128 GiB of 2 MiB: exactly one too many.
    assert_eq!(shift(128 * GIB, 65_535, 2 << 20).unwrap(), (21, 65_535));
    assert_eq!(shift(128 * GIB, 65_536, 2 << 20).unwrap(), (22, 32_768));
    assert_eq!(shift(8192 * GIB, 65_535, 64 << 20).unwrap(), (24, 65_535));
    let error = shift(8192 * GIB, 65_536, 64 << 20).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)));
    let text = error.to_string();
    assert!(text.contains("65536 devices") && text.contains("64 MiB"), "{text}");
}

#[test]
fn chunks_that_overlap_or_go_backwards_are_refused() {
    for second in [0, 4096, 61_440] {
        let chunks = [(0, 0, 65_536), (1, second, 4096)].into_iter();
        let error = Segmentation::of_image(&listing(1 << 20, chunks)).unwrap_err();
        assert!(error.to_string().contains("chunk 1 starts before"), "{error}");
    }
    let gap = [(0, 0, 65_536), (1, 69_632, 4096)].into_iter();
    assert!(Segmentation::of_image(&listing(1 << 20, gap)).is_ok());
}

proptest! {
    #[test]
    fn listed_chunks_lie_apart_inside_their_files(listed: u8, sizes in any::<[u16; 8]>()) {
        let sizes: Vec<usize> = sizes.map(|size| usize::from(size) + 1).into();
        let mut draft = Draft::new(&sizes);
        for (index, chunk) in draft.chunks.iter_mut().enumerate() {
            chunk.1 = listed >> index & 1 != 0;
        }
        let (layout, cut) = cut(&draft);
        let mut ends = vec![0; cut.count() as usize];
        for index in (0..8).filter(|index| listed >> index & 1 != 0) {
            let chunk = layout.chunk(ChunkIndex(index));
            let place = cut.place_of(ChunkIndex(index)).unwrap();
            let start = chunk.uncompressed_offset - cut.segment(place).base;
            prop_assert!(start >= ends[place as usize] && start < 1 << cut.shift());
            ends[place as usize] = start + u64::from(chunk.padded_size());
        }
        prop_assert_eq!(cut.segments().map(|plan| plan.size).collect::<Vec<_>>(), ends);
    }
}
