//! `sluice inspect`: what is in an image, from its bootstrap alone.
//!
//! Shows superblock, blobs, chunks, files and the prefetch list; with `--files` every name. Fetches
//! at most a bootstrap, never a blob.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::Verdict;
use super::output::{self, Output};
use super::source::{Place, Source};
use super::structure::display;
use crate::config;
use crate::error::Result;
use crate::image::walk::Visit;
use crate::image::{BlobFeatures, BlobRecord, Bootstrap, FileKind};

/// The options of `sluice inspect`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice inspect image.boot\n  \
    sluice inspect registry.example/team/app:1.0-nydus --json\n  \
    sluice inspect image.boot --files\n  \
    sluice inspect image.boot --tree /etc")]
pub struct Options {
    /// A bootstrap's file or an image's name.
    #[arg(value_name = "IMAGE|image.boot")]
    image: PathBuf,
    /// List every file instead.
    #[arg(long)]
    files: bool,
    /// List the files at and below this path instead.
    #[arg(long, value_name = "PATH", conflicts_with = "files")]
    tree: Option<String>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

/// The feature bits by nydus's names (facts about the format: blob feature bits).
const FEATURES: [(u32, &str); 12] = [
    (BlobFeatures::ALIGNED, "aligned"),
    (BlobFeatures::INLINED_FS_META, "inlined-meta"),
    (BlobFeatures::CHUNK_INFO_V2, "chunk-info-v2"),
    (BlobFeatures::ZRAN, "zran"),
    (BlobFeatures::SEPARATE, "separate"),
    (BlobFeatures::INLINED_CHUNK_DIGEST, "inlined-digest"),
    (BlobFeatures::BATCH, "batch"),
    (BlobFeatures::ENCRYPTED, "encrypted"),
    (0x200, "chunk-dict"),
    (0x400, "prefetch-files"),
    (BlobFeatures::HAS_TAR_HEADER, "tar-header"),
    (BlobFeatures::HAS_TOC, "toc"),
];

/// Reads the image's metadata and prints it.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let source = Source::of(&options.image, &options.place)?;
    let name = options.image.display().to_string();
    let bootstrap = Bootstrap::parse(source.bootstrap).map_err(|error| error.context(&name))?;
    match (&options.tree, options.files) {
        (Some(path), _) => list(&bootstrap, path.trim_matches('/'), options.json, out)?,
        (None, true) => list(&bootstrap, "", options.json, out)?,
        (None, false) => {
            let summary = summary(&bootstrap)?;
            match options.json {
                true => out.json(&summary)?,
                false => print(&summary, out)?,
            }
        }
    }
    Ok(Verdict::Good)
}

fn summary(bootstrap: &Bootstrap) -> Result<Value> {
    let superblock = bootstrap.superblock();
    let tree = Census::of(bootstrap)?;
    let prefetch: Vec<String> = bootstrap
        .prefetch_nids()
        .map(|nid| tree.prefetch.get(&nid).cloned().unwrap_or_else(|| format!("inode {nid}")))
        .collect();
    Ok(json!({
        "bootstrap_bytes": bootstrap.size_bytes(),
        "flags": format!("{:#x}", superblock.flags),
        "compressor": superblock.compressor.to_string(),
        "digest": superblock.digest_algorithm.to_string(),
        "chunk_size": superblock.chunk_size,
        "inodes": superblock.inode_count,
        "blobs": bootstrap.blobs().iter().map(|b| blob(bootstrap, b)).collect::<Vec<_>>(),
        "chunks": chunks(bootstrap),
        "files": tree.counts,
        "file_bytes": tree.file_bytes,
        "largest": tree.largest.iter()
            .map(|(size, path)| json!({ "path": path, "size": size }))
            .collect::<Vec<_>>(),
        "prefetch": prefetch,
    }))
}

fn blob(bootstrap: &Bootstrap, blob: &BlobRecord) -> Value {
    let names: Vec<&str> = FEATURES
        .iter()
        .filter(|(mask, _)| blob.features.has(*mask))
        .map(|(_, name)| *name)
        .collect();
    json!({
        "index": blob.index,
        "id": blob.id.as_str(),
        "uncompressed_size": blob.uncompressed_size,
        "data_size": blob.data_end(),
        "compressor": blob.compressor.to_string(),
        "digest": blob.digest_algorithm.to_string(),
        "chunks": blob.chunk_count,
        "chunks_used": bootstrap.chunks_of(blob.index).len(),
        "features": names,
        "feature_bits": format!("{:#x}", blob.features.0),
        "meta_blob": blob.meta_digest.map(|digest| digest.to_string()),
    })
}

fn chunks(bootstrap: &Bootstrap) -> Value {
    let (mut count, mut bytes, mut stored) = (0u64, 0u64, 0u64);
    let (mut smallest, mut largest) = (u32::MAX, 0);
    for chunk in bootstrap.chunks() {
        count += 1;
        bytes += u64::from(chunk.uncompressed_size);
        stored += u64::from(chunk.compressed_size);
        smallest = smallest.min(chunk.uncompressed_size);
        largest = largest.max(chunk.uncompressed_size);
    }
    json!({
        "count": count,
        "bytes": bytes,
        "stored_bytes": stored,
        "smallest": if count == 0 { 0 } else { smallest },
        "largest": largest,
        "mean": bytes.checked_div(count).unwrap_or(0),
    })
}

/// Files by kind, and the few worth a name.
#[derive(Default)]
struct Census {
    counts: BTreeMap<String, u64>,
    file_bytes: u64,
    /// Largest first, one name each.
    largest: Vec<(u64, String)>,
    prefetch: HashMap<u64, String>,
}

impl Census {
    fn of(bootstrap: &Bootstrap) -> Result<Census> {
        let mut census = Census::default();
        let wanted: std::collections::HashSet<u64> = bootstrap.prefetch_nids().collect();
        let mut linked = std::collections::HashSet::new();
        for visit in bootstrap.tree().walk() {
            let Visit { path, inode } = visit?;
            let kind = inode.kind;
            if wanted.contains(&inode.nid) {
                census.prefetch.entry(inode.nid).or_insert_with(|| display(&path));
            }
            if kind != FileKind::Directory && inode.link_count > 1 && !linked.insert(inode.nid) {
                *census.counts.entry("further hard link".to_owned()).or_default() += 1;
                continue;
            }
            *census.counts.entry(kind.to_string()).or_default() += 1;
            if kind == FileKind::File {
                census.file_bytes = census.file_bytes.saturating_add(inode.size);
                census.note(inode.size, &path);
            }
        }
        Ok(census)
    }

    fn note(&mut self, size: u64, path: &[u8]) {
        let place = self.largest.partition_point(|(other, _)| *other >= size);
        if place < config::INSPECT_LARGEST_FILES {
            self.largest.insert(place, (size, display(path)));
            self.largest.truncate(config::INSPECT_LARGEST_FILES);
        }
    }
}

fn print(summary: &Value, out: &mut Output) -> Result<()> {
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    let bytes = |value: &Value| output::bytes(number(value));
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let items = |key: &str| summary[key].as_array().cloned().unwrap_or_default();
    out.line(format!(
        "bootstrap  {}, {} inodes, flags {}",
        bytes(&summary["bootstrap_bytes"]),
        summary["inodes"],
        text(&summary["flags"])
    ))?;
    out.line(format!(
        "chunks     {} of up to {}, {} by {}, {} as stored; digests {}",
        summary["chunks"]["count"],
        bytes(&summary["chunk_size"]),
        bytes(&summary["chunks"]["bytes"]),
        text(&summary["compressor"]),
        bytes(&summary["chunks"]["stored_bytes"]),
        text(&summary["digest"]),
    ))?;
    let counts = summary["files"].as_object().cloned().unwrap_or_default();
    let counts: Vec<String> =
        counts.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
    out.line(format!(
        "files      {}; {} of data",
        counts.join(", "),
        bytes(&summary["file_bytes"])
    ))?;
    let row = |cells: &[String]| cells.to_vec();
    let heading = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();
    let mut rows = vec![heading(&["BLOB", "SIZE", "STORED", "CHUNKS", "USED", "FEATURES", "ID"])];
    for blob in items("blobs") {
        let names = blob["features"].as_array().cloned().unwrap_or_default();
        let names: Vec<String> = names.iter().map(text).collect();
        rows.push(row(&[
            blob["index"].to_string(),
            bytes(&blob["uncompressed_size"]),
            bytes(&blob["data_size"]),
            blob["chunks"].to_string(),
            blob["chunks_used"].to_string(),
            names.join(","),
            text(&blob["id"]),
        ]));
    }
    out.line("")?;
    out.table(&rows)?;
    let mut rows = vec![heading(&["SIZE", "LARGEST FILES"])];
    rows.extend(items("largest").iter().map(|f| row(&[bytes(&f["size"]), text(&f["path"])])));
    out.line("")?;
    out.table(&rows)?;
    for path in items("prefetch") {
        out.line(format!("prefetch   {}", text(&path)))?;
    }
    Ok(())
}

/// Every name at and below `path`, like `ls -l` would show it.
fn list(bootstrap: &Bootstrap, path: &str, json: bool, out: &mut Output) -> Result<()> {
    // An unknown path is an error, not an empty list.
    bootstrap.tree().lookup(path.as_bytes())?;
    let below = format!("{path}/");
    let mut entries = Vec::new();
    for visit in bootstrap.tree().walk() {
        let visit = visit?;
        let inside = path.is_empty()
            || visit.path == path.as_bytes()
            || visit.path.starts_with(below.as_bytes());
        match (inside, json) {
            (true, true) => entries.push(describe(bootstrap, &visit)?),
            (true, false) => out.line(line(bootstrap, &visit)?)?,
            (false, _) => {}
        }
    }
    if json { out.json(&entries) } else { Ok(()) }
}

fn describe(bootstrap: &Bootstrap, visit: &Visit) -> Result<Value> {
    let inode = &visit.inode;
    let chunks = match inode.kind {
        FileKind::File => bootstrap.tree().file_chunks(inode)?.size_hint().0,
        _ => 0,
    };
    Ok(json!({
        "path": display(&visit.path),
        "kind": inode.kind.to_string(),
        "mode": format!("{:o}", inode.mode & 0o7777),
        "uid": inode.uid,
        "gid": inode.gid,
        "size": inode.size,
        "mtime": inode.mtime_seconds,
        "links": inode.link_count,
        "inode": inode.nid,
        "chunks": chunks,
        "target": target(bootstrap, visit)?,
    }))
}

fn target(bootstrap: &Bootstrap, visit: &Visit) -> Result<Option<String>> {
    match visit.inode.kind {
        FileKind::Link => {
            let target = bootstrap.tree().read_link(&visit.inode)?;
            // Without the slash that `display` puts in front of paths of the image.
            Ok(Some(display(&target)[1..].to_owned()))
        }
        _ => Ok(None),
    }
}

fn line(bootstrap: &Bootstrap, visit: &Visit) -> Result<String> {
    let inode = &visit.inode;
    let mark = match inode.kind {
        FileKind::File => '-',
        FileKind::Directory => 'd',
        FileKind::Link => 'l',
        FileKind::CharacterDevice => 'c',
        FileKind::BlockDevice => 'b',
        FileKind::Pipe => 'p',
        FileKind::Socket => 's',
    };
    let target = target(bootstrap, visit)?.map_or(String::new(), |target| format!(" -> {target}"));
    Ok(format!(
        "{mark}{:04o} {:>5}:{:<5} {:>12} {}{target}",
        inode.mode & 0o7777,
        inode.uid,
        inode.gid,
        inode.size,
        display(&visit.path)
    ))
}
