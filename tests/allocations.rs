//! Nothing allocates on the fault path after start: a counting allocator, and a reader of cold
//! chunks.
//!
//! Only the cores' threads are counted; the test's own kernel and registry allocate as they like.

mod support;

use std::sync::atomic::Ordering;

use sluice::blob::statistics::Counter;
use support::counting::{BYTES, Counting, counted, threads};
use support::node::{Node, Options, cache};
use support::registry::Registry;
use support::truth::Truth;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test, because the counter is the process's: first that it counts, then the fault path.
#[test]
fn cold_faults_allocate_nothing_after_start() {
    let myself = nix::unistd::gettid().as_raw();
    assert_eq!(counted(&[myself], || drop(std::hint::black_box(Box::new(7)))), 1);

    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), Options::default());
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    let read = |chunk| {
        let range = truth.range(chunk);
        let got = node.kernel.read(&object, range.clone()).expect("a healthy registry");
        assert!(got == truth.bytes[range.start as usize..range.end as usize]);
    };
    // A core's first fault makes what it keeps, and which core serves which fault is chance: with
    // two cores one of the rounds behind the first is quiet.
    let mut seen = Vec::new();
    for round in 0..3 {
        // Every third chunk, far apart, so that no read-ahead covers those that are counted.
        let cold: Vec<_> = truth.chunks().filter(|chunk| chunk.0 % 3 == round).collect();
        let before = node.count(Counter::ChunksFilled);
        let allocations = counted(&threads("core-"), || cold.into_iter().rev().for_each(read));
        let filled = node.count(Counter::ChunksFilled) - before;
        assert!(filled > 50, "only {filled} chunks were cold");
        seen.push((allocations, BYTES.load(Ordering::Relaxed), filled));
    }
    let is_quiet = seen[1..].iter().any(|&(allocations, ..)| allocations == 0);
    assert!(is_quiet, "allocations, their bytes so far, and cold faults of each round: {seen:?}");
}
