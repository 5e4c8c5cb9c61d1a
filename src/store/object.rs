//! One cache object behind the cachefiles door: filled through the anonymous file the kernel gave
//! us.
//!
//! The kernel writes what we fill straight to the backing file, synchronously, and rounds a start
//! that is not page-aligned down without moving the data: so offset, length and memory must be
//! multiples of 4096 bytes (leases are). Presence is the backing file's map of data and holes. The
//! file is closed when the last holder of the object is gone, never while a fill is in flight.

use std::ops::Range;
use std::os::fd::OwnedFd;

use crate::engine::{Call, Core, Fd, Lease};
use crate::error::{Error, Result};

/// Offset, length and memory of a fill are multiples of this.
pub const FILL_ALIGNMENT: u64 = 4096;

/// A cache object that the kernel has opened for us.
#[derive(Debug)]
pub struct CacheObject {
    fd: Fd,
    /// Closes the file at the end; absent in simulations, where numbers are only numbers.
    _guard: Option<OwnedFd>,
    size: u64,
}

impl CacheObject {
    /// An object of `size` bytes behind `fd`.
    pub fn new(fd: Fd, guard: Option<OwnedFd>, size: u64) -> Self {
        CacheObject { fd, _guard: guard, size }
    }

    /// The anonymous file.
    pub fn fd(&self) -> Fd {
        self.fd
    }

    /// Bytes of the object as announced to the kernel.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Writes `lease[range]` at `offset`, all of it.
    ///
    /// # Errors
    /// What the cache's file system says, ENOSPC among it. What was written in part stays: it is
    /// verified data, and the same bytes will be written over it.
    pub async fn fill(
        &self,
        core: &Core,
        mut lease: Lease,
        range: Range<usize>,
        offset: u64,
    ) -> (Lease, Result<()>) {
        assert_eq!(offset % FILL_ALIGNMENT, 0, "fills are page-aligned");
        assert_eq!(range.start as u64 % FILL_ALIGNMENT, 0, "fills come from aligned memory");
        assert_eq!(range.len() as u64 % FILL_ALIGNMENT, 0, "fills are whole pages");
        let mut at = range.start;
        while at < range.end {
            let place = offset + (at - range.start) as u64;
            let written;
            (lease, written) = core.write_at(self.fd, lease, at..range.end, place).await;
            match written {
                Ok(0) => return (lease, Err(Error::system(libc::EIO, "the cache took no bytes"))),
                Ok(count) => at += count,
                Err(Error::System { errno: libc::EINTR, .. }) => {}
                Err(error) => return (lease, Err(error.context("cannot write to the cache"))),
            }
        }
        (lease, Ok(()))
    }

    /// Whether the kernel has attached the file of the cache. It does so a little after the OPEN is
    /// answered; before, it tells of no data and takes none (ENOBUFS).
    pub fn is_attached(&self, core: &Core) -> bool {
        core.call(Call::Seek(self.fd, 0, libc::SEEK_END)).is_ok()
    }

    /// Whether a part of `range` is a hole.
    pub fn has_hole(&self, core: &Core, range: &Range<u64>) -> bool {
        match core.call(Call::Seek(self.fd, range.start, libc::SEEK_HOLE)) {
            Ok(hole) => hole < range.end,
            // ENXIO: the file ends before the range.
            Err(_) => true,
        }
    }

    /// The next run of data at or after `from`, or `None` when only holes follow.
    pub fn next_data(&self, core: &Core, from: u64) -> Option<Range<u64>> {
        let start = core.call(Call::Seek(self.fd, from, libc::SEEK_DATA)).ok()?;
        let end = core.call(Call::Seek(self.fd, start, libc::SEEK_HOLE)).ok()?;
        (end > start).then_some(start..end)
    }
}
