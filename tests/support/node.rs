//! A node of one's own: workers, catalog and counters in this process, a test's kernel in front of
//! them, any registry behind them.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use sluice::blob::catalog::Catalog;
use sluice::blob::crew::MakeRoom;
use sluice::blob::journal::{Journal, Level, Line};
use sluice::blob::registration::{ImageSpec, PrefetchConfig};
use sluice::blob::statistics::{Counter, Counters};
use sluice::cli::cores_allowed;
use sluice::config::Intake;
use sluice::daemon::keeper::Ending;
use sluice::daemon::worker::{WorkerParts, Workers};
use sluice::registry::config::Backend;
use sluice::registry::route::Shared;
use sluice::upcall::device::Device;
use sluice::upcall::objects::DoorMail;
use tempfile::TempDir;

use super::kernel::{Kernel, Object};
use super::truth::Truth;

pub struct Node {
    pub kernel: Arc<Kernel>,
    pub catalog: Arc<Catalog>,
    pub counters: Arc<Counters>,
    pub log: crossbeam_channel::Receiver<Line>,
    journal: Arc<Journal>,
    workers: Option<Workers>,
    /// The device for successors: what a keeper would hold.
    held: OwnedFd,
}

/// How a node differs from the usual one.
pub struct Options {
    pub cores: usize,
    pub intake: Intake,
    pub deadline_ms: u64,
    /// The backend's own `timeout`, in seconds.
    pub timeout_s: u64,
    /// Makes room on a full disk.
    pub make_room: MakeRoom,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            cores: 2,
            intake: Intake::Every,
            deadline_ms: 20_000,
            timeout_s: 2,
            make_room: Arc::new(|_| 0),
        }
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
        let held = device.try_clone().expect("a number");
        let device = Arc::new(Device::of_socket(device));
        let catalog = Arc::new(Catalog::default());
        let (workers, counters) = work(options, Some(device), &catalog, &journal);
        let kernel = Arc::new(kernel);
        Node { kernel, catalog, counters, log, journal, workers: Some(workers), held }
    }

    /// The daemon goes, the device is held, and another daemon comes that knows nothing yet. It
    /// serves when told to, after whatever the test does meanwhile.
    pub fn succeed(&mut self, options: &Options) -> Arc<Device> {
        if let Some(workers) = self.workers.take() {
            workers.stop(Ending::HandOver);
        }
        self.kernel.lose_daemon();
        self.catalog = Arc::new(Catalog::default());
        let (workers, counters) = work(options, None, &self.catalog, &self.journal);
        (self.workers, self.counters) = (Some(workers), counters);
        Arc::new(Device::of_socket(self.held.try_clone().expect("a number")).inherited())
    }

    /// The successor serves from now on.
    pub fn serve(&self, device: &Arc<Device>) {
        device.restore().expect("the kernel listens");
        for door in self.workers.as_ref().expect("they run").doors() {
            assert!(door.send(DoorMail::Begin(Arc::clone(device))).is_ok());
        }
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
        self.register_as(&truth.domain, truth, backend, PrefetchConfig::default());
    }

    /// The same under a domain of one's own.
    pub fn register_as(
        &self,
        domain: &str,
        truth: &Truth,
        backend: Backend,
        prefetch: PrefetchConfig,
    ) {
        let spec = ImageSpec {
            domain_id: domain.into(),
            id: domain.into(),
            config_id: "test".into(),
            metadata_path: truth.bootstrap.clone(),
            backend,
            work_dir: std::env::temp_dir(),
            prefetch,
        };
        self.catalog.register(spec).expect("a good image");
    }

    /// From now on all images count as mounted before this daemon came: their registries have been
    /// well.
    pub fn were_in_use(&self) {
        self.catalog.images().iter().for_each(|image| image.touches.resume());
    }

    /// Opens the image's blob.
    pub fn open(&self, truth: &Truth) -> Object {
        let object = self.kernel.open(&truth.domain, &truth.blob_id).expect("it is registered");
        assert_eq!(object.size, truth.bytes.len() as u64);
        object
    }

    /// Reads all chunks in an order of one's own and compares them; gives how many were EIO.
    pub fn read_all(&self, truth: &Truth, object: &Object, order: u64) -> usize {
        read_all(&self.kernel, truth, object, order)
    }

    /// A counter's sum over all cores.
    pub fn count(&self, counter: Counter) -> u64 {
        self.counters.total(counter)
    }

    /// Stops the workers; what the kernel still waits for then fails.
    pub fn stop(&mut self) {
        if let Some(workers) = self.workers.take() {
            workers.stop(Ending::Done);
            self.kernel.fail_all();
        }
    }

    /// What the journal said, so far.
    pub fn lines(&self) -> Vec<String> {
        self.log.try_iter().map(|line| line.text).collect()
    }
}

/// What a reader does that compares, whichever daemon answers.
pub fn read_all(kernel: &Kernel, truth: &Truth, object: &Object, order: u64) -> usize {
    let mut chunks: Vec<_> = truth.chunks().collect();
    let mut state = order;
    for place in (1..chunks.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(order | 1);
        chunks.swap(place, (state >> 33) as usize % (place + 1));
    }
    let mut refused = 0;
    for chunk in chunks {
        let range = truth.range(chunk);
        match kernel.read(object, range.clone()) {
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

/// Workers over a device, or without one yet.
fn work(
    options: &Options,
    device: Option<Arc<Device>>,
    catalog: &Arc<Catalog>,
    journal: &Arc<Journal>,
) -> (Workers, Arc<Counters>) {
    let cpus = cores_allowed().expect("a list of CPUs");
    let cpus = cpus.iter().cycle().copied().take(options.cores).collect::<Vec<_>>();
    let counters = Counters::new(cpus.len());
    let parts = WorkerParts {
        device,
        intake: options.intake,
        watch: None,
        catalog: Arc::clone(catalog),
        journal: Arc::clone(journal),
        counters: Arc::clone(&counters),
        routes: Shared::at(None, Path::new("/nonexistent")),
        fault_deadline_ms: options.deadline_ms,
        make_room: Arc::clone(&options.make_room),
        cpus,
    };
    (Workers::start(&parts).expect("workers start"), counters)
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
