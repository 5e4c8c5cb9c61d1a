//! The registry client of one core: ranges of blobs, small things whole, and upkeep.
//!
//! Callers hold an `Arc<Route>` and a deadline; tokens, redirects, mirrors, proxies and retries are
//! inside. After start a range that succeeds allocates nothing here (TLS may). Every wait ends by
//! the caller's deadline; no failure is remembered without an end.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::config as limits;
use crate::engine::sync::Notify;
use crate::engine::{Core, Lane};
use crate::error::{Error, Result};

use crate::registry::config::Backend;
use crate::registry::fetch::{Ask, Hop};
use crate::registry::http::Method;
use crate::registry::pool::Pool;
use crate::registry::redirects::Redirects;
use crate::registry::reference;
use crate::registry::request::warm;
use crate::registry::route::{Route, Shared};
use crate::registry::way::Way;

pub use crate::registry::body::Body;
pub use crate::registry::fetch::Target;

/// A data blob.
#[derive(Clone, Copy, Debug)]
pub struct BlobRef<'a> {
    /// 64 hex digits, without `sha256:`; a localfs backend takes any file name.
    pub id: &'a str,
}

/// Something small, whole and checked.
#[derive(Clone, Debug)]
pub struct Response {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// `sha256:...` of the bytes, computed here.
    pub digest: String,
    /// The Content-Type, empty when none was given.
    pub media_type: String,
}

/// One core's client. Cheap to share as `Rc<Client>`.
pub struct Client {
    pub(super) shared: Arc<Shared>,
    pub(super) pool: Pool,
    pub(super) redirects: RefCell<Redirects<Hop>>,
    pub(super) ways: RefCell<HashMap<u64, Rc<Way>>>,
    pub(super) is_closed: Cell<bool>,
    /// Whether nobody is to pause for another try.
    pub(super) is_hurried: Cell<bool>,
    /// Told when either of them is set.
    pub(super) stop: Notify,
    /// The core `maintain` runs on.
    pub(super) keeper: RefCell<Option<Core>>,
}

impl Client {
    /// A client without connections.
    pub fn new(shared: Arc<Shared>) -> Rc<Client> {
        Rc::new(Client {
            shared,
            pool: Pool::default(),
            redirects: RefCell::default(),
            ways: RefCell::default(),
            is_closed: Cell::new(false),
            is_hurried: Cell::new(false),
            stop: Notify::default(),
            keeper: RefCell::default(),
        })
    }

    /// Starts reading `range` of a blob's compressed bytes. Returns when the head of the answer is
    /// known to be right: 206 with exactly this range.
    pub async fn open(
        &self,
        core: &Core,
        route: &Arc<Route>,
        blob: BlobRef<'_>,
        range: Range<u64>,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<Body> {
        if range.start >= range.end {
            return Err(Error::Malformed(format!("blob {}: an empty range", blob.id)));
        }
        let way = self.way(core, route)?;
        if let Backend::LocalFs(config) = &route.backend {
            let file = way.files.open(core, config, blob.id).await?;
            if range.end > file.size_bytes {
                way.files.forget();
                return Err(Error::unavailable(format!(
                    "blob {} in {route}: its file ends at {} and {} was asked for",
                    blob.id, file.size_bytes, range.end
                )));
            }
            return Ok(Body::of_file(file, &range, way, deadline_ns));
        }
        check_blob_id(blob.id)?;
        let target = Target::Blob(blob.id);
        let ask = Ask { target, method: Method::Get, range: Some(&range), accept: "" };
        let (exchange, source) = self.fetch(core, &way, &ask, deadline_ns, lane).await?;
        Ok(Body::of_exchange(exchange, source, way, range.end - range.start))
    }

    /// The size of a blob. Asked by the first byte's Content-Range, which also works where a signed
    /// URL allows GET only; by HEAD where the total is not told.
    pub async fn blob_size(
        &self,
        core: &Core,
        route: &Arc<Route>,
        blob: BlobRef<'_>,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<u64> {
        let way = self.way(core, route)?;
        if let Backend::LocalFs(config) = &route.backend {
            return Ok(way.files.open(core, config, blob.id).await?.size_bytes);
        }
        check_blob_id(blob.id)?;
        let target = Target::Blob(blob.id);
        let first = Ask { target, method: Method::Get, range: Some(&(0..1)), accept: "" };
        let (exchange, _) = self.fetch(core, &way, &first, deadline_ns, lane).await?;
        let total = exchange.head.content_range.and_then(|range| range.total);
        exchange.discard(core).await;
        if let Some(total) = total {
            return Ok(total);
        }
        let head = Ask { target, method: Method::Head, range: None, accept: "" };
        let (exchange, _) = self.fetch(core, &way, &head, deadline_ns, lane).await?;
        let length = exchange.head.content_length;
        exchange.discard(core).await;
        length.ok_or_else(|| Error::unavailable(format!("blob {}: no size was told", blob.id)))
    }

    /// Fetches something small whole. Its sha256 is checked against the digest it was asked by, or
    /// the one the registry names.
    #[expect(clippy::too_many_arguments, reason = "where, what, how, until when")]
    pub async fn fetch_small(
        &self,
        core: &Core,
        route: &Arc<Route>,
        target: Target<'_>,
        accept: &str,
        limit_bytes: usize,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<Response> {
        match target {
            Target::Blob(id) => check_blob_id(id)?,
            Target::Manifest(name) if reference::is_digest(name) || reference::is_tag(name) => {}
            Target::Manifest(name) => {
                return Err(Error::Malformed(format!("{name:?} is neither a tag nor a digest")));
            }
        }
        let way = self.way(core, route)?;
        let ask = Ask { target, method: Method::Get, range: None, accept };
        let mut tries_left = limits::REGISTRY_RETRY_COUNT_MIN + 1;
        loop {
            tries_left -= 1;
            let (exchange, source) = self.fetch(core, &way, &ask, deadline_ns, lane).await?;
            match receive_small(core, exchange, target, limit_bytes).await {
                Ok(response) => {
                    way.succeeded(source);
                    return Ok(response);
                }
                Err(error) => {
                    way.failed(source, core.now());
                    let is_final = tries_left == 0 || core.now() >= deadline_ns;
                    if is_final || matches!(error, Error::Malformed(_)) {
                        return Err(error.context(format_args!("{target:?} of {route}")));
                    }
                }
            }
        }
    }

    /// Before the first fault: a token, the redirect of `blob`, and two warm connections. An image
    /// works when this fails, only later.
    pub async fn prepare(
        &self,
        core: &Core,
        route: &Arc<Route>,
        blob: Option<BlobRef<'_>>,
        deadline_ns: u64,
    ) -> Result<()> {
        let lane = Lane::Background;
        let way = self.way(core, route)?;
        let line = match (&route.backend, blob) {
            (Backend::LocalFs(_), _) => return Ok(()),
            (Backend::Registry(_), Some(blob)) => {
                check_blob_id(blob.id)?;
                let target = Target::Blob(blob.id);
                let ask = Ask { target, method: Method::Get, range: Some(&(0..1)), accept: "" };
                let (exchange, _) = self.fetch(core, &way, &ask, deadline_ns, lane).await?;
                let line = Rc::clone(exchange.line());
                exchange.discard(core).await;
                line
            }
            (Backend::Registry(_), None) => {
                let picked = way.health.borrow().pick(0, core.now()).unwrap_or(0);
                Rc::clone(&way.lines[picked])
            }
        };
        while line.idle_count() < limits::REGISTRY_WARM_CONNECTION_COUNT {
            let before = line.idle_count();
            warm(core, &self.shared.around, &line, lane, way.timing(deadline_ns)).await?;
            if line.idle_count() <= before {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Before shutdown: what is under way may end well, but nobody waits for another try.
    pub fn hurry(&self, core: &Core) {
        self.is_hurried.set(true);
        self.stop.wake_all(core);
    }

    /// At shutdown: closes idle connections; `maintain` returns.
    pub fn close(&self) {
        self.is_closed.set(true);
        self.pool.close();
        if let Some(core) = &*self.keeper.borrow() {
            self.stop.wake_all(core);
        }
    }

    /// This core's side of a route.
    pub(super) fn way(&self, core: &Core, route: &Arc<Route>) -> Result<Rc<Way>> {
        if self.is_closed.get() {
            return Err(Error::Shutdown);
        }
        let now_ns = core.now();
        let mut ways = self.ways.borrow_mut();
        let way =
            ways.entry(route.id).or_insert_with(|| Rc::new(Way::new(route, &self.pool, now_ns)));
        way.used_ns.set(now_ns);
        Ok(Rc::clone(way))
    }
}

async fn receive_small(
    core: &Core,
    mut exchange: crate::registry::exchange::Exchange,
    target: Target<'_>,
    limit_bytes: usize,
) -> Result<Response> {
    let head = exchange.head;
    let media_type = exchange.header(head.content_type).unwrap_or("").to_string();
    let told = exchange.header(head.content_digest).filter(|text| reference::is_digest(text));
    let expected = match target {
        Target::Blob(id) => Some(format!("sha256:{id}")),
        Target::Manifest(name) if reference::is_digest(name) => Some(name.to_string()),
        Target::Manifest(_) => told.map(str::to_string),
    };
    if head.content_length.is_some_and(|length| length > limit_bytes as u64) {
        return Err(Error::Malformed(format!("it is larger than {limit_bytes} bytes")));
    }
    let bytes = exchange.read_all(core, limit_bytes).await?;
    exchange.finish();
    let digest = digest_of(&bytes);
    match expected {
        Some(expected) if expected != digest => {
            Err(Error::Digest(format!("{expected} was asked for and {digest} came")))
        }
        _ => Ok(Response { bytes, digest, media_type }),
    }
}

/// `sha256:...` of the bytes.
pub fn digest_of(bytes: &[u8]) -> String {
    hex_digest(&Sha256::digest(bytes))
}

/// `sha256:` and the hex digits of a finished hash.
pub(super) fn hex_digest(hash: &[u8]) -> String {
    let mut digest = String::from("sha256:");
    for byte in hash {
        digest.push_str(&format!("{byte:02x}"));
    }
    digest
}

fn check_blob_id(id: &str) -> Result<()> {
    match reference::is_blob_id(id) {
        true => Ok(()),
        false => Err(Error::Malformed(format!("blob id {id:?} is not 64 hex digits"))),
    }
}
