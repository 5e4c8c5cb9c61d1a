//! From the images of a source to the images of a destination.
//!
//! Each image is built layer by layer, the next layer arriving meanwhile; its parts are handed to
//! the sink as soon as they exist. Manifests follow when every part is stored, the tag last of all,
//! and only then that of the image for Docker: until then nothing that had a name has changed.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::bootstrap_layer::BootstrapLayer;
use super::documents::{
    CONFIG, LAYER_GZIP, MANIFEST, VERSION_ANNOTATION, describe, descriptor, manifest,
};
use super::image_config::{NewLayer, Origin};
use super::layer_stream::LayerStream;
use super::oci_layout::read_small;
use super::sink::{Body, Content, Name, Sink, put_named};
use super::source::{Images, LayerInput, Source, SourceImage, SourceLayer, platform_text};
use super::tally::Tally;
use super::unpacked::BOOTSTRAP_NAME;
use super::workdir::WorkDir;
use super::{Blob, BlobRole, Builder, Image, Options, Progress, Report};
use crate::config::BOOTSTRAP_MAX_BYTES;
use crate::error::{Error, Result};
use crate::image::layer::read_bootstrap;
use crate::image::manifest::{
    BLOB_ANNOTATION, BLOB_MEDIA_TYPE, BOOTSTRAP_ANNOTATION, Descriptor, Manifest,
};
use crate::image::{BlobId, Bootstrap, Digest};

/// Which blobs of other images a bootstrap needs.
const FOREIGN_ANNOTATION: &str = "containerd.io/snapshot/nydus-reference-blob-ids";

/// What is to be made.
pub struct Order {
    /// How images are stored.
    pub options: Options,
    /// Images whose chunks may be used.
    pub dictionaries: Vec<Dictionary>,
    /// The tag of the image.
    pub tag: String,
    /// The tag of a second one, of a single layer that any Docker can unpack.
    pub docker_tag: Option<String>,
    /// Whether new manifests refer to the old ones.
    pub refers: bool,
    /// Whether gzip layers stay as they are and only get an index.
    pub keeps_layers: bool,
    /// The source's repository, when it is one of the destination's registry.
    pub source_repository: Option<String>,
}

/// An image that offers its chunks.
pub struct Dictionary {
    /// Its metadata.
    pub bootstrap: Bootstrap,
    /// Its blobs as its manifest has them.
    pub blobs: Vec<Descriptor>,
    /// The repository that has them, when it is one of the destination's registry.
    pub repository: Option<String>,
}

impl Dictionary {
    /// A bootstrap on disk, or a directory with one; its blobs lie beside it.
    pub fn of_files(path: &Path) -> Result<Dictionary> {
        let file = match path.is_dir() {
            true => path.join(BOOTSTRAP_NAME),
            false => path.to_owned(),
        };
        let bootstrap = Bootstrap::parse(read_small(&file, BOOTSTRAP_MAX_BYTES)?)?;
        let mut blobs = Vec::new();
        for blob in bootstrap.blobs() {
            let beside = file.with_file_name(blob.id.as_str());
            let size = std::fs::metadata(&beside).map_err(|error| {
                Error::io(&error, format!("a dictionary's blob: {}", beside.display()))
            })?;
            let digest = Digest::parse(blob.id.as_str())?;
            blobs.push(descriptor(BLOB_MEDIA_TYPE, digest, size.len()));
        }
        Ok(Dictionary { bootstrap, blobs, repository: None })
    }

    /// An image by its manifest and the layer that has its bootstrap.
    pub fn of_image(manifest: &Manifest, layer: impl Read) -> Result<Dictionary> {
        let bootstrap = Bootstrap::parse(read_bootstrap(layer)?)?;
        let blobs = manifest.nydus_layers()?.blobs.into_iter().cloned().collect();
        Ok(Dictionary { bootstrap, blobs, repository: None })
    }
}

/// What became of one image.
#[derive(Clone, Debug, Serialize)]
pub struct Converted {
    /// What machine it is for.
    pub platform: String,
    /// The new manifest.
    pub manifest: String,
    /// The manifest for Docker.
    pub docker_manifest: Option<String>,
    /// Bytes of the source's layers.
    pub source_bytes: u64,
    /// What the builder says.
    pub report: Report,
}

/// A finished image whose manifest is not stored yet.
struct Made {
    manifest: (Descriptor, Vec<u8>),
    docker: Option<(Descriptor, Vec<u8>)>,
    converted: Converted,
}

/// A conversion under way.
pub struct Conversion<'a> {
    source: &'a dyn Source,
    sink: &'a mut dyn Sink,
    /// Where blobs grow.
    work: &'a WorkDir,
    order: &'a Order,
    tally: &'a Tally,
    /// What the sink has been given.
    given: HashSet<Digest>,
    /// Layers the sink lacks, in files.
    copies: HashMap<Digest, PathBuf>,
}

impl<'a> Conversion<'a> {
    /// A conversion that has not begun.
    pub fn new(
        source: &'a dyn Source,
        sink: &'a mut dyn Sink,
        work: &'a WorkDir,
        order: &'a Order,
        tally: &'a Tally,
    ) -> Self {
        Conversion {
            source,
            sink,
            work,
            order,
            tally,
            given: HashSet::new(),
            copies: HashMap::new(),
        }
    }

    /// Converts all images.
    pub fn run(&mut self, images: &Images) -> Result<Vec<Converted>> {
        if self.sink.is_single() && images.images.len() > 1 {
            let known: Vec<String> =
                images.images.iter().map(|image| platform_text(image.platform())).collect();
            return Err(Error::Malformed(format!(
                "the destination holds one image; choose with --platform: {}",
                known.join(", ")
            )));
        }
        for layer in images.images.iter().flat_map(|image| &image.layers) {
            self.tally.layers.add(1);
            self.tally.source_bytes.add(layer.descriptor.size);
        }
        let mut made = Vec::new();
        for image in &images.images {
            let shown = platform_text(image.platform());
            made.push(self.make(image).map_err(|error| match images.images.len() {
                1 => error,
                _ => error.context(shown),
            })?);
        }
        self.sink.settle()?;
        self.name(images, &made)?;
        self.sink.finish()?;
        Ok(made.into_iter().map(|made| made.converted).collect())
    }

    /// Stores manifests and, when there is one, the index; what has a name last.
    fn name(&mut self, images: &Images, made: &[Made]) -> Result<()> {
        let docker: Vec<_> = made.iter().filter_map(|made| made.docker.as_ref()).collect();
        let main: Vec<_> = made.iter().map(|made| &made.manifest).collect();
        let around = images.index.as_ref();
        put_named(self.sink, around, &main, Name::Tag(&self.order.tag))?;
        match &self.order.docker_tag {
            Some(tag) => put_named(self.sink, around, &docker, Name::Docker(tag)),
            None => Ok(()),
        }
    }

    fn make(&mut self, source: &SourceImage) -> Result<Made> {
        let image = self.build(source)?;
        let mut parts = Vec::new();
        for blob in &image.blobs {
            parts.extend(self.store_blob(source, blob)?);
        }
        parts.sort_by_key(|(_, told)| told.origin);
        let (mut layers, mut new): (Vec<_>, Vec<_>) = parts.into_iter().unzip();
        self.sink.put_bootstrap(&image.bootstrap)?;
        let packed = BootstrapLayer::pack(&image.bootstrap)?;
        let bootstrap = bootstrap_descriptor(&packed, &image.blobs);
        self.give(bootstrap.clone(), Body::Bytes(packed.bytes))?;
        let last =
            NewLayer { diff_id: format!("sha256:{}", packed.diff_id), origin: Origin::Bootstrap };
        let alone = (vec![bootstrap.clone()], vec![last.clone()]);
        layers.push(bootstrap);
        new.push(last);
        let docker = match self.order.docker_tag {
            Some(_) => Some(self.store_config(source, &alone.0, &alone.1)?),
            None => None,
        };
        let manifest = self.store_config(source, &layers, &new)?;
        let converted = Converted {
            platform: platform_text(source.platform()),
            manifest: manifest.0.digest_text(),
            docker_manifest: docker.as_ref().map(|(docker, _)| docker.digest_text()),
            source_bytes: source.layers.iter().map(|layer| layer.descriptor.size).sum(),
            report: image.report,
        };
        Ok(Made { manifest, docker, converted })
    }

    fn build(&mut self, source: &SourceImage) -> Result<Image> {
        let directory = self.work.fresh("image");
        std::fs::create_dir(&directory)
            .map_err(|error| Error::io(&error, format!("cannot make {}", directory.display())))?;
        let mut builder = Builder::new(self.order.options.clone(), &directory)?;
        for dictionary in &self.order.dictionaries {
            builder.add_dictionary(&dictionary.bootstrap)?;
        }
        let mut inputs = Ahead { source: self.source, layers: source.layers.iter(), next: None };
        inputs.advance()?;
        let tally = self.tally;
        let progress = |step: Progress| tally.source_bytes_done.add(step.read_bytes);
        for layer in &source.layers {
            match inputs.take()? {
                Some(LayerInput::Stream(stream)) if self.order.keeps_layers => {
                    self.keep_layer(&mut builder, layer, stream, &progress)?;
                }
                Some(LayerInput::Stream(mut stream)) => {
                    let added = builder.add_tar(&mut stream, &progress);
                    added.map_err(|error| named(layer, stream.failure(), error))?;
                }
                Some(LayerInput::Directory(path)) if !self.order.keeps_layers => {
                    let added = builder.add_directory(&path, &progress);
                    added.map_err(|error| error.context(path.display()))?;
                }
                _ => return Err(unsupported!("a directory has no layer that could stay")),
            }
            tally.layers_done.add(1);
        }
        builder.finish()
    }

    /// Indexes a layer, and copies it where it is not yet.
    fn keep_layer(
        &mut self,
        builder: &mut Builder,
        layer: &SourceLayer,
        mut stream: LayerStream,
        progress: &(dyn Fn(Progress) + Sync),
    ) -> Result<()> {
        let descriptor = &layer.descriptor;
        let is_there = self.given.contains(&descriptor.digest)
            || self.copies.contains_key(&descriptor.digest)
            || self.sink.has(descriptor, self.order.source_repository.as_deref())?;
        let id = descriptor.blob_id()?;
        if is_there {
            let added = builder.add_gzip_as_is(&mut stream, id, progress);
            return added.map(drop).map_err(|error| named(layer, stream.failure(), error));
        }
        let path = self.work.fresh("layer");
        let file = File::create_new(&path)
            .map_err(|error| Error::io(&error, format!("cannot write {}", path.display())))?;
        let mut copied = Copied { stream, file };
        let added = builder.add_gzip_as_is(&mut copied, id, progress);
        added.map_err(|error| named(layer, copied.stream.failure(), error))?;
        // Whether the image needs it shows when all layers are known.
        self.copies.insert(descriptor.digest, path);
        Ok(())
    }

    /// Stores what was made for a blob; gives the layers that a manifest has for it.
    fn store_blob(
        &mut self,
        source: &SourceImage,
        blob: &Blob,
    ) -> Result<Vec<(Descriptor, NewLayer)>> {
        let own = |diff_id: String| NewLayer {
            diff_id,
            origin: blob.layer.map_or(Origin::Foreign, Origin::Layer),
        };
        let mut layers = match (blob.role, &blob.path, &blob.context) {
            (BlobRole::Data, Some(path), _) => {
                let made = self.store_file(&blob.id, blob.size_bytes, path)?;
                vec![(made, own(format!("sha256:{}", blob.id)))]
            }
            (BlobRole::Layer, Some(path), Some((context, size))) => {
                let number = blob.layer.unwrap_or_default();
                let kept = source.layers.get(number).zip(source.config.diff_ids.get(number));
                let (kept, diff_id) = kept.ok_or_else(|| malformed!("no layer {number}"))?;
                if let Some(copy) = self.copies.remove(&kept.descriptor.digest) {
                    self.give(kept.descriptor.clone(), Body::File(copy))?;
                }
                let diff_of_table = format!("sha256:{context}");
                let table = NewLayer { diff_id: diff_of_table, origin: Origin::Index(number) };
                vec![
                    (kept.descriptor.clone(), own(diff_id.clone())),
                    (self.store_file(context, *size, path)?, table),
                ]
            }
            _ => vec![(self.adopt(blob)?, own(format!("sha256:{}", blob.id)))],
        };
        for (layer, _) in &mut layers {
            layer.annotations.insert(BLOB_ANNOTATION.to_owned(), "true".to_owned());
        }
        Ok(layers)
    }

    fn store_file(&mut self, id: &BlobId, size: u64, path: &Path) -> Result<Descriptor> {
        let described = descriptor(BLOB_MEDIA_TYPE, Digest::parse(id.as_str())?, size);
        self.give(described.clone(), Body::File(path.to_owned()))?;
        Ok(described)
    }

    /// A blob of a dictionary, which the destination has or can have.
    fn adopt(&mut self, blob: &Blob) -> Result<Descriptor> {
        let known = self.order.dictionaries.iter().flat_map(|dictionary| {
            dictionary.blobs.iter().map(move |found| (found, dictionary.repository.as_deref()))
        });
        let same = |found: &Descriptor| found.digest.to_string() == blob.id.as_str();
        let absent = || {
            Error::NotFound(format!(
                "the destination lacks blob {} of --chunk-dict: put both images into one registry",
                blob.id
            ))
        };
        let (found, repository) = known.into_iter().find(|(d, _)| same(d)).ok_or_else(absent)?;
        match self.sink.has(found, repository)? {
            true => Ok(descriptor(BLOB_MEDIA_TYPE, found.digest, found.size)),
            false => Err(absent()),
        }
    }

    /// The configuration over other layers, stored, and its manifest, which is not.
    fn store_config(
        &mut self,
        source: &SourceImage,
        layers: &[Descriptor],
        new: &[NewLayer],
    ) -> Result<(Descriptor, Vec<u8>)> {
        let config = source.config.rewritten(new);
        let described = describe(CONFIG, &config);
        self.give(described.clone(), Body::Bytes(config))?;
        let subject = source.descriptor.as_ref().filter(|_| self.order.refers);
        let bytes = manifest(&described, layers, subject, &source.annotations);
        let mut entry = describe(MANIFEST, &bytes);
        entry.platform = Some(source.platform().clone());
        Ok((entry, bytes))
    }

    /// Hands content to the sink, once however many images have it.
    fn give(&mut self, descriptor: Descriptor, body: Body) -> Result<()> {
        match self.given.insert(descriptor.digest) {
            true => self.sink.put(Content { descriptor, body }),
            false => Ok(()),
        }
    }
}

/// The error that ended a layer, under the layer's name.
fn named(layer: &SourceLayer, own: Option<Error>, error: Error) -> Error {
    own.unwrap_or_else(|| error.context(format!("layer {}", layer.descriptor.digest_text())))
}

/// A layer on its way into the builder and into a file.
struct Copied {
    stream: LayerStream,
    file: File,
}

impl Read for Copied {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let size = self.stream.read(buffer)?;
        self.file.write_all(&buffer[..size])?;
        Ok(size)
    }
}

/// The layers in their order, the next one under way while one is built.
struct Ahead<'a> {
    source: &'a dyn Source,
    layers: std::slice::Iter<'a, SourceLayer>,
    next: Option<LayerInput>,
}

impl Ahead<'_> {
    fn advance(&mut self) -> Result<()> {
        self.next = self.layers.next().map(|layer| self.source.layer(layer)).transpose()?;
        Ok(())
    }

    fn take(&mut self) -> Result<Option<LayerInput>> {
        let taken = self.next.take();
        self.advance()?;
        Ok(taken)
    }
}

fn bootstrap_descriptor(layer: &BootstrapLayer, blobs: &[Blob]) -> Descriptor {
    let mut described = describe(LAYER_GZIP, &layer.bytes);
    let foreign: Vec<&str> = blobs
        .iter()
        .filter(|blob| blob.role == BlobRole::Foreign)
        .map(|blob| blob.id.as_str())
        .collect();
    described.annotations = BTreeMap::from([
        (BOOTSTRAP_ANNOTATION.to_owned(), "true".to_owned()),
        (VERSION_ANNOTATION.to_owned(), "6".to_owned()),
    ]);
    if !foreign.is_empty() {
        let list = serde_json::json!(foreign).to_string();
        described.annotations.insert(FOREIGN_ANNOTATION.to_owned(), list);
    }
    described
}
