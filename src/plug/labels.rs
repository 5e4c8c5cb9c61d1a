//! The labels clients put on snapshots: which layer of which image a snapshot is to hold.
//!
//! Pure. Four families are read: containerd's own, those of its CRI service, of nydus-snapshotter
//! and of stargz-snapshotter. Values are hostile text; what leaves here is checked or opaque.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::registry::reference::Reference;

/// The name containerd will look for the layer under: its chain id.
pub const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";
/// A layer that is a data blob of a lazily loadable image.
pub const NYDUS_BLOB: &str = "containerd.io/snapshot/nydus-blob";
/// A layer that holds `image/image.boot`.
pub const NYDUS_BOOTSTRAP: &str = "containerd.io/snapshot/nydus-bootstrap";
/// The image's name, by containerd's CRI service and everybody who imitates it.
pub const CRI_IMAGE_REF: &str = "containerd.io/snapshot/cri.image-ref";
/// The layer's digest.
pub const CRI_LAYER_DIGEST: &str = "containerd.io/snapshot/cri.layer-digest";
/// The manifest's digest.
pub const CRI_MANIFEST_DIGEST: &str = "containerd.io/snapshot/cri.manifest-digest";
/// The digests of the layer and of those above it.
pub const CRI_IMAGE_LAYERS: &str = "containerd.io/snapshot/cri.image-layers";
/// The image's name, by stargz-snapshotter's clients.
pub const STARGZ_REFERENCE: &str = "containerd.io/snapshot/remote/stargz.reference";
/// User and password a client got for this image, by nydus-snapshotter's convention.
pub const PULL_USERNAME: &str = "containerd.io/snapshot/pullusername";
/// See [`PULL_USERNAME`].
pub const PULL_SECRET: &str = "containerd.io/snapshot/pullsecret";

/// A snapshot's labels.
pub type Labels = BTreeMap<String, String>;

/// The chain id of a blob layer: it is there at once and never downloaded.
pub fn blob_layer(labels: &Labels) -> Option<&str> {
    let is_blob = labels.get(NYDUS_BLOB).is_some_and(|value| value == "true");
    labels.get(SNAPSHOT_REF).map(String::as_str).filter(|chain| is_blob && !chain.is_empty())
}

/// Whether the image's makers say that this layer holds a bootstrap.
pub fn is_bootstrap_layer(labels: &Labels) -> bool {
    labels.get(NYDUS_BOOTSTRAP).is_some_and(|value| value == "true")
}

/// The image a layer belongs to, if a client said so.
pub fn image_reference(labels: &Labels) -> Option<&str> {
    let named = [CRI_IMAGE_REF, STARGZ_REFERENCE].into_iter().find_map(|key| labels.get(key));
    named.map(String::as_str).filter(|reference| !reference.is_empty())
}

/// `backend_config` of the registry a layer's image comes from. `plain_http` says which hosts are
/// spoken to without TLS.
///
/// # Errors
/// `Malformed` when no client said which image it is, or said it wrongly.
pub fn backend(labels: &Labels, plain_http: impl Fn(&str) -> bool) -> Result<Value> {
    let named = image_reference(labels).ok_or_else(|| {
        Error::Malformed(format!(
            "no client said which image this layer belongs to ({CRI_IMAGE_REF}): set \
             disable_snapshot_annotations = false in containerd's CRI section, or pull with \
             `sluice pull`"
        ))
    })?;
    let reference = Reference::parse(named)?;
    let scheme = if plain_http(&reference.host) { "http" } else { "https" };
    let mut backend = json!({
        "scheme": scheme,
        "host": reference.host,
        "repo": reference.repo,
    });
    if let (Some(user), Some(secret)) = (labels.get(PULL_USERNAME), labels.get(PULL_SECRET)) {
        backend["auth"] = json!(STANDARD.encode(format!("{user}:{secret}")));
    }
    Ok(backend)
}

/// Whether a registry's host is this machine, where nobody else listens in.
pub fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(rest),
        None => host.split(':').next().unwrap_or(host),
    };
    let address = name.parse::<std::net::IpAddr>();
    name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// What may be shown or logged of labels: everything but secrets.
pub fn shown(labels: &Labels) -> Labels {
    let open = labels.iter().filter(|(key, _)| key.as_str() != PULL_SECRET);
    open.map(|(key, value)| (key.clone(), value.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn a_blob_layer_needs_its_mark_and_a_name() {
        let marked = labels(&[(NYDUS_BLOB, "true"), (SNAPSHOT_REF, "sha256:a")]);
        assert_eq!(blob_layer(&marked), Some("sha256:a"));
        for not in [
            labels(&[(NYDUS_BLOB, "true")]),
            labels(&[(SNAPSHOT_REF, "sha256:a")]),
            labels(&[(NYDUS_BLOB, "false"), (SNAPSHOT_REF, "sha256:a")]),
            labels(&[(NYDUS_BLOB, "true"), (SNAPSHOT_REF, "")]),
        ] {
            assert_eq!(blob_layer(&not), None, "{not:?}");
        }
    }

    #[test]
    fn every_family_names_the_image() {
        for key in [CRI_IMAGE_REF, STARGZ_REFERENCE] {
            let backend = backend(&labels(&[(key, "r.example:5000/team/app:1")]), |_| false);
            let expected = json!({"scheme": "https", "host": "r.example:5000", "repo": "team/app"});
            assert_eq!(backend.unwrap(), expected);
        }
        assert!(backend(&labels(&[]), |_| false).unwrap_err().to_string().contains("sluice pull"));
        assert!(backend(&labels(&[(CRI_IMAGE_REF, "..//")]), |_| false).is_err());
    }

    #[test]
    fn credentials_are_taken_from_labels_and_not_shown() {
        let given =
            labels(&[(CRI_IMAGE_REF, "ubuntu"), (PULL_USERNAME, "someone"), (PULL_SECRET, "a:b")]);
        let backend = backend(&given, |_| true).unwrap();
        assert_eq!(backend["auth"], json!(STANDARD.encode("someone:a:b")));
        assert_eq!((&backend["host"], &backend["scheme"]), (&json!("docker.io"), &json!("http")));
        assert!(!shown(&given).contains_key(PULL_SECRET));
    }

    #[test]
    fn loopback_is_this_machine_only() {
        for host in ["127.0.0.1", "127.8.0.1:5000", "localhost:5000", "[::1]:5000"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["r.example", "localhost.example", "128.0.0.1", "127.0.0.1.example:1", ""] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
