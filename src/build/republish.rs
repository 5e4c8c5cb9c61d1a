//! A new bootstrap and blob for an image that is there already, under its name or another.
//!
//! The manifest is the old one with the new blob in front and the new bootstrap at its end; layers
//! the new bootstrap does not need are left out. In an index the other images stay as they are.

use std::collections::{BTreeMap, HashSet};

use super::bootstrap_layer::BootstrapLayer;
use super::documents::{CONFIG, INDEX, MANIFEST, describe, descriptor, index, manifest};
use super::image_config::{ImageConfig, NewLayer, Origin};
use super::optimize::Optimized;
use super::sink::{Body, Content, Name, Sink};
use super::source::Library;
use crate::error::Result;
use crate::image::manifest::{
    BLOB_ANNOTATION, BLOB_MEDIA_TYPE, Descriptor, Document, Index, Manifest, Platform, subject,
};
use crate::image::{Bootstrap, Digest};

/// Stores the new parts and gives the result a name; says what its manifest is.
pub fn republish(
    library: &dyn Library,
    sink: &mut dyn Sink,
    platform: &Platform,
    tag: &str,
    image: Optimized,
) -> Result<Descriptor> {
    let (top, bytes) = library.top()?;
    let (old, subject, around) = match Document::parse(&bytes)? {
        Document::Manifest(manifest) => (manifest, subject(&bytes), None),
        Document::Index(index) => {
            let entry = index.choose(platform)?.clone();
            let bytes = library.document(&entry)?;
            (Manifest::parse(&bytes)?, subject(&bytes), Some((index, entry)))
        }
    };
    let config = ImageConfig::parse(&library.document(&old.config)?)?;
    let (layers, told) = layers(&old, &config, sink, image)?;
    let written = config.rewritten(&told);
    let described = describe(CONFIG, &written);
    put(sink, &described, Body::Bytes(written))?;
    sink.settle()?;
    let bytes = manifest(&described, &layers, subject.as_ref(), &old.annotations);
    let mut made = describe(MANIFEST, &bytes);
    let Some((index, entry)) = around else {
        made.platform = top.platform;
        sink.put_manifest(&made, &bytes, Name::Tag(tag))?;
        sink.finish()?;
        return Ok(made);
    };
    made.platform.clone_from(&entry.platform);
    made.annotations.clone_from(&entry.annotations);
    sink.put_manifest(&made, &bytes, Name::Digest)?;
    let bytes = replaced(index, &entry, &made);
    sink.put_manifest(&describe(INDEX, &bytes), &bytes, Name::Tag(tag))?;
    sink.finish()?;
    Ok(made)
}

/// The index with one entry in place of another.
fn replaced(old: Index, entry: &Descriptor, made: &Descriptor) -> Vec<u8> {
    let swap = |one: Descriptor| if one.digest == entry.digest { made.clone() } else { one };
    let manifests: Vec<Descriptor> = old.manifests.into_iter().map(swap).collect();
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
