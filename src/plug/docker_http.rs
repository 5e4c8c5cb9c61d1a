//! The HTTP/1.1 that Docker speaks to its plugins, over any blocking stream.
//!
//! Requests have bodies with a length or in chunks, as long as a layer; answers are JSON, or a tar
//! in chunks. Heads are bounded, bodies are streams. Nothing is known here of what a request means.

use std::io::{ErrorKind, Read, Write};

use crate::config;
use crate::error::{Error, Result};

/// A connection: a stream and what has been read of it and not been used.
pub struct Wire<S> {
    stream: S,
    buffer: Vec<u8>,
    /// The unused part of the buffer begins here.
    start: usize,
}

/// A request without its body.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// `POST`.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// How its body ends.
    pub framing: Framing,
    /// Whether the client wants to go on with this connection.
    pub keep_alive: bool,
    /// Whether it waits for a word before it sends the body.
    pub awaits_continue: bool,
}

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// After so many bytes.
    Length(u64),
    /// With an empty chunk.
    Chunked,
}

impl<S: Read + Write> Wire<S> {
    /// Wraps a fresh stream.
    pub fn new(stream: S) -> Self {
        Wire { stream, buffer: Vec::new(), start: 0 }
    }

    /// The stream, for its options.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Waits for the first byte of a request. False if the client has left instead.
    pub fn wait(&mut self) -> Result<bool> {
        Ok(self.start < self.buffer.len() || self.more()? > 0)
    }

    /// Reads a request's head. None if the client has left.
    pub fn head(&mut self) -> Result<Option<Head>> {
        loop {
            if self.start < self.buffer.len()
                && let Some((head, length)) = parse(&self.buffer[self.start..])?
            {
                self.start += length;
                return Ok(Some(head));
            }
            if self.buffer.len() - self.start >= config::DOCKER_HEAD_MAX_BYTES {
                return Err(Error::Malformed("the head of a request is too long".to_owned()));
            }
            if self.more()? == 0 {
                return match self.start < self.buffer.len() {
                    true => Err(Error::Malformed("a request ends within its head".to_owned())),
                    false => Ok(None),
                };
            }
        }
    }

    /// The body of the request whose head was read last.
    pub fn body(&mut self, head: &Head) -> Result<Body<'_, S>> {
        if head.awaits_continue {
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let (left, chunked) = match head.framing {
            Framing::Length(length) => (length, false),
            Framing::Chunked => (0, true),
        };
        Ok(Body { wire: self, left, chunked, begun: false })
    }

    /// Sends a JSON answer.
    pub fn answer(&mut self, status: u16, json: &str, keep_alive: bool) -> Result<()> {
        let head = head_of(status, keep_alive);
        let length = json.len();
        self.write(format!("{head}Content-Length: {length}\r\n\r\n{json}").as_bytes())
    }

    /// Begins an answer of unknown length; `Chunks::finish` ends it.
    pub fn stream_answer(&mut self, keep_alive: bool) -> Result<Chunks<'_, S>> {
        let head = head_of(200, keep_alive);
        self.write(format!("{head}Transfer-Encoding: chunked\r\n\r\n").as_bytes())?;
        Ok(Chunks { wire: self, pending: Vec::with_capacity(config::DOCKER_CHUNK_BYTES) })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream
            .write_all(bytes)
            .and_then(|()| self.stream.flush())
            .map_err(|error| gone(&error, "Docker does not take its answer"))
    }

    /// Reads what there is into the buffer; 0 at the end of the stream.
    fn more(&mut self) -> Result<usize> {
        if self.start > 0 {
            self.buffer.drain(..std::mem::take(&mut self.start));
        }
        let end = self.buffer.len();
        self.buffer.resize(end + config::DOCKER_READ_BYTES, 0);
        let count = loop {
            match self.stream.read(&mut self.buffer[end..]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => break result,
            }
        };
        self.buffer.truncate(end + count.as_ref().copied().unwrap_or(0));
        count.map_err(|error| gone(&error, "Docker does not finish its request"))
    }

    /// A line without its end.
    fn line(&mut self) -> Result<Vec<u8>> {
        loop {
            let unused = &self.buffer[self.start..];
            if let Some(at) = unused.iter().position(|&byte| byte == b'\n') {
                let line = unused[..at].strip_suffix(b"\r").unwrap_or(&unused[..at]).to_vec();
                self.start += at + 1;
                return Ok(line);
            }
            if unused.len() > config::DOCKER_LINE_MAX_BYTES || self.more()? == 0 {
                return Err(Error::Malformed("a chunk of a request has no size".to_owned()));
            }
        }
    }

    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        if self.start == self.buffer.len() && self.more()? == 0 {
            return Err(Error::Malformed("a request ends within its body".to_owned()));
        }
        let count = into.len().min(self.buffer.len() - self.start);
        into[..count].copy_from_slice(&self.buffer[self.start..self.start + count]);
        self.start += count;
        Ok(count)
    }
}

/// The body of a request, as a stream that ends with it.
pub struct Body<'a, S> {
    wire: &'a mut Wire<S>,
    /// Of the body, or of the present chunk.
    left: u64,
    chunked: bool,
    /// Whether a chunk has been read, so that a line's end follows.
    begun: bool,
}

impl<S: Read + Write> Body<'_, S> {
    /// Reads away what nobody wanted. False when that is too much: the connection is of no use
    /// then.
    pub fn drain(mut self) -> bool {
        let mut scratch = vec![0; config::DOCKER_READ_BYTES];
        let mut drained = 0;
        loop {
            match self.pull(&mut scratch) {
                Ok(0) => return true,
                Ok(count) => drained += count as u64,
                Err(_) => return false,
            }
            if drained > config::DOCKER_DRAIN_MAX_BYTES {
                return false;
            }
        }
    }

    fn pull(&mut self, into: &mut [u8]) -> Result<usize> {
        if self.left == 0 && self.chunked {
            self.next_chunk()?;
        }
        if self.left == 0 || into.is_empty() {
            return Ok(0);
        }
        let wanted = self.left.min(into.len() as u64) as usize;
        let count = self.wire.read(&mut into[..wanted])?;
        self.left -= count as u64;
        Ok(count)
    }

    fn next_chunk(&mut self) -> Result<()> {
        if self.begun && !self.wire.line()?.is_empty() {
            return Err(Error::Malformed("a chunk of a request is longer than it says".to_owned()));
        }
        self.begun = true;
        let line = self.wire.line()?;
        let digits = line.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii();
        let size = std::str::from_utf8(digits).ok().filter(|digits| !digits.starts_with('+'));
        let size = size.and_then(|digits| u64::from_str_radix(digits, 16).ok());
        self.left = size.ok_or_else(|| Error::Malformed("the size of a chunk".to_owned()))?;
        if self.left == 0 {
            self.chunked = false;
            // Trailers mean nothing here; their number is bounded.
            for _ in 0..config::DOCKER_HEADER_COUNT_MAX {
                if self.wire.line()?.is_empty() {
                    return Ok(());
                }
            }
            return Err(Error::Malformed("too many trailers".to_owned()));
        }
        Ok(())
    }
}

impl<S: Read + Write> Read for Body<'_, S> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        self.pull(into).map_err(std::io::Error::other)
    }
}

/// An answer in chunks.
pub struct Chunks<'a, S> {
    wire: &'a mut Wire<S>,
    pending: Vec<u8>,
}

impl<S: Read + Write> Chunks<'_, S> {
    /// The end, by which Docker knows that nothing is missing.
    pub fn finish(mut self) -> Result<()> {
        self.send()?;
        self.wire.write(b"0\r\n\r\n")
    }

    fn send(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let size = format!("{:x}\r\n", self.pending.len());
        let chunk = [size.as_bytes(), &self.pending, b"\r\n"].concat();
        self.pending.clear();
        self.wire.write(&chunk)
    }
}

impl<S: Read + Write> Write for Chunks<'_, S> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let count = bytes.len().min(config::DOCKER_CHUNK_BYTES - self.pending.len());
        self.pending.extend(&bytes[..count]);
        if self.pending.len() == config::DOCKER_CHUNK_BYTES {
            self.send().map_err(std::io::Error::other)?;
        }
        Ok(count)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.send().map_err(std::io::Error::other)
    }
}

fn head_of(status: u16, keep_alive: bool) -> String {
    let reason = if status == 200 { "OK" } else { "Internal Server Error" };
    let connection = if keep_alive { "" } else { "Connection: close\r\n" };
    format!(
        "HTTP/1.1 {status} {reason}\r\n\
         Content-Type: application/vnd.docker.plugins.v1.2+json\r\n{connection}"
    )
}

fn gone(error: &std::io::Error, what: &str) -> Error {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Error::Deadline(what.to_owned()),
        _ => Error::unavailable(format!("{what} ({error})")),
    }
}

/// The head at the front of `bytes` and its length; None while it goes on.
fn parse(bytes: &[u8]) -> Result<Option<(Head, usize)>> {
    let malformed = |why: &str| Error::Malformed(format!("a request is not HTTP: {why}"));
    let mut headers = [httparse::EMPTY_HEADER; config::DOCKER_HEADER_COUNT_MAX];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes).map_err(|error| malformed(&error.to_string()))? {
        httparse::Status::Complete(length) => length,
        httparse::Status::Partial => return Ok(None),
    };
    let mut head = Head {
        method: request.method.unwrap_or_default().to_owned(),
        target: request.path.unwrap_or_default().to_owned(),
        framing: Framing::Length(0),
        keep_alive: request.version == Some(1),
        awaits_continue: false,
    };
    let mut lengths = Vec::new();
    for header in request.headers.iter() {
        let value = std::str::from_utf8(header.value).unwrap_or_default().trim();
        if header.name.eq_ignore_ascii_case("content-length") {
            let digits = value.bytes().all(|byte| byte.is_ascii_digit());
            let length = value.parse().ok().filter(|_| digits);
            lengths.push(length.ok_or_else(|| malformed("its length is no number"))?);
        } else if header.name.eq_ignore_ascii_case("transfer-encoding") {
            if !value.eq_ignore_ascii_case("chunked") {
                return Err(malformed("its transfer encoding is not known"));
            }
            head.framing = Framing::Chunked;
        } else if header.name.eq_ignore_ascii_case("connection") {
            if value.eq_ignore_ascii_case("close") {
                head.keep_alive = false;
            }
        } else if header.name.eq_ignore_ascii_case("expect") {
            head.awaits_continue = value.eq_ignore_ascii_case("100-continue");
        }
    }
    // Two ways to see where a request ends are one too many.
    match (lengths.as_slice(), head.framing) {
        ([], _) => {}
        (&[length], Framing::Length(_)) => head.framing = Framing::Length(length),
        _ => return Err(malformed("its length is given twice")),
    }
    Ok(Some((head, length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;

    /// Hands out the input in pieces of a given size and keeps the output.
    struct Pipe {
        input: VecDeque<u8>,
        piece: usize,
        output: Vec<u8>,
    }

    impl Read for Pipe {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            let count = into.len().min(self.piece).min(self.input.len());
            for slot in &mut into[..count] {
                *slot = self.input.pop_front().expect("counted");
            }
            Ok(count)
        }
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.output.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn wire(input: &[u8], piece: usize) -> Wire<Pipe> {
        Wire::new(Pipe { input: input.iter().copied().collect(), piece, output: Vec::new() })
    }

    #[test]
    fn requests_follow_each_other_however_they_are_cut() {
        let input = b"POST /A.b HTTP/1.1\r\nHost: \r\nContent-Length: 3\r\n\r\nabc\
            POST /c?d=e HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n\
            2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nTrailer: t\r\n\r\n\
            POST /last HTTP/1.1\r\nConnection: close\r\n\r\n";
        for piece in [1, 2, 7, 4096] {
            let mut wire = wire(input, piece);
            let mut bodies = Vec::new();
            let mut heads = Vec::new();
            while let Some(head) = wire.head().expect("a head") {
                let mut body = String::new();
                wire.body(&head).expect("a body").read_to_string(&mut body).expect("whole");
                bodies.push(body);
                heads.push(head);
            }
            assert_eq!(bodies, ["abc", "hello", ""], "{piece}");
            let targets: Vec<&str> = heads.iter().map(|head| head.target.as_str()).collect();
            assert_eq!(targets, ["/A.b", "/c?d=e", "/last"]);
            assert_eq!(heads.iter().map(|h| h.keep_alive).collect::<Vec<_>>(), [true, true, false]);
        }
    }

    #[test]
    fn a_body_nobody_wanted_is_read_away() {
        let input =
            b"POST /a HTTP/1.1\r\nContent-Length: 9\r\n\r\n123456789POST /b HTTP/1.1\r\n\r\n";
        let mut wire = wire(input, 4);
        let head = wire.head().expect("a head").expect("there");
        assert!(wire.body(&head).expect("a body").drain());
        assert_eq!(wire.head().expect("a head").expect("there").target, "/b");
        let endless = Head { framing: Framing::Length(u64::MAX), ..head };
        let mut wire = super::Wire::new(Pipe {
            input: vec![b'x'; config::DOCKER_DRAIN_MAX_BYTES as usize + 100_000].into(),
            piece: 1 << 20,
            output: Vec::new(),
        });
        assert!(!wire.body(&endless).expect("a body").drain());
    }

    #[test]
    fn hostile_requests_are_refused() {
        let long = format!("POST /{} HTTP/1.1\r\n", "a".repeat(config::DOCKER_HEAD_MAX_BYTES));
        for text in [
            "\0\0\0\0",
            "POST /a HTTP/1.1\r\nContent-Length: +3\r\n\r\nabc",
            "POST /a HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\na",
            "POST /a HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "POST /a HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
            "POST /a HTTP/1.1\r\nHos",
            long.as_str(),
        ] {
            assert!(wire(text.as_bytes(), 64).head().is_err(), "{text:.60}");
        }
        for body in
            ["", "x\r\n", "-1\r\n", "+1\r\na\r\n0\r\n\r\n", "1\r\nab\r\n0\r\n\r\n", "5\r\nab"]
        {
            let text = format!("POST /a HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n{body}");
            let mut wire = wire(text.as_bytes(), 64);
            let head = wire.head().expect("a head").expect("there");
            let read = wire.body(&head).expect("a body").read_to_end(&mut Vec::new());
            assert!(read.is_err(), "{body:?}");
        }
    }

    #[test]
    fn answers_are_framed() {
        let mut wire = wire(b"", 1);
        wire.answer(200, "{}", true).expect("sent");
        let mut chunks = wire.stream_answer(false).expect("begun");
        chunks.write_all(&vec![b'x'; config::DOCKER_CHUNK_BYTES + 2]).expect("sent");
        chunks.finish().expect("sent");
        let text = String::from_utf8(wire.stream.output).expect("text");
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.contains("Content-Length: 2\r\n"));
        assert!(text.contains("Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"));
        assert!(text.ends_with("\r\n2\r\nxx\r\n0\r\n\r\n"));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(0u8.., 0..300)) {
            let mut wire = wire(&bytes, 64);
            while let Ok(Some(head)) = wire.head() {
                let _ = wire.body(&head).map(|mut body| body.read_to_end(&mut Vec::new()));
            }
        }
    }
}
