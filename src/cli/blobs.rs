//! Blobs for the commands that read them: a directory of files, or a registry.
//!
//! Blocking. A `Reader` belongs to one thread; the registry's runs an engine of its own on a thread
//! beside it. Answers exactly the bytes asked for or an error, and never verifies: the caller does.

use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crossbeam_channel::{Sender, bounded};

use super::fetch::{self, Request};
use crate::config;
use crate::error::{Error, Result};
use crate::registry::config::Backend;

/// Where an image's blobs are.
#[derive(Clone, Debug)]
pub enum Blobs {
    /// Files named by blob id.
    Directory(PathBuf),
    /// A repository.
    Registry(Box<Backend>),
}

/// Reads blobs on behalf of one thread.
pub enum Reader {
    /// Straight from the file.
    Directory(PathBuf),
    /// Through a thread with an engine, which ends when this is dropped.
    Registry(Sender<Request>),
}

impl Blobs {
    /// A reader for the calling thread.
    pub fn reader(&self) -> Result<Reader> {
        match self {
            Blobs::Directory(directory) => Ok(Reader::Directory(directory.clone())),
            Blobs::Registry(backend) => start(backend.as_ref().clone()).map(Reader::Registry),
        }
    }

    /// How many readers are worth having: a disk is busy with its cores, a registry is far away.
    pub fn readers_wanted(&self, core_count: usize) -> usize {
        let wanted = match self {
            Blobs::Directory(_) => core_count,
            Blobs::Registry(_) => core_count * 2,
        };
        wanted.clamp(1, config::CHECK_READERS_MAX)
    }
}

impl Reader {
    /// Bytes `range` of a blob.
    ///
    /// # Errors
    /// `NotFound` when there is no such blob, `Malformed` when it ends before the range does.
    pub fn read(&self, blob_id: &str, range: Range<u64>) -> Result<Vec<u8>> {
        match self {
            Reader::Directory(directory) => read_file(&directory.join(blob_id), range),
            Reader::Registry(requests) => {
                let (answer, reply) = bounded(1);
                let request = Request { blob_id: blob_id.to_owned(), range, answer };
                requests.send(request).map_err(|_| Error::Shutdown)?;
                reply.recv().map_err(|_| Error::Shutdown)?
            }
        }
    }
}

fn read_file(path: &Path, range: Range<u64>) -> Result<Vec<u8>> {
    let shown = path.display();
    let file = File::open(path).map_err(|error| match error.kind() {
        ErrorKind::NotFound => Error::NotFound(format!("there is no blob {shown}")),
        _ => Error::io(&error, format!("cannot open blob {shown}")),
    })?;
    let mut bytes = vec![0; (range.end - range.start) as usize];
    match file.read_exact_at(&mut bytes, range.start) {
        Ok(()) => Ok(bytes),
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
            let size = file.metadata().map_or(0, |metadata| metadata.len());
            Err(Error::Malformed(format!(
                "blob {shown} ends at byte {size}, before byte {}: it is cut short",
                range.end
            )))
        }
        Err(error) => Err(Error::io(&error, format!("cannot read blob {shown}"))),
    }
}

/// Starts a thread that answers requests one by one until the sender is gone.
fn start(backend: Backend) -> Result<Sender<Request>> {
    let (requests, incoming) = bounded(1);
    std::thread::Builder::new()
        .name("blob-reader".to_owned())
        .spawn(move || fetch::serve(&backend, &incoming))
        .map_err(|error| Error::io(&error, "cannot start a thread"))?;
    Ok(requests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_read_whole_or_not_at_all() {
        let directory = tempfile::tempdir().expect("a directory");
        std::fs::write(directory.path().join("blob"), b"0123456789").expect("written");
        let blobs = Blobs::Directory(directory.path().to_owned());
        let reader = blobs.reader().expect("a reader");
        assert_eq!(reader.read("blob", 2..5), Ok(b"234".to_vec()));
        let error = reader.read("blob", 5..11).expect_err("too short");
        assert!(error.to_string().contains("ends at byte 10, before byte 11"), "{error}");
        assert!(matches!(reader.read("other", 0..1), Err(Error::NotFound(_))));
    }
}
