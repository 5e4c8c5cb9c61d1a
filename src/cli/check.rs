//! `sluice check`: is this image whole, and is every chunk what the bootstrap says.
//!
//! Structure first (it needs no blob), then every chunk of every blob. Each bad chunk is named with
//! image, blob, chunk and the files that use it. Exits with 1 if anything is wrong or could not be
//! looked at; a check that was not made is never reported as good.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::Verdict;
use super::blobs::Blobs;
use super::output::{self, Output};
use super::progress::Progress;
use super::source::{Place, Source};
use super::structure::{self, Structure, Users};
use super::verify::{self, Report};
use crate::error::Result;
use crate::image::{BlobRecord, Bootstrap, ChunkIndex};

/// The options of `sluice check`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice check image.boot                                    (structure only)\n  \
    sluice check image.boot --blobs /srv/blobs\n  \
    sluice check image.boot --registry http://127.0.0.1:5000 --repo app\n  \
    sluice check registry.example/team/app:1.0-nydus\n\n\
    Exit code 0: everything that was asked for is right.\n\
    1: something is not, or could not be read.")]
pub struct Options {
    /// A bootstrap's file or an image's name.
    #[arg(value_name = "IMAGE|image.boot")]
    image: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

/// What became of one blob.
struct Checked<'a> {
    record: &'a BlobRecord,
    result: Result<Report>,
    /// Parallel to the report's bad chunks.
    users: Vec<Users>,
}

/// Checks.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let source = Source::of(&options.image, &options.place)?;
    let name = options.image.display().to_string();
    let bootstrap = Bootstrap::parse(source.bootstrap).map_err(|error| error.context(&name))?;
    let structure = Structure::of(&bootstrap);
    let checked = match &source.blobs {
        Some(blobs) => check_blobs(&bootstrap, blobs),
        None => Vec::new(),
    };
    let good = structure.fault_count == 0 && checked.iter().all(Checked::is_good);
    if options.json {
        out.json(&json!({
            "ok": good,
            "names": structure.name_count,
            "references": structure.reference_count,
            "fault_count": structure.fault_count,
            "faults": structure.faults,
            "blobs_checked": source.blobs.is_some(),
            "blobs": checked.iter().map(Checked::to_json).collect::<Vec<_>>(),
        }))?;
    } else {
        print_structure(&structure, out)?;
        for blob in &checked {
            blob.print(&name, out)?;
        }
        if source.blobs.is_none() && !bootstrap.blobs().is_empty() {
            out.line("blobs      not looked at; give --blobs DIR or --registry URL --repo REPO")?;
        }
    }
    Ok(if good { Verdict::Good } else { Verdict::Bad })
}

fn check_blobs<'a>(bootstrap: &'a Bootstrap, blobs: &Blobs) -> Vec<Checked<'a>> {
    let progress = Progress::new("checking");
    let check = |record: &'a BlobRecord| {
        let result = verify::blob(bootstrap, record.index, blobs, &progress);
        let bad: Vec<(u32, ChunkIndex)> = match &result {
            Ok(report) => report.bad.iter().map(|bad| (record.index, bad.index)).collect(),
            Err(_) => Vec::new(),
        };
        let users = if bad.is_empty() { Vec::new() } else { structure::users(bootstrap, &bad) };
        Checked { record, result, users }
    };
    let checked = bootstrap.blobs().iter().map(check).collect();
    progress.finish();
    checked
}

fn print_structure(structure: &Structure, out: &mut Output) -> Result<()> {
    let Structure { name_count, reference_count, faults, fault_count } = structure;
    let verdict = match fault_count {
        0 => "ok".to_owned(),
        count => format!("BAD, {count} faults"),
    };
    out.line(format!(
        "structure  {verdict}: {name_count} names, {reference_count} chunk references"
    ))?;
    for fault in faults {
        out.line(format!("  {fault}"))?;
    }
    if *fault_count > faults.len() as u64 {
        out.line(format!("  and {} more", fault_count - faults.len() as u64))?;
    }
    Ok(())
}

impl Checked<'_> {
    fn is_good(&self) -> bool {
        self.result.as_ref().is_ok_and(|report| report.bad_count == 0)
    }

    fn print(&self, image: &str, out: &mut Output) -> Result<()> {
        let id = &self.record.id;
        let report = match &self.result {
            Ok(report) => report,
            Err(error) => return out.line(format!("blob {id}  BAD, nothing verified: {error}")),
        };
        let good = format!("{} chunks, {}", report.good_count, output::bytes(report.good_bytes));
        match report.bad_count {
            0 => return out.line(format!("blob {id}  ok: {good}")),
            count => out.line(format!("blob {id}  BAD: {count} bad chunks ({good} are right)"))?,
        }
        for (bad, users) in report.bad.iter().zip(&self.users) {
            out.line(format!("  {image}, blob {id}, chunk {}: {}", bad.index, bad.reason))?;
            for path in &users.paths {
                out.line(format!("    used by {path}"))?;
            }
            if users.count > users.paths.len() as u64 {
                out.line(format!("    and {} more", users.count - users.paths.len() as u64))?;
            }
        }
        match report.bad_count - report.bad.len() as u64 {
            0 => Ok(()),
            more => out.line(format!("  and {more} more bad chunks")),
        }
    }

    fn to_json(&self) -> Value {
        let id = self.record.id.to_string();
        let report = match &self.result {
            Ok(report) => report,
            Err(error) => return json!({ "id": id, "ok": false, "error": error.to_string() }),
        };
        let bad = |(bad, users): (&verify::BadChunk, &Users)| {
            json!({
                "chunk": bad.index.0,
                "reason": bad.reason,
                "files": users.paths,
                "file_count": users.count,
            })
        };
        json!({
            "id": id,
            "ok": report.bad_count == 0,
            "good_chunks": report.good_count,
            "good_bytes": report.good_bytes,
            "bad_chunks": report.bad_count,
            "bad": report.bad.iter().zip(&self.users).map(bad).collect::<Vec<_>>(),
        })
    }
}
