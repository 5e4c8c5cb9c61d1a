//! Policy in nanoseconds: the presence map, planning a GET, noticing a stream.
//!
//! `cargo bench --bench blob`.

use criterion::{Criterion, criterion_group, criterion_main};
use sluice::blob::map::Map;
use sluice::blob::plan::Run;
use sluice::blob::schedule::Streams;
use sluice::engine::CoreId;
use sluice::image::identity::ChunkIndex;
use sluice::image::layout::Unit;
use std::hint::black_box;

const CHUNKS: u32 = 16 * 1024;

fn presence(criterion: &mut Criterion) {
    let core = CoreId(0);
    let mut group = criterion.benchmark_group("presence map");
    let map = Map::new(CHUNKS);
    let mut next = 0;
    let mut step = move || {
        next = (next + 7919) % CHUNKS;
        ChunkIndex(next)
    };
    group.bench_function("state", |bench| bench.iter(|| black_box(map.state(step()))));
    group.bench_function("claim and release", |bench| {
        bench.iter(|| {
            let chunk = step();
            let claimed = map.claim(chunk, core).is_ok();
            map.release(chunk, core);
            black_box(claimed)
        });
    });
    group.bench_function("claim, publish, forget", |bench| {
        bench.iter(|| {
            let chunk = step();
            let claimed = map.claim(chunk, core).is_ok();
            let published = map.publish(chunk, core);
            map.forget(chunk);
            black_box((claimed, published))
        });
    });
    group.finish();
}

fn planning(criterion: &mut Criterion) {
    let unit = |number: u32| Unit {
        compressed_offset: u64::from(number) * 30_000,
        compressed_size: 30_000,
        chunks: number..number + 1,
        uncompressed_offset: u64::from(number) * 65_536,
        output_size: 65_536,
    };
    criterion.bench_function("plan a GET of 16 units", |bench| {
        bench.iter(|| {
            let mut run = Run::of(0, &unit(0));
            let joined = (1..16).filter(|&number| run.extend(number, &unit(number))).count();
            black_box((joined, run.compressed.end))
        });
    });
    let streams = Streams::default();
    let mut at = 0;
    criterion.bench_function("notice a random fault", |bench| {
        bench.iter(|| {
            at = (at + (977 << 20)) % (1 << 40);
            black_box(streams.observe(&(at..at + 4096), 1 << 40))
        });
    });
}

criterion_group!(benches, presence, planning);
criterion_main!(benches);
