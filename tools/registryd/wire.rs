//! One connection: bytes in, requests out; and the ways to end it that a test may ask for.
//!
//! Owns the socket and what was read ahead of the request in hand. A request's body must be read
//! (`read_body`) before the next request is. Never decides what to answer.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;

const HEAD_BYTES_MAX: usize = 64 * 1024;
const HEADERS_MAX: usize = 64;
const BODY_BYTES_MAX: u64 = 8 << 30;

pub struct Connection {
    stream: BufReader<Stream>,
    /// The same socket, to end it with.
    socket: TcpStream,
}

pub struct Request {
    pub method: String,
    /// Still percent-encoded, without the query.
    pub path: String,
    /// Decoded.
    pub query: Vec<(String, String)>,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
}

enum Stream {
    Plain(TcpStream),
    Tls(Box<rustls::StreamOwned<rustls::ServerConnection, TcpStream>>),
}

impl Connection {
    pub fn new(socket: TcpStream, tls: Option<&Arc<rustls::ServerConfig>>) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let own = socket.try_clone()?;
        let stream = match tls {
            None => Stream::Plain(own),
            Some(config) => {
                let session = rustls::ServerConnection::new(config.clone());
                let session = session.map_err(io::Error::other)?;
                Stream::Tls(Box::new(rustls::StreamOwned::new(session, own)))
            }
        };
        Ok(Connection { stream: BufReader::with_capacity(HEAD_BYTES_MAX, stream), socket })
    }

    /// The next request; `None` when the peer has closed.
    pub fn read_request(&mut self) -> io::Result<Option<Request>> {
        // A client that speaks TLS to this port waits for our half of the handshake: without an
        // answer it would wait out its own patience before it tries plain HTTP.
        if self.stream.fill_buf()?.first().is_some_and(|first| !first.is_ascii_uppercase()) {
            self.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")?;
            return Err(invalid("a request that is not HTTP"));
        }
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let before = head.len();
            let mut line = (&mut self.stream).take((HEAD_BYTES_MAX - before) as u64);
            if line.read_until(b'\n', &mut head)? == 0 {
                let bad = before > 0;
                return if bad { Err(invalid("a head that is cut or too long")) } else { Ok(None) };
            }
        }
        parse_head(&head).map(Some)
    }

    /// Copies the body of `request` into `sink`; says how long it was.
    pub fn read_body(&mut self, request: &Request, sink: &mut dyn Write) -> io::Result<u64> {
        let chunked = request.header("transfer-encoding").is_some_and(|value| value == "chunked");
        let length = request.header("content-length").map_or(Ok(0), str::parse);
        let length: u64 = length.map_err(|_| invalid("a Content-Length that is no number"))?;
        if request.header("expect").is_some() {
            self.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        if !chunked {
            return self.copy(length, sink);
        }
        let mut total = 0;
        loop {
            let mut line = String::new();
            (&mut self.stream).take(64).read_line(&mut line)?;
            let size = u64::from_str_radix(line.trim().split(';').next().unwrap_or(""), 16);
            let size = size.map_err(|_| invalid("a chunk without a size"))?;
            total += self.copy(size, sink)?;
            (&mut self.stream).take(2).read_line(&mut line)?;
            if size == 0 {
                return Ok(total);
            }
        }
    }

    fn copy(&mut self, length: u64, sink: &mut dyn Write) -> io::Result<u64> {
        if length > BODY_BYTES_MAX {
            return Err(invalid("a body beyond the limit"));
        }
        let copied = io::copy(&mut (&mut self.stream).take(length), sink)?;
        if copied == length { Ok(copied) } else { Err(invalid("a body that is cut")) }
    }

    /// Copies up to `length` bytes of a body into `sink`, and no more: the connection is of no use
    /// afterwards.
    pub fn read_part(&mut self, length: u64, sink: &mut dyn Write) -> io::Result<()> {
        io::copy(&mut (&mut self.stream).take(length), sink).map(drop)
    }

    pub fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)?;
        self.stream.get_mut().flush()
    }

    /// Reads until the peer gives up; what it sends is thrown away.
    pub fn wait_for_close(&mut self) {
        let _ = io::copy(&mut self.stream, &mut io::sink());
    }

    /// Ends the connection in order. Both halves, whoever else holds the socket.
    pub fn close(self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }

    /// Ends the connection with RST: closing a socket that does not linger sends one.
    pub fn reset(self) -> io::Result<()> {
        let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
        nix::sys::socket::setsockopt(&self.socket, nix::sys::socket::sockopt::Linger, &linger)?;
        Ok(())
    }
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(header, _)| header == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn parameter(&self, name: &str) -> Option<&str> {
        let found = self.query.iter().find(|(parameter, _)| parameter == name);
        found.map(|(_, value)| value.as_str())
    }

    /// Whether the client lets the connection live on.
    pub fn keeps_alive(&self) -> bool {
        !self.header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(stream) => stream.read(buffer),
            Stream::Tls(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(stream) => stream.write(bytes),
            Stream::Tls(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(stream) => stream.flush(),
            Stream::Tls(stream) => stream.flush(),
        }
    }
}

fn parse_head(head: &[u8]) -> io::Result<Request> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    parsed.parse(head).map_err(io::Error::other)?;
    let target = parsed.path.unwrap_or("/");
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let text = |value: &[u8]| String::from_utf8_lossy(value).trim().to_owned();
    let headers = parsed.headers.iter();
    Ok(Request {
        method: parsed.method.unwrap_or("").to_owned(),
        path: path.to_owned(),
        query: form(query),
        headers: headers.map(|h| (h.name.to_ascii_lowercase(), text(h.value))).collect(),
    })
}

/// The pairs of a query or of a form, decoded.
pub fn form(text: &str) -> Vec<(String, String)> {
    let pairs = text.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
        .map(|(name, value)| (decode(name), decode(value)))
        .collect()
}

fn decode(text: &str) -> String {
    let text = text.replace('+', " ");
    let mut parts = text.split('%');
    let mut bytes = parts.next().unwrap_or("").as_bytes().to_vec();
    for part in parts {
        let code = part.get(..2).and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match code {
            Some(code) => {
                bytes.push(code);
                bytes.extend_from_slice(&part.as_bytes()[2..]);
            }
            None => {
                bytes.push(b'%');
                bytes.extend_from_slice(part.as_bytes());
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

pub fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
