//! Uploads against a scripted server: what is sent where, and with whose credentials.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use crate::error::{Error, Result};
use crate::registry::client_tests::{plain, run, shared};
use crate::registry::repository::Repository;
use crate::registry::server_tests::{Play, Seen, Server, json as json_answer, status};
use crate::registry::upload::{BlobFile, Pushed};

const DIGEST: &str = "sha256:aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
/// user:password
const BASIC: &str = "dXNlcjpwYXNzd29yZA==";

/// Pushes a small blob to `server` and looks at how that ends.
fn push(server: &Server, extra: serde_json::Value, look: impl FnOnce(Result<Pushed>) + 'static) {
    run(shared(), plain(server, extra), |world| async move {
        let sources = ["other".to_owned()];
        let repository = Repository::open(&world.core, &world.client, &world.route, &sources);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let blob = BlobFile { digest: DIGEST, size: 10, file: &file, on_progress: &|_| {} };
        look(repository.unwrap().push_blob(&blob).await);
    });
}

fn method(seen: &Seen) -> &str {
    seen.line.split(' ').next().unwrap_or("")
}

/// An answer that says where an upload goes on.
fn at(code: u16, place: &str) -> Play {
    Play::Send(status(code, &format!("Location: {place}\r\n")))
}

#[test]
fn an_upload_goes_where_the_registry_says_and_keeps_its_query() {
    let server = Server::start(|seen| match method(seen) {
        "HEAD" => Play::Send(status(404, "")),
        "POST" => at(202, "../up/1?state=a"),
        "PATCH" => at(202, "/up/1?state=b"),
        _ => Play::Send(status(201, "")),
    });
    push(&server, json!({}), |pushed| assert_eq!(pushed, Ok(Pushed::Sent)));
    let lines: Vec<String> = server.seen().iter().map(|seen| seen.line.clone()).collect();
    assert_eq!(lines[2], "PATCH /v2/r/blobs/up/1?state=a");
    assert_eq!(lines[3], format!("PUT /up/1?state=b&digest={DIGEST}"));
    let patch = &server.seen()[2];
    assert_eq!(patch.header("Content-Length"), Some("10"));
    assert_eq!(patch.header("Content-Range"), None, "a whole blob goes as Docker sends it");
    assert_eq!(server.seen()[3].header("Content-Length"), Some("0"));
}

#[test]
fn another_origin_gets_the_bytes_but_not_the_password() {
    let storage = Arc::new(Server::start(|seen| match method(seen) {
        "PATCH" => at(202, "/s3/1?sig=b"),
        _ => Play::Send(status(201, "")),
    }));
    let host = storage.host();
    let server = Server::start(move |seen| match (method(seen), seen.header("Authorization")) {
        (_, None) => Play::Send(status(401, "WWW-Authenticate: Basic\r\n")),
        ("HEAD", _) => Play::Send(status(404, "")),
        _ => at(202, &format!("http://{host}/s3/1?sig=a")),
    });
    push(&server, json!({ "auth": BASIC }), |pushed| assert_eq!(pushed, Ok(Pushed::Sent)));
    assert_eq!(storage.seen().len(), 2);
    assert!(storage.seen().iter().all(|seen| seen.header("Authorization").is_none()));
    let told = |seen: &Seen| seen.header("Authorization") == Some(&format!("Basic {BASIC}"));
    assert!(server.seen().iter().skip(1).all(told));
}

#[test]
fn a_token_is_asked_for_everything_a_push_needs() {
    let tokens = Arc::new(Server::start(|_| Play::Send(json_answer(r#"{"token":"T"}"#))));
    let realm = tokens.host();
    let server = Server::start(move |seen| match (method(seen), seen.header("Authorization")) {
        (_, Some("Bearer T")) if method(seen) == "HEAD" => Play::Send(status(200, "")),
        _ => Play::Send(status(
            401,
            &format!(
                "WWW-Authenticate: Bearer realm=\"http://{realm}/t\",service=\"s\",\
                 scope=\"repository:r:pull\"\r\n"
            ),
        )),
    });
    push(&server, json!({}), |pushed| assert_eq!(pushed, Ok(Pushed::Existed)));
    let asked = tokens.seen()[0].line.clone();
    for scope in ["repository:r:pull", "repository:r:pull%2Cpush", "repository:other:pull"] {
        assert!(asked.contains(&format!("scope={scope}")), "{asked}");
    }
}

#[test]
fn a_hasty_registry_is_waited_for_and_a_stubborn_one_given_up() {
    let count = Arc::new(AtomicUsize::new(0));
    let asked = Arc::clone(&count);
    let server = Server::start(move |seen| match method(seen) {
        "HEAD" if asked.fetch_add(1, Ordering::SeqCst) == 0 => {
            Play::Send(status(429, "Retry-After: 1\r\n"))
        }
        "HEAD" => Play::Send(status(404, "")),
        _ => Play::Send(status(503, "")),
    });
    run(shared(), plain(&server, json!({})), |world| async move {
        let repository = Repository::open(&world.core, &world.client, &world.route, &[]).unwrap();
        assert_eq!(repository.has_blob(DIGEST).await, Ok(false));
        assert!(world.elapsed_ms() >= 1000, "Retry-After was honoured");
    });
    push(&server, json!({}), |pushed| {
        assert!(matches!(pushed, Err(Error::Unavailable { .. })), "{pushed:?}");
    });
    let posts = server.seen().iter().filter(|seen| method(seen) == "POST").count();
    assert_eq!(posts, crate::config::UPLOAD_TRIES_MAX as usize);
}

#[test]
fn nonsense_from_a_registry_is_an_error_and_never_a_loop() {
    for play in ["", "Location: http://user:pass@h/\r\n", "Location: :\r\n"] {
        let play = play.to_owned();
        let server = Server::start(move |seen| match method(seen) {
            "HEAD" => Play::Send(status(404, "")),
            _ => Play::Send(status(202, &play)),
        });
        push(&server, json!({}), |pushed| assert!(pushed.is_err()));
    }
    // It takes everything and never has more of it than before.
    let server = Server::start(|seen| match method(seen) {
        "HEAD" => Play::Send(status(404, "")),
        _ => Play::Send(status(202, "Location: /up\r\nRange: 0-0\r\n")),
    });
    push(&server, json!({}), |pushed| assert!(pushed.is_err()));
    let server = Server::start(|seen| match method(seen) {
        "HEAD" => at(301, "/v2/again"),
        _ => Play::Send(status(500, "")),
    });
    push(&server, json!({}), |pushed| {
        assert!(pushed.unwrap_err().to_string().contains("redirects for ever"));
    });
}
