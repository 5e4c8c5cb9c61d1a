//! One client of the control socket: what it sent, what it is owed, and until when.
//!
//! Never blocks and never waits: the server calls it when the socket is ready or a deadline has
//! passed. Buffers are bounded: input is not read while a call is under way, so a client that
//! sends without end is stopped by its own socket, and one that never reads is cut off.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use super::api::Request;
use super::http::{self, Progress};
use super::reply::Response;
use crate::config::{
    CONTROL_BODY_MAX_BYTES, CONTROL_HEAD_MAX_BYTES, CONTROL_IDLE_MS, CONTROL_LEAVE_WAIT_MS,
    CONTROL_REQUEST_WAIT_MS, CONTROL_RESPONSE_WAIT_MS,
};

/// A connected client.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    /// The process at the other end, when it connected.
    peer: Option<u32>,
    input: Vec<u8>,
    /// Parsing is of no use before the input has so many bytes.
    needed_bytes: usize,
    output: Vec<u8>,
    sent_bytes: usize,
    phase: Phase,
    keep_alive: bool,
    /// Whether what it sends is no HTTP we know.
    refused: bool,
    /// When the phase began.
    since: Instant,
}

/// What a client is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing.
    Idle,
    /// Sending a request.
    Sending,
    /// Waiting for a call.
    Waiting,
    /// Taking an answer.
    Taking,
    /// Still sending what nobody wants, after it was told so. Closing at once would make its
    /// next write fail, and then many clients never read the answer.
    Leaving,
}

/// What came of moving a connection on.
#[derive(Debug, PartialEq, Eq)]
pub enum Moved {
    /// Nothing to do until the socket is ready again.
    Stays,
    /// A request; the connection waits until `respond`.
    Asks(Request),
    /// It is over: drop the connection.
    Ends,
}

impl Connection {
    /// Takes a socket that does not block.
    pub fn new(stream: UnixStream, now: Instant) -> Self {
        let credentials = getsockopt(&stream, PeerCredentials).ok();
        let peer = credentials.and_then(|peer| u32::try_from(peer.pid()).ok());
        Self {
            stream,
            peer,
            input: Vec::new(),
            needed_bytes: 1,
            output: Vec::new(),
            sent_bytes: 0,
            phase: Phase::Idle,
            keep_alive: true,
            refused: false,
            since: now,
        }
    }

    /// What the client is doing.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Since when.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// When the client is given up, unless it waits for us.
    pub fn deadline(&self) -> Option<Instant> {
        let allowed_ms = match self.phase {
            Phase::Idle => CONTROL_IDLE_MS,
            Phase::Sending => CONTROL_REQUEST_WAIT_MS,
            Phase::Waiting => return None,
            Phase::Taking => CONTROL_RESPONSE_WAIT_MS,
            Phase::Leaving => CONTROL_LEAVE_WAIT_MS,
        };
        Some(self.since + Duration::from_millis(allowed_ms))
    }

    /// What to poll for. While a call is under way only the end of the client matters.
    pub fn interest(&self) -> PollFlags {
        match self.phase {
            Phase::Idle | Phase::Sending | Phase::Leaving => PollFlags::POLLIN,
            Phase::Waiting => PollFlags::empty(),
            Phase::Taking => PollFlags::POLLOUT,
        }
    }

    /// The socket to poll.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }

    /// The socket is ready for something.
    pub fn ready(&mut self, now: Instant) -> Moved {
        match self.phase {
            Phase::Idle | Phase::Sending => self.receive(now),
            // Polled for nothing, so this is a hang-up.
            Phase::Waiting => Moved::Ends,
            Phase::Taking => self.flush(now),
            Phase::Leaving => self.discard(),
        }
    }

    /// Answers the request that `Moved::Asks` gave out.
    pub fn respond(&mut self, response: &Response, now: Instant) -> Moved {
        self.enter(Phase::Taking, now);
        self.output.extend_from_slice(&http::encode(response, self.keep_alive));
        self.flush(now)
    }

    /// Closes the connection after the answer under way, or now.
    pub fn finish(&mut self) -> Moved {
        self.keep_alive = false;
        match self.phase {
            Phase::Waiting | Phase::Taking => Moved::Stays,
            Phase::Idle | Phase::Sending | Phase::Leaving => Moved::Ends,
        }
    }

    fn receive(&mut self, now: Instant) -> Moved {
        let limit = CONTROL_HEAD_MAX_BYTES + CONTROL_BODY_MAX_BYTES;
        let mut piece = [0; 16 * 1024];
        let room = piece.len().min(limit - self.input.len().min(limit));
        match self.stream.read(&mut piece[..room]) {
            Ok(0) => return Moved::Ends,
            Ok(count) => self.input.extend_from_slice(&piece[..count]),
            Err(error) => return stays_if_not_ready(&error),
        }
        if self.phase == Phase::Idle {
            self.enter(Phase::Sending, now);
        }
        self.parse(now)
    }

    /// Looks for a whole request in the input.
    fn parse(&mut self, now: Instant) -> Moved {
        if self.input.len() < self.needed_bytes {
            return Moved::Stays;
        }
        match http::parse(&self.input) {
            Ok(Progress::More { needed_bytes, awaits_continue }) => {
                self.needed_bytes = needed_bytes;
                // A dozen bytes into an empty socket; a client that does not get them sends anyway.
                if awaits_continue && self.stream.write(http::CONTINUE).is_err() {
                    return Moved::Ends;
                }
                Moved::Stays
            }
            Ok(Progress::Whole { request, keep_alive, length_bytes }) => {
                self.input.drain(..length_bytes);
                self.needed_bytes = 1;
                self.keep_alive &= keep_alive;
                self.enter(Phase::Waiting, now);
                Moved::Asks(Request { peer: self.peer, ..request })
            }
            Err(sentence) => {
                (self.keep_alive, self.refused) = (false, true);
                self.enter(Phase::Taking, now);
                self.output.extend_from_slice(&http::encode_refusal(&sentence));
                self.flush(now)
            }
        }
    }

    /// Sends what the socket takes; at the end goes on to the next request.
    fn flush(&mut self, now: Instant) -> Moved {
        while self.sent_bytes < self.output.len() {
            match self.stream.write(&self.output[self.sent_bytes..]) {
                Ok(0) => return Moved::Ends,
                Ok(count) => self.sent_bytes += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return stays_if_not_ready(&error),
            }
        }
        // A big answer's memory is not kept for an idle connection.
        self.output = Vec::new();
        self.sent_bytes = 0;
        if self.refused && self.stream.shutdown(Shutdown::Write).is_ok() {
            self.enter(Phase::Leaving, now);
            return Moved::Stays;
        }
        if !self.keep_alive {
            return Moved::Ends;
        }
        if self.input.is_empty() {
            self.input = Vec::new();
            self.enter(Phase::Idle, now);
            return Moved::Stays;
        }
        self.enter(Phase::Sending, now);
        self.parse(now)
    }

    fn discard(&mut self) -> Moved {
        match self.stream.read(&mut [0; 16 * 1024]) {
            Ok(0) => Moved::Ends,
            Ok(_) => Moved::Stays,
            Err(error) => stays_if_not_ready(&error),
        }
    }

    fn enter(&mut self, phase: Phase, now: Instant) {
        (self.phase, self.since) = (phase, now);
    }
}

fn stays_if_not_ready(error: &std::io::Error) -> Moved {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Moved::Stays,
        _ => Moved::Ends,
    }
}
