//! What a layer says, entry by entry, whatever form it came in.

use crate::config::{LINK_TARGET_MAX_BYTES, PATH_MAX_BYTES};
use crate::error::Result;
use crate::image::FileKind;

/// Owner, permissions, time and extended attributes of a file of any kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits with set-id and sticky ones, 12 in all.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Last modification, seconds since 1970.
    pub mtime_seconds: i64,
    /// The rest of it.
    pub mtime_nanoseconds: u32,
    /// Names and values, by ascending name, each name once.
    pub xattrs: Box<[Xattr]>,
}

/// An extended attribute: name with its prefix, and value.
pub type Xattr = (Box<[u8]>, Box<[u8]>);

impl Attributes {
    /// What a directory has that no layer describes.
    pub fn unknown() -> Self {
        Attributes {
            permissions: 0o755,
            uid: 0,
            gid: 0,
            mtime_seconds: 0,
            mtime_nanoseconds: 0,
            xattrs: Box::default(),
        }
    }

    /// Bytes of the names and values of its extended attributes.
    pub(super) fn xattr_bytes(&self) -> usize {
        self.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum()
    }
}

/// Where the chunks of a file are in the builder's list of references.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileData {
    /// Bytes of the file.
    pub size: u64,
    /// The reference to its first chunk; the rest follow.
    pub first: u32,
}

/// One statement of a layer. Paths are as stored: [`clean`] is applied by the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A directory is here.
    Directory(Attributes),
    /// A regular file is here.
    File(Attributes, FileData),
    /// A symbolic link with this target is here.
    Link(Attributes, Vec<u8>),
    /// A device with this major and minor number is here.
    Device(Attributes, FileKind, u32, u32),
    /// A pipe or socket is here.
    Special(Attributes, FileKind),
    /// This is another name of the file at a path.
    HardLink(Vec<u8>),
}

/// The components of a path, as container runtimes read it: relative to the root wherever it
/// starts, `.` ignored, `..` taken back textually and never leading above the root.
pub fn clean(path: &[u8]) -> Result<Vec<&[u8]>> {
    let shown = || String::from_utf8_lossy(&path[..path.len().min(80)]).into_owned();
    if path.len() > PATH_MAX_BYTES {
        return Err(malformed!("a path of {} bytes: {:?}...", path.len(), shown()));
    }
    if path.contains(&0) {
        return Err(malformed!("a NUL in the path {:?}", shown()));
    }
    let mut components = Vec::new();
    for component in path.split(|&byte| byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => drop(components.pop()),
            name => components.push(name),
        }
    }
    Ok(components)
}

/// Refuses targets that no file system takes.
pub fn check_link_target(target: &[u8]) -> Result<()> {
    if target.is_empty() || target.len() as u64 >= LINK_TARGET_MAX_BYTES || target.contains(&0) {
        return Err(malformed!(
            "a symbolic link with a target of {} bytes: 1 to {} without NUL are allowed",
            target.len(),
            LINK_TARGET_MAX_BYTES - 1
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_never_lead_above_the_root() {
        let cases: [(&str, &[&str]); 7] = [
            ("a/b", &["a", "b"]),
            ("./a//b/", &["a", "b"]),
            ("/a", &["a"]),
            ("../../a", &["a"]),
            ("a/../../b", &["b"]),
            ("", &[]),
            ("./", &[]),
        ];
        for (path, expected) in cases {
            let expected: Vec<&[u8]> = expected.iter().map(|name| name.as_bytes()).collect();
            assert_eq!(clean(path.as_bytes()), Ok(expected), "{path}");
        }
        assert!(clean(b"a\0b").is_err());
        assert!(clean(&[b'a'; PATH_MAX_BYTES + 1]).is_err());
    }
}
