//! Asking: a connection that is ready, a request on it, the head of the answer.
//!
//! Owns how a request looks on the wire, through a proxy too: an absolute URL for plain origins, a
//! tunnel for TLS ones. Every step has its own limit within the deadline of the whole; a step that
//! is late is a failure worth another try while the whole has time left.

use std::ops::Range;
use std::rc::Rc;

use crate::config as limits;
use crate::engine::{Class, Core, Fd, Lane};
use crate::error::{Error, Result};
use crate::registry::connection::{Connection, TEXT_SIZE};
use crate::registry::http::{Method, RequestHead, ResponseHead, parse_response};
use crate::registry::pool::{Line, Surroundings};
use crate::registry::secret::Secret;

/// What is asked.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// GET, HEAD, POST, PUT, PATCH.
    pub method: Method,
    /// The path, in parts to be joined.
    pub path: &'a [&'a str],
    /// The bytes of it.
    pub range: Option<&'a Range<u64>>,
    /// The Accept header; nothing when empty.
    pub accept: &'a str,
    /// The Authorization header.
    pub authorization: Option<&'a Secret>,
    /// Lines checked before.
    pub lines: &'a str,
    /// A body; the methods that write say so when there is none.
    pub content: Option<Content<'a>>,
}

/// A body that is sent.
#[derive(Clone, Copy)]
pub struct Content<'a> {
    /// The Content-Type.
    pub media_type: &'a str,
    /// Where its bytes are.
    pub payload: Payload<'a>,
}

/// The bytes of a body that is sent.
#[derive(Clone, Copy)]
pub enum Payload<'a> {
    /// In memory; sent again on a fresh connection when an idle one proves closed.
    Bytes(&'a [u8]),
    /// In a file, read as it is sent; never sent twice unasked.
    File(FilePart<'a>),
}

/// A part of a file on its way to a registry.
#[derive(Clone, Copy)]
pub struct FilePart<'a> {
    /// The file, open for reading for as long as the request takes.
    pub fd: Fd,
    /// Which bytes of it.
    pub range: &'a Range<u64>,
    /// Whether the range goes into a Content-Range.
    pub is_chunk: bool,
    /// Told up to where the file has been sent.
    pub on_sent: &'a dyn Fn(u64),
}

impl Content<'_> {
    fn size(&self) -> u64 {
        match self.payload {
            Payload::Bytes(bytes) => bytes.len() as u64,
            Payload::File(part) => part.range.end - part.range.start,
        }
    }
}

impl Request<'_> {
    /// Whether the request may be made again without asking what became of it.
    pub fn is_repeatable(&self) -> bool {
        !matches!(self.content, Some(Content { payload: Payload::File(_), .. }))
    }
}

/// How long things may take.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Everything together ends here (ns on the core's clock).
    pub deadline_ns: u64,
    /// A connection, TLS included.
    pub connect_ns: u64,
    /// The head, and progress of the body.
    pub timeout_ns: u64,
}

/// A fresh connection, ready for a request.
pub async fn connect(
    core: &Core,
    around: &Surroundings,
    line: &Rc<Line>,
    lane: Lane,
    timing: Timing,
) -> Result<Connection> {
    let until_ns = timing.deadline_ns.min(core.now() + timing.connect_ns);
    let connected = async {
        let mut connection = line.dial(core, &around.names, until_ns).await?;
        let tls = line.tls(core, &around.tls).await?;
        if tls.is_some() || line.peer.is_tunnelled() {
            connection.wake(lane).await;
        }
        if line.peer.is_tunnelled() {
            open_tunnel(&mut connection, line, until_ns).await?;
        }
        if let Some(tls) = tls {
            let shaken = connection.secure(tls, until_ns).await;
            if shaken.is_err() {
                // Certificates may be put right while we run: read them again next time.
                around.tls.forget();
            }
            shaken?;
        }
        Ok(connection)
    };
    connected.await.map_err(|error| late(error, core, timing.deadline_ns, "no connection"))
}

/// Opens a connection for later.
pub async fn warm(
    core: &Core,
    around: &Surroundings,
    line: &Rc<Line>,
    lane: Lane,
    timing: Timing,
) -> Result<()> {
    let _place = line.enter(core, lane, timing.deadline_ns).await?;
    let connection = connect(core, around, line, lane, timing).await?;
    line.put_idle(connection);
    Ok(())
}

async fn open_tunnel(connection: &mut Connection, line: &Line, until_ns: u64) -> Result<()> {
    let target = line.peer.origin.host_port();
    let mut head =
        RequestHead::new(connection.request_zone(), Method::Connect, &[&target], &target);
    proxy_authorization(&mut head, line);
    let size = head.finish()?;
    connection.send(size, until_ns).await?;
    let mut text = 0..0;
    let head = receive_head(connection, Method::Connect, until_ns, &mut text).await?;
    match (head.status, text.is_empty()) {
        (200..300, true) => Ok(()),
        (200..300, false) => Err(Error::unavailable("the proxy speaks before the tunnel is used")),
        (407, _) => Err(Error::Denied("the proxy wants a password: proxy.url".to_string())),
        (status, _) => Err(Error::unavailable(format!("the proxy answered CONNECT with {status}"))),
    }
}

/// Sends a request and receives until a final head is complete; `text` is then what came after it,
/// and on failure it is empty at 0 when no byte of an answer was seen. Every step may take
/// `timeout_ns`: the head with what follows it in memory, each piece of a file, the answer.
pub async fn ask(
    core: &Core,
    connection: &mut Connection,
    line: &Line,
    request: &Request<'_>,
    timing: Timing,
    text: &mut Range<usize>,
) -> Result<ResponseHead> {
    let until_ns = || timing.deadline_ns.min(core.now() + timing.timeout_ns);
    let size = write_request(connection.request_zone(), line, request)?;
    connection.send(size, until_ns()).await?;
    let sent = match request.content.map(|content| content.payload) {
        None => Ok(()),
        Some(Payload::Bytes(bytes)) => send_bytes(connection, bytes, until_ns()).await,
        Some(Payload::File(part)) => send_file(core, connection, part, until_ns).await,
    };
    match sent {
        Ok(()) => receive_head(connection, request.method, until_ns(), text).await,
        // Who has answered before the body was through may have stopped reading it: the answer
        // says more than the broken pipe.
        Err(error) => {
            let early = receive_head(connection, request.method, until_ns(), text).await;
            let mut head = early.map_err(|_| error)?;
            head.keep_alive = false;
            Ok(head)
        }
    }
}

async fn send_bytes(connection: &mut Connection, bytes: &[u8], until_ns: u64) -> Result<()> {
    for piece in bytes.chunks(limits::HTTP_REQUEST_HEAD_SIZE_MAX) {
        connection.request_zone()[..piece.len()].copy_from_slice(piece);
        connection.send(piece.len(), until_ns).await?;
    }
    Ok(())
}

async fn send_file(
    core: &Core,
    connection: &mut Connection,
    part: FilePart<'_>,
    until_ns: impl Fn() -> u64,
) -> Result<()> {
    let mut lease = core.lease(Class::Range).await;
    let mut left = part.range.clone();
    while left.start < left.end {
        let size = (left.end - left.start).min(limits::UPLOAD_PIECE_SIZE as u64) as usize;
        let (back, got) = core.read_at(part.fd, lease, 0..size, left.start).by(until_ns()).await;
        lease = back;
        let size = match got.map_err(|error| error.context("reading what is uploaded"))? {
            0 => return Err(Error::Malformed("what is uploaded has shrunk".to_owned())),
            size => size,
        };
        let (back, sent) = connection.send_from(lease, 0..size, until_ns()).await;
        lease = back;
        sent?;
        left.start += size as u64;
        (part.on_sent)(left.start);
    }
    Ok(())
}

fn write_request(zone: &mut [u8], line: &Line, request: &Request<'_>) -> Result<usize> {
    let path = request.path;
    let mut parts = [""; 9];
    let count = path.len() + 1;
    assert!(count <= parts.len(), "a path has at most eight parts");
    parts[0] = &line.target_prefix;
    parts[1..count].copy_from_slice(path);
    let mut head = RequestHead::new(zone, request.method, &parts[..count], &line.authority);
    head.header("User-Agent", &["sluice/", env!("CARGO_PKG_VERSION")]);
    head.header("Accept-Encoding", &["identity"]);
    if !request.accept.is_empty() {
        head.header("Accept", &[request.accept]);
    }
    if let Some(authorization) = request.authorization {
        head.header("Authorization", &[authorization.reveal()]);
    }
    if !line.target_prefix.is_empty() {
        proxy_authorization(&mut head, line);
    }
    head.lines(request.lines);
    if let Some(range) = request.range {
        head.range(range);
    }
    if let Some(content) = &request.content {
        head.header("Content-Type", &[content.media_type]);
        if let Payload::File(FilePart { range, is_chunk: true, .. }) = content.payload {
            head.content_range(range);
        }
        head.content_length(content.size());
    } else if matches!(request.method, Method::Post | Method::Put | Method::Patch) {
        head.content_length(0);
    }
    head.finish()
}

fn proxy_authorization(head: &mut RequestHead<'_>, line: &Line) {
    let proxy = line.peer.proxy.as_ref();
    if let Some(authorization) = proxy.and_then(|proxy| proxy.authorization.as_ref()) {
        head.header("Proxy-Authorization", &[authorization.reveal()]);
    }
}

/// Receives until a final head is complete; `text` is then what came after it.
async fn receive_head(
    connection: &mut Connection,
    method: Method,
    until_ns: u64,
    text: &mut Range<usize>,
) -> Result<ResponseHead> {
    let mut interim_count = 0;
    loop {
        let parsed = parse_response(connection.text(text.clone()), method)?;
        match parsed {
            Some(head) if head.status < 200 => {
                interim_count += 1;
                if interim_count > limits::HTTP_INTERIM_COUNT_MAX || head.status == 101 {
                    return Err(Error::unavailable("the server does not come to its answer"));
                }
                text.start += head.size;
            }
            Some(mut head) => {
                // Spans are read relative to the zone's start.
                head.shift(text.start);
                text.start += head.size;
                return Ok(head);
            }
            None => {
                let end = TEXT_SIZE.min(text.end + limits::HTTP_HEAD_RECEIVE_SIZE);
                if end == text.end {
                    return Err(Error::unavailable("the response head is too large"));
                }
                match connection.receive_text(text.end..end, until_ns).await? {
                    0 => return Err(Error::unavailable("the server closed without an answer")),
                    size => text.end += size,
                }
            }
        }
    }
}

/// A deadline of one step is a failure like others while the request as a whole has time left.
pub fn late(error: Error, core: &Core, deadline_ns: u64, what: &str) -> Error {
    match error {
        Error::Deadline(_) if core.now() < deadline_ns => {
            Error::unavailable(format!("{what} within the backend's timeout"))
        }
        other => other,
    }
}
