//! `sluice build`: an image out of a directory.
//!
//! Leaves `image.boot` and the blobs, named by digest, in one output directory. They grow in a
//! working directory inside of it, which an interrupt removes. The bootstrap is moved out last:
//! where there is one, the image is whole.

use std::path::{Path, PathBuf};

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};
use serde_json::json;

use super::Verdict;
use super::convert::remove_when_interrupted;
use super::output::{self, Output};
use super::progress::Progress;
use super::source::read_bootstrap;
use crate::build::oci_layout::{self, move_file};
use crate::build::workdir::WorkDir;
use crate::build::{self, Blob, BlobRole, Builder, Compression, Report};
use crate::config::{BUILD_THREADS_MAX, CHUNK_MAX_BYTES};
use crate::error::{Error, Result};
use crate::image::superblock::CHUNK_MIN_BYTES;
use crate::image::{Bootstrap, DigestAlgorithm};

/// The name of the bootstrap in an output directory.
pub const BOOTSTRAP_NAME: &str = "image.boot";

/// Arguments of `sluice build`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice build rootfs -o image\n  \
    sluice build rootfs -o image --compressor zstd --level 12 --chunk-size 256K\n  \
    sluice build rootfs -o image --chunk-dict base/image.boot\n  \
    sluice check image/image.boot --blobs image")]
pub struct Options {
    /// The directory that becomes the image's root.
    directory: PathBuf,
    /// Where the bootstrap and the blobs go; made if it is not there.
    #[arg(short, long, value_name = "OUTDIR")]
    output: PathBuf,
    #[command(flatten)]
    format: Format,
    /// List this path for prefetch; may be given several times.
    #[arg(long, value_name = "PATH")]
    prefetch: Vec<String>,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// How an image is to be stored.
#[derive(Args)]
pub struct Format {
    /// How chunks are compressed.
    #[arg(long, value_enum, default_value = "zstd")]
    compressor: CompressorName,
    /// The level of zstd, 1 to 22.
    #[arg(long, value_name = "N", default_value_t = 3,
        value_parser = clap::value_parser!(i32).range(1..=22))]
    level: i32,
    /// Bytes of file data per chunk, a power of two from 4K to 16M.
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = parse_size)]
    chunk_size: u32,
    /// How chunk digests are made.
    #[arg(long, value_enum, default_value = "blake3")]
    digest: DigestName,
    /// Threads that digest and compress; every core if not given. The result does not depend on it.
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<usize>::new()
        .range(1..=BUILD_THREADS_MAX as u64))]
    threads: Option<usize>,
    /// Use chunks of the blobs of this image where they are the same: a bootstrap, or for a
    /// conversion any place; may be given several times.
    #[arg(long, value_name = "IMAGE")]
    chunk_dict: Vec<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum CompressorName {
    Zstd,
    #[value(name = "lz4_block")]
    Lz4Block,
    None,
}

#[derive(Clone, Copy, ValueEnum)]
enum DigestName {
    Blake3,
    Sha256,
}

impl Format {
    /// What the builder is to do.
    pub fn options(&self) -> build::Options {
        let fallback = build::Options::default();
        build::Options {
            compression: match self.compressor {
                CompressorName::None => Compression::None,
                CompressorName::Lz4Block => Compression::Lz4Block,
                CompressorName::Zstd => Compression::Zstd(self.level),
            },
            chunk_size: self.chunk_size,
            digest: match self.digest {
                DigestName::Blake3 => DigestAlgorithm::Blake3,
                DigestName::Sha256 => DigestAlgorithm::Sha256,
            },
            threads: self.threads.unwrap_or(fallback.threads),
            ..fallback
        }
    }

    /// The images whose chunks may be used.
    pub fn dictionaries(&self) -> &[PathBuf] {
        &self.chunk_dict
    }

    /// A builder that knows the dictionaries.
    pub fn builder(&self, options: build::Options, directory: &Path) -> Result<Builder> {
        let mut builder = Builder::new(options, directory)?;
        for path in &self.chunk_dict {
            let dictionary = Bootstrap::parse(read_bootstrap(path)?);
            dictionary
                .and_then(|bootstrap| builder.add_dictionary(&bootstrap))
                .map_err(|error| error.context(format!("--chunk-dict {}", path.display())))?;
        }
        Ok(builder)
    }
}

/// Builds and reports.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let directory = &options.output;
    refuse_inside(directory, &options.directory)?;
    std::fs::create_dir_all(directory)
        .map_err(|error| Error::io(&error, format!("cannot make {}", directory.display())))?;
    let work = WorkDir::new(directory)?;
    remove_when_interrupted(work.path())?;
    let mut format = options.format.options();
    format.prefetch = options.prefetch.iter().map(|path| path.clone().into_bytes()).collect();
    let mut builder = options.format.builder(format, work.path())?;
    let progress = Progress::counting("build");
    let built =
        builder.add_directory(&options.directory, &|step| progress.advance(step.read_bytes));
    progress.finish();
    built.map_err(|error| error.context(options.directory.display()))?;
    let image = builder.finish()?;
    let partial = work.fresh("partial");
    for (blob, path) in image.blobs.iter().filter_map(|blob| Some((blob, blob.path.as_ref()?))) {
        move_file(path, &directory.join(blob.id.as_str()), &partial)?;
    }
    oci_layout::write_whole(&directory.join(BOOTSTRAP_NAME), &partial, &image.bootstrap)?;
    report(&image.blobs, &image.report, options.json, out)?;
    Ok(Verdict::Good)
}

/// An image cannot hold itself. The output need not be there yet: what is of its path decides.
fn refuse_inside(output: &Path, source: &Path) -> Result<()> {
    let failed = |error| Error::io(&error, source.display().to_string());
    let source_path = source.canonicalize().map_err(failed)?;
    let absolute = std::path::absolute(output).unwrap_or_else(|_| output.to_owned());
    let mut there = absolute.ancestors().filter_map(|path| path.canonicalize().ok());
    match there.next().is_some_and(|path| path.starts_with(&source_path)) {
        false => Ok(()),
        true => Err(Error::Malformed(format!(
            "-o {}: inside of {}, which becomes the image; choose another place",
            output.display(),
            source.display()
        ))),
    }
}

/// Writes a file so that it is there whole or not at all.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let failed =
        |error: std::io::Error| Error::io(&error, format!("cannot write {}", path.display()));
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    std::fs::write(&partial, bytes).map_err(failed)?;
    std::fs::rename(&partial, path).map_err(failed)
}

fn report(blobs: &[Blob], report: &Report, as_json: bool, out: &mut Output) -> Result<()> {
    if as_json {
        let blobs: Vec<_> = blobs.iter().map(blob_json).collect();
        return out.json(&json!({ "report": report, "blobs": blobs }));
    }
    out.line(summary(report))?;
    for blob in blobs {
        let foreign = if blob.role == BlobRole::Foreign { " (of another image)" } else { "" };
        out.line(format!("blob       {} {}{foreign}", blob.id, output::bytes(blob.size_bytes)))?;
    }
    Ok(())
}

fn blob_json(blob: &Blob) -> serde_json::Value {
    json!({
        "id": blob.id.as_str(),
        "foreign": blob.role == BlobRole::Foreign,
        "size": blob.size_bytes,
        "uncompressed_size": blob.uncompressed_bytes,
    })
}

/// Sizes, ratio, chunks and time, for people.
pub fn summary(report: &Report) -> String {
    let stored = report.blob_bytes + report.bootstrap_bytes;
    let ratio = stored as f64 / report.data_bytes.max(1) as f64 * 100.0;
    let shared: u64 = report.layers.iter().map(|layer| layer.shared_pieces).sum();
    let saved: u64 = report.layers.iter().map(|layer| layer.shared_bytes).sum();
    format!(
        "files      {}, {} of data\n\
         stored     {} ({ratio:.0} %): blobs {}, bootstrap {}\n\
         chunks     {}, {shared} shared (saves {})\n\
         time       {}",
        report.inodes,
        output::bytes(report.data_bytes),
        output::bytes(stored),
        output::bytes(report.blob_bytes),
        output::bytes(report.bootstrap_bytes),
        report.chunks,
        output::bytes(saved),
        output::duration(report.time_ms * 1_000_000),
    )
}

/// "4K", "1M" or a number of bytes.
fn parse_size(text: &str) -> std::result::Result<u32, String> {
    let (digits, unit) = match text.trim_end_matches(['B', 'b']).trim_end_matches(['i']) {
        text if text.ends_with(['K', 'k']) => (&text[..text.len() - 1], 1 << 10),
        text if text.ends_with(['M', 'm']) => (&text[..text.len() - 1], 1 << 20),
        text => (text, 1),
    };
    let size = digits.parse::<u32>().ok().and_then(|number| number.checked_mul(unit));
    let legal = |size: &u32| {
        size.is_power_of_two() && (CHUNK_MIN_BYTES..=CHUNK_MAX_BYTES as u32).contains(size)
    };
    size.filter(legal).ok_or_else(|| "a power of two from 4K to 16M".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunk_sizes_are_powers_of_two_with_units() {
        let cases = [("4K", 4096), ("64KiB", 65536), ("1M", 1 << 20), ("16M", 1 << 24)];
        for (text, size) in cases {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        assert_eq!(parse_size("1048576"), Ok(1 << 20));
        for text in ["", "K", "3K", "2K", "32M", "1G", "-4K", "99999999999"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
