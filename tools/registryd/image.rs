//! `registryd load`: makes a lazy-loading image out of a folder, in the tree of a registry.
//!
//! The folder holds `image.boot` and blobs named by 64 hexadecimal digits, as the test images do.
//! The manifest has a layer for each blob, which a runtime must skip, and as the last layer a
//! tar+gzip that holds the bootstrap as `image/image.boot`. Writes files only; a registry that is
//! running on the same tree serves the image at once.

use crate::tree::{Tree, digest};
use crate::wire::invalid;
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const OCI: &str = "application/vnd.oci.image";

#[derive(clap::Args)]
pub struct Load {
    /// The tree of the registry; made when it is missing.
    #[arg(long)]
    root: PathBuf,
    #[arg(long)]
    repo: String,
    #[arg(long)]
    tag: String,
    /// The folder with image.boot and its blobs.
    image: PathBuf,
    /// A file that becomes a blob under its own digest: the untouched layer an image refers to.
    #[arg(long)]
    also: Vec<PathBuf>,
}

/// Puts the image into the tree and prints its digest.
pub fn load(options: &Load) -> io::Result<()> {
    let tree = Tree::open(&options.root)?;
    let mut layers = Vec::new();
    let mut diff_ids = Vec::new();
    let references = keep_untouched_layers(&tree, &options.also)?;
    for path in blobs(&options.image)? {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let blob = format!("sha256:{name}");
        let place = tree.blob_path(&blob).ok_or_else(|| invalid("a blob with a bad name"))?;
        let size = fs::copy(&path, place)?;
        let mut annotations = json!({ "containerd.io/snapshot/nydus-blob": "true" });
        if let [reference] = references.as_slice() {
            annotations["containerd.io/snapshot/nydus-ref"] = json!(reference);
        }
        diff_ids.push(blob.clone());
        layers.push(json!({
            "mediaType": format!("{OCI}.layer.nydus.blob.v1"),
            "digest": blob, "size": size, "annotations": annotations,
        }));
    }
    let bootstrap = fs::read(options.image.join("image.boot"))?;
    let tar = bootstrap_tar(&bootstrap)?;
    let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
    gzip.write_all(&tar)?;
    diff_ids.push(digest(&tar));
    let mut layer = keep(&tree, &format!("{OCI}.layer.v1.tar+gzip"), &gzip.finish()?)?;
    layer["annotations"] = json!({
        "containerd.io/snapshot/nydus-bootstrap": "true",
        "containerd.io/snapshot/nydus-fs-version": "6",
    });
    layers.push(layer);
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = keep(&tree, &format!("{OCI}.config.v1+json"), config.to_string().as_bytes())?;
    let manifest = json!({
        "schemaVersion": 2, "mediaType": format!("{OCI}.manifest.v1+json"),
        "config": config, "layers": layers,
    });
    let manifest = manifest.to_string();
    let digest = tree.put_manifest(&options.repo, &options.tag, manifest.as_bytes())?;
    println!("{digest}");
    Ok(())
}

/// The files of the folder that are named like a blob, in order.
fn blobs(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let paths: io::Result<Vec<PathBuf>> =
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths?;
    let is_blob = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    paths.retain(|path| is_blob(path));
    paths.sort();
    Ok(paths)
}

fn keep_untouched_layers(tree: &Tree, files: &[PathBuf]) -> io::Result<Vec<String>> {
    let keep_one = |file: &PathBuf| {
        let bytes = fs::read(file)?;
        keep(tree, "", &bytes).map(|_| digest(&bytes))
    };
    files.iter().map(keep_one).collect()
}

/// Writes a blob; says how a manifest names it.
fn keep(tree: &Tree, media_type: &str, bytes: &[u8]) -> io::Result<Value> {
    let digest = digest(bytes);
    let place = tree.blob_path(&digest).ok_or_else(|| invalid("a bad digest"))?;
    fs::write(place, bytes)?;
    Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
}

fn bootstrap_tar(bootstrap: &[u8]) -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut folder = tar::Header::new_ustar();
    folder.set_entry_type(tar::EntryType::Directory);
    folder.set_mode(0o755);
    folder.set_size(0);
    tar.append_data(&mut folder, "image/", io::empty())?;
    let mut file = tar::Header::new_ustar();
    file.set_mode(0o644);
    file.set_size(bootstrap.len() as u64);
    tar.append_data(&mut file, "image/image.boot", bootstrap)?;
    tar.into_inner()
}
