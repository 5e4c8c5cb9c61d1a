//! The story of one blob on its way into a repository.
//!
//! Looked for first, then sent (or mounted from another repository); a broken connection is
//! followed by the question how far it came, and the rest is sent from there. An upload that the
//! registry has forgotten or garbled is begun again, a few times. Bytes come from a file and go
//! through one lease; the registry says at the end whether they have their digest.

use std::cell::Cell;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

use crate::config as limits;
use crate::engine::Fd;
use crate::error::{Error, Result};
use crate::registry::http::Method;
use crate::registry::origin::Location;
use crate::registry::reference::is_digest;
use crate::registry::repository::{Repository, Write};
use crate::registry::request::{Content, FilePart, Payload};

/// A blob to be pushed.
#[derive(Clone, Copy)]
pub struct BlobFile<'a> {
    /// `sha256:` and 64 hex digits, of the file's bytes.
    pub digest: &'a str,
    /// Bytes of the file.
    pub size: u64,
    /// The bytes.
    pub file: &'a File,
    /// Told how many more bytes the registry has.
    pub on_progress: &'a dyn Fn(u64),
}

/// How a blob got there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// It was there.
    Existed,
    /// The registry had it elsewhere.
    Mounted,
    /// It was sent.
    Sent,
}

/// How an upload ended, short of success.
enum Setback {
    /// It cannot go on, but another may succeed.
    Lost(Error),
    /// Nothing helps.
    Fatal(Error),
}

const OCTETS: &str = "application/octet-stream";

impl Repository {
    /// Whether the repository has a blob.
    pub async fn has_blob(&self, digest: &str) -> Result<bool> {
        if !is_digest(digest) {
            return Err(Error::Malformed(format!("{digest:?} is not a digest")));
        }
        let location = self.location(&format!("blobs/{digest}"))?;
        let write = Write { method: Method::Head, location: &location, content: None, size: 0 };
        let answer = self.insist(write).await?;
        match answer.status {
            200..400 => Ok(true),
            404 => Ok(false),
            _ => Err(answer.into_error()),
        }
    }

    /// Sees to it that the repository has a blob.
    pub async fn push_blob(&self, blob: &BlobFile<'_>) -> Result<Pushed> {
        let name = |error: Error| error.context(format_args!("blob {}", blob.digest));
        if self.has_blob(blob.digest).await.map_err(name)? {
            (blob.on_progress)(blob.size);
            return Ok(Pushed::Existed);
        }
        let reported = Cell::new(0);
        let mut starts_left = limits::UPLOAD_STARTS_MAX;
        loop {
            starts_left -= 1;
            let location = self.begin().await.map_err(name)?;
            match self.carry(blob, location, &reported).await {
                Ok(()) => return Ok(Pushed::Sent),
                Err(Setback::Lost(error)) if starts_left > 0 && self.rest(&error, 0).await => {}
                Err(Setback::Lost(error) | Setback::Fatal(error)) => return Err(name(error)),
            }
        }
    }

    /// Has a blob that another repository of the registry may have; false if it has not.
    pub async fn mount_blob(&self, digest: &str, source: &str) -> Result<bool> {
        let place = self.location(&format!("blobs/uploads/?mount={digest}&from={source}"))?;
        let write = Write { method: Method::Post, location: &place, content: None, size: 0 };
        let answer = self.insist(write).await?;
        match (answer.status, &answer.location) {
            (201, _) => Ok(true),
            // It has begun an upload instead. What nobody goes on with, it clears away in time.
            (200..300, Some(location)) => {
                let (method, content) = (Method::Delete, None);
                let _ = self.request(Write { method, location, content, size: 0 }).await;
                Ok(false)
            }
            (200..300, None) => Ok(false),
            _ => Err(answer.into_error()),
        }
    }

    async fn begin(&self) -> Result<Location> {
        let location = self.location("blobs/uploads/")?;
        let write = Write { method: Method::Post, location: &location, content: None, size: 0 };
        let answer = self.insist(write).await?;
        match (answer.is_success(), &answer.location) {
            (true, Some(location)) => Ok(location.clone()),
            (true, None) => {
                Err(Error::Malformed("an upload was begun without a Location".to_string()))
            }
            (false, _) => Err(answer.into_error()),
        }
    }

    /// Sends what the registry does not have yet, and seals it.
    async fn carry(
        &self,
        blob: &BlobFile<'_>,
        mut location: Location,
        reported: &Cell<u64>,
    ) -> std::result::Result<(), Setback> {
        let (mut offset, mut round) = (0, 0);
        while offset < blob.size {
            let end = blob.size.min(offset + limits::UPLOAD_CHUNK_SIZE);
            let setback = match self.send_chunk(blob, &location, offset..end, reported).await {
                Ok((next, size)) => {
                    round = if size > offset { 0 } else { round + 1 };
                    (offset, location) = (size, next.unwrap_or(location));
                    if round < limits::UPLOAD_TRIES_MAX {
                        continue;
                    }
                    return Err(Setback::Lost(Error::unavailable("the upload does not grow")));
                }
                Err(setback @ Setback::Fatal(_)) => return Err(setback),
                Err(Setback::Lost(error)) => error,
            };
            round += 1;
            if round >= limits::UPLOAD_TRIES_MAX || !self.rest(&setback, round - 1).await {
                return Err(Setback::Fatal(setback));
            }
            let (next, size) = self.ask_progress(&location, blob.size, setback).await?;
            round = if size > offset { 0 } else { round };
            (offset, location) = (size, next.unwrap_or(location));
        }
        self.seal(blob, &location).await
    }

    /// One PATCH; gives where to go on and what the upload has now. `Lost` here means that nobody
    /// knows what it has.
    async fn send_chunk(
        &self,
        blob: &BlobFile<'_>,
        location: &Location,
        range: Range<u64>,
        reported: &Cell<u64>,
    ) -> std::result::Result<(Option<Location>, u64), Setback> {
        let on_sent = |position: u64| {
            if position > reported.get() {
                (blob.on_progress)(position - reported.replace(position));
            }
        };
        let part = FilePart {
            fd: Fd(blob.file.as_raw_fd()),
            range: &range,
            // A whole blob goes as Docker sends it, which every registry has seen.
            is_chunk: range != (0..blob.size),
            on_sent: &on_sent,
        };
        let content = Some(Content { media_type: OCTETS, payload: Payload::File(part) });
        let size = range.end - range.start;
        let write = Write { method: Method::Patch, location, content, size };
        let answer = self.request(write).await.map_err(Setback::Lost)?;
        match answer.status {
            // Who takes a part says so; by one byte registries err in both directions.
            200..300 => match answer.upload_size {
                Some(size) if size + 1 < range.end => Ok((answer.location, size)),
                _ => Ok((answer.location, range.end)),
            },
            400 | 404 | 416 | 499 => {
                Err(Setback::Lost(Error::unavailable(answer.into_error().to_string())))
            }
            _ => Err(Setback::Fatal(answer.into_error())),
        }
    }

    /// How far an upload has come after `setback`.
    async fn ask_progress(
        &self,
        location: &Location,
        size_max: u64,
        setback: Error,
    ) -> std::result::Result<(Option<Location>, u64), Setback> {
        let write = Write { method: Method::Get, location, content: None, size: 0 };
        let answer = self.insist(write).await.map_err(Setback::Lost)?;
        match (answer.is_success(), answer.upload_size) {
            (true, Some(size)) if size <= size_max => Ok((answer.location, size)),
            _ => Err(Setback::Lost(setback)),
        }
    }

    /// Names the digest of a complete upload.
    async fn seal(
        &self,
        blob: &BlobFile<'_>,
        location: &Location,
    ) -> std::result::Result<(), Setback> {
        let glue = if location.path.contains('?') { '&' } else { '?' };
        let path = format!("{}{glue}digest={}", location.path, blob.digest);
        let location = Location::new(location.origin.clone(), &path).map_err(Setback::Fatal)?;
        let write = Write { method: Method::Put, location: &location, content: None, size: 0 };
        let error = match self.insist(write).await {
            // 202 would be the answer to one more piece.
            Ok(answer) if answer.is_success() && answer.status != 202 => match &answer.digest {
                Some(told) if told != blob.digest => {
                    return Err(Setback::Fatal(Error::Digest(format!("it was kept as {told}"))));
                }
                _ => return Ok(()),
            },
            Ok(answer) => answer.into_error(),
            Err(error) => error,
        };
        // A try that was not answered may have done it; its repetition finds no upload then.
        match self.has_blob(blob.digest).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(Setback::Lost(Error::unavailable(error.to_string()))),
            Err(_) => Err(Setback::Fatal(error)),
        }
    }
}
