//! Getting a token: one core fetches, the others wait and share.
//!
//! Answers a challenge with the configured password, else with Docker's. Which challenge: the
//! source's own when it may give one, else the origin's, so that a mirror cannot name a token
//! server for the origin's password.

use std::rc::Rc;
use std::sync::Arc;

use crate::config as limits;
use crate::engine::{Core, Lane};
use crate::error::{Error, Result};
use crate::registry::auth::{self, Bearer, Challenge, Token, choose};
use crate::registry::client::Client;
use crate::registry::credentials::Credential;
use crate::registry::exchange::Exchange;
use crate::registry::fetch::{challenges, unix_now_s};
use crate::registry::http::Method;
use crate::registry::pool::Peer;
use crate::registry::request::{Content, Payload, Request};
use crate::registry::resolve::within;
use crate::registry::secret::Secret;
use crate::registry::tokens::{Fetching, Turn};
use crate::registry::way::Way;

impl Client {
    /// Sees to it that the slot of a source holds something newer than version `refused`.
    #[expect(clippy::too_many_arguments, reason = "who asks, for what, until when")]
    pub(super) async fn login(
        &self,
        core: &Core,
        way: &Rc<Way>,
        source: usize,
        offered: Vec<Challenge>,
        refused: u64,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<()> {
        let slot = &way.route.slots[way.route.sources[source].slot];
        loop {
            match slot.tokens.turn(refused, core.now()) {
                Turn::Have => return Ok(()),
                Turn::Failed(error) => return Err(error),
                Turn::Wait if core.now() >= deadline_ns => {
                    return Err(Error::Deadline("a token was not had in time".to_string()));
                }
                Turn::Wait => {
                    // The sleep ends by its own deadline, which is its purpose.
                    let _ = core.sleep(limits::TOKEN_WAIT_STEP_NS).await;
                }
                Turn::Fetch(fetching) => {
                    let until_ns = deadline_ns.min(core.now() + limits::TOKEN_FETCH_TIMEOUT_NS);
                    let fetched = self.answer(core, way, source, offered, until_ns, lane).await;
                    let fetched = fetched.map_err(|error| blamed(error, until_ns, deadline_ns));
                    return share(fetching, fetched, core.now());
                }
            }
        }
    }

    async fn answer(
        &self,
        core: &Core,
        way: &Rc<Way>,
        source: usize,
        offered: Vec<Challenge>,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<(Token, Challenge)> {
        let slot = &way.route.slots[way.route.sources[source].slot];
        let may_challenge = way.route.sources[source].may_challenge;
        let known = slot.tokens.challenge();
        let offered = match (choose(&offered), known) {
            (Some(offered), _) if may_challenge => offered.clone(),
            (_, Some(known)) => known,
            _ => self.origin_challenge(core, way, deadline_ns, lane).await?,
        };
        let credential = self.credential(core, way, source, deadline_ns).await?;
        let token = match (&offered, credential) {
            (_, Some(Credential::RegistryToken(token))) => lasting("Bearer", &token),
            (Challenge::Basic, Some(Credential::Basic(basic))) => lasting("Basic", &basic),
            (Challenge::Basic, _) => {
                return Err(Error::Denied(format!(
                    "{} wants a user and a password; set backend_config.auth or run docker login",
                    slot.origin
                )));
            }
            (Challenge::Bearer(bearer), credential) => {
                let fetched =
                    self.fetch_token(core, way, source, bearer, credential, deadline_ns, lane);
                fetched.await?
            }
        };
        Ok((token, offered))
    }

    async fn credential(
        &self,
        core: &Core,
        way: &Way,
        source: usize,
        deadline_ns: u64,
    ) -> Result<Option<Credential>> {
        let configured = way.route.registry()?.basic.clone();
        if let Some(basic) = self.shared.basic().or(configured) {
            return Ok(Some(Credential::Basic(basic)));
        }
        let slot = &way.route.slots[way.route.sources[source].slot];
        let (vault, host) = (Arc::clone(&self.shared.vault), slot.credential_host.clone());
        let asked = core.ask(move || vault.find(&host))?;
        let found = within(core, deadline_ns, asked).await;
        found.unwrap_or_else(|| Err(Error::Deadline("credentials were not had in time".into())))
    }

    /// What the origin itself demands, for mirrors that pass its tokens on.
    async fn origin_challenge(
        &self,
        core: &Core,
        way: &Rc<Way>,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<Challenge> {
        let line = way.lines.last().ok_or_else(|| Error::unavailable("there is no origin"))?;
        let request = plain_request(&["/v2/"]);
        let timing = way.timing(deadline_ns);
        let around = &self.shared.around;
        let exchange = Exchange::start(core, around, line, lane, &request, timing).await?;
        let found = challenges(&exchange);
        exchange.discard(core).await;
        let none = || Error::Denied(format!("{} demands nothing we can answer", line.peer.origin));
        choose(&found).cloned().ok_or_else(none)
    }

    #[expect(clippy::too_many_arguments, reason = "who asks, for what, with what, until when")]
    async fn fetch_token(
        &self,
        core: &Core,
        way: &Rc<Way>,
        source: usize,
        bearer: &Bearer,
        credential: Option<Credential>,
        deadline_ns: u64,
        lane: Lane,
    ) -> Result<Token> {
        let slot = &way.route.slots[way.route.sources[source].slot];
        let realm = bearer.realm(&slot.origin)?;
        let scope = auth::pull_scope(&way.route.registry()?.repo);
        let peer = Peer { origin: realm.origin.clone(), ..way.route.sources[source].peer.clone() };
        let line = self.pool.line(peer);
        let (location, form, basic) = match credential {
            Some(Credential::IdentityToken(token)) => {
                (realm.clone(), Some(bearer.refresh_form(&token, &scope)), None)
            }
            Some(Credential::Basic(basic)) => {
                let header = Secret::new(format!("Basic {}", basic.reveal()));
                (bearer.token_location(&realm, &scope)?, None, Some(header))
            }
            _ => (bearer.token_location(&realm, &scope)?, None, None),
        };
        let path = [location.path.as_str()];
        let request = Request {
            method: if form.is_some() { Method::Post } else { Method::Get },
            authorization: basic.as_ref(),
            accept: "application/json",
            content: form.as_deref().map(|form| Content {
                media_type: "application/x-www-form-urlencoded",
                payload: Payload::Bytes(form.as_bytes()),
            }),
            ..plain_request(&path)
        };
        let timing = way.timing(deadline_ns);
        let around = &self.shared.around;
        let read = async {
            let mut exchange = Exchange::start(core, around, &line, lane, &request, timing).await?;
            let status = exchange.head.status;
            if status != 200 {
                exchange.discard(core).await;
                return Err(match status {
                    400..500 if status != 429 => Error::Denied(format!(
                        "it answered {status}; check backend_config.auth, or run docker login"
                    )),
                    _ => Error::unavailable(format!("it answered {status}")),
                });
            }
            let json = exchange.read_all(core, limits::TOKEN_RESPONSE_SIZE_MAX).await?;
            exchange.finish();
            auth::parse_token(&json, core.now(), unix_now_s())
        };
        read.await.map_err(|error| error.context(format_args!("token server {}", realm.origin)))
    }
}

/// A fetch that ended at `until_ns`, before the request's own deadline, is the server's failure: it
/// may be tried again, and is shared.
fn blamed(error: Error, until_ns: u64, deadline_ns: u64) -> Error {
    match error {
        Error::Deadline(what) if until_ns < deadline_ns => Error::unavailable(what),
        error => error,
    }
}

fn share(fetching: Fetching<'_>, fetched: Result<(Token, Challenge)>, now_ns: u64) -> Result<()> {
    match fetched {
        Ok((token, challenge)) => {
            fetching.publish(token, challenge);
            Ok(())
        }
        // One request's time, or one core, is over: whoever waits for the token has time left.
        Err(error @ (Error::Deadline(_) | Error::Shutdown)) => {
            drop(fetching);
            Err(error)
        }
        Err(error) => {
            fetching.fail(&error, now_ns);
            Err(error)
        }
    }
}

/// What a password is worth: used until it is refused.
fn lasting(scheme: &str, secret: &Secret) -> Token {
    Token {
        authorization: Secret::new(format!("{scheme} {}", secret.reveal())),
        refresh_at_ns: u64::MAX,
        expires_at_ns: u64::MAX,
    }
}

fn plain_request<'a>(path: &'a [&'a str]) -> Request<'a> {
    Request {
        method: Method::Get,
        path,
        range: None,
        accept: "",
        authorization: None,
        lines: "",
        content: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::tokens::TokenSlot;

    #[test]
    fn what_is_shared_is_the_servers_failure_not_the_requests() {
        let late = || Error::Deadline("late".into());
        for (error, is_shared) in [
            (blamed(late(), 10, 10), false),
            (blamed(late(), 10, 11), true),
            (Error::Shutdown, false),
            (Error::Denied("no".into()), true),
        ] {
            let slot = TokenSlot::default();
            let Turn::Fetch(fetching) = slot.turn(0, 0) else { panic!("the first may fetch") };
            assert_eq!(share(fetching, Err(error.clone()), 0), Err(error.clone()));
            assert_eq!(matches!(slot.turn(0, 0), Turn::Failed(_)), is_shared, "{error}");
        }
        assert!(matches!(blamed(late(), 10, 11), Error::Unavailable { .. }));
    }
}
