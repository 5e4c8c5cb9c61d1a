//! Images in an OCI layout: a directory of blobs by digest with an index of names.
//!
//! As a destination: blobs appear under their names by a rename, the index is replaced whole and
//! last, and what others have put there stays. As a source: everything is checked by its digest.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, sink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::fcntl::{Flock, FlockArg};

use super::documents;
use super::layer_stream::LayerStream;
use super::sink::{Body, Content, Name, Sink};
use super::source::{Images, LayerInput, Library, Source, SourceLayer};
use super::tally::Tally;
use crate::config as limits;
use crate::error::{Error, Result};
use crate::image::manifest::{Descriptor, Document, Index, Platform};
use crate::registry::reference::is_digest;

/// How an index names what it leads to.
pub const NAME_ANNOTATION: &str = "org.opencontainers.image.ref.name";
/// What the file that marks a layout says.
pub const MARK: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;

/// A layout's directory.
#[derive(Clone, Debug)]
struct Layout {
    directory: PathBuf,
}

impl Layout {
    fn blob_path(&self, descriptor: &Descriptor) -> PathBuf {
        self.directory.join("blobs/sha256").join(descriptor.digest.to_string())
    }

    /// Waits until nobody else changes the index: two who read it first would lose one's names. It
    /// is held for two small files.
    fn lock(&self) -> Result<Flock<File>> {
        let failed = |error| Error::io(&error, format!("cannot lock {}", self.directory.display()));
        let directory = File::open(&self.directory).map_err(failed)?;
        Flock::lock(directory, FlockArg::LockExclusive).map_err(|(_, errno)| failed(errno.into()))
    }

    fn index_path(&self) -> PathBuf {
        self.directory.join("index.json")
    }

    fn index(&self) -> Result<Index> {
        let bytes = read_small(&self.index_path(), limits::MANIFEST_MAX_BYTES)?;
        match Document::parse(&bytes)? {
            Document::Index(index) => Ok(index),
            Document::Manifest(_) => Err(Error::Malformed("index.json is a manifest".to_owned())),
        }
    }
}

/// An image in a layout that is read.
pub struct OciSource {
    layout: Layout,
    name: Option<String>,
}

impl OciSource {
    /// The image of a name or digest; of none, if there is only one.
    pub fn open(directory: &Path, name: Option<&str>) -> OciSource {
        let layout = Layout { directory: directory.to_owned() };
        OciSource { layout, name: name.map(str::to_owned) }
    }
}

impl Library for OciSource {
    fn top(&self) -> Result<(Descriptor, Vec<u8>)> {
        let index = self.layout.index()?;
        let top = choose(&index, self.name.as_deref())?;
        Ok((top.clone(), self.document(top)?))
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let path = self.layout.blob_path(descriptor);
        let bytes = read_small(&path, limits::MANIFEST_MAX_BYTES)?;
        match descriptor.matches(&bytes) {
            true => Ok(bytes),
            false => Err(Error::Digest(format!("{}: not what its name says", path.display()))),
        }
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<LayerStream> {
        let path = self.layout.blob_path(descriptor);
        let file = File::open(&path)
            .map_err(|error| Error::io(&error, format!("cannot read {}", path.display())))?;
        Ok(LayerStream::checked(file, descriptor))
    }
}

impl Source for OciSource {
    fn images(&mut self, wanted: Option<&Platform>) -> Result<Images> {
        let (top, bytes) = self.top()?;
        Images::read(&top, &bytes, wanted, &mut |descriptor| self.document(descriptor))
    }

    fn layer(&self, layer: &SourceLayer) -> Result<LayerInput> {
        self.blob(&layer.descriptor).map(LayerInput::Stream)
    }
}

/// The entry of a layout's index that is meant.
pub fn choose<'a>(index: &'a Index, name: Option<&str>) -> Result<&'a Descriptor> {
    let named = |entry: &&Descriptor| match name {
        Some(name) if is_digest(name) => entry.digest_text() == name,
        Some(name) => entry.annotations.get(NAME_ANNOTATION).is_some_and(|own| own == name),
        None => true,
    };
    let mut found = index.manifests.iter().filter(named);
    match (found.next(), found.next(), name) {
        (Some(one), None, _) | (Some(one), Some(_), Some(_)) => Ok(one),
        (Some(_), Some(_), None) => {
            let names: Vec<&str> = index
                .manifests
                .iter()
                .filter_map(|entry| entry.annotations.get(NAME_ANNOTATION))
                .take(limits::NAMES_SHOWN_MAX)
                .map(String::as_str)
                .collect();
            Err(Error::Malformed(format!("which image? The layout has {}", names.join(", "))))
        }
        (None, _, Some(name)) => Err(Error::NotFound(format!("the layout has no image {name:?}"))),
        (None, _, None) => Err(Error::NotFound("the layout has no image".to_owned())),
    }
}

/// A layout that images are put into.
pub struct OciSink {
    layout: Layout,
    partial: PathBuf,
    tally: Arc<Tally>,
}

impl OciSink {
    /// The layout in `directory`, made if it is not there; `work` is on the same file system.
    pub fn open(directory: &Path, work: &Path, tally: Arc<Tally>) -> Result<OciSink> {
        let layout = Layout { directory: directory.to_owned() };
        let made = fs::create_dir_all(directory.join("blobs/sha256"));
        made.map_err(|error| Error::io(&error, format!("cannot make {}", directory.display())))?;
        if layout.index_path().exists() {
            layout.index().map_err(|error| error.context(directory.display()))?;
        }
        write_whole(&directory.join("oci-layout"), &work.join("partial"), MARK.as_bytes())?;
        Ok(OciSink { layout, partial: work.join("partial"), tally })
    }

    fn store(&self, descriptor: &Descriptor, body: &Body) -> Result<()> {
        let path = self.layout.blob_path(descriptor);
        match body {
            Body::Bytes(bytes) => write_whole(&path, &self.partial, bytes),
            Body::File(file) => move_file(file, &path, &self.partial),
        }
    }
}

impl Sink for OciSink {
    fn has(&mut self, descriptor: &Descriptor, _: Option<&str>) -> Result<bool> {
        Ok(is_whole(&self.layout.blob_path(descriptor), descriptor))
    }

    fn put(&mut self, content: Content) -> Result<()> {
        let size = content.descriptor.size;
        self.tally.stored_bytes.add(size);
        let known = fs::metadata(self.layout.blob_path(&content.descriptor));
        // Stored even so: what is there may be damaged, and a rename costs nothing.
        self.store(&content.descriptor, &content.body)?;
        let (blobs, bytes) = match known.is_ok_and(|known| known.len() == size) {
            true => (&self.tally.blobs_existing, &self.tally.bytes_existing),
            false => (&self.tally.blobs_sent, &self.tally.bytes_sent),
        };
        blobs.add(1);
        bytes.add(size);
        self.tally.stored_bytes_done.add(size);
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        Ok(())
    }

    fn put_manifest(
        &mut self,
        descriptor: &Descriptor,
        bytes: &[u8],
        name: Name<'_>,
    ) -> Result<()> {
        self.store(descriptor, &Body::Bytes(bytes.to_vec()))?;
        let (Name::Tag(tag) | Name::Docker(tag)) = name else { return Ok(()) };
        let _lock = self.layout.lock()?;
        let known = match self.layout.index_path().exists() {
            true => self.layout.index()?,
            false => Index { manifests: Vec::new(), annotations: BTreeMap::new() },
        };
        let index = named(known, descriptor, tag);
        write_whole(&self.layout.index_path(), &self.partial, &index)
    }
}

/// An index in which `tag` leads to `descriptor` and everything else is as before.
pub fn named(known: Index, descriptor: &Descriptor, tag: &str) -> Vec<u8> {
    let mut entry = descriptor.clone();
    entry.annotations.insert(NAME_ANNOTATION.to_owned(), tag.to_owned());
    let mut manifests = known.manifests;
    manifests.retain(|old| old.annotations.get(NAME_ANNOTATION).is_none_or(|own| own != tag));
    manifests.push(entry);
    documents::index(&manifests, &known.annotations)
}

/// Whether a file has the bytes a descriptor speaks of. All are read: what nobody makes anew
/// must not be damaged.
pub fn is_whole(path: &Path, descriptor: &Descriptor) -> bool {
    let has_size = |known: fs::Metadata| known.is_file() && known.len() == descriptor.size;
    let Ok(file) = File::open(path) else { return false };
    let read = |file| std::io::copy(&mut LayerStream::checked(file, descriptor), &mut sink());
    file.metadata().is_ok_and(has_size) && read(file).is_ok()
}

/// Reads a file that must not be large.
pub fn read_small(path: &Path, limit: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read =
        File::open(path).and_then(|file| file.take(limit as u64 + 1).read_to_end(&mut bytes));
    read.map_err(|error| Error::io(&error, format!("cannot read {}", path.display())))?;
    match bytes.len() > limit {
        true => Err(Error::Unsupported(format!("{}: more than {limit} bytes", path.display()))),
        false => Ok(bytes),
    }
}

/// Writes a file by way of `partial`, so that it is there whole or not at all.
pub fn write_whole(path: &Path, partial: &Path, bytes: &[u8]) -> Result<()> {
    fs::write(partial, bytes)
        .and_then(|()| fs::rename(partial, path))
        .map_err(|error| Error::io(&error, format!("cannot write {}", path.display())))
}

/// Moves a file, by way of `partial` when it comes from another file system.
pub fn move_file(from: &Path, to: &Path, partial: &Path) -> Result<()> {
    let moved = match fs::rename(from, to) {
        Err(error) if error.kind() == std::io::ErrorKind::CrossesDevices => fs::copy(from, partial)
            .and_then(|_| fs::rename(partial, to))
            .and_then(|()| fs::remove_file(from)),
        other => other,
    };
    moved.map_err(|error| Error::io(&error, format!("cannot write {}", to.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::documents::{MANIFEST, describe};

    #[test]
    fn a_damaged_blob_of_the_right_length_is_not_there_and_is_replaced() {
        let (layout, tally) = (tempfile::tempdir().unwrap(), Arc::new(Tally::default()));
        let mut sink = OciSink::open(layout.path(), layout.path(), tally).unwrap();
        let descriptor = describe(MANIFEST, b"right");
        let path = sink.layout.blob_path(&descriptor);
        let as_file = layout.path().join("file");
        fs::write(&as_file, "right").unwrap();
        for body in [Body::Bytes(b"right".to_vec()), Body::File(as_file.clone())] {
            fs::write(&path, "wrong").unwrap();
            assert_eq!(sink.has(&descriptor, None), Ok(false));
            sink.put(Content { descriptor: descriptor.clone(), body }).unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"right");
            assert_eq!(sink.has(&descriptor, None), Ok(true));
        }
        assert!(!as_file.exists());
    }

    #[test]
    fn names_given_at_once_are_all_there() {
        let layout = tempfile::tempdir().unwrap();
        let name = |thread: usize, number: usize| format!("t{thread}-{number}");
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let root = layout.path();
                scope.spawn(move || {
                    let work = root.join(format!("work-{thread}"));
                    fs::create_dir(&work).unwrap();
                    let mut sink = OciSink::open(root, &work, Arc::default()).unwrap();
                    for number in 0..20 {
                        let text = name(thread, number).into_bytes();
                        let entry = describe(MANIFEST, &text);
                        sink.put_manifest(&entry, &text, Name::Tag(&name(thread, number))).unwrap();
                    }
                });
            }
        });
        let index = Layout { directory: layout.path().to_owned() }.index().unwrap();
        for (thread, number) in (0..4).flat_map(|thread| (0..20).map(move |n| (thread, n))) {
            let found = choose(&index, Some(&name(thread, number))).unwrap();
            assert_eq!(found.digest, describe(MANIFEST, name(thread, number).as_bytes()).digest);
        }
    }

    #[test]
    fn a_name_leads_to_the_last_that_got_it_and_others_stay() {
        let empty = || Index { manifests: Vec::new(), annotations: BTreeMap::new() };
        let parse = |bytes: Vec<u8>| match Document::parse(&bytes).unwrap() {
            Document::Index(index) => index,
            Document::Manifest(_) => panic!("an index"),
        };
        let (one, two) = (describe(MANIFEST, b"1"), describe(MANIFEST, b"2"));
        let index = parse(named(empty(), &one, "a"));
        assert_eq!(choose(&index, None).unwrap().digest, one.digest);
        let index = parse(named(index, &one, "b"));
        let index = parse(named(index, &two, "a"));
        assert_eq!(choose(&index, Some("a")).unwrap().digest, two.digest);
        assert_eq!(choose(&index, Some("b")).unwrap().digest, one.digest);
        assert_eq!(choose(&index, Some(&one.digest_text())).unwrap().digest, one.digest);
        assert!(choose(&index, None).unwrap_err().to_string().contains("b, a"));
        assert!(choose(&index, Some("c")).is_err());
        assert!(choose(&empty(), None).is_err());
    }
}
