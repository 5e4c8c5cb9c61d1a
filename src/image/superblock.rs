//! The superblocks of a bootstrap: EROFS at byte 1024, the RAFS v6 extension at byte 1152.
//!
//! Decides whether this is an image we serve at all, and where its tables lie. After `parse`
//! every range lies inside the file, is whole records long and no table overlaps another.
//! Never looks into the tables.

use super::digest::DigestAlgorithm;
use super::little::{u16_at, u32_at, u64_at};
use super::{blob_table, chunk_table, codec::Compressor};
use crate::config::{BLOBS_PER_IMAGE_MAX, CHUNK_MAX_BYTES};
use crate::error::Result;
use std::ops::Range;

/// Bytes of an EROFS block; 512 only in tarfs mode, which is refused.
pub const BLOCK_BYTES: usize = 4096;
/// The smallest unit of compression the format allows.
pub const CHUNK_MIN_BYTES: u32 = 4096;

/// Where an EROFS superblock starts; before it a boot sector may lie.
pub(super) const EROFS_OFFSET: usize = 1024;
pub(super) const RAFS_OFFSET: usize = 1152;
/// End of the RAFS superblock, where the device slots start.
const SLOTS_OFFSET: usize = 1408;
pub(super) const SLOT_BYTES: usize = 128;
/// The device table's position in units of its slots, as the EROFS superblock states it.
const SLOTS_POSITION: u16 = (SLOTS_OFFSET / SLOT_BYTES) as u16;

pub(super) const EROFS_MAGIC: u32 = 0xe0f5_e1e2;
const RAFS_V5_MAGIC: u32 = 0x5241_4653;
const COMPAT_RAFS_V6: u32 = 0x4000_0000;
/// CHUNKED_FILE | DEVICE_TABLE: all the incompatible features a RAFS image uses.
pub(super) const INCOMPAT: u32 = 0xc;

const FLAG_COMPRESSORS: [(u64, Compressor); 4] = [
    (0x1, Compressor::None),
    (0x2, Compressor::Lz4Block),
    (0x40, Compressor::Gzip),
    (0x80, Compressor::Zstd),
];
const FLAG_BLAKE3: u64 = 0x4;
const FLAG_SHA256: u64 = 0x8;
const FLAG_TARFS: u64 = 0x200;
/// Compressors, digests, EXPLICIT_UID_GID, HAS_XATTR, INLINED_CHUNK_DIGEST, ENCRYPTION_NONE,
/// ENCRYPTION_AES128_XTS, and the six bits reserved for compatible additions.
const FLAGS_KNOWN: u64 = 0x1ff | 0xff00_0000;

/// What the two superblocks say, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// Number of the root directory's inode: its offset is `meta_offset + 32 * root_nid`.
    pub root_nid: u64,
    /// How many inodes the builder says there are.
    pub inode_count: u64,
    /// Byte offset that inode numbers count from.
    pub meta_offset: u64,
    /// The RAFS feature flags as stored.
    pub flags: u64,
    /// How the chunks of files are compressed.
    pub compressor: Compressor,
    /// How the digests of chunks are made.
    pub digest_algorithm: DigestAlgorithm,
    /// Bytes of file data per chunk: a power of two, 4 KiB to 16 MiB.
    pub chunk_size: u32,
    /// Number of data blobs.
    pub blob_count: usize,
    pub(super) slots: Range<usize>,
    pub(super) blob_table: Range<usize>,
    pub(super) chunk_table: Range<usize>,
    pub(super) prefetch_table: Range<usize>,
}

impl Superblock {
    /// Parses the superblocks of a whole bootstrap.
    ///
    /// `Unsupported` for what we know and refuse (RAFS v5, plain EROFS, tarfs, unknown features);
    /// `Malformed` for everything else that is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        if bytes.len() >= 4 && u32_at(bytes, 0) == RAFS_V5_MAGIC {
            return Err(unsupported!("a RAFS v5 image: rebuild it as RAFS v6 (--fs-version 6)"));
        }
        if bytes.len() < BLOCK_BYTES || !bytes.len().is_multiple_of(BLOCK_BYTES) {
            return Err(malformed!(
                "a bootstrap is whole blocks of 4096 bytes, not {} bytes",
                bytes.len()
            ));
        }
        let erofs = Erofs::parse(&bytes[EROFS_OFFSET..RAFS_OFFSET])?;
        let rafs = &bytes[RAFS_OFFSET..SLOTS_OFFSET];
        let flags = u64_at(rafs, 0);
        let (compressor, digest_algorithm) = parse_flags(flags)?;
        let chunk_size = u32_at(rafs, 20);
        check_chunk_size(chunk_size)?;
        let tables = Tables::parse(rafs, erofs.blob_count, bytes.len())?;
        if erofs.meta_offset >= bytes.len() as u64 {
            return Err(malformed!("the inode area starts behind the end of the bootstrap"));
        }
        Ok(Superblock {
            root_nid: erofs.root_nid,
            inode_count: erofs.inode_count,
            meta_offset: erofs.meta_offset,
            flags,
            compressor,
            digest_algorithm,
            chunk_size,
            blob_count: erofs.blob_count,
            slots: tables.slots,
            blob_table: tables.blobs,
            chunk_table: tables.chunks,
            prefetch_table: tables.prefetch,
        })
    }
}

/// A chunk size is a power of two between 4 KiB and 16 MiB.
pub(super) fn check_chunk_size(chunk_size: u32) -> Result<()> {
    let range = CHUNK_MIN_BYTES..=CHUNK_MAX_BYTES as u32;
    if chunk_size.is_power_of_two() && range.contains(&chunk_size) {
        return Ok(());
    }
    Err(malformed!("chunk size {chunk_size} is not a power of two between 4 KiB and 16 MiB"))
}

struct Erofs {
    root_nid: u64,
    inode_count: u64,
    meta_offset: u64,
    blob_count: usize,
}

impl Erofs {
    fn parse(block: &[u8]) -> Result<Self> {
        if u32_at(block, 0) != EROFS_MAGIC {
            return Err(malformed!("not a bootstrap: no EROFS magic at byte {EROFS_OFFSET}"));
        }
        if u32_at(block, 8) & COMPAT_RAFS_V6 == 0 {
            return Err(unsupported!(
                "an EROFS image without RAFS v6 data: nothing to load lazily"
            ));
        }
        match block[12] {
            12 => {}
            9 => return Err(unsupported!("a tarfs image (512-byte blocks)")),
            bits => return Err(malformed!("block size 2^{bits}, RAFS v6 has 2^12")),
        }
        let incompat = u32_at(block, 80);
        if incompat & !INCOMPAT != 0 {
            return Err(unsupported!("unknown incompatible EROFS features {incompat:#x}"));
        }
        if u32_at(block, 4) != 0 {
            return Err(unsupported!("a superblock checksum: RAFS v6 images have none"));
        }
        if block[13] != 0 || u32_at(block, 40 + 4) != 0 {
            return Err(unsupported!("superblock extensions or a shared xattr area"));
        }
        let blob_count = usize::from(u16_at(block, 86));
        if blob_count > BLOBS_PER_IMAGE_MAX {
            return Err(malformed!("{blob_count} blobs, an image has {BLOBS_PER_IMAGE_MAX}"));
        }
        if blob_count > 0 && (incompat != INCOMPAT || u16_at(block, 88) != SLOTS_POSITION) {
            return Err(malformed!("the image has blobs and no device table at byte 1408"));
        }
        let inode_count = u64_at(block, 16);
        if inode_count == 0 {
            return Err(malformed!("the image says it has no inodes"));
        }
        Ok(Erofs {
            root_nid: u16_at(block, 14).into(),
            inode_count,
            meta_offset: u64::from(u32_at(block, 40)) * BLOCK_BYTES as u64,
            blob_count,
        })
    }
}

fn parse_flags(flags: u64) -> Result<(Compressor, DigestAlgorithm)> {
    if flags & FLAG_TARFS != 0 {
        return Err(unsupported!("a tarfs image"));
    }
    if flags & !FLAGS_KNOWN != 0 {
        return Err(unsupported!("unknown RAFS features {:#x}", flags & !FLAGS_KNOWN));
    }
    let mut named = FLAG_COMPRESSORS.iter().filter(|(bit, _)| flags & bit != 0);
    let (Some((_, compressor)), None) = (named.next(), named.next()) else {
        return Err(malformed!("RAFS flags {flags:#x} do not name exactly one compressor"));
    };
    let digest = match (flags & FLAG_BLAKE3 != 0, flags & FLAG_SHA256 != 0) {
        (true, false) => DigestAlgorithm::Blake3,
        (false, true) => DigestAlgorithm::Sha256,
        _ => return Err(malformed!("RAFS flags {flags:#x} do not name exactly one digest")),
    };
    Ok((*compressor, digest))
}

struct Tables {
    slots: Range<usize>,
    blobs: Range<usize>,
    chunks: Range<usize>,
    prefetch: Range<usize>,
}

impl Tables {
    fn parse(rafs: &[u8], blob_count: usize, file_bytes: usize) -> Result<Self> {
        let locate = |name, offset, size, record| table(name, offset, size, record, file_bytes);
        let blob_bytes = u64::from(u32_at(rafs, 16));
        let slots_bytes = (blob_count * SLOT_BYTES) as u64;
        let tables = Tables {
            slots: locate("device table", SLOTS_OFFSET as u64, slots_bytes, SLOT_BYTES)?,
            blobs: locate("blob table", u64_at(rafs, 8), blob_bytes, blob_table::RECORD_BYTES)?,
            chunks: locate("chunk table", u64_at(rafs, 24), u64_at(rafs, 32), chunk_table::BYTES)?,
            prefetch: locate("prefetch table", u64_at(rafs, 40), u32_at(rafs, 48).into(), 4)?,
        };
        if tables.blobs.len() != blob_count * blob_table::RECORD_BYTES {
            return Err(malformed!(
                "{blob_count} devices and {} blobs: the tables must agree",
                tables.blobs.len() / blob_table::RECORD_BYTES
            ));
        }
        for (name, table) in [("blob", &tables.blobs), ("chunk", &tables.chunks)] {
            if !table.start.is_multiple_of(BLOCK_BYTES) {
                return Err(malformed!("the {name} table is not aligned to 4096 bytes"));
            }
        }
        // The superblocks and the slots come first, the tables behind them, none on another.
        let head = 0..SLOTS_OFFSET + tables.slots.len();
        let all = [&head, &tables.blobs, &tables.prefetch, &tables.chunks];
        for (position, left) in all.iter().enumerate() {
            for right in &all[position + 1..] {
                if left.start < right.end && right.start < left.end {
                    return Err(malformed!("tables overlap: bytes {left:?} and {right:?}"));
                }
            }
        }
        Ok(tables)
    }
}

/// The byte range of a table; an empty one lies at 0 whatever its offset says.
fn table(
    name: &str,
    offset: u64,
    size: u64,
    record_bytes: usize,
    file_bytes: usize,
) -> Result<Range<usize>> {
    if size == 0 {
        return Ok(0..0);
    }
    if !size.is_multiple_of(record_bytes as u64) {
        return Err(malformed!("the {name} is {size} bytes long: no whole records"));
    }
    match offset.checked_add(size) {
        Some(end) if end <= file_bytes as u64 => Ok(offset as usize..end as usize),
        _ => Err(malformed!("the {name} at {offset}, {size} bytes long, leaves the bootstrap")),
    }
}
