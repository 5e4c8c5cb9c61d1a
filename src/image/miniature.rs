//! The smallest image over devices: what a kernel is tried with before it is trusted.
//!
//! Plain EROFS as [`super::view`] makes it, by hand: a root with files `0`, `1` and so on, each of
//! them one chunk that is the whole of its own device.

use super::files::FORMAT_INDEXES;
use super::little::put;
use super::superblock::{BLOCK_BYTES, EROFS_MAGIC, EROFS_OFFSET, INCOMPAT, SLOT_BYTES};

const TABLE_OFFSET: usize = EROFS_OFFSET + 128;
const META: usize = BLOCK_BYTES;
const INODE_BYTES: usize = 64;
/// In units of 32 bytes; 0 would be no inode.
const ROOT_NID: usize = 2;
/// The root's names are inside its inode's part of the block, below the files.
const FILES_NID: usize = 16;
/// An inode and one chunk.
const FILE_NIDS: usize = 3;
/// More would need another block for something.
const DEVICES_MAX: usize = 10;
/// Records of 12 bytes and names of one, "." and "..".
const ROOT_BYTES_MAX: usize = (DEVICES_MAX + 2) * 12 + DEVICES_MAX + 3;
const _: () = assert!(ROOT_NID * 32 + INODE_BYTES + ROOT_BYTES_MAX <= FILES_NID * 32);
const _: () = assert!((FILES_NID + DEVICES_MAX * FILE_NIDS) * 32 <= BLOCK_BYTES);
const _: () = assert!(TABLE_OFFSET + DEVICES_MAX * SLOT_BYTES <= META);

/// The metadata of an image of so many files and devices, each of `1 << block_bits` blocks.
///
/// # Panics
/// If there are more than ten.
pub fn miniature(devices: usize, block_bits: u32) -> Vec<u8> {
    assert!(devices <= DEVICES_MAX, "{devices} devices");
    let mut image = vec![0; 2 * BLOCK_BYTES];
    let blocks = 1u32 << block_bits;
    let mut superblock = |at: usize, field: &[u8]| put(&mut image, EROFS_OFFSET + at, field);
    superblock(0, &EROFS_MAGIC.to_le_bytes());
    superblock(12, &[BLOCK_BYTES.ilog2() as u8]);
    superblock(14, &(ROOT_NID as u16).to_le_bytes());
    superblock(16, &(1 + devices as u64).to_le_bytes());
    superblock(36, &2u32.to_le_bytes());
    superblock(40, &1u32.to_le_bytes());
    superblock(80, &INCOMPAT.to_le_bytes());
    superblock(86, &(devices as u16).to_le_bytes());
    superblock(88, &((TABLE_OFFSET / SLOT_BYTES) as u16).to_le_bytes());
    let mut names: Vec<(String, usize, u8)> =
        vec![(".".to_owned(), ROOT_NID, 2), ("..".to_owned(), ROOT_NID, 2)];
    for device in 0..devices {
        let slot = TABLE_OFFSET + device * SLOT_BYTES;
        put(&mut image, slot, device.to_string().as_bytes());
        put(&mut image, slot + 64, &blocks.to_le_bytes());
        let nid = FILES_NID + device * FILE_NIDS;
        names.push((device.to_string(), nid, 1));
        let size = u64::from(blocks) * BLOCK_BYTES as u64;
        put_inode(&mut image, nid, 4, 0o100_444, size, FORMAT_INDEXES | block_bits);
        let chunk = META + nid * 32 + INODE_BYTES;
        put(&mut image, chunk + 2, &(device as u16 + 1).to_le_bytes());
    }
    let root = directory(&names);
    put_inode(&mut image, ROOT_NID, 2, 0o40_555, root.len() as u64, 0);
    put(&mut image, META + ROOT_NID * 32 + INODE_BYTES, &root);
    image
}

fn put_inode(image: &mut [u8], nid: usize, layout: u16, mode: u16, size: u64, address: u32) {
    let mut inode = [0; INODE_BYTES];
    put(&mut inode, 0, &(layout << 1 | 1).to_le_bytes());
    put(&mut inode, 4, &mode.to_le_bytes());
    put(&mut inode, 8, &size.to_le_bytes());
    put(&mut inode, 16, &address.to_le_bytes());
    put(&mut inode, 44, &1u32.to_le_bytes());
    put(image, META + nid * 32, &inode);
}

/// Records, then names; both in order.
fn directory(names: &[(String, usize, u8)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut name_at = names.len() * 12;
    for (name, nid, kind) in names {
        bytes.extend((*nid as u64).to_le_bytes());
        bytes.extend((name_at as u16).to_le_bytes());
        bytes.extend([*kind, 0]);
        name_at += name.len();
    }
    names.iter().for_each(|(name, ..)| bytes.extend(name.as_bytes()));
    bytes
}
