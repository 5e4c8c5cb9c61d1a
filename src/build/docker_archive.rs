//! Images in a tar as `docker save` writes it, as a source.
//!
//! The tar is gone through once for the places of its members; `manifest.json` says which are
//! configuration and layers. A layer is checked against its own name where that is a digest, and
//! against the configuration's `diff_ids` otherwise.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::documents::{LAYER_TAR, descriptor};
use super::image_config::ImageConfig;
use super::layer_stream::LayerStream;
use super::source::{Images, LayerInput, Source, SourceImage, SourceLayer, is_for, platform_text};
use super::stream;
use crate::config as limits;
use crate::error::{Error, Result};
use crate::image::Digest;
use crate::image::layer::BOOTSTRAP_PATH;
use crate::image::manifest::Platform;
use crate::registry::reference::Reference;
use crate::tar::{Archive, Kind};

const BOOTSTRAP_DIRECTORY: &str = "image";

/// What `manifest.json` says of one image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Listed {
    /// The member with its configuration.
    pub config: String,
    /// Its names.
    #[serde(default)]
    pub repo_tags: Option<Vec<String>>,
    /// The members with its layers, lowest first.
    pub layers: Vec<String>,
}

/// Reads `manifest.json`.
pub fn parse_list(bytes: &[u8]) -> Result<Vec<Listed>> {
    let list: Vec<Listed> = serde_json::from_slice(bytes)
        .map_err(|error| malformed!("manifest.json is not that of docker save: {error}"))?;
    match list.iter().any(|image| image.layers.len() > limits::LAYERS_MAX) {
        true => Err(unsupported!("an image of more than {} layers", limits::LAYERS_MAX)),
        false => Ok(list),
    }
}

/// The image that is meant: the one of a name, or the only one.
pub fn choose<'a>(list: &'a [Listed], name: Option<&str>) -> Result<&'a Listed> {
    let names = |image: &'a Listed| image.repo_tags.iter().flatten();
    match (list, name) {
        ([], _) => Err(Error::NotFound("the archive has no image".to_owned())),
        (_, Some(name)) => {
            let same = |own: &String| own == name || is_same(own, name);
            let found = list.iter().find(|image| names(image).any(same));
            found.ok_or_else(|| Error::NotFound(format!("the archive has no image {name}")))
        }
        ([one], None) => Ok(one),
        (_, None) => {
            let known = list.iter().flat_map(names).take(limits::NAMES_SHOWN_MAX);
            let known: Vec<&str> = known.map(String::as_str).collect();
            Err(malformed!("which image? The archive has {}", known.join(", ")))
        }
    }
}

/// Whether two names mean the same to Docker: `app:1` is `docker.io/library/app:1`.
fn is_same(one: &str, other: &str) -> bool {
    matches!((Reference::parse(one), Reference::parse(other)), (Ok(a), Ok(b)) if a == b)
}

/// Where the members of a tar are.
#[derive(Debug, Default)]
struct Members {
    files: HashMap<String, (u64, u64)>,
    /// Older archives have a layer once and links to it.
    links: HashMap<String, String>,
}

impl Members {
    fn read(tar: impl Read) -> Result<Members> {
        let mut archive = Archive::new(tar);
        let mut members = Members::default();
        while let Some(member) = archive.next_member()? {
            if members.files.len() + members.links.len() >= limits::ARCHIVE_MEMBERS_MAX {
                return Err(unsupported!(
                    "more than {} members: is this a docker save archive?",
                    limits::ARCHIVE_MEMBERS_MAX
                ));
            }
            let name = normal(&String::from_utf8_lossy(&member.path));
            let link = String::from_utf8_lossy(&member.link);
            match member.kind {
                Kind::File if member.segments.is_none() => {
                    members.files.insert(name, (archive.offset(), member.size));
                }
                Kind::Symlink => {
                    let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
                    let target = normal(&format!("{folder}/{link}"));
                    members.links.insert(name, target);
                }
                Kind::HardLink => {
                    members.links.insert(name, normal(&link));
                }
                _ => {}
            }
        }
        Ok(members)
    }

    /// Offset and size of a member; one link is followed.
    fn find(&self, name: &str) -> Result<(u64, u64)> {
        let name = normal(name);
        let target = self.links.get(&name).unwrap_or(&name);
        let found = self.files.get(target).copied();
        found.ok_or_else(|| malformed!("the archive has no member {name:?}"))
    }
}

/// A path without `.`, `..` and double slashes.
fn normal(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// An archive that is read.
pub struct DockerArchive {
    path: PathBuf,
    members: Members,
    chosen: Listed,
    /// What the configuration says of the layers.
    diff_ids: Vec<String>,
}

impl DockerArchive {
    /// The image of a name; of none, if there is only one.
    pub fn open(path: &Path, name: Option<&str>) -> Result<DockerArchive> {
        let read = || {
            let file = File::open(path).map_err(|error| Error::io(&error, "cannot be read"))?;
            let members = Members::read(std::io::BufReader::with_capacity(
                limits::BUILD_READ_BYTES,
                refuse_compressed(file)?,
            ))?;
            let place = members.find("manifest.json")?;
            let list = parse_list(&small(path, place, limits::MANIFEST_MAX_BYTES)?)?;
            let chosen = choose(&list, name)?.clone();
            Ok(DockerArchive { path: path.to_owned(), members, chosen, diff_ids: Vec::new() })
        };
        read().map_err(|error: Error| error.context(path.display()))
    }

    fn section(&self, (offset, size): (u64, u64)) -> Result<impl Read + Send + 'static> {
        section(&self.path, (offset, size))
    }
}

impl Source for DockerArchive {
    fn images(&mut self, wanted: Option<&Platform>) -> Result<Images> {
        let place = self.members.find(&self.chosen.config)?;
        let bytes = small(&self.path, place, limits::IMAGE_CONFIG_MAX_BYTES)?;
        let config = ImageConfig::parse(&bytes)?;
        if let Some(wanted) = wanted
            && !is_for(&config.platform, wanted)
        {
            return Err(Error::NotFound(format!(
                "the image is for {} and not for {}",
                platform_text(&config.platform),
                platform_text(wanted)
            )));
        }
        if config.diff_ids.len() != self.chosen.layers.len() {
            return Err(malformed!(
                "the configuration tells of {} layers and manifest.json of {}",
                config.diff_ids.len(),
                self.chosen.layers.len()
            ));
        }
        if let Some(last) = self.chosen.layers.last()
            && is_bootstrap_layer(self.section(self.members.find(last)?)?)
        {
            return Err(unsupported!(
                "the image is lazily loadable already; convert the one it was made from"
            ));
        }
        self.diff_ids.clone_from(&config.diff_ids);
        let mut layers = Vec::new();
        for (number, (member, diff_id)) in
            self.chosen.layers.iter().zip(&config.diff_ids).enumerate()
        {
            let (_, size) = self.members.find(member)?;
            let digest = named_digest(member).map_or_else(|| parse_digest(diff_id), Ok)?;
            let descriptor = descriptor(LAYER_TAR, digest, size);
            layers.push(SourceLayer { descriptor, number });
        }
        let annotations = BTreeMap::new();
        let image = SourceImage { descriptor: None, config, layers, annotations };
        Ok(Images { images: vec![image], index: None, skipped: Vec::new() })
    }

    fn layer(&self, layer: &SourceLayer) -> Result<LayerInput> {
        let member = self.chosen.layers.get(layer.number);
        let member = member.ok_or_else(|| malformed!("no layer {}", layer.number))?;
        let place = self.members.find(member)?;
        if named_digest(member).is_some() {
            let stream = LayerStream::checked(self.section(place)?, &layer.descriptor);
            return Ok(LayerInput::Stream(stream));
        }
        // The digest is that of the plain tar, whatever the archive has.
        let mut magic = [0; 2];
        let is_gzip = self.section(place)?.read_exact(&mut magic).is_ok() && magic == GZIP_MAGIC;
        let (bytes, digest) = (self.section(place)?, layer.descriptor.digest);
        Ok(LayerInput::Stream(match is_gzip {
            true => LayerStream::hashed(flate2::read::MultiGzDecoder::new(bytes), digest),
            false => LayerStream::hashed(bytes, digest),
        }))
    }
}

const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];

/// Whether a layer begins with a bootstrap, as that of a lazily loadable image does. An archive has
/// no annotation that would say so.
fn is_bootstrap_layer(layer: impl Read) -> bool {
    let Ok(tar) = stream::open(layer) else { return false };
    let mut archive = Archive::new(tar);
    while let Ok(Some(member)) = archive.next_member() {
        // Its directory comes first.
        if member.kind != Kind::Directory {
            return normal(&String::from_utf8_lossy(&member.path)) == BOOTSTRAP_PATH;
        }
        if normal(&String::from_utf8_lossy(&member.path)) != BOOTSTRAP_DIRECTORY {
            return false;
        }
    }
    false
}

fn refuse_compressed(mut file: File) -> Result<File> {
    let mut magic = [0; 2];
    let failed = |error: std::io::Error| Error::io(&error, "cannot be read");
    if file.read_exact(&mut magic).is_ok() && magic == GZIP_MAGIC {
        return Err(unsupported!("it is compressed; gunzip it first"));
    }
    file.seek(SeekFrom::Start(0)).map_err(failed)?;
    Ok(file)
}

/// The digest a member is named by, in archives that are OCI layouts too.
fn named_digest(member: &str) -> Option<Digest> {
    Digest::parse(normal(member).strip_prefix("blobs/sha256/")?).ok()
}

fn parse_digest(text: &str) -> Result<Digest> {
    let hex = text.strip_prefix("sha256:");
    Digest::parse(hex.ok_or_else(|| unsupported!("a diff_id {text:?} that is not sha256"))?)
}

fn section(path: &Path, (offset, size): (u64, u64)) -> Result<impl Read + Send + 'static> {
    let failed = |error: std::io::Error| Error::io(&error, format!("{}", path.display()));
    let mut file = File::open(path).map_err(failed)?;
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    Ok(file.take(size))
}

fn small(path: &Path, place: (u64, u64), limit: usize) -> Result<Vec<u8>> {
    if place.1 > limit as u64 {
        return Err(unsupported!("a document of {} bytes", place.1));
    }
    let mut bytes = Vec::new();
    let read = section(path, place)?.read_to_end(&mut bytes);
    read.map_err(|error| Error::io(&error, "cannot be read"))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(tags: &[&str]) -> Listed {
        let tags = tags.iter().map(|tag| (*tag).to_owned()).collect();
        Listed { config: "c".into(), repo_tags: Some(tags), layers: vec!["l".into()] }
    }

    #[test]
    fn the_image_meant_is_named_or_the_only_one() {
        let list = [listed(&["a:1", "a:2"]), listed(&["b:1"])];
        assert_eq!(choose(&list, Some("a:2")).unwrap(), &list[0]);
        assert_eq!(choose(&list, Some("docker.io/library/b:1")).unwrap(), &list[1]);
        assert_eq!(choose(&list[1..], None).unwrap(), &list[1]);
        assert!(choose(&list, None).unwrap_err().to_string().contains("a:1, a:2, b:1"));
        assert!(choose(&list, Some("c:1")).is_err() && choose(&[], None).is_err());
    }

    #[test]
    fn a_list_is_read_and_anything_else_refused() {
        let text = r#"[{"Config":"c.json","RepoTags":null,"Layers":["a/layer.tar"]}]"#;
        assert_eq!(parse_list(text.as_bytes()).unwrap()[0].layers, ["a/layer.tar"]);
        for text in ["", "{}", "[1]", r#"[{"Config":"c"}]"#] {
            assert!(parse_list(text.as_bytes()).is_err(), "{text:?}");
        }
    }

    #[test]
    fn links_to_layers_stay_in_the_archive() {
        let mut members = Members::default();
        members.files.insert("a/layer.tar".into(), (512, 7));
        members.links.insert("b/layer.tar".into(), normal("b/../a/layer.tar"));
        members.links.insert("c".into(), normal("c/../../../etc/passwd"));
        assert_eq!(members.find("./b/layer.tar").unwrap(), (512, 7));
        assert!(members.find("c").is_err() && members.find("d").is_err());
    }
}
