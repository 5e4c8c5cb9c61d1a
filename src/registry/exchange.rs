//! One request and its answer on one connection.
//!
//! `start` takes a place on a line, sends the request on the warmest connection and returns with
//! the parsed head; `read` hands out the body; `finish` gives the connection back when the body was
//! read to its end. A reused connection that fails before a byte of the answer is replaced by a
//! fresh one, once, at no cost to the caller's tries; so is one whose answer to a reader's request
//! is much later than usual (`patience.rs`). A body must make progress: less than
//! HTTP_BODY_PROGRESS_SIZE_MIN in one timeout is an error. Decides nothing about statuses.

use std::ops::Range;
use std::rc::Rc;

use crate::config as limits;
use crate::engine::{Core, Lane, Lease};
use crate::error::{Error, Result};
use crate::registry::connection::{Connection, TEXT_SIZE};
use crate::registry::framing::Decoder;
use crate::registry::http::{ResponseHead, Span};
use crate::registry::pool::{Line, Place, Surroundings};
use crate::registry::request::{Request, Timing, ask, connect, late};

/// An answer whose body is being read.
pub struct Exchange {
    connection: Connection,
    place: Place,
    timing: Timing,
    /// The answer's head; its spans point into the text zone.
    pub head: ResponseHead,
    /// Text received and not yet used: the head stays before it.
    text: Range<usize>,
    decoder: Decoder,
    /// Progress: until when so many bytes must have come.
    window_end_ns: u64,
    window_left: usize,
    /// When it was asked for, when the request was sent, when the head had come.
    times_ns: [u64; 3],
    /// Whether its first answer was given up for being late.
    pub is_repeated: bool,
}

impl Exchange {
    /// Sends a request and receives the head of its answer.
    pub async fn start(
        core: &Core,
        around: &Surroundings,
        line: &Rc<Line>,
        lane: Lane,
        request: &Request<'_>,
        timing: Timing,
    ) -> Result<Exchange> {
        let wanted_ns = core.now();
        let place = line.enter(core, lane, timing.deadline_ns).await?;
        let mut idle = line.take_idle(core).await;
        let may_repeat = lane == Lane::Demand && request.range.is_some() && request.is_repeatable();
        let mut patience = line.patience.limit_ns();
        patience = patience.filter(|&limit_ns| may_repeat && limit_ns < timing.timeout_ns);
        let mut given_up = None;
        loop {
            let mut connection = match idle.take() {
                Some(connection) => connection,
                None => connect(core, around, line, lane, timing).await?,
            };
            connection.wake(lane).await;
            let mut text = 0..0;
            let asked_ns = core.now();
            let timeout_ns = patience.unwrap_or(timing.timeout_ns);
            let tried = Timing { timeout_ns, ..timing };
            let answered = ask(core, &mut connection, line, request, tried, &mut text).await;
            match answered {
                Ok(head) => {
                    let answered_ns = core.now();
                    line.patience.learn(answered_ns - asked_ns);
                    return Ok(Exchange {
                        connection,
                        place,
                        timing,
                        head,
                        text,
                        decoder: Decoder::new(head.framing),
                        window_end_ns: 0,
                        window_left: 0,
                        times_ns: [wanted_ns, given_up.unwrap_or(asked_ns), answered_ns],
                        is_repeated: given_up.is_some(),
                    });
                }
                Err(Error::Deadline(_))
                    if patience.is_some() && core.now() < timing.deadline_ns =>
                {
                    line.patience.spend();
                    (patience, given_up) = (None, Some(asked_ns));
                    drop(connection);
                    idle = line.take_idle(core).await;
                }
                // The server closed it while it was idle: nothing was lost but this try.
                Err(error)
                    if connection.is_reused
                        && text.end == 0
                        && request.is_repeatable()
                        && may_be_stale(&error) => {}
                Err(error) => return Err(late(error, core, timing.deadline_ns, "no answer")),
            }
        }
    }

    /// How long it took to get a connection, and from the request to the head of its answer.
    pub fn waits_ns(&self) -> (u64, u64) {
        let [wanted_ns, asked_ns, answered_ns] = self.times_ns;
        (asked_ns - wanted_ns, answered_ns - asked_ns)
    }

    /// The line it goes over.
    pub fn line(&self) -> &Rc<Line> {
        self.place.line()
    }

    /// The text of a header; asked for before the body is read.
    pub fn header(&self, span: Span) -> Option<&str> {
        // Spans count from the start of the head, which is the start of the zone's used part.
        span.text(self.connection.text(0..self.text.end))
    }

    /// Reads at least a byte of the body into `lease[range]`; 0 at its end, or for an empty range.
    pub async fn read(
        &mut self,
        core: &Core,
        mut lease: Lease,
        range: Range<usize>,
    ) -> (Lease, Result<usize>) {
        loop {
            if self.decoder.is_done() || range.is_empty() {
                return (lease, Ok(0));
            }
            let buffered = self.connection.text(self.text.clone());
            match self.decoder.decode(buffered, &mut lease[range.clone()]) {
                Err(error) => return (lease, Err(error)),
                Ok(progress) => {
                    self.text.start += progress.consumed;
                    if progress.produced > 0 {
                        self.count(progress.produced);
                        return (lease, Ok(progress.produced));
                    }
                }
            }
            if self.decoder.is_done() {
                return (lease, Ok(0));
            }
            let direct = self.decoder.direct_size();
            let got;
            if direct > 0 {
                let until_ns = self.progress_deadline(core);
                let end = range.end.min(range.start.saturating_add(direct as usize));
                let receiving = self.connection.receive_into(lease, range.start..end, until_ns);
                (lease, got) = receiving.await;
            } else {
                got = self.receive_more(core).await;
            }
            match got.map_err(|error| self.stalled(error, core)) {
                Err(error) => return (lease, Err(error)),
                Ok(0) => {
                    let ended = self.decoder.closed();
                    return (lease, ended.map(|()| 0));
                }
                Ok(size) if direct > 0 => {
                    self.decoder.received(size as u64);
                    self.count(size);
                    return (lease, Ok(size));
                }
                Ok(_) => {}
            }
        }
    }

    /// Reads on when all wanted bytes have come, to see the body end there and not later.
    pub async fn read_end(&mut self, core: &Core) -> Result<()> {
        let mut surplus = [0_u8; 1];
        while !self.decoder.is_done() {
            let buffered = self.connection.text(self.text.clone());
            let progress = self.decoder.decode(buffered, &mut surplus)?;
            self.text.start += progress.consumed;
            if progress.produced > 0 {
                return Err(Error::unavailable("the body is longer than it should be"));
            }
            if self.decoder.is_done() {
                break;
            }
            if self.receive_more(core).await? == 0 {
                self.decoder.closed()?;
            }
        }
        Ok(())
    }

    /// Reads the whole body into memory; one larger than `limit_bytes` is an error.
    pub async fn read_all(&mut self, core: &Core, limit_bytes: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        while !self.decoder.is_done() {
            let size = bytes.len();
            bytes.resize(size + TEXT_SIZE, 0);
            let buffered = self.connection.text(self.text.clone());
            let progress = self.decoder.decode(buffered, &mut bytes[size..])?;
            self.text.start += progress.consumed;
            bytes.truncate(size + progress.produced);
            self.count(progress.produced);
            if bytes.len() > limit_bytes {
                return Err(Error::Malformed(format!("it is larger than {limit_bytes} bytes")));
            }
            if progress.consumed > 0 {
                continue;
            }
            if self.receive_more(core).await? == 0 {
                self.decoder.closed()?;
            }
        }
        Ok(bytes)
    }

    /// Reads and drops a body nobody wants, if it is short, so that the connection can be kept.
    pub async fn discard(mut self, core: &Core) {
        let mut left = limits::HTTP_ERROR_BODY_SIZE_MAX;
        let mut sink = [0_u8; 512];
        while !self.decoder.is_done() && left > 0 {
            let buffered = self.connection.text(self.text.clone());
            let Ok(progress) = self.decoder.decode(buffered, &mut sink) else { return };
            self.text.start += progress.consumed;
            left = left.saturating_sub(progress.consumed);
            if progress.consumed > 0 || self.decoder.is_done() {
                continue;
            }
            if !matches!(self.receive_more(core).await, Ok(1..)) {
                return;
            }
        }
        self.finish();
    }

    /// Gives the connection back when the body was read to its end; closes it otherwise.
    pub fn finish(self) {
        let Exchange { connection, place, head, text, decoder, .. } = self;
        if decoder.is_done() && head.keep_alive && text.is_empty() {
            place.line().put_idle(connection);
        }
    }

    /// Receives more text behind what is there; 0 when the server closed. Once what came before is
    /// used up the zone begins anew, which ends the head's spans.
    async fn receive_more(&mut self, core: &Core) -> Result<usize> {
        if self.text.is_empty() {
            self.text = 0..0;
        }
        let until_ns = self.progress_deadline(core);
        let place = self.text.end..TEXT_SIZE;
        let got = self.connection.receive_text(place, until_ns).await;
        let size = got.map_err(|error| self.stalled(error, core))?;
        self.text.end += size;
        Ok(size)
    }

    fn stalled(&self, error: Error, core: &Core) -> Error {
        late(error, core, self.timing.deadline_ns, "the body has stalled: too little came")
    }

    fn progress_deadline(&mut self, core: &Core) -> u64 {
        let now_ns = core.now();
        if self.window_left == 0 {
            self.window_left = limits::HTTP_BODY_PROGRESS_SIZE_MIN;
            self.window_end_ns = now_ns + self.timing.timeout_ns;
        }
        self.window_end_ns.min(self.timing.deadline_ns)
    }

    fn count(&mut self, size: usize) {
        self.window_left = self.window_left.saturating_sub(size);
    }
}

fn may_be_stale(error: &Error) -> bool {
    matches!(error, Error::Unavailable { .. })
}
