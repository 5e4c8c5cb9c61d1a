//! What a request to the control socket means.
//!
//! Pure: method, path, query and body go in; a [`Call`] or the error response comes out. Paths,
//! methods, status codes and texts are those of nydusd in singleton mode, because its clients match
//! on them; the endpoints below `/api/sluice/v1/` are ours.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Deserialize;

use super::entry::{self, Entry, Refusal};
use super::mount_wish::MountWish;
use super::reply::{self, Response};
use crate::blob::journal::{Level, level_named};

/// The methods the dialect knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Read.
    Get,
    /// Read without a body; no path takes it.
    Head,
    /// Make.
    Post,
    /// Set or do.
    Put,
    /// No path takes it.
    Patch,
    /// Forget.
    Delete,
}

/// A request as it came over the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The method.
    pub method: Method,
    /// The path and query as sent.
    pub target: String,
    /// The body, if it has any bytes.
    pub body: Option<Vec<u8>>,
    /// The process that sent it.
    pub peer: Option<u32>,
}

/// What is to be done.
#[derive(Debug)]
pub enum Call {
    /// Say who and how the daemon is.
    Daemon,
    /// Write more or less into the log.
    SetLevel(Level),
    /// The last errors.
    Events,
    /// Begin to serve.
    Start,
    /// Go down.
    Exit,
    /// Save state with the supervisor.
    SendFd,
    /// Take the state from the supervisor.
    Takeover,
    /// Registry statistics in nydus's words.
    BackendMetrics {
        /// The key nydusd files them under.
        id: Option<String>,
    },
    /// Cache statistics in nydus's words.
    BlobcacheMetrics {
        /// The configuration's id.
        id: Option<String>,
    },
    /// What was configured after the start.
    Config {
        /// Whose configuration.
        id: Option<String>,
    },
    /// Change credentials and the like.
    Configure {
        /// Whose configuration.
        id: Option<String>,
        /// What is to be changed, by name.
        changes: BTreeMap<String, String>,
    },
    /// Register an image.
    Register {
        /// What the body says.
        entry: Box<Entry>,
        /// The body, for whoever has to remember it.
        body: Vec<u8>,
    },
    /// The registered images and blobs of a domain.
    List {
        /// The domain.
        domain_id: String,
        /// Only what is registered under this id.
        id: Option<String>,
    },
    /// Forget a domain.
    UnregisterDomain {
        /// The domain.
        domain_id: String,
    },
    /// Forget an image or a reference of a blob.
    Unregister {
        /// The domain.
        domain_id: String,
        /// The image or blob.
        id: String,
    },
    /// Remove the cache files of a blob, in all volumes.
    Cull {
        /// The cookie.
        blob_id: String,
    },
    /// Register an image, unless it is registered, and mount it.
    Mount {
        /// What to mount where.
        wish: Box<MountWish>,
        /// The process whose mount namespace is meant.
        peer: Option<u32>,
    },
    /// Take a mount away.
    Unmount {
        /// Which.
        mountpoint: PathBuf,
        /// At once for new users, when its last user leaves for the others.
        lazy: bool,
        /// Leave the image registered.
        keep: bool,
        /// The process whose mount namespace is meant.
        peer: Option<u32>,
    },
    /// All mounts.
    Mounts,
    /// All statistics.
    Stat,
    /// Count how images started.
    Starts(Starts),
    /// All images.
    Images,
    /// What the starts of an image needed.
    Touches {
        /// The domain.
        domain_id: String,
        /// The image.
        id: String,
    },
    /// Bytes by blob, and who uses them.
    Cache,
    /// Give back what nobody uses.
    CollectGarbage,
}

/// How many images started how, since a container service said so last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Starts {
    /// Readable at once.
    pub lazy: u32,
    /// After a wait.
    pub waited: u32,
    /// After a wait, and whole.
    pub full: u32,
    /// Not at all.
    pub failed: u32,
}

impl Call {
    /// Whether it may wait for a disk or another process, so that it must not stand in the way of
    /// the others.
    pub fn may_wait(&self) -> bool {
        use Call::*;
        matches!(
            self,
            Register { .. }
                | Unregister { .. }
                | UnregisterDomain { .. }
                | Cull { .. }
                | Start
                | SendFd
                | Takeover
                | Configure { .. }
                | Mount { .. }
                | Unmount { .. }
                | Images
                | Touches { .. }
                | Cache
                | CollectGarbage
        )
    }
}

/// Finds out what `request` wants, or what it is to be answered with at once.
pub fn route(request: &Request) -> Result<Call, Response> {
    let target = Target::parse(&request.target)?;
    match target.path.as_str() {
        "/api/v1/daemon" | "/api/v2/daemon" => match request.parts() {
            (Method::Get, None) => Ok(Call::Daemon),
            (Method::Put, Some(body)) => set_level(body),
            _ => Err(reply::bad_request()),
        },
        "/api/v1/daemon/events" => request.get(|| Ok(Call::Events)),
        "/api/v1/daemon/start" => request.act(Call::Start),
        "/api/v1/daemon/exit" => request.act(Call::Exit),
        "/api/v1/daemon/fuse/sendfd" => request.act(Call::SendFd),
        "/api/v1/daemon/fuse/takeover" => request.act(Call::Takeover),
        "/api/v1/daemon/backend" => request.get(|| {
            target.mountpoint()?;
            Err(reply::unsupported("FsBackendInfo"))
        }),
        "/api/v1/mount" => mount(request, &target),
        "/api/v1/metrics" => request.get(|| Err(reply::no_counter("GlobalMetrics"))),
        "/api/v1/metrics/files" => request.get(|| Err(reply::no_counter("FsFilesMetrics"))),
        "/api/v1/metrics/pattern" => request.get(|| Err(reply::no_counter("Pattern"))),
        "/api/v1/metrics/inflight" => request.get(|| Err(reply::unsupported("InflightMetrics"))),
        "/api/v1/metrics/backend" => {
            request.get(|| Ok(Call::BackendMetrics { id: target.value("id") }))
        }
        "/api/v1/metrics/blobcache" => {
            request.get(|| Ok(Call::BlobcacheMetrics { id: target.value("id") }))
        }
        "/api/v1/config" => match request.parts() {
            (Method::Get, None) => Ok(Call::Config { id: target.value("id") }),
            (Method::Put, Some(body)) => {
                let changes = entry::from_json(body).map_err(|error| reply::parse_body(&error))?;
                Ok(Call::Configure { id: target.value("id"), changes })
            }
            _ => Err(reply::bad_request()),
        },
        "/api/v2/blobs" => blobs(request, &target),
        "/api/sluice/v1/mounts" => mounts(request, &target),
        "/api/sluice/v1/starts" => starts(request),
        "/api/sluice/v1/stat" => request.get(|| Ok(Call::Stat)),
        "/api/sluice/v1/cache" => request.get(|| Ok(Call::Cache)),
        "/api/sluice/v1/gc" => request.act(Call::CollectGarbage),
        "/api/sluice/v1/touches" => request.get(|| {
            let id = target.value("id").ok_or_else(|| reply::missing_query("id"))?;
            Ok(Call::Touches { domain_id: target.value("domain_id").unwrap_or(id.clone()), id })
        }),
        "/api/sluice/v1/images" => request.get(|| Ok(Call::Images)),
        _ => Err(reply::no_route()),
    }
}

impl Request {
    fn parts(&self) -> (Method, Option<&[u8]>) {
        (self.method, self.body.as_deref())
    }

    /// For a path that is only read.
    fn get(&self, call: impl FnOnce() -> Result<Call, Response>) -> Result<Call, Response> {
        match self.parts() {
            (Method::Get, None) => call(),
            _ => Err(reply::bad_request()),
        }
    }

    /// For a path that does one thing: PUT, without a body.
    fn act(&self, call: Call) -> Result<Call, Response> {
        match self.parts() {
            (Method::Put, None) => Ok(call),
            _ => Err(reply::bad_request()),
        }
    }
}

fn blobs(request: &Request, target: &Target) -> Result<Call, Response> {
    let (domain_id, blob_id) = (target.value("domain_id"), target.value("blob_id"));
    match request.parts() {
        (Method::Get, None) => {
            let domain_id = domain_id.ok_or_else(reply::bad_request)?;
            Ok(Call::List { domain_id, id: blob_id.filter(|id| !id.is_empty()) })
        }
        (Method::Put, Some(body)) => match Entry::parse(body) {
            Ok(entry) => Ok(Call::Register { entry: Box::new(entry), body: body.to_vec() }),
            Err(Refusal::Parse(error)) => Err(reply::parse_body(&error)),
            Err(Refusal::Refused(reason)) => Err(reply::bad_request_because(&reason)),
        },
        (Method::Delete, None) => {
            let blob_id = blob_id.filter(|id| !id.is_empty());
            match (domain_id, blob_id) {
                (None, Some(blob_id)) => Ok(Call::Cull { blob_id }),
                // An image registered without a domain is filed under its own id.
                (Some(domain_id), Some(id)) if domain_id.is_empty() => {
                    Ok(Call::Unregister { domain_id: id.clone(), id })
                }
                (Some(domain_id), Some(id)) => Ok(Call::Unregister { domain_id, id }),
                (Some(domain_id), None) if !domain_id.is_empty() => {
                    Ok(Call::UnregisterDomain { domain_id })
                }
                _ => Err(reply::bad_request()),
            }
        }
        _ => Err(reply::bad_request()),
    }
}

fn mounts(request: &Request, target: &Target) -> Result<Call, Response> {
    let peer = request.peer;
    match request.parts() {
        (Method::Get, None) => Ok(Call::Mounts),
        (Method::Put, Some(body)) => match MountWish::parse(body) {
            Ok(wish) => Ok(Call::Mount { wish: Box::new(wish), peer }),
            Err(Refusal::Parse(error)) => Err(reply::parse_body(&error)),
            Err(Refusal::Refused(reason)) => Err(reply::bad_request_because(&reason)),
        },
        (Method::Delete, None) => {
            let mountpoint = PathBuf::from(target.mountpoint()?);
            let is_set = |key| target.value(key).is_some_and(|value| value == "true");
            Ok(Call::Unmount { mountpoint, lazy: is_set("lazy"), keep: is_set("keep"), peer })
        }
        _ => Err(reply::bad_request()),
    }
}

fn starts(request: &Request) -> Result<Call, Response> {
    match request.parts() {
        (Method::Put, Some(body)) => {
            let starts = entry::from_json(body).map_err(|error| reply::parse_body(&error))?;
            Ok(Call::Starts(starts))
        }
        _ => Err(reply::bad_request()),
    }
}

/// nydusd checks such requests as carefully as if it could serve them.
fn mount(request: &Request, target: &Target) -> Result<Call, Response> {
    #[derive(Deserialize)]
    struct Mount {
        #[serde(rename = "source")]
        _source: String,
        #[serde(rename = "fs_type", default)]
        _fs_type: String,
        #[serde(rename = "config")]
        _config: String,
        #[serde(rename = "prefetch_files", default)]
        _prefetch_files: Option<Vec<String>>,
    }
    target.mountpoint()?;
    match request.parts() {
        (Method::Post | Method::Put, Some(body)) => {
            let _: Mount = entry::from_json(body).map_err(|error| reply::parse_body(&error))?;
            Err(reply::unsupported("Mount"))
        }
        (Method::Delete, None) => Err(reply::unsupported("Mount")),
        _ => Err(reply::bad_request()),
    }
}

fn set_level(body: &[u8]) -> Result<Call, Response> {
    #[derive(Deserialize)]
    struct Conf {
        log_level: String,
    }
    let conf: Conf = entry::from_json(body).map_err(|error| reply::parse_body(&error))?;
    let level = level_named(&conf.log_level).ok_or_else(reply::bad_level)?;
    Ok(Call::SetLevel(level))
}

/// A request target taken apart and decoded.
struct Target {
    path: String,
    pairs: Vec<(String, String)>,
}

impl Target {
    /// Origin form, or the absolute form that proxies and some clients use.
    fn parse(target: &str) -> Result<Target, Response> {
        let local = match target.strip_prefix("http://") {
            Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
            None => target,
        };
        let local = local.split('#').next().unwrap_or_default();
        let (path, query) = local.split_once('?').unwrap_or((local, ""));
        let mut pairs = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match (decode(key), decode(value)) {
                (Some(key), Some(value)) => pairs.push((key, value)),
                _ => return Err(reply::bad_request()),
            }
        }
        Ok(Target { path: path.to_owned(), pairs })
    }

    /// The first value of `key`.
    fn value(&self, key: &str) -> Option<String> {
        self.pairs.iter().find(|pair| pair.0 == key).map(|pair| pair.1.clone())
    }

    fn mountpoint(&self) -> Result<String, Response> {
        self.value("mountpoint").ok_or_else(|| reply::missing_query("mountpoint"))
    }
}

/// Form decoding: `+` is a space, `%41` an A. None for what is not UTF-8 or not hexadecimal.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'+' => b' ',
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                (digit()? << 4 | digit()?) as u8
            }
            other => other,
        });
    }
    String::from_utf8(bytes).ok()
}
