//! Responses of the control API: statuses and JSON shapes.
//!
//! Pure. An error body is `{"code":"UNDEFINED","message":...}`; the message has the shape of
//! nydusd's Debug output, because its clients look for parts of it.

use std::sync::Arc;

use serde_json::{Value, json};

use super::entry::ParseError;
use super::mounts::{Mounted, Place};
use super::state::{Event, Refused, State};
use crate::blob::catalog::Listed;
use crate::blob::journal::Errors;
use crate::blob::registration::{Image, ImageBlob};
use crate::config::{JOURNAL_ERRORS_MAX, JOURNAL_ERRORS_MAX_BYTES};
use crate::error::Error;
use crate::registry::config::Backend;

/// A status and, except for 204, a JSON body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: Option<String>,
}

/// Who this daemon is, for its managers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// What the manager calls it.
    pub id: Option<String>,
    /// The supervisor's socket.
    pub supervisor: Option<String>,
}

/// 204.
pub fn done() -> Response {
    Response { status: 204, body: None }
}

/// 200 with a document.
pub fn document(value: &Value) -> Response {
    Response { status: 200, body: Some(value.to_string()) }
}

/// An error body with any status.
pub fn error(status: u16, message: &str) -> Response {
    let body = json!({ "code": "UNDEFINED", "message": message });
    Response { status, body: Some(body.to_string()) }
}

/// The path is known, this way of using it is not.
pub fn bad_request() -> Response {
    error(400, "BadRequest")
}

/// A body that is JSON and still no use.
pub fn bad_request_because(reason: &str) -> Response {
    error(400, &format!("BadRequest: {reason}"))
}

/// The path is not known.
pub fn no_route() -> Response {
    error(404, "NoRoute")
}

/// The body is not what the path takes.
pub fn parse_body(parse_error: &ParseError) -> Response {
    error(400, &format!("ParseBody({parse_error})"))
}

/// The query lacks a key.
pub fn missing_query(key: &str) -> Response {
    error(400, &format!("QueryString(\"'{key}' should be specified in query string\")"))
}

/// A level nydusd does not know either.
pub fn bad_level() -> Response {
    error(500, "Configure(ResponsePayloadType)")
}

/// What a daemon without FUSE cannot do.
pub fn unsupported(kind: &str) -> Response {
    error(501, &format!("{kind}(DaemonAbnormal(Unsupported))"))
}

/// There is nothing to count, or not yet.
pub fn no_counter(kind: &str) -> Response {
    error(404, &format!("{kind}(Metrics(Stats(NoCounter)))"))
}

/// Too much is going on; the same request may succeed later.
pub fn busy(what: &str) -> Response {
    error(503, &format!("DaemonAbnormal(NotReady): {what}"))
}

/// A call failed.
pub fn failed(kind: &str, why: &Error) -> Response {
    error(500, &format!("{kind}(DaemonAbnormal(Other({:?})))", why.to_string()))
}

/// A call of our own API failed: the status tells programs, the text tells people.
pub fn told(why: &Error) -> Response {
    let status = match why {
        Error::NotFound(_) => 404,
        Error::Exists(_) => 409,
        Error::Busy(_) => 423,
        Error::Unsupported(_) => 501,
        Error::Malformed(_) => 400,
        _ => 500,
    };
    error(status, &why.to_string())
}

/// A change of state was refused.
pub fn refused(kind: &str, why: &Refused) -> Response {
    match why {
        Refused::Unexpected(event) => {
            let name = match event {
                Event::Mount => "Mount",
                Event::Start => "Start",
                Event::Takeover => "Takeover",
                Event::Stop => "Stop",
                Event::Exit => "Exit",
            };
            error(400, &format!("{kind}(DaemonAbnormal(UnexpectedEvent({name:?})))"))
        }
        Refused::Busy => error(503, &format!("{kind}(DaemonAbnormal(NotReady))")),
        Refused::Failed(Error::Unsupported(_)) => unsupported(kind),
        Refused::Failed(why) => failed(kind, why),
    }
}

/// GET daemon.
pub fn daemon(identity: &Identity, state: State) -> Value {
    json!({
        "version": version(),
        "id": identity.id,
        "supervisor": identity.supervisor,
        "state": state.name(),
        "backend_collection": null,
    })
}

/// What was built, from what.
pub fn version() -> Value {
    json!({
        "package_ver": env!("CARGO_PKG_VERSION"),
        "git_commit": option_env!("SLUICE_GIT_COMMIT").unwrap_or("unknown"),
        "build_time": option_env!("SLUICE_BUILD_TIME").unwrap_or("unknown"),
        "profile": if cfg!(debug_assertions) { "debug" } else { "release" },
        "rustc": option_env!("SLUICE_RUSTC").unwrap_or("unknown"),
    })
}

/// GET events.
pub fn events(errors: &Errors) -> Value {
    json!({
        "max_errors": JOURNAL_ERRORS_MAX,
        "total_errors": errors.texts.len(),
        "max_size": JOURNAL_ERRORS_MAX_BYTES,
        "total_size": errors.size_bytes,
        "errors": errors.texts,
    })
}

/// GET blobs: one object for each image and data blob.
pub fn listing(listed: &[Listed]) -> Value {
    listed.iter().map(listed_one).collect()
}

/// GET mounts.
pub fn mounts(mounts: &[(Place, Mounted)]) -> Value {
    let one = |(place, mounted): &(Place, Mounted)| {
        json!({
            "mountpoint": place.mountpoint.to_string_lossy(),
            "mount_namespace": place.namespace,
            "domain_id": mounted.domain_id,
            "id": mounted.id,
            "door": mounted.door.name(),
        })
    };
    mounts.iter().map(one).collect()
}

/// GET images.
pub fn images(images: &[Arc<Image>]) -> Value {
    images.iter().map(|image| image_one(image)).collect()
}

/// The word for a backend in nydus's configuration.
pub fn backend_type(backend: &Backend) -> &'static str {
    match backend {
        Backend::Registry(_) => "registry",
        Backend::LocalFs(_) => "localfs",
    }
}

fn listed_one(listed: &Listed) -> Value {
    let image = &listed.image;
    let Some((blob_index, references)) = listed.data else { return image_one(image) };
    let Some(blob) = image.blobs.get(blob_index as usize) else { return Value::Null };
    json!({
        "type": "datablob",
        "id": blob.id.as_str(),
        "domain_id": image.domain_id,
        "config_id": image.config_id,
        "backend_type": backend_type(&image.backend),
        "size": blob.uncompressed_size_bytes,
        "references": references,
    })
}

fn image_one(image: &Image) -> Value {
    let blob = |blob: &ImageBlob| {
        let (id, size) = (blob.id.as_str(), blob.uncompressed_size_bytes);
        json!({ "id": id, "size": size })
    };
    json!({
        "type": "bootstrap",
        "id": image.id,
        "domain_id": image.domain_id,
        "config_id": image.config_id,
        "backend_type": backend_type(&image.backend),
        "metadata_path": image.bootstrap_path.to_string_lossy(),
        "work_dir": image.work_dir.to_string_lossy(),
        "size": image.bootstrap_size_bytes,
        "digest": format!("blake3:{}", image.bootstrap_digest),
        "prefetch": image.prefetch.enable,
        "blobs": image.blobs.iter().map(blob).collect::<Value>(),
    })
}
