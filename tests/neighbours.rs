//! What one image's registry, configuration or readers do is nobody else's trouble.

mod support;

use serde_json::{Value, json};
use sluice::blob::registration::PrefetchConfig;
use sluice::blob::statistics::Counter;
use sluice::registry::config::Backend;
use support::daemon::comes_true;
use support::kernel::{Object, UNTRACKED, message};
use support::node::{Node, Options, cache};
use support::registry::Registry;
use support::truth::Truth;

/// Longer than any test waits.
const DEADLINE_MS: u64 = 200_000;
const CLOSE: u32 = 1;

fn backend(address: &str, repo: &str) -> Backend {
    let config = json!({
        "scheme": "http", "host": address, "repo": repo, "timeout": 200, "connect_timeout": 1,
    });
    Backend::parse("registry", &config).expect("a good backend")
}

fn one_core() -> Options {
    Options { cores: 1, deadline_ms: DEADLINE_MS, ..Options::default() }
}

/// So many images, each with a repository of its own at one address; opened.
fn copies(node: &Node, truth: &Truth, address: &str, count: usize) -> Vec<Object> {
    let open = |number| {
        let name = format!("copy{number}");
        let prefetch = PrefetchConfig::default();
        node.register_as(&name, truth, backend(address, &name), prefetch);
        node.kernel.open(&name, &truth.blob_id).expect("it is registered")
    };
    (0..count).map(open).collect()
}

#[test]
fn mirror_with_wrong_bytes_is_gone_around() {
    let (mirror, origin) = (Registry::with_images(&[]), Registry::with_images(&[]));
    let (cache, truth) = (cache(), Truth::of("zstd-64k"));
    let node = Node::start(cache.path(), &Options::default());
    let config = json!({
        "scheme": "http", "host": origin.address(), "repo": "zstd-64k",
        "mirrors": [{"host": format!("http://{}", mirror.address())}],
    });
    node.register_at(&truth, Backend::parse("registry", &config).expect("a good backend"));
    let unit = truth.layout.unit(truth.layout.unit_count() / 2);
    let place = unit.compressed_offset + u64::from(unit.compressed_size) / 2;
    mirror.fault(json!([{"blob": truth.blob_id, "effect": {"flip_bit": place}}]));
    let object = node.open(&truth);
    assert_eq!(node.read_all(&truth, &object, 3), 0);
    assert!(node.count(Counter::DigestFailures) + node.count(Counter::BadChunks) > 0);
}

fn page_at(at: u64) -> std::ops::Range<u64> {
    at / 4096 * 4096..(at / 4096 + 1) * 4096
}

/// So many images of a host that does nothing but this are read, each at these places of its blob,
/// and wait; another host's image is read beside them.
fn is_read_beside_a_dead_host(effect: &Value, sick: &Truth, count: usize, places: &[u64]) {
    let (dead, alive) = (Registry::with_images(&[]), Registry::with_images(&[]));
    let (cache, well) = (cache(), Truth::of("lz4-1m"));
    let node = Node::start(cache.path(), &one_core());
    node.register_at(&well, backend(alive.address(), &well.domain));
    let well_object = node.open(&well);
    dead.fault(json!([{"blob": "", "effect": effect}]));
    let objects = copies(&node, sick, dead.address(), count);
    node.were_in_use();
    let ask = |object| places.iter().map(move |&at| (object, page_at(at)));
    let waiting: Vec<_> = objects
        .iter()
        .flat_map(ask)
        .map(|(object, range)| node.kernel.ask_read(object, range))
        .collect();
    assert_eq!(node.read_all(&well, &well_object, 5), 0);
    assert!(waiting.iter().all(|answer| answer.try_recv().is_err()), "the sick ones still wait");
}

#[test]
fn dead_host_of_many_repositories_holds_up_no_other() {
    let sick = Truth::of("zstd-64k");
    // Backwards, or it would be read ahead.
    let mut places: Vec<_> = sick.chunks().take(24).map(|chunk| sick.range(chunk).start).collect();
    places.reverse();
    for effect in [json!({"hang": true}), json!({"status": 503}), json!({"too_many": 60})] {
        // More of them than a core serves at once.
        is_read_beside_a_dead_host(&effect, &sick, 25, &places);
    }
}

#[test]
fn failing_repository_leaves_room_for_others_of_its_host() {
    let registry = Registry::with_images(&[]);
    let (cache, sick, well) = (cache(), Truth::of("zstd-64k"), Truth::of("lz4-1m"));
    let node = Node::start(cache.path(), &one_core());
    let [sick_object, well_object] = [&sick, &well].map(|truth| {
        node.register_at(truth, backend(registry.address(), &truth.domain));
        node.open(truth)
    });
    registry.fault(json!([{"blob": sick.blob_id, "effect": {"status": 503}}]));
    node.were_in_use();
    let mut places: Vec<_> = sick.chunks().map(|chunk| sick.range(chunk).start).collect();
    places.reverse();
    let ask = |&at: &u64| node.kernel.ask_read(&sick_object, page_at(at));
    let waiting: Vec<_> = places.iter().take(300).map(ask).collect();
    assert!(waiting.len() > 40, "more than its host has connections");
    assert!(comes_true(|| node.count(Counter::Retries) > 100), "they are patient");
    assert_eq!(node.read_all(&well, &well_object, 5), 0);
    assert!(waiting.iter().all(|answer| answer.try_recv().is_err()), "the sick ones still wait");
}

#[test]
fn prefetch_goes_on_beside_readers_of_a_dead_host() {
    let (dead, alive) = (Registry::with_images(&[]), Registry::with_images(&[]));
    let (cache, sick, well) = (cache(), Truth::of("zstd-64k"), Truth::of("lz4-1m"));
    let node = Node::start(cache.path(), &one_core());
    dead.fault(json!([{"blob": "", "effect": {"hang": true}}]));
    let objects = copies(&node, &sick, dead.address(), 8);
    node.were_in_use();
    let places = sick.chunks().take(24).map(|chunk| sick.range(chunk).start);
    let asked = places.flat_map(|at| objects.iter().map(move |object| (object, page_at(at))));
    let _waiting: Vec<_> = asked.map(|(object, at)| node.kernel.ask_read(object, at)).collect();
    let prefetch = PrefetchConfig { enable: true, ..PrefetchConfig::default() };
    node.register_as("well", &well, backend(alive.address(), "lz4-1m"), prefetch);
    let _object = node.kernel.open("well", &well.blob_id).expect("known");
    let all = well.chunks().count() as u64;
    assert!(comes_true(|| node.count(Counter::ChunksFilled) == all), "all of it is prefetched");
}

#[test]
fn context_tables_that_do_not_come_leave_memory_for_others() {
    for effect in [json!({"hang": true}), json!({"status": 503})] {
        is_read_beside_a_dead_host(&effect, &Truth::of("zran"), 80, &[0]);
    }
}

#[test]
fn prefetch_from_a_dead_host_lets_others_go_first() {
    let (dead, alive) = (Registry::with_images(&[]), Registry::with_images(&[]));
    let (cache, sick, well) = (cache(), Truth::of("zstd-64k"), Truth::of("lz4-1m"));
    let node = Node::start(cache.path(), &one_core());
    dead.fault(json!([{"blob": "", "effect": {"hang": true}}]));
    let prefetch =
        PrefetchConfig { enable: true, merging_size_bytes: 64 << 10, ..PrefetchConfig::default() };
    node.register_as("sick", &sick, backend(dead.address(), "sick"), prefetch.clone());
    node.register_as("well", &well, backend(alive.address(), "lz4-1m"), prefetch);
    let open = |domain, truth: &Truth| node.kernel.open(domain, &truth.blob_id).expect("known");
    let _objects = (open("sick", &sick), open("well", &well));
    let all = well.chunks().count() as u64;
    assert!(
        comes_true(|| node.count(Counter::ChunksFilled) == all),
        "prefetched beside a dead host"
    );
}

#[test]
fn prefetch_begins_anew_when_its_registry_was_away() {
    let registry = Registry::with_images(&[]);
    let (cache, truth) = (cache(), Truth::of("zstd-64k"));
    let node = Node::start(cache.path(), &one_core());
    registry.fault(json!([{"blob": truth.blob_id, "effect": {"status": 404}}]));
    let prefetch = PrefetchConfig { enable: true, ..PrefetchConfig::default() };
    node.register_as("away", &truth, backend(registry.address(), "zstd-64k"), prefetch);
    let _object = node.kernel.open("away", &truth.blob_id).expect("known");
    let says_so = |line: &String| line.contains("prefetch goes on in");
    assert!(comes_true(|| node.lines().iter().any(says_so)), "it says that it failed");
    assert_eq!(node.count(Counter::ChunksFilled), 0);
    registry.heal();
    let all = truth.chunks().count() as u64;
    assert!(comes_true(|| node.count(Counter::ChunksFilled) == all), "all of it is prefetched");
}

#[test]
fn narrow_bandwidth_of_one_image_is_not_the_others() {
    let registry = Registry::with_images(&[]);
    let (cache, slow, well) = (cache(), Truth::of("zstd-64k"), Truth::of("lz4-1m"));
    let node = Node::start(cache.path(), &one_core());
    let prefetch = PrefetchConfig { enable: true, ..PrefetchConfig::default() };
    let narrow = PrefetchConfig { bandwidth_bytes_per_second: 1, ..prefetch.clone() };
    node.register_as("slow", &slow, backend(registry.address(), "zstd-64k"), narrow);
    node.register_as("well", &well, backend(registry.address(), "lz4-1m"), prefetch);
    let open = |domain, truth: &Truth| node.kernel.open(domain, &truth.blob_id).expect("known");
    let _objects = (open("slow", &slow), open("well", &well));
    let filled = || node.count(Counter::PrefetchBytes);
    let size = |truth: &Truth| {
        truth.chunks().map(|chunk| u64::from(truth.layout.chunk(chunk).padded_size())).sum::<u64>()
    };
    assert!(comes_true(|| filled() >= size(&well)), "prefetched beside it");
    assert!(filled() < size(&well) + size(&slow) / 2, "the narrow one waits for its bandwidth");
}

#[test]
fn prefetch_in_tiny_steps_is_done_in_sensible_ones() {
    let registry = Registry::with_images(&[]);
    let (cache, truth) = (cache(), Truth::of("zstd-64k"));
    let node = Node::start(cache.path(), &one_core());
    let prefetch =
        PrefetchConfig { enable: true, merging_size_bytes: 1, ..PrefetchConfig::default() };
    node.register_as("tiny", &truth, backend(registry.address(), "zstd-64k"), prefetch);
    let _object = node.kernel.open("tiny", &truth.blob_id).expect("known");
    let all = truth.chunks().count() as u64;
    assert!(comes_true(|| node.count(Counter::ChunksFilled) == all), "all of it is prefetched");
    let steps = (truth.bytes.len() as u64).div_ceil(64 << 10);
    assert!(node.count(Counter::PrefetchRequests) <= steps + 1);
}

#[test]
fn crowd_of_closed_objects_holds_up_no_reader() {
    let registry = Registry::with_images(&[]);
    let (cache, truth) = (cache(), Truth::of("lz4-1m"));
    let node = Node::start(cache.path(), &one_core());
    node.register_at(&truth, backend(registry.address(), &truth.domain));
    let object = node.open(&truth);
    for number in 0..10_000 {
        node.kernel.send(&message(UNTRACKED + number, CLOSE, UNTRACKED + number, &[]));
    }
    assert_eq!(node.read_all(&truth, &object, 1), 0);
}
