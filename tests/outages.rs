//! A registry that is away for a while costs its readers time; one that stays away, an error at
//! their deadline and not before. One that has never been there is told of soon.

mod support;

use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice::blob::registration::PrefetchConfig;
use sluice::blob::statistics::Counter;
use sluice::registry::config::Backend;
use support::daemon::comes_true;
use support::kernel::{Object, PATIENCE};
use support::node::{Node, Options, cache};
use support::registry::Registry;
use support::truth::Truth;
use tempfile::TempDir;

/// Longer than any test waits.
const LONG_MS: u64 = 200_000;
/// Requests of a reader who would take an outage for an error.
const HASTY: usize = 40;
/// Readers of one repository: more than a core serves at once.
const CROWD: usize = 100;

fn options(deadline_ms: u64) -> Options {
    Options { cores: 1, deadline_ms, ..Options::default() }
}

/// An image that somebody reads, whose registry is about to be away.
struct Scene {
    node: Node,
    registry: Registry,
    truth: Truth,
    object: Object,
    _cache: TempDir,
}

impl Scene {
    /// One that nothing has come of yet.
    fn new(image: &str, deadline_ms: u64) -> Scene {
        let registry = Registry::with_images(&[]);
        let (cache, truth, options) = (cache(), Truth::of(image), options(deadline_ms));
        let node = Node::start(cache.path(), &options);
        node.register(&truth, registry.address(), &options);
        let object = node.open(&truth);
        Scene { node, registry, truth, object, _cache: cache }
    }

    /// One that was mounted before.
    fn in_use(image: &str, deadline_ms: u64) -> Scene {
        let scene = Scene::new(image, deadline_ms);
        scene.node.were_in_use();
        scene
    }

    /// Reads the first page of a chunk.
    fn read(&self, place: usize) -> Result<Vec<u8>, i32> {
        self.node.kernel.read(&self.object, page(&self.truth, place))
    }

    fn ask(&self, place: usize) -> Receiver<i64> {
        self.node.kernel.ask_read(&self.object, page(&self.truth, place))
    }
}

fn page(truth: &Truth, place: usize) -> std::ops::Range<u64> {
    let start = truth.range(truth.chunks().nth(place).expect("so many chunks")).start;
    start / 4096 * 4096..(start / 4096 + 1) * 4096
}

/// The first `count` requests are answered so, and one reader waits them out.
fn is_waited_out(image: &str, count: usize, effect: &Value) {
    let scene = Scene::in_use(image, LONG_MS);
    scene.registry.fault(json!([{"blob": "", "count": count, "effect": effect}]));
    let bytes = scene.read(0).expect("the registry came back");
    let range = page(&scene.truth, 0);
    assert!(bytes == scene.truth.bytes[range.start as usize..range.end as usize]);
    assert!(scene.registry.blob_reads().len() > count, "it was away");
}

#[test]
fn reader_learns_soon_that_nothing_ever_came_and_waits_once_something_has() {
    let scene = Scene::new("zstd-64k", LONG_MS);
    scene.registry.fault(json!([{"blob": "", "effect": {"status": 503}}]));
    assert_eq!(scene.read(0), Err(nix::libc::EIO));
    scene.registry.heal();
    scene.read(0).expect("a failure is not for ever");
    scene.registry.fault(json!([{"blob": "", "count": HASTY + 1, "effect": {"status": 503}}]));
    scene.read(10).expect("it has been well");
}

#[test]
fn reader_waits_out_a_registry_that_is_unavailable() {
    is_waited_out("zstd-64k", HASTY + 1, &json!({"status": 503}));
}

#[test]
fn reader_waits_out_a_registry_that_breaks_connections() {
    is_waited_out("zstd-64k", HASTY + 1, &json!({"reset": 0}));
}

#[test]
fn reader_who_needs_a_context_table_first_waits_as_well() {
    is_waited_out("zran", HASTY / 4 + 1, &json!({"status": 503}));
}

#[test]
fn reader_of_a_registry_that_is_gone_gets_eio_at_the_deadline() {
    let mut scene = Scene::in_use("zstd-64k", 4_000);
    scene.registry.kill();
    let began = Instant::now();
    assert_eq!(scene.read(0), Err(nix::libc::EIO));
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(4) && took < Duration::from_secs(8), "{took:?}");
    let blames = |line: &String| line.contains("units") && line.contains("refused");
    let mut lines = Vec::new();
    let is_said = || {
        lines.extend(scene.node.lines());
        lines.iter().any(blames)
    };
    assert!(until(is_said), "the flight says why");
}

#[test]
fn crowd_that_waits_for_its_turn_is_answered_by_its_deadline() {
    let mut scene = Scene::in_use("zstd-64k", 4_000);
    scene.registry.kill();
    let began = Instant::now();
    let crowd: Vec<_> = (0..CROWD).rev().map(|place| scene.ask(place)).collect();
    for answer in crowd {
        answer.recv_timeout(PATIENCE).expect("answered");
    }
    let took = began.elapsed();
    assert!(took >= Duration::from_secs(4) && took < Duration::from_secs(8), "{took:?}");
    assert_eq!(scene.node.count(Counter::ReadsFailed), CROWD as u64);
}

#[test]
fn crowd_that_waits_for_its_turn_is_served_when_the_registry_is_back() {
    let scene = Scene::in_use("zstd-64k", LONG_MS);
    scene.registry.fault(json!([{"blob": "", "effect": {"status": 503}}]));
    let crowd: Vec<_> = (0..CROWD).rev().map(|place| scene.ask(place)).collect();
    assert!(comes_true(|| scene.node.count(Counter::Retries) > 100), "it is away");
    assert!(crowd.iter().all(|answer| answer.try_recv().is_err()), "they wait");
    scene.registry.heal();
    for answer in crowd {
        answer.recv_timeout(PATIENCE).expect("answered");
    }
    assert_eq!(scene.node.count(Counter::ReadsFailed), 0);
}

#[test]
fn registry_that_asks_for_a_pause_gets_it_from_all_readers() {
    let scene = Scene::new("zstd-64k", LONG_MS);
    scene.registry.fault(json!([{"blob": "", "count": 1, "effect": {"too_many": 2}}]));
    scene.registry.forget();
    let began = Instant::now();
    let one = scene.ask(20);
    // Its answer is on the way when it is in the registry's log; the daemon has it soon.
    assert!(comes_true(|| !scene.registry.blob_reads().is_empty()));
    let others: Vec<_> = (0..10).map(|place| scene.ask(19 - place)).collect();
    let (last, others) = others.split_last().expect("there are ten");
    assert!(last.recv_timeout(PATIENCE).expect("answered") >= 0);
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
    for answer in others.iter().chain([&one]) {
        assert!(answer.recv_timeout(PATIENCE).expect("answered") >= 0);
    }
    let reads = scene.registry.blob_reads().len();
    assert_eq!(reads, 1 + 11, "one too many, and one for each reader");
}

#[test]
fn reader_who_waits_for_what_is_fetched_ahead_outlasts_it() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), options(LONG_MS));
    let node = Node::start(cache.path(), &options);
    registry.fault(json!([{"blob": "", "effect": {"status": 503}}]));
    let object = open_prefetched(&node, &truth, registry.address());
    assert!(comes_true(|| node.count(Counter::Retries) > 0), "it is fetched ahead");
    let answer = node.kernel.ask_read(&object, page(&truth, 0));
    let mut given_up = 0;
    let is_given_up = || {
        given_up += node.lines().iter().filter(|line| line.contains("prefetch goes on in")).count();
        given_up >= 2
    };
    assert!(until(is_given_up), "prefetch has few tries at a time");
    assert!(answer.try_recv().is_err(), "the reader has more");
    registry.heal();
    assert!(answer.recv_timeout(PATIENCE).expect("answered") >= 0);
}

#[test]
fn flight_that_moves_on_is_not_given_up() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), options(LONG_MS));
    let node = Node::start(cache.path(), &options);
    let units = (0..truth.layout.unit_count()).map(|unit| truth.layout.unit(unit));
    let longest = units.map(|unit| unit.compressed_size).max().expect("there are units");
    registry.fault(json!([{"blob": "", "effect": {"reset": longest + 1}}]));
    let _object = open_prefetched(&node, &truth, registry.address());
    let all = truth.chunks().count() as u64;
    assert!(comes_true(|| node.count(Counter::ChunksFilled) == all), "all of it is prefetched");
    let lines = node.lines();
    assert!(!lines.iter().any(|line| line.contains("prefetch goes on in")), "{lines:?}");
}

#[test]
fn stop_waits_for_no_outage() {
    for effect in [json!({"status": 503}), json!({"too_many": 60})] {
        let mut scene = Scene::in_use("zstd-64k", LONG_MS);
        scene.registry.fault(json!([{"blob": "", "effect": effect}]));
        let waiting: Vec<_> = (0..CROWD).rev().map(|place| scene.ask(place)).collect();
        assert!(comes_true(|| !scene.registry.blob_reads().is_empty()));
        let began = Instant::now();
        scene.node.stop();
        assert!(began.elapsed() < Duration::from_secs(3), "{effect}: {:?}", began.elapsed());
        assert_eq!(scene.node.kernel.unanswered(), 0);
        drop(waiting);
    }
}

#[test]
fn object_that_is_closed_is_asked_for_no_longer() {
    let scene = Scene::in_use("zstd-64k", LONG_MS);
    scene.registry.fault(json!([{"blob": "", "effect": {"status": 503}}]));
    let answer = scene.ask(0);
    assert!(comes_true(|| scene.node.count(Counter::Retries) > 0));
    scene.node.kernel.close(&scene.object);
    answer.recv_timeout(PATIENCE).expect("long before its deadline");
}

fn open_prefetched(node: &Node, truth: &Truth, address: &str) -> Object {
    let config = json!({
        "scheme": "http", "host": address, "repo": truth.domain.as_str(), "timeout": 2,
    });
    let backend = Backend::parse("registry", &config).expect("a good backend");
    let prefetch =
        PrefetchConfig { enable: true, merging_size_bytes: 1 << 20, ..PrefetchConfig::default() };
    node.register_as(&truth.domain, truth, backend, prefetch);
    node.were_in_use();
    node.open(truth)
}

/// As `comes_true`, for what has to remember.
fn until(is_so: impl FnMut() -> bool) -> bool {
    let is_so = std::cell::RefCell::new(is_so);
    comes_true(|| is_so.borrow_mut()())
}
