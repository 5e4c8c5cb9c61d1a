//! `sluice unpack`: an image back into a directory.
//!
//! Whatever the image says, nothing outside the directory is touched; whatever the registry sends,
//! nothing is written that does not have the bootstrap's digest.

use std::path::PathBuf;

use clap::Args;

use super::Verdict;
use super::blobs::Reader;
use super::output::{self, Output};
use super::progress::Progress;
use super::source::{Place, Source};
use super::verify;
use crate::build::unpack::unpack;
use crate::error::{Error, Result};
use crate::image::{BlobId, Bootstrap, FileKind, Layout};

/// The options of `sluice unpack`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice unpack image rootfs                       (a directory made by sluice build)\n  \
    sluice unpack image.boot --blobs /srv/blobs rootfs\n  \
    sluice unpack registry.example/team/app:1.0-nydus rootfs\n\n\
    Needs root: owners, devices and attributes are restored.")]
pub struct Options {
    /// A directory with an image, a bootstrap's file, or an image's name.
    #[arg(value_name = "IMAGE|image.boot")]
    image: PathBuf,
    /// Where it goes: a directory that is empty or not there.
    #[arg(value_name = "DIR")]
    target: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    place: Place,
}

/// Unpacks.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let source = Source::of(&options.image, &options.place)?;
    let name = options.image.display();
    let bootstrap = Bootstrap::parse(source.bootstrap).map_err(|error| error.context(name))?;
    let blobs = match source.blobs {
        Some(blobs) => Some(blobs.reader()?),
        None if bootstrap.blobs().is_empty() => None,
        None => {
            return Err(Error::Malformed(
                "say where the blobs are: --blobs DIR, or --registry URL --repo REPO".to_owned(),
            ));
        }
    };
    let layouts = layouts(&bootstrap, blobs.as_ref())?;
    let progress = Progress::new("unpacking");
    progress.expect(data_bytes(&bootstrap)?);
    let read = |blob: &BlobId, range| match &blobs {
        Some(reader) => reader.read(blob.as_str(), range),
        None => Err(Error::NotFound(format!("blob {blob}"))),
    };
    let advance = |bytes| progress.advance(bytes);
    let unpacked = unpack(&bootstrap, &layouts, &read, &options.target, &advance);
    progress.finish();
    let unpacked = unpacked?;
    match options.json {
        true => out.json(&unpacked)?,
        false => out.line(format!(
            "unpacked {} names, {} of data, {} read",
            unpacked.names,
            output::bytes(unpacked.data_bytes),
            output::bytes(unpacked.read_bytes),
        ))?,
    }
    Ok(Verdict::Good)
}

/// The layouts of all blobs, in order.
pub fn layouts(bootstrap: &Bootstrap, blobs: Option<&Reader>) -> Result<Vec<Layout>> {
    let mut layouts = Vec::new();
    for (record, reader) in bootstrap.blobs().iter().zip(blobs.into_iter().cycle()) {
        let context = match Layout::needs_context(record) {
            true => Some(verify::context(record, reader)?),
            false => None,
        };
        layouts.push(Layout::build(bootstrap, record.index, context.as_ref())?);
    }
    Ok(layouts)
}

/// Bytes of all files; one with several names is counted for each.
fn data_bytes(bootstrap: &Bootstrap) -> Result<u64> {
    let mut total: u64 = 0;
    for visit in bootstrap.tree().walk() {
        let inode = visit?.inode;
        if inode.kind == FileKind::File {
            total = total.saturating_add(inode.size);
        }
    }
    Ok(total)
}
