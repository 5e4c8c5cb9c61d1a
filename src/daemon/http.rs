//! The HTTP dialect of the control socket: bytes to a request, a response to bytes.
//!
//! Pure. HTTP/1.0 and 1.1, keep-alive, bodies with a length only. The shapes are nydusd's: an empty
//! reason in the status line, and errors found before routing carry another server name and close
//! the connection, because what follows on it cannot be told apart any more.

use super::api::{Method, Request};
use super::reply::Response;
use crate::config::{CONTROL_BODY_MAX_BYTES, CONTROL_HEAD_MAX_BYTES, CONTROL_HEADER_COUNT_MAX};

/// How far a buffer goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The request goes on.
    More {
        /// Parsing again is of no use before the buffer has so many bytes.
        needed_bytes: usize,
        /// The client waits for a word before it sends the body.
        awaits_continue: bool,
    },
    /// A whole request.
    Whole {
        /// The request.
        request: Request,
        /// Whether the connection may be used again.
        keep_alive: bool,
        /// What it took of the buffer.
        length_bytes: usize,
    },
}

/// What a client that waits for it is told before its body.
pub const CONTINUE: &[u8] = b"HTTP/1.1 100 \r\n\r\n";

/// Looks for a request at the start of `buffer`.
///
/// # Errors
/// A sentence for [`encode_refusal`]; the connection is of no use after it.
pub fn parse(buffer: &[u8]) -> Result<Progress, String> {
    let mut headers = [httparse::EMPTY_HEADER; CONTROL_HEADER_COUNT_MAX];
    let mut head = httparse::Request::new(&mut headers);
    let head_bytes = match head.parse(buffer) {
        Ok(httparse::Status::Complete(bytes)) if bytes <= CONTROL_HEAD_MAX_BYTES => bytes,
        Ok(httparse::Status::Partial) if buffer.len() < CONTROL_HEAD_MAX_BYTES => {
            return Ok(Progress::More { needed_bytes: buffer.len() + 1, awaits_continue: false });
        }
        Ok(_) => return Err(format!("The head is longer than {CONTROL_HEAD_MAX_BYTES} bytes.")),
        Err(error) => return Err(format!("Invalid request: {error}.")),
    };
    let method = head.method.unwrap_or_default();
    let method = method_named(method).ok_or_else(|| "Unsupported HTTP method.".to_owned())?;
    let mut traits = Traits::new(head.version == Some(1));
    for header in head.headers.iter() {
        traits.take(header.name, header.value)?;
    }
    let body_bytes = traits.length.unwrap_or(0);
    let length_bytes = head_bytes + body_bytes;
    if buffer.len() < length_bytes {
        let awaits_continue = traits.awaits_continue && buffer.len() == head_bytes;
        return Ok(Progress::More { needed_bytes: length_bytes, awaits_continue });
    }
    let body = (body_bytes > 0).then(|| buffer[head_bytes..length_bytes].to_vec());
    let target = head.path.unwrap_or("/").to_owned();
    let request = Request { method, target, body, peer: None };
    Ok(Progress::Whole { request, keep_alive: traits.keep_alive, length_bytes })
}

/// The bytes of a response. 204 has neither type nor length.
pub fn encode(response: &Response, keep_alive: bool) -> Vec<u8> {
    let connection = if keep_alive { "keep-alive" } else { "close" };
    let mut text = format!(
        "HTTP/1.1 {} \r\nServer: Nydus API\r\nConnection: {connection}\r\n",
        response.status
    );
    if let Some(body) = &response.body {
        text.push_str(&format!(
            "Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        ));
    } else {
        text.push_str("\r\n");
    }
    text.into_bytes()
}

/// The bytes that answer what is not a request.
pub fn encode_refusal(sentence: &str) -> Vec<u8> {
    let sentence = format!("{sentence}\nAll previous unanswered requests will be dropped.");
    let body = format!("{{ \"error\": {} }}", serde_json::Value::from(sentence));
    format!(
        "HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
    .into_bytes()
}

fn method_named(name: &str) -> Option<Method> {
    Some(match name {
        "GET" => Method::Get,
        "HEAD" => Method::Head,
        "POST" => Method::Post,
        "PUT" => Method::Put,
        "PATCH" => Method::Patch,
        "DELETE" => Method::Delete,
        _ => return None,
    })
}

/// What the headers say about the message itself.
struct Traits {
    length: Option<usize>,
    keep_alive: bool,
    awaits_continue: bool,
}

impl Traits {
    /// HTTP/1.1 connections stay open unless told otherwise, those of 1.0 close.
    fn new(is_http_1_1: bool) -> Self {
        Self { length: None, keep_alive: is_http_1_1, awaits_continue: false }
    }

    fn take(&mut self, name: &str, value: &[u8]) -> Result<(), String> {
        let is = |wanted: &str| name.eq_ignore_ascii_case(wanted);
        let value = value.trim_ascii();
        if is("content-length") {
            let length = content_length(value)?;
            if self.length.is_some_and(|earlier| earlier != length) {
                return Err("Content-Length is given twice, differently.".to_owned());
            }
            self.length = Some(length);
        } else if is("transfer-encoding") {
            if !value.eq_ignore_ascii_case(b"identity") {
                return Err("Transfer-Encoding is not supported: send a length.".to_owned());
            }
        } else if is("connection") {
            for word in value.split(|&byte| byte == b',').map(<[u8]>::trim_ascii) {
                if word.eq_ignore_ascii_case(b"close") {
                    self.keep_alive = false;
                } else if word.eq_ignore_ascii_case(b"keep-alive") {
                    self.keep_alive = true;
                }
            }
        } else if is("expect") {
            if !value.eq_ignore_ascii_case(b"100-continue") {
                return Err("Only 100-continue can be expected.".to_owned());
            }
            self.awaits_continue = true;
        }
        Ok(())
    }
}

fn content_length(value: &[u8]) -> Result<usize, String> {
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(value).ok().filter(|_| digits);
    let text = text.ok_or_else(|| "Content-Length is not a number.".to_owned())?;
    match text.parse::<usize>() {
        Ok(length) if length <= CONTROL_BODY_MAX_BYTES => Ok(length),
        _ => Err(format!("The body is larger than the limit of {CONTROL_BODY_MAX_BYTES} bytes.")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn whole(bytes: &[u8]) -> (Request, bool, usize) {
        match parse(bytes).unwrap() {
            Progress::Whole { request, keep_alive, length_bytes } => {
                (request, keep_alive, length_bytes)
            }
            more => panic!("{more:?}"),
        }
    }

    #[test]
    fn requests_are_cut_at_their_length() {
        let bytes = b"PUT /a?b=c HTTP/1.1\r\ncontent-length: 3\r\n\r\nabcGET /";
        let (request, keep_alive, length) = whole(bytes);
        assert_eq!(request.method, Method::Put);
        assert_eq!(request.target, "/a?b=c");
        assert_eq!(request.body.as_deref(), Some(&b"abc"[..]));
        assert!(keep_alive);
        assert_eq!(&bytes[length..], b"GET /");
    }

    #[test]
    fn an_empty_body_is_no_body() {
        assert_eq!(whole(b"PUT / HTTP/1.1\r\nContent-Length: 0\r\n\r\n").0.body, None);
    }

    #[test]
    fn connections_stay_open_as_the_version_and_the_client_say() {
        for (head, keep_alive) in [
            ("HTTP/1.1\r\n", true),
            ("HTTP/1.0\r\n", false),
            ("HTTP/1.0\r\nConnection: Keep-Alive\r\n", true),
            ("HTTP/1.1\r\nConnection: TE, close\r\n", false),
        ] {
            assert_eq!(whole(format!("GET / {head}\r\n").as_bytes()).1, keep_alive, "{head}");
        }
    }

    #[test]
    fn what_is_not_this_dialect_is_refused() {
        let long = format!("GET /{} HTTP/1.1\r\n", "a".repeat(CONTROL_HEAD_MAX_BYTES));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(1000));
        for (request, word) in [
            ("OPTIONS / HTTP/1.1\r\n\r\n", "method"),
            ("get / HTTP/1.1\r\n\r\n", "method"),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", "Transfer-Encoding"),
            ("PUT / HTTP/1.1\r\nContent-Length: 51201\r\n\r\n", "51200"),
            ("PUT / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", "51200"),
            ("PUT / HTTP/1.1\r\nContent-Length: +1\r\n\r\n", "not a number"),
            ("PUT / HTTP/1.1\r\nContent-Length: \r\n\r\n", "not a number"),
            ("PUT / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "twice"),
            ("PUT / HTTP/1.1\r\nExpect: cookies\r\n\r\n", "100-continue"),
            ("GET / HTTP/2.0\r\n\r\n", "Invalid"),
            ("\0\0\0\0", "Invalid"),
            (long.as_str(), "longer"),
            (many.as_str(), "Invalid"),
        ] {
            let refusal = parse(request.as_bytes()).unwrap_err();
            assert!(refusal.contains(word), "{request:.60}: {refusal}");
        }
        assert!(parse(b"PUT / HTTP/1.1\r\nContent-Length: 51200\r\n\r\n").is_ok());
    }

    #[test]
    fn a_client_that_awaits_continue_is_found_once() {
        let head = "PUT / HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n";
        let needed_bytes = head.len() + 2;
        let more = |awaits_continue| Ok(Progress::More { needed_bytes, awaits_continue });
        assert_eq!(parse(head.as_bytes()), more(true));
        assert_eq!(parse(format!("{head}a").as_bytes()), more(false));
    }

    #[test]
    fn responses_look_like_nydusd() {
        let done = Response { status: 204, body: None };
        assert_eq!(
            encode(&done, true),
            b"HTTP/1.1 204 \r\nServer: Nydus API\r\nConnection: keep-alive\r\n\r\n"
        );
        let body = Response { status: 200, body: Some("{}".into()) };
        assert_eq!(
            String::from_utf8(encode(&body, true)).unwrap(),
            "HTTP/1.1 200 \r\nServer: Nydus API\r\nConnection: keep-alive\r\n\
             Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
        );
        let refusal = String::from_utf8(encode_refusal("A \"word\".")).unwrap();
        assert!(refusal.contains("Server: Firecracker API"));
        let body = refusal.split_once("\r\n\r\n").unwrap().1;
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        let text = "A \"word\".\nAll previous unanswered requests will be dropped.";
        assert_eq!(body["error"], text);
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_or_refused(
            bytes in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            if let Ok(Progress::Whole { length_bytes, .. }) = parse(&bytes) {
                prop_assert!(length_bytes <= bytes.len());
            }
        }

        #[test]
        fn broken_requests_are_parsed_or_refused(
            at in 0usize..70, byte in any::<u8>(), cut in 0usize..70,
        ) {
            let mut bytes =
                b"PUT /api?a=b HTTP/1.1\r\nContent-Length: 5\r\nHost: x\r\n\r\nhello".to_vec();
            let index = at % bytes.len();
            bytes[index] = byte;
            bytes.truncate(cut);
            if let Ok(Progress::More { needed_bytes, .. }) = parse(&bytes) {
                prop_assert!(needed_bytes > bytes.len());
            }
        }

        /// However a request is cut into pieces, it is found whole at its last byte, not before.
        #[test]
        fn a_request_is_whole_exactly_at_its_end(body in "[a-z]{1,40}") {
            let text = format!("PUT /x HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
            for end in 0..text.len() {
                let progress = parse(&text.as_bytes()[..end]).unwrap();
                let is_more = match progress {
                    Progress::More { needed_bytes, .. } => needed_bytes > end,
                    Progress::Whole { .. } => false,
                };
                prop_assert!(is_more);
            }
            prop_assert_eq!(whole(text.as_bytes()).2, text.len());
        }
    }
}
