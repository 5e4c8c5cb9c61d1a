//! Writing a docker-archive: what `docker load` reads, and an OCI layout in the same tar.
//!
//! `manifest.json` leads Docker to the image of one layer that any Docker can unpack; `index.json`
//! leads everybody to that and to the lazily loadable one with its blobs. The tar is written at the
//! end, under another name first, with members in one order and no times.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::json;

use super::documents;
use super::oci_layout::{MARK, named};
use super::sink::{Body, Content, Name, Sink};
use super::tally::Tally;
use crate::error::{Error, Result};
use crate::image::manifest::{Descriptor, Document, Index, Manifest};

/// An archive that is written.
pub struct DockerSink {
    path: PathBuf,
    work: PathBuf,
    name: Option<String>,
    tally: Arc<Tally>,
    blobs: BTreeMap<String, (u64, Body)>,
    index: Index,
    docker: Option<Manifest>,
}

impl DockerSink {
    /// The archive `path`; in it the image is called `name`. `work` is on the same file system.
    pub fn new(path: &Path, name: Option<&str>, work: &Path, tally: Arc<Tally>) -> DockerSink {
        DockerSink {
            path: path.to_owned(),
            work: work.to_owned(),
            name: name.map(str::to_owned),
            tally,
            blobs: BTreeMap::new(),
            index: Index { manifests: Vec::new(), annotations: BTreeMap::new() },
            docker: None,
        }
    }

    fn add(&mut self, descriptor: &Descriptor, body: Body) {
        self.blobs.insert(descriptor.digest.to_string(), (descriptor.size, body));
    }

    fn write(&self, tar: &Path) -> std::io::Result<()> {
        let mut tar = Tar { sink: BufWriter::new(File::create_new(tar)?) };
        for (hex, (size, body)) in &self.blobs {
            let name = format!("blobs/sha256/{hex}");
            match body {
                Body::Bytes(bytes) => tar.member(&name, *size, &bytes[..])?,
                Body::File(path) => tar.member(&name, *size, File::open(path)?)?,
            }
        }
        let index = documents::index(&self.index.manifests, &self.index.annotations);
        tar.document("index.json", &index)?;
        if let Some(docker) = &self.docker {
            let path = |descriptor: &Descriptor| format!("blobs/sha256/{}", descriptor.digest);
            let layers: Vec<String> = docker.layers.iter().map(path).collect();
            let names: Vec<&String> = self.name.iter().collect();
            let list = json!([{
                "Config": path(&docker.config), "RepoTags": names, "Layers": layers,
            }]);
            tar.document("manifest.json", list.to_string().as_bytes())?;
            tar.document("repositories", self.repositories(docker).to_string().as_bytes())?;
        }
        tar.document("oci-layout", MARK.as_bytes())?;
        tar.finish()
    }

    /// The list that Docker read before there was a manifest.json.
    fn repositories(&self, docker: &Manifest) -> serde_json::Value {
        let split = self.name.as_deref().and_then(|name| name.rsplit_once(':'));
        match (split, docker.layers.last()) {
            (Some((repo, tag)), Some(top)) => json!({ repo: { tag: top.digest.to_string() } }),
            _ => json!({}),
        }
    }
}

impl Sink for DockerSink {
    fn has(&mut self, descriptor: &Descriptor, _: Option<&str>) -> Result<bool> {
        Ok(self.blobs.contains_key(&descriptor.digest.to_string()))
    }

    fn put(&mut self, content: Content) -> Result<()> {
        let size = content.descriptor.size;
        self.tally.stored_bytes.add(size);
        self.add(&content.descriptor, content.body);
        self.tally.blobs_sent.add(1);
        self.tally.bytes_sent.add(size);
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
        self.add(descriptor, Body::Bytes(bytes.to_vec()));
        let (Name::Tag(tag) | Name::Docker(tag)) = name else { return Ok(()) };
        let known = self.index.clone();
        if let Document::Index(index) = Document::parse(&named(known, descriptor, tag))? {
            self.index = index;
        }
        if let (Name::Docker(_), Document::Manifest(manifest)) = (name, Document::parse(bytes)?) {
            self.docker = Some(manifest);
        }
        Ok(())
    }

    fn is_single(&self) -> bool {
        true
    }

    fn finish(&mut self) -> Result<()> {
        let partial = self.work.join("archive");
        self.write(&partial)
            .and_then(|()| fs::rename(&partial, &self.path))
            .map_err(|error| Error::io(&error, format!("cannot write {}", self.path.display())))
    }
}

/// A tar in the making.
struct Tar {
    sink: BufWriter<File>,
}

impl Tar {
    fn document(&mut self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        self.member(name, bytes.len() as u64, bytes)
    }

    fn member(&mut self, name: &str, size: u64, bytes: impl Read) -> std::io::Result<()> {
        let mut header = ::tar::Header::new_ustar();
        header.set_path(name)?;
        header.set_mode(0o444);
        header.set_mtime(0);
        header.set_size(size);
        header.set_cksum();
        self.sink.write_all(header.as_bytes())?;
        let copied = std::io::copy(&mut bytes.take(size), &mut self.sink)?;
        if copied != size {
            return Err(std::io::Error::other(format!("{name} has become shorter")));
        }
        let padding = (512 - size % 512) % 512;
        self.sink.write_all(&[0; 512][..padding as usize])
    }

    fn finish(mut self) -> std::io::Result<()> {
        self.sink.write_all(&[0; 1024])?;
        self.sink.flush()
    }
}
