//! Routes: what all cores share about one backend, and what the process shares about all of them.
//!
//! A route is interned: equal backends are one route, with one token per repository, so a node with
//! a hundred images of one registry behaves like one client. A route lives as long as somebody
//! holds it. Its sources stand in their order of preference, the origin last. Does no I/O.

use std::collections::HashMap;
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::error::{Error, Result};
use crate::registry::auth::Token;
use crate::registry::config::{Backend, RegistryConfig};
use crate::registry::origin::{Location, Origin, Scheme};
use crate::registry::pace::Pace;
use crate::registry::pool::{Peer, Surroundings};
use crate::registry::resolve::Names;
use crate::registry::secret::Secret;
use crate::registry::tls::TlsConfigs;
use crate::registry::tokens::TokenSlot;
use crate::registry::vault::Vault;

/// Docker's directory of certificates per registry.
const CERTIFICATES: &str = "/etc/docker/certs.d";

/// What the cores of one process share.
#[derive(Debug)]
pub struct Shared {
    /// Names and certificates.
    pub around: Surroundings,
    /// Passwords.
    pub vault: Arc<Vault>,
    routes: Mutex<Routes>,
    basic: Mutex<Option<Secret>>,
}

#[derive(Debug, Default)]
struct Routes {
    known: HashMap<Backend, Weak<Route>>,
    next_id: u64,
}

impl Shared {
    /// With the environment's Docker configuration and the system's certificates.
    pub fn new() -> Arc<Shared> {
        Shared::with(Vault::of_environment(), Path::new(CERTIFICATES))
    }

    /// With a Docker configuration file and a directory of certificates of one's own.
    pub fn at(docker_config: Option<PathBuf>, certificates: &Path) -> Arc<Shared> {
        Shared::with(Vault::new(docker_config), certificates)
    }

    fn with(vault: Vault, certificates: &Path) -> Arc<Shared> {
        let tls = Arc::new(TlsConfigs::new(certificates));
        let around = Surroundings { names: Names::of_system(), tls };
        Arc::new(Shared {
            around,
            vault: Arc::new(vault),
            routes: Mutex::default(),
            basic: Mutex::default(),
        })
    }

    /// Replaces the password of every registry backend: base64 of `user:password`, checked. Counts
    /// from the next token on; `None` goes back to what each backend says.
    pub fn set_basic(&self, basic: Option<Secret>) {
        *self.basic.lock().unwrap_or_else(PoisonError::into_inner) = basic;
    }

    /// The password that replaces those of the backends.
    pub fn basic(&self) -> Option<Secret> {
        self.basic.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The route of a backend; the same one for equal backends.
    pub fn route(&self, backend: &Backend) -> Result<Arc<Route>> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(route) = routes.known.get(backend).and_then(Weak::upgrade) {
            return Ok(route);
        }
        routes.known.retain(|_, route| route.strong_count() > 0);
        routes.next_id += 1;
        let route = Arc::new(Route::new(routes.next_id, backend)?);
        routes.known.insert(backend.clone(), Arc::downgrade(&route));
        Ok(route)
    }
}

/// A way to one backend.
#[derive(Debug)]
pub struct Route {
    /// Tells routes apart in the tables of a core.
    pub id: u64,
    /// Tells hosts apart: the same for all repositories of one registry, and another one for each
    /// folder of files.
    pub host: u64,
    /// What was configured.
    pub backend: Backend,
    /// Mirrors, proxy, origin; empty for files.
    pub sources: Vec<Source>,
    /// What the sources' `slot` numbers mean.
    pub slots: Vec<Slot>,
    /// How its readers fare.
    pub pace: Pace,
    /// Whether bytes of a blob have ever come this way.
    is_proven: AtomicBool,
}

/// Somebody who can be asked.
#[derive(Debug)]
pub struct Source {
    /// Whom to connect to.
    pub peer: Peer,
    /// Stands before `/v2/`.
    pub prefix: String,
    /// Header lines of its own.
    pub lines: Secret,
    /// Which token it gets.
    pub slot: usize,
    /// Whether a challenge of its own may be answered; the origin's is asked for otherwise.
    pub may_challenge: bool,
    /// How to learn whether it is well.
    pub ping: Option<Location>,
    /// Time between pings.
    pub check_interval_ns: u64,
    /// Pings rest when the route was not used for this long.
    pub check_pause_ns: u64,
    /// Failures in a row until it is left out.
    pub failure_limit: u32,
}

/// A token and whose password gets it.
#[derive(Debug)]
pub struct Slot {
    /// The token.
    pub tokens: TokenSlot,
    /// The registry the token is for.
    pub origin: Origin,
    /// What its password is filed under.
    pub credential_host: String,
}

impl Route {
    fn new(id: u64, backend: &Backend) -> Result<Self> {
        let mut host = DefaultHasher::new();
        let (sources, slots) = match backend {
            Backend::Registry(config) => {
                config.origin.hash(&mut host);
                (sources(config), slots(config))
            }
            Backend::LocalFs(_) => {
                id.hash(&mut host);
                (Vec::new(), Vec::new())
            }
        };
        let (host, backend, pace) = (host.finish(), backend.clone(), Pace::default());
        let is_proven = AtomicBool::new(false);
        Ok(Route { id, host, backend, sources, slots, pace, is_proven })
    }

    /// Bytes of a blob came.
    pub fn proven(&self) {
        // Mostly known already: no core takes the others' cache line then.
        if !self.is_proven() {
            self.is_proven.store(true, Ordering::Relaxed);
        }
    }

    /// Whether bytes of a blob have ever come this way, in the life of this daemon.
    pub fn is_proven(&self) -> bool {
        self.is_proven.load(Ordering::Relaxed)
    }

    /// The configuration of a registry.
    pub fn registry(&self) -> Result<&RegistryConfig> {
        match &self.backend {
            Backend::Registry(config) => Ok(config),
            Backend::LocalFs(_) => {
                Err(Error::Unsupported("a localfs backend has no manifests".to_string()))
            }
        }
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.backend {
            Backend::Registry(config) => write!(f, "{}/{}", config.origin.authority(), config.repo),
            Backend::LocalFs(config) => match (&config.blob_file, config.dirs.first()) {
                (Some(file), _) => write!(f, "{}", file.display()),
                (None, Some(dir)) => write!(f, "{}", dir.display()),
                (None, None) => write!(f, "no directory"),
            },
        }
    }
}

fn sources(config: &RegistryConfig) -> Vec<Source> {
    let mut next_slot = 1;
    let direct = |origin: &Origin| Peer {
        origin: origin.clone(),
        proxy: None,
        skip_verify: config.skip_verify,
    };
    let mut sources: Vec<Source> = Vec::new();
    for mirror in &config.mirrors {
        let slot = if mirror.auth_through { next_slot } else { 0 };
        next_slot += usize::from(mirror.auth_through);
        sources.push(Source {
            peer: direct(&mirror.origin),
            prefix: mirror.prefix.clone(),
            lines: mirror.headers.clone(),
            slot,
            may_challenge: mirror.auth_through,
            ping: mirror.ping.clone(),
            check_interval_ns: mirror.health_check_interval_ns,
            check_pause_ns: u64::MAX,
            failure_limit: mirror.failure_limit,
        });
    }
    let origin = |peer: Peer| Source {
        peer,
        prefix: String::new(),
        lines: Secret::new(""),
        slot: 0,
        may_challenge: true,
        ping: None,
        check_interval_ns: crate::config::SECOND_NS,
        check_pause_ns: u64::MAX,
        failure_limit: u32::MAX,
    };
    if let Some(proxy) = &config.proxy {
        let asked = proxied_origin(&config.origin, proxy.use_http);
        let peer = Peer { proxy: Some(Arc::new(proxy.clone())), ..direct(&asked) };
        sources.push(Source {
            ping: proxy.ping.clone(),
            check_interval_ns: proxy.check_interval_ns,
            check_pause_ns: proxy.check_pause_elapsed_ns,
            failure_limit: PROXY_FAILURE_LIMIT,
            ..origin(peer)
        });
        if !proxy.fallback {
            return sources;
        }
    }
    sources.push(origin(direct(&config.origin)));
    sources
}

/// nydus has no failure_limit for the proxy; a mirror's default serves.
const PROXY_FAILURE_LIMIT: u32 = 5;

/// Whom the proxy is asked for: with `use_http`, the same host in plain text on the plain port.
pub fn proxied_origin(origin: &Origin, use_http: bool) -> Origin {
    match (use_http, origin.scheme) {
        (true, Scheme::Https) => {
            let port = if origin.port == 443 { 80 } else { origin.port };
            Origin { scheme: Scheme::Http, port, ..origin.clone() }
        }
        _ => origin.clone(),
    }
}

/// The origin's slot, then one for each mirror that authenticates by itself.
fn slots(config: &RegistryConfig) -> Vec<Slot> {
    let tokens = match &config.token {
        None => TokenSlot::default(),
        Some(token) => TokenSlot::holding(Token {
            authorization: Secret::new(format!("Bearer {}", token.reveal())),
            refresh_at_ns: u64::MAX,
            expires_at_ns: u64::MAX,
        }),
    };
    let origin = config.origin.clone();
    let credential_host = config.credential_host.clone();
    let mut slots = vec![Slot { tokens, origin, credential_host }];
    for mirror in config.mirrors.iter().filter(|mirror| mirror.auth_through) {
        slots.push(Slot {
            tokens: TokenSlot::default(),
            origin: mirror.origin.clone(),
            credential_host: mirror.origin.authority(),
        });
    }
    slots
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn route(shared: &Shared, config: serde_json::Value) -> Arc<Route> {
        shared.route(&Backend::parse("registry", &config).unwrap()).unwrap()
    }

    #[test]
    fn equal_backends_are_one_route_while_somebody_holds_it() {
        let shared = Shared::at(None, Path::new("/nonexistent"));
        let one = route(&shared, json!({"host": "h", "repo": "r"}));
        let same = route(&shared, json!({"host": "h", "repo": "r", "timeout": 5}));
        let other = route(&shared, json!({"host": "h", "repo": "r", "skip_verify": true}));
        assert!(Arc::ptr_eq(&one, &same));
        assert_ne!(one.id, other.id);
        let id = one.id;
        drop((one, same));
        assert_ne!(route(&shared, json!({"host": "h", "repo": "r"})).id, id);
        assert_eq!(shared.routes.lock().unwrap().known.len(), 2);
    }

    #[test]
    fn sources_stand_in_order_and_the_origin_last() {
        let shared = Shared::at(None, Path::new("/nonexistent"));
        let config = json!({"host": "h", "repo": "r",
            "proxy": {"url": "http://p", "use_http": true},
            "mirrors": [{"host": "m1", "auth_through": true}, {"host": "http://m2"}]});
        let full = route(&shared, config);
        let hosts: Vec<_> = full.sources.iter().map(|s| s.peer.origin.to_string()).collect();
        assert_eq!(hosts, ["https://m1", "http://m2", "http://h", "https://h"]);
        let slots: Vec<_> = full.sources.iter().map(|source| source.slot).collect();
        assert_eq!(slots, [1, 0, 0, 0]);
        assert_eq!(full.slots.len(), 2);
        let strict =
            json!({"host": "h", "repo": "r", "proxy": {"url": "http://p", "fallback": false}});
        assert_eq!(route(&shared, strict).sources.len(), 1);
        assert_eq!(full.to_string(), "h/r");
    }
}
