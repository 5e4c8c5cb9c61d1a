//! `sluice gc`: gives back the bytes that no mounted image uses, and shows who uses the rest.

use clap::Args;
use serde_json::{Value, json};

use super::output::{self, Output};
use super::{Daemon, Verdict};
use crate::error::Result;

/// The options of `sluice gc`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice gc --dry-run     # who uses what\n  \
    sluice gc")]
pub struct Options {
    /// Only show what is there.
    #[arg(long)]
    dry_run: bool,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    daemon: Daemon,
}

/// Asks and prints.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let api = options.daemon.api();
    let freed = match options.dry_run {
        true => Value::Null,
        false => api.act("/api/sluice/v1/gc")?,
    };
    let cache = api.fetch("/api/sluice/v1/cache")?;
    if options.json {
        out.json(&json!({ "freed": freed, "cache": cache }))?;
        return Ok(Verdict::Good);
    }
    out.table(&rows(&cache))?;
    if let Some(bytes) = freed["freed_bytes"].as_u64() {
        let files = freed["removed_cache_files"].as_u64().unwrap_or(0);
        out.line(format!("freed {} and {files} cache files", output::bytes(bytes)))?;
    }
    Ok(Verdict::Good)
}

fn rows(cache: &Value) -> Vec<Vec<String>> {
    let head = ["BLOB", "CACHED", "IN USE", "IMAGES"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for blob in cache["blobs"].as_array().into_iter().flatten() {
        let images: Vec<&str> =
            blob["images"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        rows.push(vec![
            blob["id"].as_str().unwrap_or("-").chars().take(16).collect(),
            output::bytes(blob["bytes"].as_u64().unwrap_or(0)),
            if blob["in_use"] == true { "yes" } else { "no" }.to_owned(),
            if images.is_empty() { "-".to_owned() } else { images.join(" ") },
        ]);
    }
    let bytes = |key: &str| output::bytes(cache[key].as_u64().unwrap_or(0));
    let quota = if cache["quota_bytes"] == 0 { "no quota".into() } else { bytes("quota_bytes") };
    rows.push(vec!["all".into(), bytes("used_bytes"), format!("({quota})"), String::new()]);
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blob_is_a_row_and_the_sum_is_the_last() {
        let cache = json!({"used_bytes": 2048, "quota_bytes": 0, "blobs": [
            {"id": "0123456789abcdef0123", "bytes": 2048, "in_use": true, "images": ["d/i", "d/j"]}
        ]});
        let rows = rows(&cache);
        assert_eq!(rows[1], ["0123456789abcdef", "2.0 KiB", "yes", "d/i d/j"].map(str::to_owned));
        assert_eq!(rows[2], ["all", "2.0 KiB", "(no quota)", ""].map(str::to_owned));
    }
}
