//! The driver over the kernel: one io_uring, owned by one thread, and the system calls that are
//! answered at once.
//!
//! Callers keep true: a request handed to [`RingDriver::submit`] stays in place, with its lease,
//! until its completion has been reaped (the slot table does that). The ring never grows its
//! memory after start and never runs code of the caller.
#![allow(unsafe_code)]

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue, types};
use nix::sys::socket::{SockaddrLike, SockaddrStorage};

use super::driver::{Call, Completion, Request, Token};
use super::mesh::Wake;
use crate::config::{KERNEL_WORKERS, OPERATION_SLOTS, SECOND_NS};
use crate::error::{Error, Result};

/// Tokens of the ring's own operations; slots never use this generation.
const WAKE: u64 = u64::MAX;
const CANCEL: u64 = u64::MAX - 1;
/// enter(2) flag: run deferred work and fetch completions (io_uring_enter(2)).
const ENTER_GETEVENTS: u32 = 1;

/// The kernel's side of one core.
pub struct RingDriver {
    ring: IoUring,
    /// Addresses of connects in flight, by slot: the kernel reads them after submission.
    addresses: Box<[Option<SockaddrStorage>]>,
    wake: Arc<Wake>,
    wake_bytes: Box<[u8; 8]>,
    is_wake_armed: bool,
    in_flight: usize,
}

impl RingDriver {
    /// Makes the ring of the calling thread, which alone may use it.
    pub fn new(wake: Arc<Wake>) -> Result<RingDriver> {
        let entries = OPERATION_SLOTS as u32;
        let mut plain = IoUring::builder();
        plain.setup_clamp().setup_cqsize(entries * 4);
        let mut modern = plain.clone();
        modern.setup_single_issuer().setup_defer_taskrun().setup_taskrun_flag();
        // Kernels before 6.1 know neither flag: correct there too, with more interruptions.
        let ring = modern.build(entries).or_else(|_| plain.build(entries)).map_err(|error| {
            let hint = "cannot make an io_uring (is kernel.io_uring_disabled set, or the \
                        process confined by seccomp? `sluice doctor` tells)";
            Error::io(&error, hint)
        })?;
        let mut workers = KERNEL_WORKERS;
        // Absent before 5.15, where the kernel's own limits hold.
        let _ = ring.submitter().register_iowq_max_workers(&mut workers);
        Ok(RingDriver {
            ring,
            addresses: (0..OPERATION_SLOTS).map(|_| None).collect(),
            wake,
            wake_bytes: Box::new([0; 8]),
            is_wake_armed: false,
            in_flight: 0,
        })
    }

    pub(super) fn submit(&mut self, token: Token, request: &mut Request) {
        let entry = match request {
            Request::Park => return,
            Request::Receive { fd, lease, range } => {
                let bytes = &mut lease[range.clone()];
                opcode::Recv::new(types::Fd(fd.0), bytes.as_mut_ptr(), bytes.len() as u32).build()
            }
            Request::Send { fd, lease, range } => {
                let bytes = &lease[range.clone()];
                opcode::Send::new(types::Fd(fd.0), bytes.as_ptr(), bytes.len() as u32)
                    .flags(libc::MSG_NOSIGNAL)
                    .build()
            }
            Request::ReadAt { fd, lease, range, offset } => {
                let bytes = &mut lease[range.clone()];
                opcode::Read::new(types::Fd(fd.0), bytes.as_mut_ptr(), bytes.len() as u32)
                    .offset(*offset)
                    .build()
            }
            Request::WriteAt { fd, lease, range, offset } => {
                let bytes = &lease[range.clone()];
                opcode::Write::new(types::Fd(fd.0), bytes.as_ptr(), bytes.len() as u32)
                    .offset(*offset)
                    .build()
            }
            Request::Connect { fd, address } => {
                let stored = &mut self.addresses[token.index() as usize];
                let stored = stored.insert(SockaddrStorage::from(*address));
                opcode::Connect::new(types::Fd(fd.0), stored.as_ptr(), stored.len()).build()
            }
            Request::Poll { fd, events } => opcode::PollAdd::new(types::Fd(fd.0), *events).build(),
        };
        self.in_flight += 1;
        self.push(entry.user_data(token.0));
    }

    pub(super) fn cancel(&mut self, token: Token) {
        self.push(opcode::AsyncCancel::new(token.0).build().user_data(CANCEL));
    }

    pub(super) fn reap(&mut self) -> Option<Completion> {
        loop {
            let entry = self.ring.completion().next()?;
            match entry.user_data() {
                WAKE => self.is_wake_armed = false,
                CANCEL => {}
                token => {
                    self.in_flight -= 1;
                    return Some(Completion { token: Token(token), result: entry.result() });
                }
            }
        }
    }

    pub(super) fn flush(&mut self) {
        if !self.is_wake_armed {
            self.is_wake_armed = true;
            let fd = types::Fd(self.wake.eventfd());
            let entry = opcode::Read::new(fd, self.wake_bytes.as_mut_ptr(), 8).build();
            self.push(entry.user_data(WAKE));
        }
        let mut submissions = self.ring.submission();
        let (pending, has_work) = (submissions.len() as u32, submissions.taskrun());
        submissions.sync();
        drop(submissions);
        if pending > 0 || has_work {
            self.enter(pending);
        }
    }

    pub(super) fn wait(&mut self, deadline_ns: Option<u64>) {
        self.flush();
        let Some(deadline_ns) = deadline_ns else {
            self.check_enter(self.ring.submit_and_wait(1));
            return;
        };
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
            .expect("the monotonic clock is always there");
        let now_ns = now.tv_sec() as u64 * SECOND_NS + now.tv_nsec() as u64;
        let left_ns = deadline_ns.saturating_sub(now_ns);
        if left_ns == 0 {
            return;
        }
        let time = Timespec::new().sec(left_ns / SECOND_NS).nsec((left_ns % SECOND_NS) as u32);
        let arguments = SubmitArgs::new().timespec(&time);
        self.check_enter(self.ring.submitter().submit_with_args(1, &arguments));
    }

    fn push(&mut self, entry: squeue::Entry) {
        loop {
            // SAFETY: the buffers and addresses an entry points to live in the slot of its token,
            // or in this struct, until the completion of that token has been reaped; an Op that is
            // dropped leaves its request in the slot (op.rs).
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            let pending = self.ring.submission().len() as u32;
            self.enter(pending);
        }
    }

    fn enter(&self, pending: u32) {
        // SAFETY: no argument is passed; the entries submitted are those pushed above.
        let result = unsafe {
            self.ring.submitter().enter::<libc::sigset_t>(pending, 0, ENTER_GETEVENTS, None)
        };
        self.check_enter(result);
    }

    fn check_enter(&self, result: std::io::Result<usize>) {
        let Err(error) = result else { return };
        match error.raw_os_error() {
            // Interrupted, timed out, or the kernel is short of memory for a moment: the loop comes
            // back, completions are reaped meanwhile.
            Some(libc::EINTR | libc::ETIME | libc::EBUSY | libc::EAGAIN) => {}
            _ => unreachable!("io_uring_enter failed and cannot be retried: {error}"),
        }
    }
}

impl Drop for RingDriver {
    fn drop(&mut self) {
        assert!(
            self.in_flight == 0 || std::thread::panicking(),
            "a ring is dropped only after its last completion"
        );
    }
}

/// Does what is answered at once.
pub fn system_call(call: Call<'_>) -> std::result::Result<u64, i32> {
    // SAFETY (all calls below): file numbers are passed by value and a wrong one gives EBADF;
    // buffers are borrowed slices that outlive the call.
    let result = match call {
        Call::Socket(address) => return tcp_socket(address),
        // SAFETY: whoever opened the file gives its number up with this call (driver.rs).
        Call::Close(fd) => return close(unsafe { OwnedFd::from_raw_fd(fd.0) }),
        Call::Read(fd, bytes) => {
            // SAFETY: the slice is valid for its length during the call.
            unsafe { libc::read(fd.0, bytes.as_mut_ptr().cast(), bytes.len()) as i64 }
        }
        Call::Write(fd, bytes) => {
            // SAFETY: the slice is valid for its length during the call.
            unsafe { libc::write(fd.0, bytes.as_ptr().cast(), bytes.len()) as i64 }
        }
        Call::WriteAt(fd, bytes, offset) => {
            // SAFETY: the slice is valid for its length during the call.
            unsafe {
                let (start, size) = (bytes.as_ptr().cast(), bytes.len());
                libc::pwrite(fd.0, start, size, offset as libc::off_t) as i64
            }
        }
        Call::Seek(fd, offset, whence) => {
            // SAFETY: no memory is passed.
            unsafe { libc::lseek(fd.0, offset as libc::off_t, whence) }
        }
        Call::Control(fd, request, argument) => {
            // SAFETY: the argument is a number, not an address, for every request used (driver.rs).
            unsafe { i64::from(libc::ioctl(fd.0, request, argument)) }
        }
    };
    if result < 0 { Err(nix::errno::Errno::last_raw()) } else { Ok(result as u64) }
}

fn tcp_socket(address: &SocketAddr) -> std::result::Result<u64, i32> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let fd = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|errno| errno as i32)?;
    setsockopt(&fd, sockopt::TcpNoDelay, &true).map_err(|errno| errno as i32)?;
    Ok(fd.into_raw_fd() as u64)
}

fn close(fd: OwnedFd) -> std::result::Result<u64, i32> {
    debug_assert!(fd.as_raw_fd() >= 0);
    drop(fd);
    Ok(0)
}
