//! Mechanism: one core is one thread, one ring, one loop, and the tasks that run on it.
//!
//! The core is a value that is passed, never found; eight of them fit in one test. It knows
//! nothing of blobs, registries or kernels' upcalls. A task may await only the leaves of this room
//! (operations, waits, mail, leases, offloaded work): each registers the task that polls it, so no
//! waker exists. Buffers are leases in a per-core arena that outlives the ring (`arena.rs`,
//! `op.rs`).

pub mod arena;
pub mod driver;
pub mod mesh;
pub mod offload;
mod op;
mod ops;
pub mod ring;
pub mod simulated;
pub mod sync;
mod task;
mod timer;

use std::cell::{Cell, RefCell, RefMut};
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

pub use arena::{Arena, Class, Lease};
pub use driver::{Call, Driver, Fd, Token};
pub use op::Op;
pub use ops::LeaseWait;
pub use task::{Lane, TaskId};

use crate::config::{OPERATION_SLOTS, POLLS_PER_TURN};
use crate::error::Result;
use driver::Request;
use mesh::Wake;
use offload::Helpers;
use op::Slots;
use ring::RingDriver;
use task::Tasks;
use timer::Timers;

/// Which core.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct CoreId(pub u8);

/// What a core is made of, besides its id.
pub struct Parts {
    /// The world below.
    pub driver: Driver,
    /// The core's bell, made first so that others can hold it.
    pub wake: Arc<Wake>,
    /// Threads for long work; none in a simulation.
    pub helpers: Option<Arc<Helpers>>,
    /// Where randomness starts; the same seed gives the same choices.
    pub seed: u64,
    /// How long to look for completions before sleeping, in ns.
    pub spin_ns: u64,
}

/// A handle on a core; clones are the same core. It stays on the core's thread.
#[derive(Clone)]
pub struct Core(Rc<Inner>);

struct Inner {
    id: CoreId,
    // Declared before the slots: should a panic unwind, the ring goes first.
    driver: RefCell<Driver>,
    slots: RefCell<Slots>,
    timers: RefCell<Timers>,
    tasks: RefCell<Tasks>,
    arena: Arc<Arena>,
    /// Who waits for a buffer of a class, and how many must stay free for others.
    lease_waiters: RefCell<Vec<(Class, usize, TaskId)>>,
    mail_waiters: RefCell<Vec<TaskId>>,
    wake: Arc<Wake>,
    helpers: Option<Arc<Helpers>>,
    random: Cell<u64>,
    spin_ns: u64,
}

impl Core {
    /// A core without tasks.
    pub fn new(id: CoreId, parts: Parts) -> Result<Core> {
        Ok(Core(Rc::new(Inner {
            id,
            driver: RefCell::new(parts.driver),
            slots: RefCell::new(Slots::new(OPERATION_SLOTS)),
            timers: RefCell::new(Timers::new(OPERATION_SLOTS)),
            tasks: RefCell::default(),
            arena: Arena::new()?,
            lease_waiters: RefCell::new(Vec::with_capacity(64)),
            mail_waiters: RefCell::new(Vec::with_capacity(64)),
            wake: parts.wake,
            helpers: parts.helpers,
            random: Cell::new(parts.seed | 1),
            spin_ns: parts.spin_ns,
        })))
    }

    /// Which core this is.
    pub fn id(&self) -> CoreId {
        self.0.id
    }

    /// Nanoseconds on a clock that never goes back.
    pub fn now(&self) -> u64 {
        self.0.driver.borrow().now()
    }

    /// The same clock for work on helper threads; it stands still in simulations.
    pub fn clock(&self) -> fn() -> u64 {
        self.0.driver.borrow().clock()
    }

    /// The next pseudo-random number (xorshift64*, for jitter and tie-breaks only).
    pub fn random(&self) -> u64 {
        let mut state = self.0.random.get();
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        self.0.random.set(state);
        state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn helpers(&self) -> Option<&Helpers> {
        self.0.helpers.as_deref()
    }

    /// The core's bell, for mailboxes.
    pub fn wake(&self) -> &Arc<Wake> {
        &self.0.wake
    }

    /// The core's buffers.
    pub fn arena(&self) -> &Arc<Arena> {
        &self.0.arena
    }

    /// Starts a task. Crews are spawned at start, never on the fault path.
    pub fn spawn(&self, lane: Lane, body: impl Future<Output = ()> + 'static) {
        self.0.tasks.borrow_mut().spawn(lane, Box::pin(body));
    }

    /// One turn of the loop: mail, completions, deadlines, ready tasks, submissions; in this order
    /// because mail and completions may unblock somebody. False when there was nothing to do.
    pub fn turn(&self) -> bool {
        let mut has_worked = self.take_mail();
        has_worked |= self.reap();
        has_worked |= self.expire();
        has_worked |= self.run_ready();
        self.serve_lease_waiters();
        self.0.driver.borrow_mut().flush();
        has_worked
    }

    /// Whether a turn would find something to do without waiting.
    pub fn is_ready(&self) -> bool {
        self.0.tasks.borrow().is_ready()
    }

    /// The next deadline of any operation.
    pub fn next_deadline(&self) -> Option<u64> {
        self.0.timers.borrow().next()
    }

    /// Operations that have been submitted and not taken.
    pub fn busy_count(&self) -> usize {
        self.0.slots.borrow().busy_count()
    }

    /// Tasks that have not ended.
    pub fn task_count(&self) -> usize {
        self.0.tasks.borrow().live_count()
    }

    /// Runs until `is_over` says so, sleeping whenever there is nothing to do.
    pub fn run(&self, is_over: impl Fn() -> bool) {
        let mut idle_since_ns = None;
        while !is_over() {
            if self.turn() || self.is_ready() {
                idle_since_ns = None;
                continue;
            }
            let now_ns = self.now();
            let since_ns = *idle_since_ns.get_or_insert(now_ns);
            let may_spin = self.0.spin_ns > 0 && self.busy_count() > 0;
            if may_spin && now_ns - since_ns < self.0.spin_ns {
                std::hint::spin_loop();
                continue;
            }
            idle_since_ns = None;
            if self.0.wake.announce_sleep() {
                self.0.driver.borrow_mut().wait(self.next_deadline());
                self.0.wake.end_sleep();
            }
        }
    }

    /// Ends everything: drops the tasks, cancels what flies, and waits for the last completion.
    pub fn shut_down(&self) {
        self.0.wake.close();
        // Dropped outside the borrow: a task's drop glue cancels operations and wakes others.
        let bodies = self.0.tasks.borrow_mut().take_bodies();
        drop(bodies);
        let flying = self.0.slots.borrow().flying();
        for token in flying {
            self.cancel(token);
        }
        while self.busy_count() > 0 {
            self.0.driver.borrow_mut().flush();
            if !self.reap() {
                self.0.driver.borrow_mut().wait(None);
            }
        }
    }

    fn take_mail(&self) -> bool {
        if !self.0.wake.take_mail() {
            return false;
        }
        let mut tasks = self.0.tasks.borrow_mut();
        self.0.mail_waiters.borrow_mut().drain(..).for_each(|task| tasks.schedule(task));
        true
    }

    fn reap(&self) -> bool {
        let mut has_reaped = false;
        loop {
            let mut driver = self.0.driver.borrow_mut();
            let Some(completion) = driver.reap() else { return has_reaped };
            has_reaped = true;
            let mut slots = self.0.slots.borrow_mut();
            if let Some(request) = slots.request_mut(completion.token) {
                driver.deliver(completion, request);
            }
            drop(driver);
            self.0.timers.borrow_mut().remove(completion.token.index());
            if let Some(task) = slots.complete(completion) {
                self.schedule(task);
            }
        }
    }

    fn expire(&self) -> bool {
        if self.next_deadline().is_none() {
            return false;
        }
        let now_ns = self.now();
        let mut has_expired = false;
        loop {
            let expired = self.0.timers.borrow_mut().expire(now_ns);
            let Some(index) = expired else { return has_expired };
            has_expired = true;
            let token = self.0.slots.borrow_mut().expire(index);
            if let Some(token) = token {
                self.cancel(token);
            }
        }
    }

    fn run_ready(&self) -> bool {
        let mut context = Context::from_waker(Waker::noop());
        for polled in 0..POLLS_PER_TURN {
            let next = self.0.tasks.borrow_mut().next();
            let Some((id, mut body)) = next else { return polled > 0 };
            let body = match body.as_mut().poll(&mut context) {
                Poll::Ready(()) => None,
                Poll::Pending => Some(body),
            };
            self.0.tasks.borrow_mut().put_back(id, body);
        }
        true
    }

    fn serve_lease_waiters(&self) {
        let mut waiters = self.0.lease_waiters.borrow_mut();
        if waiters.is_empty() {
            return;
        }
        let mut tasks = self.0.tasks.borrow_mut();
        waiters.retain(|&(class, reserve, task)| {
            let must_wait = self.0.arena.free_count(class) <= reserve;
            if !must_wait {
                tasks.schedule(task);
            }
            must_wait
        });
    }

    fn submit(&self, request: Request, deadline_ns: Option<u64>) -> Token {
        let task = self.current_task();
        let mut slots = self.0.slots.borrow_mut();
        let token = slots.insert(request, task);
        if let Some(deadline_ns) = deadline_ns {
            self.0.timers.borrow_mut().insert(token.index(), deadline_ns);
        }
        let request = slots.request_mut(token).expect("inserted above");
        self.0.driver.borrow_mut().submit(token, request);
        token
    }

    fn cancel(&self, token: Token) {
        let mut slots = self.0.slots.borrow_mut();
        self.0.timers.borrow_mut().remove(token.index());
        if let Some(Request::Park) = slots.request_mut(token) {
            // Nothing below knows of it: it ends here.
            if let Some(task) = slots.complete(driver::Completion { token, result: 0 }) {
                self.schedule(task);
            }
            return;
        }
        self.0.driver.borrow_mut().cancel(token);
    }

    fn slots(&self) -> RefMut<'_, Slots> {
        self.0.slots.borrow_mut()
    }

    fn current_task(&self) -> TaskId {
        self.0.tasks.borrow().current()
    }

    fn schedule(&self, task: TaskId) {
        self.0.tasks.borrow_mut().schedule(task);
    }

    fn wait_for_mail(&self) {
        let task = self.current_task();
        let mut waiters = self.0.mail_waiters.borrow_mut();
        if !waiters.contains(&task) {
            waiters.push(task);
        }
    }
}

/// Runs one future on a private core of the calling thread, for command-line use and tests.
pub fn block_on<T, F>(start: impl FnOnce(Core) -> F) -> Result<T>
where
    T: 'static,
    F: Future<Output = T> + 'static,
{
    let wake = Wake::new()?;
    let parts = Parts {
        driver: Driver::Ring(Box::new(RingDriver::new(Arc::clone(&wake))?)),
        wake,
        helpers: Some(Helpers::start(2)?),
        seed: u64::from(std::process::id()),
        spin_ns: 0,
    };
    let core = Core::new(CoreId(0), parts)?;
    let result = Rc::new(RefCell::new(None));
    let (place, future) = (Rc::clone(&result), start(core.clone()));
    core.spawn(Lane::Demand, async move {
        let value = future.await;
        *place.borrow_mut() = Some(value);
    });
    core.run(|| result.borrow().is_some());
    core.shut_down();
    let value = result.borrow_mut().take();
    Ok(value.expect("run() ends when the value is there"))
}

/// Waits for both.
pub async fn join<A, B>(a: impl Future<Output = A>, b: impl Future<Output = B>) -> (A, B) {
    let (mut a, mut b) = (std::pin::pin!(a), std::pin::pin!(b));
    let (mut left, mut right) = (None, None);
    std::future::poll_fn(move |context| {
        poll_once(&mut left, a.as_mut(), context);
        poll_once(&mut right, b.as_mut(), context);
        if left.is_none() || right.is_none() {
            return Poll::Pending;
        }
        Poll::Ready((left.take().expect("checked above"), right.take().expect("checked above")))
    })
    .await
}

fn poll_once<T>(
    value: &mut Option<T>,
    future: Pin<&mut impl Future<Output = T>>,
    context: &mut Context<'_>,
) {
    if value.is_none()
        && let Poll::Ready(done) = future.poll(context)
    {
        *value = Some(done);
    }
}

#[cfg(test)]
mod tests;
