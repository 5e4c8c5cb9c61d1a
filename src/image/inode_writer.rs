//! Inodes, directories and extended attributes as bytes: the inverse of [`super::erofs`].
//!
//! Pure. Knows records, not where they are put: that is decided by whoever writes a bootstrap.

use super::inode::FileKind;
use super::superblock::BLOCK_BYTES;
use crate::error::Result;

/// How the data of an inode is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WrittenLayout {
    /// Whole blocks at `address`; also for what has no data.
    Plain,
    /// Whole blocks at `address`, the rest behind the inode.
    Inline,
    /// An array of chunk entries behind the inode.
    Chunked,
}

/// Everything an inode's own record says.
#[derive(Clone, Debug)]
pub struct InodeFields {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits, without the type.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of data.
    pub size: u64,
    /// Last modification: seconds since 1970.
    pub mtime_seconds: i64,
    /// The rest of it.
    pub mtime_nanoseconds: u32,
    /// Number of names.
    pub link_count: u32,
    /// Running number.
    pub number: u32,
    /// Block address, chunk format or device number.
    pub address: u32,
    /// How its data is stored.
    pub layout: WrittenLayout,
    /// Bytes of its extended attributes: `xattr_bytes` of them.
    pub xattr_bytes: usize,
}

impl InodeFields {
    /// Whether 32 bytes are enough. A compact inode has no time: readers take it for 0.
    pub fn is_compact(&self) -> bool {
        let small = self.uid <= u16::MAX.into() && self.gid <= u16::MAX.into();
        let short = self.size <= u32::MAX.into() && self.link_count <= u16::MAX.into();
        small && short && self.mtime_seconds == 0 && self.mtime_nanoseconds == 0
    }

    /// Bytes of the record alone.
    pub fn size_bytes(&self) -> usize {
        if self.is_compact() { 32 } else { 64 }
    }

    /// Appends the record.
    pub fn write(&self, out: &mut Vec<u8>) {
        let compact = self.is_compact();
        let layout = match self.layout {
            WrittenLayout::Plain => 0,
            WrittenLayout::Inline => 2,
            WrittenLayout::Chunked => 4,
        };
        let format: u16 = layout << 1 | u16::from(!compact);
        let xattr_units = match self.xattr_bytes {
            0 => 0,
            bytes => (bytes - XATTR_HEADER_BYTES) / 4 + 1,
        };
        out.extend(format.to_le_bytes());
        out.extend((xattr_units as u16).to_le_bytes());
        out.extend((self.kind.mode_bits() | self.permissions).to_le_bytes());
        if compact {
            out.extend((self.link_count as u16).to_le_bytes());
            out.extend((self.size as u32).to_le_bytes());
            out.extend([0; 4]);
            out.extend(self.address.to_le_bytes());
            out.extend(self.number.to_le_bytes());
            out.extend((self.uid as u16).to_le_bytes());
            out.extend((self.gid as u16).to_le_bytes());
            out.extend([0; 4]);
        } else {
            out.extend([0; 2]);
            out.extend(self.size.to_le_bytes());
            out.extend(self.address.to_le_bytes());
            out.extend(self.number.to_le_bytes());
            out.extend(self.uid.to_le_bytes());
            out.extend(self.gid.to_le_bytes());
            out.extend(self.mtime_seconds.to_le_bytes());
            out.extend(self.mtime_nanoseconds.to_le_bytes());
            out.extend(self.link_count.to_le_bytes());
            out.extend([0; 16]);
        }
    }
}

/// The chunk format of a file: entries of 8 bytes, and log2 of the blocks the kernel takes for one
/// chunk. `chunk_bytes` is a power of two, a block at least.
pub fn chunk_format(chunk_bytes: u64) -> u32 {
    0x20 | (chunk_bytes.ilog2() - BLOCK_BYTES.ilog2())
}

/// One entry of a file's chunk array.
pub fn chunk_entry(blob_index: u32, index: u32, uncompressed_offset: u64) -> [u8; 8] {
    let high = (blob_index + 1) as u16 | (index >> 16 << 8) as u16;
    let address = (uncompressed_offset / BLOCK_BYTES as u64) as u32;
    let mut entry = [0; 8];
    entry[..2].copy_from_slice(&(index as u16).to_le_bytes());
    entry[2..4].copy_from_slice(&high.to_le_bytes());
    entry[4..].copy_from_slice(&address.to_le_bytes());
    entry
}

/// The number a device inode carries.
pub fn device_number(major: u32, minor: u32) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

const XATTR_HEADER_BYTES: usize = 12;
/// The unit count of an inode's attributes is 16 bits wide.
pub const XATTRS_MAX_BYTES: usize = XATTR_HEADER_BYTES + 4 * (u16::MAX as usize - 1);

/// The class and the rest of an attribute's name; `None` if the format has no class for it.
pub fn split_xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    let classes: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    classes.iter().find_map(|&(prefix, class)| {
        let rest = name.strip_prefix(prefix)?;
        (!rest.is_empty() && rest.len() <= u8::MAX.into()).then_some((class, rest))
    })
}

/// The attributes of an inode as they stand behind it; nothing for none. Names without a class
/// are an error, as are attributes that do not fit.
pub fn xattr_area<'a>(xattrs: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Result<Vec<u8>> {
    let mut area = Vec::new();
    for (name, value) in xattrs {
        let text = || String::from_utf8_lossy(name).into_owned();
        let (class, rest) = split_xattr_name(name)
            .ok_or_else(|| unsupported!("extended attribute {:?}", text()))?;
        let size = u16::try_from(value.len())
            .map_err(|_| unsupported!("{} bytes of attribute {:?}", value.len(), text()))?;
        if area.is_empty() {
            area.resize(XATTR_HEADER_BYTES, 0);
        }
        area.extend([rest.len() as u8, class]);
        area.extend(size.to_le_bytes());
        area.extend(rest);
        area.extend(value);
        area.resize(area.len().next_multiple_of(4), 0);
    }
    if area.len() > XATTRS_MAX_BYTES {
        return Err(unsupported!(
            "{} bytes of extended attributes: an inode holds {XATTRS_MAX_BYTES}",
            area.len()
        ));
    }
    Ok(area)
}

/// One name of a directory to be written.
#[derive(Clone, Copy, Debug)]
pub struct WrittenEntry<'a> {
    /// 1 to 255 bytes.
    pub name: &'a [u8],
    /// The inode it leads to.
    pub nid: u64,
    /// What that is.
    pub kind: FileKind,
}

/// Bytes of a directory for one name, besides the name.
pub const DIRENT_BYTES: usize = 12;

/// How many of the names, taken in order, share the next block, and how many bytes they fill.
fn fill_block<'a>(names: impl Iterator<Item = &'a [u8]>) -> (usize, usize) {
    let mut filled = (0, 0);
    for name in names {
        let bytes = filled.1 + DIRENT_BYTES + name.len();
        if bytes > BLOCK_BYTES {
            break;
        }
        filled = (filled.0 + 1, bytes);
    }
    filled
}

/// Bytes of a directory with these names, `.` and `..` among them, sorted.
pub fn directory_bytes<'a>(names: impl Iterator<Item = &'a [u8]> + Clone) -> u64 {
    let (mut rest, mut size, mut last) = (names, 0, 0);
    loop {
        let (count, bytes) = fill_block(rest.clone());
        if count == 0 {
            return size + last;
        }
        size += if last == 0 { 0 } else { BLOCK_BYTES as u64 };
        last = bytes as u64;
        rest.nth(count - 1);
    }
}

/// The data of a directory: full blocks, then a last one as long as it needs to be. Entries, `.`
/// and `..` among them, are sorted by name.
pub fn directory_data(mut entries: &[WrittenEntry<'_>]) -> Vec<u8> {
    let mut data = Vec::new();
    while !entries.is_empty() {
        let (count, _) = fill_block(entries.iter().map(|entry| entry.name));
        let (block, rest) = entries.split_at(count);
        data.resize(data.len().next_multiple_of(BLOCK_BYTES), 0);
        let mut name_at = count * DIRENT_BYTES;
        for entry in block {
            data.extend(entry.nid.to_le_bytes());
            data.extend((name_at as u16).to_le_bytes());
            data.extend([entry.kind.dirent_number(), 0]);
            name_at += entry.name.len();
        }
        data.extend(block.iter().flat_map(|entry| entry.name));
        entries = rest;
    }
    data
}
