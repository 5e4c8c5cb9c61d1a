//! Where an image is or shall be, as a user writes it.
//!
//! Pure. `HOST/REPO:TAG[@digest]` is a registry's, `oci:DIR:TAG` an OCI layout's,
//! `docker-archive:FILE[:NAME:TAG]` one of `docker save`, `dir:PATH` a plain directory. What has a
//! known prefix is never a registry's.

use std::fmt;
use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::registry::reference::{Reference, is_digest, is_tag};

/// A parsed place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A registry.
    Registry(Reference),
    /// An OCI layout.
    Oci {
        /// Its directory.
        directory: PathBuf,
        /// The name in its index, or the digest of a manifest.
        name: Option<String>,
    },
    /// A tar as `docker save` writes and `docker load` reads.
    DockerArchive {
        /// The tar.
        file: PathBuf,
        /// `NAME:TAG` in it.
        name: Option<String>,
    },
    /// A directory: what a single layer holds, or an unpacked image.
    Directory(PathBuf),
}

impl Place {
    /// Parses what a user wrote.
    pub fn parse(text: &str) -> Result<Place> {
        let refuse = |why: &str| Err(Error::Malformed(format!("{text:?}: {why}")));
        if let Some(rest) = text.strip_prefix("oci:") {
            let (directory, name) = match rest.rsplit_once(':') {
                Some((directory, name)) if !name.contains('/') => (directory, Some(name)),
                _ => (rest, None),
            };
            let (directory, digest) = match directory.rsplit_once('@') {
                Some((before, "sha256")) => (before, name.map(|hex| format!("sha256:{hex}"))),
                _ => (directory, None),
            };
            let name = digest.or(name.map(str::to_owned));
            return match name.as_deref() {
                _ if directory.is_empty() => refuse("write oci:DIR:TAG"),
                Some(name) if !is_tag(name) && !is_digest(name) => refuse("that is no tag"),
                _ => Ok(Place::Oci { directory: directory.into(), name }),
            };
        }
        if let Some(rest) = text.strip_prefix("docker-archive:") {
            let (file, name) = match rest.split_once(':') {
                Some((file, name)) => (file, Some(Reference::parse(name)?)),
                None => (rest, None),
            };
            return match file.is_empty() {
                true => refuse("write docker-archive:FILE or docker-archive:FILE:NAME:TAG"),
                false => Ok(Place::DockerArchive {
                    file: file.into(),
                    name: name.map(|name| familiar(&name)),
                }),
            };
        }
        if let Some(path) = text.strip_prefix("dir:") {
            return match path.is_empty() {
                true => refuse("write dir:PATH"),
                false => Ok(Place::Directory(path.into())),
            };
        }
        let text = text.strip_prefix("docker://").unwrap_or(text);
        Reference::parse(text).map(Place::Registry)
    }

    /// What another tag leads to in the same repository or layout, where there are tags.
    pub fn tagged(&self, tag: &str) -> Option<Place> {
        let name = Some(tag.to_owned());
        match self {
            Place::Registry(reference) => {
                let there = Reference { tag: name, digest: None, ..reference.clone() };
                Some(Place::Registry(there))
            }
            Place::Oci { directory, .. } => Some(Place::Oci { directory: directory.clone(), name }),
            Place::DockerArchive { .. } | Place::Directory(_) => None,
        }
    }

    /// The tag a manifest gets there.
    pub fn tag(&self) -> &str {
        match self {
            Place::Registry(reference) => reference.tag.as_deref().unwrap_or("latest"),
            Place::Oci { name, .. } => name.as_deref().unwrap_or("latest"),
            Place::DockerArchive { name, .. } => {
                let tag = name.as_deref().and_then(|name| name.rsplit_once(':'));
                tag.map_or("latest", |(_, tag)| tag)
            }
            Place::Directory(_) => "latest",
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (prefix, path, name) = match self {
            Place::Registry(reference) => return write!(f, "{reference}"),
            Place::Oci { directory, name } => ("oci", directory, name),
            Place::DockerArchive { file, name } => ("docker-archive", file, name),
            Place::Directory(path) => ("dir", path, &None),
        };
        write!(f, "{prefix}:{}", path.display())?;
        match name {
            Some(name) if is_digest(name) => write!(f, "@{name}"),
            Some(name) => write!(f, ":{name}"),
            None => Ok(()),
        }
    }
}

/// A name as `docker images` shows it: without docker.io and library/.
fn familiar(reference: &Reference) -> String {
    let text = reference.to_string();
    let text = text.strip_prefix("docker.io/").unwrap_or(&text);
    text.strip_prefix("library/").unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_prefix_is_a_place_of_its_own() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        for (text, shown, tag) in [
            ("h.x/team/app:1", "h.x/team/app:1", "1"),
            ("docker://h.x/app", "h.x/app:latest", "latest"),
            ("oci:/a/b:v1", "oci:/a/b:v1", "v1"),
            ("oci:rel", "oci:rel", "latest"),
            ("oci:/a:b/c", "oci:/a:b/c", "latest"),
            (&format!("oci:/a@{digest}"), &format!("oci:/a@{digest}"), digest.as_str()),
            ("docker-archive:/a.tar", "docker-archive:/a.tar", "latest"),
            ("docker-archive:a.tar:ubuntu:22", "docker-archive:a.tar:ubuntu:22", "22"),
            ("docker-archive:a.tar:h.x/app", "docker-archive:a.tar:h.x/app:latest", "latest"),
            ("dir:/x:y", "dir:/x:y", "latest"),
        ] {
            let place = Place::parse(text).unwrap();
            assert_eq!((place.to_string().as_str(), place.tag()), (shown, tag), "{text}");
            assert_eq!(Place::parse(shown).unwrap(), place, "{text}");
        }
    }

    #[test]
    fn what_names_nothing_is_refused() {
        for text in ["", "oci:", "oci::v", "oci:/a:b c", "docker-archive:", "dir:", "UPPER", "a b"]
        {
            assert!(Place::parse(text).is_err(), "{text:?}");
        }
    }
}
