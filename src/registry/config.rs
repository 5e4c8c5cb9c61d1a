//! `backend_type` and `backend_config`: where an image's bytes come from, as nydus writes it.
//!
//! Pure. Parsing is validation: a `Backend` can be used as it is. Every key nydus knows is honoured
//! or refused by a sentence that names it; a key nobody knows is refused too, because a misspelt
//! `skip_verify` must not pass in silence. Equal backends are one route: one pool, one token.

use std::collections::BTreeMap;
use std::path::PathBuf;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::config as limits;
use crate::error::{Error, Result};
use crate::registry::origin::{Location, Origin, Scheme};
use crate::registry::reference::{self, DEFAULT_API_HOST, DEFAULT_HOST};
use crate::registry::secret::Secret;

/// Where bytes come from. Debug prints no secret; Eq and Hash make it a key.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Backend {
    /// An OCI registry, with its mirrors and its proxy.
    Registry(Box<RegistryConfig>),
    /// Files on this node.
    LocalFs(LocalFsConfig),
}

/// A validated `registry` backend.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RegistryConfig {
    /// Who answers the API; docker.io is already replaced by its API host.
    pub origin: Origin,
    /// The host as credentials are filed under: `docker.io` or `HOST[:PORT]`.
    pub credential_host: String,
    /// The repository, `library/` included.
    pub repo: String,
    /// `auth`: base64 of `user:password`, checked; goes into a Basic header as it is.
    pub basic: Option<Secret>,
    /// `registry_token`: a bearer token that is never renewed.
    pub token: Option<Secret>,
    /// Whether certificates are taken unseen.
    pub skip_verify: bool,
    /// The longest wait for a head, and for progress of a body.
    pub timeout_ns: u64,
    /// The longest wait for a connection, TLS included.
    pub connect_timeout_ns: u64,
    /// Tries beyond the first, at least.
    pub retry_limit: u32,
    /// `blob_url_scheme`: replaces the scheme of a blob's redirect.
    pub blob_scheme: Option<Scheme>,
    /// `blob_redirected_host`: replaces the host of a blob's redirect.
    pub blob_redirected_host: Option<String>,
    /// A forward proxy between us and the origin.
    pub proxy: Option<ProxyConfig>,
    /// Tried in this order before proxy and origin.
    pub mirrors: Vec<MirrorConfig>,
}

/// A forward proxy.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ProxyConfig {
    /// The proxy itself; plain HTTP.
    pub origin: Origin,
    /// The value of Proxy-Authorization, when the URL had a user.
    pub authorization: Option<Secret>,
    /// Asked to learn whether the proxy is well.
    pub ping: Option<Location>,
    /// Whether the origin is asked directly when the proxy fails.
    pub fallback: bool,
    /// Time between pings.
    pub check_interval_ns: u64,
    /// Whether https URLs are asked for as http through the proxy, which makes them https again.
    pub use_http: bool,
    /// Pings rest when nothing was asked for this long.
    pub check_pause_elapsed_ns: u64,
}

/// A mirror of the registry.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct MirrorConfig {
    /// Who answers.
    pub origin: Origin,
    /// A path in front of `/v2/`, without a slash at its end; mostly empty.
    pub prefix: String,
    /// Asked to learn whether a failed mirror is well again.
    pub ping: Option<Location>,
    /// Header lines for every request to it: `Name: value\r\n` repeated.
    pub headers: Secret,
    /// Whether the mirror does authentication itself; otherwise the origin's token is sent to it.
    pub auth_through: bool,
    /// Time between checks of a failed mirror.
    pub health_check_interval_ns: u64,
    /// Consecutive failures after which it is left out.
    pub failure_limit: u32,
}

/// A validated `localfs` backend.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LocalFsConfig {
    /// The one file that holds the blob, whatever its id.
    pub blob_file: Option<PathBuf>,
    /// Directories searched in order for a file named by the blob id: `dir`, then `alt_dirs`.
    pub dirs: Vec<PathBuf>,
}

impl Backend {
    /// Parses the two fields of an image's configuration.
    pub fn parse(backend_type: &str, backend_config: &Value) -> Result<Backend> {
        match backend_type {
            "registry" => {
                let raw: RawRegistry = decode(backend_config)?;
                raw.validate().map(|config| Backend::Registry(Box::new(config)))
            }
            "localfs" => {
                let raw: RawLocalFs = decode(backend_config)?;
                raw.validate().map(Backend::LocalFs)
            }
            "oss" | "s3" | "localdisk" | "http-proxy" => Err(Error::Unsupported(format!(
                "backend_type {backend_type:?} is not supported; use registry or localfs"
            ))),
            other => Err(Error::Malformed(format!(
                "backend_type {other:?} is not known; use registry or localfs"
            ))),
        }
    }

    /// A registry backend with every other setting at its default, for command lines.
    pub fn registry(scheme: Scheme, host: &str, repo: &str) -> Result<Backend> {
        let scheme = scheme.as_str().to_string();
        let (host, repo) = (host.to_string(), repo.to_string());
        RawRegistry { scheme, host, repo, ..RawRegistry::default() }
            .validate()
            .map(|config| Backend::Registry(Box::new(config)))
    }
}

fn decode<T: DeserializeOwned>(value: &Value) -> Result<T> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = match error.path().to_string() {
            root if root == "." => "backend_config".to_string(),
            path => format!("backend_config.{path}"),
        };
        Error::Malformed(format!("{path}: {}", error.into_inner()))
    })
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawRegistry {
    scheme: String,
    host: String,
    repo: String,
    auth: Option<String>,
    registry_token: Option<String>,
    skip_verify: bool,
    timeout: u64,
    connect_timeout: u64,
    retry_limit: u32,
    blob_url_scheme: String,
    blob_redirected_host: String,
    proxy: Option<RawProxy>,
    mirrors: Option<Vec<RawMirror>>,
}

impl Default for RawRegistry {
    fn default() -> Self {
        RawRegistry {
            scheme: String::new(),
            host: String::new(),
            repo: String::new(),
            auth: None,
            registry_token: None,
            skip_verify: false,
            timeout: limits::REGISTRY_TIMEOUT_DEFAULT_S,
            connect_timeout: limits::REGISTRY_TIMEOUT_DEFAULT_S,
            retry_limit: 0,
            blob_url_scheme: String::new(),
            blob_redirected_host: String::new(),
            proxy: None,
            mirrors: None,
        }
    }
}

impl RawRegistry {
    fn validate(self) -> Result<RegistryConfig> {
        if self.host.is_empty() || self.repo.is_empty() {
            return Err(refuse("host and repo", "both must be given"));
        }
        let scheme = parse_scheme("scheme", &self.scheme)?.unwrap_or(Scheme::Https);
        let filed_host = reference::normal_host(&self.host).to_string();
        let api_host = if filed_host == DEFAULT_HOST { DEFAULT_API_HOST } else { &self.host };
        let origin = Origin::parse(scheme, api_host).map_err(|e| e.context(key("host")))?;
        let repo = reference::normal_repo(&self.host, &self.repo);
        reference::check_repo(&repo).map_err(|error| error.context(key("repo")))?;
        let mirrors = self.mirrors.unwrap_or_default();
        if mirrors.len() > limits::REGISTRY_MIRROR_COUNT_MAX {
            return Err(refuse("mirrors", "too many; 16 are allowed"));
        }
        let redirected = Some(self.blob_redirected_host).filter(|host| !host.is_empty());
        if let Some(host) = &redirected {
            Origin::parse(scheme, host).map_err(|e| e.context(key("blob_redirected_host")))?;
        }
        Ok(RegistryConfig {
            credential_host: if filed_host == DEFAULT_HOST {
                filed_host
            } else {
                origin.authority()
            },
            origin,
            repo,
            basic: self
                .auth
                .filter(|text| !text.is_empty())
                .map(|text| basic(&text))
                .transpose()?,
            token: self.registry_token.filter(|t| !t.is_empty()).map(|t| token(&t)).transpose()?,
            skip_verify: self.skip_verify,
            timeout_ns: timeout_ns(self.timeout),
            connect_timeout_ns: timeout_ns(self.connect_timeout),
            retry_limit: self.retry_limit.min(limits::REGISTRY_RETRY_COUNT_MAX),
            blob_scheme: parse_scheme("blob_url_scheme", &self.blob_url_scheme)?,
            blob_redirected_host: redirected,
            proxy: self.proxy.map(RawProxy::validate).transpose()?.flatten(),
            mirrors: mirrors.into_iter().map(RawMirror::validate).collect::<Result<_>>()?,
        })
    }
}

#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawProxy {
    url: String,
    ping_url: String,
    fallback: bool,
    check_interval: u64,
    use_http: bool,
    check_pause_elapsed: u64,
    dragonfly_scheduler_endpoint: String,
}

impl Default for RawProxy {
    fn default() -> Self {
        RawProxy {
            url: String::new(),
            ping_url: String::new(),
            fallback: true,
            check_interval: 5,
            use_http: false,
            check_pause_elapsed: 300,
            dragonfly_scheduler_endpoint: String::new(),
        }
    }
}

impl RawProxy {
    /// `None` when no proxy is meant: the snapshotter writes the object with empty strings.
    fn validate(self) -> Result<Option<ProxyConfig>> {
        if !self.dragonfly_scheduler_endpoint.is_empty() {
            return Err(Error::Unsupported(format!(
                "{}: Dragonfly's scheduler is not supported; name its proxy in proxy.url",
                key("proxy.dragonfly_scheduler_endpoint")
            )));
        }
        if self.url.is_empty() {
            return Ok(None);
        }
        let (url, authorization) = split_user(&self.url)?;
        let location = Location::parse(&url).map_err(|error| error.context(key("proxy.url")))?;
        if location.origin.scheme != Scheme::Http || location.path != "/" {
            return Err(refuse("proxy.url", "only http://HOST[:PORT] is supported"));
        }
        Ok(Some(ProxyConfig {
            origin: location.origin,
            authorization,
            ping: ping("proxy.ping_url", &self.ping_url)?,
            fallback: self.fallback,
            check_interval_ns: seconds(self.check_interval.max(1)),
            use_http: self.use_http,
            check_pause_elapsed_ns: seconds(self.check_pause_elapsed),
        }))
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMirror {
    host: String,
    #[serde(default)]
    ping_url: String,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    #[serde(default)]
    auth_through: bool,
    #[serde(default = "five")]
    health_check_interval: u64,
    #[serde(default = "five")]
    failure_limit: u64,
}

fn five() -> u64 {
    5
}

impl RawMirror {
    fn validate(self) -> Result<MirrorConfig> {
        let url = match self.host.contains("://") {
            true => self.host.clone(),
            false => format!("https://{}", self.host),
        };
        let location = Location::parse(&url).map_err(|error| error.context(key("mirrors.host")))?;
        if location.path.contains('?') {
            return Err(refuse("mirrors.host", "a mirror's URL takes no query"));
        }
        Ok(MirrorConfig {
            origin: location.origin,
            prefix: location.path.trim_end_matches('/').to_string(),
            ping: ping("mirrors.ping_url", &self.ping_url)?,
            headers: header_lines(&self.headers)?,
            auth_through: self.auth_through,
            health_check_interval_ns: seconds(self.health_check_interval.max(1)),
            failure_limit: self.failure_limit.clamp(1, u64::from(u32::MAX)) as u32,
        })
    }
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct RawLocalFs {
    blob_file: String,
    dir: String,
    alt_dirs: Vec<String>,
}

impl RawLocalFs {
    fn validate(self) -> Result<LocalFsConfig> {
        let blob_file = Some(self.blob_file).filter(|file| !file.is_empty()).map(PathBuf::from);
        let dirs = std::iter::once(self.dir).chain(self.alt_dirs).filter(|dir| !dir.is_empty());
        let dirs: Vec<PathBuf> = dirs.map(PathBuf::from).collect();
        match blob_file.is_none() && dirs.is_empty() {
            true => Err(refuse("blob_file or dir", "one must be given")),
            false => Ok(LocalFsConfig { blob_file, dirs }),
        }
    }
}

fn key(name: &str) -> String {
    format!("backend_config.{name}")
}

fn refuse(name: &str, why: &str) -> Error {
    Error::Malformed(format!("{}: {why}", key(name)))
}

fn seconds(count: u64) -> u64 {
    count.saturating_mul(limits::SECOND_NS)
}

fn timeout_ns(count_s: u64) -> u64 {
    let none = count_s == 0;
    let max = limits::REGISTRY_TIMEOUT_S_MAX;
    seconds(if none { max } else { count_s.min(max) })
}

fn parse_scheme(name: &str, text: &str) -> Result<Option<Scheme>> {
    match text {
        "" => Ok(None),
        "http" => Ok(Some(Scheme::Http)),
        "https" => Ok(Some(Scheme::Https)),
        other => Err(refuse(name, &format!("{other:?} is neither http nor https"))),
    }
}

fn ping(name: &str, url: &str) -> Result<Option<Location>> {
    match url {
        "" => Ok(None),
        url => Location::parse(url).map(Some).map_err(|error| error.context(key(name))),
    }
}

fn basic(text: &str) -> Result<Secret> {
    let decoded = STANDARD.decode(text.trim()).ok().filter(|raw| raw.contains(&b':'));
    match decoded.is_some() && text.trim().len() <= limits::TOKEN_SIZE_MAX {
        true => Ok(Secret::new(text.trim())),
        false => Err(refuse("auth", "not base64 of user:password")),
    }
}

fn token(text: &str) -> Result<Secret> {
    match text.len() <= limits::TOKEN_SIZE_MAX && text.bytes().all(|b| b.is_ascii_graphic()) {
        true => Ok(Secret::new(text)),
        false => Err(refuse("registry_token", "not a bearer token (visible ASCII, 8 KiB)")),
    }
}

/// Takes `user:password@` out of a proxy URL.
fn split_user(url: &str) -> Result<(String, Option<Secret>)> {
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err(refuse("proxy.url", "not a URL; write http://HOST:PORT"));
    };
    let authority_end = rest.find(['/', '?']).unwrap_or(rest.len());
    let Some(at) = rest[..authority_end].rfind('@') else { return Ok((url.to_string(), None)) };
    let header = format!("Basic {}", STANDARD.encode(&rest[..at]));
    if rest[..at].contains('%') || header.len() > limits::KIB {
        return Err(refuse(
            "proxy.url",
            "percent-encoded or very long passwords are not supported",
        ));
    }
    Ok((format!("{scheme}://{}", &rest[at + 1..]), Some(Secret::new(header))))
}

fn header_lines(headers: &BTreeMap<String, String>) -> Result<Secret> {
    const OURS: [&str; 8] = [
        "host",
        "range",
        "connection",
        "content-length",
        "transfer-encoding",
        "authorization",
        "accept-encoding",
        "expect",
    ];
    if headers.len() > limits::REGISTRY_MIRROR_HEADER_COUNT_MAX {
        return Err(refuse("mirrors.headers", "too many; 16 are allowed"));
    }
    let mut lines = String::new();
    for (name, value) in headers {
        let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        if name.is_empty() || !name.bytes().all(is_token) {
            return Err(refuse("mirrors.headers", &format!("{name:?} is not a header name")));
        }
        if OURS.iter().any(|ours| name.eq_ignore_ascii_case(ours)) {
            return Err(refuse("mirrors.headers", &format!("{name:?} is not yours to set")));
        }
        if !value.bytes().all(|b| b == b' ' || b.is_ascii_graphic()) {
            return Err(refuse("mirrors.headers", &format!("the value of {name:?} is not ASCII")));
        }
        lines.push_str(&format!("{name}: {value}\r\n"));
    }
    match lines.len() <= 2 * limits::KIB {
        true => Ok(Secret::new(lines)),
        false => Err(refuse("mirrors.headers", "longer than 2 KiB together")),
    }
}
