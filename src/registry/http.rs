//! HTTP/1.1 heads: writing a request's into a slice, reading a response's out of one.
//!
//! Pure and, on success, free of allocation: a request is written in place, a parsed response is a
//! small value holding numbers and positions into the bytes it was parsed from, which the caller
//! keeps. Refused, because they let two readers see two messages: obsolete line folding, two
//! different lengths, Content-Length beside Transfer-Encoding, a transfer coding other than chunked
//! (RFC 9112 section 6). Never decides on retries; `check_range` says whether an answer is the one
//! that was asked for.

use std::ops::Range;

use crate::config as limits;
use crate::error::{Error, Result};

/// What is done to the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Read.
    Get,
    /// Read the head only.
    Head,
    /// Start an upload, ask for a token.
    Post,
    /// Finish an upload, write a manifest.
    Put,
    /// Continue an upload.
    Patch,
    /// Give up an upload.
    Delete,
    /// Open a tunnel through a proxy.
    Connect,
}

impl Method {
    fn as_str(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Head => "HEAD",
            Method::Post => "POST",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
            Method::Delete => "DELETE",
            Method::Connect => "CONNECT",
        }
    }
}

/// Writes one request head into a slice; a part that does not fit or could split the head is
/// remembered and refused by `finish`.
#[derive(Debug)]
pub struct RequestHead<'a> {
    buffer: &'a mut [u8],
    length: usize,
    fault: Option<&'static str>,
}

impl<'a> RequestHead<'a> {
    /// Begins with the request line and Host; `target` is joined from its parts.
    pub fn new(buffer: &'a mut [u8], method: Method, target: &[&str], authority: &str) -> Self {
        let mut head = RequestHead { buffer, length: 0, fault: None };
        head.raw(method.as_str().as_bytes());
        head.raw(b" ");
        if target.iter().any(|part| !part.bytes().all(|b| b.is_ascii_graphic())) {
            head.fault = Some("a target that is not visible ASCII");
        }
        target.iter().for_each(|part| head.raw(part.as_bytes()));
        head.raw(b" HTTP/1.1\r\n");
        head.header("Host", &[authority]);
        head
    }

    /// Adds a header line; the value is joined from its parts.
    pub fn header(&mut self, name: &str, value: &[&str]) {
        self.raw(name.as_bytes());
        self.raw(b": ");
        for part in value {
            if !part.bytes().all(|b| b == b' ' || b == b'\t' || b.is_ascii_graphic()) {
                self.fault = Some("a header value that is not one line of ASCII");
            }
            self.raw(part.as_bytes());
        }
        self.raw(b"\r\n");
    }

    /// Adds lines that were checked before: `Name: value\r\n` repeated.
    pub fn lines(&mut self, lines: &str) {
        self.raw(lines.as_bytes());
    }

    /// Adds `Range` for the bytes of `range`, which must not be empty.
    pub fn range(&mut self, range: &Range<u64>) {
        assert!(range.start < range.end, "an empty range cannot be asked for");
        self.raw(b"Range: bytes=");
        self.number(range.start);
        self.raw(b"-");
        self.number(range.end - 1);
        self.raw(b"\r\n");
    }

    /// Adds `Content-Length`.
    pub fn content_length(&mut self, length: u64) {
        self.raw(b"Content-Length: ");
        self.number(length);
        self.raw(b"\r\n");
    }

    /// Adds `Content-Range` for an upload's next bytes, which must not be none.
    pub fn content_range(&mut self, range: &Range<u64>) {
        assert!(range.start < range.end, "an empty chunk is not sent");
        self.raw(b"Content-Range: ");
        self.number(range.start);
        self.raw(b"-");
        self.number(range.end - 1);
        self.raw(b"\r\n");
    }

    /// Ends the head; returns its size in bytes.
    pub fn finish(mut self) -> Result<usize> {
        self.raw(b"\r\n");
        match self.fault {
            None => Ok(self.length),
            Some(why) => Err(Error::Malformed(format!("cannot write a request: {why}"))),
        }
    }

    fn raw(&mut self, bytes: &[u8]) {
        match self.buffer.get_mut(self.length..self.length + bytes.len()) {
            Some(place) => {
                place.copy_from_slice(bytes);
                self.length += bytes.len();
            }
            None => self.fault = Some("its head is larger than HTTP_REQUEST_HEAD_SIZE_MAX"),
        }
    }

    fn number(&mut self, mut number: u64) {
        let mut digits = [0_u8; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.raw(&digits[at..]);
    }
}

/// Where a header's value stands in the bytes the head was parsed from; empty when absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    start: u16,
    end: u16,
}

impl Span {
    /// The text, or `None` when the header is absent or not UTF-8.
    pub fn text(self, head: &[u8]) -> Option<&str> {
        let bytes = head.get(usize::from(self.start)..usize::from(self.end))?;
        std::str::from_utf8(bytes).ok().filter(|text| !text.is_empty())
    }
}

/// How the end of a body is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is no body.
    None,
    /// So many bytes follow.
    Length(u64),
    /// Chunks follow.
    Chunked,
    /// Everything until the peer closes.
    UntilClose,
}

/// A `Content-Range: bytes FIRST-LAST/TOTAL`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ContentRange {
    /// The bytes that follow.
    pub range: (u64, u64),
    /// The size of the whole, when it was told.
    pub total: Option<u64>,
}

/// What matters of a response head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResponseHead {
    /// 100 to 999.
    pub status: u16,
    /// Bytes of the head; the body starts here.
    pub size: usize,
    /// How the body ends.
    pub framing: Framing,
    /// Content-Length as sent, also in an answer to HEAD.
    pub content_length: Option<u64>,
    /// Whether another request may follow on this connection.
    pub keep_alive: bool,
    /// Whether the body is compressed or split, though we asked for neither.
    pub is_encoded: bool,
    /// A well-formed Content-Range.
    pub content_range: Option<ContentRange>,
    /// Location.
    pub location: Span,
    /// Up to four WWW-Authenticate lines.
    pub challenges: [Span; 4],
    /// Retry-After.
    pub retry_after: Span,
    /// Docker-Content-Digest.
    pub content_digest: Span,
    /// Content-Type.
    pub content_type: Span,
    /// Range: how far an upload has come.
    pub range: Span,
    /// OCI-Subject: the registry keeps the list of referrers itself.
    pub subject: Span,
}

impl ResponseHead {
    /// Moves every span: the head was parsed from bytes that begin `distance` into the caller's.
    pub fn shift(&mut self, distance: usize) {
        let [a, b, c, d] = &mut self.challenges;
        let others =
            [&mut self.location, &mut self.retry_after, &mut self.content_digest, a, b, c, d];
        let more = [&mut self.content_type, &mut self.range, &mut self.subject];
        for span in others.into_iter().chain(more) {
            span.start += distance as u16;
            span.end += distance as u16;
        }
    }
}

/// Parses the head of a response to `method`; `None` while it is incomplete.
///
/// `bytes` may reach beyond the head. An incomplete head of HTTP_RESPONSE_HEAD_SIZE_MAX bytes is an
/// error, so a caller that receives up to that size always ends.
pub fn parse_response(bytes: &[u8], method: Method) -> Result<Option<ResponseHead>> {
    let bytes = &bytes[..bytes.len().min(limits::HTTP_RESPONSE_HEAD_SIZE_MAX)];
    let mut headers = [httparse::EMPTY_HEADER; limits::HTTP_HEADER_COUNT_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let size = match response.parse(bytes) {
        Ok(httparse::Status::Complete(size)) => size,
        Ok(httparse::Status::Partial) if bytes.len() < limits::HTTP_RESPONSE_HEAD_SIZE_MAX => {
            return Ok(None);
        }
        Ok(httparse::Status::Partial) => return Err(bad("it is larger than 16 KiB")),
        Err(error) => return Err(bad(&error.to_string())),
    };
    let status = response.code.unwrap_or(0);
    let is_old = response.version != Some(1);
    if !(100..600).contains(&status) {
        return Err(bad("its status is not 100 to 599"));
    }
    let mut fields = Fields::default();
    for header in response.headers.iter() {
        fields.take(header, bytes)?;
    }
    fields.into_head(status, size, is_old, method).map(Some)
}

/// Whether the head answers a GET of `asked` with exactly these bytes.
///
/// Returns the size of the whole when the server told it. The error names what was got instead.
pub fn check_range(head: &ResponseHead, asked: &Range<u64>) -> Result<Option<u64>> {
    let size = asked.end - asked.start;
    let wrong = |got: String| {
        let (first, last) = (asked.start, asked.end - 1);
        Err(Error::Malformed(format!("asked for bytes {first}-{last} and got {got}")))
    };
    if head.status == 416 {
        return wrong("416: the blob ends before this range".to_string());
    }
    if head.status != 206 {
        return wrong(format!("status {} instead of 206: the range was ignored", head.status));
    }
    if head.is_encoded {
        return wrong("a multipart or compressed answer".to_string());
    }
    let Some(content_range) = head.content_range else {
        return wrong("206 without a usable Content-Range".to_string());
    };
    let (first, last) = content_range.range;
    if (first, last) != (asked.start, asked.end - 1) {
        return wrong(format!("bytes {first}-{last}"));
    }
    match head.content_length {
        Some(length) if length != size => wrong(format!("{length} bytes of body")),
        _ => Ok(content_range.total),
    }
}

fn bad(why: &str) -> Error {
    Error::Malformed(format!("a response head was refused: {why}"))
}

/// What is gathered from the header lines.
#[derive(Default)]
struct Fields {
    length: Option<u64>,
    is_chunked: bool,
    closes: bool,
    keeps: bool,
    is_encoded: bool,
    content_range: Option<ContentRange>,
    location: Span,
    challenges: [Span; 4],
    challenge_count: usize,
    retry_after: Span,
    content_digest: Span,
    content_type: Span,
    range: Span,
    subject: Span,
}

impl Fields {
    fn take(&mut self, header: &httparse::Header<'_>, bytes: &[u8]) -> Result<()> {
        let value = header.value.trim_ascii();
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        let once = |place: &mut Span| {
            if *place == Span::default() {
                *place = span(bytes, value);
            }
        };
        if is("content-length") {
            let length = decimal(value).ok_or_else(|| bad("Content-Length is not a number"))?;
            if self.length.is_some_and(|known| known != length) {
                return Err(bad("it has two different lengths"));
            }
            self.length = Some(length);
        } else if is("transfer-encoding") {
            if self.is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
                return Err(bad("its Transfer-Encoding is not a single chunked"));
            }
            self.is_chunked = true;
        } else if is("connection") {
            for token in value.split(|b| *b == b',').map(<[u8]>::trim_ascii) {
                self.closes |= token.eq_ignore_ascii_case(b"close");
                self.keeps |= token.eq_ignore_ascii_case(b"keep-alive");
            }
        } else if is("content-encoding") {
            self.is_encoded |= !value.is_empty() && !value.eq_ignore_ascii_case(b"identity");
        } else if is("content-range") {
            if self.content_range.is_some() {
                return Err(bad("it has two Content-Range lines"));
            }
            self.content_range = parse_content_range(value);
        } else if is("content-type") {
            let multipart = b"multipart/";
            self.is_encoded |= value
                .get(..multipart.len())
                .is_some_and(|start| start.eq_ignore_ascii_case(multipart));
            once(&mut self.content_type);
        } else if is("location") {
            once(&mut self.location);
        } else if is("retry-after") {
            once(&mut self.retry_after);
        } else if is("docker-content-digest") {
            once(&mut self.content_digest);
        } else if is("range") {
            once(&mut self.range);
        } else if is("oci-subject") {
            once(&mut self.subject);
        } else if is("www-authenticate") && self.challenge_count < self.challenges.len() {
            self.challenges[self.challenge_count] = span(bytes, value);
            self.challenge_count += 1;
        }
        Ok(())
    }

    fn into_head(
        self,
        status: u16,
        size: usize,
        is_old: bool,
        method: Method,
    ) -> Result<ResponseHead> {
        if self.is_chunked && (self.length.is_some() || is_old) {
            return Err(bad("it has Transfer-Encoding beside Content-Length or in HTTP/1.0"));
        }
        let is_tunnel = method == Method::Connect && (200..300).contains(&status);
        let has_no_body = method == Method::Head || status < 200 || is_tunnel;
        let framing = match (has_no_body || status == 204 || status == 304, self.length) {
            (true, _) => Framing::None,
            (false, _) if self.is_chunked => Framing::Chunked,
            (false, Some(length)) => Framing::Length(length),
            (false, None) => Framing::UntilClose,
        };
        let stays = !self.closes && (!is_old || self.keeps) && framing != Framing::UntilClose;
        Ok(ResponseHead {
            status,
            size,
            framing,
            content_length: self.length,
            keep_alive: stays,
            is_encoded: self.is_encoded,
            content_range: self.content_range,
            location: self.location,
            challenges: self.challenges,
            retry_after: self.retry_after,
            content_digest: self.content_digest,
            content_type: self.content_type,
            range: self.range,
            subject: self.subject,
        })
    }
}

/// The position of `value`, a part of `bytes`, which is at most 16 KiB long.
fn span(bytes: &[u8], value: &[u8]) -> Span {
    let start = value.as_ptr() as usize - bytes.as_ptr() as usize;
    Span { start: start as u16, end: (start + value.len()) as u16 }
}

fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 19 {
        return None;
    }
    text.iter().try_fold(0_u64, |sum, byte| match byte {
        b'0'..=b'9' => Some(sum * 10 + u64::from(byte - b'0')),
        _ => None,
    })
}

fn parse_content_range(value: &[u8]) -> Option<ContentRange> {
    let unit = b"bytes ";
    let rest =
        value.get(unit.len()..).filter(|_| value[..unit.len()].eq_ignore_ascii_case(unit))?;
    let slash = rest.iter().position(|b| *b == b'/')?;
    let dash = rest[..slash].iter().position(|b| *b == b'-')?;
    let (first, last) = (decimal(&rest[..dash])?, decimal(&rest[dash + 1..slash])?);
    let total = match &rest[slash + 1..] {
        b"*" => None,
        total => Some(decimal(total)?),
    };
    let is_sound = first <= last && total.is_none_or(|total| last < total);
    is_sound.then_some(ContentRange { range: (first, last), total })
}
