//! What is pushed to tools/registryd can be pulled from it, by us and by a real client.
//!
//! The real client is skopeo: `tools/test` installs it; without it these tests fail, they are not
//! skipped.

mod support;

use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use support::http::Client;
use support::registry::Registry;
use tempfile::TempDir;

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes a blob into an OCI layout; says how a manifest names it.
fn keep(layout: &Path, media_type: &str, bytes: &[u8]) -> Value {
    let hex = sha256(bytes);
    fs::write(layout.join("blobs/sha256").join(&hex), bytes).unwrap();
    let media_type = format!("application/vnd.oci.image.{media_type}");
    json!({ "mediaType": media_type, "digest": format!("sha256:{hex}"), "size": bytes.len() })
}

/// An OCI layout with one image of one layer, tagged `v1`.
fn layout() -> TempDir {
    let folder = TempDir::new().unwrap();
    fs::create_dir_all(folder.path().join("blobs/sha256")).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(300_000);
    tar.append_data(&mut header, "file", [7u8; 300_000].as_slice()).unwrap();
    let tar = tar.into_inner().unwrap();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::none());
    gzip.write_all(&tar).unwrap();
    let layer = keep(folder.path(), "layer.v1.tar+gzip", &gzip.finish().unwrap());
    let diff_id = format!("sha256:{}", sha256(&tar));
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [diff_id] },
    });
    let config = keep(folder.path(), "config.v1+json", config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": config, "layers": [layer],
    });
    let mut entry = keep(folder.path(), "manifest.v1+json", manifest.to_string().as_bytes());
    entry["annotations"] = json!({ "org.opencontainers.image.ref.name": "v1" });
    let index = json!({ "schemaVersion": 2, "manifests": [entry] });
    fs::write(folder.path().join("index.json"), index.to_string()).unwrap();
    fs::write(folder.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    folder
}

fn skopeo(arguments: &[&str]) {
    let output = Command::new("skopeo").arg("--insecure-policy").args(arguments).output();
    let output = output.expect("skopeo is not installed: apt-get install skopeo");
    assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn skopeo_pushes_and_pulls_the_same_image() {
    for options in [&[][..], &["--auth", "basic"], &["--auth", "bearer"], &["--tls"]] {
        let registry = Registry::start(options);
        let (there, back) = (layout(), TempDir::new().unwrap());
        let from = format!("oci:{}:v1", there.path().display());
        let to = format!("oci:{}:v1", back.path().display());
        let image = format!("docker://{}/library/app:v1", registry.address());
        let credentials = if options.contains(&"--auth") { "user:password" } else { "" };
        let mut push = vec!["copy", "--dest-tls-verify=false", &from, &image];
        let mut pull = vec!["copy", "--src-tls-verify=false", &image, &to];
        if !credentials.is_empty() {
            push.extend(["--dest-creds", credentials]);
            pull.extend(["--src-creds", credentials]);
        }
        skopeo(&push);
        skopeo(&pull);
        for entry in fs::read_dir(there.path().join("blobs/sha256")).unwrap() {
            let path = entry.unwrap().path();
            let other = back.path().join("blobs/sha256").join(path.file_name().unwrap());
            assert_eq!(fs::read(&path).unwrap(), fs::read(other).unwrap(), "{options:?}");
        }
        assert!(fs::read_dir(registry.root().join("uploads")).unwrap().next().is_none());
    }
}

#[test]
fn uploads_are_whole_or_in_chunks_or_mounted() {
    let registry = Registry::start(&[]);
    let mut client = Client::connect(registry.address());
    let digest = |bytes: &[u8]| format!("sha256:{}", sha256(bytes));
    let begin = |digest: &str| format!("/v2/a/blobs/uploads/?digest={digest}");

    let whole = client.request("POST", &begin(&digest(b"whole")), &[], b"whole").unwrap();
    assert_eq!(whole.status, 201);
    let started = client.request("POST", "/v2/a/blobs/uploads/", &[], &[]).unwrap();
    let place = started.header("location").unwrap().to_owned();
    assert_eq!(started.status, 202);
    let first = client.request("PATCH", &place, &[("Content-Range", "0-3")], b"in c").unwrap();
    assert_eq!((first.status, first.header("range")), (202, Some("0-3")));
    let gap = client.request("PATCH", &place, &[("Content-Range", "9-11")], b"gap").unwrap();
    assert_eq!(gap.status, 400);
    let last = format!("{place}?digest={}", digest(b"in chunks"));
    assert_eq!(client.request("PUT", &last, &[], b"hunks").unwrap().status, 201);
    let path = format!("/v2/b/blobs/{}", digest(b"in chunks"));
    assert_eq!(client.get(&path).unwrap().body, b"in chunks");

    let mount = |digest: &str| format!("/v2/b/blobs/uploads/?mount={digest}&from=a");
    let mounted = client.request("POST", &mount(&digest(b"whole")), &[], &[]).unwrap();
    assert_eq!(mounted.status, 201);
    let absent = client.request("POST", &mount(&digest(b"absent")), &[], &[]).unwrap();
    assert_eq!(absent.status, 202);
}

#[test]
fn bytes_that_are_not_their_digest_are_refused() {
    let registry = Registry::start(&[]);
    let mut client = Client::connect(registry.address());
    let digest = format!("sha256:{}", sha256(b"right"));
    let begin = format!("/v2/a/blobs/uploads/?digest={digest}");
    assert_eq!(client.request("POST", &begin, &[], b"wrong").unwrap().status, 400);
    assert_eq!(client.get(&format!("/v2/a/blobs/{digest}")).unwrap().status, 404);
    let manifest = format!("/v2/a/manifests/{digest}");
    assert_eq!(client.request("PUT", &manifest, &[], b"{}").unwrap().status, 400);
    let escape = "/v2/a/../../../b/manifests/tag";
    assert_eq!(client.request("PUT", escape, &[], b"{}").unwrap().status, 400);
}
