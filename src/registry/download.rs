//! A whole blob as a stream: from its first byte to its last, verified, resumed where it broke.
//!
//! The bytes go to a function as they come, in order and once; only after `Ok` are they known to
//! have the digest. A broken body is followed by a range request for the rest, as long as there is
//! progress. The function may block: the core it runs on belongs to this download alone.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::config as limits;
use crate::engine::{Class, Core, Lane};
use crate::error::{Error, Result};
use crate::registry::client::{Body, Client, Target, hex_digest};
use crate::registry::fetch::{Ask, is_worth_retrying, pause};
use crate::registry::http::Method;
use crate::registry::reference::is_digest;
use crate::registry::route::Route;
use crate::registry::way::Way;

/// What is to be downloaded.
#[derive(Clone, Copy, Debug)]
pub struct Whole<'a> {
    /// `sha256:` and 64 hex digits.
    pub digest: &'a str,
    /// Its size, as its manifest says.
    pub size: u64,
}

/// A download under way.
struct Download<'a, F> {
    core: &'a Core,
    client: &'a Client,
    way: Rc<Way>,
    id: &'a str,
    size: u64,
    /// Bytes handed over.
    offset: u64,
    hasher: Sha256,
    sink: F,
}

impl Client {
    /// Hands all bytes of a blob to `sink`. An error of the sink ends the download as it is.
    pub async fn download(
        &self,
        core: &Core,
        route: &Arc<Route>,
        blob: Whole<'_>,
        sink: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let named = |error: Error| error.context(format_args!("{} of {route}", blob.digest));
        let id = blob.digest.strip_prefix("sha256:").filter(|_| is_digest(blob.digest));
        let id = id.ok_or_else(|| Error::Malformed(format!("{:?}: no digest", blob.digest)))?;
        let way = self.way(core, route)?;
        let (size, hasher) = (blob.size, Sha256::new());
        let mut download = Download { core, client: self, way, id, size, offset: 0, hasher, sink };
        download.run().await.map_err(named)?;
        let digest = hex_digest(&download.hasher.finalize());
        match digest == blob.digest {
            true => Ok(()),
            false => Err(named(Error::Digest(format!("its bytes have the digest {digest}")))),
        }
    }
}

impl<F: FnMut(&[u8]) -> Result<()>> Download<'_, F> {
    async fn run(&mut self) -> Result<()> {
        let mut round = 0;
        loop {
            let before = self.offset;
            let error = match self.go_on().await {
                Ok(()) => return Ok(()),
                Err(Stop::Sink(error)) => return Err(error),
                Err(Stop::Source(error)) => error,
            };
            round = if self.offset > before { 0 } else { round + 1 };
            let until_ns = self.core.now() + limits::CLI_FETCH_DEADLINE_NS;
            let may_heal = is_worth_retrying(&error) || matches!(error, Error::Deadline(_));
            if round >= limits::DOWNLOAD_TRIES_MAX
                || !may_heal
                || !pause(self.core, &error, round, until_ns).await
            {
                return Err(error);
            }
        }
    }

    /// Reads on from where it is to the end or to a failure.
    async fn go_on(&mut self) -> std::result::Result<(), Stop> {
        if self.offset == self.size && self.size > 0 {
            return Ok(());
        }
        let mut body = self.open(self.offset..self.size).await.map_err(Stop::Source)?;
        let mut lease = self.core.lease(Class::Range).await;
        while body.remaining() > 0 {
            let size = lease.len();
            let (back, got) = body.read_into(self.core, lease, 0..size).await;
            lease = back;
            let size = got.map_err(Stop::Source)?;
            self.hasher.update(&lease[..size]);
            self.offset += size as u64;
            (self.sink)(&lease[..size]).map_err(Stop::Sink)?;
        }
        body.finish();
        Ok(())
    }

    /// The whole is asked for without a Range, which every server can answer.
    async fn open(&self, range: Range<u64>) -> Result<Body> {
        let transfer_ns = (range.end - range.start).saturating_mul(limits::SECOND_NS)
            / limits::CLI_FETCH_SLOWEST_BYTES;
        let deadline_ns = self.core.now() + limits::CLI_FETCH_DEADLINE_NS + transfer_ns;
        let asked = (range.start > 0).then_some(&range);
        let (target, method) = (Target::Blob(self.id), Method::Get);
        let ask = Ask { target, method, range: asked, accept: "" };
        let lane = Lane::Demand;
        let (exchange, source) =
            self.client.fetch(self.core, &self.way, &ask, deadline_ns, lane).await?;
        if let (None, Some(length)) = (asked, exchange.head.content_length)
            && length != self.size
        {
            return Err(Error::Unsupported(format!(
                "it has {length} bytes where {} were announced",
                self.size
            )));
        }
        let size = range.end - range.start;
        Ok(Body::of_exchange(exchange, source, Rc::clone(&self.way), size))
    }
}

/// Whose failure it is.
enum Stop {
    Source(Error),
    Sink(Error),
}
