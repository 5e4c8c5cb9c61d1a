//! A node of one's own: workers, catalog and counters in this process, a test's kernel in front of
//! them, any registry behind them.

use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use sluice::blob::catalog::Catalog;
use sluice::blob::journal::{Journal, Level, Line};
use sluice::blob::registration::{ImageSpec, PrefetchConfig};
use sluice::blob::statistics::{Counter, Counters};
use sluice::cli::cores_allowed;
use sluice::config::Intake;
use sluice::daemon::worker::{WorkerParts, Workers};
use sluice::registry::config::Backend;
use sluice::registry::route::Shared;
use sluice::upcall::device::Device;
use tempfile::TempDir;

use super::kernel::{Kernel, Object};
use super::truth::Truth;

pub struct Node {
    pub kernel: Kernel,
    pub catalog: Arc<Catalog>,
    pub counters: Arc<Counters>,
    pub log: crossbeam_channel::Receiver<Line>,
    journal: Arc<Journal>,
    workers: Option<Workers>,
}

/// How a node differs from the usual one.
pub struct Options {
    pub cores: usize,
    pub intake: Intake,
    pub deadline_ms: u64,
    /// The backend's own `timeout`, in seconds.
    pub timeout_s: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options { cores: 2, intake: Intake::Every, deadline_ms: 20_000, timeout_s: 2 }
    }
}

/// A cache that goes away; on a real file system, because the fills are direct.
pub fn cache() -> TempDir {
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).expect("a folder under target")
}

impl Node {
    /// A node over a cache folder; stopped when dropped.
    pub fn start(cache: &Path, options: &Options) -> Node {
        let (kernel, device) = Kernel::new(cache);
        let (journal, log) = Journal::new(Level::Debug);
        let cpus = cores_allowed().expect("a list of CPUs");
        let cpus = cpus.iter().cycle().copied().take(options.cores).collect::<Vec<_>>();
        let parts = WorkerParts {
            device: Some(Arc::new(Device::of_socket(device))),
            intake: options.intake,
            watch: None,
            catalog: Arc::new(Catalog::default()),
            journal: Arc::clone(&journal),
            counters: Counters::new(cpus.len()),
            routes: Shared::at(None, Path::new("/nonexistent")),
            fault_deadline_ms: options.deadline_ms,
            make_room: Arc::new(|_| 0),
            cpus,
        };
        let workers = Workers::start(&parts).expect("workers start");
        let (catalog, counters) = (parts.catalog, parts.counters);
        Node { kernel, catalog, counters, log, journal, workers: Some(workers) }
    }

    /// Registers a test image whose blobs are at `address`.
    pub fn register(&self, truth: &Truth, address: &str, options: &Options) {
        let backend = json!({
            "scheme": "http", "host": address, "repo": truth.domain.as_str(),
            "timeout": options.timeout_s, "connect_timeout": 1,
        });
        self.register_at(truth, Backend::parse("registry", &backend).expect("a good backend"));
    }

    /// Registers a test image of any backend.
    pub fn register_at(&self, truth: &Truth, backend: Backend) {
        let spec = ImageSpec {
            domain_id: truth.domain.clone(),
            id: truth.domain.clone(),
            config_id: "test".into(),
            metadata_path: truth.bootstrap.clone(),
            backend,
            work_dir: std::env::temp_dir(),
            prefetch: PrefetchConfig::default(),
        };
        self.catalog.register(spec).expect("a good image");
    }

    /// Opens the image's blob.
    pub fn open(&self, truth: &Truth) -> Object {
        let object = self.kernel.open(&truth.domain, &truth.blob_id).expect("it is registered");
        assert_eq!(object.size, truth.bytes.len() as u64);
        object
    }

    /// Reads all chunks in an order of one's own and compares them; gives how many were EIO.
    pub fn read_all(&self, truth: &Truth, object: &Object, order: u64) -> usize {
        let mut chunks: Vec<_> = truth.chunks().collect();
        let mut state = order;
        for place in (1..chunks.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(order | 1);
            chunks.swap(place, (state >> 33) as usize % (place + 1));
        }
        let mut refused = 0;
        for chunk in chunks {
            let range = truth.range(chunk);
            match self.kernel.read(object, range.clone()) {
                Ok(bytes) => {
                    let right = &truth.bytes[range.start as usize..range.end as usize];
                    let wrong = bytes.iter().zip(right).position(|(got, right)| got != right);
                    let zeros = bytes.iter().filter(|&&byte| byte == 0).count();
                    let size = bytes.len();
                    assert_eq!(wrong, None, "{chunk:?} at {range:?}: {zeros} zeros of {size}");
                }
                Err(errno) => {
                    assert_eq!(errno, nix::libc::EIO);
                    refused += 1;
                }
            }
        }
        refused
    }

    /// A counter's sum over all cores.
    pub fn count(&self, counter: Counter) -> u64 {
        self.counters.total(counter)
    }

    /// Stops the workers; what the kernel still waits for then fails.
    pub fn stop(&mut self) {
        if let Some(workers) = self.workers.take() {
            workers.stop();
            self.kernel.fail_all();
        }
    }

    /// What the journal said, so far.
    pub fn lines(&self) -> Vec<String> {
        self.log.try_iter().map(|line| line.text).collect()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.stop();
        if std::thread::panicking() {
            self.lines().iter().for_each(|line| eprintln!("log: {line}"));
        }
        let _ = &self.journal;
    }
}
