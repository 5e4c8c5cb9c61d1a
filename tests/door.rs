//! The daemon's engine, policy and registry client for real, between a test's kernel and registryd.

mod support;

use serde_json::json;
use sluice::blob::recorder::Fault;
use sluice::blob::statistics::Counter;
use sluice::config::Intake;
use support::daemon::comes_true;
use support::node::{Node, Options, cache};
use support::registry::{IMAGES, Registry};
use support::truth::Truth;

#[test]
fn every_byte_of_every_image_is_right_and_fetched_once() {
    let registry = Registry::with_images(&[]);
    for name in IMAGES {
        let (cache, truth, options) = (cache(), Truth::of(name), Options::default());
        let mut node = Node::start(cache.path(), &options);
        node.register(&truth, registry.address(), &options);
        let object = node.open(&truth);
        assert_eq!(node.read_all(&truth, &object, 7), 0, "{name}");
        assert!(!registry.blob_reads().is_empty(), "{name}");
        registry.forget();
        assert_eq!(node.read_all(&truth, &object, 8), 0);
        assert!(registry.blob_reads().is_empty(), "{name}: the second pass asked for something");
        node.stop();
        drop(node);

        let node = Node::start(cache.path(), &options);
        node.register(&truth, registry.address(), &options);
        registry.forget();
        let object = node.open(&truth);
        assert_eq!(node.read_all(&truth, &object, 9), 0);
        assert!(registry.blob_reads().is_empty(), "{name}: a restart asked for something");
    }
}

#[test]
fn many_readers_on_many_cores_cost_one_fetch_per_byte() {
    let registry = Registry::with_images(&[]);
    for intake in [Intake::Every, Intake::Exclusive, Intake::One, Intake::Spin] {
        let (cache, truth) = (cache(), Truth::of("zstd-64k"));
        let options = Options { cores: 4, intake, ..Options::default() };
        let node = Node::start(cache.path(), &options);
        node.register(&truth, registry.address(), &options);
        let object = node.open(&truth);
        registry.forget();
        std::thread::scope(|scope| {
            for reader in 0..16 {
                let (node, truth, object) = (&node, &truth, &object);
                scope.spawn(move || assert_eq!(node.read_all(truth, object, reader), 0));
            }
        });
        let fetched = node.count(Counter::BytesFetched);
        let stored = truth.layout.unit(truth.layout.unit_count() - 1);
        let stored = stored.compressed_offset + u64::from(stored.compressed_size);
        assert!(fetched <= stored, "{intake:?}: {fetched} bytes fetched of {stored}");
        // Counted right behind what readers see.
        let filled = || node.count(Counter::ChunksFilled);
        let all = truth.chunks().count() as u64;
        assert!(comes_true(|| filled() >= all) && filled() == all, "{} of {all}", filled());
    }
}

#[test]
fn bootstrap_is_filled_whole_by_its_first_read() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("lz4-1m"), Options::default());
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.kernel.open(&truth.domain, &truth.domain).unwrap();
    let bytes = std::fs::read(&truth.bootstrap).unwrap();
    assert_eq!(object.size, bytes.len() as u64);
    for (page, expected) in bytes.chunks(4096).enumerate() {
        let start = page as u64 * 4096;
        let got = node.kernel.read(&object, start..start + expected.len() as u64).unwrap();
        assert!(got == expected, "page {page}");
    }
    assert_eq!(node.count(Counter::BootstrapReads), 1);
}

#[test]
fn second_start_finds_what_the_first_needed() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), Options::default());
    let needed: Vec<_> = truth.chunks().step_by(9).map(|chunk| truth.range(chunk)).collect();
    let image =
        |node: &Node| node.catalog.image(&truth.domain, &truth.domain).expect("it is there");
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    for range in &needed {
        node.kernel.read(&object, range.clone()).expect("its bytes");
    }
    let known = image(&node).touches.end(0, true).expect("it was read");
    assert_eq!(image(&node).touches.end(0, true), None);
    drop(node);

    let empty = self::cache();
    let node = Node::start(empty.path(), &options);
    node.register(&truth, registry.address(), &options);
    image(&node).touches.recall(&known);
    let object = node.open(&truth);
    // With what is between them.
    let ranges = image(&node).touches.known_ranges(0).into_iter();
    let expected: u32 = ranges.map(|range| truth.layout.chunks_in(range).len() as u32).sum();
    let is_there = || node.count(Counter::ChunksFilled) == u64::from(expected);
    assert!(comes_true(is_there), "{:?}", node.lines());
    registry.forget();
    for range in &needed {
        let bytes = node.kernel.read(&object, range.clone()).expect("its bytes");
        assert!(bytes == truth.bytes[range.start as usize..range.end as usize]);
    }
    assert_eq!(registry.blob_reads().len(), 0);
}

#[test]
fn second_start_asks_for_nothing_where_its_bytes_are_still_there() {
    let registry = Registry::with_images(&[]);
    let cache = cache();
    // One core, one prefetch after the other.
    let options = Options { cores: 1, ..Options::default() };
    // Where this image's bytes are stored the registry says, and need not be asked.
    let (there, absent) = (Truth::of("zran"), Truth::of("lz4-1m"));
    let node = Node::start(cache.path(), &options);
    node.register(&there, registry.address(), &options);
    assert_eq!(node.read_all(&there, &node.open(&there), 1), 0);
    drop(node);

    let node = Node::start(cache.path(), &options);
    registry.forget();
    let mut objects = Vec::new();
    for truth in [&there, &absent] {
        node.register(truth, registry.address(), &options);
        let image = node.catalog.image(&truth.domain, &truth.domain).expect("it is there");
        let range = truth.range(truth.chunks().next().expect("a chunk"));
        image.touches.recall(&[Fault { blob_index: 0, range, elapsed_ns: 0 }]);
        objects.push(node.open(truth));
    }
    assert!(comes_true(|| node.count(Counter::ChunksFilled) > 0), "{:?}", node.lines());
    for read in registry.blob_reads() {
        let path = read["path"].as_str().expect("a path");
        assert!(path.starts_with("/v2/lz4-1m/"), "{path}");
    }
}

#[test]
fn every_fault_gives_right_bytes_or_eio_and_heals() {
    let faults = [
        json!({"latency_ms": 50}),
        json!({"unauthorized": true}),
        json!({"forbidden": true}),
        json!({"redirect": true}),
        json!({"too_many": 1}),
        json!({"status": 500}),
        json!({"status": 503}),
        json!({"reset": 0}),
        json!({"reset": 20_000}),
        json!({"truncate": 100}),
        json!({"overlong": 10}),
        json!({"wrong_content_range": true}),
        json!({"full_200_for_range": true}),
        json!({"hang": true}),
        json!({"close_before_response": true}),
        json!({"garbage_head": true}),
        json!({"huge_head": 60_000}),
        json!({"chunked": true}),
        json!({"stray_bytes": 9}),
        json!({"close_after_response": true}),
        json!({"slow_drip": 1000}),
    ];
    let registry = Registry::with_images(&[]);
    let truth = Truth::of("lz4-1m");
    for fault in faults {
        let options = Options { deadline_ms: 2500, timeout_s: 1, ..Options::default() };
        let cache = cache();
        let node = Node::start(cache.path(), &options);
        node.register(&truth, registry.address(), &options);
        let object = node.open(&truth);
        registry.fault(json!([{"blob": "", "effect": fault}]));
        let chunk = truth.chunks().next().unwrap();
        let range = truth.range(chunk);
        match node.kernel.read(&object, range.clone()) {
            Ok(bytes) => assert!(bytes == truth.bytes[range.start as usize..range.end as usize]),
            Err(errno) => assert_eq!(errno, nix::libc::EIO, "{fault}"),
        }
        registry.heal();
        let refused = (0..20)
            .map(|order| node.read_all(&truth, &object, order))
            .find(|&refused| refused == 0);
        assert_eq!(refused, Some(0), "{fault}: reads do not heal");
    }
}

#[test]
fn flipped_bit_costs_one_chunk_and_is_named() {
    let registry = Registry::with_images(&[]);
    let (cache, truth) = (cache(), Truth::of("zstd-64k"));
    let options = Options::default();
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    let unit = truth.layout.unit(truth.layout.unit_count() / 2);
    let place = unit.compressed_offset + u64::from(unit.compressed_size) / 2;
    registry.fault(json!([{"blob": truth.blob_id, "effect": {"flip_bit": place}}]));
    assert_eq!(node.read_all(&truth, &object, 3), 1);
    let bad = node.count(Counter::DigestFailures) + node.count(Counter::BadChunks);
    assert!(bad > 0);
    let chunk = unit.chunks.start.to_string();
    let named = |line: &String| {
        line.contains("zstd-64k") && line.contains(&truth.blob_id) && line.contains(&chunk)
    };
    assert!(node.lines().iter().any(named));
    registry.heal();
    assert_eq!(node.read_all(&truth, &object, 4), 0);
}

#[test]
fn blob_of_another_size_costs_what_is_missing() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("zstd-64k"), Options::default());
    let file = registry.root().join("blobs/sha256").join(&truth.blob_id);
    let whole = std::fs::read(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    let (first, last) = (truth.chunks().next().unwrap(), truth.chunks().last().unwrap());
    assert!(node.kernel.read(&object, truth.range(first)).is_ok());
    assert_eq!(node.kernel.read(&object, truth.range(last)), Err(nix::libc::EIO));
    let named = |line: &String| line.contains(&truth.blob_id) && line.contains("416");
    assert!(node.lines().iter().any(named));
    std::fs::write(&file, [&whole[..], b"more than declared"].concat()).unwrap();
    assert_eq!(node.read_all(&truth, &object, 2), 0);
}

#[test]
fn dead_registry_of_one_image_does_not_hold_up_another() {
    let (dead, alive) = (Registry::with_images(&[]), Registry::with_images(&[]));
    let (cache, sick, well) = (cache(), Truth::of("lz4-1m"), Truth::of("zstd-64k"));
    let options = Options { deadline_ms: 15_000, timeout_s: 10, ..Options::default() };
    let node = Node::start(cache.path(), &options);
    node.register(&sick, dead.address(), &options);
    node.register(&well, alive.address(), &options);
    dead.fault(json!([{"blob": "", "effect": {"hang": true}}]));
    let (sick_object, well_object) = (node.open(&sick), node.open(&well));
    let waiting: Vec<_> = sick
        .chunks()
        .map(|chunk| node.kernel.ask_read(&sick_object, pages(sick.range(chunk))))
        .collect();
    assert_eq!(node.read_all(&well, &well_object, 5), 0);
    let answered = waiting.iter().filter(|answer| answer.try_recv().is_ok()).count();
    assert_eq!(answered, 0, "the healthy image was read while all readers of the sick one waited");
    dead.heal();
    for answer in waiting {
        answer.recv_timeout(support::kernel::PATIENCE).expect("each read is answered once");
    }
}

#[test]
fn lost_cache_is_fetched_again() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("lz4-1m"), Options::default());
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    assert_eq!(node.read_all(&truth, &object, 1), 0);
    node.kernel.lose(&truth.domain, &truth.blob_id);
    assert_eq!(node.read_all(&truth, &object, 2), 0);
}

#[test]
fn strange_messages_are_refused_and_the_daemon_goes_on() {
    let registry = Registry::with_images(&[]);
    let (cache, truth, options) = (cache(), Truth::of("lz4-1m"), Options::default());
    let node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    assert_eq!(node.kernel.open("lz4-1m", "unknown").err(), Some(nix::libc::ENOENT));
    assert_eq!(node.kernel.open("unknown", "lz4-1m").err(), Some(nix::libc::ENOENT));
    let object = node.open(&truth);
    // An open whose keys run over its end: refused, and its file is closed.
    let (fd, watch) = support::kernel::watched_fd();
    let mut payload = Vec::new();
    for field in [1000u32, 1000, fd as u32, 0] {
        payload.extend(field.to_ne_bytes());
    }
    node.kernel.send(&support::kernel::message(support::kernel::UNTRACKED, 0, 77, &payload));
    for bad in [&b"x"[..], &[0; 16], &[0xff; 64]] {
        node.kernel.send(bad);
    }
    node.kernel.send(&support::kernel::message(support::kernel::UNTRACKED + 1, 2, 4711, &[1; 16]));
    assert_eq!(node.read_all(&truth, &object, 1), 0);
    assert!(support::kernel::is_closed(&watch), "the file of a refused open is closed");
    // Closed while a read is under way: the read is still answered.
    node.kernel.lose(&truth.domain, &truth.blob_id);
    registry.fault(json!([{"blob": "", "effect": {"latency_ms": 100}}]));
    let answer = node.kernel.ask_read(&object, 0..4096);
    node.kernel.close(&object);
    answer.recv_timeout(support::kernel::PATIENCE).expect("the read is answered");
    registry.heal();
    let object = node.open(&truth);
    assert_eq!(node.read_all(&truth, &object, 2), 0);
}

#[test]
fn shutdown_under_load_leaves_no_request_and_no_thread() {
    let registry = Registry::with_images(&[]);
    let (cache, truth) = (cache(), Truth::of("lz4-1m"));
    let options = Options { timeout_s: 30, deadline_ms: 60_000, ..Options::default() };
    let mut node = Node::start(cache.path(), &options);
    node.register(&truth, registry.address(), &options);
    let object = node.open(&truth);
    registry.fault(json!([{"blob": "", "effect": {"hang": true}}]));
    let waiting: Vec<_> = truth
        .chunks()
        .map(|chunk| node.kernel.ask_read(&object, pages(truth.range(chunk))))
        .collect();
    node.stop();
    assert_eq!(node.kernel.unanswered(), 0);
    drop(waiting);
}

fn pages(range: std::ops::Range<u64>) -> std::ops::Range<u64> {
    range.start / 4096 * 4096..range.end.next_multiple_of(4096)
}
