//! The connections of one core, by whom they lead to.
//!
//! A line is a peer (an origin, perhaps through a proxy) with its idle connections, the warmest on
//! top, and two numbers of places: demand never waits for background, background never takes what
//! demand may need. An idle connection is looked at before it is lent when it has rested a while,
//! and by `tend` once a second, so that one the server closed is seldom met. Knows no HTTP beyond
//! the CONNECT that opens a tunnel (in `exchange`).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use crate::config as limits;
use crate::engine::sync::Notify;
use crate::engine::{Core, Lane};
use crate::error::{Error, Result};
use crate::registry::config::ProxyConfig;
use crate::registry::connection::Connection;
use crate::registry::origin::{Origin, Scheme};
use crate::registry::patience::Patience;
use crate::registry::resolve::Names;
use crate::registry::tls::{TlsConfig, TlsConfigs, TlsStream};

/// An idle connection younger than this is lent without a look: one more round of the loop costs
/// more than the rare free retry.
const FRESH_NS: u64 = limits::SECOND_NS;

/// Whom a line leads to, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Who answers in the end.
    pub origin: Origin,
    /// The proxy in between.
    pub proxy: Option<Arc<ProxyConfig>>,
    /// Whether certificates are taken unseen.
    pub skip_verify: bool,
}

impl Peer {
    /// Whether the proxy is asked for a tunnel; otherwise it is asked for the URL itself.
    pub fn is_tunnelled(&self) -> bool {
        self.proxy.is_some() && self.origin.scheme == Scheme::Https
    }
}

/// What dialling needs of the process.
#[derive(Debug)]
pub struct Surroundings {
    /// Names to addresses.
    pub names: Arc<Names>,
    /// Certificates.
    pub tls: Arc<TlsConfigs>,
}

/// One peer's connections on one core.
pub struct Line {
    /// Whom it leads to.
    pub peer: Peer,
    /// The Host header.
    pub authority: String,
    /// What stands before a path in the request line: empty, or `http://HOST` through a proxy.
    pub target_prefix: String,
    /// How long its answers take.
    pub patience: Patience,
    idle: RefCell<Vec<Connection>>,
    in_use: [Cell<usize>; 2],
    freed: Notify,
}

/// The right to one request at a time on a line; given back when dropped.
pub struct Place {
    core: Core,
    line: Rc<Line>,
    lane: Lane,
}

impl Line {
    fn new(peer: Peer) -> Self {
        let through_proxy = peer.proxy.is_some() && !peer.is_tunnelled();
        Line {
            authority: peer.origin.authority(),
            target_prefix: if through_proxy { peer.origin.to_string() } else { String::new() },
            peer,
            patience: Patience::default(),
            idle: RefCell::new(Vec::with_capacity(limits::REGISTRY_IDLE_CONNECTION_COUNT_MAX)),
            in_use: [Cell::new(0), Cell::new(0)],
            freed: Notify::default(),
        }
    }

    /// Waits for a place of the lane.
    pub async fn enter(self: &Rc<Self>, core: &Core, lane: Lane, until_ns: u64) -> Result<Place> {
        let (count, max) = self.places(lane);
        while count.get() >= max {
            if !self.freed.wait(core).by(until_ns).await {
                return Err(Error::Deadline(format!(
                    "{}: no connection became free in time",
                    self.peer.origin
                )));
            }
        }
        count.set(count.get() + 1);
        Ok(Place { core: core.clone(), line: Rc::clone(self), lane })
    }

    /// The warmest idle connection that still stands.
    pub async fn take_idle(&self, core: &Core) -> Option<Connection> {
        loop {
            let connection = self.idle.borrow_mut().pop()?;
            let rested_ns = core.now().saturating_sub(connection.idle_since_ns);
            if rested_ns >= limits::REGISTRY_IDLE_LIFE_NS {
                continue;
            }
            if rested_ns < FRESH_NS || !connection.is_stale().await {
                return Some(connection);
            }
        }
    }

    /// Gives a connection back for others; closes it when it is not quiet or there are enough.
    pub fn put_idle(&self, mut connection: Connection) {
        let mut idle = self.idle.borrow_mut();
        if connection.rest() && idle.len() < limits::REGISTRY_IDLE_CONNECTION_COUNT_MAX {
            idle.push(connection);
        }
    }

    /// Idle connections.
    pub fn idle_count(&self) -> usize {
        self.idle.borrow().len()
    }

    /// A connection to the first hop: the proxy's when there is one. Each address is tried once.
    pub async fn dial(&self, core: &Core, names: &Arc<Names>, until_ns: u64) -> Result<Connection> {
        let hop = self.peer.proxy.as_ref().map_or(&self.peer.origin, |proxy| &proxy.origin);
        let addresses = names.resolve(core, &hop.host, hop.port, until_ns).await?;
        let mut failure = Error::unavailable("it has no address");
        for (index, address) in addresses.iter().enumerate() {
            // The addresses share the time, so that a silent first one leaves some to the second.
            let now_ns = core.now();
            let share_ns = until_ns.saturating_sub(now_ns) / (addresses.len() - index) as u64;
            match Connection::dial(core, *address, now_ns + share_ns).await {
                Ok(connection) => return Ok(connection),
                Err(Error::Deadline(_)) => {
                    failure = Error::unavailable(format!("{address} does not answer in time"));
                }
                Err(error) => failure = error.context(address),
            }
        }
        Err(failure)
    }

    /// The TLS of a new connection, when the peer speaks it.
    pub async fn tls(&self, core: &Core, configs: &Arc<TlsConfigs>) -> Result<Option<TlsStream>> {
        if self.peer.origin.scheme == Scheme::Http {
            return Ok(None);
        }
        let config = self.tls_config(core, configs).await?;
        TlsStream::new(&config, &self.peer.origin.host).map(Some)
    }

    async fn tls_config(&self, core: &Core, configs: &Arc<TlsConfigs>) -> Result<TlsConfig> {
        let skip_verify = self.peer.skip_verify;
        if let Some(config) = configs.find(skip_verify, &self.peer.origin) {
            return Ok(config);
        }
        let (configs, origin) = (Arc::clone(configs), self.peer.origin.clone());
        core.offload(move || configs.load(skip_verify, &origin)).await
    }

    fn places(&self, lane: Lane) -> (&Cell<usize>, usize) {
        match lane {
            Lane::Demand => (&self.in_use[0], limits::REGISTRY_DEMAND_CONNECTION_COUNT_MAX),
            Lane::Background => (&self.in_use[1], limits::REGISTRY_BACKGROUND_CONNECTION_COUNT_MAX),
        }
    }

    fn is_unused(&self) -> bool {
        self.idle_count() == 0 && self.in_use.iter().all(|count| count.get() == 0)
    }
}

impl Place {
    /// The line the place is on.
    pub fn line(&self) -> &Rc<Line> {
        &self.line
    }

    /// Whose work it is.
    pub fn lane(&self) -> Lane {
        self.lane
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let (count, _) = self.line.places(self.lane);
        count.set(count.get() - 1);
        self.line.freed.wake_all(&self.core);
    }
}

/// All lines of one core.
#[derive(Default)]
pub struct Pool {
    lines: RefCell<Vec<Rc<Line>>>,
}

impl Pool {
    /// The line to a peer: the same one for everybody who means the same peer.
    pub fn line(&self, peer: Peer) -> Rc<Line> {
        let mut lines = self.lines.borrow_mut();
        if let Some(line) = lines.iter().find(|line| line.peer == peer) {
            return Rc::clone(line);
        }
        if lines.len() >= limits::REGISTRY_LINE_COUNT_MAX {
            // A line that others still hold works on; it only is not found again.
            lines.retain(|line| !line.is_unused());
        }
        let line = Rc::new(Line::new(peer));
        lines.push(Rc::clone(&line));
        line
    }

    /// Closes idle connections that are too old or that their server has closed.
    pub async fn tend(&self, core: &Core) {
        for at in 0.. {
            let Some(line) = self.lines.borrow().get(at).cloned() else { return };
            // Oldest first; each is lent to nobody while it is looked at.
            for _ in 0..line.idle_count() {
                let oldest = match line.idle.borrow_mut() {
                    mut idle if !idle.is_empty() => idle.remove(0),
                    _ => break,
                };
                let rested_ns = core.now().saturating_sub(oldest.idle_since_ns);
                let is_old = rested_ns >= limits::REGISTRY_IDLE_LIFE_NS;
                if rested_ns < FRESH_NS {
                    line.idle.borrow_mut().insert(0, oldest);
                    break;
                }
                if !is_old && !oldest.is_stale().await {
                    let mut idle = line.idle.borrow_mut();
                    let place = idle.partition_point(|c| c.idle_since_ns <= oldest.idle_since_ns);
                    if idle.len() < limits::REGISTRY_IDLE_CONNECTION_COUNT_MAX {
                        idle.insert(place, oldest);
                    }
                }
            }
        }
    }

    /// Closes every idle connection.
    pub fn close(&self) {
        self.lines.borrow_mut().drain(..).for_each(|line| line.idle.borrow_mut().clear());
    }
}
