//! Making an image known to containerd without its blobs: for clients that pass no labels.
//!
//! The manifest, the configuration and the layers that are no blobs go into containerd's content
//! store; each layer becomes a snapshot, a blob layer by asking the snapshotter for it with the
//! labels that a Kubernetes node would send. References for garbage collection are set as
//! containerd's own client does, so that everything lives and goes with the image's name. A lease
//! keeps it until then; a pull that breaks off leaves nothing for longer than the lease.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::containerd::{Containerd, Map};
use super::containerd_messages::{CommitSnapshotRequest, CreateSnapshotRequest, Descriptor, Image};
use super::labels::{
    CRI_IMAGE_LAYERS, CRI_IMAGE_REF, CRI_LAYER_DIGEST, CRI_MANIFEST_DIGEST, NYDUS_BLOB,
    NYDUS_BOOTSTRAP, SNAPSHOT_REF,
};
use crate::config::LABEL_MAX_BYTES;
use crate::error::{Error, Result};
use crate::registry::reference::Reference;

/// A piece of an image, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Piece {
    /// What it is.
    pub media_type: String,
    /// `sha256:` and 64 digits; that of `bytes`.
    pub digest: String,
    /// All of it.
    pub bytes: Vec<u8>,
}

/// A layer of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layer {
    /// What it is.
    pub media_type: String,
    /// Its digest as it is in the registry.
    pub digest: String,
    /// Its bytes there.
    pub size: u64,
    /// Whether it holds the bootstrap.
    pub is_bootstrap: bool,
    /// All of it; nothing for a blob, which stays where it is.
    pub bytes: Option<Vec<u8>>,
}

/// An image as it was fetched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// What it was asked for by.
    pub reference: Reference,
    /// Its manifest.
    pub manifest: Piece,
    /// Its configuration.
    pub config: Piece,
    /// Its layers, lowest first.
    pub layers: Vec<Layer>,
}

/// Where an image goes.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// containerd's socket.
    pub address: &'a Path,
    /// The namespace in it.
    pub namespace: &'a str,
    /// Which of its snapshotters.
    pub snapshotter: &'a str,
    /// When a pull that broke off becomes garbage, in RFC 3339.
    pub expires: &'a str,
}

/// Makes the image known; gives the name it has there.
///
/// # Errors
/// What containerd says; `Unsupported` when the snapshotter is none for such images.
pub fn install(target: Target<'_>, package: &Package) -> Result<String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::io(&error, "cannot start the executor"))?;
    runtime.block_on(async {
        let mut containerd = Containerd::connect(target.address, target.namespace).await?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let lease = format!("sluice-pull-{}-{}", std::process::id(), now.as_nanos());
        containerd.take_lease(&lease, target.expires.to_owned()).await?;
        let name = package.reference.to_string();
        let installed = fill(&containerd, target.snapshotter, package, &name).await;
        let dropped = containerd.drop_lease(&lease).await;
        installed.and(dropped).map(|()| name)
    })
}

async fn fill(to: &Containerd, snapshotter: &str, package: &Package, name: &str) -> Result<()> {
    let diffs = package.diff_ids()?;
    let chains = chain_ids(&diffs);
    for layer in &package.layers {
        if let Some(bytes) = &layer.bytes {
            to.write(&layer.digest, bytes, &package.source()).await?;
        }
    }
    let unpack = Unpack { to, snapshotter, package, name };
    let mut parent = "";
    for (index, chain) in chains.iter().enumerate() {
        let one = OneLayer { index, diff: &diffs[index], chain, parent };
        unpack.layer(&one).await.map_err(|error| error.context(&package.layers[index].digest))?;
        parent = chain;
    }
    // Now that everything referred to is there.
    let mut labels = package.source();
    labels.insert(format!("containerd.io/gc.ref.snapshot.{snapshotter}"), parent.to_owned());
    to.write(&package.config.digest, &package.config.bytes, &labels).await?;
    to.write(&package.manifest.digest, &package.manifest.bytes, &package.references()).await?;
    let target = Some(Descriptor {
        media_type: package.manifest.media_type.clone(),
        digest: package.manifest.digest.clone(),
        size: i64::try_from(package.manifest.bytes.len()).unwrap_or(i64::MAX),
    });
    to.name_image(Image { name: name.to_owned(), labels: Map::new(), target }).await
}

/// What all layers of a pull have in common.
struct Unpack<'a> {
    to: &'a Containerd,
    snapshotter: &'a str,
    package: &'a Package,
    name: &'a str,
}

/// One of them.
struct OneLayer<'a> {
    index: usize,
    diff: &'a str,
    chain: &'a str,
    parent: &'a str,
}

impl Unpack<'_> {
    async fn layer(&self, one: &OneLayer<'_>) -> Result<()> {
        if self.to.has_snapshot(self.snapshotter, one.chain).await? {
            return Ok(());
        }
        let labels = self.package.labels(self.name, one.index, one.chain);
        // Of its own, so that another pull of this image does not stand in our way.
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let key = format!("sluice-pull-{}-{} {}", std::process::id(), now.as_nanos(), one.chain);
        let prepared = self.to.prepare(CreateSnapshotRequest {
            snapshotter: self.snapshotter.to_owned(),
            key: key.clone(),
            parent: one.parent.to_owned(),
            labels: labels.clone(),
        });
        let mounts = match prepared.await {
            Err(Error::Exists(_)) if self.to.has_snapshot(self.snapshotter, one.chain).await? => {
                return Ok(());
            }
            mounts => mounts?,
        };
        let layer = &self.package.layers[one.index];
        let unpacked = match &layer.bytes {
            Some(_) => self.apply(layer, mounts, one.diff).await,
            None => Err(Error::Unsupported(format!(
                "the snapshotter {:?} would have to unpack a blob layer; name that of `sluice \
                 snapshotter` with --snapshotter",
                self.snapshotter
            ))),
        };
        let committed = match unpacked {
            Ok(()) => {
                let (snapshotter, name) = (self.snapshotter.to_owned(), one.chain.to_owned());
                let key = key.clone();
                self.to.commit(CommitSnapshotRequest { snapshotter, name, key, labels }).await
            }
            Err(error) => Err(error),
        };
        match committed {
            Ok(()) => Ok(()),
            failed => {
                // The lease ends one day, and the snapshot with it.
                let _ = self.to.remove(self.snapshotter, &key).await;
                match self.to.has_snapshot(self.snapshotter, one.chain).await {
                    Ok(true) => Ok(()),
                    _ => failed,
                }
            }
        }
    }

    async fn apply(
        &self,
        layer: &Layer,
        mounts: Vec<super::containerd_messages::Mount>,
        diff: &str,
    ) -> Result<()> {
        let descriptor = Descriptor {
            media_type: layer.media_type.clone(),
            digest: layer.digest.clone(),
            size: i64::try_from(layer.size).unwrap_or(i64::MAX),
        };
        let applied = self.to.apply(descriptor, mounts).await?;
        match applied == diff {
            true => Ok(()),
            false => Err(Error::Digest(format!(
                "the image's configuration says {diff}, and it was unpacked from {applied}"
            ))),
        }
    }
}

impl Package {
    /// The digests of the layers as they are unpacked.
    fn diff_ids(&self) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct Config {
            rootfs: RootFs,
        }
        #[derive(Deserialize)]
        struct RootFs {
            diff_ids: Vec<String>,
        }
        let config: Config = serde_json::from_slice(&self.config.bytes)
            .map_err(|error| Error::Malformed(format!("the image's configuration: {error}")))?;
        let diffs = config.rootfs.diff_ids;
        match diffs.len() == self.layers.len() {
            true => Ok(diffs),
            false => Err(Error::Malformed(format!(
                "the image's configuration has {} layers, its manifest {}",
                diffs.len(),
                self.layers.len()
            ))),
        }
    }

    /// What containerd's CRI service would tell the snapshotter of a layer.
    fn labels(&self, name: &str, index: usize, chain: &str) -> Map {
        let layer = &self.layers[index];
        let mut labels = Map::from([
            (SNAPSHOT_REF.to_owned(), chain.to_owned()),
            (CRI_IMAGE_REF.to_owned(), name.to_owned()),
            (CRI_LAYER_DIGEST.to_owned(), layer.digest.clone()),
            (CRI_MANIFEST_DIGEST.to_owned(), self.manifest.digest.clone()),
            (CRI_IMAGE_LAYERS.to_owned(), digests(&self.layers[index..])),
        ]);
        if layer.bytes.is_none() {
            labels.insert(NYDUS_BLOB.to_owned(), "true".to_owned());
        }
        if layer.is_bootstrap {
            labels.insert(NYDUS_BOOTSTRAP.to_owned(), "true".to_owned());
        }
        labels
    }

    /// Where the content came from, so that containerd can fetch what is missing when it wants to.
    fn source(&self) -> Map {
        let key = format!("containerd.io/distribution.source.{}", self.reference.host);
        Map::from([(key, self.reference.repo.clone())])
    }

    /// The manifest's references; garbage collection follows them, also to content that is absent.
    fn references(&self) -> Map {
        let mut labels = self.source();
        labels.insert("containerd.io/gc.ref.content.config".to_owned(), self.config.digest.clone());
        for (index, layer) in self.layers.iter().enumerate() {
            labels.insert(format!("containerd.io/gc.ref.content.l.{index}"), layer.digest.clone());
        }
        labels
    }
}

/// As many digests as a label holds.
fn digests(layers: &[Layer]) -> String {
    let mut text = String::new();
    for layer in layers {
        if CRI_IMAGE_LAYERS.len() + text.len() + layer.digest.len() + 1 > LABEL_MAX_BYTES {
            break;
        }
        if !text.is_empty() {
            text.push(',');
        }
        text.push_str(&layer.digest);
    }
    text
}

/// The names of the layers' snapshots: each stands for itself and everything below it
/// (OCI image specification, config.md, "Layer ChainID").
fn chain_ids(diffs: &[String]) -> Vec<String> {
    let mut chains: Vec<String> = Vec::new();
    for diff in diffs {
        let chain = match chains.last() {
            None => diff.clone(),
            Some(below) => {
                let digest = Sha256::digest(format!("{below} {diff}"));
                let digits: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
                format!("sha256:{digits}")
            }
        };
        chains.push(chain);
    }
    chains
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(number: u8, bytes: Option<Vec<u8>>) -> Layer {
        let digest = format!("sha256:{}", format!("{number:02x}").repeat(32));
        let is_bootstrap = bytes.is_some();
        Layer { media_type: String::new(), digest, size: 1, is_bootstrap, bytes }
    }

    fn package(layers: Vec<Layer>, config: &str) -> Package {
        let piece = |bytes: &[u8]| Piece {
            media_type: String::new(),
            digest: "sha256:m".to_owned(),
            bytes: bytes.to_vec(),
        };
        let reference = Reference::parse("r.example/app:1").unwrap();
        Package { reference, manifest: piece(b"{}"), config: piece(config.as_bytes()), layers }
    }

    #[test]
    fn a_chain_id_stands_for_all_layers_up_to_it() {
        let diffs = ["sha256:a", "sha256:b", "sha256:c"].map(str::to_owned);
        // printf 'sha256:a sha256:b' | sha256sum; the same again with its result and sha256:c.
        let expected = [
            "sha256:a",
            "sha256:970a948bffa8de94d6e22d747ba8c95030e6e546909f98f54e99a13005e173a8",
            "sha256:dee159b33409cefa3f6eda71539f006014283e9d9130c18a1dea7bd8a33c9b1b",
        ];
        assert_eq!(chain_ids(&diffs), expected);
        assert!(chain_ids(&[]).is_empty());
    }

    #[test]
    fn layers_are_labelled_as_a_kubernetes_node_does() {
        let image = package(vec![layer(1, None), layer(2, Some(Vec::new()))], "");
        let blob = image.labels("r.example/app:1", 0, "sha256:x");
        assert_eq!(blob[SNAPSHOT_REF], "sha256:x");
        assert_eq!(blob[NYDUS_BLOB], "true");
        assert_eq!(blob[CRI_IMAGE_REF], "r.example/app:1");
        let both = format!("{},{}", image.layers[0].digest, image.layers[1].digest);
        assert_eq!(blob[CRI_IMAGE_LAYERS], both);
        let boot = image.labels("r.example/app:1", 1, "sha256:y");
        assert!(boot.contains_key(NYDUS_BOOTSTRAP) && !boot.contains_key(NYDUS_BLOB));
    }

    #[test]
    fn a_label_of_many_layers_stays_within_containerds_limit() {
        let layers = (0..=200).map(|number| layer(number, None)).collect::<Vec<_>>();
        let text = digests(&layers);
        assert!(CRI_IMAGE_LAYERS.len() + text.len() <= LABEL_MAX_BYTES);
        assert!(text.split(',').count() > 50 && text.ends_with(|c: char| c.is_ascii_hexdigit()));
    }

    #[test]
    fn a_configuration_must_fit_the_manifest() {
        let diffs = |config: &str| package(vec![layer(1, None)], config).diff_ids();
        assert_eq!(diffs(r#"{"rootfs":{"diff_ids":["sha256:a"]}}"#).unwrap(), ["sha256:a"]);
        for config in ["", "{}", r#"{"rootfs":{"diff_ids":[]}}"#, r#"{"rootfs":{"diff_ids":7}}"#] {
            assert!(diffs(config).is_err(), "{config}");
        }
    }

    #[test]
    fn the_manifest_holds_on_to_everything() {
        let image = package(vec![layer(1, None), layer(2, Some(Vec::new()))], "");
        let labels = image.references();
        assert_eq!(labels["containerd.io/gc.ref.content.l.0"], image.layers[0].digest);
        assert_eq!(labels["containerd.io/gc.ref.content.l.1"], image.layers[1].digest);
        assert_eq!(labels["containerd.io/gc.ref.content.config"], image.config.digest);
        assert_eq!(labels["containerd.io/distribution.source.r.example"], "app");
    }
}
