//! What a client does when nobody asks: once a second, in the background.
//!
//! Idle connections that are old or closed go; tokens of routes in use are renewed before they end,
//! so that no fault pays for it; troubled mirrors and the proxy are pinged; what no route needs any
//! more is forgotten.

use std::rc::Rc;

use crate::config as limits;
use crate::engine::{Core, Lane};
use crate::registry::client::Client;
use crate::registry::exchange::Exchange;
use crate::registry::http::Method;
use crate::registry::origin::Location;
use crate::registry::pool::Peer;
use crate::registry::request::{Request, Timing};
use crate::registry::way::Way;

impl Client {
    /// Runs until `close`; one background task per core.
    pub async fn maintain(&self, core: &Core) {
        *self.keeper.borrow_mut() = Some(core.clone());
        // Filled anew each time; one that keeps its room allocates nothing beside the fault path.
        let mut ways: Vec<Rc<Way>> = Vec::with_capacity(limits::REGISTRY_LINE_COUNT_MAX);
        while !self.is_closed.get() {
            let next_ns = core.now() + limits::REGISTRY_MAINTAIN_INTERVAL_NS;
            self.stop.wait(core).by(next_ns).await;
            self.pool.tend(core).await;
            let now_ns = core.now();
            let is_young =
                |way: &Rc<Way>| now_ns - way.used_ns.get() < limits::REGISTRY_WAY_LIFE_NS;
            self.ways.borrow_mut().retain(|_, way| is_young(way));
            ways.extend(self.ways.borrow().values().cloned());
            for way in ways.drain(..) {
                if self.is_closed.get() {
                    break;
                }
                way.files.forget();
                self.renew_tokens(core, &way).await;
                self.ping_sources(core, &way).await;
            }
        }
        *self.keeper.borrow_mut() = None;
        self.pool.close();
    }

    async fn renew_tokens(&self, core: &Core, way: &Rc<Way>) {
        let now_ns = core.now();
        let used_ago_ns = now_ns.saturating_sub(way.used_ns.get());
        if used_ago_ns > limits::TOKEN_RENEWAL_PAUSE_NS {
            return;
        }
        for slot in 0..way.route.slots.len() {
            let copy = way.token(slot);
            let is_due = copy.token.as_ref().is_some_and(|token| token.refresh_at_ns <= now_ns);
            let source = way.route.sources.iter().rposition(|source| source.slot == slot);
            if let (true, Some(source)) = (is_due, source) {
                let until_ns = now_ns + limits::TOKEN_FETCH_TIMEOUT_NS;
                let lane = Lane::Background;
                // A failure is met again, and reported, by the request that needs the token.
                let _ =
                    self.login(core, way, source, Vec::new(), copy.version, until_ns, lane).await;
            }
        }
    }

    async fn ping_sources(&self, core: &Core, way: &Rc<Way>) {
        for (index, source) in way.route.sources.iter().enumerate() {
            let Some(ping) = &source.ping else { continue };
            let now_ns = core.now();
            let is_proxy = source.peer.proxy.is_some();
            let used_ago_ns = now_ns.saturating_sub(way.used_ns.get());
            let is_wanted = match is_proxy {
                true => used_ago_ns <= source.check_pause_ns,
                false => way.health.borrow().is_troubled(index),
            };
            if !is_wanted || !way.health.borrow_mut().ping_due(index, now_ns) {
                continue;
            }
            let is_well = self.ping(core, way, ping).await;
            let mut health = way.health.borrow_mut();
            match is_well {
                true => health.succeeded(index),
                false => health.ping_failed(index, core.now()),
            }
        }
    }

    async fn ping(&self, core: &Core, way: &Way, ping: &Location) -> bool {
        let skip_verify = way.lines.first().is_some_and(|line| line.peer.skip_verify);
        let line = self.pool.line(Peer { origin: ping.origin.clone(), proxy: None, skip_verify });
        let limit_ns = limits::REGISTRY_PING_TIMEOUT_NS;
        let timing = Timing {
            deadline_ns: core.now() + limit_ns,
            connect_ns: limit_ns,
            timeout_ns: limit_ns,
        };
        let path = [ping.path.as_str()];
        let request = Request {
            method: Method::Get,
            path: &path,
            range: None,
            accept: "",
            authorization: None,
            lines: "",
            content: None,
        };
        let lane = Lane::Background;
        match Exchange::start(core, &self.shared.around, &line, lane, &request, timing).await {
            Ok(exchange) => {
                let is_well = (200..400).contains(&exchange.head.status);
                exchange.discard(core).await;
                is_well
            }
            Err(_) => false,
        }
    }
}
