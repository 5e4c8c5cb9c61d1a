//! A repository that is written to: one request with its logins and redirects, and what it gave.
//!
//! Writes go to the registry itself, never to a mirror. A redirect to another origin is followed
//! without our credentials. Tokens are asked for with the right to push, and to pull from the
//! repositories blobs may be mounted from. `request` is one try, `insist` is for requests that may
//! be made twice: it tries again, with pauses, what may heal.

use std::rc::Rc;
use std::sync::Arc;

use crate::config as limits;
use crate::engine::{Core, Lane};
use crate::error::{Error, Result};
use crate::registry::auth::{self, Challenge, Token};
use crate::registry::client::{Client, Response, Target};
use crate::registry::complaint;
use crate::registry::exchange::Exchange;
use crate::registry::fetch::{challenges, is_worth_retrying, pause, refusal};
use crate::registry::http::Method;
use crate::registry::origin::{Location, Scheme};
use crate::registry::pool::Peer;
use crate::registry::reference::is_digest;
use crate::registry::request::{Content, Payload, Request};
use crate::registry::route::{Route, Source};
use crate::registry::way::Way;

/// A repository as one engine writes to it.
pub struct Repository {
    pub(super) core: Core,
    client: Rc<Client>,
    route: Arc<Route>,
    way: Rc<Way>,
    /// What tokens are asked for besides what the registry says.
    scopes: Vec<String>,
}

/// A request of a write.
#[derive(Clone, Copy)]
pub(super) struct Write<'a> {
    /// What is done.
    pub method: Method,
    /// To what.
    pub location: &'a Location,
    /// With what.
    pub content: Option<Content<'a>>,
    /// Bytes of it, which need time.
    pub size: u64,
}

/// What matters of an answer; its body is read and gone.
#[derive(Debug)]
pub(super) struct Answer {
    /// The status.
    pub status: u16,
    /// Location, resolved.
    pub location: Option<Location>,
    /// The size of the upload so far, by its Range.
    pub upload_size: Option<u64>,
    /// Docker-Content-Digest.
    pub digest: Option<String>,
    /// Whether OCI-Subject was there.
    pub has_subject: bool,
    /// What the status means when it is no success.
    refusal: Error,
}

impl Answer {
    /// Whether the registry did what was asked.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The answer as an error.
    pub fn into_error(self) -> Error {
        self.refusal
    }
}

/// What became of a manifest that was put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Put {
    /// Whether it was there already, so that nothing was sent.
    pub existed: bool,
    /// Whether the registry says that it has taken note of its `subject`.
    pub has_subject: bool,
}

impl Repository {
    /// The repository of a route; blobs may be mounted from `sources`, repositories of the same
    /// registry.
    pub fn open(
        core: &Core,
        client: &Rc<Client>,
        route: &Arc<Route>,
        sources: &[String],
    ) -> Result<Repository> {
        let own = &route.registry()?.repo;
        let others = sources.iter().filter(|source| *source != own);
        let mut scopes = vec![auth::push_scope(own)];
        scopes.extend(others.map(|source| auth::pull_scope(source)));
        Ok(Repository {
            core: core.clone(),
            client: Rc::clone(client),
            route: Arc::clone(route),
            way: client.way(core, route)?,
            scopes,
        })
    }

    /// The manifest or index of a name, if there is one.
    pub async fn manifest(&self, name: &str, accept: &str) -> Result<Option<Response>> {
        let limit = limits::MANIFEST_MAX_BYTES;
        let deadline_ns = self.deadline_ns(limit as u64);
        let (core, route, target) = (&self.core, &self.route, Target::Manifest(name));
        let fetching =
            self.client.fetch_small(core, route, target, accept, limit, deadline_ns, Lane::Demand);
        match fetching.await {
            Ok(response) => Ok(Some(response)),
            Err(Error::NotFound(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes a manifest under a tag or its digest, unless it is there already.
    pub async fn put_manifest(&self, name: &str, media_type: &str, bytes: &[u8]) -> Result<Put> {
        let digest = crate::registry::client::digest_of(bytes);
        let known = self.manifest(name, media_type).await?;
        if known.is_some_and(|known| known.digest == digest) {
            return Ok(Put { existed: true, has_subject: false });
        }
        self.write_manifest(name, media_type, bytes).await
    }

    /// The same without looking first: only what is sent is answered with whether the registry has
    /// taken note of its subject.
    pub async fn write_manifest(&self, name: &str, media_type: &str, bytes: &[u8]) -> Result<Put> {
        let digest = crate::registry::client::digest_of(bytes);
        let location = self.location(&format!("manifests/{name}"))?;
        let content = Some(Content { media_type, payload: Payload::Bytes(bytes) });
        let size = bytes.len() as u64;
        let write = Write { method: Method::Put, location: &location, content, size };
        let answer = self.insist(write).await;
        let answer = answer.map_err(|error| error.context(format_args!("manifest {name}")))?;
        match answer.digest.as_ref() {
            _ if !answer.is_success() => {
                Err(answer.into_error().context(format_args!("manifest {name}")))
            }
            Some(told) if *told != digest => Err(Error::Digest(format!(
                "manifest {name}: {digest} was sent and the registry has {told}"
            ))),
            _ => Ok(Put { existed: false, has_subject: answer.has_subject }),
        }
    }

    /// Something of this repository.
    pub(super) fn location(&self, rest: &str) -> Result<Location> {
        let peer = &self.source()?.peer;
        let repo = &self.route.registry()?.repo;
        Location::new(peer.origin.clone(), &format!("/v2/{repo}/{rest}"))
    }

    /// Makes a request until it is answered otherwise than by a failure that may heal. For requests
    /// that may be made twice.
    pub(super) async fn insist(&self, write: Write<'_>) -> Result<Answer> {
        let mut round = 0;
        loop {
            let error = match self.request(write).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if round + 1 >= limits::UPLOAD_TRIES_MAX || !self.rest(&error, round).await {
                return Err(error);
            }
            round += 1;
        }
    }

    /// Waits after a failure; false, at once, when waiting does not help.
    pub(super) async fn rest(&self, error: &Error, round: u32) -> bool {
        let until_ns = self.core.now() + limits::CLI_FETCH_DEADLINE_NS;
        let may_heal = is_worth_retrying(error) || matches!(error, Error::Deadline(_));
        may_heal && pause(&self.core, error, round, until_ns).await
    }

    /// One request. A status below 500 other than 408 and 429 is an answer, the rest are errors.
    pub(super) async fn request(&self, write: Write<'_>) -> Result<Answer> {
        let (exchange, location) = self.exchange(write).await?;
        let answer = summary(&self.core, exchange, &location).await;
        match answer.status {
            408 | 429 | 500.. => Err(answer.into_error()),
            _ => Ok(answer),
        }
    }

    /// One request, wherever it is redirected to, with a new token if the old one is refused.
    async fn exchange(&self, write: Write<'_>) -> Result<(Exchange, Location)> {
        let source = self.source()?;
        let deadline_ns = self.deadline_ns(write.size);
        let mut location = write.location.clone();
        let (mut has_logged_in, mut redirect_count) = (false, 0);
        loop {
            let is_own = location.origin == source.peer.origin;
            let copy = self.way.token(source.slot);
            let is_expired =
                copy.token.as_ref().is_some_and(|t| t.expires_at_ns <= self.core.now());
            if is_own && is_expired && !has_logged_in {
                has_logged_in = true;
                self.login(Vec::new(), copy.version, deadline_ns).await?;
                continue;
            }
            let token = copy.token.as_ref().filter(|_| is_own);
            let exchange = self.send(write, &location, token, deadline_ns).await?;
            match exchange.head.status {
                // Where a blob is kept is of no interest; that it is kept is the answer.
                302 | 303 | 307 if write.method == Method::Head => {
                    return Ok((exchange, location));
                }
                301 | 302 | 303 | 307 | 308 => {
                    redirect_count += 1;
                    if redirect_count > limits::REGISTRY_REDIRECT_COUNT_MAX {
                        return Err(Error::Malformed(format!("{location} redirects for ever")));
                    }
                    let next = exchange.header(exchange.head.location).unwrap_or_default();
                    let next = location.join(next)?;
                    exchange.discard(&self.core).await;
                    location = next;
                }
                401 | 403 if is_own && !has_logged_in => {
                    let offered = challenges(&exchange);
                    if offered.is_empty() && copy.token.is_none() {
                        return Ok((exchange, location));
                    }
                    has_logged_in = true;
                    exchange.discard(&self.core).await;
                    self.login(offered, copy.version, deadline_ns).await?;
                }
                _ => return Ok((exchange, location)),
            }
        }
    }

    async fn send(
        &self,
        write: Write<'_>,
        location: &Location,
        token: Option<&Token>,
        deadline_ns: u64,
    ) -> Result<Exchange> {
        let source = self.source()?;
        let is_own = location.origin == source.peer.origin;
        let mut timing = self.way.timing(deadline_ns);
        timing.timeout_ns = timing.timeout_ns.saturating_mul(limits::UPLOAD_TIMEOUT_FACTOR);
        let path = [location.path.as_str()];
        let request = Request {
            method: write.method,
            path: &path,
            range: None,
            accept: "",
            authorization: token.map(|token| &token.authorization),
            lines: if is_own { source.lines.reveal() } else { "" },
            content: write.content,
        };
        let peer = Peer { origin: location.origin.clone(), ..source.peer.clone() };
        let (around, line) = (&self.client.shared.around, self.client.pool.line(peer));
        Exchange::start(&self.core, around, &line, Lane::Demand, &request, timing)
            .await
            .map_err(|error| error.context(&location.origin))
    }

    /// Replaces the token of version `refused` by one for everything this repository needs.
    async fn login(
        &self,
        mut offered: Vec<Challenge>,
        refused: u64,
        deadline_ns: u64,
    ) -> Result<()> {
        auth::widen(&mut offered, &self.scopes);
        let (core, way, lane) = (&self.core, &self.way, Lane::Demand);
        let source = self.route.sources.len() - 1;
        self.client.login(core, way, source, offered, refused, deadline_ns, lane).await
    }

    /// The registry itself stands last.
    fn source(&self) -> Result<&Source> {
        let none = || Error::Unsupported(format!("{} cannot be written to", self.route));
        self.route.sources.last().ok_or_else(none)
    }

    /// Longer bodies get more time, down to a speed at which nobody would wait.
    fn deadline_ns(&self, size: u64) -> u64 {
        let transfer_ns = size.saturating_mul(limits::SECOND_NS) / limits::CLI_FETCH_SLOWEST_BYTES;
        self.core.now() + limits::CLI_FETCH_DEADLINE_NS + transfer_ns
    }
}

async fn summary(core: &Core, mut exchange: Exchange, asked: &Location) -> Answer {
    let head = exchange.head;
    let told = exchange.header(head.location).and_then(|target| asked.join(target).ok());
    let upload_size = exchange.header(head.range).and_then(parse_upload_range);
    let digest = exchange.header(head.content_digest).filter(|text| is_digest(text));
    let digest = digest.map(str::to_string);
    let has_subject = exchange.header(head.subject).is_some();
    let mut refusal = refusal(&exchange, &asked.origin, true);
    let is_refused = head.status >= 400;
    let body = match is_refused {
        true => exchange.read_all(core, limits::HTTP_ERROR_BODY_SIZE_MAX).await.ok(),
        false => None,
    };
    match (is_refused, body) {
        (true, Some(body)) => {
            exchange.finish();
            if let Some(said) = complaint::parse(&body) {
                refusal = refusal.context(format_args!("{said:?}"));
            }
        }
        // A refusal that cannot be read ends its connection.
        (true, None) => drop(exchange),
        (false, _) => exchange.discard(core).await,
    }
    Answer {
        status: head.status,
        location: told.map(|told| same_scheme(told, asked)),
        upload_size,
        digest,
        has_subject,
        refusal,
    }
}

/// Registries behind a TLS proxy that do not know of it name themselves in plain text.
fn same_scheme(mut told: Location, asked: &Location) -> Location {
    let (from, to) = (&told.origin, &asked.origin);
    let is_unaware = from.scheme == Scheme::Http
        && to.scheme == Scheme::Https
        && from.host == to.host
        && [from.scheme.default_port(), to.port].contains(&from.port);
    if is_unaware {
        told.origin = asked.origin.clone();
    }
    told
}

/// The bytes an upload has by `Range: 0-LAST`. Registries write `0-0` for none and for one alike;
/// it is taken for none, and the digest decides.
fn parse_upload_range(text: &str) -> Option<u64> {
    let text = text.strip_prefix("bytes=").unwrap_or(text);
    let (first, last) = text.split_once('-')?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if first != "0" || !is_number(last) {
        return None;
    }
    match last.parse::<u64>().ok()? {
        0 => Some(0),
        last => last.checked_add(1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upload_has_come_as_far_as_its_range_says() {
        assert_eq!(parse_upload_range("0-1023"), Some(1024));
        assert_eq!(parse_upload_range("bytes=0-9"), Some(10));
        assert_eq!(parse_upload_range("0-0"), Some(0));
        let top = u64::MAX.to_string();
        for text in ["", "-", "0-", "1-5", "0-x", "0--1", "0-+5", &format!("0-{top}"), "5"] {
            assert_eq!(parse_upload_range(text), None, "{text:?}");
        }
    }

    #[test]
    fn an_upload_stays_on_tls_and_elsewhere_is_elsewhere() {
        let at = |url: &str| Location::parse(url).unwrap();
        let asked = at("https://r.example/v2/");
        let told = |url: &str| same_scheme(at(url), &asked).to_string();
        assert_eq!(told("http://r.example/u/1"), "https://r.example/u/1");
        assert_eq!(told("http://r.example:443/u/1"), "https://r.example/u/1");
        assert_eq!(told("http://r.example:5000/u/1"), "http://r.example:5000/u/1");
        assert_eq!(told("http://o.example/u/1"), "http://o.example/u/1");
        assert_eq!(told("https://o.example/u/1"), "https://o.example/u/1");
    }
}
