//! The story of one request to a route: sources, tokens, redirects, tries.
//!
//! `fetch` goes round the sources until one answers as it should, pausing between rounds, within
//! the caller's deadline and a bounded number of tries. `attempt` is one try at one source: it
//! follows redirects (never with our credentials to another origin), renews the token once, and
//! remembers where blobs are kept. A refusal by the origin ends the request; one by a mirror does
//! not.

use std::ops::Range;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::config as limits;
use crate::engine::{Core, Lane};
use crate::error::{Error, Result};
use crate::registry::auth::{Challenge, parse_challenges};
use crate::registry::client::Client;
use crate::registry::exchange::Exchange;
use crate::registry::http::{Method, check_range};
use crate::registry::origin::{Location, Origin};
use crate::registry::pool::{Line, Peer};
use crate::registry::redirects;
use crate::registry::request::Request;
use crate::registry::route::proxied_origin;
use crate::registry::timestamp;
use crate::registry::way::Way;

/// What a request is about.
#[derive(Clone, Copy, Debug)]
pub enum Target<'a> {
    /// A tag or `sha256:...` of the route's repository.
    Manifest(&'a str),
    /// A blob by its 64 hex digits.
    Blob(&'a str),
}

/// A request to a route.
#[derive(Clone, Copy, Debug)]
pub struct Ask<'a> {
    /// Of what.
    pub target: Target<'a>,
    /// GET or HEAD.
    pub method: Method,
    /// Which bytes; all without one.
    pub range: Option<&'a Range<u64>>,
    /// The Accept header; nothing when empty.
    pub accept: &'a str,
}

/// Where a redirect led.
pub struct Hop {
    location: Location,
    line: Rc<Line>,
    /// Whether it is the origin that was asked, so that our credentials are for it.
    is_same_origin: bool,
}

impl Client {
    /// Asks the route's sources; returns the answer with a right head, and the source it is from.
    pub(super) async fn fetch(
        &self,
        core: &Core,
        way: &Rc<Way>,
        ask: &Ask<'_>,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<(Exchange, usize)> {
        let config = way.route.registry()?;
        let retries = config.retry_limit.max(limits::REGISTRY_RETRY_COUNT_MIN);
        let mut tries_left = way.health.borrow().usable_count(core.now()) as u32 + retries;
        let (mut tried, mut round) = (0, 0);
        let mut last = None;
        loop {
            let picked = way.health.borrow().pick(tried, core.now());
            let (error, before) = match (picked, last.take()) {
                (Some(source), before) => {
                    tried |= 1 << source;
                    way.health.borrow_mut().begin(source, core.now());
                    tries_left -= 1;
                    match self.attempt(core, way, source, ask, deadline_ns, lane).await {
                        Ok(exchange) => return Ok((exchange, source)),
                        Err(error) => (error, before),
                    }
                }
                (None, before) => {
                    // A round is over: what the last source refused will be refused again.
                    let may_heal = before.as_ref().is_none_or(is_worth_retrying);
                    if !may_heal || !self.rest(core, way, round, deadline_ns).await {
                        return Err(before.unwrap_or_else(|| all_rest(way, core.now())));
                    }
                    (tried, round) = (0, round + 1);
                    last = before;
                    continue;
                }
            };
            if let Some(source) = picked
                && is_worth_retrying(&error)
            {
                way.failed_with(source, &error, core.now());
            }
            if tries_left == 0 || core.now() >= deadline_ns || error == Error::Shutdown {
                return Err(error);
            }
            // What a mirror lacks the origin may have, as soon as it answers.
            let is_origin = picked == Some(way.route.sources.len() - 1);
            last = match before {
                Some(before) if is_worth_retrying(&before) && !is_origin => Some(before),
                _ => Some(error),
            };
        }
    }

    /// Waits before the next round: a growing time of which half is random, and until a source can
    /// be asked. False, without waiting, when the deadline would pass first; false when the daemon
    /// stops.
    async fn rest(&self, core: &Core, way: &Way, round: u32, deadline_ns: u64) -> bool {
        let now_ns = core.now();
        let awake_ns = way.health.borrow().awake_ns(now_ns).max(now_ns);
        let until_ns = awake_ns + own_pause_ns(round, core.random());
        if until_ns >= deadline_ns || self.is_hurried.get() {
            return false;
        }
        // Another source may be back before those that rest.
        let look_ns = until_ns.min(now_ns + limits::REGISTRY_RETRY_PAUSE_NS_MAX);
        self.stop.wait(core).by(look_ns).await;
        !self.is_hurried.get()
    }

    async fn attempt(
        &self,
        core: &Core,
        way: &Rc<Way>,
        source: usize,
        ask: &Ask<'_>,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<Exchange> {
        let result = self.try_source(core, way, source, ask, deadline_ns, lane).await;
        result.map_err(|error| {
            let origin = &way.route.sources[source].peer.origin;
            let via = match way.route.sources[source].peer.proxy {
                Some(_) => " through the proxy",
                None => "",
            };
            match ask.target {
                Target::Blob(id) => error.context(format_args!("blob {id} from {origin}{via}")),
                Target::Manifest(name) => error
                    .context(format_args!("manifest {name} of {} from {origin}{via}", way.route)),
            }
        })
    }

    async fn try_source(
        &self,
        core: &Core,
        way: &Rc<Way>,
        index: usize,
        ask: &Ask<'_>,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<Exchange> {
        let source = &way.route.sources[index];
        let mut hop = self.known_hop(way, index, ask, core.now());
        let mut is_remembered = hop.is_some();
        let mut has_logged_in = false;
        let mut redirect_count = 0;
        loop {
            let takes_token = hop.as_ref().is_none_or(|hop| hop.is_same_origin);
            let copy = way.token(source.slot);
            let is_expired = copy.token.as_ref().is_some_and(|t| t.expires_at_ns <= core.now());
            if takes_token && is_expired && !has_logged_in {
                has_logged_in = true;
                self.login(core, way, index, Vec::new(), copy.version, deadline_ns, lane).await?;
                continue;
            }
            let token = copy.token.as_ref().filter(|_| takes_token);
            let sent = self.send(core, way, index, hop.as_deref(), ask, token, deadline_ns, lane);
            let exchange = match sent.await {
                Ok(exchange) if !(is_remembered && exchange.head.status >= 400) => exchange,
                // Where we were sent once is no longer right: ask the source again.
                _ if is_remembered && core.now() < deadline_ns => {
                    self.forget_hop(way, index, ask);
                    (hop, is_remembered) = (None, false);
                    continue;
                }
                Ok(exchange) => exchange,
                Err(error) => return Err(error),
            };
            match exchange.head.status {
                200..=299 => return accepted(exchange, ask),
                301 | 302 | 303 | 307 | 308 => {
                    redirect_count += 1;
                    if redirect_count > limits::REGISTRY_REDIRECT_COUNT_MAX {
                        return Err(Error::unavailable("it redirects for ever"));
                    }
                    let next = self.next_hop(way, index, hop.as_deref(), ask, &exchange)?;
                    exchange.discard(core).await;
                    self.remember_hop(core, way, index, ask, &next);
                    hop = Some(next);
                }
                401 | 403 if takes_token && !has_logged_in => {
                    has_logged_in = true;
                    let challenges = challenges(&exchange);
                    let refusal = refusal(&exchange, &source.peer.origin, takes_token);
                    exchange.discard(core).await;
                    if challenges.is_empty() && copy.token.is_none() {
                        return Err(refusal);
                    }
                    self.login(core, way, index, challenges, copy.version, deadline_ns, lane)
                        .await?;
                }
                _ => {
                    let origin = hop.as_ref().map_or(&source.peer.origin, |h| &h.location.origin);
                    let error = refusal(&exchange, origin, takes_token);
                    exchange.discard(core).await;
                    return Err(error);
                }
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the one place where all of it meets")]
    async fn send(
        &self,
        core: &Core,
        way: &Rc<Way>,
        index: usize,
        hop: Option<&Hop>,
        ask: &Ask<'_>,
        token: Option<&crate::registry::auth::Token>,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<Exchange> {
        let source = &way.route.sources[index];
        let repo = &way.route.registry()?.repo;
        let path = match ask.target {
            Target::Blob(id) => [&source.prefix, "/v2/", repo, "/blobs/sha256:", id],
            Target::Manifest(name) => [&source.prefix, "/v2/", repo, "/manifests/", name],
        };
        let hop_path = hop.map(|hop| [hop.location.path.as_str()]);
        let request = Request {
            method: ask.method,
            path: hop_path.as_ref().map_or(&path[..], |path| &path[..]),
            range: ask.range,
            accept: ask.accept,
            authorization: token.map(|token| &token.authorization),
            lines: if hop.is_none_or(|hop| hop.is_same_origin) {
                source.lines.reveal()
            } else {
                ""
            },
            content: None,
        };
        let line = hop.map_or(&way.lines[index], |hop| &hop.line);
        let timing = way.timing(deadline_ns);
        Exchange::start(core, &self.shared.around, line, lane, &request, timing).await
    }

    fn known_hop(&self, way: &Way, index: usize, ask: &Ask<'_>, now_ns: u64) -> Option<Rc<Hop>> {
        match ask.target {
            Target::Blob(id) if ask.method == Method::Get => {
                self.redirects.borrow().find(way.route.id, index, id, now_ns)
            }
            _ => None,
        }
    }

    fn forget_hop(&self, way: &Way, index: usize, ask: &Ask<'_>) {
        if let Target::Blob(id) = ask.target {
            self.redirects.borrow_mut().forget(way.route.id, index, id);
        }
    }

    fn remember_hop(&self, core: &Core, way: &Way, index: usize, ask: &Ask<'_>, hop: &Rc<Hop>) {
        if let (Target::Blob(id), Method::Get) = (ask.target, ask.method) {
            let life_ns = redirects::life_ns(&hop.location, unix_now_s());
            if life_ns > 0 {
                let key = (way.route.id, index, id);
                let until_ns = core.now().saturating_add(life_ns);
                self.redirects.borrow_mut().remember(key, Rc::clone(hop), until_ns);
            }
        }
    }

    /// Where an answer sends us, with what the configuration says about blobs.
    fn next_hop(
        &self,
        way: &Way,
        index: usize,
        hop: Option<&Hop>,
        ask: &Ask<'_>,
        exchange: &Exchange,
    ) -> Result<Rc<Hop>> {
        let source = &way.route.sources[index];
        let config = way.route.registry()?;
        let target = exchange.header(exchange.head.location);
        let target = target.ok_or_else(|| Error::unavailable("a redirect without Location"))?;
        let asked = match hop {
            Some(hop) => hop.location.clone(),
            None => Location::new(source.peer.origin.clone(), "/v2/")?,
        };
        let mut location = asked.join(target)?;
        if let Target::Blob(_) = ask.target {
            let scheme = config.blob_scheme.unwrap_or(location.origin.scheme);
            if scheme != location.origin.scheme {
                let is_default = location.origin.port == location.origin.scheme.default_port();
                location.origin.port =
                    if is_default { scheme.default_port() } else { location.origin.port };
                location.origin.scheme = scheme;
            }
            if let Some(host) = &config.blob_redirected_host {
                location.origin = Origin::parse(scheme, host)?;
            }
        }
        let use_http = source.peer.proxy.as_ref().is_some_and(|proxy| proxy.use_http);
        location.origin = proxied_origin(&location.origin, use_http);
        let peer = Peer { origin: location.origin.clone(), ..source.peer.clone() };
        let is_same_origin = location.origin == source.peer.origin;
        Ok(Rc::new(Hop { line: self.pool.line(peer), location, is_same_origin }))
    }
}

/// Seconds since 1970, for dates that servers write.
pub fn unix_now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The challenges of an answer.
pub fn challenges(exchange: &Exchange) -> Vec<Challenge> {
    let spans = exchange.head.challenges.into_iter();
    spans.filter_map(|span| exchange.header(span)).flat_map(parse_challenges).collect()
}

fn accepted(exchange: Exchange, ask: &Ask<'_>) -> Result<Exchange> {
    match ask.range {
        Some(range) => {
            check_range(&exchange.head, range)?;
        }
        None if exchange.head.status != 200 || exchange.head.is_encoded => {
            let status = exchange.head.status;
            return Err(Error::unavailable(format!("an answer we did not ask for ({status})")));
        }
        None => {}
    }
    Ok(exchange)
}

/// What a status that is no success means.
pub fn refusal(exchange: &Exchange, origin: &Origin, took_token: bool) -> Error {
    let status = exchange.head.status;
    let retry_after = exchange.header(exchange.head.retry_after);
    let retry_after_ms =
        retry_after.and_then(|text| timestamp::parse_retry_after_ms(text, unix_now_s()));
    match status {
        401 | 403 if took_token => Error::Denied(format!(
            "{origin} answered {status}; check backend_config.auth, or run docker login"
        )),
        404 | 410 => Error::NotFound(format!("{origin} answered {status}")),
        416 => Error::Malformed(format!("{origin} answered 416: the blob ends before this range")),
        _ => Error::Unavailable { what: format!("{origin} answered {status}"), retry_after_ms },
    }
}

/// Whether the same source may answer the same request better a little later.
pub fn is_worth_retrying(error: &Error) -> bool {
    matches!(error, Error::Unavailable { .. } | Error::Malformed(_) | Error::Digest(_))
}

/// Waits before the next round: what the server asked for, else a growing time of which half is
/// random. False, without waiting, when the deadline would pass first.
pub async fn pause(core: &Core, error: &Error, round: u32, deadline_ns: u64) -> bool {
    let jittered_ns = own_pause_ns(round, core.random());
    let pause_ns = match error {
        Error::Unavailable { retry_after_ms: Some(asked_ms), .. } => {
            jittered_ns.max(asked_ms.saturating_mul(limits::MILLISECOND_NS))
        }
        _ => jittered_ns,
    };
    let until_ns = core.now().saturating_add(pause_ns);
    if until_ns >= deadline_ns {
        return false;
    }
    // The sleep ends by its own deadline, which is its purpose.
    let _ = core.sleep_until(until_ns).await;
    true
}

/// Nobody was asked, because of what they answered others.
fn all_rest(way: &Way, now_ns: u64) -> Error {
    let left_ns = way.health.borrow().awake_ns(now_ns).saturating_sub(now_ns);
    let left_ms = left_ns.div_ceil(limits::MILLISECOND_NS);
    let what = format!("{} has asked not to be asked for another {left_ms} ms", way.route);
    Error::Unavailable { what, retry_after_ms: Some(left_ms) }
}

fn own_pause_ns(round: u32, random: u64) -> u64 {
    let whole_ns = match round.checked_sub(1) {
        None => limits::REGISTRY_RETRY_PAUSE_NS_FIRST,
        Some(doublings) => limits::REGISTRY_RETRY_PAUSE_NS << doublings.min(16),
    };
    let half_ns = whole_ns.min(limits::REGISTRY_RETRY_PAUSE_NS_MAX) / 2;
    half_ns + random % half_ns
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MILLISECOND_NS;

    #[test]
    fn pauses_begin_short_and_grow_up_to_a_limit() {
        let between = |round| {
            let halves = [0, u64::MAX].map(|random| own_pause_ns(round, random));
            (own_pause_ns(round, 0), halves[1] < 2 * halves[0])
        };
        let expected_ms = [2, 25, 50, 100, 200, 400, 800, 1000, 1000];
        for (round, half_ms) in expected_ms.into_iter().enumerate() {
            assert_eq!(between(round as u32), (half_ms * MILLISECOND_NS, true), "{round}");
        }
        assert_eq!(between(u32::MAX), (1000 * MILLISECOND_NS, true));
    }
}
