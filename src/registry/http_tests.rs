//! What of HTTP heads must be accepted and what must be refused.

use crate::config as limits;
use crate::registry::http::{
    Framing, Method, RequestHead, ResponseHead, check_range, parse_response,
};

fn head(text: &str) -> ResponseHead {
    parse_response(text.as_bytes(), Method::Get).unwrap().expect("a complete head")
}

fn partial(first: u64, last: u64, length: u64) -> ResponseHead {
    head(&format!(
        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{last}/1000\r\n\
         Content-Length: {length}\r\n\r\n"
    ))
}

#[test]
fn a_request_is_written_as_the_specification_shows() {
    let mut buffer = [0_u8; 256];
    let mut head =
        RequestHead::new(&mut buffer, Method::Get, &["/v2/", "r/blobs/x"], "h.example:5000");
    head.header("Authorization", &["Bearer ", "abc"]);
    head.range(&(10..20));
    let size = head.finish().unwrap();
    assert_eq!(
        std::str::from_utf8(&buffer[..size]).unwrap(),
        "GET /v2/r/blobs/x HTTP/1.1\r\nHost: h.example:5000\r\nAuthorization: Bearer abc\r\n\
         Range: bytes=10-19\r\n\r\n"
    );
}

#[test]
fn a_request_that_could_be_split_or_does_not_fit_is_refused() {
    let mut buffer = [0_u8; 64];
    let head = RequestHead::new(&mut buffer, Method::Get, &["/a b"], "h");
    assert!(head.finish().is_err());
    let mut head = RequestHead::new(&mut buffer, Method::Get, &["/"], "h");
    head.header("X", &["a\r\nY: b"]);
    assert!(head.finish().is_err());
    let mut head = RequestHead::new(&mut buffer, Method::Get, &["/"], "h");
    head.header("X", &[&"a".repeat(64)]);
    head.header("Y", &["b"]);
    assert!(head.finish().is_err());
}

#[test]
fn a_head_is_parsed_only_when_complete() {
    let text = "HTTP/1.1 206 OK\r\ncontent-range: bytes 5-9/20\r\nContent-Length: 5\r\n\
                Docker-Content-Digest:  sha256:ab \r\n\r\nhello";
    let size = text.len() - 5;
    for end in 0..size {
        assert_eq!(parse_response(&text.as_bytes()[..end], Method::Get).unwrap(), None, "{end}");
    }
    let parsed = head(text);
    assert_eq!((parsed.status, parsed.size, parsed.framing), (206, size, Framing::Length(5)));
    assert!(parsed.keep_alive);
    assert_eq!(parsed.content_digest.text(text.as_bytes()), Some("sha256:ab"));
    assert_eq!(parsed.location.text(text.as_bytes()), None);
    assert_eq!(check_range(&parsed, &(5..10)).unwrap(), Some(20));
}

#[test]
fn framing_follows_method_status_and_headers() {
    for (text, method, framing, keep_alive) in [
        ("HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked", Method::Get, Framing::Chunked, true),
        ("HTTP/1.1 200 OK\r\nContent-Length: 9", Method::Head, Framing::None, true),
        ("HTTP/1.1 204 No", Method::Get, Framing::None, true),
        ("HTTP/1.1 200 OK", Method::Get, Framing::UntilClose, false),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nConnection: x, Close",
            Method::Get,
            Framing::Length(1),
            false,
        ),
        ("HTTP/1.0 200 OK\r\nContent-Length: 1", Method::Get, Framing::Length(1), false),
        (
            "HTTP/1.0 200 OK\r\nContent-Length: 1\r\nConnection: keep-alive",
            Method::Get,
            Framing::Length(1),
            true,
        ),
        (
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 2",
            Method::Get,
            Framing::Length(2),
            true,
        ),
        ("HTTP/1.1 200 Established", Method::Connect, Framing::None, true),
        ("HTTP/1.1 100 Continue", Method::Put, Framing::None, true),
    ] {
        let text = format!("{text}\r\n\r\n");
        let parsed = parse_response(text.as_bytes(), method).unwrap().unwrap();
        assert_eq!((parsed.framing, parsed.keep_alive), (framing, keep_alive), "{text}");
    }
}

#[test]
fn heads_that_two_readers_read_differently_are_refused() {
    for text in [
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2",
        "HTTP/1.1 200 OK\r\nContent-Length: 1, 1",
        "HTTP/1.1 200 OK\r\nContent-Length: +1",
        "HTTP/1.1 200 OK\r\nContent-Length: 0x1",
        "HTTP/1.1 200 OK\r\nContent-Length: ",
        "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked",
        "HTTP/1.1 200 OK\r\nX: a\r\n folded",
        "HTTP/1.1 200 OK\r\nX : a",
        "HTTP/1.1 99 Low",
        "HTTP/1.1 999 High",
        "HTTP/2.0 200 OK",
        "ICY 200 OK",
        "HTTP/1.1 206 P\r\nContent-Range: bytes 0-1/2\r\nContent-Range: bytes 0-1/2",
    ] {
        let wire = format!("{text}\r\n\r\n");
        assert!(parse_response(wire.as_bytes(), Method::Get).is_err(), "{text}");
    }
}

#[test]
fn a_head_without_end_is_refused_at_the_limit() {
    let mut endless = b"HTTP/1.1 200 OK\r\nX: ".to_vec();
    endless.resize(limits::HTTP_RESPONSE_HEAD_SIZE_MAX + 1, b'a');
    assert!(parse_response(&endless, Method::Get).is_err());
    let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "A: b\r\n".repeat(65));
    assert!(parse_response(many.as_bytes(), Method::Get).is_err());
}

#[test]
fn only_the_range_that_was_asked_for_is_accepted() {
    let asked = 10..20;
    assert_eq!(check_range(&partial(10, 19, 10), &asked).unwrap(), Some(1000));
    for (wrong, names) in [
        (partial(10, 18, 9), "bytes 10-18"),
        (partial(0, 9, 10), "bytes 0-9"),
        (partial(10, 19, 11), "11 bytes of body"),
        (head("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n"), "status 200"),
        (head("HTTP/1.1 416 No\r\nContent-Length: 0\r\n\r\n"), "416"),
        (head("HTTP/1.1 206 P\r\nContent-Length: 10\r\n\r\n"), "without a usable"),
        (
            head("HTTP/1.1 206 P\r\nContent-Range: bytes 19-10/50\r\nContent-Length: 10\r\n\r\n"),
            "without a usable",
        ),
        (
            head("HTTP/1.1 206 P\r\nContent-Range: bytes 10-19/15\r\nContent-Length: 10\r\n\r\n"),
            "without a usable",
        ),
        (head("HTTP/1.1 206 P\r\nContent-Type: Multipart/byteranges; b=1\r\n\r\n"), "multipart"),
        (
            head(
                "HTTP/1.1 206 P\r\nContent-Range: bytes 10-19/50\r\nContent-Encoding: gzip\r\n\r\n",
            ),
            "compressed",
        ),
    ] {
        let error = check_range(&wrong, &asked).unwrap_err();
        assert!(error.to_string().contains(names), "{error} does not name {names}");
        assert!(error.is_transient(), "another source may do better");
    }
}

proptest::proptest! {
    #[test]
    fn no_bytes_break_the_parser(
        mut bytes in proptest::collection::vec(0_u8.., 0..300),
        with_start: bool,
    ) {
        if with_start {
            let mut whole = b"HTTP/1.1 206 P\r\n".to_vec();
            whole.append(&mut bytes);
            bytes = whole;
        }
        for method in [Method::Get, Method::Head, Method::Connect] {
            if let Ok(Some(parsed)) = parse_response(&bytes, method) {
                proptest::prop_assert!(parsed.size <= bytes.len());
                let _ = check_range(&parsed, &(0..10));
                for span in [parsed.location, parsed.content_type, parsed.challenges[0]] {
                    let _ = span.text(&bytes);
                }
            }
        }
    }

    #[test]
    fn any_range_is_written_in_full(start: u32, size in 1..u64::from(u32::MAX)) {
        let range = u64::from(start)..u64::from(start) + size;
        let mut buffer = [0_u8; 256];
        let mut head = RequestHead::new(&mut buffer, Method::Get, &["/"], "h");
        head.range(&range);
        let size = head.finish().unwrap();
        let expected = format!("Range: bytes={}-{}\r\n", range.start, range.end - 1);
        proptest::prop_assert!(std::str::from_utf8(&buffer[..size]).unwrap().contains(&expected));
    }
}
