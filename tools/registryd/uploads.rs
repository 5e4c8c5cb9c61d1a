//! Pushing blobs: whole, in chunks, or by naming one that is there already.
//!
//! Owns the files under `uploads/`. A blob appears under its digest by a rename, after its bytes
//! proved to have that digest; what a client gives up on is thrown away at the next start.

use crate::Server;
use crate::faults::Effect;
use crate::reply::Reply;
use crate::tree::hex_digest;
use crate::wire::{Connection, Request, invalid};
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Numbers uploads. A field of whoever holds the tree.
#[derive(Default)]
pub struct Uploads {
    count: AtomicU64,
}

impl Uploads {
    fn next(&self) -> String {
        format!("u{}", self.count.fetch_add(1, Ordering::Relaxed))
    }
}

/// Answers a request below `/v2/REPO/blobs/uploads/`; `id` is empty for a new upload.
pub fn answer(
    server: &Server,
    connection: &mut Connection,
    request: &Request,
    repo: &str,
    id: &str,
    effect: &Effect,
) -> io::Result<Reply> {
    if request.method == "POST" && id.is_empty() {
        return begin(server, connection, request, repo);
    }
    let Some(path) = server.tree.upload_path(id).filter(|path| path.is_file()) else {
        connection.read_body(request, &mut io::sink())?;
        return Ok(Reply::error(404, "BLOB_UPLOAD_UNKNOWN", "no such upload"));
    };
    if let Some(length) = effect.cut_body {
        connection.read_part(length, &mut OpenOptions::new().append(true).open(&path)?)?;
        return Err(io::ErrorKind::ConnectionAborted.into());
    }
    match request.method.as_str() {
        "PATCH" => {
            append(connection, request, &path)?;
            progress(202, repo, id, &path)
        }
        "PUT" => {
            append(connection, request, &path)?;
            let digest = request.parameter("digest").ok_or_else(|| invalid("no digest"))?;
            finish(server, repo, digest, &path)
        }
        "GET" => {
            connection.read_body(request, &mut io::sink())?;
            progress(204, repo, id, &path)
        }
        "DELETE" => {
            connection.read_body(request, &mut io::sink())?;
            fs::remove_file(&path)?;
            Ok(Reply::new(204))
        }
        _ => {
            connection.read_body(request, &mut io::sink())?;
            Ok(Reply::error(405, "UNSUPPORTED", "uploads know POST, PATCH, PUT, GET, DELETE"))
        }
    }
}

fn begin(
    server: &Server,
    connection: &mut Connection,
    request: &Request,
    repo: &str,
) -> io::Result<Reply> {
    if let Some(digest) = request.parameter("mount")
        && server.tree.blob(digest)?.is_some()
    {
        connection.read_body(request, &mut io::sink())?;
        return Ok(created(repo, digest));
    }
    let id = server.uploads.next();
    let path = server.tree.upload_path(&id).ok_or_else(|| invalid("a bad name"))?;
    File::create(&path)?;
    append(connection, request, &path)?;
    match request.parameter("digest") {
        Some(digest) => finish(server, repo, digest, &path),
        None => progress(202, repo, &id, &path),
    }
}

fn append(connection: &mut Connection, request: &Request, path: &Path) -> io::Result<()> {
    let mut file = OpenOptions::new().append(true).open(path)?;
    let length = file.metadata()?.len();
    if let Some(range) = request.header("content-range") {
        let first = range.trim_start_matches("bytes ").split('-').next().unwrap_or("");
        if first.parse() != Ok(length) {
            connection.read_body(request, &mut io::sink())?;
            return Err(invalid("a chunk that does not follow the one before"));
        }
    }
    connection.read_body(request, &mut file).map(drop)
}

fn progress(status: u16, repo: &str, id: &str, path: &Path) -> io::Result<Reply> {
    let length = fs::metadata(path)?.len();
    Ok(Reply::new(status)
        .with("Location", format!("/v2/{repo}/blobs/uploads/{id}"))
        .with("Range", format!("0-{}", length.saturating_sub(1)))
        .with("Docker-Upload-UUID", id))
}

fn finish(server: &Server, repo: &str, digest: &str, path: &Path) -> io::Result<Reply> {
    let place = server.tree.blob_path(digest);
    let proved = digest_of(path)? == digest;
    if let Some(place) = place.filter(|_| proved) {
        fs::rename(path, place)?;
        return Ok(created(repo, digest));
    }
    fs::remove_file(path)?;
    Ok(Reply::error(400, "DIGEST_INVALID", "the bytes do not have this digest"))
}

fn digest_of(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut piece = vec![0; 1 << 16];
    loop {
        let count = file.read(&mut piece)?;
        if count == 0 {
            return Ok(hex_digest(&hasher.finalize()));
        }
        hasher.update(&piece[..count]);
    }
}

fn created(repo: &str, digest: &str) -> Reply {
    Reply::new(201)
        .with("Location", format!("/v2/{repo}/blobs/{digest}"))
        .with("Docker-Content-Digest", digest)
}
