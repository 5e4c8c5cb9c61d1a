//! The bytes of one range, as they arrive, from a registry or from a file.
//!
//! A body owns its connection and one wire lease. It yields exactly the bytes that were asked for:
//! a short or over-long one is an error, after which it is dead; drop it and open what is missing
//! again. A body that fails counts against its source, so that the next open goes elsewhere.

use std::ops::Range;
use std::rc::Rc;

use crate::engine::{Core, Lease};
use crate::error::{Error, Result};
use crate::registry::exchange::Exchange;
use crate::registry::localfs::LocalFile;
use crate::registry::way::Way;

/// A range that is being read.
pub struct Body {
    origin: Origin,
    way: Rc<Way>,
    remaining: u64,
}

/// Boxing the exchange would allocate for each request.
#[expect(clippy::large_enum_variant, reason = "moved twice per request, never stored in numbers")]
enum Origin {
    Http { exchange: Exchange, source: usize },
    File { file: Rc<LocalFile>, offset: u64, deadline_ns: u64 },
}

impl Body {
    /// A body of `size_bytes` from a source whose head was right.
    pub(super) fn of_exchange(
        exchange: Exchange,
        source: usize,
        way: Rc<Way>,
        size_bytes: u64,
    ) -> Self {
        Body { origin: Origin::Http { exchange, source }, way, remaining: size_bytes }
    }

    /// A body that is a part of a file.
    pub(super) fn of_file(
        file: Rc<LocalFile>,
        range: &Range<u64>,
        way: Rc<Way>,
        deadline_ns: u64,
    ) -> Self {
        let remaining = range.end - range.start;
        Body { origin: Origin::File { file, offset: range.start, deadline_ns }, way, remaining }
    }

    /// Reads at least one and at most `range.len()` bytes into `lease[range.start..]`; 0 only when
    /// nothing remains or the range is empty.
    pub async fn read_into(
        &mut self,
        core: &Core,
        lease: Lease,
        range: Range<usize>,
    ) -> (Lease, Result<usize>) {
        let wanted = (range.len() as u64).min(self.remaining) as usize;
        let range = range.start..range.start + wanted;
        if range.is_empty() {
            return (lease, Ok(0));
        }
        let (lease, got) = match &mut self.origin {
            Origin::Http { exchange, .. } => exchange.read(core, lease, range).await,
            Origin::File { file, offset, deadline_ns } => {
                file.read(lease, range, *offset, *deadline_ns).await
            }
        };
        let checked = match got {
            Ok(size) => self.advance(core, size).await,
            Err(error) => Err(error),
        };
        if checked.is_err()
            && let Origin::Http { source, .. } = self.origin
        {
            self.way.failed(source, core.now());
        }
        (lease, checked)
    }

    /// What was read is not what its digest says: the next open goes elsewhere, if it can.
    pub fn blame(&self, core: &Core) {
        if let Origin::Http { source, .. } = self.origin {
            self.way.lied(source, core.now());
        }
    }

    /// Bytes still to be read.
    pub fn remaining(&self) -> u64 {
        self.remaining
    }

    /// How long it took to get a connection, and from the request to the head of its answer.
    /// Nothing for a file.
    pub fn waits_ns(&self) -> Option<(u64, u64)> {
        match &self.origin {
            Origin::Http { exchange, .. } => Some(exchange.waits_ns()),
            Origin::File { .. } => None,
        }
    }

    /// Whether it was asked for twice, because the first answer was late.
    pub fn is_repeated(&self) -> bool {
        matches!(&self.origin, Origin::Http { exchange, .. } if exchange.is_repeated)
    }

    /// Gives the connection back when everything was read; closes it otherwise.
    pub fn finish(self) {
        if let Origin::Http { exchange, .. } = self.origin
            && self.remaining == 0
        {
            exchange.finish();
        }
    }

    async fn advance(&mut self, core: &Core, size: usize) -> Result<usize> {
        if size == 0 {
            let missing = self.remaining;
            return Err(Error::unavailable(format!("the body ended {missing} bytes early")));
        }
        self.remaining -= size as u64;
        match &mut self.origin {
            Origin::Http { exchange, source } if self.remaining == 0 => {
                exchange.read_end(core).await?;
                self.way.succeeded(*source);
            }
            Origin::Http { .. } => {}
            Origin::File { offset, .. } => *offset += size as u64,
        }
        Ok(size)
    }
}
