//! One request, answered: a range of a blob by sendfile, or a control path.
//!
//! A range that makes no sense is 416, an unknown name 404; a request that is no HTTP ends its
//! connection. Files are opened once, at the start.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

use nix::sys::sendfile::sendfile64;
use nix::sys::socket::{MsgFlags, send};

use crate::profile::{Fate, Link};

/// Header lines of a request.
const HEADERS_MAX: usize = 64;

/// The folder's files, open.
pub struct Blobs(HashMap<String, (File, u64)>);

/// Whether the connection may serve another request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// It may.
    Stay,
    /// It ends here.
    Close,
}

/// What a request asks for.
struct Ask<'a> {
    path: &'a str,
    range: Option<&'a str>,
    is_head: bool,
    is_last: bool,
}

impl Blobs {
    /// Opens every file of a folder.
    pub fn open(root: &Path) -> io::Result<Self> {
        let mut files = HashMap::new();
        for entry in std::fs::read_dir(root)? {
            let path = entry?.path();
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
            if let (true, Some(name)) = (path.is_file(), name) {
                let file = File::open(&path)?;
                let size = file.metadata()?.len();
                files.insert(name, (file, size));
            }
        }
        Ok(Blobs(files))
    }

    /// Answers the request whose head this is.
    pub fn answer(
        &self,
        stream: &TcpStream,
        link: &Link,
        head: &[u8],
        asked_at: Instant,
    ) -> io::Result<Next> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut request = httparse::Request::new(&mut headers);
        let Ok(httparse::Status::Complete(_)) = request.parse(head) else {
            return Ok(Next::Close);
        };
        let ask = Ask::of(&request);
        let next = if ask.is_last { Next::Close } else { Next::Stay };
        if let Some(order) = ask.path.strip_prefix("/-/") {
            obey(stream, link, order)?;
            return Ok(next);
        }
        let name = ask.path.rsplit('/').next().unwrap_or_default();
        let name = name.strip_prefix("sha256:").unwrap_or(name);
        let Some((file, size)) = self.0.get(name) else {
            // `/v2/` is how a client looks whether anybody is there.
            let status = if ask.path == "/v2/" { "200 OK" } else { "404 Not Found" };
            short_reply(stream, status, "{}")?;
            return Ok(next);
        };
        let Some(range) = wanted(ask.range, *size) else {
            short_reply(stream, "416 Range Not Satisfiable", "{}")?;
            return Ok(next);
        };
        let fate = link.admit(asked_at);
        if fate == Fate::Refused {
            short_reply(stream, "503 Service Unavailable", "{}")?;
            return Ok(next);
        }
        let head = blob_head(&ask, &range, *size);
        let more = if ask.is_head {
            MsgFlags::empty()
        } else {
            MsgFlags::from_bits_retain(nix::libc::MSG_MORE)
        };
        send(stream.as_raw_fd(), head.as_bytes(), more | MsgFlags::MSG_NOSIGNAL)?;
        if ask.is_head {
            return Ok(next);
        }
        match fate {
            Fate::BrokenOff => {
                let half = range.start..range.start + (range.end - range.start) / 2;
                send_range(stream, link, file, half)?;
                stream.shutdown(Shutdown::Both)?;
                Ok(Next::Close)
            }
            _ => send_range(stream, link, file, range).map(|()| next),
        }
    }
}

impl<'a> Ask<'a> {
    fn of(request: &httparse::Request<'_, 'a>) -> Self {
        let header = |name: &str| {
            let found = request.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name));
            found.and_then(|header| std::str::from_utf8(header.value).ok())
        };
        Ask {
            path: request.path.unwrap_or_default(),
            range: header("range"),
            is_head: request.method == Some("HEAD"),
            is_last: header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close")),
        }
    }
}

/// The bytes that `bytes=A-B` means; all of them without a range.
fn wanted(range: Option<&str>, size: u64) -> Option<Range<u64>> {
    let Some(range) = range else { return Some(0..size) };
    let (start, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let start: u64 = start.parse().ok()?;
    let end = match last {
        "" => size,
        last => last.parse::<u64>().ok()?.checked_add(1)?.min(size),
    };
    (start < end).then_some(start..end)
}

fn blob_head(ask: &Ask<'_>, range: &Range<u64>, size: u64) -> String {
    let length = range.end - range.start;
    let status = match ask.range {
        Some(_) => format!(
            "206 Partial Content\r\nContent-Range: bytes {}-{}/{size}",
            range.start,
            range.end - 1
        ),
        None => "200 OK".to_owned(),
    };
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/octet-stream\r\n\
             Accept-Ranges: bytes\r\nContent-Length: {length}\r\n\r\n"
    )
}

fn send_range(stream: &TcpStream, link: &Link, file: &File, range: Range<u64>) -> io::Result<()> {
    link.count(range.end - range.start);
    let mut offset = range.start as i64;
    while (offset as u64) < range.end {
        let piece = ((range.end - offset as u64) as usize).min(link.piece_bytes());
        let sent = sendfile64(stream, file, Some(&mut offset), piece)?;
        if sent == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        link.carry(sent);
    }
    Ok(())
}

fn obey(stream: &TcpStream, link: &Link, order: &str) -> io::Result<()> {
    let (order, query) = order.split_once('?').unwrap_or((order, ""));
    match order {
        "counters" => short_reply(stream, "200 OK", &link.counters.document().to_string()),
        "forget" => {
            link.counters.forget();
            short_reply(stream, "200 OK", "{}")
        }
        "profile" if link.change(query) => short_reply(stream, "200 OK", "{}"),
        _ => short_reply(stream, "404 Not Found", "{\"message\":\"no such order\"}"),
    }
}

fn short_reply(mut stream: &TcpStream, status: &str, body: &str) -> io::Result<()> {
    let length = body.len();
    let reply = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/json\r\n\
                         Content-Length: {length}\r\n\r\n{body}"
    );
    stream.write_all(reply.as_bytes())
}
