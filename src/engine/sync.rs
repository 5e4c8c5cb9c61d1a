//! Waiting inside one core: a condition to be told of, permits, a bounded queue, a gate.
//!
//! All of it is single-threaded and allocation-free once warm. A wake is a hint: whoever is woken
//! looks at the condition again.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::Core;
use super::op::Op;
use super::task::TaskId;
use crate::config::NOTIFY_WAITERS;
use crate::error::Result;

/// Something others wait to be told of.
pub struct Notify {
    waiters: RefCell<Vec<TaskId>>,
    epoch: Cell<u64>,
}

impl Default for Notify {
    fn default() -> Self {
        Notify { waiters: RefCell::new(Vec::with_capacity(NOTIFY_WAITERS)), epoch: Cell::new(0) }
    }
}

impl Notify {
    /// Waits for the next `wake_all` after this call.
    pub fn wait<'a>(&'a self, core: &'a Core) -> Wait<'a> {
        Wait { notify: self, core, epoch: self.epoch.get(), timer: None }
    }

    /// Wakes everybody who waits.
    pub fn wake_all(&self, core: &Core) {
        self.epoch.set(self.epoch.get().wrapping_add(1));
        let mut waiters = self.waiters.borrow_mut();
        for task in waiters.drain(..) {
            core.schedule(task);
        }
    }
}

/// Waits for a [`Notify`]; true when told, false when the deadline came first.
#[must_use = "a future does nothing until awaited"]
pub struct Wait<'a> {
    notify: &'a Notify,
    core: &'a Core,
    epoch: u64,
    timer: Option<Op<Result<()>>>,
}

impl Wait<'_> {
    /// Gives up at this time (ns on the core's clock).
    pub fn by(mut self, deadline_ns: u64) -> Self {
        self.timer = Some(self.core.sleep_until(deadline_ns));
        self
    }
}

impl Future for Wait<'_> {
    type Output = bool;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<bool> {
        let this = &mut *self;
        if this.notify.epoch.get() != this.epoch {
            return Poll::Ready(true);
        }
        if let Some(timer) = &mut this.timer
            && Pin::new(timer).poll(context).is_ready()
        {
            this.timer = None;
            return Poll::Ready(false);
        }
        let task = this.core.current_task();
        let mut waiters = this.notify.waiters.borrow_mut();
        if !waiters.contains(&task) {
            waiters.push(task);
        }
        Poll::Pending
    }
}

/// A number of things that may be in use at once.
pub struct Permits {
    free: Cell<usize>,
    waiters: RefCell<VecDeque<TaskId>>,
}

impl Permits {
    /// So many.
    pub fn new(count: usize) -> Self {
        Permits { free: Cell::new(count), waiters: RefCell::new(VecDeque::with_capacity(count)) }
    }

    /// Waits for a permit, first come first served.
    pub fn acquire<'a>(&'a self, core: &'a Core) -> Acquire<'a> {
        Acquire { permits: self, core, state: AcquireState::New }
    }

    /// A permit if one is free and nobody waits for it.
    pub fn try_acquire<'a>(&'a self, core: &'a Core) -> Option<Permit<'a>> {
        if self.free.get() == 0 || !self.waiters.borrow().is_empty() {
            return None;
        }
        self.free.set(self.free.get() - 1);
        Some(Permit { permits: self, core })
    }

    /// Permits nobody holds.
    pub fn free_count(&self) -> usize {
        self.free.get()
    }

    fn wake_first(&self, core: &Core) {
        if self.free.get() > 0
            && let Some(task) = self.waiters.borrow().front()
        {
            core.schedule(*task);
        }
    }
}

enum AcquireState {
    New,
    Queued(TaskId),
    Over,
}

/// Waits for a [`Permit`].
#[must_use = "a future does nothing until awaited"]
pub struct Acquire<'a> {
    permits: &'a Permits,
    core: &'a Core,
    state: AcquireState,
}

impl<'a> Future for Acquire<'a> {
    type Output = Permit<'a>;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Permit<'a>> {
        let task = self.core.current_task();
        let mut waiters = self.permits.waiters.borrow_mut();
        let is_my_turn = match self.state {
            AcquireState::New => waiters.is_empty(),
            AcquireState::Queued(_) => waiters.front() == Some(&task),
            AcquireState::Over => unreachable!("a permit is awaited once"),
        };
        if is_my_turn && self.permits.free.get() > 0 {
            self.permits.free.set(self.permits.free.get() - 1);
            if let AcquireState::Queued(_) = self.state {
                waiters.pop_front();
            }
            drop(waiters);
            self.state = AcquireState::Over;
            self.permits.wake_first(self.core);
            return Poll::Ready(Permit { permits: self.permits, core: self.core });
        }
        if let AcquireState::New = self.state {
            waiters.push_back(task);
            drop(waiters);
            self.state = AcquireState::Queued(task);
        }
        Poll::Pending
    }
}

impl Drop for Acquire<'_> {
    fn drop(&mut self) {
        if let AcquireState::Queued(task) = self.state {
            self.permits.waiters.borrow_mut().retain(|&waiter| waiter != task);
            self.permits.wake_first(self.core);
        }
    }
}

/// The right to use one thing; given back when dropped.
#[must_use]
pub struct Permit<'a> {
    permits: &'a Permits,
    core: &'a Core,
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.permits.free.set(self.permits.free.get() + 1);
        self.permits.wake_first(self.core);
    }
}

/// A bounded queue between tasks of one core. An arrival wakes one waiter, the latest to come: its
/// memory is the warmest.
pub struct Queue<T> {
    items: RefCell<VecDeque<T>>,
    capacity: usize,
    waiters: RefCell<Vec<TaskId>>,
}

impl<T> Queue<T> {
    /// Room for so many.
    pub fn new(capacity: usize) -> Self {
        let items = RefCell::new(VecDeque::with_capacity(capacity));
        Queue { items, capacity, waiters: RefCell::default() }
    }

    /// Puts an item at the end; gives it back when the queue is full.
    pub fn push(&self, core: &Core, item: T) -> std::result::Result<(), T> {
        if self.items.borrow().len() == self.capacity {
            return Err(item);
        }
        self.items.borrow_mut().push_back(item);
        self.wake_one(core);
        Ok(())
    }

    /// Wakes one waiter: an item may have become acceptable to all of them.
    pub fn wake_one(&self, core: &Core) {
        if let Some(task) = self.waiters.borrow_mut().pop() {
            core.schedule(task);
        }
    }

    /// Takes the first item that `wanted` accepts, if there is one.
    pub fn take(&self, wanted: impl Fn(&T) -> bool) -> Option<T> {
        let mut items = self.items.borrow_mut();
        let place = items.iter().position(wanted)?;
        items.remove(place)
    }

    /// Waits for an item that `wanted` accepts. All waiters of a queue want the same, so that the
    /// one woken for an item may stand for all; whoever makes an item acceptable later takes it
    /// itself, or calls `wake_one`.
    pub async fn pop(&self, core: &Core, wanted: impl Fn(&T) -> bool) -> T {
        std::future::poll_fn(|_| {
            let task = core.current_task();
            let mut waiters = self.waiters.borrow_mut();
            let place = waiters.iter().position(|&waiter| waiter == task);
            if let Some(item) = self.take(&wanted) {
                // Woken by something else: a push must not wake one who is busy, and nobody beside.
                place.map(|place| waiters.remove(place));
                return Poll::Ready(item);
            }
            if place.is_none() {
                waiters.push(task);
            }
            Poll::Pending
        })
        .await
    }

    /// How many items `wanted` accepts.
    pub fn count(&self, wanted: impl Fn(&T) -> bool) -> usize {
        self.items.borrow().iter().filter(|item| wanted(item)).count()
    }

    /// Whether there is an item that `wanted` accepts.
    pub fn any(&self, wanted: impl Fn(&T) -> bool) -> bool {
        self.items.borrow().iter().any(wanted)
    }

    /// Items waiting.
    pub fn len(&self) -> usize {
        self.items.borrow().len()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Counts who is inside; closing it lets nobody new in and waits for the rest to leave.
#[derive(Default)]
pub struct Gate {
    inside: Cell<usize>,
    is_closed: Cell<bool>,
    left: Notify,
}

impl Gate {
    /// Enters, unless the gate is closed.
    pub fn enter<'a>(&'a self, core: &'a Core) -> Option<Visit<'a>> {
        if self.is_closed.get() {
            return None;
        }
        self.inside.set(self.inside.get() + 1);
        Some(Visit { gate: self, core })
    }

    /// Whether the gate is closed.
    pub fn is_closed(&self) -> bool {
        self.is_closed.get()
    }

    /// How many are inside.
    pub fn inside_count(&self) -> usize {
        self.inside.get()
    }

    /// Closes and waits until all have left or the deadline passes; true when all have left.
    pub async fn close(&self, core: &Core, deadline_ns: u64) -> bool {
        self.is_closed.set(true);
        while self.inside.get() > 0 {
            if !self.left.wait(core).by(deadline_ns).await {
                return false;
            }
        }
        true
    }
}

/// A stay inside a [`Gate`].
#[must_use]
pub struct Visit<'a> {
    gate: &'a Gate,
    core: &'a Core,
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        self.gate.inside.set(self.gate.inside.get() - 1);
        if self.gate.inside.get() == 0 {
            self.gate.left.wake_all(self.core);
        }
    }
}
