//! `sluice diff`: what differs between two images, without reading a byte of their data.
//!
//! `+` is only in the second, `-` only in the first, `~` in both and not the same; then how much of
//! their data they share.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::Verdict;
use super::output::{self, Output};
use super::source::{Place, Source};
use super::structure::display;
use crate::error::Result;
use crate::image::Bootstrap;
use crate::image::compare::{Aspect, ChunkSum, Comparison, Name, compare};

/// Arguments of `sluice diff`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice diff registry.example/team/app:1.0-sluice registry.example/team/app:1.1-sluice\n  \
    sluice diff one/image.boot two/image.boot --summary")]
pub struct Options {
    /// An image.
    #[arg(value_name = "A")]
    before: PathBuf,
    /// A later one.
    #[arg(value_name = "B")]
    after: PathBuf,
    /// Leave the names out.
    #[arg(long)]
    summary: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Talk to registries without TLS.
    #[arg(long)]
    plain_http: bool,
}

/// Compares and prints.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let place = Place::of_registry(options.plain_http);
    let read = |image: &PathBuf| {
        let source = Source::of(image, &place)?;
        Bootstrap::parse(source.bootstrap).map_err(|error| error.context(image.display()))
    };
    let found = compare(&read(&options.before)?, &read(&options.after)?)?;
    if options.json {
        out.json(&as_json(&found, !options.summary))?;
        return Ok(Verdict::Good);
    }
    if !options.summary {
        print_names(&found, out)?;
    }
    let bytes = |names: &[Name]| output::bytes(names.iter().map(|name| name.size).sum());
    let changed: Vec<Name> = found.changed.iter().map(|(name, _)| name.clone()).collect();
    out.line(format!("added      {}, {}", found.added.len(), bytes(&found.added)))?;
    out.line(format!("removed    {}, {}", found.removed.len(), bytes(&found.removed)))?;
    out.line(format!("changed    {}, {}", changed.len(), bytes(&changed)))?;
    out.line(format!("equal      {}", found.equal_count))?;
    if found.undecided_count > 0 {
        out.line(format!(
            "undecided  {} files of equal size: the images have other chunks or digests",
            found.undecided_count
        ))?;
    }
    let [before, both, after] = &found.chunks;
    for (title, sum) in [("only in A", before), ("in both", both), ("only in B", after)] {
        out.line(format!(
            "{title:10} {} chunks, {}, {} as stored",
            sum.count,
            output::bytes(sum.bytes),
            output::bytes(sum.stored_bytes)
        ))?;
    }
    out.line(format!("blobs      {} in both", found.shared_blobs.len()))?;
    Ok(Verdict::Good)
}

fn print_names(found: &Comparison, out: &mut Output) -> Result<()> {
    for name in &found.removed {
        out.line(format!("- {}", display(&name.path)))?;
    }
    for name in &found.added {
        out.line(format!("+ {}", display(&name.path)))?;
    }
    for (name, aspects) in &found.changed {
        let words: Vec<&str> = aspects.iter().map(|aspect| word(*aspect)).collect();
        out.line(format!("~ {} ({})", display(&name.path), words.join(", ")))?;
    }
    Ok(())
}

fn word(aspect: Aspect) -> &'static str {
    match aspect {
        Aspect::Kind => "kind",
        Aspect::Mode => "mode",
        Aspect::Owner => "owner",
        Aspect::Time => "time",
        Aspect::Attributes => "xattrs",
        Aspect::Content => "content",
    }
}

fn as_json(found: &Comparison, with_names: bool) -> Value {
    let plain = |name: &Name| {
        json!({
            "path": display(&name.path), "kind": name.kind.to_string(), "size": name.size,
        })
    };
    let sum = |sum: &ChunkSum| {
        let ChunkSum { count, bytes, stored_bytes } = sum;
        json!({ "chunks": count, "bytes": bytes, "stored_bytes": stored_bytes })
    };
    let changed = |(name, aspects): &(Name, Vec<Aspect>)| {
        let mut value = plain(name);
        value["differs"] = aspects.iter().map(|aspect| word(*aspect)).collect();
        value
    };
    let list = |names: Vec<Value>| if with_names { json!(names) } else { json!(names.len()) };
    let [before, both, after] = &found.chunks;
    json!({
        "added": list(found.added.iter().map(plain).collect()),
        "removed": list(found.removed.iter().map(plain).collect()),
        "changed": list(found.changed.iter().map(changed).collect()),
        "equal": found.equal_count,
        "undecided": found.undecided_count,
        "only_in_a": sum(before),
        "in_both": sum(both),
        "only_in_b": sum(after),
        "shared_blobs": found.shared_blobs,
    })
}
