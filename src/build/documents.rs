//! The JSON documents of the images we make: manifests, indexes, lists of referrers.
//!
//! Pure. The same values give the same bytes. What is read back goes through `image::manifest`,
//! as everybody's documents do.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::config as limits;
use crate::error::{Error, Result};
use crate::image::manifest::{Descriptor, Document, Index};
use crate::image::{Digest, DigestAlgorithm};

/// An OCI manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// An OCI index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// An OCI configuration.
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// A layer as a gzipped tar.
pub const LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
/// A layer as a plain tar.
pub const LAYER_TAR: &str = "application/vnd.oci.image.layer.v1.tar";
/// What an image made for another is, in that one's list of referrers.
pub const NYDUS_ARTIFACT: &str = "application/vnd.nydus.image.manifest.v1+json";
/// The version of the file system in a bootstrap, on its layer.
pub const VERSION_ANNOTATION: &str = "containerd.io/snapshot/nydus-fs-version";

/// A manifest to be written.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ManifestDocument<'a> {
    schema_version: u32,
    media_type: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact_type: Option<&'static str>,
    config: &'a Descriptor,
    layers: &'a [Descriptor],
    #[serde(skip_serializing_if = "Option::is_none")]
    subject: Option<Descriptor>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct IndexDocument<'a> {
    schema_version: u32,
    media_type: &'static str,
    manifests: &'a [Descriptor],
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

/// The bytes of an image's manifest; with a subject it is an artifact that refers to that.
pub fn manifest(
    config: &Descriptor,
    layers: &[Descriptor],
    subject: Option<&Descriptor>,
    annotations: &BTreeMap<String, String>,
) -> Vec<u8> {
    let bare = |subject: &Descriptor| Descriptor {
        platform: None,
        annotations: BTreeMap::new(),
        ..subject.clone()
    };
    to_bytes(&ManifestDocument {
        schema_version: 2,
        media_type: MANIFEST,
        artifact_type: subject.map(|_| NYDUS_ARTIFACT),
        config,
        layers,
        subject: subject.map(bare),
        annotations,
    })
}

/// The bytes of an index.
pub fn index(manifests: &[Descriptor], annotations: &BTreeMap<String, String>) -> Vec<u8> {
    to_bytes(&IndexDocument { schema_version: 2, media_type: INDEX, manifests, annotations })
}

/// Describes bytes.
pub fn describe(media_type: &str, bytes: &[u8]) -> Descriptor {
    descriptor(media_type, DigestAlgorithm::Sha256.digest(bytes), bytes.len() as u64)
}

/// A descriptor that says nothing more than it must.
pub fn descriptor(media_type: &str, digest: Digest, size: u64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size,
        artifact_type: None,
        platform: None,
        annotations: BTreeMap::new(),
    }
}

/// The tag under which a registry without a list of referrers keeps that of `subject`.
pub fn referrers_tag(subject: &Descriptor) -> String {
    format!("sha256-{}", subject.digest)
}

/// The list of referrers with one more in it; `None` when it has it already.
pub fn with_referrer(known: Option<&[u8]>, referrer: &Descriptor) -> Result<Option<Vec<u8>>> {
    let known = match known.map(Document::parse).transpose()? {
        Some(Document::Index(index)) => index,
        Some(Document::Manifest(_)) => {
            return Err(Error::Malformed("the list of referrers is an image".to_owned()));
        }
        None => Index { manifests: Vec::new(), annotations: BTreeMap::new() },
    };
    if known.manifests.iter().any(|one| one.digest == referrer.digest) {
        return Ok(None);
    }
    if known.manifests.len() >= limits::REFERRERS_MAX {
        return Err(Error::Unsupported(format!(
            "the image has {} referrers already; delete some",
            known.manifests.len()
        )));
    }
    let mut manifests = known.manifests;
    manifests.push(referrer.clone());
    Ok(Some(index(&manifests, &known.annotations)))
}

fn to_bytes(document: &impl Serialize) -> Vec<u8> {
    // Structures of text, numbers and maps of text: there is nothing JSON cannot say.
    serde_json::to_vec(document).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::Manifest;

    fn some(text: &str) -> Descriptor {
        describe(LAYER_GZIP, text.as_bytes())
    }

    #[test]
    fn what_is_written_is_read_back() {
        let annotations = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let (config, layers) = (some("config"), vec![some("one"), some("two")]);
        let bytes = manifest(&config, &layers, Some(&some("subject")), &annotations);
        let read = Document::parse(&bytes).unwrap();
        assert_eq!(
            read,
            Document::Manifest(Manifest { config, layers: layers.clone(), annotations })
        );
        let text = String::from_utf8(bytes).unwrap();
        assert!(text.contains(r#""artifactType":"application/vnd.nydus"#), "{text}");
        let bytes = index(&layers, &BTreeMap::new());
        let Document::Index(read) = Document::parse(&bytes).unwrap() else { panic!("an index") };
        assert_eq!(read.manifests, layers);
    }

    #[test]
    fn a_referrer_joins_the_list_once() {
        let one = with_referrer(None, &some("one")).unwrap().unwrap();
        assert_eq!(with_referrer(Some(&one), &some("one")).unwrap(), None);
        let both = with_referrer(Some(&one), &some("two")).unwrap().unwrap();
        let Document::Index(read) = Document::parse(&both).unwrap() else { panic!("an index") };
        assert_eq!(read.manifests, [some("one"), some("two")]);
        assert!(with_referrer(Some(b"{}"), &some("one")).is_err());
        let image = manifest(&some("c"), &[], None, &BTreeMap::new());
        assert!(with_referrer(Some(&image), &some("one")).is_err());
    }
}
