//! The command line: what is read, by how many, how fast, and where the results go.

use std::io;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde_json::{Value, json};

use crate::blob::Dead;
use crate::plan::{Extent, Pattern, Plan};

const KIB: u64 = 1024;

/// Measures how long readers wait for bytes that are not there yet.
#[derive(Parser)]
pub struct Arguments {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Subcommand)]
pub enum Command {
    /// A bare blob, served by a daemon behind an emulated /dev/cachefiles.
    Blob(BlobRun),
    /// A bare client that fetches, decodes, verifies and writes, and nothing else.
    Floor(FloorRun),
    /// The files of a mounted tree.
    Mount(MountRun),
    /// A made-up tree of files, the same everywhere, for an image to measure with.
    Tree(Tree),
    /// An HTML page with plots of one or more runs.
    Page(Pages),
}

#[derive(Args)]
pub struct BlobRun {
    /// The folder of the image: image.boot and its blob.
    #[arg(long)]
    pub image: PathBuf,
    /// HOST:PORT of tools/origin, which serves the same folder.
    #[arg(long)]
    pub origin: String,
    /// Where caches are made and removed again: the file system is part of the measurement.
    #[arg(long)]
    pub work: PathBuf,
    /// Register the image with prefetch.
    #[arg(long)]
    pub prefetch: bool,
    /// Ask the daemon to check digests (ours always does).
    #[arg(long)]
    pub validate: bool,
    /// Register the image so many times, each under a domain of its own.
    #[arg(long, default_value_t = 1)]
    pub images: usize,
    /// Of these, open so many; readers take turns.
    #[arg(long, default_value_t = 1)]
    pub open: usize,
    /// Beside it, four readers read another image, whose registry is dead.
    #[arg(long, value_enum)]
    pub beside: Option<Dead>,
    /// Read the bootstrap instead of the blob.
    #[arg(long)]
    pub metadata: bool,
    /// Wait between opening and reading.
    #[arg(long, default_value_t = 0)]
    pub settle_ms: u64,
    /// Compare what the cache holds at the end with the image.
    #[arg(long)]
    pub verify: bool,
    #[command(flatten)]
    pub load: Load,
    /// The daemon and its options; {cache}, {state} and {socket} are replaced.
    #[arg(last = true, required = true)]
    pub daemon: Vec<String>,
}

#[derive(Args)]
pub struct FloorRun {
    /// The folder of the image.
    #[arg(long)]
    pub image: PathBuf,
    /// HOST:PORT of tools/origin.
    #[arg(long)]
    pub origin: String,
    /// Where the file is written.
    #[arg(long)]
    pub work: PathBuf,
    /// Fetch so many bytes of the address space per GET.
    #[arg(long, default_value_t = 0)]
    pub ahead: u64,
    #[command(flatten)]
    pub load: Load,
}

#[derive(Args)]
pub struct MountRun {
    /// Where the tree is mounted.
    #[arg(long)]
    pub path: PathBuf,
    /// HOST:PORT of tools/origin, for its counters.
    #[arg(long)]
    pub origin: Option<String>,
    /// The daemon whose time and memory count.
    #[arg(long)]
    pub pid: Option<u32>,
    #[command(flatten)]
    pub load: Load,
}

#[derive(Args)]
pub struct Tree {
    /// The folder to make.
    #[arg(long)]
    pub out: PathBuf,
    /// How much, in MiB.
    #[arg(long)]
    pub mib: u64,
    /// Other bytes.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
}

#[derive(Args)]
pub struct Pages {
    /// The page.
    #[arg(long)]
    pub out: PathBuf,
    /// JSON of runs.
    #[arg(required = true)]
    pub runs: Vec<PathBuf>,
}

/// How reads are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Order {
    /// One read in every slot, in random order.
    Random,
    /// Everything in order; each reader has a stripe.
    Sequential,
    /// As a file says: lines of `[NAME] OFFSET LENGTH`.
    Trace,
}

/// The load.
#[derive(Args)]
pub struct Load {
    /// How reads are chosen.
    #[arg(long, value_enum, default_value_t = Order::Random)]
    pub order: Order,
    /// Bytes of one read, in KiB.
    #[arg(long, default_value_t = 4)]
    pub block_kib: u64,
    /// Random reads: one in each so many KiB.
    #[arg(long, default_value_t = 1024)]
    pub slot_kib: u64,
    /// Random reads: another order and other pages.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The trace.
    #[arg(long, required_if_eq("order", "trace"))]
    pub trace: Option<PathBuf>,
    /// Reads that may be under way at once.
    #[arg(long, default_value_t = 1, value_parser = readers)]
    pub readers: usize,
    /// Reads per second of all readers; without it each reads on as soon as it can.
    #[arg(long)]
    pub rate: Option<f64>,
    /// At most so many reads.
    #[arg(long, default_value_t = usize::MAX)]
    pub limit: usize,
    /// What to call the run.
    #[arg(long)]
    name: Option<String>,
    /// Where the results go as JSON.
    #[arg(long)]
    pub json: Option<PathBuf>,
}

fn readers(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count @ 1..=64) => Ok(count),
        _ => Err("1 to 64".to_owned()),
    }
}

impl Load {
    /// The reads of `files`.
    pub fn plan(&self, files: &[Extent]) -> io::Result<Plan> {
        let block = self.block_kib * KIB;
        let pattern = match self.order {
            Order::Random => Pattern::Random { block, slot: self.slot_kib * KIB, seed: self.seed },
            Order::Sequential => Pattern::Sequential { block },
            Order::Trace => {
                let path = self.trace.as_ref().expect("clap requires it");
                Pattern::Trace(std::fs::read_to_string(path)?)
            }
        };
        let plan = Plan::new(&pattern, files, self.readers, self.limit)?;
        match plan.count() {
            0 => Err(io::Error::other("nothing to read: too small for one slot?")),
            _ => Ok(plan),
        }
    }

    /// What the run is called.
    pub fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| {
            let order = format!("{:?}", self.order).to_lowercase();
            format!("{order} {} KiB, {} readers", self.block_kib, self.readers)
        })
    }

    /// For the record.
    pub fn settings(&self) -> Value {
        json!({
            "order": format!("{:?}", self.order).to_lowercase(),
            "block_kib": self.block_kib, "slot_kib": self.slot_kib, "seed": self.seed,
            "readers": self.readers, "rate": self.rate,
        })
    }
}
