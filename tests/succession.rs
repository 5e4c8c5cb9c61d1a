//! One daemon after another at the same device, between a test's kernel and registryd: what readers
//! notice is a pause. The real kernel's part is tested in the guest, by tests/guest/succession.sh.

mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use serde_json::json;
use sluice::blob::statistics::Counter;
use sluice::config::Intake;
use support::kernel::{PATIENCE, REFUSALS_MAX};
use support::node::{Node, Options, cache, read_all};
use support::registry::Registry;
use support::truth::Truth;

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(1)); // tidy: polling
    }
}

#[test]
fn readers_under_load_never_notice_their_daemons_successors() {
    let registry = Registry::with_images(&[]);
    registry.fault(json!([{"blob": "", "effect": {"latency_ms": 20}}]));
    for intake in [Intake::Every, Intake::Exclusive, Intake::One, Intake::Spin] {
        let (cache, truth) = (cache(), Truth::of("zstd-64k"));
        let options = Options { intake, ..Options::default() };
        let mut node = Node::start(cache.path(), &options);
        node.register(&truth, registry.address(), &options);
        let object = node.open(&truth);
        let kernel = Arc::clone(&node.kernel);
        std::thread::scope(|scope| {
            for reader in 0..4 {
                let (kernel, truth, object) = (Arc::clone(&kernel), &truth, &object);
                scope.spawn(move || assert_eq!(read_all(&kernel, truth, object, reader), 0));
            }
            for _ in 0..3 {
                let reads = kernel.reads.load(Ordering::Relaxed);
                eventually("readers wait or are done", || {
                    kernel.reads.load(Ordering::Relaxed) > reads + 3
                        || (kernel.unanswered() == 0 && node.count(Counter::ChunksFilled) > 0)
                });
                let device = node.succeed(&options);
                node.register(&truth, registry.address(), &options);
                node.serve(&device);
            }
        });
        assert_eq!(node.read_all(&truth, &object, 9), 0);
    }
}

#[test]
fn what_the_dying_daemon_could_not_answer_its_successor_answers() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("lz4-1m"), Options::default());
    let mut node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    registry.fault(json!([{"blob": "", "effect": {"hang": true}}]));
    let first = truth.range(truth.chunks().next().unwrap());
    let answer = node.kernel.ask_read(&object, first.start..first.start + 4096);
    eventually("the daemon has it", || node.count(Counter::UpcallsRead) == 1);
    let since = Instant::now();
    let device = node.succeed(&options);
    // A hand-over does not wait for a dead registry as long as a stop does.
    assert!(since.elapsed() < Duration::from_secs(4), "{:?}", since.elapsed());
    assert_eq!(node.kernel.unanswered(), 1, "nobody was refused");
    registry.heal();
    node.register(&truth, registry.address(), &options);
    node.serve(&device);
    answer.recv_timeout(PATIENCE).expect("answered by the successor");
    assert_eq!(node.read_all(&truth, &object, 1), 0);
}

#[test]
fn an_open_waits_for_an_image_that_has_yet_to_come_back() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), Options::default());
    let mut node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    let device = node.succeed(&options);
    node.catalog.awaited.expect(&truth.domain);
    node.serve(&device);
    let kernel = Arc::clone(&node.kernel);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_all(&kernel, &truth, &object, 3));
        eventually("its domain goes first", || node.catalog.awaited.urgent().is_some());
        // Nothing is to come of this domain, so its open is answered at once.
        let _ = kernel.open("another", "another");
        assert_eq!(kernel.unanswered(), 2, "the open and its read");
        node.register(&truth, registry.address(), &options);
        node.catalog.awaited.settle(&truth.domain);
        assert_eq!(reader.join().expect("no panic"), 0);
    });
    assert_eq!(node.kernel.refusals(), 0);
}

#[test]
fn an_image_that_nobody_remembers_is_eio_not_a_circle_and_heals() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), Options::default());
    let mut node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    let device = node.succeed(&options);
    node.serve(&device);
    assert_eq!(node.read_all(&truth, &object, 1), truth.chunks().count());
    assert_eq!(node.kernel.refusals(), 0, "of {REFUSALS_MAX}: the kernel went round in circles");
    node.register(&truth, registry.address(), &options);
    eventually("it heals", || {
        node.kernel.lose_file(&object);
        node.read_all(&truth, &object, 2) == 0
    });
}

#[test]
fn a_read_for_an_object_of_the_predecessor_is_asked_for_again() {
    let registry = Registry::with_images(&[]);
    for intake in [Intake::Every, Intake::One] {
        let options = Options { intake, ..Options::default() };
        let (cache, truth) = (cache(), Truth::of("zstd-64k"));
        let mut node = Node::start(cache.path(), &options);
        node.register(&truth, registry.address(), &options);
        let object = node.open(&truth);
        // The predecessor's file of the object is still open when the successor begins.
        node.kernel.linger();
        let device = node.succeed(&options);
        node.register(&truth, registry.address(), &options);
        node.serve(&device);
        let start = truth.range(truth.chunks().next().unwrap()).start / 4096 * 4096;
        let answer = node.kernel.ask_read(&object, start..start + 4096);
        eventually("nobody knows the object", || {
            node.lines().iter().any(|line| line.contains("not open"))
        });
        assert!(answer.try_recv().is_err());
        node.kernel.end_lingering();
        answer.recv_timeout(PATIENCE).expect("asked for again and answered");
        assert_eq!(node.read_all(&truth, &object, 5), 0);
    }
}
