//! An image as plain files: `image.boot` and blobs named by their digests, in one directory.
//!
//! What `sluice build` leaves too, and what a localfs backend serves. The bootstrap comes last, by
//! a rename: where there is one, the image is whole.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::oci_layout::{is_whole, move_file, write_whole};
use super::sink::{Body, Content, Name, Sink};
use super::tally::Tally;
use crate::error::{Error, Result};
use crate::image::manifest::Descriptor;

/// The name of the bootstrap.
pub const BOOTSTRAP_NAME: &str = "image.boot";

/// A directory that gets one image.
pub struct UnpackedSink {
    directory: PathBuf,
    work: PathBuf,
    tally: Arc<Tally>,
    bootstrap: Option<Vec<u8>>,
}

impl UnpackedSink {
    /// The directory, made if it is not there; `work` is on the same file system.
    pub fn open(directory: &Path, work: &Path, tally: Arc<Tally>) -> Result<UnpackedSink> {
        fs::create_dir_all(directory)
            .map_err(|error| Error::io(&error, format!("cannot make {}", directory.display())))?;
        let (directory, work) = (directory.to_owned(), work.to_owned());
        Ok(UnpackedSink { directory, work, tally, bootstrap: None })
    }

    fn path(&self, descriptor: &Descriptor) -> PathBuf {
        self.directory.join(descriptor.digest.to_string())
    }
}

impl Sink for UnpackedSink {
    fn has(&mut self, descriptor: &Descriptor, _: Option<&str>) -> Result<bool> {
        Ok(is_whole(&self.path(descriptor), descriptor))
    }

    /// Keeps data blobs; configuration and bootstrap layer belong to registries.
    fn put(&mut self, content: Content) -> Result<()> {
        let Content { descriptor, body } = content;
        let Body::File(file) = body else { return Ok(()) };
        self.tally.stored_bytes.add(descriptor.size);
        move_file(&file, &self.path(&descriptor), &self.work.join("partial"))?;
        self.tally.blobs_sent.add(1);
        self.tally.bytes_sent.add(descriptor.size);
        self.tally.stored_bytes_done.add(descriptor.size);
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        Ok(())
    }

    fn put_manifest(&mut self, _: &Descriptor, _: &[u8], _: Name<'_>) -> Result<()> {
        Ok(())
    }

    fn put_bootstrap(&mut self, bootstrap: &[u8]) -> Result<()> {
        self.bootstrap = Some(bootstrap.to_vec());
        Ok(())
    }

    fn is_single(&self) -> bool {
        true
    }

    fn finish(&mut self) -> Result<()> {
        let Some(bootstrap) = self.bootstrap.take() else { return Ok(()) };
        let path = self.directory.join(BOOTSTRAP_NAME);
        write_whole(&path, &self.work.join("partial"), &bootstrap)
    }
}
