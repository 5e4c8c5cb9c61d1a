//! The driver under test: operations go into a queue that a simulated world owns, completions come
//! out of it when, and in the order, that world decides.
//!
//! The world sees bytes, never leases: what is sent or written is copied out at submission, what is
//! received or read is copied in when its completion is reaped. Time is the world's.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::rc::Rc;

use super::CoreId;
use super::driver::{Call, Completion, Fd, Request, Token};

/// An operation as the world sees it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SimulatedOperation {
    /// A receive of at most so many bytes.
    Receive(Fd, usize),
    /// A send of these bytes.
    Send(Fd, Vec<u8>),
    /// A read at an offset of so many bytes.
    ReadAt(Fd, u64, usize),
    /// A write at an offset of these bytes.
    WriteAt(Fd, u64, Vec<u8>),
    /// A connect.
    Connect(Fd, SocketAddr),
    /// A poll for these events.
    Poll(Fd, u32),
}

/// Something that happened at the boundary, in order.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum SimulatedEvent {
    /// A core submitted an operation.
    Submitted(CoreId, Token, SimulatedOperation),
    /// A core wants an operation to end early.
    Cancelled(CoreId, Token),
}

/// Answers calls that are answered at once.
pub type SimulatedCalls = Rc<RefCell<dyn FnMut(CoreId, Call<'_>) -> Result<u64, i32>>>;

/// What the world and the drivers of all its cores share.
#[derive(Default)]
pub struct SimulatedPort {
    /// The world's clock.
    pub now_ns: u64,
    /// What the world has not yet looked at.
    pub events: VecDeque<SimulatedEvent>,
    /// What each core has not yet reaped: result and, for receives and reads, the bytes.
    pub completions: HashMap<CoreId, VecDeque<(Completion, Vec<u8>)>>,
}

impl SimulatedPort {
    /// Completes an operation of a core.
    pub fn complete(&mut self, core: CoreId, token: Token, result: i32, bytes: Vec<u8>) {
        let completion = Completion { token, result };
        self.completions.entry(core).or_default().push_back((completion, bytes));
    }
}

/// One core's end of the port.
pub struct SimulatedDriver {
    core: CoreId,
    port: Rc<RefCell<SimulatedPort>>,
    calls: SimulatedCalls,
    arriving: Vec<u8>,
}

impl SimulatedDriver {
    /// A driver over a port that several cores share.
    pub fn new(core: CoreId, port: Rc<RefCell<SimulatedPort>>, calls: SimulatedCalls) -> Self {
        SimulatedDriver { core, port, calls, arriving: Vec::new() }
    }

    pub(super) fn submit(&mut self, token: Token, request: &mut Request) {
        let operation = match request {
            Request::Park => return,
            Request::Receive { fd, range, .. } => SimulatedOperation::Receive(*fd, range.len()),
            Request::Send { fd, lease, range } => {
                SimulatedOperation::Send(*fd, lease[range.clone()].to_vec())
            }
            Request::ReadAt { fd, range, offset, .. } => {
                SimulatedOperation::ReadAt(*fd, *offset, range.len())
            }
            Request::WriteAt { fd, lease, range, offset } => {
                SimulatedOperation::WriteAt(*fd, *offset, lease[range.clone()].to_vec())
            }
            Request::Connect { fd, address } => SimulatedOperation::Connect(*fd, *address),
            Request::Poll { fd, events } => SimulatedOperation::Poll(*fd, *events),
        };
        let event = SimulatedEvent::Submitted(self.core, token, operation);
        self.port.borrow_mut().events.push_back(event);
    }

    pub(super) fn cancel(&mut self, token: Token) {
        self.port.borrow_mut().events.push_back(SimulatedEvent::Cancelled(self.core, token));
    }

    pub(super) fn reap(&mut self) -> Option<Completion> {
        let mut port = self.port.borrow_mut();
        let (completion, bytes) = port.completions.get_mut(&self.core)?.pop_front()?;
        self.arriving = bytes;
        Some(completion)
    }

    pub(super) fn deliver(&mut self, completion: Completion, request: &mut Request) {
        let arriving = std::mem::take(&mut self.arriving);
        if completion.result <= 0 {
            return;
        }
        if let Request::Receive { lease, range, .. } | Request::ReadAt { lease, range, .. } =
            request
        {
            assert!(arriving.len() <= range.len(), "the world gives at most what was asked");
            assert_eq!(arriving.len(), completion.result as usize, "bytes match the result");
            lease[range.start..range.start + arriving.len()].copy_from_slice(&arriving);
        }
    }

    pub(super) fn now(&self) -> u64 {
        self.port.borrow().now_ns
    }

    pub(super) fn call(&mut self, call: Call<'_>) -> Result<u64, i32> {
        (self.calls.borrow_mut())(self.core, call)
    }
}
