//! The kernel's view, read back with eyes of its own, and the bootstraps it is not made of.

use super::draft_tests::{CHUNK_SIZE, Draft, put};
use super::inode::{DataLayout, FileKind};
use super::little::{u16_at, u32_at, u64_at};
use super::segmentation_tests::listing;
use super::specimen_tests::{IMAGES, Specimen};
use super::view::{DeviceRef, KernelView};
use super::{Bootstrap, ChunkIndex, Segmentation};
use crate::error::{Error, Result};
use proptest::prelude::*;

/// Byte offsets in a draft's bootstrap: the root inode, its directory, the first file's inode.
const ROOT: usize = 8192 + 128 * 32;
const DIRECTORY: usize = ROOT + 64;
const FILE: usize = ROOT + 40 * 32;

fn derive(bootstrap: &Bootstrap) -> Result<KernelView> {
    KernelView::derive(bootstrap, &Segmentation::of_image(bootstrap)?)
}

/// The view of a draft of three files, fields of whose bootstrap were overwritten.
fn with(fields: &[(usize, &[u8])]) -> Result<KernelView> {
    let mut bytes = Draft::new(&[CHUNK_SIZE as usize, 4096, CHUNK_SIZE as usize]).write().0;
    for (at, field) in fields {
        put(&mut bytes, *at, field);
    }
    derive(&Bootstrap::parse(bytes).unwrap())
}

/// Reads the view as the kernel would, beside the bootstrap: the superblock, the table, and of
/// each inode the block address or the chunks.
fn check(bootstrap: &Bootstrap, view: &KernelView) {
    let (bytes, cut) = (&view.metadata, Segmentation::of_image(bootstrap).unwrap());
    assert!(bytes.len().is_multiple_of(4096));
    assert_eq!(u32_at(bytes, 1024), 0xe0f5_e1e2);
    assert_eq!((u32_at(bytes, 1028), u32_at(bytes, 1032)), (0, 0), "no checksum");
    assert_eq!(u32_at(bytes, 1024 + 80), 0xc);
    assert_eq!(u16_at(bytes, 1024 + 86) as usize, view.devices.len());
    let table = usize::from(u16_at(bytes, 1024 + 88)) * 128;
    for (slot, device) in view.devices.iter().enumerate() {
        let segment = cut[device.blob_index as usize].segment(device.place);
        let slot = &bytes[table + slot * 128..][..128];
        let name = segment.file_name();
        assert_eq!(&slot[..name.len()], name.as_bytes());
        assert_eq!(u64::from(u32_at(slot, 64)) * 4096, segment.size);
        assert!(slot[68..].iter().all(|&byte| byte == 0), "no mapped address");
    }
    let meta = u32_at(bytes, 1024 + 40) as usize * 4096;
    assert_eq!(u32_at(bytes, 1024 + 36) as usize * 4096, bytes.len());
    assert!(meta >= table + view.devices.len() * 128);
    assert_eq!(u64::from(u16_at(bytes, 1024 + 14)), bootstrap.superblock().root_nid);
    for visit in bootstrap.tree().walk() {
        let inode = visit.unwrap().inode;
        let record = &bytes[meta + inode.nid as usize * 32..];
        match inode.kind {
            FileKind::File => check_file(bootstrap, &cut, view, &inode, record),
            FileKind::Directory | FileKind::Link => {
                let whole = match inode.layout {
                    DataLayout::FlatPlain => inode.size,
                    _ => inode.size / 4096 * 4096,
                } as usize;
                let (old, new) =
                    (inode.address as usize * 4096, u32_at(record, 16) as usize * 4096);
                if whole > 0 {
                    assert_eq!(bytes[new..new + whole], bootstrap.bytes()[old..old + whole]);
                }
            }
            _ => assert_eq!(u32_at(record, 16), inode.address),
        }
    }
}

fn check_file(
    bootstrap: &Bootstrap,
    cut: &[Segmentation],
    view: &KernelView,
    inode: &super::Inode,
    record: &[u8],
) {
    assert_eq!(u16_at(record, 0) >> 1, 4);
    assert_eq!(u64_at(record, 8), inode.size);
    let format = u32_at(record, 16);
    assert_eq!(format & !0x1f, 0x20);
    assert_eq!(4096u32 << (format & 0x1f), bootstrap.chunk_size());
    let xattrs = inode.xattrs.len();
    let entries = (64 + xattrs).next_multiple_of(8);
    for (number, chunk) in bootstrap.tree().file_chunks(inode).unwrap().enumerate() {
        let (chunk, entry) = (chunk.unwrap(), &record[entries + number * 8..]);
        let device = view.devices[usize::from(u16_at(entry, 2)) - 1];
        assert_eq!(device.blob_index, chunk.blob_index);
        let cut = &cut[device.blob_index as usize];
        let segment = cut.segment(device.place);
        let inside = u64::from(u32_at(entry, 4)) * 4096;
        assert_eq!(segment.base + inside, chunk.uncompressed_offset);
        assert!(inside + u64::from(chunk.size) <= segment.size);
        assert_eq!(cut.place_of(chunk.index), Some(device.place));
        assert_eq!(u16_at(entry, 0), 0);
    }
}

#[test]
fn every_fixture_has_the_same_tree_over_segments() {
    for name in IMAGES {
        let bootstrap = Specimen::fixture(name).bootstrap;
        let view = derive(&bootstrap).unwrap();
        assert!(view.devices.len() > 1);
        check(&bootstrap, &view);
        assert_eq!(view, derive(&bootstrap).unwrap(), "equal input, equal bytes");
    }
}

#[test]
fn devices_are_the_segments_in_order() {
    let view = with(&[]).unwrap();
    let places: Vec<_> = view.devices.iter().map(|device| device.place).collect();
    assert_eq!(places, [0, 1]);
    assert_eq!(view.devices[1], DeviceRef { blob_index: 0, place: 1 });
    // One block for superblock and table, and the draft's metadata without tables.
    let meta = u32_at(&view.metadata, 1024 + 40);
    assert_eq!((meta, view.metadata.len()), (1, 4096 + 8192));
}

#[test]
fn image_without_data_has_no_devices() {
    let bootstrap = Draft::new(&[]).build().bootstrap;
    let view = derive(&bootstrap).unwrap();
    assert!(view.devices.is_empty());
    check(&bootstrap, &view);
}

#[test]
fn largest_device_table_moves_the_metadata_behind_it() {
    let chunks = |number| (number, u64::from(number) << 21, 4096);
    let mut bootstrap = listing(128 << 30, (0..65_535).map(chunks));
    // Its only file has chunk 0 of one byte; the listed one has 4096.
    let mut bytes = bootstrap.bytes().to_vec();
    put(&mut bytes, FILE + 8, &4096u64.to_le_bytes());
    bootstrap = Bootstrap::parse(bytes).unwrap();
    let view = derive(&bootstrap).unwrap();
    assert_eq!(view.devices.len(), 65_535);
    assert!(view.metadata.len() > 65_535 * 128);
    check(&bootstrap, &view);
}

#[test]
fn files_the_kernel_may_read_as_one_chunk_are_cut_at_rafs_chunks() {
    // The first file made of chunks 0 and 1, which the kernel may take for one of 128 KiB.
    let entry = [1u16.to_le_bytes(), [1, 0]].concat();
    let fields: [(usize, &[u8]); 4] = [
        (FILE + 8, &(u64::from(CHUNK_SIZE) + 4096).to_le_bytes()),
        (FILE + 16, &0x25u32.to_le_bytes()),
        (FILE + 72, &entry),
        (FILE + 76, &16u32.to_le_bytes()),
    ];
    let view = with(&fields).unwrap();
    let start = 4096 + FILE - 8192;
    assert_eq!(u32_at(&view.metadata, start + 16), 0x24);
    let entries = [[0, 1 << 16, 0], [1, 2 << 16, 0]].map(|[_, device, block]| [device, block]);
    for (number, [device, block]) in entries.into_iter().enumerate() {
        let at = start + 64 + number * 8;
        assert_eq!([u32_at(&view.metadata, at), u32_at(&view.metadata, at + 4)], [device, block]);
    }
}

#[test]
fn chunks_the_table_does_not_list_so_are_refused() {
    let fields: [&[(usize, &[u8])]; 4] = [
        // Another chunk's index; another chunk's place; less of the chunk.
        &[(FILE + 64, &[1])],
        &[(FILE + 68, &16u32.to_le_bytes())],
        &[(FILE + 8, &4096u64.to_le_bytes())],
        &[(FILE + 8, &1u64.to_le_bytes())],
    ];
    for fields in fields {
        let error = with(fields).unwrap_err();
        assert!(matches!(error, Error::Malformed(_)));
        assert!(error.to_string().contains("chunk table has no chunk"), "{error}");
    }
    let mut draft = Draft::new(&[10, 20]);
    draft.chunks[1].1 = false;
    let mut bytes = draft.write().0;
    put(&mut bytes, FILE + 64, &[1]);
    put(&mut bytes, FILE + 68, &1u32.to_le_bytes());
    assert!(derive(&Bootstrap::parse(bytes).unwrap()).is_err());
}

/// The first file made a link whose target is in this block.
fn link_to(block: u32) -> Result<KernelView> {
    let mode = 0o120_777u16.to_le_bytes();
    let name_kind = (DIRECTORY + 2 * 12 + 10, &[7][..]);
    let size = (FILE + 8, &10u64.to_le_bytes()[..]);
    with(&[name_kind, (FILE, &[1]), (FILE + 4, &mode), size, (FILE + 16, &block.to_le_bytes())])
}

#[test]
fn block_addresses_move_with_the_metadata() {
    // Blocks 2 and 3 of the bootstrap are blocks 1 and 2 of the view; nothing is in the first.
    assert_eq!(u32_at(&link_to(2).unwrap().metadata, 4096 + FILE - 8192 + 16), 1);
}

#[test]
fn inodes_and_data_that_share_bytes_are_refused() {
    // The second file's entry leads into the first one's inode.
    let second = (DIRECTORY + 3 * 12, &(128 + 40 + 1u64).to_le_bytes()[..]);
    let compact = (FILE + 32, &[8, 0, 0, 0, 0xa4, 0x81][..]);
    for result in [with(&[second, compact, (FILE + 48, &[0x24])]), link_to(3)] {
        let error = result.unwrap_err().to_string();
        assert!(error.contains("something else"), "{error}");
    }
}

#[test]
fn what_lies_outside_the_metadata_is_refused() {
    // In the blob table, and in the chunk table.
    for block in [1, 4] {
        let error = link_to(block).unwrap_err().to_string();
        assert!(error.contains("outside of the metadata"), "{error}");
    }
    let xattrs = [(FILE + 2, &1u16.to_le_bytes()[..]), (FILE + 64 + 4, &[1])];
    let error = with(&xattrs).unwrap_err();
    assert!(matches!(error, Error::Unsupported(_)), "{error}");
}

#[test]
fn segments_of_another_image_are_refused() {
    let image = Draft::new(&[60_000; 3]).build().bootstrap;
    let fewer = Segmentation::of_image(&Draft::new(&[60_000; 2]).build().bootstrap).unwrap();
    assert!(KernelView::derive(&image, &fewer).is_err());
    assert!(KernelView::derive(&image, &[]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_listing_of_any_sizes_reads_back(listed: u8, sizes in any::<[u16; 8]>()) {
        let sizes: Vec<usize> = sizes.map(|size| usize::from(size) + 1).into();
        let mut draft = Draft::new(&sizes);
        for (index, chunk) in draft.chunks.iter_mut().enumerate() {
            chunk.1 = listed >> index & 1 != 0;
        }
        let bootstrap = draft.build().bootstrap;
        check(&bootstrap, &derive(&bootstrap).unwrap());
    }

    #[test]
    fn damaged_bootstraps_are_views_or_errors(
        name in 0..IMAGES.len(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = Specimen::fixture(IMAGES[name]).bootstrap.bytes().to_vec();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] ^= value;
        }
        if let Ok(bootstrap) = Bootstrap::parse(bytes)
            && let Ok(view) = derive(&bootstrap)
        {
            check(&bootstrap, &view);
        }
    }
}

#[test]
fn chunk_is_found_by_its_index_whoever_else_is_listed() {
    let mut draft = Draft::new(&[1, 2, 3, 4, 5, 6]);
    for hidden in [0, 3, 5] {
        draft.chunks[hidden].1 = false;
    }
    let bootstrap = draft.build().bootstrap;
    for index in 0..7 {
        let found = bootstrap.chunk(0, ChunkIndex(index)).map(|chunk| chunk.index.0);
        assert_eq!(found, [1, 2, 4].contains(&index).then_some(index));
    }
    assert_eq!(bootstrap.chunk(1, ChunkIndex(1)), None);
}
