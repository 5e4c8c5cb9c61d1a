//! From a request to a reply: the distribution API, and the orders under `/_registryd/`.
//!
//! Owns the loop of a connection. Every request is journalled and meets the fault rules, except the
//! orders themselves: `PUT` and `DELETE /_registryd/faults`, `GET` and `DELETE /_registryd/log`.

use crate::faults::Effect;
use crate::journal::Entry;
use crate::reply::{Body, Reply};
use crate::send::Sender;
use crate::tree::{MANIFEST_BYTES_MAX, digest};
use crate::wire::{Connection, Request, invalid};
use crate::{Door, Server, uploads};
use std::fs::File;
use std::io::{self, Write};
use std::net::TcpStream;
use std::time::Instant;

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

/// Serves one connection until either side ends it.
pub fn serve(stream: TcpStream, door: Door, server: &Server) {
    let tls = if door == Door::Control { None } else { server.tls.as_ref() };
    let Ok(mut connection) = Connection::new(stream, tls) else { return };
    let number = server.journal.next_connection();
    let mut buffer = Vec::new();
    while let Ok(Some(request)) = connection.read_request() {
        let asked_at = Instant::now();
        let keep_alive = request.keeps_alive();
        let orders = request.path.starts_with("/_registryd/");
        let effect = if orders { Effect::default() } else { server.faults.effect(door, &request) };
        let entry = if orders {
            None
        } else {
            Some(server.journal.begin(entry(door, number, &request, &effect)))
        };
        if effect.expire_tokens {
            server.auth.expire_tokens();
        }
        let reply = match door {
            _ if orders => order(server, &mut connection, &request),
            Door::Control => Ok(Reply::error(404, "NOT_FOUND", "this port takes orders only")),
            Door::Storage => storage(server, &mut connection, &request, &effect),
            Door::Registry => registry(server, &mut connection, &request, &effect),
        };
        let mut reply = match reply {
            Ok(reply) => reply,
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {
                let _ = connection.reset();
                return;
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Reply::error(400, "BAD_REQUEST", &error.to_string())
            }
            Err(error) => Reply::error(500, "IO", &error.to_string()),
        };
        reply.head_only |= request.method == "HEAD";
        let (journal, link) = (&server.journal, &server.link);
        let effect = &effect;
        let sender = Sender { journal, link, entry, effect, asked_at, buffer: &mut buffer };
        match sender.send(connection, &reply, keep_alive) {
            Ok(Some(alive)) => connection = alive,
            _ => return,
        }
    }
}

fn entry(door: Door, connection: u64, request: &Request, effect: &Effect) -> Entry {
    Entry {
        door: if door == Door::Storage { "storage" } else { "registry" },
        method: request.method.clone(),
        path: request.path.clone(),
        range: request.header("range").map(str::to_owned),
        authorization: request.header("authorization").is_some(),
        faults: effect.names(),
        connection,
        ..Entry::default()
    }
}

fn order(server: &Server, connection: &mut Connection, request: &Request) -> io::Result<Reply> {
    let mut body = Bounded::new(MANIFEST_BYTES_MAX);
    connection.read_body(request, &mut body)?;
    match (request.method.as_str(), request.path.as_str()) {
        ("PUT", "/_registryd/faults") => match server.faults.replace(&body.bytes) {
            Ok(()) => Ok(Reply::new(204)),
            Err(error) => Ok(Reply::error(400, "BAD_RULES", &error.to_string())),
        },
        ("DELETE", "/_registryd/faults") => {
            server.faults.clear();
            Ok(Reply::new(204))
        }
        ("GET", "/_registryd/log") => Ok(Reply::json(200, &server.journal.json())),
        ("DELETE", "/_registryd/log") => {
            server.journal.clear();
            Ok(Reply::new(204))
        }
        _ => Ok(Reply::error(404, "NOT_FOUND", "no such order")),
    }
}

/// Where redirects lead: an object store that knows blobs only and no credentials at all.
fn storage(
    server: &Server,
    connection: &mut Connection,
    request: &Request,
    effect: &Effect,
) -> io::Result<Reply> {
    connection.read_body(request, &mut io::sink())?;
    if let Some(reply) = ordered_refusal(server, request, None, effect) {
        return Ok(reply);
    }
    if request.header("authorization").is_some() {
        return Ok(Reply::error(400, "CREDENTIALS", "credentials do not belong here"));
    }
    match request.path.split_once("/blobs/") {
        Some((_, digest)) => blob(server, request, digest, effect),
        None => Ok(Reply::error(404, "NOT_FOUND", "blobs only")),
    }
}

fn registry(
    server: &Server,
    connection: &mut Connection,
    request: &Request,
    effect: &Effect,
) -> io::Result<Reply> {
    if request.path == "/token" {
        let mut body = Bounded::new(MANIFEST_BYTES_MAX);
        connection.read_body(request, &mut body)?;
        let refusal = ordered_refusal(server, request, None, effect);
        return Ok(refusal.unwrap_or_else(|| server.auth.token(request, &body.bytes)));
    }
    let Some(rest) = request.path.strip_prefix("/v2/") else {
        connection.read_body(request, &mut io::sink())?;
        return Ok(Reply::error(404, "NOT_FOUND", "the API begins at /v2/"));
    };
    let (repo, kind, name) = split(rest);
    let refusal = ordered_refusal(server, request, repo, effect);
    let denied = !server.auth.allows(request, repo);
    let denied = denied.then(|| server.auth.challenge(request, repo, &server.registry_url));
    if let Some(reply) = refusal.or(denied) {
        connection.read_body(request, &mut io::sink())?;
        return Ok(reply);
    }
    match (repo, kind) {
        (Some(repo), "uploads") => uploads::answer(server, connection, request, repo, name, effect),
        (Some(repo), "manifests") if request.method == "PUT" => {
            put_manifest(server, connection, request, repo, name)
        }
        _ => {
            connection.read_body(request, &mut io::sink())?;
            read(server, request, (repo, kind, name), effect)
        }
    }
}

/// Cuts what follows `/v2/` into repository, kind and name.
fn split(rest: &str) -> (Option<&str>, &str, &str) {
    if let Some((repo, id)) = rest.split_once("/blobs/uploads") {
        return (Some(repo), "uploads", id.trim_start_matches('/'));
    }
    for kind in ["blobs", "manifests", "tags"] {
        if let Some((repo, name)) = rest.split_once(&format!("/{kind}/")) {
            return (Some(repo), kind, name);
        }
    }
    (None, rest, "")
}

fn read(
    server: &Server,
    request: &Request,
    (repo, kind, name): (Option<&str>, &str, &str),
    effect: &Effect,
) -> io::Result<Reply> {
    if !["GET", "HEAD"].contains(&request.method.as_str()) {
        return Ok(Reply::error(405, "UNSUPPORTED", "this registry does not do that"));
    }
    match (repo, kind) {
        (None, "") => Ok(Reply::json(200, &serde_json::json!({}))
            .with("Docker-Distribution-API-Version", "registry/2.0")),
        (Some(_), "blobs") => blob(server, request, name, effect),
        (Some(repo), "manifests") => Ok(manifest(server, repo, name)),
        (Some(repo), "tags") if name == "list" => Ok(match server.tree.tags(repo) {
            Some(tags) => Reply::json(200, &serde_json::json!({ "name": repo, "tags": tags })),
            None => Reply::error(404, "NAME_UNKNOWN", "no such repository"),
        }),
        _ => Ok(Reply::error(404, "NOT_FOUND", "no such thing")),
    }
}

/// The reply that a fault rule puts in place of the right one.
fn ordered_refusal(
    server: &Server,
    request: &Request,
    repo: Option<&str>,
    effect: &Effect,
) -> Option<Reply> {
    if effect.unauthorized {
        return Some(server.auth.challenge(request, repo, &server.registry_url));
    }
    if effect.forbidden {
        return Some(Reply::error(403, "DENIED", "forbidden by a fault rule"));
    }
    if let Some(seconds) = effect.too_many {
        let reply = Reply::error(429, "TOOMANYREQUESTS", "slow down, says a fault rule");
        return Some(reply.with("Retry-After", seconds.to_string()));
    }
    effect.status.map(|status| Reply::error(status, "ORDERED", "so says a fault rule"))
}

fn manifest(server: &Server, repo: &str, reference: &str) -> Reply {
    let Some(bytes) = server.tree.manifest(repo, reference) else {
        return Reply::error(404, "MANIFEST_UNKNOWN", "no such manifest");
    };
    let parsed: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
    let media_type = parsed.as_ref().and_then(|value| value.get("mediaType")?.as_str());
    let reply = Reply::new(200)
        .with("Content-Type", media_type.unwrap_or(OCI_MANIFEST))
        .with("Docker-Content-Digest", digest(&bytes));
    Reply { body: Body::Bytes(bytes), ..reply }
}

fn put_manifest(
    server: &Server,
    connection: &mut Connection,
    request: &Request,
    repo: &str,
    reference: &str,
) -> io::Result<Reply> {
    let mut body = Bounded::new(MANIFEST_BYTES_MAX);
    connection.read_body(request, &mut body)?;
    let digest = server.tree.put_manifest(repo, reference, &body.bytes)?;
    let location = format!("/v2/{repo}/manifests/{digest}");
    Ok(Reply::new(201).with("Location", location).with("Docker-Content-Digest", digest))
}

fn blob(server: &Server, request: &Request, digest: &str, effect: &Effect) -> io::Result<Reply> {
    let Some((file, size)) = server.tree.blob(digest)? else {
        return Ok(Reply::error(404, "BLOB_UNKNOWN", "no such blob"));
    };
    if effect.redirect {
        let location = format!("{}{}?signature=of-the-moment", server.storage_url, request.path);
        return Ok(Reply::new(307).with("Location", location));
    }
    let range = request.header("range").filter(|_| !effect.full_200_for_range);
    let reply = match range.and_then(|range| parse_range(range, size)) {
        None => Reply { body: whole(file, size), ..Reply::new(200) },
        Some(None) => {
            let refusal = Reply::error(416, "RANGE_INVALID", "the range is not in the blob");
            return Ok(refusal.with("Content-Range", format!("bytes */{size}")));
        }
        Some(Some((offset, length))) => {
            let shift = u64::from(effect.wrong_content_range);
            let (first, last) = (offset + shift, offset + length - 1 + shift);
            let body = Body::File { file, offset, length };
            let content_range = format!("bytes {first}-{last}/{size}");
            Reply { body, ..Reply::new(206) }.with("Content-Range", content_range)
        }
    };
    Ok(reply
        .with("Content-Type", "application/octet-stream")
        .with("Accept-Ranges", "bytes")
        .with("Docker-Content-Digest", digest))
}

fn whole(file: File, size: u64) -> Body {
    Body::File { file, offset: 0, length: size }
}

/// Offset and length of the one range in the header; `Some(None)` when the blob does not hold it,
/// `None` when the header is not understood and so does not count (RFC 9110, section 14.2).
fn parse_range(header: &str, size: u64) -> Option<Option<(u64, u64)>> {
    let (first, last) = header.strip_prefix("bytes=")?.split_once('-')?;
    if first.is_empty() {
        let length = last.parse::<u64>().ok()?.min(size);
        return Some((length > 0).then_some((size - length, length)));
    }
    let first: u64 = first.parse().ok()?;
    let last = if last.is_empty() { u64::MAX } else { last.parse().ok()? };
    if first > last {
        return None;
    }
    Some((first < size).then(|| (first, last.min(size - 1) - first + 1)))
}

/// A body in memory that ends with an error instead of growing without bound.
struct Bounded {
    bytes: Vec<u8>,
    bytes_max: u64,
}

impl Bounded {
    fn new(bytes_max: u64) -> Self {
        Bounded { bytes: Vec::new(), bytes_max }
    }
}

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if (self.bytes.len() + bytes.len()) as u64 > self.bytes_max {
            return Err(invalid("a body beyond the limit"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
