//! Images in a registry, as source and as destination.
//!
//! Blobs are pushed by a few threads while the next is built; each is looked for first and sent
//! once. A file is gone when the registry has it. An image made for another one in the same
//! repository refers to it; where the registry does not keep the list, a tag does.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::documents::{self, referrers_tag, with_referrer};
use super::layer_stream::LayerStream;
use super::remote::{Pending, Remote};
use super::sink::{Body, Content, Name, Sink};
use super::source::{Images, LayerInput, Library, Source, SourceLayer};
use super::tally::Tally;
use crate::config as limits;
use crate::error::{Error, Result};
use crate::image::manifest::{self, Descriptor, Platform};
use crate::registry::config::Backend;
use crate::registry::origin::Scheme;
use crate::registry::reference::Reference;
use crate::registry::upload::{BlobFile, Pushed};

/// An image in a registry that is read.
pub struct RegistrySource {
    remote: Remote,
    reference: Reference,
}

impl RegistrySource {
    /// The image of a reference.
    pub fn open(reference: &Reference, scheme: Scheme) -> Result<RegistrySource> {
        let backend = Backend::registry(scheme, &reference.host, &reference.repo)?;
        Ok(RegistrySource { remote: Remote::open(&backend, &[])?, reference: reference.clone() })
    }
}

impl Library for RegistrySource {
    fn top(&self) -> Result<(Descriptor, Vec<u8>)> {
        let found = self.remote.manifest(self.reference.manifest())?;
        let found = found.ok_or_else(|| {
            Error::NotFound(format!("the registry has no image {}", self.reference))
        })?;
        Ok((documents::describe(&found.media_type, &found.bytes), found.bytes))
    }

    fn document(&self, descriptor: &Descriptor) -> Result<Vec<u8>> {
        let is_manifest =
            descriptor.media_type.contains("manifest") || descriptor.media_type.contains("index");
        if !is_manifest {
            return self.remote.blob(descriptor, limits::IMAGE_CONFIG_MAX_BYTES);
        }
        let digest = descriptor.digest_text();
        let found = self.remote.manifest(&digest)?;
        let found = found.ok_or_else(|| Error::NotFound(format!("the registry lacks {digest}")))?;
        Ok(found.bytes)
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<LayerStream> {
        Ok(self.remote.layer(descriptor))
    }
}

impl Source for RegistrySource {
    fn images(&mut self, wanted: Option<&Platform>) -> Result<Images> {
        let (top, bytes) = self.top()?;
        Images::read(&top, &bytes, wanted, &mut |descriptor| self.document(descriptor))
    }

    fn layer(&self, layer: &SourceLayer) -> Result<LayerInput> {
        Ok(LayerInput::Stream(self.remote.layer(&layer.descriptor)))
    }

    fn repository(&self) -> Option<(&str, &str)> {
        Some((&self.reference.host, &self.reference.repo))
    }
}

/// A repository that images are pushed to.
pub struct RegistrySink {
    remote: Remote,
    directory: PathBuf,
    tally: Arc<Tally>,
    pending: Vec<Pending<()>>,
    file_count: usize,
}

impl RegistrySink {
    /// The repository of a reference. Small content waits in `directory`; blobs may be mounted from
    /// the repositories `sources` of the same registry.
    pub fn open(
        reference: &Reference,
        scheme: Scheme,
        sources: &[String],
        directory: &Path,
        tally: Arc<Tally>,
    ) -> Result<RegistrySink> {
        let backend = Backend::registry(scheme, &reference.host, &reference.repo)?;
        Ok(RegistrySink {
            remote: Remote::open(&backend, sources)?,
            directory: directory.to_owned(),
            tally,
            pending: Vec::new(),
            file_count: 0,
        })
    }

    fn file_of(&mut self, bytes: &[u8]) -> Result<PathBuf> {
        self.file_count += 1;
        let path = self.directory.join(format!("small-{}", self.file_count));
        let written = File::create_new(&path).and_then(|mut file| file.write_all(bytes));
        written.map_err(|error| Error::io(&error, format!("cannot write {}", path.display())))?;
        Ok(path)
    }

    /// Notes that `referrer` refers to `subject`, for registries that do not do so themselves.
    fn list_referrer(&self, subject: &Descriptor, referrer: &Descriptor) -> Result<()> {
        let tag = referrers_tag(subject);
        let known = self.remote.manifest(&tag)?;
        let listed = with_referrer(known.as_ref().map(|known| &known.bytes[..]), referrer)?;
        let Some(bytes) = listed else { return Ok(()) };
        let putting = self.remote.begin(move |session| async move {
            session.repository.put_manifest(&tag, documents::INDEX, &bytes).await
        });
        putting.wait().map(drop)
    }
}

impl Sink for RegistrySink {
    fn has(&mut self, descriptor: &Descriptor, other_repository: Option<&str>) -> Result<bool> {
        let digest = descriptor.digest_text();
        let other = other_repository.map(str::to_owned);
        let asking = self.remote.begin(move |session| async move {
            match (session.repository.has_blob(&digest).await?, other) {
                (true, _) => Ok(Some(Pushed::Existed)),
                (false, None) => Ok(None),
                (false, Some(other)) => {
                    let is_mounted = session.repository.mount_blob(&digest, &other).await?;
                    Ok(is_mounted.then_some(Pushed::Mounted))
                }
            }
        });
        let pushed = asking.wait()?;
        if let Some(pushed) = pushed {
            self.tally.stored_bytes.add(descriptor.size);
            self.tally.stored_bytes_done.add(descriptor.size);
            note(&self.tally, pushed, descriptor.size);
        }
        Ok(pushed.is_some())
    }

    fn put(&mut self, content: Content) -> Result<()> {
        let Content { descriptor, body } = content;
        let path = match body {
            Body::File(path) => path,
            Body::Bytes(bytes) => self.file_of(&bytes)?,
        };
        let tally = Arc::clone(&self.tally);
        tally.stored_bytes.add(descriptor.size);
        let pushing = self.remote.begin(move |session| async move {
            let file = File::open(&path)
                .map_err(|error| Error::io(&error, format!("cannot read {}", path.display())))?;
            let on_progress = |more| tally.stored_bytes_done.add(more);
            let blob = BlobFile {
                digest: &descriptor.digest_text(),
                size: descriptor.size,
                file: &file,
                on_progress: &on_progress,
            };
            let pushed = session.repository.push_blob(&blob).await?;
            note(&tally, pushed, descriptor.size);
            // The working directory goes at the end, and this with it if it cannot go now.
            let _ = std::fs::remove_file(&path);
            Ok(())
        });
        self.pending.push(pushing);
        Ok(())
    }

    fn settle(&mut self) -> Result<()> {
        // All are waited for: the first failure is told, none is left running.
        let results: Vec<Result<()>> = self.pending.drain(..).map(Pending::wait).collect();
        results.into_iter().collect()
    }

    fn put_manifest(
        &mut self,
        descriptor: &Descriptor,
        bytes: &[u8],
        name: Name<'_>,
    ) -> Result<()> {
        let digest = descriptor.digest_text();
        let name = match name {
            Name::Digest => digest,
            Name::Tag(tag) | Name::Docker(tag) => tag.to_owned(),
        };
        let (media_type, sent) = (descriptor.media_type.clone(), bytes.to_vec());
        let subject = manifest::subject(bytes);
        let refers = subject.is_some();
        let putting = self.remote.begin(move |session| async move {
            // A run that ended between the manifest and the list has left the list to this one.
            match refers {
                true => session.repository.write_manifest(&name, &media_type, &sent).await,
                false => session.repository.put_manifest(&name, &media_type, &sent).await,
            }
        });
        let put = putting.wait()?;
        match subject {
            Some(subject) if !put.has_subject => self.list_referrer(&subject, descriptor),
            _ => Ok(()),
        }
    }
}

fn note(tally: &Tally, pushed: Pushed, size: u64) {
    let (blobs, bytes) = match pushed {
        Pushed::Sent => (&tally.blobs_sent, &tally.bytes_sent),
        Pushed::Existed => (&tally.blobs_existing, &tally.bytes_existing),
        Pushed::Mounted => (&tally.blobs_mounted, &tally.bytes_mounted),
    };
    blobs.add(1);
    bytes.add(size);
}
