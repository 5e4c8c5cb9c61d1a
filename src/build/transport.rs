//! From a place to what can read or write it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::convert::Dictionary;
use super::docker_archive::DockerArchive;
use super::docker_save::DockerSink;
use super::documents::{LAYER_TAR, descriptor};
use super::image_config::ImageConfig;
use super::oci_layout::{OciSink, OciSource, read_small};
use super::place::Place;
use super::registry_image::{RegistrySink, RegistrySource};
use super::sink::Sink;
use super::source::{Images, LayerInput, Library, Source, SourceImage, SourceLayer};
use super::tally::Tally;
use super::unpacked::{BOOTSTRAP_NAME, UnpackedSink};
use crate::config::BOOTSTRAP_MAX_BYTES;
use crate::error::{Error, Result};
use crate::image::manifest::{Document, Manifest, Platform};
use crate::image::{Bootstrap, Digest};
use crate::registry::origin::Scheme;

/// Opens a place to read from.
pub fn source(place: &Place, scheme: Scheme) -> Result<Box<dyn Source>> {
    Ok(match place {
        Place::Registry(reference) => Box::new(RegistrySource::open(reference, scheme)?),
        Place::Oci { directory, name } => Box::new(OciSource::open(directory, name.as_deref())),
        Place::DockerArchive { file, name } => {
            Box::new(DockerArchive::open(file, name.as_deref())?)
        }
        Place::Directory(path) => Box::new(DirectorySource { path: path.clone() }),
    })
}

/// Opens a place to write to. `work` is where unfinished files lie, on the file system that
/// [`work_parent`] says; blobs may be mounted from `repositories`.
pub fn sink(
    place: &Place,
    scheme: Scheme,
    repositories: &[String],
    work: &Path,
    tally: Arc<Tally>,
) -> Result<Box<dyn Sink>> {
    Ok(match place {
        Place::Registry(reference) => {
            Box::new(RegistrySink::open(reference, scheme, repositories, work, tally)?)
        }
        Place::Oci { directory, .. } => Box::new(OciSink::open(directory, work, tally)?),
        Place::DockerArchive { file, name } => {
            Box::new(DockerSink::new(file, name.as_deref(), work, tally))
        }
        Place::Directory(path) => Box::new(UnpackedSink::open(path, work, tally)?),
    })
}

/// Where a destination wants unfinished files: where they can be renamed into place. `None` for one
/// that does not care.
pub fn work_parent(place: &Place) -> Result<Option<PathBuf>> {
    let directory = match place {
        Place::Registry(_) => return Ok(None),
        Place::Oci { directory, .. } | Place::Directory(directory) => directory.clone(),
        Place::DockerArchive { file, .. } => match file.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => return Ok(Some(parent.to_owned())),
            _ => return Ok(Some(PathBuf::from("."))),
        },
    };
    std::fs::create_dir_all(&directory)
        .map_err(|error| Error::io(&error, format!("cannot make {}", directory.display())))?;
    Ok(Some(directory))
}

/// Opens a place that knows its content by digest.
pub fn library(place: &Place, scheme: Scheme) -> Result<Box<dyn Library>> {
    match place {
        Place::Registry(reference) => Ok(Box::new(RegistrySource::open(reference, scheme)?)),
        Place::Oci { directory, name } => Ok(Box::new(OciSource::open(directory, name.as_deref()))),
        Place::DockerArchive { .. } | Place::Directory(_) => {
            Err(unsupported!("{place} has no manifest"))
        }
    }
}

/// A lazily loadable image whose chunks others may use; for this machine if it is for several.
pub fn dictionary(place: &Place, scheme: Scheme) -> Result<Dictionary> {
    if let Place::Directory(path) = place {
        return Dictionary::of_files(path);
    }
    let library = library(place, scheme)?;
    let (_, bytes) = library.top()?;
    let manifest = match Document::parse(&bytes)? {
        Document::Manifest(manifest) => manifest,
        Document::Index(index) => {
            Manifest::parse(&library.document(index.choose(&Platform::here())?)?)?
        }
    };
    let layer = library.blob(manifest.nydus_layers()?.bootstrap)?;
    Dictionary::of_image(&manifest, layer)
}

/// A lazily loadable image of an OCI layout, and the directory with its blobs.
pub fn layout(place: &Place) -> Result<(Dictionary, PathBuf)> {
    match place {
        Place::Oci { directory, .. } => {
            let image = dictionary(place, Scheme::Https)?;
            Ok((image, directory.join("blobs/sha256")))
        }
        _ => Err(malformed!("{place} is no OCI layout")),
    }
}

/// A directory of this host as an image of one layer.
struct DirectorySource {
    path: PathBuf,
}

impl Source for DirectorySource {
    fn images(&mut self, wanted: Option<&Platform>) -> Result<Images> {
        if !self.path.is_dir() {
            return Err(Error::NotFound(format!("{}: no such directory", self.path.display())));
        }
        refuse_unpacked(&self.path)?;
        let config = ImageConfig::plain(wanted.cloned().unwrap_or_else(Platform::here));
        // Nobody knows digest and size of a tar that is never made.
        let descriptor = descriptor(LAYER_TAR, Digest([0; 32]), 0);
        let layers = vec![SourceLayer { descriptor, number: 0 }];
        let annotations = std::collections::BTreeMap::new();
        let image = SourceImage { descriptor: None, config, layers, annotations };
        Ok(Images { images: vec![image], index: None, skipped: Vec::new() })
    }

    fn layer(&self, _: &SourceLayer) -> Result<LayerInput> {
        Ok(LayerInput::Directory(self.path.clone()))
    }
}

/// Refuses the directory of an image that is lazily loadable already: its files are not those of
/// the image, and nobody wants an image of them.
fn refuse_unpacked(directory: &Path) -> Result<()> {
    let path = directory.join(BOOTSTRAP_NAME);
    if !path.is_file() {
        return Ok(());
    }
    let bootstrap = read_small(&path, BOOTSTRAP_MAX_BYTES).and_then(Bootstrap::parse);
    match bootstrap {
        Ok(_) => Err(unsupported!(
            "its {BOOTSTRAP_NAME} makes it an image that is lazily loadable already; convert the \
             one it was made from, or what `sluice unpack {}` makes of it",
            directory.display()
        )),
        Err(_) => Ok(()),
    }
}
