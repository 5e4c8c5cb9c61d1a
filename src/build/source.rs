//! Where the images come from that are converted: one view of every kind of place.
//!
//! A source knows its images, one per platform, with their configuration and layers; everything it
//! hands out is checked against the digest it is known by. Choosing among platforms is done here,
//! the same way for all.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::image_config::ImageConfig;
use super::layer_stream::LayerStream;
use crate::config as limits;
use crate::error::{Error, Result};
use crate::image::manifest::{Descriptor, Document, Manifest, Platform};

/// A place that has images.
pub trait Source {
    /// The images of the platforms wanted: all of them without one.
    fn images(&mut self, wanted: Option<&Platform>) -> Result<Images>;
    /// The bytes of a layer.
    fn layer(&self, layer: &SourceLayer) -> Result<LayerInput>;
    /// The registry's host and repository, for what can be mounted from there.
    fn repository(&self) -> Option<(&str, &str)> {
        None
    }
}

/// A place whose documents and blobs are known by digest.
pub trait Library {
    /// What its name leads to, and the bytes of that.
    fn top(&self) -> Result<(Descriptor, Vec<u8>)>;
    /// A manifest or configuration.
    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>>;
    /// A blob as a stream.
    fn blob(&self, descriptor: &Descriptor) -> Result<LayerStream>;
}

/// What a source has under one name.
#[derive(Clone, Debug)]
pub struct Images {
    /// One per platform.
    pub images: Vec<SourceImage>,
    /// What an index says of itself; `None` for a single image.
    pub index: Option<BTreeMap<String, String>>,
    /// Manifests of an index that are left out, and why.
    pub skipped: Vec<String>,
}

/// One image.
#[derive(Clone, Debug)]
pub struct SourceImage {
    /// Its manifest, where there is one; with the platform an index gives it.
    pub descriptor: Option<Descriptor>,
    /// Its configuration.
    pub config: ImageConfig,
    /// Its layers, lowest first.
    pub layers: Vec<SourceLayer>,
    /// What its manifest says of it.
    pub annotations: BTreeMap<String, String>,
}

/// A layer that can be asked for.
#[derive(Clone, Debug)]
pub struct SourceLayer {
    /// What it is; the digest is that of its plain tar when it has no other.
    pub descriptor: Descriptor,
    /// Its number in a source that has no other name for it.
    pub number: usize,
}

/// What a layer is made of.
#[expect(clippy::large_enum_variant, reason = "two of them exist at a time")]
pub enum LayerInput {
    /// A tar, plain or compressed.
    Stream(LayerStream),
    /// A directory of this host.
    Directory(PathBuf),
}

/// Reads what manifests and indexes refer to: small documents by descriptor.
pub type Fetch<'a> = &'a mut dyn FnMut(&Descriptor) -> Result<Vec<u8>>;

impl Images {
    /// The images a manifest or index leads to; `top` describes its bytes.
    pub fn read(
        top: &Descriptor,
        bytes: &[u8],
        wanted: Option<&Platform>,
        fetch: Fetch<'_>,
    ) -> Result<Images> {
        let index = match Document::parse(bytes)? {
            Document::Manifest(manifest) => {
                let image = SourceImage::read(top, manifest, fetch)?;
                let found = &image.config.platform;
                if let Some(wanted) = wanted
                    && !is_for(found, wanted)
                {
                    return Err(Error::NotFound(format!(
                        "the image is for {} and not for {}",
                        platform_text(found),
                        platform_text(wanted)
                    )));
                }
                return Ok(Images { images: vec![image], index: None, skipped: Vec::new() });
            }
            Document::Index(index) => index,
        };
        let (mut images, mut skipped) = (Vec::new(), Vec::new());
        for entry in &index.manifests {
            if let Some(why) = unfit(entry) {
                skipped.push(format!("{}: {why}", entry.digest_text()));
                continue;
            }
            let fits = |wanted| entry.platform.as_ref().is_none_or(|found| is_for(found, wanted));
            if !wanted.is_none_or(fits) {
                continue;
            }
            if images.len() >= limits::PLATFORMS_MAX {
                return Err(Error::Unsupported(format!(
                    "an index of more than {} images; choose with --platform",
                    limits::PLATFORMS_MAX
                )));
            }
            let manifest = Manifest::parse(&fetch(entry)?)?;
            let image = SourceImage::read(entry, manifest, fetch)?;
            // An entry need not say whom it is for; its configuration always does.
            if wanted.is_none_or(|wanted| is_for(image.platform(), wanted)) {
                images.push(image);
            }
        }
        match images.is_empty() {
            true => Err(Error::NotFound(match wanted {
                Some(wanted) => format!("the index has no image for {}", platform_text(wanted)),
                None => "the index has no image that can be converted".to_owned(),
            })),
            // One that was chosen stands for itself.
            false if wanted.is_some() && images.len() == 1 => {
                Ok(Images { images, index: None, skipped })
            }
            false => Ok(Images { images, index: Some(index.annotations), skipped }),
        }
    }
}

impl SourceImage {
    /// What machine it is for: as its index says, which may know the variant, or its configuration.
    pub fn platform(&self) -> &Platform {
        let listed = self.descriptor.as_ref().and_then(|entry| entry.platform.as_ref());
        listed.unwrap_or(&self.config.platform)
    }

    fn read(entry: &Descriptor, manifest: Manifest, fetch: Fetch<'_>) -> Result<SourceImage> {
        if manifest.layers.iter().any(Descriptor::is_nydus) {
            return Err(Error::Unsupported(
                "the image is lazily loadable already; convert the one it was made from".to_owned(),
            ));
        }
        if manifest.layers.len() > limits::LAYERS_MAX {
            return Err(Error::Unsupported(format!(
                "an image of {} layers; we take {}",
                manifest.layers.len(),
                limits::LAYERS_MAX
            )));
        }
        manifest.layers.iter().try_for_each(check_layer)?;
        let config = ImageConfig::parse(&fetch(&manifest.config)?)?;
        let numbered = manifest.layers.into_iter().enumerate();
        let layers = numbered.map(|(number, descriptor)| SourceLayer { descriptor, number });
        Ok(SourceImage {
            descriptor: Some(entry.clone()),
            config,
            layers: layers.collect(),
            annotations: manifest.annotations,
        })
    }
}

/// Why an entry of an index is no image to convert.
fn unfit(entry: &Descriptor) -> Option<&'static str> {
    if entry.annotations.contains_key("vnd.docker.reference.type") {
        return Some("it attests another manifest, which will not be there");
    }
    let platform = entry.platform.as_ref()?;
    if platform.os == "unknown" || platform.architecture == "unknown" {
        return Some("it is for no platform");
    }
    platform.is_lazy().then_some("it is lazily loadable already")
}

fn check_layer(layer: &Descriptor) -> Result<()> {
    let kind = layer.media_type.as_str();
    let why = if kind.ends_with("+encrypted") {
        "it is encrypted; decrypt the image first"
    } else if !(kind.is_empty() || kind.contains("tar") || kind.contains("rootfs")) {
        "it is no tar: is this an image?"
    } else {
        return Ok(());
    };
    Err(Error::Unsupported(format!("layer {} of type {kind:?}: {why}", layer.digest_text())))
}

/// Whether something for `found` is what is meant by `wanted`, which may leave the variant open.
pub fn is_for(found: &Platform, wanted: &Platform) -> bool {
    found.os == wanted.os
        && found.architecture == wanted.architecture
        && (wanted.variant.is_none() || found.variant == wanted.variant)
}

/// `OS/ARCHITECTURE[/VARIANT]`.
pub fn platform_text(platform: &Platform) -> String {
    let variant = platform.variant.as_ref().map(|variant| format!("/{variant}"));
    format!("{}/{}{}", platform.os, platform.architecture, variant.unwrap_or_default())
}

/// Reads `OS/ARCHITECTURE[/VARIANT]`.
pub fn parse_platform(text: &str) -> Result<Platform> {
    let parts: Vec<&str> = text.split('/').collect();
    let is_word = |part: &&str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    let (os, architecture, variant) = match parts.as_slice() {
        _ if !parts.iter().all(is_word) => ("", "", None),
        [os, architecture] => (*os, *architecture, None),
        [os, architecture, variant] => (*os, *architecture, Some((*variant).to_owned())),
        _ => ("", "", None),
    };
    match os.is_empty() {
        true => Err(Error::Malformed(format!(
            "platform {text:?}: write OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT"
        ))),
        false => Ok(Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant,
            ..Platform::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::documents::{CONFIG, LAYER_GZIP, MANIFEST, describe, index, manifest};
    use serde_json::json;
    use std::collections::HashMap;

    /// Documents by digest, and the descriptor of the last one added.
    #[derive(Default)]
    struct Shelf(HashMap<String, Vec<u8>>);

    impl Shelf {
        fn put(&mut self, media_type: &str, bytes: Vec<u8>) -> Descriptor {
            let descriptor = describe(media_type, &bytes);
            self.0.insert(descriptor.digest_text(), bytes);
            descriptor
        }

        fn image(&mut self, architecture: &str, layer: &str) -> Descriptor {
            let config = json!({"architecture": architecture, "os": "linux", "rootfs": {}});
            let config = self.put(CONFIG, config.to_string().into_bytes());
            let layers = [describe(layer, architecture.as_bytes())];
            let manifest = manifest(&config, &layers, None, &BTreeMap::new());
            let mut descriptor = self.put(MANIFEST, manifest);
            descriptor.platform = Some(parse_platform(&format!("linux/{architecture}")).unwrap());
            descriptor
        }

        fn read(&self, bytes: &[u8], wanted: Option<&str>) -> Result<Images> {
            let wanted = wanted.map(|text| parse_platform(text).unwrap());
            let top = describe("", bytes);
            Images::read(&top, bytes, wanted.as_ref(), &mut |d| {
                let found = self.0.get(&d.digest_text()).cloned();
                found.ok_or_else(|| Error::NotFound(d.digest_text()))
            })
        }
    }

    #[test]
    fn all_platforms_of_an_index_are_taken_or_the_one_that_is_wanted() {
        let mut shelf = Shelf::default();
        let mut entries = vec![shelf.image("amd64", LAYER_GZIP), shelf.image("arm64", LAYER_GZIP)];
        let mut attestation = describe(MANIFEST, b"not fetched");
        attestation.annotations.insert("vnd.docker.reference.type".into(), "x".into());
        entries.push(attestation);
        let bytes = index(&entries, &BTreeMap::new());
        let all = shelf.read(&bytes, None).unwrap();
        assert_eq!((all.images.len(), all.skipped.len()), (2, 1));
        let one = shelf.read(&bytes, Some("linux/arm64")).unwrap();
        assert_eq!(one.images[0].config.platform.architecture, "arm64");
        assert!(matches!(shelf.read(&bytes, Some("linux/s390x")), Err(Error::NotFound(_))));
        let alone = shelf.0[&entries[0].digest_text()].clone();
        assert!(shelf.read(&alone, Some("linux/amd64")).unwrap().index.is_none());
        assert!(matches!(shelf.read(&alone, Some("linux/arm64")), Err(Error::NotFound(_))));
    }

    #[test]
    fn an_entry_that_names_no_platform_has_that_of_its_configuration() {
        let mut shelf = Shelf::default();
        let entries = ["arm64", "amd64"].map(|architecture| Descriptor {
            platform: None,
            ..shelf.image(architecture, LAYER_GZIP)
        });
        let bytes = index(&entries, &BTreeMap::new());
        for wanted in ["amd64", "arm64"] {
            let found = shelf.read(&bytes, Some(&format!("linux/{wanted}"))).unwrap();
            assert_eq!(found.images.len(), 1);
            assert_eq!(found.images[0].config.platform.architecture, wanted);
        }
        assert!(matches!(shelf.read(&bytes, Some("linux/s390x")), Err(Error::NotFound(_))));
    }

    #[test]
    fn what_cannot_be_converted_is_refused_by_its_reason() {
        let mut shelf = Shelf::default();
        for (layer, why) in [
            ("application/vnd.oci.image.layer.nydus.blob.v1", "lazily loadable already"),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"),
            ("application/vnd.cncf.helm.chart.content.v1", "is this an image"),
        ] {
            let entry = shelf.image("amd64", layer);
            let bytes = shelf.0[&entry.digest_text()].clone();
            let error = shelf.read(&bytes, None).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
        let nested = shelf.put("", index(&[], &BTreeMap::new()));
        assert!(shelf.read(&index(&[nested], &BTreeMap::new()), None).is_err());
        assert!(shelf.read(&index(&[], &BTreeMap::new()), None).is_err());
    }

    #[test]
    fn platforms_are_read_as_they_are_written() {
        for text in ["linux/amd64", "linux/arm/v7"] {
            assert_eq!(platform_text(&parse_platform(text).unwrap()), text);
        }
        for text in ["", "linux", "linux/", "a/b/c/d", "linux/a b"] {
            assert!(parse_platform(text).is_err(), "{text:?}");
        }
    }
}
