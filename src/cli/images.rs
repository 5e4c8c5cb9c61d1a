//! `sluice images`: what the daemon serves and where it is mounted.
//!
//! The daemon knows what is registered and what it has mounted, the kernel knows what was mounted
//! by hand; this puts the two together.

use clap::Args;
use serde_json::{Value, json};

use super::mounts::{self, ImageMount};
use super::output::{self, Output};
use super::{Daemon, Verdict};
use crate::error::{Error, Result};

/// Where the daemon lists its images.
const PATH: &str = "/api/sluice/v1/images";

/// The options of `sluice images`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice images\n  \
    sluice images --json | jq -r '.[].id'")]
pub struct Options {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    daemon: Daemon,
}

/// Asks and prints.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let answer = options.daemon.api().fetch(PATH)?;
    let mounts = mounts::read()?;
    let Value::Array(images) = answer else {
        return Err(Error::Malformed(format!("{PATH}: the daemon did not answer a list")));
    };
    let images: Vec<Value> =
        images.into_iter().map(|image| with_mountpoints(image, &mounts)).collect();
    match options.json {
        true => out.json(&images)?,
        false => out.table(&rows(&images))?,
    }
    Ok(Verdict::Good)
}

fn with_mountpoints(mut image: Value, mounts: &[ImageMount]) -> Value {
    let shown = |mount: &&ImageMount| {
        image["id"] == mount.fsid.as_str() && image["domain_id"] == mount.domain()
    };
    let known = image["mountpoints"].as_array().into_iter().flatten();
    let mut places: Vec<String> = known.filter_map(Value::as_str).map(str::to_owned).collect();
    // By hand, through fscache.
    places.extend(mounts.iter().filter(shown).map(|it| it.mountpoint.display().to_string()));
    places.sort();
    places.dedup();
    if let Some(fields) = image.as_object_mut() {
        fields.insert("mountpoints".to_owned(), json!(places));
    }
    image
}

fn rows(images: &[Value]) -> Vec<Vec<String>> {
    let head = ["ID", "DOMAIN", "BLOBS", "SIZE", "FETCHED", "MOUNTPOINTS"];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for image in images {
        let text = |key: &str| image[key].as_str().unwrap_or("-").to_owned();
        let blobs = image["blobs"].as_array().map_or(&[][..], Vec::as_slice);
        let places: Vec<&str> = image["mountpoints"]
            .as_array()
            .map_or(&[][..], Vec::as_slice)
            .iter()
            .filter_map(Value::as_str)
            .collect();
        rows.push(vec![
            text("id"),
            text("domain_id"),
            blobs.len().to_string(),
            sum(blobs, "size").map_or("-".to_owned(), output::bytes),
            sum(blobs, "fetched").map_or("-".to_owned(), output::bytes),
            if places.is_empty() { "-".to_owned() } else { places.join(" ") },
        ]);
    }
    rows
}

/// Nothing if no blob says it: an older daemon, or one whose blobs nobody has opened.
fn sum(blobs: &[Value], key: &str) -> Option<u64> {
    let known: Vec<u64> = blobs.iter().filter_map(|blob| blob[key].as_u64()).collect();
    if known.is_empty() { None } else { Some(known.iter().fold(0, |a, b| a.saturating_add(*b))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(place: &str, fsid: &str, domain_id: Option<&str>) -> ImageMount {
        ImageMount {
            mountpoint: place.into(),
            fsid: fsid.to_owned(),
            domain_id: domain_id.map(str::to_owned),
            whole: true,
        }
    }

    #[test]
    fn an_image_is_shown_with_its_own_mounts_only() {
        let mounts = [
            mount("/a", "x", None),
            mount("/b", "x", Some("shared")),
            mount("/c", "y", Some("shared")),
        ];
        let image = json!({"id": "x", "domain_id": "shared", "blobs": [{"id": "b", "size": 2048}]});
        let image = with_mountpoints(image, &mounts);
        assert_eq!(image["mountpoints"], json!(["/b"]));
        let row = &rows(&[image])[1];
        assert_eq!(row, &["x", "shared", "1", "2.0 KiB", "-", "/b"].map(str::to_owned));
    }

    #[test]
    fn an_answer_without_details_is_shown_with_dashes() {
        let row = rows(&[json!({"id": "x"})]).remove(1);
        assert_eq!(row, ["x", "-", "0", "-", "-", "-"].map(str::to_owned));
    }
}
