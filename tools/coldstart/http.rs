//! The little HTTP that measuring needs: one request, one answer with a length, on an open stream.
//!
//! Used for a daemon's control API, for the origin's counters, and by the floor for ranges, where
//! its cost counts: a body is read into memory the caller brings, the head into a small buffer.

use std::io::{self, Error, Read, Write};

/// Heads longer than this are refused.
const HEAD_MAX_BYTES: usize = 16 << 10;
const HEADERS_MAX: usize = 32;

/// A stream that speaks HTTP/1.1 with keep-alive.
pub struct Client<S> {
    stream: S,
    host: String,
    head: Vec<u8>,
}

impl<S: Read + Write> Client<S> {
    /// Takes over a connected stream.
    pub fn new(stream: S, host: &str) -> Self {
        Client { stream, host: host.to_owned(), head: vec![0; HEAD_MAX_BYTES] }
    }

    /// One request with a small answer: status and body.
    pub fn call(&mut self, method: &str, path: &str, body: &str) -> io::Result<(u16, Vec<u8>)> {
        let length = match body.len() {
            0 => String::new(),
            length => format!("Content-Type: application/json\r\nContent-Length: {length}\r\n"),
        };
        let host = &self.host;
        let request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\n{length}\r\n{body}");
        self.stream.write_all(request.as_bytes())?;
        let (status, length, start, filled) = self.read_head()?;
        let mut bytes = self.head[start..filled].to_vec();
        let landed = bytes.len();
        bytes.resize(length.max(landed), 0);
        self.stream.read_exact(&mut bytes[landed..])?;
        Ok((status, bytes))
    }

    /// One range, into `space`, which it must fill exactly.
    pub fn range(&mut self, path: &str, start: u64, space: &mut [u8]) -> io::Result<()> {
        let last = start + space.len() as u64 - 1;
        let host = &self.host;
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nRange: bytes={start}-{last}\r\n\r\n");
        self.stream.write_all(request.as_bytes())?;
        let (status, length, body_start, filled) = self.read_head()?;
        if status != 206 || length != space.len() {
            return Err(Error::other(format!("status {status}, {length} bytes for a range")));
        }
        let landed = filled - body_start;
        space[..landed].copy_from_slice(&self.head[body_start..filled]);
        self.stream.read_exact(&mut space[landed..])
    }

    /// Status, length of the body, and which bytes of the body came with the head.
    fn read_head(&mut self) -> io::Result<(u16, usize, usize, usize)> {
        let mut filled = 0;
        loop {
            let got = self.stream.read(&mut self.head[filled..])?;
            if got == 0 {
                return Err(Error::other("the connection ended before a whole head"));
            }
            filled += got;
            let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
            let mut response = httparse::Response::new(&mut headers);
            let parsed = response.parse(&self.head[..filled]).map_err(Error::other)?;
            let httparse::Status::Complete(start) = parsed else { continue };
            let status = response.code.unwrap_or(0);
            let header = response.headers.iter();
            let mut named = header.filter(|h| h.name.eq_ignore_ascii_case("content-length"));
            let value = named.next().and_then(|header| std::str::from_utf8(header.value).ok());
            let length = match value {
                Some(value) => value.trim().parse().map_err(Error::other)?,
                None => 0,
            };
            return Ok((status, length, start, filled));
        }
    }
}
