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
    // Every third chunk, far apart, so that no read-ahead covers those that are counted.
    let chunks: Vec<_> = truth.chunks().collect();
    let (warm, cold): (Vec<_>, Vec<_>) = chunks.iter().partition(|chunk| chunk.0 % 3 == 0);
    let read = |chunk| {
        let range = truth.range(chunk);
        let got = node.kernel.read(&object, range.clone()).expect("a healthy registry");
        assert!(got == truth.bytes[range.start as usize..range.end as usize]);
    };
    warm.into_iter().rev().for_each(read);
    let before = node.count(Counter::ChunksFilled);
    let cold: Vec<_> = cold.into_iter().rev().collect();
    let allocations = counted(&threads("core-"), || cold.into_iter().for_each(read));
    let filled = node.count(Counter::ChunksFilled) - before;
    assert!(filled > 50, "only {filled} chunks were cold");
    let bytes = BYTES.load(Ordering::Relaxed);
    assert_eq!(allocations, 0, "{allocations} allocations, {bytes} bytes, in {filled} cold faults");
}
