//! Which images are mounted: those of EROFS in the kernel's own list that come through fscache.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::upcall::mountinfo::{self, Mount};

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
    Ok(mountinfo::read(None)?.iter().filter_map(image_mount).collect())
}

/// The topmost mount at exactly this place.
pub fn at<'a>(mounts: &'a [ImageMount], mountpoint: &Path) -> Option<&'a ImageMount> {
    mounts.iter().rev().find(|mount| mount.mountpoint == mountpoint)
}

fn image_mount(mount: &Mount) -> Option<ImageMount> {
    let fsid = mount.option("fsid").filter(|_| mount.kind == "erofs")?;
    Some(ImageMount {
        mountpoint: mount.mountpoint.clone(),
        fsid: fsid.to_owned(),
        domain_id: mount.option("domain_id").map(str::to_owned),
        whole: mount.root == Path::new("/"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 1 254:1 / / rw,relatime - ext4 /dev/root rw\n\
        40 22 0:40 / /mnt/a\\040b ro,relatime shared:7 - erofs none ro,fsid=demo,domain_id=shared\n\
        41 22 0:41 / /plain ro,relatime - erofs /dev/loop0 ro,user_xattr\n\
        42 22 0:42 /etc /bound ro,relatime - erofs none ro,user_xattr,acl,fsid=other\n\
        43 22 0:43 / /mnt/a\\040b ro,relatime - erofs none ro,fsid=top\n\
        44 22 0:44 / /other rw - ext4 none rw,fsid=no\n";

    fn images() -> Vec<ImageMount> {
        mountinfo::parse(TABLE).iter().filter_map(image_mount).collect()
    }

    #[test]
    fn only_fscache_mounts_of_erofs_count() {
        let mounts = images();
        let fsids: Vec<&str> = mounts.iter().map(|mount| mount.fsid.as_str()).collect();
        assert_eq!(fsids, ["demo", "other", "top"]);
        assert_eq!(mounts[0].mountpoint, Path::new("/mnt/a b"));
        assert_eq!((mounts[0].domain(), mounts[1].domain()), ("shared", "other"));
        assert_eq!((mounts[0].whole, mounts[1].whole), (true, false));
    }

    #[test]
    fn the_topmost_mount_of_a_place_is_the_one_seen() {
        let mounts = images();
        assert_eq!(at(&mounts, Path::new("/mnt/a b")).map(|m| m.fsid.as_str()), Some("top"));
        assert_eq!(at(&mounts, Path::new("/mnt")), None);
    }
}
