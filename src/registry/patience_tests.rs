//! Late answers: which requests are sent twice, and which are not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::json;

use super::client_tests::{ID, World, expect, plain, run, shared};
use crate::config::{PATIENCE_ANSWERS_PER_REPEAT, SECOND_NS};
use crate::engine::Lane;
use crate::registry::client::BlobRef;
use crate::registry::server_tests::{Play, Seen, Server, partial};

/// Requests that are answered at once before one that is not.
const ORDINARY: usize = PATIENCE_ANSWERS_PER_REPEAT as usize;

/// A server that does something else with one request.
fn server(play: impl Fn(&Seen) -> Play + Send + Sync + 'static) -> Server {
    Server::start(move |seen| match seen.number {
        ORDINARY => play(seen),
        _ => Play::Send(partial(seen)),
    })
}

async fn read_ordinary(world: &World) {
    for _ in 0..ORDINARY {
        assert_eq!(world.read(0..10).await.unwrap(), expect(0..10));
    }
}

#[test]
fn reader_of_a_late_answer_gets_it_over_another_connection() {
    // Nothing at all, and half a head.
    for play in [|_: &Seen| Play::Stall, |seen: &Seen| Play::Drip(partial(seen), 20, 60_000)] {
        let server = server(play);
        run(shared(), plain(&server, json!({"timeout": 20})), |world| async move {
            read_ordinary(&world).await;
            let deadline_ns = world.core.now() + 10 * SECOND_NS;
            assert_eq!(world.read_by(7..17, deadline_ns).await.unwrap(), expect(7..17));
        });
        let seen = server.seen();
        let [late, again] = &seen[ORDINARY..] else { panic!("{} requests", seen.len()) };
        assert_eq!((&late.line, late.range()), (&again.line, again.range()));
        assert_ne!(late.connection, again.connection);
    }
}

#[test]
fn nobody_waits_for_prefetch_so_it_is_not_sent_twice() {
    let server = server(|_| Play::Stall);
    run(shared(), plain(&server, json!({"timeout": 1})), |world| async move {
        read_ordinary(&world).await;
        let (blob, deadline_ns) = (BlobRef { id: ID }, world.core.now() + 10 * SECOND_NS);
        let (core, route, lane) = (&world.core, &world.route, Lane::Background);
        let began_ns = core.now();
        let opened = world.client.open(core, route, blob, 0..10, deadline_ns, lane).await;
        assert!(!opened.expect("another try").is_repeated());
        assert!(core.now() - began_ns >= SECOND_NS, "it has had the backend's timeout");
    });
}

#[test]
fn registry_that_is_slow_for_everybody_is_not_asked_twice_for_everything() {
    let (is_slow, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (slow, counted) = (Arc::clone(&is_slow), Arc::clone(&count));
    let server = Server::start(move |seen| match slow.load(Ordering::SeqCst) {
        true => {
            counted.fetch_add(1, Ordering::SeqCst);
            Play::Late(partial(seen), 200)
        }
        false => Play::Send(partial(seen)),
    });
    run(shared(), plain(&server, json!({})), move |world| async move {
        for _ in 0..5 {
            read_ordinary(&world).await;
        }
        is_slow.store(true, Ordering::SeqCst);
        for _ in 0..6 {
            assert_eq!(world.read(0..10).await.unwrap(), expect(0..10));
        }
    });
    assert_eq!(count.load(Ordering::SeqCst), 7, "one was late, and then it was usual");
}
