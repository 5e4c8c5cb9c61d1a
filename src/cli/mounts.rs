//! Which images are mounted: the kernel's own list, /proc/self/mountinfo.
//!
//! Pure except for `read`. Field layout: proc_pid_mountinfo(5). Never guesses: a line that does not
//! parse is not a mount of ours.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// An EROFS mount that comes through fscache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageMount {
    /// Where it is seen.
    pub mountpoint: PathBuf,
    /// The image's id.
    pub fsid: String,
    /// The shared domain, if it was mounted into one.
    pub domain_id: Option<String>,
    /// Whether it shows the image's root (a bind mount may show a part).
    pub whole: bool,
}

impl ImageMount {
    /// The domain the daemon knows the image by: an image outside a shared domain is its own.
    pub fn domain(&self) -> &str {
        self.domain_id.as_deref().unwrap_or(&self.fsid)
    }

    /// Whether both show the same image.
    pub fn same_image(&self, other: &ImageMount) -> bool {
        self.fsid == other.fsid && self.domain_id == other.domain_id
    }
}

/// Every image mount this process can see, oldest first.
pub fn read() -> Result<Vec<ImageMount>> {
    let path = "/proc/self/mountinfo";
    let bytes =
        std::fs::read(path).map_err(|error| Error::io(&error, format!("cannot read {path}")))?;
    Ok(parse(&bytes))
}

/// The topmost mount at exactly this place.
pub fn at<'a>(mounts: &'a [ImageMount], mountpoint: &Path) -> Option<&'a ImageMount> {
    mounts.iter().rev().find(|mount| mount.mountpoint == mountpoint)
}

fn parse(mountinfo: &[u8]) -> Vec<ImageMount> {
    mountinfo.split(|&byte| byte == b'\n').filter_map(parse_line).collect()
}

/// "36 35 0:52 / /mnt ro,relatime shared:1 - erofs none ro,fsid=demo,domain_id=d"
fn parse_line(line: &[u8]) -> Option<ImageMount> {
    let mut fields = line.split(|&byte| byte == b' ');
    let root = fields.nth(3)?;
    let mountpoint = fields.next()?;
    fields.by_ref().find(|field| *field == b"-")?;
    if fields.next()? != b"erofs" {
        return None;
    }
    let options = String::from_utf8(unescape(fields.nth(1)?)).ok()?;
    let option = |name: &str| {
        options.split(',').find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
    };
    Some(ImageMount {
        mountpoint: PathBuf::from(std::ffi::OsString::from_vec(unescape(mountpoint))),
        fsid: option("fsid")?.to_owned(),
        domain_id: option("domain_id").map(str::to_owned),
        whole: root == b"/",
    })
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
        40 22 0:40 / /mnt/a\\040b ro,relatime shared:7 - erofs none ro,fsid=demo,domain_id=shared\n\
        41 22 0:41 / /plain ro,relatime - erofs /dev/loop0 ro,user_xattr\n\
        42 22 0:42 /etc /bound ro,relatime - erofs none ro,user_xattr,acl,fsid=other\n\
        43 22 0:43 / /mnt/a\\040b ro,relatime - erofs none ro,fsid=top\n\
        broken line\n";

    #[test]
    fn only_fscache_mounts_of_erofs_count() {
        let mounts = parse(TABLE);
        let fsids: Vec<&str> = mounts.iter().map(|mount| mount.fsid.as_str()).collect();
        assert_eq!(fsids, ["demo", "other", "top"]);
        assert_eq!(mounts[0].mountpoint, Path::new("/mnt/a b"));
        assert_eq!((mounts[0].domain(), mounts[1].domain()), ("shared", "other"));
        assert_eq!((mounts[0].whole, mounts[1].whole), (true, false));
    }

    #[test]
    fn the_topmost_mount_of_a_place_is_the_one_seen() {
        let mounts = parse(TABLE);
        assert_eq!(at(&mounts, Path::new("/mnt/a b")).map(|m| m.fsid.as_str()), Some("top"));
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
    fn a_cut_or_hostile_table_is_no_panic() {
        for end in 0..TABLE.len() {
            parse(&TABLE[..end]);
        }
    }
}
