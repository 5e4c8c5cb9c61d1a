//! A new bootstrap and blob for an image that is there already, under its name or another.
//!
//! The manifest is the old one with the new blob in front and the new bootstrap at its end; layers
//! the new bootstrap does not need are left out. In an index the other images stay as they are.
//! The image for Docker, when one is wanted, has a name last of all, as `convert` does it: a run
//! that ends early leaves one that is older than the image, never one that is newer.

use std::collections::{BTreeMap, HashSet};

use super::bootstrap_layer::BootstrapLayer;
use super::documents::{CONFIG, INDEX, MANIFEST, describe, descriptor, index, manifest};
use super::for_docker::ForDocker;
use super::image_config::{ImageConfig, NewLayer, Origin};
use super::optimize::Optimized;
use super::sink::{Body, Content, Name, Sink, put_named};
use super::source::Library;
use crate::error::Result;
use crate::image::manifest::{
    BLOB_ANNOTATION, BLOB_MEDIA_TYPE, Descriptor, Document, Index, Manifest, Platform, subject,
};
use crate::image::{Bootstrap, Digest};

/// The names of the result, and which machine's image of an index it is.
pub struct Names<'a> {
    /// Chooses the image of an index.
    pub platform: &'a Platform,
    /// The image's tag.
    pub tag: &'a str,
    /// The tag of the image for Docker, if there is to be one.
    pub docker_tag: Option<&'a str>,
}

/// What was stored.
#[derive(Clone, Debug)]
pub struct Republished {
    /// The image's manifest.
    pub manifest: Descriptor,
    /// That of the image for Docker.
    pub docker: Option<Descriptor>,
    /// The layer with the bootstrap, which both have.
    pub bootstrap: Digest,
}

/// The image as it was.
struct Old {
    manifest: Manifest,
    subject: Option<Descriptor>,
    config: ImageConfig,
    platform: Option<Platform>,
    /// The index around it, and what that says of it.
    around: Option<(Index, Descriptor)>,
}

/// Stores the new parts and gives the result its names, the image's before that for Docker.
pub fn republish(
    library: &dyn Library,
    sink: &mut dyn Sink,
    names: &Names<'_>,
    image: Optimized,
) -> Result<Republished> {
    let old = Old::read(library, names.platform)?;
    let (layers, told) = layers(&old.manifest, &old.config, sink, image)?;
    let written = old.config.rewritten(&told);
    let described = describe(CONFIG, &written);
    put(sink, &described, Body::Bytes(written))?;
    let (Some(bootstrap), Some(last)) = (layers.last(), told.last()) else {
        return Err(malformed!("an image without layers"));
    };
    let docker = match names.docker_tag {
        Some(_) => old.for_docker(library, sink, bootstrap, last)?,
        None => Vec::new(),
    };
    sink.settle()?;
    let bytes = manifest(&described, &layers, old.subject.as_ref(), &old.manifest.annotations);
    let mut made = describe(MANIFEST, &bytes);
    made.platform.clone_from(&old.platform);
    match &old.around {
        None => sink.put_manifest(&made, &bytes, Name::Tag(names.tag))?,
        Some((index, entry)) => {
            made.annotations.clone_from(&entry.annotations);
            sink.put_manifest(&made, &bytes, Name::Digest)?;
            let bytes = replaced(index, entry, &made);
            sink.put_manifest(&describe(INDEX, &bytes), &bytes, Name::Tag(names.tag))?;
        }
    }
    if let Some(tag) = names.docker_tag {
        let manifests: Vec<_> = docker.iter().map(|one| &one.manifest).collect();
        let around = old.around.as_ref().map(|(index, _)| &index.annotations);
        put_named(sink, around, &manifests, Name::Docker(tag))?;
    }
    sink.finish()?;
    let is_own = |one: &&ForDocker| one.bootstrap == bootstrap.digest;
    let docker = docker.iter().find(is_own).map(|one| one.manifest.0.clone());
    Ok(Republished { manifest: made, docker, bootstrap: bootstrap.digest })
}

impl Old {
    fn read(library: &dyn Library, platform: &Platform) -> Result<Old> {
        let (top, bytes) = library.top()?;
        let (manifest, subject, platform, around) = match Document::parse(&bytes)? {
            Document::Manifest(manifest) => (manifest, subject(&bytes), top.platform, None),
            Document::Index(index) => {
                let entry = index.choose(platform)?.clone();
                let bytes = library.document(&entry)?;
                let (manifest, subject) = (Manifest::parse(&bytes)?, subject(&bytes));
                (manifest, subject, entry.platform.clone(), Some((index, entry)))
            }
        };
        let config = ImageConfig::parse(&library.document(&manifest.config)?)?;
        Ok(Old { manifest, subject, config, platform, around })
    }

    /// Makes the image for Docker, and those of the other images of the index; their
    /// configurations are stored.
    fn for_docker(
        &self,
        library: &dyn Library,
        sink: &mut dyn Sink,
        bootstrap: &Descriptor,
        last: &NewLayer,
    ) -> Result<Vec<ForDocker>> {
        let Old { manifest, subject, config, .. } = self;
        let diff_id = last.diff_id.clone();
        let mut own = ForDocker::of(manifest, config, subject.as_ref(), bootstrap, diff_id);
        own.manifest.0.platform.clone_from(&self.platform);
        let mut made = Vec::new();
        match &self.around {
            None => made.push(own),
            Some((index, chosen)) => {
                for entry in &index.manifests {
                    match entry.digest == chosen.digest {
                        true => made.push(own.clone()),
                        false => made.extend(ForDocker::beside(library, entry)?),
                    }
                }
            }
        }
        for one in &made {
            put(sink, &one.config.0, Body::Bytes(one.config.1.clone()))?;
        }
        Ok(made)
    }
}

/// The index with one entry in place of another.
fn replaced(old: &Index, entry: &Descriptor, made: &Descriptor) -> Vec<u8> {
    let swap = |one: &Descriptor| if one.digest == entry.digest { made } else { one }.clone();
    let manifests: Vec<Descriptor> = old.manifests.iter().map(swap).collect();
    index(&manifests, &old.annotations)
}

/// The layers of the new manifest and what its configuration says of them; new ones are stored.
fn layers(
    old: &Manifest,
    config: &ImageConfig,
    sink: &mut dyn Sink,
    image: Optimized,
) -> Result<(Vec<Descriptor>, Vec<NewLayer>)> {
    let needed = needed(&image.bootstrap)?;
    let bootstrap = old.nydus_layers()?.bootstrap;
    if old.layers.iter().all(|layer| layer.digest == bootstrap.digest) {
        return Err(unsupported!(
            "its manifest lists no blobs, so that any Docker can unpack the image, and with one \
             none could: optimise the image under the tag that lists its blobs"
        ));
    }
    if config.diff_ids.len() != old.layers.len() {
        return Err(malformed!("the configuration does not know the layers of the manifest"));
    }
    let marks = BTreeMap::from([(BLOB_ANNOTATION.to_owned(), "true".to_owned())]);
    let digest = Digest::parse(image.blob.id.as_str())?;
    let start = descriptor(BLOB_MEDIA_TYPE, digest, image.blob.size_bytes);
    if let Some(path) = image.blob.path {
        put(sink, &start, Body::File(path))?;
    }
    let start_layer = NewLayer { diff_id: start.digest_text(), origin: Origin::Start };
    let mut layers = vec![Descriptor { annotations: marks, ..start }];
    let mut told = vec![start_layer];
    for (number, (layer, diff_id)) in old.layers.iter().zip(&config.diff_ids).enumerate() {
        // The start is in front already, also when the same trace made it before.
        let is_new = layer.digest != bootstrap.digest && layer.digest != digest;
        if is_new && needed.contains(&layer.digest) {
            layers.push(layer.clone());
            told.push(NewLayer { diff_id: diff_id.clone(), origin: Origin::Layer(number) });
        }
    }
    let packed = BootstrapLayer::pack(&image.bootstrap)?;
    sink.put_bootstrap(&image.bootstrap)?;
    let mut last = describe(&bootstrap.media_type, &packed.bytes);
    last.annotations.clone_from(&bootstrap.annotations);
    put(sink, &last, Body::Bytes(packed.bytes))?;
    layers.push(last);
    let diff_id = format!("sha256:{}", packed.diff_id);
    told.push(NewLayer { diff_id, origin: Origin::Bootstrap });
    Ok((layers, told))
}

/// The digests of all blobs a bootstrap needs.
fn needed(bootstrap: &[u8]) -> Result<HashSet<Digest>> {
    let bootstrap = Bootstrap::parse(bootstrap)?;
    let mut needed = HashSet::new();
    for blob in bootstrap.blobs() {
        for id in [blob.id.clone(), blob.context_blob()?] {
            needed.insert(Digest::parse(id.as_str())?);
        }
    }
    Ok(needed)
}

fn put(sink: &mut dyn Sink, descriptor: &Descriptor, body: Body) -> Result<()> {
    sink.put(Content { descriptor: descriptor.clone(), body })
}
