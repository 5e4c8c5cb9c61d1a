//! Nanoseconds of HTTP heads: writing a range request, parsing the answer to it.
//!
//! `cargo bench --bench http`

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use sluice::registry::http::{Method, RequestHead, check_range, parse_response};

const RESPONSE: &[u8] = b"HTTP/1.1 206 Partial Content\r\nAccept-Ranges: bytes\r\n\
    Cache-Control: max-age=31536000\r\nContent-Length: 262144\r\n\
    Content-Range: bytes 1048576-1310719/209715200\r\nContent-Type: application/octet-stream\r\n\
    Docker-Content-Digest: \
    sha256:4d37c03fbeb86c36069fa172dbc78997d7432339a2d01f9fb3b9a51e497ac06d\r\n\
    Docker-Distribution-Api-Version: registry/2.0\r\n\
    Etag: \"sha256:4d37c03fbeb86c36069fa172dbc78997d7432339a2d01f9fb3b9a51e497ac06d\"\r\n\
    Date: Thu, 01 Jan 2026 00:00:00 GMT\r\n\r\n";

fn heads(criterion: &mut Criterion) {
    let range = 1_048_576..1_310_720;
    criterion.bench_function("http/parse_range_response", |bencher| {
        bencher.iter(|| {
            let head = parse_response(black_box(RESPONSE), Method::Get).expect("valid");
            check_range(&head.expect("complete"), &range).expect("the range asked for")
        });
    });
    let mut buffer = [0_u8; 1024];
    let token = "a".repeat(400);
    criterion.bench_function("http/write_range_request", |bencher| {
        bencher.iter(|| {
            let target = ["/v2/", "library/ubuntu", "/blobs/sha256:", black_box("4d37c03f")];
            let mut head = RequestHead::new(&mut buffer, Method::Get, &target, "r.example");
            head.header("Authorization", &["Bearer ", &token]);
            head.range(&range);
            head.finish().expect("it fits")
        });
    });
}

criterion_group!(benches, heads);
criterion_main!(benches);
