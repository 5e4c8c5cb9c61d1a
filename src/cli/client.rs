//! A blocking client of the daemon's control API: one call, one connection, one answer.
//!
//! Callers name a path below the socket; they get JSON or an error that says what the daemon said.
//! Never waits longer than `API_CALL_TIMEOUT_MS` for one read or write and never holds more than
//! `API_REPLY_MAX_BYTES`. Works with nydusd too: the paths, the codes and the error body are its
//! own.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::config;
use crate::error::{Error, Result};

/// The control API behind one unix socket.
pub struct Api {
    socket: PathBuf,
}

/// What a daemon answered.
#[derive(Debug, PartialEq, Eq)]
struct Reply {
    status: u16,
    body: Vec<u8>,
}

impl Api {
    /// Remembers where the daemon listens; connects at each call.
    pub fn new(socket: PathBuf) -> Self {
        Api { socket }
    }

    /// Where the daemon listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// GET: the payload, or Null where the daemon has none.
    pub fn fetch(&self, path: &str) -> Result<Value> {
        self.call("GET", path, None)
    }

    /// PUT with a JSON body.
    pub fn put(&self, path: &str, body: &Value) -> Result<Value> {
        self.call("PUT", path, Some(body))
    }

    /// PUT without a body, for a path that does one thing.
    pub fn act(&self, path: &str) -> Result<Value> {
        self.call("PUT", path, None)
    }

    /// DELETE; everything it needs stands in the query.
    pub fn delete(&self, path: &str) -> Result<Value> {
        self.call("DELETE", path, None)
    }

    fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let what = format!("{method} {path} at {}", self.socket.display());
        let reply = self.exchange(method, path, body).map_err(|error| error.context(&what))?;
        let payload = match reply.body.is_empty() {
            true => Value::Null,
            false => serde_json::from_slice(&reply.body).unwrap_or_else(|_| {
                Value::String(String::from_utf8_lossy(&reply.body).trim().to_owned())
            }),
        };
        if (200..300).contains(&reply.status) {
            Ok(payload)
        } else {
            Err(refusal(&what, &reply, &payload))
        }
    }

    fn exchange(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Reply> {
        let mut stream = UnixStream::connect(&self.socket).map_err(|error| self.absent(&error))?;
        let timeout = Some(Duration::from_millis(config::API_CALL_TIMEOUT_MS));
        stream
            .set_read_timeout(timeout)
            .and_then(|()| stream.set_write_timeout(timeout))
            .map_err(|error| Error::io(&error, "cannot set a timeout"))?;
        let body = body.map(Value::to_string).unwrap_or_default();
        stream
            .write_all(request(method, path, &body).as_bytes())
            .map_err(|error| transfer(&error, "sending the request"))?;
        read_reply(&mut stream)
    }

    fn absent(&self, error: &std::io::Error) -> Error {
        let advice = match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                "no daemon listens there; start `sluice daemon` or name its socket with --apisock"
            }
            ErrorKind::PermissionDenied => "only the daemon's own user may call it; try as root",
            _ => "cannot connect",
        };
        Error::unavailable(format!("{advice} ({error})"))
    }
}

/// Percent-encodes a query's value.
pub fn query_value(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b':' => {
                encoded.push(byte as char);
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

fn request(method: &str, path: &str, body: &str) -> String {
    let mut text =
        format!("{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n");
    if !body.is_empty() {
        text.push_str("Content-Type: application/json\r\n");
        text.push_str(&format!("Content-Length: {}\r\n", body.len()));
    }
    text.push_str("Connection: close\r\n\r\n");
    text.push_str(body);
    text
}

fn read_reply(stream: &mut impl Read) -> Result<Reply> {
    let limit = config::API_REPLY_HEAD_MAX_BYTES + config::API_REPLY_MAX_BYTES;
    let mut bytes = Vec::new();
    let mut head = None;
    let mut piece = vec![0; 64 * config::KIB];
    loop {
        if head.is_none() {
            head = parse_head(&bytes)?;
        }
        if let Some(Head { status, start, length }) = head
            && let Some(length) = length
            && bytes.len() - start >= length
        {
            return Ok(Reply { status, body: bytes[start..start + length].to_vec() });
        }
        let count = match stream.read(&mut piece) {
            Ok(count) => count,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(transfer(&error, "waiting for the answer")),
        };
        if count == 0 {
            return closed(head, bytes);
        }
        bytes.extend_from_slice(&piece[..count]);
        if bytes.len() > limit {
            return Err(Error::Malformed(format!("the answer is longer than {limit} bytes")));
        }
    }
}

/// The other side hung up: an answer without a length ends there, every other one is cut short.
fn closed(head: Option<Head>, bytes: Vec<u8>) -> Result<Reply> {
    match head {
        Some(Head { status, start, length: None }) => {
            Ok(Reply { status, body: bytes[start..].to_vec() })
        }
        _ => Err(Error::unavailable("the daemon hung up in the middle of its answer")),
    }
}

#[derive(Clone, Copy)]
struct Head {
    status: u16,
    start: usize,
    length: Option<usize>,
}

fn parse_head(bytes: &[u8]) -> Result<Option<Head>> {
    let mut headers = [httparse::EMPTY_HEADER; config::API_REPLY_HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    let malformed = |why: &dyn std::fmt::Display| {
        Error::Malformed(format!("what listens there does not speak HTTP: {why}"))
    };
    let start = match response.parse(bytes).map_err(|error| malformed(&error))? {
        httparse::Status::Complete(start) => start,
        httparse::Status::Partial if bytes.len() > config::API_REPLY_HEAD_MAX_BYTES => {
            return Err(malformed(&"its head does not end"));
        }
        httparse::Status::Partial => return Ok(None),
    };
    let status = response.code.unwrap_or(0);
    let mut length = if matches!(status, 204 | 304) { Some(0) } else { None };
    for header in response.headers.iter() {
        if header.name.eq_ignore_ascii_case("content-length") {
            let value: Option<usize> =
                std::str::from_utf8(header.value).ok().and_then(|v| v.trim().parse().ok());
            length = Some(value.ok_or_else(|| malformed(&"its Content-Length is no number"))?);
        }
    }
    if length.is_some_and(|length| length > config::API_REPLY_MAX_BYTES) {
        return Err(malformed(&"its answer is too long"));
    }
    Ok(Some(Head { status, start, length }))
}

fn transfer(error: &std::io::Error, doing: &str) -> Error {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Error::Deadline(format!(
            "{doing} took longer than {} ms; is the daemon stopped?",
            config::API_CALL_TIMEOUT_MS
        )),
        _ => Error::unavailable(format!("{doing} failed ({error})")),
    }
}

/// The daemon's own words, with the kind its status stands for.
fn refusal(what: &str, reply: &Reply, payload: &Value) -> Error {
    let said = payload
        .get("message")
        .or_else(|| payload.get("error"))
        .and_then(Value::as_str)
        .or_else(|| payload.as_str())
        .unwrap_or("(no explanation)");
    let text = format!("{what}: the daemon answered {}: {said}", reply.status);
    match reply.status {
        404 => Error::NotFound(text),
        409 => Error::Exists(text),
        501 => Error::Unsupported(text),
        503 => Error::unavailable(text),
        _ if said.contains("already exists") => Error::Exists(text),
        _ => Error::Malformed(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    /// Answers one connection with `answer` and gives back what it was asked.
    fn serve(answer: &'static [u8]) -> (tempfile::TempDir, Api, JoinHandle<String>) {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("api.sock");
        let listener = UnixListener::bind(&path).expect("a socket");
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a caller");
            let mut asked = Vec::new();
            let mut piece = [0; 4096];
            loop {
                let count = stream.read(&mut piece).expect("a request");
                asked.extend_from_slice(&piece[..count]);
                let text = String::from_utf8_lossy(&asked);
                let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
                let length = head
                    .lines()
                    .find_map(|line| line.strip_prefix("Content-Length: "))
                    .map_or(0, |value| value.parse().expect("a length"));
                if body.len() >= length {
                    break;
                }
            }
            stream.write_all(answer).expect("the caller listens");
            String::from_utf8(asked).expect("text")
        });
        (dir, Api::new(path), thread)
    }

    #[test]
    fn a_payload_is_read_to_its_length_and_no_further() {
        let (_dir, api, thread) =
            serve(b"HTTP/1.1 200 \r\nContent-Length: 13\r\n\r\n{\"state\": 17}trailing");
        assert_eq!(api.fetch("/api/v1/daemon").expect("an answer")["state"], 17);
        let asked = thread.join().expect("the server");
        assert!(asked.starts_with("GET /api/v1/daemon HTTP/1.1\r\nHost: localhost\r\n"));
    }

    #[test]
    fn a_put_sends_its_body_and_204_is_success_without_payload() {
        let (_dir, api, thread) = serve(b"HTTP/1.1 204 \r\nServer: Nydus API\r\n\r\n");
        let body = serde_json::json!({"id": "demo"});
        assert_eq!(api.put("/api/v2/blobs", &body).expect("success"), Value::Null);
        assert!(thread.join().expect("the server").ends_with("\r\n\r\n{\"id\":\"demo\"}"));
    }

    #[test]
    fn a_refusal_carries_the_daemons_words() {
        let (_dir, api, _thread) = serve(
            b"HTTP/1.1 500 \r\nContent-Length: 54\r\n\r\n\
              {\"code\":\"UNDEFINED\",\"message\":\"blob already exists: a\"}",
        );
        let error = api.delete("/api/v2/blobs?domain_id=d").expect_err("refused");
        assert!(matches!(error, Error::Exists(_)), "{error:?}");
        assert!(error.to_string().contains("blob already exists: a"), "{error}");
        assert!(error.to_string().contains("500"), "{error}");
    }

    #[test]
    fn an_absent_daemon_is_named_with_what_to_do() {
        let api = Api::new(PathBuf::from("/nonexistent/api.sock"));
        let error = api.fetch("/x").expect_err("nobody there").to_string();
        assert!(error.contains("/nonexistent/api.sock"), "{error}");
        assert!(error.contains("sluice daemon"), "{error}");
    }

    #[test]
    fn an_answer_cut_short_is_an_error() {
        let (_dir, api, _thread) = serve(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{}");
        assert!(matches!(api.fetch("/x"), Err(Error::Unavailable { .. })));
        let (_dir, api, _thread) = serve(b"HTTP/1.1 20");
        assert!(matches!(api.fetch("/x"), Err(Error::Unavailable { .. })));
    }

    #[test]
    fn an_answer_without_a_length_ends_with_the_connection() {
        let (_dir, api, _thread) = serve(b"HTTP/1.0 200 OK\r\n\r\n[1,2]");
        assert_eq!(api.fetch("/x").expect("an answer"), serde_json::json!([1, 2]));
    }

    #[test]
    fn what_is_not_http_or_too_long_is_refused() {
        for answer in [
            b"SSH-2.0-OpenSSH\r\n".as_slice(),
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        ] {
            let (_dir, api, _thread) = serve(answer);
            assert!(matches!(api.fetch("/x"), Err(Error::Malformed(_))));
        }
    }

    #[test]
    fn query_values_are_encoded() {
        assert_eq!(query_value("a b/c&d=e%"), "a%20b%2Fc%26d%3De%25");
        assert_eq!(query_value("sha256:0f_~.-"), "sha256:0f_~.-");
    }
}
