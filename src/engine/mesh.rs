//! Mailboxes between cores, and from ordinary threads to a core: bounded, typed, without locks.
//!
//! The sleep protocol: a core that is about to sleep stores `sleeping`, then looks for mail once
//! more; a sender pushes, then loads `sleeping` and writes to the eventfd when it is set. Both
//! sides put a sequentially consistent fence between their store and their load, so at least one
//! of them sees the other. A message to a core that is awake costs one store.

use std::future::Future;
use std::os::fd::{AsRawFd, RawFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering, fence};
use std::task::{Context, Poll};

use crossbeam_channel::{TryRecvError, TrySendError};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::Core;
use crate::error::{Error, Result};

/// How others get a core's attention.
#[derive(Debug)]
pub struct Wake {
    eventfd: EventFd,
    is_sleeping: AtomicBool,
    has_mail: AtomicBool,
    /// Set when the core has ended: nobody reads its mail any more.
    is_closed: AtomicBool,
}

impl Wake {
    /// A core's bell; made before the core, so that senders can be handed out first.
    pub fn new() -> Result<Arc<Wake>> {
        // Not EFD_NONBLOCK: the ring's read of it must wait, not fail.
        let eventfd = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| Error::system(errno as i32, "cannot make an eventfd"))?;
        let (is_sleeping, has_mail) = (AtomicBool::new(false), AtomicBool::new(false));
        let is_closed = AtomicBool::new(false);
        Ok(Arc::new(Wake { eventfd, is_sleeping, has_mail, is_closed }))
    }

    /// Makes the core look at its mail, waking it when it sleeps.
    pub fn ring(&self) {
        // Release pairs with the Acquire in take_mail: whoever sees the flag sees the message.
        self.has_mail.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.is_sleeping.load(Ordering::Relaxed)
            && self.is_sleeping.swap(false, Ordering::Relaxed)
        {
            // Fails only when the counter is full, and then the core is about to wake anyway.
            let _ = self.eventfd.write(1);
        }
    }

    /// Whether mail has come since the last time.
    pub(super) fn take_mail(&self) -> bool {
        self.has_mail.load(Ordering::Relaxed) && self.has_mail.swap(false, Ordering::Acquire)
    }

    /// Announces sleep. False when mail came meanwhile and the core must not sleep.
    pub(super) fn announce_sleep(&self) -> bool {
        self.is_sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let may_sleep = !self.has_mail.load(Ordering::Relaxed);
        if !may_sleep {
            self.is_sleeping.store(false, Ordering::Relaxed);
        }
        may_sleep
    }

    /// The core has ended.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::Relaxed);
    }

    pub(super) fn end_sleep(&self) {
        self.is_sleeping.store(false, Ordering::Relaxed);
    }

    pub(super) fn eventfd(&self) -> RawFd {
        self.eventfd.as_raw_fd()
    }
}

/// A mailbox of `capacity` messages at the core that `wake` belongs to.
pub fn mailbox<M>(wake: &Arc<Wake>, capacity: usize) -> (Sender<M>, Receiver<M>) {
    let (sender, receiver) = crossbeam_channel::bounded(capacity);
    (Sender { channel: sender, bell: Bell(Arc::clone(wake)) }, Receiver { channel: receiver })
}

/// The sending end; any thread may hold one.
#[derive(Debug)]
pub struct Sender<M> {
    // Declared before the bell: the last sender hangs up first, then rings, so that the receiver
    // wakes and finds the box closed.
    channel: crossbeam_channel::Sender<M>,
    bell: Bell,
}

#[derive(Clone, Debug)]
struct Bell(Arc<Wake>);

impl Drop for Bell {
    fn drop(&mut self) {
        self.0.ring();
    }
}

impl<M> Clone for Sender<M> {
    fn clone(&self) -> Self {
        Sender { channel: self.channel.clone(), bell: self.bell.clone() }
    }
}

impl<M> Sender<M> {
    /// Whether the receiver is known to be gone.
    pub fn is_closed(&self) -> bool {
        self.bell.0.is_closed.load(Ordering::Relaxed)
    }

    /// Sends without waiting; gives the message back when the box is full or the core is gone.
    pub fn send(&self, message: M) -> std::result::Result<(), M> {
        match self.channel.try_send(message) {
            Ok(()) => {
                self.bell.0.ring();
                Ok(())
            }
            Err(TrySendError::Full(message) | TrySendError::Disconnected(message)) => Err(message),
        }
    }
}

/// The receiving end; lives on the core.
#[derive(Debug)]
pub struct Receiver<M> {
    channel: crossbeam_channel::Receiver<M>,
}

impl<M> Receiver<M> {
    /// The next message; `None` when all senders are gone and the box is empty.
    pub fn receive<'a>(&'a self, core: &'a Core) -> Receive<'a, M> {
        Receive { receiver: self, core }
    }

    /// A message that has arrived.
    pub fn try_receive(&self) -> Option<M> {
        self.channel.try_recv().ok()
    }
}

/// Waits for a message.
#[must_use = "a future does nothing until awaited"]
pub struct Receive<'a, M> {
    receiver: &'a Receiver<M>,
    core: &'a Core,
}

impl<M> Future for Receive<'_, M> {
    type Output = Option<M>;

    fn poll(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<M>> {
        match self.receiver.channel.try_recv() {
            Ok(message) => Poll::Ready(Some(message)),
            Err(TryRecvError::Disconnected) => Poll::Ready(None),
            Err(TryRecvError::Empty) => {
                self.core.wait_for_mail();
                Poll::Pending
            }
        }
    }
}
