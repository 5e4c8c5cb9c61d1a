//! What a layer holds, decided once, when it is committed.
//!
//! A layer is an image when its makers say so, or when it stands alone and holds nothing but a
//! bootstrap (what the Docker way of shipping these images looks like). The tree was unpacked from
//! a hostile tar: no symbolic link in it is followed.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};
use sha2::{Digest as _, Sha256};

use super::labels::{self, Labels};
use super::snapshot_records::Contents;
use crate::config::{BOOTSTRAP_MAX_BYTES, MIB};
use crate::error::{Error, Result};
use crate::image::layer::BOOTSTRAP_PATH;

/// Where EROFS has its superblock, and how that begins.
const SUPERBLOCK_OFFSET: u64 = 1024;
const EROFS_MAGIC: [u8; 4] = 0xe0f5_e1e2_u32.to_le_bytes();

/// Looks into the directory of a layer that is about to be committed with these labels. The
/// bootstrap of an image is on disk when this returns: containerd does not fetch it again.
///
/// # Errors
/// `Malformed` for a layer that is said to hold a bootstrap and does not.
pub fn contents(files: &Path, labels: &Labels, stands_alone: bool) -> Result<Contents> {
    let is_marked = labels::is_bootstrap_layer(labels);
    let looks_like_one =
        stands_alone && labels::image_reference(labels).is_some() && holds_only_a_bootstrap(files);
    if !(is_marked || looks_like_one) {
        return Ok(Contents::Files);
    }
    match digest_of_bootstrap(files) {
        Ok(digest) => Ok(Contents::Image(digest)),
        Err(error) if is_marked => Err(error.context("a layer that is marked as a bootstrap")),
        Err(_) => Ok(Contents::Files),
    }
}

fn holds_only_a_bootstrap(files: &Path) -> bool {
    let only = |folder: &Path, name: &str| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut names = entries.map(|entry| entry.file_name()).take(2);
        names.next().is_some_and(|first| first == name) && names.next().is_none()
    };
    let (folder, file) = BOOTSTRAP_PATH.split_once('/').unwrap_or_default();
    only(files, folder)
        && fs::symlink_metadata(files.join(folder)).is_ok_and(|it| it.is_dir())
        && only(&files.join(folder), file)
}

fn digest_of_bootstrap(files: &Path) -> Result<String> {
    let path = files.join(BOOTSTRAP_PATH);
    let failed = |error: std::io::Error| Error::io(&error, path.display().to_string());
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
    let mut file = openat2(AT_FDCWD, &path, how)
        .map(File::from)
        .map_err(|errno| Error::system(errno as i32, path.display().to_string()))?;
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() || metadata.len() > BOOTSTRAP_MAX_BYTES as u64 {
        return Err(Error::Malformed(format!(
            "{} is no file of at most {BOOTSTRAP_MAX_BYTES} bytes",
            path.display()
        )));
    }
    let mut magic = [0; 4];
    let read = file.read_exact_at(&mut magic, SUPERBLOCK_OFFSET);
    if read.is_err() || magic != EROFS_MAGIC {
        return Err(Error::Malformed(format!("{} is no EROFS image", path.display())));
    }
    let mut digest = Sha256::new();
    let mut piece = vec![0; MIB];
    loop {
        match file.read(&mut piece).map_err(failed)? {
            0 => break,
            count => digest.update(&piece[..count]),
        }
    }
    file.sync_all().map_err(failed)?;
    let mut folder = path.as_path();
    while let Some(above) = folder.parent().filter(|above| above.starts_with(files)) {
        File::open(above).and_then(|folder| folder.sync_all()).map_err(failed)?;
        folder = above;
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAMED: (&str, &str) = (labels::CRI_IMAGE_REF, "r.example/app:1");
    const MARKED: (&str, &str) = (labels::NYDUS_BOOTSTRAP, "true");

    fn labelled(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    /// A layer with a bootstrap of `magic`, and what else `more` makes.
    fn layer(magic: [u8; 4], more: impl Fn(&Path)) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        fs::create_dir(directory.path().join("image")).unwrap();
        let mut bytes = vec![0; 4096];
        bytes[1024..1028].copy_from_slice(&magic);
        fs::write(directory.path().join(BOOTSTRAP_PATH), bytes).unwrap();
        more(directory.path());
        directory
    }

    #[test]
    fn a_marked_layer_is_an_image_whatever_else_it_holds() {
        let layer = layer(EROFS_MAGIC, |top| fs::write(top.join("other"), "x").unwrap());
        let held = contents(layer.path(), &labelled(&[MARKED]), false).unwrap();
        let Contents::Image(digest) = held else { panic!("{held:?}") };
        let bytes = fs::read(layer.path().join(BOOTSTRAP_PATH)).unwrap();
        let expected: String = Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(digest, expected);
    }

    #[test]
    fn an_unmarked_layer_is_an_image_only_alone_and_named() {
        let plain = layer(EROFS_MAGIC, |_| ());
        let is_image = |path: &Path, labels: &[(&str, &str)], alone| {
            contents(path, &labelled(labels), alone).unwrap() != Contents::Files
        };
        assert!(is_image(plain.path(), &[NAMED], true));
        assert!(!is_image(plain.path(), &[NAMED], false));
        assert!(!is_image(plain.path(), &[], true));
        let beside = layer(EROFS_MAGIC, |top| fs::write(top.join("image/x"), "x").unwrap());
        assert!(!is_image(beside.path(), &[NAMED], true));
        assert!(!is_image(layer(*b"erof", |_| ()).path(), &[NAMED], true));
    }

    #[test]
    fn a_marked_layer_without_a_bootstrap_is_refused() {
        let away = |top: &Path| fs::remove_file(top.join(BOOTSTRAP_PATH)).unwrap();
        let linked = |top: &Path| {
            fs::rename(top.join(BOOTSTRAP_PATH), top.join("image/real")).unwrap();
            std::os::unix::fs::symlink("real", top.join(BOOTSTRAP_PATH)).unwrap();
        };
        let outside = |top: &Path| {
            fs::rename(top.join("image"), top.join("real")).unwrap();
            std::os::unix::fs::symlink("real", top.join("image")).unwrap();
        };
        let folder = |top: &Path| {
            away(top);
            fs::create_dir(top.join(BOOTSTRAP_PATH)).unwrap();
        };
        for layer in [
            layer(EROFS_MAGIC, away),
            layer(EROFS_MAGIC, linked),
            layer(EROFS_MAGIC, outside),
            layer(EROFS_MAGIC, folder),
            layer([0; 4], |_| ()),
        ] {
            assert!(contents(layer.path(), &labelled(&[MARKED, NAMED]), true).is_err());
        }
    }
}
