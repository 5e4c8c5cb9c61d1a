//! What a core asks of the world below it, as data, and the enum of the two worlds that answer.
//!
//! A [`Request`] is an operation that completes later; it owns the buffer it works on. A [`Call`]
//! is answered at once. Neither holds a pointer that outlives its submission: the ring resolves
//! leases to addresses, the simulated driver to bytes.

use std::net::SocketAddr;
use std::ops::Range;

use super::arena::Lease;
use super::ring::RingDriver;
use super::simulated::SimulatedDriver;

/// An open file, socket or device. A number only: whoever opened it closes it.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Fd(pub i32);

/// generation << 32 | slot index: what a completion is matched by.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
pub struct Token(pub u64);

impl Token {
    /// The token of one use of one slot.
    pub fn new(generation: u32, index: u32) -> Self {
        Token(u64::from(generation) << 32 | u64::from(index))
    }

    /// The slot.
    pub fn index(self) -> u32 {
        self.0 as u32
    }

    /// Which use of the slot.
    pub fn generation(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// An operation that completes later.
#[derive(Debug)]
pub enum Request {
    /// Nothing below: only a deadline. How a task sleeps.
    Park,
    /// One receive from a socket into `lease[range]`.
    Receive {
        /// The socket.
        fd: Fd,
        /// Owns the bytes until completion.
        lease: Lease,
        /// Where in the lease.
        range: Range<usize>,
    },
    /// One send to a socket of `lease[range]`.
    Send {
        /// The socket.
        fd: Fd,
        /// Owns the bytes until completion.
        lease: Lease,
        /// Where in the lease.
        range: Range<usize>,
    },
    /// One read at a file offset into `lease[range]`.
    ReadAt {
        /// The file.
        fd: Fd,
        /// Owns the bytes until completion.
        lease: Lease,
        /// Where in the lease.
        range: Range<usize>,
        /// Bytes from the start of the file.
        offset: u64,
    },
    /// One write at a file offset of `lease[range]`.
    WriteAt {
        /// The file.
        fd: Fd,
        /// Owns the bytes until completion.
        lease: Lease,
        /// Where in the lease.
        range: Range<usize>,
        /// Bytes from the start of the file.
        offset: u64,
    },
    /// Connect a socket.
    Connect {
        /// The socket.
        fd: Fd,
        /// The peer.
        address: SocketAddr,
    },
    /// Wait until the file is ready for `events` (poll(2) bits, with epoll's exclusive bit
    /// allowed).
    Poll {
        /// The file.
        fd: Fd,
        /// What to wait for.
        events: u32,
    },
}

impl Request {
    /// The lease of an operation that has one.
    pub fn into_lease(self) -> Option<Lease> {
        match self {
            Request::Receive { lease, .. }
            | Request::Send { lease, .. }
            | Request::ReadAt { lease, .. }
            | Request::WriteAt { lease, .. } => Some(lease),
            Request::Park | Request::Connect { .. } | Request::Poll { .. } => None,
        }
    }
}

/// A finished operation: the kernel's result, negative errno on failure.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Completion {
    /// Which operation.
    pub token: Token,
    /// Bytes, events or -errno.
    pub result: i32,
}

/// Something answered at once. The answer is a count or an offset; an error is an errno.
#[derive(Debug)]
pub enum Call<'a> {
    /// A TCP socket for the family of this address, without Nagle's delay.
    Socket(&'a SocketAddr),
    /// Close a file; its number is free afterwards.
    Close(Fd),
    /// read(2): for devices that answer at once.
    Read(Fd, &'a mut [u8]),
    /// write(2): for devices that answer at once.
    Write(Fd, &'a [u8]),
    /// pwrite(2): for plain files on a local disk, a slice at a time.
    WriteAt(Fd, &'a [u8], u64),
    /// lseek(2) with SEEK_DATA or SEEK_HOLE.
    Seek(Fd, u64, i32),
    /// ioctl(2) with a number as argument.
    Control(Fd, u64, u64),
}

/// The two worlds.
pub enum Driver {
    /// The kernel's, through one io_uring.
    Ring(Box<RingDriver>),
    /// A test's.
    Simulated(SimulatedDriver),
}

impl Driver {
    /// Takes an operation; its completion comes out of [`Driver::reap`] exactly once.
    pub fn submit(&mut self, token: Token, request: &mut Request) {
        match self {
            Driver::Ring(ring) => ring.submit(token, request),
            Driver::Simulated(simulated) => simulated.submit(token, request),
        }
    }

    /// Asks for an early end of an operation, which still completes exactly once.
    pub fn cancel(&mut self, token: Token) {
        match self {
            Driver::Ring(ring) => ring.cancel(token),
            Driver::Simulated(simulated) => simulated.cancel(token),
        }
    }

    /// The next completion that has arrived. `request` gives the operation for the simulated world
    /// to put received bytes into; the kernel has done that already.
    pub fn reap(&mut self) -> Option<Completion> {
        match self {
            Driver::Ring(ring) => ring.reap(),
            Driver::Simulated(simulated) => simulated.reap(),
        }
    }

    /// Hands received bytes of a simulated completion over; the ring's are in place.
    pub fn deliver(&mut self, completion: Completion, request: &mut Request) {
        if let Driver::Simulated(simulated) = self {
            simulated.deliver(completion, request);
        }
    }

    /// Tells the kernel of all operations submitted since the last time.
    pub fn flush(&mut self) {
        match self {
            Driver::Ring(ring) => ring.flush(),
            Driver::Simulated(_) => {}
        }
    }

    /// Sleeps until something completes, somebody wakes the core, or `deadline_ns` passes.
    pub fn wait(&mut self, deadline_ns: Option<u64>) {
        match self {
            Driver::Ring(ring) => ring.wait(deadline_ns),
            Driver::Simulated(_) => {}
        }
    }

    /// Nanoseconds on a clock that never goes back.
    pub fn now(&self) -> u64 {
        match self {
            Driver::Ring(_) => monotonic_ns(),
            Driver::Simulated(simulated) => simulated.now(),
        }
    }

    /// The same clock for work on helper threads; it stands still in simulations.
    pub fn clock(&self) -> fn() -> u64 {
        match self {
            Driver::Ring(_) => monotonic_ns,
            Driver::Simulated(_) => || 0,
        }
    }

    /// Does something that is answered at once.
    pub fn call(&mut self, call: Call<'_>) -> Result<u64, i32> {
        match self {
            Driver::Ring(_) => super::ring::system_call(call),
            Driver::Simulated(simulated) => simulated.call(call),
        }
    }
}

fn monotonic_ns() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .expect("the monotonic clock is always there");
    time.tv_sec() as u64 * crate::config::SECOND_NS + time.tv_nsec() as u64
}
