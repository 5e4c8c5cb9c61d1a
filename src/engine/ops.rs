//! The typed operations of a core: what a task awaits.
//!
//! Those that work on a buffer take the lease and give it back with the result.

use std::future::Future;
use std::net::SocketAddr;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::arena::{Class, Lease};
use super::driver::{Call, Fd, Request};
use super::offload::{Errand, Offload};
use super::op::Op;
use super::{Core, Lane};
use crate::error::{Error, Result};

/// Work that is done once.
pub type Once<T> = Box<dyn FnOnce() -> T + Send>;

/// What a transfer gives: the lease, and how many bytes went.
pub type Transfer = (Lease, Result<usize>);

impl Core {
    /// One receive into `lease[range]`; 0 bytes mean that the peer closed.
    pub fn recv(&self, fd: Fd, lease: Lease, range: Range<usize>) -> Op<Transfer> {
        check(&lease, &range);
        Op::new(self, Request::Receive { fd, lease, range }, transfer)
    }

    /// One send of `lease[range]`, which may go in part.
    pub fn send(&self, fd: Fd, lease: Lease, range: Range<usize>) -> Op<Transfer> {
        check(&lease, &range);
        Op::new(self, Request::Send { fd, lease, range }, transfer)
    }

    /// One read at a file offset.
    pub fn read_at(&self, fd: Fd, lease: Lease, range: Range<usize>, offset: u64) -> Op<Transfer> {
        check(&lease, &range);
        Op::new(self, Request::ReadAt { fd, lease, range, offset }, transfer)
    }

    /// One write at a file offset, which may go in part.
    pub fn write_at(&self, fd: Fd, lease: Lease, range: Range<usize>, offset: u64) -> Op<Transfer> {
        check(&lease, &range);
        Op::new(self, Request::WriteAt { fd, lease, range, offset }, transfer)
    }

    /// Connects a socket made by [`Core::socket`].
    pub fn connect(&self, fd: Fd, address: SocketAddr) -> Op<Result<()>> {
        Op::new(self, Request::Connect { fd, address }, |_, result| result.map(drop))
    }

    /// Waits until a file is ready for `events` (poll(2) bits); gives the bits that hold.
    pub fn poll(&self, fd: Fd, events: u32) -> Op<Result<u32>> {
        Op::new(self, Request::Poll { fd, events }, |_, result| result)
    }

    /// Sleeps for so long.
    pub fn sleep(&self, duration_ns: u64) -> Op<Result<()>> {
        self.sleep_until(self.now().saturating_add(duration_ns))
    }

    /// Sleeps until this time on the core's clock.
    pub fn sleep_until(&self, time_ns: u64) -> Op<Result<()>> {
        Op::new(self, Request::Park, |_, result| result.map(drop)).by(time_ns)
    }

    /// A TCP socket for this address.
    pub fn socket(&self, address: &SocketAddr) -> Result<Fd> {
        let number = self
            .call(Call::Socket(address))
            .map_err(|errno| Error::system(errno, format!("cannot make a socket for {address}")))?;
        Ok(Fd(number as i32))
    }

    /// Closes a file. Nothing may be in flight on it.
    pub fn close(&self, fd: Fd) {
        // A close that fails has closed all the same on Linux, and there is nobody to tell.
        let _ = self.call(Call::Close(fd));
    }

    /// Does what is answered at once; an error is an errno.
    pub fn call(&self, call: Call<'_>) -> std::result::Result<u64, i32> {
        self.0.driver.borrow_mut().call(call)
    }

    /// Waits for a free buffer.
    pub fn lease(&self, class: Class) -> LeaseWait<'_> {
        LeaseWait { core: self, class, reserve: 0 }
    }

    /// Waits for a free buffer on behalf of a lane: background work leaves a quarter to demand.
    pub fn lease_for(&self, lane: Lane, class: Class) -> LeaseWait<'_> {
        let reserve = match lane {
            Lane::Demand => 0,
            Lane::Background => class.count() / 4,
        };
        LeaseWait { core: self, class, reserve }
    }

    /// A buffer if one is free.
    pub fn try_lease(&self, class: Class) -> Option<Lease> {
        self.0.arena.lease(class)
    }

    /// Runs work that takes long on a helper thread and waits for its result.
    pub fn offload<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Offload<Once<T>, T> {
        Errand::new(self, |work: Once<T>| work()).run(Box::new(work))
    }

    /// Runs work that may never end, because others have to answer, on a thread for such work.
    ///
    /// # Errors
    /// Too many such wait.
    pub fn ask<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Offload<Once<T>, T>> {
        Errand::new(self, |work: Once<T>| work()).ask(Box::new(work))
    }

    /// Lets every other ready task run first.
    pub async fn yield_now(&self) {
        let mut has_yielded = false;
        std::future::poll_fn(|_| {
            if has_yielded {
                return Poll::Ready(());
            }
            has_yielded = true;
            self.schedule(self.current_task());
            Poll::Pending
        })
        .await;
    }
}

/// Waits for a [`Lease`].
#[must_use = "a future does nothing until awaited"]
pub struct LeaseWait<'a> {
    core: &'a Core,
    class: Class,
    /// Buffers that must stay free for others.
    reserve: usize,
}

impl Future for LeaseWait<'_> {
    type Output = Lease;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Lease> {
        let arena = &self.core.0.arena;
        if arena.free_count(self.class) > self.reserve
            && let Some(lease) = arena.lease(self.class)
        {
            return Poll::Ready(lease);
        }
        let task = self.core.current_task();
        let mut waiters = self.core.0.lease_waiters.borrow_mut();
        if !waiters.contains(&(self.class, self.reserve, task)) {
            waiters.push((self.class, self.reserve, task));
        }
        Poll::Pending
    }
}

fn check(lease: &Lease, range: &Range<usize>) {
    assert!(range.start <= range.end && range.end <= lease.len(), "a range lies in its lease");
}

fn transfer(request: Request, result: Result<u32>) -> Transfer {
    let lease = request.into_lease().expect("a transfer has a lease");
    (lease, result.map(|count| count as usize))
}
