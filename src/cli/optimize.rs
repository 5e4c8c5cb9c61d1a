//! `sluice optimize`: an image that starts from one blob, by a recorded start.
//!
//! Only a blob with what the start touched and a new bootstrap are made; the image gets them under
//! its own name unless another tag is given. An image for Docker that stands beside it is made
//! anew when that is asked for; one that is left behind is told of, since its tag is not ours to
//! change unasked.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::{Value, json};

use super::Verdict;
use super::convert::{docker_tag_beside, remove_when_interrupted, tag_or_none, work_default};
use super::output::{self, Output};
use super::progress::Progress;
use super::source::{Place as Registries, Source};
use super::unpack::layouts;
use crate::build::for_docker::bootstrap_at;
use crate::build::optimize::{Optimized, optimize};
use crate::build::place::Place;
use crate::build::republish::{Names, Republished, republish};
use crate::build::tally::Tally;
use crate::build::unpacked::BOOTSTRAP_NAME;
use crate::build::workdir::WorkDir;
use crate::build::{trace, transport};
use crate::error::{Error, Result};
use crate::image::manifest::{Descriptor, Platform};
use crate::image::{BlobId, Bootstrap, Digest};
use crate::registry::origin::Scheme;
use crate::registry::reference::is_tag;

/// Arguments of `sluice optimize`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice mount --trace start.jsonl registry.example/team/app:1.0-sluice /mnt\n  \
    sluice optimize registry.example/team/app:1.0-sluice --trace start.jsonl\n  \
    sluice optimize registry.example/team/app:1.0-sluice --trace start.jsonl --also-docker\n  \
    sluice optimize image --trace start.jsonl        (a directory made by sluice build)")]
pub struct Options {
    /// An image in a registry, in an OCI layout (oci:DIR:TAG), or in a directory.
    #[arg(value_name = "IMAGE")]
    image: String,
    /// What a start touched: a JSON object {path, offset, length, t_ms} per line.
    #[arg(long, value_name = "FILE")]
    trace: PathBuf,
    /// Leave the image as it is and give the result this tag.
    #[arg(long, value_name = "TAG")]
    tag: Option<String>,
    /// Also make an image whose only layer any Docker can unpack, under this tag; TAG-docker if
    /// none is given. Without this a TAG-docker that is there stays as it is, and that is said.
    #[arg(long, value_name = "TAG", num_args = 0..=1, require_equals = true,
        default_missing_value = "", value_parser = tag_or_none)]
    also_docker: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Talk to registries without TLS.
    #[arg(long)]
    plain_http: bool,
}

/// Optimises and reports.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let named = |error: Error| error.context(&options.image);
    let touches = File::open(&options.trace)
        .map_err(|error| Error::io(&error, options.trace.display().to_string()))
        .and_then(|file| trace::parse(BufReader::new(file)))
        .map_err(|error| error.context(options.trace.display()))?;
    let directory = Path::new(&options.image);
    let place = match directory.is_dir() {
        true => Place::Directory(directory.to_owned()),
        false => Place::parse(&options.image)?,
    };
    let tag = options.tag.as_deref().unwrap_or(place.tag()).to_owned();
    let is_new = options.tag.is_some();
    if !is_tag(&tag) || (is_new && matches!(place, Place::Directory(_))) {
        return Err(Error::Malformed(format!("{tag}: the result cannot have this tag")));
    }
    let target = match Target::of(options, place, tag) {
        Ok(target) => target,
        // What no single argument shows.
        Err(error) => {
            output::complain(&format!("sluice: {error}"));
            return Ok(Verdict::Misuse);
        }
    };
    let parent = transport::work_parent(&target.place)?.unwrap_or_else(work_default);
    let work = WorkDir::new(&parent)?;
    remove_when_interrupted(work.path())?;
    let source =
        Source::of(directory, &Registries::of_registry(options.plain_http)).map_err(named)?;
    let bootstrap = Bootstrap::parse(source.bootstrap).map_err(named)?;
    let blobs = source.blobs.ok_or_else(|| Error::Malformed("where are its blobs?".to_owned()))?;
    let reader = blobs.reader()?;
    let layouts = layouts(&bootstrap, Some(&reader)).map_err(named)?;
    let read = |blob: &BlobId, range| reader.read(blob.as_str(), range);
    let waiting = Progress::waiting(format!("copying what {} starts from", options.image));
    let optimized = optimize(&bootstrap, &layouts, &read, &touches, work.path());
    waiting.finish();
    let optimized = optimized.map_err(named)?;
    let mut report = Report::of(&optimized);
    if let Some(stored) = target.store(optimized, &work).map_err(named)? {
        report.tell(&target, &stored);
    }
    match options.json {
        true => out.json(&report.json)?,
        false => out.line(report.text)?,
    }
    Ok(Verdict::Good)
}

/// Where the result goes, and under which names.
struct Target {
    place: Place,
    tag: String,
    docker_tag: Option<String>,
    scheme: Scheme,
}

/// What became of a result that has names.
struct Stored {
    image: Republished,
    /// The tag of an image for Docker that has another bootstrap.
    left_behind: Option<String>,
}

impl Target {
    fn of(options: &Options, place: Place, tag: String) -> Result<Target> {
        let docker_tag = match (&options.also_docker, &place) {
            (Some(_), Place::Directory(directory)) => {
                let shown = directory.display();
                return Err(Error::Malformed(format!("--also-docker: {shown} has no tags")));
            }
            (Some(named), _) => Some(docker_tag_beside(&tag, named)?),
            (None, _) => None,
        };
        let scheme = if options.plain_http { Scheme::Http } else { Scheme::Https };
        Ok(Target { place, tag, docker_tag, scheme })
    }

    fn store(&self, made: Optimized, work: &WorkDir) -> Result<Option<Stored>> {
        if let Place::Directory(directory) = &self.place {
            let path = made.blob.path.as_deref().unwrap_or(work.path());
            let target = directory.join(made.blob.id.as_str());
            std::fs::rename(path, &target)
                .map_err(|error| Error::io(&error, format!("cannot write {}", target.display())))?;
            super::build::write_whole(&directory.join(BOOTSTRAP_NAME), &made.bootstrap)?;
            return Ok(None);
        }
        let platform = Platform::here();
        // Before anything changes, so that a registry that cannot tell leaves all as it was.
        let beside = match self.docker_tag {
            Some(_) => None,
            None => self.beside(&platform)?,
        };
        let library = transport::library(&self.place, self.scheme)?;
        let tally = Arc::new(Tally::default());
        let mut sink = transport::sink(&self.place, self.scheme, &[], work.path(), tally)?;
        let docker_tag = self.docker_tag.as_deref();
        let names = Names { platform: &platform, tag: &self.tag, docker_tag };
        let image = republish(&*library, &mut *sink, &names, made)?;
        let other = beside.filter(|(_, bootstrap)| *bootstrap != image.bootstrap);
        Ok(Some(Stored { image, left_behind: other.map(|(tag, _)| tag) }))
    }

    /// The usual tag of an image for Docker, when it leads to one, and that one's only layer.
    fn beside(&self, platform: &Platform) -> Result<Option<(String, Digest)>> {
        let Ok(tag) = docker_tag_beside(&self.tag, "") else { return Ok(None) };
        let Some(place) = self.place.tagged(&tag) else { return Ok(None) };
        let library = transport::library(&place, self.scheme)?;
        let found = bootstrap_at(&*library, platform).map_err(|error| error.context(place))?;
        Ok(found.map(|bootstrap| (tag, bootstrap)))
    }
}

/// What is told at the end.
struct Report {
    json: Value,
    text: String,
}

impl Report {
    fn of(made: &Optimized) -> Report {
        let json = json!({
            "blob": made.blob.id.as_str(),
            "blob_bytes": made.blob.size_bytes,
            "chunks": made.chunk_count,
            "data_bytes": made.data_bytes,
            "files": made.file_count,
            "missed": made.missed_count,
        });
        let missed = match made.missed_count {
            0 => String::new(),
            count => format!("\nmissed     {count} touches of what the image does not have"),
        };
        let text = format!(
            "start      {} of data in {} chunks of {} files\nblob       {} {}{missed}",
            output::bytes(made.data_bytes),
            made.chunk_count,
            made.file_count,
            made.blob.id,
            output::bytes(made.blob.size_bytes),
        );
        Report { json, text }
    }

    fn tell(&mut self, target: &Target, stored: &Stored) {
        let manifest = stored.image.manifest.digest_text();
        let docker = stored.image.docker.as_ref().map(Descriptor::digest_text);
        self.text += &format!("\nimage      {} {manifest}", target.tag);
        if let (Some(tag), Some(docker)) = (&target.docker_tag, &docker) {
            self.text += &format!("\ndocker     {tag} {docker}");
        }
        if let Some(tag) = &stored.left_behind {
            self.text += &format!(
                "\ndocker     {tag} stays as it is, without this start: --also-docker renews it"
            );
        }
        self.json["manifest"] = manifest.into();
        self.json["docker_manifest"] = docker.into();
        self.json["docker_left_behind"] = stored.left_behind.clone().into();
    }
}
