//! An allocator that counts what some threads ask for.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};

/// The system's allocator, counted.
pub struct Counting;

static IS_COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);
/// Bytes of what was counted last.
pub static BYTES: AtomicU64 = AtomicU64::new(0);
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

/// Threads of this process by the beginning of their name.
pub fn threads(prefix: &str) -> Vec<i32> {
    let tasks = std::fs::read_dir("/proc/self/task").expect("there are threads");
    let named = tasks.filter_map(|task| {
        let path = task.ok()?.path();
        let name = std::fs::read_to_string(path.join("comm")).ok()?;
        let number = path.file_name()?.to_str()?.parse().ok()?;
        name.starts_with(prefix).then_some(number)
    });
    named.collect()
}

/// How often the threads of these numbers allocate while something is done.
pub fn counted(cores: &[i32], work: impl FnOnce()) -> u64 {
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
