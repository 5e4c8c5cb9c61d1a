//! The tree that is served, made of plain files so that a test or a person can make one by hand.
//!
//! ```text
//! DIR/blobs/sha256/HEX              a blob; HEX is what it is asked for by, its content is not
//!                                   looked at: a file with a wrong name is served all the same
//! DIR/manifests/REPO/TAG            a manifest, the very JSON; REPO may have several parts
//! DIR/manifests/REPO/sha256:HEX     the same, pushed by digest
//! DIR/uploads/                      uploads that have not ended; emptied at start
//! ```
//! Every blob is in every repository. Files are opened anew for each request, so what a test
//! changes on disk is served from then on. A name that could leave the tree names nothing.

use crate::wire::invalid;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// A manifest is JSON that somebody reads whole.
pub const MANIFEST_BYTES_MAX: u64 = 8 << 20;

pub struct Tree {
    root: PathBuf,
}

impl Tree {
    pub fn open(root: &Path) -> io::Result<Self> {
        let tree = Tree { root: root.to_owned() };
        for folder in ["blobs/sha256", "manifests", "uploads"] {
            fs::create_dir_all(root.join(folder))?;
        }
        Ok(tree)
    }

    /// Throws away what another process left half done.
    pub fn forget_uploads(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.root.join("uploads"))? {
            fs::remove_file(entry?.path())?;
        }
        Ok(())
    }

    /// The file and the size of a blob; `None` when there is none.
    pub fn blob(&self, digest: &str) -> io::Result<Option<(File, u64)>> {
        let Some(path) = self.blob_path(digest) else { return Ok(None) };
        match File::open(path) {
            Ok(file) => {
                let size = file.metadata()?.len();
                Ok(Some((file, size)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Where a blob lies; `None` when `digest` is not `sha256:` and 64 hexadecimal digits.
    pub fn blob_path(&self, digest: &str) -> Option<PathBuf> {
        let hex = digest.strip_prefix("sha256:")?;
        let good = hex.len() == 64 && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        good.then(|| self.root.join("blobs/sha256").join(hex))
    }

    /// The bytes of a manifest, by tag or digest.
    pub fn manifest(&self, repo: &str, reference: &str) -> Option<Vec<u8>> {
        let path = self.manifest_path(repo, reference)?;
        if let Ok(bytes) = fs::read(&path) {
            return Some(bytes);
        }
        if !reference.starts_with("sha256:") {
            return None;
        }
        // Laid down by tag, asked for by digest.
        let entries = fs::read_dir(path.parent()?).ok()?.flatten();
        let mut tagged = entries.filter_map(|entry| fs::read(entry.path()).ok());
        tagged.find(|bytes| digest(bytes) == reference)
    }

    /// Keeps a manifest under its digest and under `reference`; says its digest.
    pub fn put_manifest(&self, repo: &str, reference: &str, bytes: &[u8]) -> io::Result<String> {
        let path = self.manifest_path(repo, reference).ok_or_else(|| invalid("a bad name"))?;
        let digest = digest(bytes);
        if reference.starts_with("sha256:") && reference != digest {
            return Err(invalid("the manifest does not have this digest"));
        }
        let folder = path.parent().ok_or_else(|| invalid("a bad name"))?;
        fs::create_dir_all(folder)?;
        fs::write(folder.join(&digest), bytes)?;
        fs::write(&path, bytes)?;
        Ok(digest)
    }

    /// The tags of a repository in order; `None` when there is no such repository.
    pub fn tags(&self, repo: &str) -> Option<Vec<String>> {
        let folder = self.manifest_path(repo, "tag")?.parent()?.to_owned();
        let entries = fs::read_dir(folder).ok()?.flatten();
        let files = entries.filter(|entry| entry.path().is_file());
        let names = files.filter_map(|entry| entry.file_name().into_string().ok());
        let mut tags: Vec<String> = names.filter(|name| !name.starts_with("sha256:")).collect();
        tags.sort();
        (!tags.is_empty()).then_some(tags)
    }

    /// Where the upload `id` collects its bytes.
    pub fn upload_path(&self, id: &str) -> Option<PathBuf> {
        let good = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_alphanumeric());
        good.then(|| self.root.join("uploads").join(id))
    }

    fn manifest_path(&self, repo: &str, reference: &str) -> Option<PathBuf> {
        let plain = |part: &str| {
            let word = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte);
            !part.is_empty() && !part.starts_with('.') && part.bytes().all(word)
        };
        let good = repo.split('/').all(plain) && plain(reference);
        good.then(|| self.root.join("manifests").join(repo).join(reference))
    }
}

/// `sha256:` and the digest in hexadecimal digits.
pub fn digest(bytes: &[u8]) -> String {
    hex_digest(&Sha256::digest(bytes))
}

/// The written form of a digest.
pub fn hex_digest(digest: &[u8]) -> String {
    let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}
