//! Nothing allocates on the fault path after start: a counting allocator, and a reader of cold
//! chunks.
//!
//! Only the cores' threads are counted; the test's own kernel and registry allocate as they like.
#![allow(unsafe_code)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

use sluice::blob::statistics::Counter;
use support::node::{Node, Options, cache};
use support::registry::Registry;
use support::truth::Truth;

struct Counting;

static IS_COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
static BYTES: AtomicU64 = AtomicU64::new(0);
/// The cores' thread numbers; 0 is an unused place.
static CORES: [AtomicI32; 8] = [const { AtomicI32::new(0) }; 8];

fn count(size: usize) {
    if !IS_COUNTING.load(Ordering::Relaxed) {
        return;
    }
    let thread = nix::unistd::gettid().as_raw();
    if CORES.iter().any(|core| core.load(Ordering::Relaxed) == thread) {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        BYTES.fetch_add(size as u64, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on to the system's allocator unchanged; counting touches only
// atomics.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(place, layout) }
    }

    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Threads of this process by the beginning of their name.
fn threads(prefix: &str) -> Vec<i32> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("there are threads");
    let named = tasks.filter_map(|task| {
        let path = task.ok()?.path();
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        let number = path.file_name()?.to_str()?.parse().ok()?;
        name.starts_with(prefix).then_some(number)
    });
    named.collect()
}

fn counted(cores: &[i32], work: impl FnOnce()) -> u64 {
    assert!(!cores.is_empty() && cores.len() <= CORES.len());
    for (place, core) in CORES.iter().zip(cores) {
        place.store(*core, Ordering::Relaxed);
    }
    ALLOCATIONS.store(0, Ordering::Relaxed);
    IS_COUNTING.store(true, Ordering::SeqCst);
    work();
    IS_COUNTING.store(false, Ordering::SeqCst);
    CORES.iter().for_each(|place| place.store(0, Ordering::Relaxed));
    ALLOCATIONS.load(Ordering::Relaxed)
}

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
