//! Tar archives, in which layers come and go.
//!
//! [`Archive`] reads: POSIX (ustar, pax), GNU and older archives, with long names, sparse files of
//! all versions and extended attributes, the way container runtimes read them: all must see the
//! same members. [`write`] makes the blocks in front of a member's content.
//!
//! Everything a member says is checked for being possible, not for being sensible: whether a path
//! leads out of the layer is the business of whoever makes files of it.

pub mod archive;
mod header;
mod pax;
#[cfg(test)]
mod tests;
pub mod write;

pub use archive::Archive;

/// Everything in a tar is a multiple of this.
pub const BLOCK_BYTES: usize = 512;

/// The pax key prefix of an extended attribute.
const XATTR_PREFIX: &[u8] = b"SCHILY.xattr.";

/// A part of a sparse file that is in the archive: offset in the file, and length.
pub type Segment = (u64, u64);

/// What a member is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file with `size` bytes of content.
    File,
    /// Another name of a member that came before; `link` is its path.
    HardLink,
    /// A symbolic link to `link`.
    Symlink,
    /// A character device.
    Character,
    /// A block device.
    Block,
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// One member without its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// As it stands in the archive: not yet normalised, not to be trusted.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// The target of a link.
    pub link: Vec<u8>,
    /// Permission bits, set-id and sticky bits included.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Bytes of a file's content, holes included; 0 for other kinds.
    pub size: u64,
    /// Which of them are in the archive, ascending and apart, with zeros between; `None`: all.
    pub segments: Option<Vec<Segment>>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Extended attributes: whole names and values, by ascending name, each name once.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Member {
    /// A member with a path, and nothing else to say.
    pub fn new(path: Vec<u8>, kind: Kind) -> Member {
        Member {
            path,
            kind,
            link: Vec::new(),
            mode: 0,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            size: 0,
            segments: None,
            device: (0, 0),
            xattrs: Vec::new(),
        }
    }
}
