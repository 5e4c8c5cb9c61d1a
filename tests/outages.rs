//! A registry that is away for a while costs its readers time; one that stays away, an error at
//! their deadline and not before. One that has never been there is told of soon.

mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sluice::blob::registration::PrefetchConfig;
use sluice::blob::statistics::Counter;
use sluice::registry::config::Backend;
use support::daemon::comes_true;
use support::kernel::PATIENCE;
use support::node::{Node, Options, cache};
use support::registry::Registry;
use support::truth::Truth;

/// Longer than any test waits.
const LONG_MS: u64 = 200_000;
/// Requests of a reader who would take an outage for an error.
const HASTY: usize = 40;

fn options(deadline_ms: u64) -> Options {
    Options { cores: 1, deadline_ms, ..Options::default() }
}

fn page(truth: &Truth, place: usize) -> std::ops::Range<u64> {
    let start = truth.range(truth.chunks().nth(place).expect("so many chunks")).start;
    start / 4096 * 4096..(start / 4096 + 1) * 4096
}

/// The first `count` requests are answered so, and one reader waits them out.
fn is_waited_out(image: &str, count: usize, effect: &Value) {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of(image), options(LONG_MS));
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    node.were_in_use();
    let object = node.open(&truth);
    registry.fault(json!([{"blob": "", "count": count, "effect": effect}]));
    let range = page(&truth, 0);
    let bytes = node.kernel.read(&object, range.clone()).expect("the registry came back");
    assert!(bytes == truth.bytes[range.start as usize..range.end as usize]);
    assert!(registry.blob_reads().len() > count, "it was away");
}

#[test]
fn reader_learns_soon_that_nothing_ever_came_and_waits_once_something_has() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), options(LONG_MS));
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    registry.fault(json!([{"blob": "", "effect": {"status": 503}}]));
    assert_eq!(node.kernel.read(&object, page(&truth, 0)), Err(nix::libc::EIO));
    registry.heal();
    node.kernel.read(&object, page(&truth, 0)).expect("a failure is not for ever");
    registry.fault(json!([{"blob": "", "count": HASTY + 1, "effect": {"status": 503}}]));
    node.kernel.read(&object, page(&truth, 10)).expect("it has been well");
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
    let mut registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), options(4_000));
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    node.were_in_use();
    let object = node.open(&truth);
    registry.kill();
    let began = Instant::now();
    assert_eq!(node.kernel.read(&object, page(&truth, 0)), Err(nix::libc::EIO));
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(options.deadline_ms), "{took:?}");
    assert!(took < Duration::from_millis(2 * options.deadline_ms), "{took:?}");
    let blames = |line: &String| line.contains("units") && line.contains("refused");
    let mut lines = Vec::new();
    let is_said = || {
        lines.extend(node.lines());
        lines.iter().any(blames)
    };
    assert!(until(is_said), "the flight says why");
}

#[test]
fn registry_that_asks_for_a_pause_gets_it_from_all_readers() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), options(LONG_MS));
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    registry.fault(json!([{"blob": "", "count": 1, "effect": {"too_many": 2}}]));
    registry.forget();
    let began = Instant::now();
    let one = node.kernel.ask_read(&object, page(&truth, 20));
    // Its answer is on the way when it is in the registry's log; the daemon has it soon.
    assert!(comes_true(|| !registry.blob_reads().is_empty()));
    let others: Vec<_> =
        (0..10).map(|place| node.kernel.ask_read(&object, page(&truth, 19 - place))).collect();
    let (last, others) = others.split_last().expect("there are ten");
    assert!(last.recv_timeout(PATIENCE).expect("answered") >= 0);
    assert!(began.elapsed() >= Duration::from_secs(2), "{:?}", began.elapsed());
    for answer in others.iter().chain([&one]) {
        assert!(answer.recv_timeout(PATIENCE).expect("answered") >= 0);
    }
    assert_eq!(registry.blob_reads().len(), 1 + 11, "one too many, and one for each reader");
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
        let registry = Registry::with_images(&[]);
        let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), options(LONG_MS));
        let mut node = Node::start(cache.path(), &options);
        node.register(&truth, registry.address(), &options);
        node.were_in_use();
        let object = node.open(&truth);
        registry.fault(json!([{"blob": "", "effect": effect}]));
        let waiting = node.kernel.ask_read(&object, page(&truth, 0));
        assert!(comes_true(|| !registry.blob_reads().is_empty()));
        let began = Instant::now();
        node.stop();
        assert!(began.elapsed() < Duration::from_secs(3), "{effect}: {:?}", began.elapsed());
        assert_eq!(node.kernel.unanswered(), 0);
        drop(waiting);
    }
}

#[test]
fn object_that_is_closed_is_asked_for_no_longer() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), options(LONG_MS));
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    node.were_in_use();
    let object = node.open(&truth);
    registry.fault(json!([{"blob": "", "effect": {"status": 503}}]));
    let answer = node.kernel.ask_read(&object, page(&truth, 0));
    assert!(comes_true(|| node.count(Counter::Retries) > 0));
    node.kernel.close(&object);
    answer.recv_timeout(PATIENCE).expect("long before its deadline");
}

fn open_prefetched(node: &Node, truth: &Truth, address: &str) -> support::kernel::Object {
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
