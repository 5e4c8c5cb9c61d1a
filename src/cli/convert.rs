//! `sluice convert`: a lazily loadable image out of one that is not.
//!
//! From and to registries, OCI layouts, docker-archives and directories. Nothing that has a name
//! changes before everything is there; an interrupted run leaves no file behind, and the next one
//! sends only what is missing.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use nix::sys::signal::{SigSet, Signal};
use serde_json::{Value, json};

use super::Verdict;
use super::build::Format;
use super::output::{self, Output};
use super::progress::Bars;
use crate::build::convert::{Conversion, Converted, Dictionary, Order};
use crate::build::place::Place;
use crate::build::source::parse_platform;
use crate::build::tally::{Count, Tally};
use crate::build::transport;
use crate::build::workdir::{self, WorkDir};
use crate::config;
use crate::error::{Error, Result};
use crate::image::manifest::Platform;
use crate::registry::origin::Scheme;
use crate::registry::reference::is_tag;

/// Arguments of `sluice convert`.
#[derive(Args)]
#[command(after_help = "Places:\n  \
    HOST/REPO:TAG[@DIGEST]          a registry\n  \
    oci:DIR:TAG                     an OCI layout\n  \
    docker-archive:FILE[:NAME:TAG]  a tar of docker save\n  \
    dir:PATH                        a directory: one layer, or image.boot and its blobs\n\n\
    Examples:\n  \
    sluice convert registry.example/team/app:1.0 registry.example/team/app:1.0-sluice\n  \
    sluice convert --platform linux/amd64 oci:layout:1.0 dir:image\n  \
    sluice convert --also-docker docker-archive:app.tar registry.example/team/app:1.0-sluice")]
pub struct Options {
    /// What is converted.
    #[arg(value_name = "SRC", value_parser = place)]
    source: Place,
    /// Where the new image goes.
    #[arg(value_name = "DST", value_parser = place)]
    destination: Place,
    /// Talk to registries without TLS.
    #[arg(long)]
    plain_http: bool,
    /// What is made: new blobs, or an index for gzip layers that stay as they are.
    #[arg(long, value_enum, default_value = "rafs")]
    to: Kind,
    /// Take this one of the images of an index, OS/ARCHITECTURE[/VARIANT]; all if not given.
    #[arg(long, value_name = "PLATFORM", value_parser = platform)]
    platform: Option<Platform>,
    /// Also make an image whose only layer any Docker can unpack, under this tag; TAG-docker if
    /// none is given.
    #[arg(long, value_name = "TAG", num_args = 0..=1, require_equals = true,
        default_missing_value = "", value_parser = tag_or_none)]
    also_docker: Option<String>,
    /// Have the new image refer to the old one, in the same repository, as its subject.
    #[arg(long)]
    referrer: bool,
    /// Where unfinished files lie.
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    #[command(flatten)]
    format: Format,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// What a conversion makes.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Rafs,
    Zran,
}

/// Converts and reports.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let started = Instant::now();
    let (from, to) = (options.source.clone(), options.destination.clone());
    let docker_tag = match docker_tag(options) {
        Ok(tag) => tag,
        // What no single argument shows.
        Err(error) => {
            output::complain(&format!("sluice: {error}"));
            return Ok(Verdict::Misuse);
        }
    };
    let scheme = if options.plain_http { Scheme::Http } else { Scheme::Https };
    let work = WorkDir::new(&work_parent(options, &to)?)?;
    remove_when_interrupted(work.path())?;
    let tally = Arc::new(Tally::default());
    let mut source = transport::source(&from, scheme).map_err(|error| error.context(&from))?;
    let images = source.images(options.platform.as_ref()).map_err(|error| error.context(&from))?;
    let dictionaries = dictionaries(options, &to, scheme)?;
    let source_repository = source.repository().and_then(|(host, repo)| match &to {
        Place::Registry(there) if there.host == host => Some(repo.to_owned()),
        _ => None,
    });
    let others = dictionaries.iter().filter_map(|dictionary| dictionary.repository.clone());
    let repositories: Vec<String> = others.chain(source_repository.clone()).collect();
    let mut sink = transport::sink(&to, scheme, &repositories, work.path(), Arc::clone(&tally))
        .map_err(|error| error.context(&to))?;
    let order = Order {
        options: options.format.options(),
        dictionaries,
        tag: to.tag().to_owned(),
        docker_tag,
        refers: options.referrer,
        keeps_layers: options.to == Kind::Zran,
        source_repository,
    };
    let bars = Bars::follow(Arc::clone(&tally));
    let mut conversion = Conversion::new(&*source, &mut *sink, &work, &order, &tally);
    let converted = conversion.run(&images);
    drop(bars);
    let converted = converted.map_err(|error| error.context(format!("{from} to {to}")))?;
    let report =
        Outcome { to, converted, skipped: images.skipped, tally, elapsed: started.elapsed() };
    match options.json {
        true => out.json(&report.json())?,
        false => report.print(out)?,
    }
    Ok(Verdict::Good)
}

fn platform(text: &str) -> std::result::Result<Platform, String> {
    parse_platform(text).map_err(|error| error.to_string())
}

fn place(text: &str) -> std::result::Result<Place, String> {
    Place::parse(text).map_err(|error| error.to_string())
}

/// A tag, or nothing for the usual one.
pub fn tag_or_none(text: &str) -> std::result::Result<String, String> {
    match text.is_empty() || is_tag(text) {
        true => Ok(text.to_owned()),
        false => Err("that is no tag".to_owned()),
    }
}

/// The tag of the image for Docker, if there is to be one: a docker-archive is for nobody else.
fn docker_tag(options: &Options) -> Result<Option<String>> {
    let to = &options.destination;
    let tag = to.tag();
    if !is_tag(tag) || matches!(to, Place::Registry(reference) if reference.digest.is_some()) {
        return Err(Error::Malformed(format!("{to}: a destination is named by a tag")));
    }
    match (&options.also_docker, to) {
        (Some(named), _) => docker_tag_beside(tag, named).map(Some),
        (None, Place::DockerArchive { .. }) => docker_tag_beside(tag, "").map(Some),
        (None, _) => Ok(None),
    }
}

/// The tag of the image for Docker beside an image's tag: the one that was named, if one was.
pub fn docker_tag_beside(tag: &str, named: &str) -> Result<String> {
    let wanted = if named.is_empty() { format!("{tag}-docker") } else { named.to_owned() };
    match is_tag(&wanted) && wanted != tag {
        true => Ok(wanted),
        false => Err(Error::Malformed(format!("--also-docker {wanted}: no tag of its own"))),
    }
}

fn work_parent(options: &Options, to: &Place) -> Result<PathBuf> {
    if let Some(chosen) = &options.work_dir {
        return Ok(chosen.clone());
    }
    Ok(transport::work_parent(to)?.unwrap_or_else(work_default))
}

/// Where unfinished files lie when the destination does not care.
pub fn work_default() -> PathBuf {
    match std::env::var_os("TMPDIR") {
        Some(directory) => PathBuf::from(directory),
        // Blobs are large and /tmp is often memory.
        None => PathBuf::from(config::WORK_PARENT_DEFAULT),
    }
}

/// Images whose chunks may be used: bootstraps on disk, or images by their places.
fn dictionaries(options: &Options, to: &Place, scheme: Scheme) -> Result<Vec<Dictionary>> {
    let of = |path: &PathBuf| {
        let named = |error: Error| error.context(format!("--chunk-dict {}", path.display()));
        if path.exists() {
            return Dictionary::of_files(path).map_err(named);
        }
        let place = Place::parse(&path.to_string_lossy()).map_err(named)?;
        let mut dictionary = transport::dictionary(&place, scheme).map_err(named)?;
        if let (Place::Registry(there), Place::Registry(here)) = (&place, to)
            && there.host == here.host
        {
            dictionary.repository = Some(there.repo.clone());
        }
        Ok(dictionary)
    };
    options.format.dictionaries().iter().map(of).collect()
}

/// An interrupt ends the process at once, after the unfinished files. Signals are blocked before
/// the first thread starts, so that all threads leave them to the one that waits.
pub fn remove_when_interrupted(work: &Path) -> Result<()> {
    let signals: SigSet = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().map_err(|errno| Error::system(errno as i32, "cannot block signals"))?;
    let work = work.to_owned();
    let wait = move || {
        if let Ok(signal) = signals.wait() {
            workdir::remove(&work);
            output::complain(&format!("sluice: interrupted by {signal}; no image was made"));
            std::process::exit(128 + signal as i32);
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(wait)
        .map(drop)
        .map_err(|error| Error::io(&error, "cannot start a thread"))
}

/// What is told at the end.
struct Outcome {
    to: Place,
    converted: Vec<Converted>,
    skipped: Vec<String>,
    tally: Arc<Tally>,
    elapsed: Duration,
}

impl Outcome {
    fn json(&self) -> Value {
        let tally = &self.tally;
        let count = |blobs: &Count, bytes: &Count| {
            let (blobs, bytes) = (blobs.value(), bytes.value());
            json!({ "blobs": blobs, "bytes": bytes })
        };
        json!({
            "destination": self.to.to_string(),
            "images": self.converted,
            "skipped": self.skipped,
            "sent": count(&tally.blobs_sent, &tally.bytes_sent),
            "existing": count(&tally.blobs_existing, &tally.bytes_existing),
            "mounted": count(&tally.blobs_mounted, &tally.bytes_mounted),
            "time_ms": self.elapsed.as_millis() as u64,
        })
    }

    fn print(&self, out: &mut Output) -> Result<()> {
        for image in &self.converted {
            out.line(format!("image      {} {}", image.platform, image.manifest))?;
            if let Some(docker) = &image.docker_manifest {
                out.line(format!("docker     {docker}"))?;
            }
            let report = &image.report;
            let shared: u64 = report.layers.iter().map(|layer| layer.shared_bytes).sum();
            let stored = report.blob_bytes + report.bootstrap_bytes;
            out.line(format!(
                "layers     {}, {} as they came, {} of data in {} files",
                report.layers.len(),
                output::bytes(image.source_bytes),
                output::bytes(report.data_bytes),
                report.inodes,
            ))?;
            out.line(format!(
                "stored     {} ({:.0} % of the data): blobs {}, bootstrap {}",
                output::bytes(stored),
                stored as f64 / report.data_bytes.max(1) as f64 * 100.0,
                output::bytes(report.blob_bytes),
                output::bytes(report.bootstrap_bytes),
            ))?;
            out.line(format!(
                "chunks     {}, {} of data shared",
                report.chunks,
                output::bytes(shared)
            ))?;
        }
        for skipped in &self.skipped {
            out.line(format!("left out   {skipped}"))?;
        }
        let tally = &self.tally;
        out.line(format!(
            "sent       {} in {} blobs; {} were there, {} mounted",
            output::bytes(tally.bytes_sent.value()),
            tally.blobs_sent.value(),
            tally.blobs_existing.value(),
            tally.blobs_mounted.value(),
        ))?;
        out.line(format!("time       {}", output::duration(self.elapsed.as_nanos() as u64)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::source::platform_text;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn tag_of(arguments: &[&str]) -> Result<Option<String>> {
        let line = Line::try_parse_from([&["x"], arguments].concat());
        let line = line.map_err(|error| Error::Malformed(error.to_string()))?;
        docker_tag(&line.options)
    }

    #[test]
    fn the_docker_image_has_a_tag_of_its_own() {
        let tag = |arguments: &[&str]| tag_of(arguments).unwrap();
        assert_eq!(tag(&["a.b/c", "a.b/c:1"]), None);
        assert_eq!(tag(&["a.b/c", "a.b/c:1", "--also-docker"]).as_deref(), Some("1-docker"));
        assert_eq!(tag(&["a.b/c", "a.b/c:1", "--also-docker=x"]).as_deref(), Some("x"));
        assert_eq!(tag(&["a.b/c", "docker-archive:f"]).as_deref(), Some("latest-docker"));
        assert!(tag_of(&["a.b/c", "a.b/c:1", "--also-docker=1"]).is_err());
        assert!(tag_of(&["a.b/c", "a.b/c:1", "--also-docker=a b"]).is_err());
        let digest = format!("a.b/c@sha256:{}", "0".repeat(64));
        assert!(tag_of(&["a.b/c", &digest]).is_err());
    }

    #[test]
    fn platforms_are_written_as_they_are_shown() {
        assert_eq!(platform("linux/arm/v7").map(|p| platform_text(&p)), Ok("linux/arm/v7".into()));
        assert!(platform("linux").is_err());
    }
}
