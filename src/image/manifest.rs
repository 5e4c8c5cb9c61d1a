//! OCI and Docker manifests and indexes: which blobs make up an image.
//!
//! Fields nobody here reads are ignored, whatever they are; the fields that are read are typed,
//! so a digest that exists can be put into a URL.

use super::digest::{Digest, DigestAlgorithm};
use super::identity::BlobId;
use crate::config::MANIFEST_MAX_BYTES;
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Media types a client must say it accepts to be given what this file parses.
pub const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, \
     application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, \
     application/vnd.docker.distribution.manifest.list.v2+json";

/// `true` on the layer that has the bootstrap.
pub const BOOTSTRAP_ANNOTATION: &str = "containerd.io/snapshot/nydus-bootstrap";
/// `true` on a data blob.
pub const BLOB_ANNOTATION: &str = "containerd.io/snapshot/nydus-blob";
/// The type of a data blob that is nothing else.
pub const BLOB_MEDIA_TYPE: &str = "application/vnd.oci.image.layer.nydus.blob.v1";
/// How an index marks the lazily loadable one of two manifests for a platform.
const NYDUS_FEATURE: &str = "nydus.remoteimage.v1";

/// What a registry answers for a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "parsed and taken apart, never kept in numbers")]
pub enum Document {
    /// One manifest per platform.
    Index(Index),
    /// One image.
    Manifest(Manifest),
}

/// A list of manifests to choose from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Index {
    /// One for each platform, at least.
    pub manifests: Vec<Descriptor>,
    /// What is said of it.
    #[serde(default, deserialize_with = "or_default")]
    pub annotations: BTreeMap<String, String>,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    /// The image's configuration.
    pub config: Descriptor,
    /// Its layers, lowest first.
    pub layers: Vec<Descriptor>,
    /// What is said of it.
    #[serde(default, deserialize_with = "or_default")]
    pub annotations: BTreeMap<String, String>,
}

/// A reference to content in the same repository.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the content is.
    #[serde(default)]
    pub media_type: String,
    /// Its SHA-256.
    #[serde(deserialize_with = "sha256", serialize_with = "sha256_text")]
    pub digest: Digest,
    /// Its length in bytes.
    pub size: u64,
    /// What kind of artifact it is, when it is no image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Whom it is for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Everything else that is said of it.
    #[serde(default, deserialize_with = "or_default", skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// A kind of machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
pub struct Platform {
    /// As Go names it: `amd64`, `arm64`.
    pub architecture: String,
    /// As Go names it: `linux`.
    pub os: String,
    /// A finer kind of architecture, such as `v8`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
    /// A version of the system it needs.
    #[serde(rename = "os.version", default, skip_serializing_if = "Option::is_none")]
    pub os_version: Option<String>,
    /// Features a client must have.
    #[serde(
        rename = "os.features",
        default,
        deserialize_with = "or_default",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub os_features: Vec<String>,
}

/// The layers of a lazily loadable image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NydusLayers<'a> {
    /// A tar, perhaps compressed, that has `image/image.boot`.
    pub bootstrap: &'a Descriptor,
    /// Whether the manifest says so. If not, it is only the last layer of an image without any
    /// mark, and may well have no bootstrap.
    pub is_marked: bool,
    /// The data blobs the manifest lists; none if another manifest keeps them.
    pub blobs: Vec<&'a Descriptor>,
}

impl Document {
    /// Parses the body of a manifest answer.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        /// Both kinds at once: which it is shows in the fields it has.
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Either {
            schema_version: u32,
            manifests: Option<Vec<Descriptor>>,
            config: Option<Descriptor>,
            layers: Option<Vec<Descriptor>>,
            #[serde(default, deserialize_with = "or_default")]
            annotations: BTreeMap<String, String>,
        }
        if bytes.len() > MANIFEST_MAX_BYTES {
            return Err(unsupported!("a manifest of {} bytes", bytes.len()));
        }
        let either: Either = serde_json::from_slice(bytes)
            .map_err(|error| malformed!("this is not a manifest: {error}"))?;
        if either.schema_version != 2 {
            return Err(unsupported!("a manifest of schema {}", either.schema_version));
        }
        let annotations = either.annotations;
        match (either.manifests, either.config, either.layers) {
            (Some(manifests), None, None) => Ok(Document::Index(Index { manifests, annotations })),
            (None, Some(config), Some(layers)) => {
                Ok(Document::Manifest(Manifest { config, layers, annotations }))
            }
            _ => Err(malformed!("a manifest has config and layers, an index has manifests")),
        }
    }
}

/// What a manifest refers to as the image it was made for.
pub fn subject(manifest: &[u8]) -> Option<Descriptor> {
    #[derive(Deserialize)]
    struct Referrer {
        subject: Option<Descriptor>,
    }
    serde_json::from_slice::<Referrer>(manifest).ok()?.subject
}

impl Index {
    /// The manifest for a platform: if several fit, one marked as lazily loadable, then one of
    /// the same variant, then the first.
    pub fn choose(&self, wanted: &Platform) -> Result<&Descriptor> {
        let rank = |found: &Platform| (!found.is_lazy(), found.variant != wanted.variant);
        let fits =
            |found: &Platform| found.os == wanted.os && found.architecture == wanted.architecture;
        let candidates = self.manifests.iter().filter_map(|manifest| {
            let platform = manifest.platform.as_ref().filter(|platform| fits(platform))?;
            Some((rank(platform), manifest))
        });
        candidates.min_by_key(|(rank, _)| *rank).map(|(_, manifest)| manifest).ok_or_else(|| {
            Error::NotFound(format!(
                "the image has no manifest for {}/{}",
                wanted.os, wanted.architecture
            ))
        })
    }
}

impl Platform {
    /// The machine this program was built for.
    pub fn here() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "aarch64" => ("arm64", Some("v8".to_string())),
            other => (other, None),
        };
        Platform {
            architecture: architecture.into(),
            os: "linux".into(),
            variant,
            ..Platform::default()
        }
    }

    /// Whether an index marks this one as lazily loadable.
    pub fn is_lazy(&self) -> bool {
        self.os_features.iter().any(|feature| feature == NYDUS_FEATURE)
    }
}

impl Manifest {
    /// Parses what must not be an index.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        match Document::parse(bytes)? {
            Document::Manifest(manifest) => Ok(manifest),
            Document::Index(_) => Err(malformed!("an index that leads to another index")),
        }
    }

    /// The layers to load an image lazily from. `Unsupported` for an image without layers.
    pub fn nydus_layers(&self) -> Result<NydusLayers<'_>> {
        let marked = self.layers.iter().rev().find(|layer| layer.is_marked(BOOTSTRAP_ANNOTATION));
        let bootstrap = marked
            .or_else(|| self.layers.iter().rev().find(|layer| !layer.is_blob()))
            .ok_or_else(|| unsupported!("an image without a layer that could have a bootstrap"))?;
        Ok(NydusLayers {
            bootstrap,
            is_marked: marked.is_some(),
            blobs: self.layers.iter().filter(|layer| layer.is_blob()).collect(),
        })
    }
}

impl Descriptor {
    /// The digest as manifests and URLs write it.
    pub fn digest_text(&self) -> String {
        format!("sha256:{}", self.digest)
    }

    /// The name a data blob has in bootstraps: the digest without its algorithm.
    pub fn blob_id(&self) -> Result<BlobId> {
        BlobId::parse(&self.digest.to_string())
    }

    /// Whether `bytes` are what this refers to.
    pub fn matches(&self, bytes: &[u8]) -> bool {
        bytes.len() as u64 == self.size && DigestAlgorithm::Sha256.digest(bytes) == self.digest
    }

    /// Whether it is a layer of a lazily loadable image, and says so.
    pub fn is_nydus(&self) -> bool {
        self.is_blob() || self.is_marked(BOOTSTRAP_ANNOTATION)
    }

    fn is_marked(&self, annotation: &str) -> bool {
        self.annotations.get(annotation).is_some_and(|value| value == "true")
    }

    fn is_blob(&self) -> bool {
        self.media_type == BLOB_MEDIA_TYPE || self.is_marked(BLOB_ANNOTATION)
    }
}

fn sha256<'de, D: serde::Deserializer<'de>>(field: D) -> std::result::Result<Digest, D::Error> {
    let text = String::deserialize(field)?;
    let digits = text
        .strip_prefix("sha256:")
        .ok_or_else(|| serde::de::Error::custom("only sha256 digests are supported"))?;
    Digest::parse(digits).map_err(serde::de::Error::custom)
}

fn sha256_text<S: serde::Serializer>(
    digest: &Digest,
    serializer: S,
) -> std::result::Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("sha256:{digest}"))
}

/// Some writers say `null` where there is nothing.
fn or_default<'de, D, T>(field: D) -> std::result::Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(field)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn descriptor(number: u8, rest: &str) -> String {
        let digest = format!("{number:02x}").repeat(32);
        format!(r#"{{"digest":"sha256:{digest}","size":{number}{rest}}}"#)
    }

    fn parse(text: &str) -> Result<Document> {
        Document::parse(text.as_bytes())
    }

    fn manifest(layers: &[String]) -> Manifest {
        let (config, layers) = (descriptor(9, ""), layers.join(","));
        let text = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layers}]}}"#);
        match parse(&text).unwrap() {
            Document::Manifest(manifest) => manifest,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn marked_bootstrap_is_preferred_and_blobs_are_known_by_mark_or_type() {
        let image = manifest(&[
            descriptor(1, r#","annotations":{"containerd.io/snapshot/nydus-blob":"true"}"#),
            descriptor(2, r#","mediaType":"application/vnd.oci.image.layer.nydus.blob.v1""#),
            descriptor(3, r#","annotations":{"containerd.io/snapshot/nydus-bootstrap":"true"}"#),
            descriptor(4, r#","annotations":null"#),
        ]);
        let layers = image.nydus_layers().unwrap();
        assert_eq!((layers.bootstrap.size, layers.is_marked), (3, true));
        assert_eq!(layers.blobs.iter().map(|blob| blob.size).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(layers.blobs[0].blob_id().unwrap().as_str(), "01".repeat(32));
    }

    #[test]
    fn bootstrap_only_manifest_offers_its_last_layer_unmarked() {
        let image = manifest(&[descriptor(1, ""), descriptor(2, "")]);
        let layers = image.nydus_layers().unwrap();
        assert_eq!((layers.bootstrap.size, layers.is_marked, layers.blobs.len()), (2, false, 0));
        assert!(manifest(&[]).nydus_layers().is_err());
    }

    #[test]
    fn index_prefers_the_lazy_manifest_of_the_right_machine() {
        let platform = |machine: &str, more: &str| {
            format!(r#","platform":{{"os":"linux","architecture":"{machine}"{more}}}"#)
        };
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{},{},{},{}]}}"#,
            descriptor(1, ""),
            descriptor(2, &platform("arm64", r#","os.features":["nydus.remoteimage.v1"]"#)),
            descriptor(3, &platform("amd64", "")),
            descriptor(4, &platform("amd64", r#","os.features":["nydus.remoteimage.v1"]"#)),
        );
        let Document::Index(index) = parse(&text).unwrap() else { panic!("an index") };
        let choose = |machine: &str| {
            let architecture = machine.to_string();
            index.choose(&Platform { architecture, os: "linux".into(), ..Platform::default() })
        };
        assert_eq!(choose("amd64").unwrap().size, 4);
        assert_eq!(choose("arm64").unwrap().size, 2);
        assert!(matches!(choose("riscv64"), Err(Error::NotFound(_))));
    }

    #[test]
    fn anything_else_is_refused_with_a_sentence() {
        let good = descriptor(1, "");
        for text in [
            "",
            "null",
            "[]",
            "{}",
            r#"{"schemaVersion":2}"#,
            &format!(r#"{{"schemaVersion":1,"manifests":[{good}]}}"#),
            &format!(r#"{{"schemaVersion":2,"manifests":[{good}],"layers":[]}}"#),
            r#"{"schemaVersion":2,"manifests":[{"digest":"sha512:00","size":1}]}"#,
            r#"{"schemaVersion":2,"manifests":[{"digest":"sha256:../../x","size":1}]}"#,
            &format!(r#"{{"schemaVersion":2,"manifests":{}"#, "[".repeat(100_000)),
        ] {
            assert!(parse(text).is_err(), "{text:.80}");
        }
        let large = vec![b' '; MANIFEST_MAX_BYTES + 1];
        assert!(matches!(Document::parse(&large), Err(Error::Unsupported(_))));
    }

    #[test]
    fn a_descriptor_is_written_as_it_is_read() {
        let platform = r#""platform":{"architecture":"arm","os":"linux","variant":"v7"}"#;
        let text = descriptor(7, &format!(r#",{platform},"annotations":{{"a":"b"}}"#));
        let read: Descriptor = serde_json::from_str(&text).unwrap();
        let written = serde_json::to_string(&read).unwrap();
        assert_eq!(serde_json::from_str::<Descriptor>(&written).unwrap(), read);
        assert!(written.contains(platform) && !written.contains("null"), "{written}");
    }

    #[test]
    fn content_is_matched_by_length_and_digest() {
        let digest = DigestAlgorithm::Sha256.digest(b"abc");
        let text = format!(r#"{{"digest":"sha256:{digest}","size":3}}"#);
        let descriptor: Descriptor = serde_json::from_str(&text).unwrap();
        assert!(descriptor.matches(b"abc"));
        assert!(!descriptor.matches(b"abd") && !descriptor.matches(b"abcd"));
    }
}
