//! `sluice optimize`: an image that starts from one blob, by a recorded start.
//!
//! Only a blob with what the start touched and a new bootstrap are made; the image gets them under
//! its own name unless another tag is given.

use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use super::Verdict;
use super::output::{self, Output};
use super::progress::Progress;
use super::source::{Place as Registries, Source};
use super::unpack::layouts;
use crate::build::optimize::{Optimized, optimize};
use crate::build::place::Place;
use crate::build::republish::republish;
use crate::build::tally::Tally;
use crate::build::unpacked::BOOTSTRAP_NAME;
use crate::build::workdir::WorkDir;
use crate::build::{trace, transport};
use crate::error::{Error, Result};
use crate::image::manifest::Platform;
use crate::image::{BlobId, Bootstrap};
use crate::registry::origin::Scheme;
use crate::registry::reference::is_tag;

/// Arguments of `sluice optimize`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice mount --trace start.jsonl registry.example/team/app:1.0-sluice /mnt\n  \
    sluice optimize registry.example/team/app:1.0-sluice --trace start.jsonl\n  \
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
    let tag = options.tag.as_deref().unwrap_or(place.tag());
    let is_new = options.tag.is_some();
    if !is_tag(tag) || (is_new && matches!(place, Place::Directory(_))) {
        return Err(Error::Malformed(format!("{tag}: the result cannot have this tag")));
    }
    let parent = transport::work_parent(&place)?.unwrap_or_else(super::convert::work_default);
    let work = WorkDir::new(&parent)?;
    super::convert::remove_when_interrupted(work.path())?;
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
    let report = report(&optimized);
    store(&place, tag, optimized, options.plain_http, &work).map_err(named)?;
    match options.json {
        true => out.json(&report.0)?,
        false => out.line(report.1)?,
    }
    Ok(Verdict::Good)
}

fn report(made: &Optimized) -> (serde_json::Value, String) {
    let value = json!({
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
    (value, text)
}

fn store(
    place: &Place,
    tag: &str,
    made: Optimized,
    plain_http: bool,
    work: &WorkDir,
) -> Result<()> {
    if let Place::Directory(directory) = place {
        let path = made.blob.path.as_deref().unwrap_or(work.path());
        let target = directory.join(made.blob.id.as_str());
        std::fs::rename(path, &target)
            .map_err(|error| Error::io(&error, format!("cannot write {}", target.display())))?;
        return super::build::write_whole(&directory.join(BOOTSTRAP_NAME), &made.bootstrap);
    }
    let scheme = if plain_http { Scheme::Http } else { Scheme::Https };
    let library = transport::library(place, scheme)?;
    let tally = Arc::new(Tally::default());
    let mut sink = transport::sink(place, scheme, &[], work.path(), tally)?;
    republish(&*library, &mut *sink, &Platform::here(), tag, made).map(drop)
}
