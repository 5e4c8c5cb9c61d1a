//! The client against scripted servers: what is delivered, what is refused, what is tried again.

use std::cell::RefCell;
use std::future::Future;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::{Value, json};

use crate::config::{MILLISECOND_NS, SECOND_NS};
use crate::engine::{Class, Core, Lane, block_on};
use crate::error::{Error, Result};
use crate::registry::client::{BlobRef, Client, Target};
use crate::registry::config::Backend;
use crate::registry::route::{Route, Shared};
use crate::registry::server_tests::{Play, Seen, Server, blob, partial, status};

/// An id no test looks behind.
pub const ID: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";

/// A core with a client, and a route.
pub struct World {
    /// The core.
    pub core: Core,
    /// Its client.
    pub client: Rc<Client>,
    /// The route under test.
    pub route: Arc<Route>,
    /// When the test began.
    pub start_ns: u64,
}

impl World {
    /// Reads a range to its end, in 5 s.
    pub async fn read(&self, range: Range<u64>) -> Result<Vec<u8>> {
        self.read_by(range, self.core.now() + 5 * SECOND_NS).await
    }

    /// Reads a range to its end.
    pub async fn read_by(&self, range: Range<u64>, deadline_ns: u64) -> Result<Vec<u8>> {
        let blob = BlobRef { id: ID };
        let opening =
            self.client.open(&self.core, &self.route, blob, range, deadline_ns, Lane::Demand);
        let mut body = opening.await?;
        let mut lease = self.core.lease(Class::Range).await;
        let size = body.remaining() as usize;
        let mut at = 0;
        while body.remaining() > 0 {
            let (back, got) = body.read_into(&self.core, lease, at..size).await;
            lease = back;
            at += got?;
        }
        body.finish();
        Ok(lease[..size].to_vec())
    }

    /// Milliseconds since the start.
    pub fn elapsed_ms(&self) -> u64 {
        (self.core.now() - self.start_ns) / MILLISECOND_NS
    }
}

/// Runs a test on a core of its own.
pub fn run<F: Future<Output = ()> + 'static>(
    shared: Arc<Shared>,
    config: Value,
    test: impl FnOnce(World) -> F + 'static,
) {
    let kind = if config.get("dir").is_some() { "localfs" } else { "registry" };
    let route = shared.route(&Backend::parse(kind, &config).unwrap()).unwrap();
    let busy = Rc::new(RefCell::new(usize::MAX));
    let seen = Rc::clone(&busy);
    block_on(|core| async move {
        let client = Client::new(shared);
        let start_ns = core.now();
        let arena = Arc::clone(core.arena());
        let free = [Class::Wire, Class::Range].map(|class| arena.free_count(class));
        let world = World { core: core.clone(), client: Rc::clone(&client), route, start_ns };
        test(world).await;
        client.close();
        // Background tasks of the test see the end when they are next polled.
        for _ in 0..1000 {
            core.yield_now().await;
        }
        let left = [Class::Wire, Class::Range].map(|class| arena.free_count(class));
        assert_eq!(free, left, "every lease came home");
        *seen.borrow_mut() = core.busy_count();
    })
    .unwrap();
    assert_eq!(*busy.borrow(), 0, "no operation is left behind");
}

/// Nothing of this machine's configuration.
pub fn shared() -> Arc<Shared> {
    Shared::at(None, Path::new("/nonexistent"))
}

/// A plain registry at a server.
pub fn plain(server: &Server, extra: Value) -> Value {
    let mut config = json!({"scheme": "http", "host": server.host(), "repo": "r"});
    config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
    config
}

/// An answer with this Content-Range and the rest as given.
fn ranged(range: &str, rest: &str) -> Vec<u8> {
    format!("HTTP/1.1 206 P\r\nContent-Range: bytes {range}\r\n{rest}").into_bytes()
}

/// The bytes of a range.
pub fn expect(range: Range<usize>) -> Vec<u8> {
    blob()[range].to_vec()
}

#[test]
fn one_connection_serves_one_request_after_the_other() {
    let server = Server::start(|seen| Play::Send(partial(seen)));
    run(shared(), plain(&server, json!({})), |world| async move {
        assert_eq!(world.read(10..200_000).await.unwrap(), expect(10..200_000));
        assert_eq!(world.read(0..1).await.unwrap(), expect(0..1));
        assert_eq!(world.read(299_999..300_000).await.unwrap(), expect(299_999..300_000));
    });
    let seen = server.seen();
    assert_eq!(seen.len(), 3);
    assert!(seen.iter().all(|seen| seen.connection == 0));
    assert_eq!(seen[0].line, format!("GET /v2/r/blobs/sha256:{ID}"));
    assert_eq!(seen[0].header("Host"), Some(server.host().as_str()));
    assert_eq!(seen[0].header("Range"), Some("bytes=10-199999"));
    assert_eq!(seen[0].header("Authorization"), None);
}

#[test]
fn a_connection_closed_while_idle_costs_nothing() {
    let server = Server::start(|seen| Play::Send(partial(seen)));
    let server = Arc::new(server);
    let own = Arc::clone(&server);
    let origin = Server::start(|_| Play::Send(status(404, "")));
    let mirrors = json!({"mirrors": [{"host": format!("http://{}", server.host())}]});
    run(shared(), plain(&origin, mirrors), |world| async move {
        world.read(0..10).await.unwrap();
        own.hang_up();
        assert_eq!(world.read(5..15).await.unwrap(), expect(5..15));
    });
    assert_eq!(origin.seen().len(), 0, "the mirror was not blamed for it");
    let connections: Vec<_> = server.seen().iter().map(|seen| seen.connection).collect();
    assert_eq!(connections, [0, 1]);
}

#[test]
fn a_body_dropped_early_closes_its_connection() {
    let server = Server::start(|seen| Play::Send(partial(seen)));
    run(shared(), plain(&server, json!({})), |world| async move {
        let until_ns = world.core.now() + SECOND_NS;
        let blob = BlobRef { id: ID };
        let (core, route) = (&world.core, &world.route);
        let opening = world.client.open(core, route, blob, 0..100_000, until_ns, Lane::Demand);
        let body = opening.await.unwrap();
        body.finish();
        assert_eq!(world.read(7..9).await.unwrap(), expect(7..9));
    });
    assert_eq!(server.seen()[1].connection, 1);
}

#[test]
fn wrong_answers_are_errors_that_name_what_came() {
    type Answer = fn(&Seen) -> Vec<u8>;
    let wrong: [(Answer, &str); 7] = [
        (
            |_| {
                [&status(200, "")[..0], b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc"].concat()
            },
            "status 200",
        ),
        (|_| ranged("0-9/99", "Content-Length: 10\r\n\r\n0123456789"), "got bytes 0-9"),
        (|_| status(416, ""), "416"),
        (|_| status(500, ""), "500"),
        (|_| b"garbage\r\n\r\n".to_vec(), "response head"),
        (|_| Vec::new(), "closed without an answer"),
        (
            |_| ranged("5-9/99", "Transfer-Encoding: chunked\r\n\r\n6\r\n012345\r\n0\r\n\r\n"),
            "longer",
        ),
    ];
    for (answer, names) in wrong {
        let server = Server::start(move |seen| Play::Last(answer(seen)));
        run(shared(), plain(&server, json!({})), move |world| async move {
            let error = world.read(5..10).await.unwrap_err();
            assert!(error.to_string().contains(names), "{error} does not name {names}");
        });
    }
}

#[test]
fn a_truncated_body_is_an_error_and_the_next_try_heals() {
    let server = Server::start(|seen| match seen.number {
        0 => Play::Last(partial(seen)[..5000].to_vec()),
        _ => Play::Send(partial(seen)),
    });
    run(shared(), plain(&server, json!({})), |world| async move {
        let error = world.read(0..100_000).await.unwrap_err();
        assert!(error.to_string().contains("bytes early"), "{error}");
        assert_eq!(world.read(0..100_000).await.unwrap(), expect(0..100_000));
    });
}

#[test]
fn chunked_bodies_and_bodies_until_close_are_read() {
    let chunked = |seen: &Seen| {
        let whole = partial(seen);
        let head = String::from_utf8_lossy(&whole[..whole.len() - 9000]).to_string();
        let head = head.replace("Content-Length: 9000", "Transfer-Encoding: chunked");
        let mut bytes = head.into_bytes();
        for chunk in whole[whole.len() - 9000..].chunks(4001) {
            bytes.extend_from_slice(format!("{:X};x=y\r\n", chunk.len()).as_bytes());
            bytes.extend_from_slice(chunk);
            bytes.extend_from_slice(b"\r\n");
        }
        bytes.extend_from_slice(b"0\r\nTrailer: x\r\n\r\n");
        bytes
    };
    let until_close = |seen: &Seen| {
        let whole = partial(seen);
        let head = String::from_utf8_lossy(&whole[..whole.len() - 9000]).to_string();
        [head.replace("Content-Length: 9000\r\n", "").as_bytes(), &whole[whole.len() - 9000..]]
            .concat()
    };
    let server = Server::start(move |seen| match seen.number {
        0 | 1 => Play::Send(chunked(seen)),
        _ => Play::Last(until_close(seen)),
    });
    run(shared(), plain(&server, json!({})), |world| async move {
        for _ in 0..3 {
            assert_eq!(world.read(1000..10_000).await.unwrap(), expect(1000..10_000));
        }
    });
    let connections: Vec<_> = server.seen().iter().map(|seen| seen.connection).collect();
    assert_eq!(connections, [0, 0, 0]);
}

#[test]
fn retry_after_is_waited_for_and_bounded_by_the_deadline() {
    let server = Server::start(|seen| match seen.number {
        0 => Play::Send(status(429, "Retry-After: 1\r\n")),
        1 => Play::Send(partial(seen)),
        _ => Play::Send(status(503, "Retry-After: 60\r\n")),
    });
    run(shared(), plain(&server, json!({})), |world| async move {
        world.read(0..10).await.unwrap();
        assert!(world.elapsed_ms() >= 1000, "{}", world.elapsed_ms());
        let error = world.read(0..10).await.unwrap_err();
        let Error::Unavailable { what, retry_after_ms } = error else { panic!("{error}") };
        assert_eq!(retry_after_ms, Some(60_000));
        assert!(what.contains("503") && what.contains(ID), "{what}");
        let error = world.read(0..10).await.unwrap_err();
        assert!(error.to_string().contains("asked not to be asked"), "{error}");
        assert!(world.elapsed_ms() < 4000);
    });
    assert_eq!(server.seen().len(), 3, "another request does not ask it either");
}

#[test]
fn a_slow_drip_ends_by_the_progress_limit_and_by_the_deadline() {
    let server = Server::start(|seen| Play::Drip(partial(seen), 200, 20));
    run(shared(), plain(&server, json!({"timeout": 1})), |world| async move {
        let error = world.read(0..100_000).await.unwrap_err();
        assert!(error.to_string().contains("stalled"), "{error}");
        assert!((900..3000).contains(&world.elapsed_ms()), "{}", world.elapsed_ms());
        let deadline_ns = world.core.now() + SECOND_NS / 5;
        let error = world.read_by(0..100_000, deadline_ns).await.unwrap_err();
        assert!(matches!(error, Error::Deadline(_)), "{error}");
        assert!(world.core.now() < deadline_ns + SECOND_NS / 2);
    });
}

#[test]
fn a_silent_server_is_tried_again_until_the_deadline() {
    let server = Server::start(|_| Play::Stall);
    run(shared(), plain(&server, json!({"timeout": 1})), |world| async move {
        let deadline_ns = world.core.now() + 2 * SECOND_NS;
        let error = world.read_by(0..10, deadline_ns).await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        assert!(world.core.now() < deadline_ns + SECOND_NS / 2);
    });
    assert!(server.seen().len() >= 2);
}

#[test]
fn a_dead_registry_is_an_error_that_heals() {
    let server = Server::start(|seen| Play::Send(partial(seen)));
    let is_down = Arc::new(AtomicBool::new(true));
    let down = Arc::clone(&is_down);
    let flaky = Server::start(move |seen| match down.load(Ordering::SeqCst) {
        true => Play::Last(Vec::new()),
        false => Play::Send(partial(seen)),
    });
    drop(server);
    run(shared(), plain(&flaky, json!({})), move |world| async move {
        assert!(world.read(0..10).await.is_err());
        is_down.store(false, Ordering::SeqCst);
        assert_eq!(world.read(0..10).await.unwrap(), expect(0..10));
    });
}

#[test]
fn a_failing_mirror_is_left_out_and_comes_back() {
    let is_down = Arc::new(AtomicBool::new(true));
    let down = Arc::clone(&is_down);
    let mirror =
        Server::start(move |seen| match (seen.line.as_str(), down.load(Ordering::SeqCst)) {
            ("GET /ping", true) | (_, true) => Play::Send(status(500, "")),
            ("GET /ping", false) => Play::Send(status(200, "")),
            _ => Play::Send(partial(seen)),
        });
    let origin = Server::start(|seen| Play::Send(partial(seen)));
    let mirrors = json!({"mirrors": [{"host": format!("http://{}/p", mirror.host()),
        "ping_url": format!("http://{}/ping", mirror.host()), "headers": {"X-Registry": "o"},
        "failure_limit": 2, "health_check_interval": 1}]});
    let config = plain(&origin, mirrors);
    let asked = Arc::new(AtomicUsize::new(0));
    let mirror = Arc::new(mirror);
    let (watched, count) = (Arc::clone(&mirror), Arc::clone(&asked));
    run(shared(), config, move |world| async move {
        for _ in 0..5 {
            assert_eq!(world.read(0..10).await.unwrap(), expect(0..10));
        }
        count.store(watched.seen().len(), Ordering::SeqCst);
        assert!(watched.seen().len() <= 2, "a failed mirror goes on being asked");
        is_down.store(false, Ordering::SeqCst);
        let client = Rc::clone(&world.client);
        let core = world.core.clone();
        world.core.spawn(Lane::Background, async move { client.maintain(&core).await });
        let before = watched.seen().len();
        let until_ns = world.core.now() + 5 * SECOND_NS;
        while !watched.seen()[before..].iter().any(|seen| seen.line.ends_with(ID)) {
            assert!(world.core.now() < until_ns, "the mirror did not come back");
            world.read(0..10).await.unwrap();
            world.core.sleep(50 * MILLISECOND_NS).await.unwrap_or_default();
        }
    });
    let through = mirror.seen().into_iter().rfind(|seen| seen.line.ends_with(ID)).unwrap();
    assert!(through.line.starts_with("GET /p/v2/r/blobs/"), "{}", through.line);
    assert_eq!(through.header("X-Registry"), Some("o"));
    assert!(asked.load(Ordering::SeqCst) > 0);
}

#[test]
fn a_blob_a_mirror_lacks_is_had_from_the_origin_and_nobodys_blob_is_not_found() {
    let mirror = Server::start(|_| Play::Send(status(404, "")));
    let origin = Server::start(|seen| match seen.number {
        0 => Play::Send(partial(seen)),
        _ => Play::Send(status(404, "")),
    });
    let mirrors = json!({"mirrors": [{"host": format!("http://{}", mirror.host())}]});
    run(shared(), plain(&origin, mirrors), |world| async move {
        world.read(0..10).await.unwrap();
        let error = world.read(0..10).await.unwrap_err();
        assert!(matches!(error, Error::NotFound(_)), "{error}");
        assert!(world.elapsed_ms() < 1000, "what is not there is not tried again");
    });
    assert_eq!(origin.seen().len(), 2);
}

#[test]
fn a_proxy_is_asked_for_the_whole_url_and_left_when_it_fails() {
    let origin = Server::start(|seen| Play::Send(partial(seen)));
    let proxy = Server::start(|seen| match seen.number {
        0 => Play::Send(partial(seen)),
        _ => Play::Last(Vec::new()),
    });
    let settings = json!({"proxy": {"url": format!("http://u:p@{}", proxy.host())}});
    run(shared(), plain(&origin, settings), |world| async move {
        world.read(0..10).await.unwrap();
        world.read(10..20).await.unwrap();
    });
    let expected = format!("GET http://{}/v2/r/blobs/sha256:{ID}", origin.host());
    assert_eq!(proxy.seen()[0].line, expected);
    assert_eq!(proxy.seen()[0].header("Proxy-Authorization"), Some("Basic dTpw"));
    assert_eq!(origin.seen().len(), 1);
    assert_eq!(origin.seen()[0].header("Proxy-Authorization"), None);
    let strict = json!({"proxy": {"url": format!("http://{}", proxy.host()), "fallback": false}});
    run(shared(), plain(&origin, strict), |world| async move {
        assert!(world.read(0..10).await.is_err());
    });
    assert_eq!(origin.seen().len(), 1, "without fallback the origin is not asked");
}

#[test]
fn small_things_are_checked_against_their_digest_and_limit() {
    let id = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let server = Server::start(move |seen| {
        let digest = "Docker-Content-Digest: sha256:00\r\nContent-Type: application/x\r\n";
        let body = if seen.line.contains("bad") { "abd" } else { "abc" };
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: 3\r\n{digest}\r\n{body}");
        match seen.line.contains(ID) {
            true => Play::Send(head.replace("abc", "xyz").into_bytes()),
            false => Play::Send(head.into_bytes()),
        }
    });
    run(shared(), plain(&server, json!({})), move |world| async move {
        let until_ns = world.core.now() + 5 * SECOND_NS;
        let get = |target, limit| {
            let (core, client, route) = (&world.core, &world.client, &world.route);
            client.fetch_small(core, route, target, "a/b, c/d", limit, until_ns, Lane::Demand)
        };
        let response = get(Target::Blob(id), 3).await.unwrap();
        assert_eq!(
            (response.bytes.as_slice(), response.media_type.as_str()),
            (&b"abc"[..], "application/x")
        );
        assert_eq!(response.digest, format!("sha256:{id}"));
        assert!(get(Target::Manifest("latest"), 100).await.is_ok());
        let error = get(Target::Blob(ID), 100).await.unwrap_err();
        assert!(matches!(error, Error::Digest(_)), "{error}");
        let error = get(Target::Blob(id), 2).await.unwrap_err();
        assert!(error.to_string().contains("larger than 2 bytes"), "{error}");
        assert!(get(Target::Manifest("../x"), 100).await.is_err());
        assert!(get(Target::Blob("../x"), 100).await.is_err());
    });
    assert_eq!(server.seen()[1].line, "GET /v2/r/manifests/latest");
    assert_eq!(server.seen()[1].header("Accept"), Some("a/b, c/d"));
}

#[test]
fn sizes_and_warm_connections_are_had_ahead() {
    let server = Server::start(|seen| Play::Send(partial(seen)));
    run(shared(), plain(&server, json!({})), |world| async move {
        let until_ns = world.core.now() + 5 * SECOND_NS;
        let (core, route, blob) = (&world.core, &world.route, BlobRef { id: ID });
        world.client.prepare(core, route, Some(blob), until_ns).await.unwrap();
        let size = world.client.blob_size(core, route, blob, until_ns, Lane::Demand).await;
        assert_eq!(size.unwrap(), 300_000);
    });
}

#[test]
fn files_are_read_like_registries() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join(ID), blob()).unwrap();
    let other = directory.path().join("empty");
    std::fs::create_dir(&other).unwrap();
    let config = json!({"dir": other, "alt_dirs": [directory.path()]});
    run(shared(), config, |world| async move {
        assert_eq!(world.read(5..250_000).await.unwrap(), expect(5..250_000));
        assert!(world.read(299_999..300_001).await.is_err());
        let until_ns = world.core.now() + SECOND_NS;
        let (core, route) = (&world.core, &world.route);
        let missing = BlobRef { id: "bb" };
        let size = world.client.blob_size(core, route, missing, until_ns, Lane::Demand).await;
        assert!(matches!(size, Err(Error::NotFound(_))));
    });
}
