//! `sluice trace`: what a mounted image's starts on this node needed, for `sluice optimize`.

use clap::Args;
use serde_json::Value;

use super::client::query_value;
use super::output::Output;
use super::{Daemon, Verdict};
use crate::error::{Error, Result};

/// The options of `sluice trace`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice images\n  \
    sluice trace sluice-0123456789abcdef > start.jsonl\n  \
    sluice optimize registry.example/team/app:1.0-sluice --trace start.jsonl\n\n\
    Known is what readers waited for, and what was read ahead for them, in the first half minute \
    of this image's mounts. `sluice mount --trace FILE` tells more: what was on the node, too.")]
pub struct Options {
    /// The image, as `sluice images` calls it.
    #[arg(value_name = "ID")]
    id: String,
    /// Its domain; without one it has its own.
    #[arg(long, value_name = "DOMAIN")]
    domain: Option<String>,
    #[command(flatten)]
    daemon: Daemon,
}

/// Asks and prints a line for each touch.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let domain_id = query_value(options.domain.as_deref().unwrap_or(&options.id));
    let id = query_value(&options.id);
    let path = format!("/api/sluice/v1/touches?domain_id={domain_id}&id={id}");
    let answer = options.daemon.api().fetch(&path)?;
    let touches = answer["touches"].as_array().ok_or_else(|| {
        Error::Malformed("the daemon's answer is no trace; is it an older one?".to_owned())
    })?;
    touches.iter().map(Value::to_string).try_for_each(|line| out.line(line))?;
    Ok(Verdict::Good)
}
