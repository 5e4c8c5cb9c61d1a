//! Operation slots: where an operation lives from submission to its terminal completion.
//!
//! Keyspace: a slot belongs to one use at a time; its token is generation << 32 | index, and a
//! completion with another generation is an assertion, never a guess. Cancellation: dropping an
//! operation's future orphans the slot and asks for cancellation. The request, and with it the
//! lease, stays in the slot until the terminal completion; only then may the buffer be used again.
//! A deadline does the same, but the task goes on waiting for the completion.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use super::Core;
use super::driver::{Completion, Request, Token};
use super::task::TaskId;
use crate::error::{Error, Result};

enum State {
    Free,
    Flying(Request),
    Orphan(Request),
    Done(Request, i32),
}

struct Slot {
    generation: u32,
    state: State,
    task: Option<TaskId>,
    has_expired: bool,
}

/// The slots of one core.
pub struct Slots {
    slots: Box<[Slot]>,
    free: Vec<u32>,
}

impl Slots {
    /// All slots, free.
    pub fn new(slot_count: usize) -> Self {
        let slot = |_| Slot { generation: 0, state: State::Free, task: None, has_expired: false };
        Slots {
            slots: (0..slot_count).map(slot).collect(),
            free: (0..slot_count as u32).rev().collect(),
        }
    }

    /// Puts an operation into a free slot. Crews are fixed and small, so one is always free.
    pub fn insert(&mut self, request: Request, task: TaskId) -> Token {
        let index = self.free.pop().expect("OPERATION_SLOTS exceeds what all crews can submit");
        let slot = &mut self.slots[index as usize];
        slot.generation = slot.generation.wrapping_add(1) & 0x7fff_ffff;
        slot.state = State::Flying(request);
        slot.task = Some(task);
        slot.has_expired = false;
        Token::new(slot.generation, index)
    }

    /// The request of a flying operation.
    pub fn request_mut(&mut self, token: Token) -> Option<&mut Request> {
        match &mut self.slot(token).state {
            State::Flying(request) | State::Orphan(request) => Some(request),
            State::Free | State::Done(..) => None,
        }
    }

    /// Records a completion. Returns the task to wake, if somebody waits.
    pub fn complete(&mut self, completion: Completion) -> Option<TaskId> {
        let slot = self.slot(completion.token);
        match std::mem::replace(&mut slot.state, State::Free) {
            State::Flying(request) => {
                slot.state = State::Done(request, completion.result);
                slot.task
            }
            State::Orphan(_lease_goes_home) => {
                self.free.push(completion.token.index());
                None
            }
            State::Free | State::Done(..) => unreachable!("an operation completed twice"),
        }
    }

    /// Notes that the deadline has passed. Returns the token of an operation to cancel.
    pub fn expire(&mut self, index: u32) -> Option<Token> {
        let slot = &mut self.slots[index as usize];
        match slot.state {
            State::Flying(_) => {
                slot.has_expired = true;
                Some(Token::new(slot.generation, index))
            }
            _ => None,
        }
    }

    /// Takes a finished operation out and frees the slot; `None` while it flies.
    fn take(&mut self, token: Token, task: TaskId) -> Option<(Request, i32, bool)> {
        let slot = self.slot(token);
        match std::mem::replace(&mut slot.state, State::Free) {
            State::Done(request, result) => {
                let has_expired = slot.has_expired;
                self.free.push(token.index());
                Some((request, result, has_expired))
            }
            flying => {
                slot.state = flying;
                slot.task = Some(task);
                None
            }
        }
    }

    /// Leaves an operation to finish by itself. True when it is still flying and wants cancelling.
    fn orphan(&mut self, token: Token) -> bool {
        let slot = self.slot(token);
        match std::mem::replace(&mut slot.state, State::Free) {
            State::Flying(request) => {
                slot.state = State::Orphan(request);
                slot.task = None;
                true
            }
            State::Done(..) => {
                self.free.push(token.index());
                false
            }
            State::Free | State::Orphan(_) => unreachable!("an operation was dropped twice"),
        }
    }

    /// Operations that have not been taken out.
    pub fn busy_count(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Tokens of all operations still below.
    pub fn flying(&self) -> Vec<Token> {
        let tokens = self.slots.iter().enumerate().filter_map(|(index, slot)| match slot.state {
            State::Flying(_) | State::Orphan(_) => Some(Token::new(slot.generation, index as u32)),
            State::Free | State::Done(..) => None,
        });
        tokens.collect()
    }

    fn slot(&mut self, token: Token) -> &mut Slot {
        let slot = &mut self.slots[token.index() as usize];
        assert_eq!(slot.generation, token.generation(), "a stale token");
        slot
    }
}

enum Stage {
    New(Request),
    Flying(Token),
    Over,
}

/// An operation as a future. Does nothing until polled; gives what `finish` makes of the result.
#[must_use = "an operation does nothing until awaited"]
pub struct Op<T> {
    core: Core,
    stage: Stage,
    deadline_ns: Option<u64>,
    finish: fn(Request, Result<u32>) -> T,
}

impl<T> Op<T> {
    /// An operation not yet submitted.
    pub(super) fn new(
        core: &Core,
        request: Request,
        finish: fn(Request, Result<u32>) -> T,
    ) -> Self {
        Op { core: core.clone(), stage: Stage::New(request), deadline_ns: None, finish }
    }

    /// Past this time (ns on the core's clock) the operation is cancelled, its completion awaited,
    /// and the result is [`Error::Deadline`].
    pub fn by(mut self, deadline_ns: u64) -> Self {
        self.deadline_ns = Some(deadline_ns);
        self
    }
}

impl<T> Future for Op<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        let token = match std::mem::replace(&mut this.stage, Stage::Over) {
            Stage::New(request) => this.core.submit(request, this.deadline_ns),
            Stage::Flying(token) => token,
            Stage::Over => unreachable!("an operation is awaited once"),
        };
        let task = this.core.current_task();
        let finished = this.core.slots().take(token, task);
        let Some((request, result, has_expired)) = finished else {
            this.stage = Stage::Flying(token);
            return Poll::Pending;
        };
        let result = match result {
            0.. => Ok(result as u32),
            _ if has_expired && -result == libc::ECANCELED => {
                Err(Error::Deadline("the time allowed has passed".into()))
            }
            _ => Err(Error::system(-result, name(&request))),
        };
        Poll::Ready((this.finish)(request, result))
    }
}

impl<T> Drop for Op<T> {
    fn drop(&mut self) {
        if let Stage::Flying(token) = self.stage {
            let must_cancel = self.core.slots().orphan(token);
            if must_cancel {
                self.core.cancel(token);
            }
        }
    }
}

fn name(request: &Request) -> &'static str {
    match request {
        Request::Park => "sleep",
        Request::Receive { .. } => "receive",
        Request::Send { .. } => "send",
        Request::ReadAt { .. } => "read",
        Request::WriteAt { .. } => "write",
        Request::Connect { .. } => "connect",
        Request::Poll { .. } => "poll",
    }
}
