//! A core's side of a route: its lines, its view of the sources' health, its copy of the tokens.
//!
//! Belongs to one core; made when the core first uses a route and dropped when it has not for long.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use crate::config as limits;
use crate::error::Error;
use crate::registry::config::Backend;
use crate::registry::localfs::LocalFiles;
use crate::registry::mirrors::Health;
use crate::registry::pool::{Line, Pool};
use crate::registry::request::Timing;
use crate::registry::route::Route;
use crate::registry::tokens::TokenCopy;

/// What one core knows about one route.
pub struct Way {
    /// The route.
    pub route: Arc<Route>,
    /// A line for each source.
    pub lines: Vec<Rc<Line>>,
    /// Which sources are well.
    pub health: RefCell<Health>,
    /// Open files of a localfs backend.
    pub files: LocalFiles,
    /// When it was last asked for something.
    pub used_ns: Cell<u64>,
    copies: RefCell<Vec<TokenCopy>>,
}

impl Way {
    /// A fresh view: everything well.
    pub fn new(route: &Arc<Route>, pool: &Pool, now_ns: u64) -> Self {
        let files_only = [(u32::MAX, limits::SECOND_NS)];
        let sources = route.sources.iter().map(|s| (s.failure_limit, s.check_interval_ns));
        let health = match route.sources.is_empty() {
            true => Health::new(files_only.into_iter()),
            false => Health::new(sources),
        };
        Way {
            route: Arc::clone(route),
            lines: route.sources.iter().map(|source| pool.line(source.peer.clone())).collect(),
            health: RefCell::new(health),
            files: LocalFiles::default(),
            used_ns: Cell::new(now_ns),
            copies: RefCell::new(vec![TokenCopy::default(); route.slots.len()]),
        }
    }

    /// The token of a slot as of now.
    pub fn token(&self, slot: usize) -> TokenCopy {
        let mut copies = self.copies.borrow_mut();
        self.route.slots[slot].tokens.refresh(&mut copies[slot]);
        copies[slot].clone()
    }

    /// The backend's times under a deadline.
    pub fn timing(&self, deadline_ns: u64) -> Timing {
        match &self.route.backend {
            Backend::Registry(config) => Timing {
                deadline_ns,
                connect_ns: config.connect_timeout_ns,
                timeout_ns: config.timeout_ns,
            },
            Backend::LocalFs(_) => {
                let timeout_ns = limits::REGISTRY_TIMEOUT_DEFAULT_S * limits::SECOND_NS;
                Timing { deadline_ns, connect_ns: timeout_ns, timeout_ns }
            }
        }
    }

    /// A request to a source went wrong in a way that another may not.
    pub fn failed(&self, source: usize, now_ns: u64) {
        self.health.borrow_mut().failed(source, now_ns);
    }

    /// The same, with what the source has said about it.
    pub fn failed_with(&self, source: usize, error: &Error, now_ns: u64) {
        self.failed(source, now_ns);
        if let Error::Unavailable { retry_after_ms: Some(asked_ms), .. } = error {
            let asked_ns = asked_ms.saturating_mul(limits::MILLISECOND_NS);
            self.health.borrow_mut().rests(source, now_ns, asked_ns);
        }
    }

    /// What a source sent was not what its digest says.
    pub fn lied(&self, source: usize, now_ns: u64) {
        self.health.borrow_mut().lied(source, now_ns);
    }

    /// A source has answered well.
    pub fn succeeded(&self, source: usize) {
        self.health.borrow_mut().succeeded(source);
    }
}
