//! Where the new images go: one view of every kind of place.
//!
//! Blobs first, in any order; then `settle`; then manifests, and the one that has a name last. So
//! whatever ends a conversion early, no name leads to an image that is not whole.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::documents::{INDEX, describe, index};
use crate::error::Result;
use crate::image::manifest::Descriptor;

/// Content to be stored.
#[derive(Clone, Debug)]
pub struct Content {
    /// What it is.
    pub descriptor: Descriptor,
    /// Its bytes.
    pub body: Body,
}

/// Bytes to be stored.
#[derive(Clone, Debug)]
pub enum Body {
    /// In memory.
    Bytes(Vec<u8>),
    /// In a file that the sink may move, and removes when it has what it needs.
    File(PathBuf),
}

/// What a manifest is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Name<'a> {
    /// Its digest alone: an index leads to it.
    Digest,
    /// A tag.
    Tag(&'a str),
    /// A tag, for Docker: an image of layers that any Docker can unpack.
    Docker(&'a str),
}

/// A place images can be put.
pub trait Sink {
    /// Whether it has a blob, or can have it from another repository of its own registry.
    fn has(&mut self, descriptor: &Descriptor, other_repository: Option<&str>) -> Result<bool>;

    /// Begins to store content; nothing is stored twice.
    fn put(&mut self, content: Content) -> Result<()>;

    /// Waits until everything is stored.
    fn settle(&mut self) -> Result<()>;

    /// Stores a manifest or index whose parts are all there.
    fn put_manifest(&mut self, descriptor: &Descriptor, bytes: &[u8], name: Name<'_>)
    -> Result<()>;

    /// Takes note of an image's bootstrap, where it is kept beside its layer.
    fn put_bootstrap(&mut self, _bootstrap: &[u8]) -> Result<()> {
        Ok(())
    }

    /// Whether it holds one image only.
    fn is_single(&self) -> bool {
        false
    }

    /// Makes everything visible that is not yet.
    fn finish(&mut self) -> Result<()> {
        Ok(())
    }
}

/// Gives manifests a name: a single one has it itself, several an index over them, of which
/// `around` says what is said of it.
///
/// # Errors
/// Those of [`Sink::put_manifest`].
pub fn put_named(
    sink: &mut dyn Sink,
    around: Option<&BTreeMap<String, String>>,
    manifests: &[&(Descriptor, Vec<u8>)],
    name: Name<'_>,
) -> Result<()> {
    if let (None, [(descriptor, bytes)]) = (around, manifests) {
        return sink.put_manifest(descriptor, bytes, name);
    }
    for (descriptor, bytes) in manifests {
        sink.put_manifest(descriptor, bytes, Name::Digest)?;
    }
    let entries: Vec<Descriptor> = manifests.iter().map(|(entry, _)| entry.clone()).collect();
    let bytes = index(&entries, around.unwrap_or(&BTreeMap::new()));
    sink.put_manifest(&describe(INDEX, &bytes), &bytes, name)
}
