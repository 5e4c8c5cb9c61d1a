//! tools/registryd does what it is told: serves, refuses, and breaks exactly as ordered.
//!
//! Each test starts a registry of its own on a port of the kernel's choice. The blob of these tests
//! has a name that is not its digest, as a registry under test must not care.

mod support;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::fs;
use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant};
use support::http::{Answer, Client};
use support::registry::{IMAGES, Registry};

const SIZE: u64 = 100_000;

fn digest() -> String {
    format!("sha256:{}", "a5".repeat(32))
}

fn path() -> String {
    format!("/v2/some/app/blobs/{}", digest())
}

/// The blob's bytes: no two neighbouring ranges look alike.
fn content() -> Vec<u8> {
    (0..SIZE).map(|at| (at % 251) as u8).collect()
}

fn registry(options: &[&str]) -> Registry {
    let registry = Registry::start(options);
    let file = digest().replace("sha256:", "blobs/sha256/");
    fs::write(registry.root().join(file), content()).expect("the tree can be written");
    registry
}

/// What a range GET of the bytes 1000 to 1999 meets under the one `effect`.
fn under(effect: Value) -> (Registry, Client<TcpStream>, std::io::Result<Answer>) {
    let registry = registry(&[]);
    registry.fault(json!([{ "blob": "a5", "effect": effect }]));
    let mut client = Client::connect(registry.address());
    let answer = client.range(&path(), 1000, 1999);
    (registry, client, answer)
}

/// After the fault is gone, a new connection gets the right bytes.
fn assert_heals(registry: &Registry) {
    registry.heal();
    let answer = Client::connect(registry.address()).range(&path(), 1000, 1999).unwrap();
    assert_eq!((answer.status, answer.body.as_slice()), (206, &content()[1000..2000]));
}

#[test]
fn ranges_are_exact_over_one_connection() {
    let registry = registry(&[]);
    let mut client = Client::connect(registry.address());
    for (first, last) in [(0, 0), (1000, 1999), (SIZE - 1, SIZE - 1), (0, SIZE - 1)] {
        let answer = client.range(&path(), first, last).unwrap();
        assert_eq!(answer.status, 206);
        assert_eq!(answer.body, content()[first as usize..=last as usize]);
        let range = format!("bytes {first}-{last}/{SIZE}");
        assert_eq!(answer.header("content-range"), Some(range.as_str()));
    }
    let beyond = client.range(&path(), SIZE - 10, SIZE + 10).unwrap();
    assert_eq!((beyond.status, beyond.body.len()), (206, 10));
    let suffix = client.request("GET", &path(), &[("Range", "bytes=-7")], &[]).unwrap();
    assert_eq!(suffix.body, content()[SIZE as usize - 7..]);
    let outside = client.range(&path(), SIZE, SIZE + 10).unwrap();
    assert_eq!((outside.status, outside.header("content-range")), (416, Some("bytes */100000")));
    let whole = client.get(&path()).unwrap();
    assert_eq!((whole.status, whole.body), (200, content()));
    let head = client.request("HEAD", &path(), &[], &[]).unwrap();
    assert_eq!((head.status, head.header("content-length")), (200, Some("100000")));
    let connections: Vec<Value> = registry.log().iter().map(|e| e["connection"].clone()).collect();
    assert!(connections.windows(2).all(|pair| pair[0] == pair[1]), "{connections:?}");
}

#[test]
fn images_are_served_by_tag_and_digest() {
    let registry = Registry::with_images(&[]);
    let mut client = Client::connect(registry.address());
    for image in IMAGES {
        let tagged = client.get(&format!("/v2/{image}/manifests/small")).unwrap();
        let digest = tagged.header("docker-content-digest").unwrap().to_owned();
        let by_digest = client.get(&format!("/v2/{image}/manifests/{digest}")).unwrap();
        assert_eq!(by_digest.body, tagged.body);
        for layer in tagged.json()["layers"].as_array().unwrap() {
            let blob = format!("/v2/{image}/blobs/{}", layer["digest"].as_str().unwrap());
            let head = client.request("HEAD", &blob, &[], &[]).unwrap();
            assert_eq!(head.header("content-length"), Some(&*layer["size"].to_string()));
        }
        let tags = client.get(&format!("/v2/{image}/tags/list")).unwrap();
        assert_eq!(tags.json()["tags"], json!(["small"]));
    }
    assert_eq!(client.get("/v2/lz4-1m/manifests/none").unwrap().status, 404);
    assert_eq!(client.get("/v2/none/tags/list").unwrap().status, 404);
    assert_eq!(client.get("/v2/../../manifests/small").unwrap().status, 404);
}

#[test]
fn the_journal_lists_every_request_and_no_order() {
    let registry = registry(&[]);
    let mut client = Client::connect(registry.address());
    client.range(&path(), 5, 9).unwrap();
    client.get("/v2/").unwrap();
    let log = registry.log();
    assert_eq!(log.len(), 2);
    assert_eq!((&log[0]["range"], &log[0]["bytes"]), (&json!("bytes=5-9"), &json!(5)));
    assert_eq!((&log[0]["status"], &log[1]["path"]), (&json!(206), &json!("/v2/")));
    assert_eq!(registry.blob_reads().len(), 1);
    registry.forget();
    assert!(registry.log().is_empty());
    client.get("/v2/").unwrap();
    assert_eq!(registry.log().len(), 1);
}

#[test]
fn rules_hit_what_they_name_and_nothing_else() {
    let registry = registry(&[]);
    registry.fault(json!([
        { "repo": "some/app", "method": "GET", "nth": 2, "count": 2, "effect": { "status": 503 } },
        { "blob": "sha256:ff", "effect": { "forbidden": true } },
        { "path": "/manifests/", "effect": { "too_many": 7 } },
        { "door": "storage", "effect": { "status": 500 } },
    ]));
    let mut client = Client::connect(registry.address());
    let mut status = |path: &str| client.get(path).unwrap().status;
    assert_eq!([(); 4].map(|()| status(&path())), [200, 503, 503, 200]);
    assert_eq!(status(&path().replace("some", "other")), 200);
    assert_eq!(status("/v2/a/manifests/b"), 429);
    let mut control = Client::connect(registry.address());
    let refused = control.request("PUT", "/_registryd/faults", &[], b"[{\"effect\":{\"x\":1}}]");
    assert_eq!(refused.unwrap().status, 400);
}

#[test]
fn chance_follows_its_seed() {
    let registry = registry(&[]);
    let mut client = Client::connect(registry.address());
    let mut run = |seed: u64| {
        let rule = json!({ "probability": 0.5, "seed": seed, "effect": { "status": 503 } });
        registry.fault(json!([rule]));
        [(); 40].map(|()| client.range(&path(), 0, 1).unwrap().status)
    };
    let first = run(7);
    assert!(first.contains(&503) && first.contains(&206), "{first:?}");
    assert_eq!(first, run(7));
    assert_ne!(first, run(8));
}

#[test]
fn refusals_are_made_to_order() {
    for (effect, status, header) in [
        (
            json!({ "unauthorized": true }),
            401,
            Some(("www-authenticate", "Basic realm=\"registryd\"")),
        ),
        (json!({ "forbidden": true }), 403, None),
        (json!({ "too_many": 3 }), 429, Some(("retry-after", "3"))),
        (json!({ "status": 502 }), 502, None),
    ] {
        let (registry, _, answer) = under(effect);
        let answer = answer.unwrap();
        assert_eq!(answer.status, status);
        if let Some((name, value)) = header {
            assert_eq!(answer.header(name), Some(value));
        }
        assert_heals(&registry);
    }
}

#[test]
fn wrong_answers_are_made_to_order() {
    let right = &content()[1000..2000];
    let (_registry, _, answer) = under(json!({ "wrong_content_range": true }));
    let answer = answer.unwrap();
    assert_eq!(answer.header("content-range"), Some("bytes 1001-2000/100000"));
    assert_eq!(answer.body, right);
    let (_registry, _, answer) = under(json!({ "full_200_for_range": true }));
    let answer = answer.unwrap();
    assert_eq!((answer.status, answer.body), (200, content()));
    let (registry, mut client, answer) = under(json!({ "flip_bit": 1234 }));
    let flipped = answer.unwrap().body;
    let wrong: Vec<usize> = (0..1000).filter(|&at| flipped[at] != right[at]).collect();
    assert_eq!((wrong, flipped[234] ^ right[234]), (vec![234], 1));
    assert_eq!(client.range(&path(), 2000, 2999).unwrap().body, content()[2000..3000]);
    assert_heals(&registry);
    let (_registry, _, answer) = under(json!({ "overlong": 10 }));
    let body = answer.unwrap().body;
    assert_eq!((body.len(), &body[..1000]), (1010, right));
    let (_registry, mut client, answer) =
        under(json!({ "stray_bytes": 5, "close_after_response": true }));
    assert_eq!(answer.unwrap().body, right);
    assert_eq!(client.rest().unwrap(), b"?????");
    let (_registry, mut client, answer) = under(json!({ "chunked": true }));
    let answer = answer.unwrap();
    assert_eq!((answer.header("content-length"), answer.body.as_slice()), (None, right));
    assert_eq!(client.range(&path(), 0, 9).unwrap().body, content()[..10]);
}

#[test]
fn broken_connections_are_made_to_order() {
    for (effect, kind) in [
        (json!({ "reset": 0 }), ErrorKind::ConnectionReset),
        (json!({ "reset": 500 }), ErrorKind::ConnectionReset),
        (json!({ "truncate": 1 }), ErrorKind::UnexpectedEof),
        (json!({ "truncate": 1, "chunked": true }), ErrorKind::UnexpectedEof),
        (json!({ "close_before_response": true }), ErrorKind::UnexpectedEof),
        (json!({ "garbage_head": true }), ErrorKind::InvalidData),
    ] {
        let (registry, _, answer) = under(effect.clone());
        assert_eq!(answer.map_err(|error| error.kind()).unwrap_err(), kind, "{effect}");
        assert_heals(&registry);
    }
    let (_registry, _, answer) = under(json!({ "huge_head": 200_000 }));
    assert_eq!(answer.unwrap().header("x-huge").map(str::len), Some(200_000));
    let (_registry, mut client, answer) = under(json!({ "close_after_response": true }));
    assert_eq!(answer.unwrap().header("connection"), None);
    assert_eq!(client.rest().unwrap(), b"");
}

#[test]
fn a_hang_lasts_until_the_client_gives_up() {
    let registry = registry(&[]);
    registry.fault(json!([{ "effect": { "hang": true } }]));
    let mut client = Client::connect(registry.address()).patience(Duration::from_millis(200));
    let error = client.range(&path(), 0, 9).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error}");
    assert_eq!((registry.log()[0]["status"].clone(), registry.log().len()), (json!(0), 1));
    assert_heals(&registry);
}

#[test]
fn delays_last_as_long_as_ordered() {
    for (effect, at_least_ms) in [
        (json!({ "latency_ms": 150 }), 150),
        (json!({ "bandwidth_bytes_per_second": 5000 }), 180),
        (json!({ "slow_drip": 5000 }), 180),
    ] {
        let started = Instant::now();
        let (_registry, _, answer) = under(effect.clone());
        assert_eq!(answer.unwrap().body, content()[1000..2000]);
        assert!(started.elapsed() >= Duration::from_millis(at_least_ms), "{effect}");
    }
}

#[test]
fn answers_share_a_link() {
    let registry = registry(&[]);
    registry.fault(json!([{ "effect": { "link_bytes_per_second": 5 * SIZE } }]));
    let started = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..3 {
            let whole = || Client::connect(registry.address()).get(&path()).unwrap().body;
            scope.spawn(move || assert_eq!(whole(), content()));
        }
    });
    // A fifth of a second each, less the queue of 2 ms.
    assert!(started.elapsed() >= Duration::from_millis(590), "{:?}", started.elapsed());
    assert_heals(&registry);
}

#[test]
fn redirects_lead_to_a_port_that_takes_no_credentials() {
    let (registry, _, answer) = under(json!({ "redirect": true }));
    let answer = answer.unwrap();
    let prefix = format!("http://{}", registry.storage());
    let target = answer.header("location").unwrap().strip_prefix(&prefix).unwrap().to_owned();
    assert_eq!(answer.status, 307);
    // The rule matches by blob and hits the storage port too, unless it names the door.
    registry.fault(json!([{ "door": "registry", "effect": { "redirect": true } }]));
    let mut storage = Client::connect(registry.storage());
    let bare = storage.range(&target, 0, 9).unwrap();
    assert_eq!((bare.status, bare.body.as_slice()), (206, &content()[..10]));
    let laden = [("Authorization", "Bearer word"), ("Range", "bytes=0-9")];
    assert_eq!(storage.request("GET", &target, &laden, &[]).unwrap().status, 400);
    assert_eq!(registry.log()[1]["door"], "storage");
}

#[test]
fn basic_wants_the_account_with_every_request() {
    let registry = registry(&["--auth", "basic", "--user", "me:secret"]);
    let mut client = Client::connect(registry.address());
    let mut status = |header: &str| {
        let headers: &[(&str, &str)] = &[("Authorization", header)];
        client.request("GET", &path(), if header.is_empty() { &[] } else { headers }, &[])
    };
    assert_eq!(status("").unwrap().header("www-authenticate"), Some("Basic realm=\"registryd\""));
    assert_eq!(status("Basic bWU6d3Jvbmc=").unwrap().status, 401);
    assert_eq!(status("Basic bWU6c2VjcmV0").unwrap().status, 200);
}

#[test]
fn bearer_tokens_cover_their_scope_until_they_expire() {
    let registry = registry(&["--auth", "bearer", "--user", "me:secret"]);
    let mut client = Client::connect(registry.address());
    let challenge = client.get(&path()).unwrap().header("www-authenticate").unwrap().to_owned();
    let scope = "scope=\"repository:some/app:pull\"";
    assert!(challenge.starts_with("Bearer realm=\"http://127.0.0.1:"), "{challenge}");
    assert!(challenge.ends_with(scope), "{challenge}");
    let ask = "/token?service=registryd&scope=repository%3Asome%2Fapp%3Apull";
    assert_eq!(client.get(ask).unwrap().status, 401);
    let account = [("Authorization", "Basic bWU6c2VjcmV0")];
    let token = client.request("GET", ask, &account, &[]).unwrap().json();
    let bearer = format!("Bearer {}", token["token"].as_str().unwrap());
    let mut status = |path: &str| {
        client.request("GET", path, &[("Authorization", &bearer)], &[]).unwrap().status
    };
    assert_eq!(status(&path()), 200);
    assert_eq!(status(&path().replace("some", "other")), 401);
    registry.fault(json!([{ "count": 1, "effect": { "expire_tokens": true } }]));
    assert_eq!([status(&path()), status(&path())], [401, 401]);
}

#[test]
fn tokens_die_of_old_age() {
    let registry = registry(&["--auth", "bearer", "--anonymous-pull", "--token-lifetime-s", "0"]);
    let mut client = Client::connect(registry.address());
    let token = client.get("/token?scope=repository:some/app:pull").unwrap();
    assert_eq!((token.status, &token.json()["expires_in"]), (200, &json!(0)));
    let bearer = format!("Bearer {}", token.json()["token"].as_str().unwrap());
    let answer = client.request("GET", &path(), &[("Authorization", &bearer)], &[]).unwrap();
    assert_eq!(answer.status, 401);
    assert_eq!(client.get("/token?scope=repository:some/app:push").unwrap().status, 401);
}

#[test]
fn tls_is_for_those_who_trust_the_authority() {
    let registry = registry(&["--tls"]);
    let connect = |trusted: bool| {
        let mut roots = rustls::RootCertStore::empty();
        if trusted {
            use rustls::pki_types::{CertificateDer, pem::PemObject};
            roots.add(CertificateDer::from_pem_file(registry.ca()).unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider);
        let builder = builder.with_safe_default_protocol_versions().unwrap();
        let config = builder.with_root_certificates(roots).with_no_client_auth();
        let name = "localhost".try_into().unwrap();
        let session = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let socket = TcpStream::connect(registry.address()).unwrap();
        Client::over(rustls::StreamOwned::new(session, socket)).range(&path(), 0, 9)
    };
    assert_eq!(connect(true).unwrap().body, content()[..10]);
    assert!(connect(false).is_err());
    registry.fault(json!([{ "effect": { "reset": 5 } }]));
    assert_eq!(connect(true).unwrap_err().kind(), ErrorKind::ConnectionReset);
}

#[test]
fn tls_to_the_plain_port_is_refused_at_once() {
    let registry = registry(&[]);
    let mut client = Client::connect(registry.address()).patience(Duration::from_secs(5));
    client.say(b"\x16\x03\x01\x00\xf4\x01").unwrap();
    assert!(client.rest().unwrap().starts_with(b"HTTP/1.1 400"));
}

#[test]
fn it_ends_with_its_input_and_with_sigterm() {
    let mut orphan = Registry::start(&[]);
    orphan.close_input();
    assert!(orphan.wait());
    let mut told = Registry::start(&[]);
    kill(Pid::from_raw(told.pid()), Signal::SIGTERM).unwrap();
    assert!(told.wait());
    assert!(TcpStream::connect(told.address()).is_err());
    let mut hanging = TcpStream::connect(Registry::start(&[]).address()).unwrap();
    assert_eq!(hanging.read(&mut [0; 1]).unwrap_or(0), 0, "a dead registry answers nothing");
}
