//! The codec of /dev/cachefiles: messages in, answers out.
//!
//! `cargo bench --bench upcall`.

use criterion::{Criterion, criterion_group, criterion_main};
use sluice::upcall::cachefiles::{MessageId, copen, parse};
use std::hint::black_box;

fn message(opcode: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in [7, opcode, 16 + payload.len() as u32, 9] {
        bytes.extend(field.to_ne_bytes());
    }
    bytes.extend(payload);
    bytes
}

fn codec(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("cachefiles");
    let mut range = (1u64 << 30).to_ne_bytes().to_vec();
    range.extend((128u64 << 10).to_ne_bytes());
    let read = message(2, &range);
    group.bench_function("parse a read", |bench| bench.iter(|| black_box(parse(&read).is_ok())));
    let (volume, cookie) = (b"erofs,demo\0", [b'a'; 64]);
    let mut keys = Vec::new();
    for field in [volume.len() as u32, cookie.len() as u32, 5, 0] {
        keys.extend(field.to_ne_bytes());
    }
    keys.extend(volume);
    keys.extend(cookie);
    let open = message(0, &keys);
    group.bench_function("parse an open", |bench| bench.iter(|| black_box(parse(&open).is_ok())));
    let mut text = [0; 64];
    group.bench_function("answer an open", |bench| {
        bench.iter(|| black_box(copen(MessageId(7), Ok(1 << 30), &mut text)));
    });
    group.finish();
}

criterion_group!(benches, codec);
criterion_main!(benches);
