//! A lazily loaded image as a layer: recognised when it is unpacked, described when it is mounted.
//!
//! Such a layer is the lowest of its image and holds `image/image.boot` and nothing beside it
//! (converters may put more into `image`). A tree with other files is an ordinary layer, whatever
//! it calls its files: mounting the image would hide them.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};

use super::beneath::{self, Beneath};
use super::docker_origin::Origin;
use super::layers::RootAttributes;
use crate::config;
use crate::error::{Error, Result};
use crate::image::Bootstrap;

/// The bootstrap's place in a layer.
pub const BOOTSTRAP_PATH: &str = "image/image.boot";
/// EROFS's magic number and where it stands.
const MAGIC: [u8; 4] = 0xe0f5_e1e2u32.to_le_bytes();
const MAGIC_OFFSET: u64 = 1024;

/// The root of the image that a layer is the bootstrap of; None for any other layer.
///
/// # Errors
/// What is wrong with a bootstrap that is one but cannot be served.
pub fn recognise(layer: &Path) -> Result<Option<RootAttributes>> {
    let root = Beneath::open(layer)?;
    let Some(bytes) = bootstrap_of(&root)
        .map_err(|error| Error::io(&error, format!("cannot read {}", layer.display())))?
    else {
        return Ok(None);
    };
    let named = |error: Error| error.context(format_args!("the layer's {BOOTSTRAP_PATH}"));
    let bootstrap = Bootstrap::parse(bytes).map_err(named)?;
    let root = bootstrap.tree().root().map_err(named)?;
    Ok(Some(RootAttributes { mode: u32::from(root.mode) & 0o7777, uid: root.uid, gid: root.gid }))
}

fn bootstrap_of(root: &Beneath) -> std::io::Result<Option<Vec<u8>>> {
    let top = beneath::open_directory(root.directory(b"")?, b".")?;
    if beneath::names(&top)? != [b"image"] {
        return Ok(None);
    }
    // A link or a file of that name is not it.
    let Ok(image) = beneath::open_directory(&top, b"image") else { return Ok(None) };
    let Ok(file) = beneath::open_file(&image, b"image.boot") else { return Ok(None) };
    let mut magic = [0; 4];
    if file.read_exact_at(&mut magic, MAGIC_OFFSET).is_err() || magic != MAGIC {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    file.take(config::BOOTSTRAP_MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(Some(bytes))
}

/// The entry the daemon registers an image with. Images share blobs within `domain`; an empty one
/// makes each its own (Linux before 6.1 has no shared domains).
pub fn entry(id: &str, domain: &str, directory: &Path, origin: &Origin) -> Result<Value> {
    let text = |path: &Path| {
        path.to_str().map(str::to_owned).ok_or_else(|| {
            Error::Malformed(format!("{}: the daemon needs paths in UTF-8", path.display()))
        })
    };
    let id = format!("docker-{id}");
    Ok(json!({
        "type": "bootstrap",
        "id": id,
        "domain_id": if domain.is_empty() { &id } else { domain },
        "config": {
            "id": id,
            "backend_type": "registry",
            "backend_config": {
                "scheme": origin.scheme.as_str(),
                "host": origin.host,
                "repo": origin.repo,
            },
            "cache_type": "fscache",
            "cache_config": { "work_dir": text(&directory.join("work"))? },
            "metadata_path": text(&directory.join("diff").join(BOOTSTRAP_PATH))?,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::origin::Scheme;
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::PathBuf;

    fn fixture() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/lz4-1m/image.boot")
    }

    fn layer() -> tempfile::TempDir {
        let layer = tempfile::tempdir().expect("a directory");
        fs::create_dir(layer.path().join("image")).expect("made");
        fs::copy(fixture(), layer.path().join(BOOTSTRAP_PATH)).expect("copied");
        layer
    }

    #[test]
    fn a_bootstrap_alone_is_an_image() {
        let layer = layer();
        fs::write(layer.path().join("image/more.json"), "{}").expect("written");
        let root = recognise(layer.path()).expect("read").expect("an image");
        assert_eq!(root.mode & 0o7000, 0);
        assert_ne!(root.mode, 0);
    }

    #[test]
    fn other_layers_are_not() {
        let beside = layer();
        fs::write(beside.path().join("file"), "").expect("written");
        assert_eq!(recognise(beside.path()), Ok(None));
        let text = layer();
        fs::write(text.path().join(BOOTSTRAP_PATH), "no EROFS").expect("written");
        assert_eq!(recognise(text.path()), Ok(None));
        let link = layer();
        fs::remove_file(link.path().join(BOOTSTRAP_PATH)).expect("removed");
        symlink(fixture(), link.path().join(BOOTSTRAP_PATH)).expect("made");
        assert_eq!(recognise(link.path()), Ok(None));
        assert_eq!(recognise(tempfile::tempdir().expect("a directory").path()), Ok(None));
    }

    #[test]
    fn a_damaged_bootstrap_fails_the_pull_by_name() {
        let damaged = layer();
        let path = damaged.path().join(BOOTSTRAP_PATH);
        let bytes = fs::read(&path).expect("read");
        fs::write(&path, &bytes[..8192]).expect("cut");
        let error = recognise(damaged.path()).expect_err("refused");
        assert!(error.to_string().contains(BOOTSTRAP_PATH), "{error}");
    }

    #[test]
    fn an_entry_names_the_registry_and_the_file() {
        let origin = Origin {
            scheme: Scheme::Http,
            host: "127.0.0.1:5000".to_owned(),
            repo: "team/app".to_owned(),
            start: super::super::start::Policy::Wait,
        };
        let entry = entry("abc", "", Path::new("/h/layers/abc"), &origin).expect("an entry");
        assert_eq!(entry["id"], "docker-abc");
        assert_eq!(entry["domain_id"], "docker-abc");
        assert_eq!(entry["config"]["metadata_path"], "/h/layers/abc/diff/image/image.boot");
        assert_eq!(entry["config"]["backend_config"]["repo"], "team/app");
    }
}
