//! The kernel's list of mounts, /proc/PID/mountinfo.
//!
//! Pure except for [`read`]. Field layout: proc_pid_mountinfo(5). Never guesses: a line that does
//! not parse is left out.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is seen.
    pub mountpoint: PathBuf,
    /// What of the file system is seen there; `/` is the whole.
    pub root: PathBuf,
    /// Whether mounts below it are made in other namespaces, too.
    pub is_shared: bool,
    /// The file system's type.
    pub kind: String,
    /// What it was mounted from: a device, a file, or a word.
    pub source: PathBuf,
    /// The options of the superblock.
    pub options: String,
}

impl Mount {
    /// The value of an option like `fsid=value`.
    pub fn option(&self, name: &str) -> Option<&str> {
        self.options.split(',').find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
    }
}

/// The mounts this process can see, or those another one can, oldest first.
///
/// # Errors
/// `NotFound` if that process is gone.
pub fn read(process: Option<u32>) -> Result<Vec<Mount>> {
    let path = match process {
        None => "/proc/self/mountinfo".to_owned(),
        Some(process) => format!("/proc/{process}/mountinfo"),
    };
    match std::fs::read(&path) {
        Ok(bytes) => Ok(parse(&bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && process.is_some() => {
            Err(Error::NotFound(format!("{path}: the process has ended")))
        }
        Err(error) => Err(Error::io(&error, format!("cannot read {path}"))),
    }
}

/// The topmost mount at exactly this place.
pub fn at<'a>(mounts: &'a [Mount], mountpoint: &Path) -> Option<&'a Mount> {
    mounts.iter().rev().find(|mount| mount.mountpoint == mountpoint)
}

/// Parses the whole list.
pub fn parse(mountinfo: &[u8]) -> Vec<Mount> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// "36 35 0:52 / /mnt ro,relatime shared:1 - erofs none ro,fsid=demo,domain_id=d"
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let root = path(fields.nth(3)?);
    let mountpoint = path(fields.next()?);
    let mut optional = fields.by_ref().skip(1).take_while(|field| *field != b"-");
    let is_shared = optional.any(|field| field.starts_with(b"shared:"));
    if is_shared {
        optional.for_each(drop);
    }
    let kind = String::from_utf8(unescape(fields.next()?)).ok()?;
    let source = path(fields.next()?);
    let options = String::from_utf8(unescape(fields.next()?)).ok()?;
    Some(Mount { mountpoint, root, is_shared, kind, source, options })
}

fn path(field: &[u8]) -> PathBuf {
    PathBuf::from(OsString::from_vec(unescape(field)))
}

/// The kernel writes space, tab, newline and backslash as \040 and so on (mangle_path).
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let octal = match rest {
            [b'\\', a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        plain.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &rest[4..] } else { tail };
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 1 254:1 / / rw,relatime - ext4 /dev/root rw\n\
        40 22 0:40 / /mnt/a\\040b ro,relatime shared:7 master:2 - erofs none ro,fsid=demo,x=y\n\
        41 22 254:1 /var/c /run/c rw,relatime master:9 - ext4 /dev/root rw\n\
        43 22 0:43 / /mnt/a\\040b ro,relatime - erofs /var/v\\134 ro,user_xattr\n\
        broken line\n";

    #[test]
    fn every_field_is_read_whatever_stands_between() {
        let mounts = parse(TABLE);
        assert_eq!(mounts.len(), 4);
        let shared: Vec<bool> = mounts.iter().map(|mount| mount.is_shared).collect();
        assert_eq!(shared, [false, true, false, false]);
        assert_eq!(mounts[1].mountpoint, Path::new("/mnt/a b"));
        assert_eq!((mounts[1].kind.as_str(), mounts[1].option("fsid")), ("erofs", Some("demo")));
        assert_eq!(mounts[1].option("fs"), None);
        assert_eq!(mounts[2].root, Path::new("/var/c"));
        assert_eq!(mounts[3].source, Path::new("/var/v\\"));
    }

    #[test]
    fn topmost_mount_of_a_place_is_the_one_seen() {
        let mounts = parse(TABLE);
        assert_eq!(at(&mounts, Path::new("/mnt/a b")), mounts.last());
        assert_eq!(at(&mounts, Path::new("/mnt")), None);
    }

    #[test]
    fn escapes_are_octal_and_nothing_else() {
        assert_eq!(unescape(b"a\\040b\\134c"), b"a b\\c");
        assert_eq!(unescape(b"\\04"), b"\\04");
        assert_eq!(unescape(b"\\999"), b"\\999");
        assert_eq!(unescape(b"\\777"), b"\\777");
    }

    #[test]
    fn a_cut_table_is_no_panic_and_this_process_has_a_root() {
        for end in 0..TABLE.len() {
            parse(&TABLE[..end]);
        }
        for process in [None, Some(std::process::id())] {
            assert!(at(&read(process).unwrap(), Path::new("/")).is_some());
        }
        assert!(matches!(read(Some(u32::MAX)), Err(Error::NotFound(_))));
    }
}
