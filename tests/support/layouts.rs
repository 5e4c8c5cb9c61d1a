//! Images to convert: OCI layouts made by the test, of layers with known tricks.

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::path::Path;

pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A layer of plain files and directories; a name ending in a slash is a directory.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, data) in files {
        let mut header = tar::Header::new_ustar();
        header.set_mtime(1_000_000);
        header.set_mode(if name.ends_with('/') { 0o755 } else { 0o640 });
        header.set_size(data.len() as u64);
        if name.ends_with('/') {
            header.set_entry_type(tar::EntryType::Directory);
        }
        builder.append_data(&mut header, name, *data).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    (0..size).map(step).collect()
}

/// Three layers: the second takes away and hides, the third replaces.
pub fn three_layers() -> Vec<Vec<u8>> {
    let (large, other) = (noise(3 << 20, 1), noise(70_000, 2));
    vec![
        tar(&[
            ("etc/", b""),
            ("etc/passwd", b"root:x:0:0::/:/bin/sh\n"),
            ("etc/gone", &other),
            ("data/", b""),
            ("data/large", &large),
            ("opaque/", b""),
            ("opaque/old", b"old"),
        ]),
        tar(&[
            ("etc/.wh.gone", b""),
            ("opaque/", b""),
            ("opaque/.wh..wh..opq", b""),
            ("opaque/new", b"new"),
        ]),
        tar(&[("etc/passwd", b"replaced\n"), ("data/copy", &large), ("empty", b"")]),
    ]
}

/// An OCI layout at `folder` with the image `tag`: the layers gzipped, for these machines.
pub fn layout(folder: &Path, tag: &str, layers: &[Vec<u8>], machines: &[&str]) {
    fs::create_dir_all(folder.join("blobs/sha256")).unwrap();
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let mut entries = Vec::new();
    for machine in machines {
        let mut entry = image(folder, layers, machine);
        entry["platform"] = json!({ "os": "linux", "architecture": machine });
        entries.push(entry);
    }
    let mut top = match entries.as_slice() {
        [one] => one.clone(),
        several => {
            let media_type = "application/vnd.oci.image.index.v1+json";
            let index =
                json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": several });
            keep(folder, media_type, index.to_string().as_bytes())
        }
    };
    top["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
    let index = json!({ "schemaVersion": 2, "manifests": [top] });
    fs::write(folder.join("index.json"), index.to_string()).unwrap();
}

fn image(folder: &Path, layers: &[Vec<u8>], machine: &str) -> Value {
    let prefix = "application/vnd.oci.image.";
    let mut descriptors = Vec::new();
    let mut history = vec![json!({ "created_by": "ENV A=b", "empty_layer": true })];
    for (number, layer) in layers.iter().enumerate() {
        // The fastest level makes one block of any layer, which cannot be entered anywhere.
        let mut gzip = GzEncoder::new(Vec::new(), Compression::default());
        gzip.write_all(layer).unwrap();
        let gzip = gzip.finish().unwrap();
        descriptors.push(keep(folder, &format!("{prefix}layer.v1.tar+gzip"), &gzip));
        history.push(json!({ "created_by": format!("RUN step {number}") }));
    }
    let diff_ids: Vec<String> =
        layers.iter().map(|layer| format!("sha256:{}", sha256(layer))).collect();
    let config = json!({
        "architecture": machine, "os": "linux", "history": history,
        "config": { "Env": ["A=b"], "Cmd": ["/bin/true"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let config = keep(folder, &format!("{prefix}config.v1+json"), config.to_string().as_bytes());
    let media_type = format!("{prefix}manifest.v1+json");
    let manifest = json!({
        "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": descriptors,
    });
    keep(folder, &media_type, manifest.to_string().as_bytes())
}

/// Writes a blob into a layout; says how a manifest names it.
pub fn keep(folder: &Path, media_type: &str, bytes: &[u8]) -> Value {
    let hex = sha256(bytes);
    fs::write(folder.join("blobs/sha256").join(&hex), bytes).unwrap();
    json!({ "mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len() })
}

/// The JSON of a blob of a layout.
pub fn document(folder: &Path, descriptor: &Value) -> Value {
    let hex = descriptor["digest"].as_str().unwrap().strip_prefix("sha256:").unwrap();
    serde_json::from_slice(&fs::read(folder.join("blobs/sha256").join(hex)).unwrap()).unwrap()
}

/// The descriptor an index of a layout has for a tag.
pub fn top(folder: &Path, tag: &str) -> Value {
    let index = fs::read(folder.join("index.json")).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let named = |entry: &&Value| entry["annotations"]["org.opencontainers.image.ref.name"] == tag;
    index["manifests"].as_array().unwrap().iter().find(named).expect("the tag is there").clone()
}
