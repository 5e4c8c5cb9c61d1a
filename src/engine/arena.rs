//! Buffers: a per-core arena of three size classes, and the move-only handle to one buffer.
//!
//! A [`Lease`] owns its buffer until it is dropped; submitting an operation moves the lease into
//! the operation's slot, so the kernel never writes to memory that somebody else holds. Each lease
//! keeps the arena alive: a bug can leak a buffer, it can not free memory the kernel still writes
//! to. Free buffers are bits of one atomic word per class, so a lease may be dropped on any
//! thread. The arena is mapped without reserve; pages are touched when a buffer is first used.
#![allow(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::config::{
    ARENA_SIZE, LARGE_LEASE_SIZE, LARGE_LEASES, RANGE_LEASE_SIZE, RANGE_LEASES, WIRE_LEASE_SIZE,
    WIRE_LEASES,
};
use crate::error::{Error, Result};

/// The size class of a buffer.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Class {
    /// One receive, one request head: 64 KiB.
    Wire,
    /// The bytes of one GET: 1 MiB and slack.
    Range,
    /// A unit that fits no range lease: 16 MiB and slack.
    Large,
}

impl Class {
    /// All classes, in the order of the arena.
    pub const ALL: [Class; 3] = [Class::Wire, Class::Range, Class::Large];

    /// The smallest class whose buffers hold `size` bytes, if any does.
    pub fn holding(size: usize) -> Option<Class> {
        Class::ALL.into_iter().find(|class| size <= class.size())
    }

    /// Bytes of a buffer of this class.
    pub const fn size(self) -> usize {
        match self {
            Class::Wire => WIRE_LEASE_SIZE,
            Class::Range => RANGE_LEASE_SIZE,
            Class::Large => LARGE_LEASE_SIZE,
        }
    }

    /// Buffers of this class in an arena.
    pub const fn count(self) -> usize {
        match self {
            Class::Wire => WIRE_LEASES,
            Class::Range => RANGE_LEASES,
            Class::Large => LARGE_LEASES,
        }
    }

    const fn start(self) -> usize {
        match self {
            Class::Wire => 0,
            Class::Range => WIRE_LEASES * WIRE_LEASE_SIZE,
            Class::Large => WIRE_LEASES * WIRE_LEASE_SIZE + RANGE_LEASES * RANGE_LEASE_SIZE,
        }
    }
}

/// A core's buffers.
#[derive(Debug)]
pub struct Arena {
    base: NonNull<u8>,
    /// One bit per buffer, set while the buffer is free.
    free: [AtomicU64; 3],
}

// SAFETY: the mapping is plain memory; a buffer is reached only through the one lease whose bit was
// taken from `free` by an atomic operation, so two threads never hold the same bytes.
unsafe impl Send for Arena {}
// SAFETY: as above; all shared state is in the atomics.
unsafe impl Sync for Arena {}

impl Arena {
    /// Maps the address space of one core's buffers; no page is touched yet.
    pub fn new() -> Result<Arc<Arena>> {
        // SAFETY: an anonymous private mapping at an address the kernel chooses overlaps nothing.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                ARENA_SIZE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if address == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            return Err(Error::io(&error, "cannot map a core's buffers"));
        }
        // SAFETY: the mapping is ours, and advice changes no byte of it. Huge pages halve the time
        // of decompressing into it where memory is mapped twice, as in a virtual machine. A kernel
        // without them says no, which is no harm.
        unsafe { libc::madvise(address, ARENA_SIZE, libc::MADV_HUGEPAGE) };
        let base = NonNull::new(address.cast::<u8>()).expect("mmap never maps page zero");
        let free = Class::ALL.map(|class| AtomicU64::new(u64::MAX >> (64 - class.count())));
        Ok(Arc::new(Arena { base, free }))
    }

    /// Takes a free buffer, or `None` when all of the class are out.
    pub fn lease(self: &Arc<Arena>, class: Class) -> Option<Lease> {
        let word = &self.free[class as usize];
        let mut free = word.load(Ordering::Relaxed);
        while free != 0 {
            let bit = free & free.wrapping_neg();
            // Acquire pairs with the Release in Lease::drop: the former holder is done with the
            // bytes.
            match word.compare_exchange_weak(
                free,
                free & !bit,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    let index = bit.trailing_zeros();
                    return Some(Lease { arena: Arc::clone(self), class, index });
                }
                Err(now) => free = now,
            }
        }
        None
    }

    /// Free buffers of a class at this moment.
    pub fn free_count(&self, class: Class) -> usize {
        self.free[class as usize].load(Ordering::Relaxed).count_ones() as usize
    }

    /// Whether every buffer is at home: the oracle of "no lease leaks".
    pub fn is_whole(&self) -> bool {
        Class::ALL.into_iter().all(|class| self.free_count(class) == class.count())
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by new() with this size; every lease holds an Arc of the
        // arena, so none is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), ARENA_SIZE) };
    }
}

/// A buffer on loan, aligned to 4096 bytes.
#[must_use]
#[derive(Debug)]
pub struct Lease {
    arena: Arc<Arena>,
    class: Class,
    index: u32,
}

impl Lease {
    /// The class it was taken from.
    pub fn class(&self) -> Class {
        self.class
    }

    fn address(&self) -> *mut u8 {
        let offset = self.class.start() + self.index as usize * self.class.size();
        // SAFETY: class start + index * size lies inside the mapping for every index below count().
        unsafe { self.arena.base.as_ptr().add(offset) }
    }
}

impl Deref for Lease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the bytes are mapped for the arena's life and this lease is their only holder.
        unsafe { std::slice::from_raw_parts(self.address(), self.class.size()) }
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in deref(), and &mut self makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.address(), self.class.size()) }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if self.class == Class::Large {
            // Seldom used and big: give the pages back, or four of them would stay resident.
            // SAFETY: the range is this lease's own mapped bytes; nobody reads them afterwards
            // before writing them.
            unsafe {
                libc::madvise(self.address().cast(), self.class.size(), libc::MADV_DONTNEED);
            }
        }
        // Release pairs with the Acquire in Arena::lease.
        let before =
            self.arena.free[self.class as usize].fetch_or(1 << self.index, Ordering::Release);
        assert_eq!(before & (1 << self.index), 0, "a lease came home twice");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_and_disjoint() {
        let arena = Arena::new().unwrap();
        let mut leases = Vec::new();
        for class in Class::ALL {
            while let Some(mut lease) = arena.lease(class) {
                assert_eq!(lease.as_ptr() as usize % 4096, 0);
                let mark = leases.len() as u8;
                lease[0] = mark;
                let last = lease.len() - 1;
                lease[last] = mark;
                leases.push(lease);
            }
        }
        assert_eq!(leases.len(), WIRE_LEASES + RANGE_LEASES + LARGE_LEASES);
        for (mark, lease) in leases.iter().enumerate() {
            assert_eq!((lease[0], lease[lease.len() - 1]), (mark as u8, mark as u8));
        }
        drop(leases);
        assert!(arena.is_whole());
    }

    #[test]
    fn lease_dropped_on_another_thread_comes_home() {
        let arena = Arena::new().unwrap();
        let lease = arena.lease(Class::Range).unwrap();
        std::thread::spawn(move || drop(lease)).join().unwrap();
        assert!(arena.is_whole());
    }

    #[test]
    fn class_is_the_smallest_that_holds() {
        assert_eq!(Class::holding(1), Some(Class::Wire));
        assert_eq!(Class::holding(WIRE_LEASE_SIZE + 1), Some(Class::Range));
        assert_eq!(Class::holding(LARGE_LEASE_SIZE), Some(Class::Large));
        assert_eq!(Class::holding(LARGE_LEASE_SIZE + 1), None);
    }
}
