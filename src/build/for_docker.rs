//! The image for Docker beside one that lists its blobs: its configuration over the bootstrap's
//! layer alone, which any Docker can unpack.
//!
//! Pure but for what is read of a library. Nothing is stored here. It is made of what the other
//! image's manifest says, so that images an index has beside the one that was optimised need not
//! have been converted with one.

use super::documents::{CONFIG, MANIFEST, describe, manifest};
use super::image_config::{ImageConfig, NewLayer, Origin};
use super::source::Library;
use crate::error::{Error, Result};
use crate::image::Digest;
use crate::image::manifest::{Descriptor, Document, Manifest, Platform, subject};

/// The manifest of an image for Docker, and the configuration to be stored before it.
#[derive(Clone, Debug)]
pub struct ForDocker {
    /// The configuration.
    pub config: (Descriptor, Vec<u8>),
    /// The manifest.
    pub manifest: (Descriptor, Vec<u8>),
    /// Its only layer.
    pub bootstrap: Digest,
}

impl ForDocker {
    /// Beside the image of `like`, with a bootstrap that need not be its own; `diff_id` is that of
    /// the bootstrap's layer.
    pub fn of(
        like: &Manifest,
        config: &ImageConfig,
        subject: Option<&Descriptor>,
        bootstrap: &Descriptor,
        diff_id: String,
    ) -> ForDocker {
        let layer = NewLayer { diff_id, origin: Origin::Bootstrap };
        let config = config.rewritten(&[layer]);
        let described = describe(CONFIG, &config);
        let layers = std::slice::from_ref(bootstrap);
        let bytes = manifest(&described, layers, subject, &like.annotations);
        ForDocker {
            config: (described, config),
            manifest: (describe(MANIFEST, &bytes), bytes),
            bootstrap: bootstrap.digest,
        }
    }

    /// Beside an image of an index as it is; nothing for what is not lazily loadable.
    pub fn beside(library: &dyn Library, entry: &Descriptor) -> Result<Option<ForDocker>> {
        let bytes = library.document(entry)?;
        let image = Manifest::parse(&bytes)?;
        if !image.layers.iter().any(Descriptor::is_nydus) {
            return Ok(None);
        }
        let config = ImageConfig::parse(&library.document(&image.config)?)?;
        let bootstrap = image.nydus_layers()?.bootstrap;
        let place = image.layers.iter().position(|layer| layer.digest == bootstrap.digest);
        let diff_id = place.and_then(|place| config.diff_ids.get(place)).ok_or_else(|| {
            malformed!("{}: its configuration does not know its layers", entry.digest_text())
        })?;
        let subject = subject(&bytes);
        let mut made = ForDocker::of(&image, &config, subject.as_ref(), bootstrap, diff_id.clone());
        made.manifest.0.platform.clone_from(&entry.platform);
        Ok(Some(made))
    }
}

/// The only layer of the image for Docker that a name leads to; nothing if there is no such name
/// or it leads to something else, which is none of our business.
pub fn bootstrap_at(library: &dyn Library, platform: &Platform) -> Result<Option<Digest>> {
    let manifest = match library.top() {
        Err(Error::NotFound(_)) => return Ok(None),
        Err(error) => return Err(error),
        Ok((_, bytes)) => match Document::parse(&bytes) {
            Ok(Document::Manifest(manifest)) => manifest,
            Ok(Document::Index(index)) => match index.choose(platform) {
                Ok(entry) => Manifest::parse(&library.document(entry)?)?,
                Err(_) => return Ok(None),
            },
            Err(_) => return Ok(None),
        },
    };
    let marked = manifest.layers.iter().any(Descriptor::is_nydus);
    let layers = manifest.nydus_layers().ok().filter(|layers| marked && layers.blobs.is_empty());
    Ok(layers.map(|layers| layers.bootstrap.digest))
}
