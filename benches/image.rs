//! Nanoseconds of the image formats: parsing, looking up, decoding with digest.
//!
//! `cargo bench --bench image`. Data is what the fixtures were made of, so ratios are those of
//! ordinary files; lookups are in a blob of 100 000 chunks of 64 KiB.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use sluice::image::codec::Codec;
use sluice::image::{Bootstrap, ChunkIndex, Compressor, ContextTable, Decoder};
use sluice::image::{DigestAlgorithm, KernelView, Layout, Segmentation};
use std::hint::black_box;
use std::io::{Read, Write};

const CHUNKS: u32 = 100_000;
const CHUNK_BYTES: u64 = 0x10000;

fn fixture(path: &str) -> Vec<u8> {
    std::fs::read(format!("{}/tests/fixtures/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// The bootstrap of a fixture, its chunk table replaced by one of `CHUNKS` entries.
fn large_bootstrap() -> Vec<u8> {
    const STORED_BYTES: u64 = 30_000;
    let mut bytes = fixture("zstd-64k/image.boot");
    let table = bytes.len() as u64;
    for index in 0..CHUNKS {
        let (start, stored) = (u64::from(index) * CHUNK_BYTES, u64::from(index) * STORED_BYTES);
        bytes.extend(DigestAlgorithm::Blake3.digest(&index.to_le_bytes()).0);
        for word in [0, 1, STORED_BYTES as u32, CHUNK_BYTES as u32] {
            bytes.extend(word.to_le_bytes());
        }
        let _ = [stored, start, 0].map(|long| bytes.extend(long.to_le_bytes()));
        let _ = [index, 0].map(|word| bytes.extend(word.to_le_bytes()));
    }
    bytes.resize(bytes.len().next_multiple_of(4096), 0);
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    let space = u64::from(CHUNKS) * CHUNK_BYTES;
    put(1152 + 24, &table.to_le_bytes());
    put(1152 + 32, &(u64::from(CHUNKS) * 80).to_le_bytes());
    put(1408 + 64, &((space / 4096) as u32).to_le_bytes());
    put(4096 + 72, &CHUNKS.to_le_bytes());
    put(4096 + 96, &space.to_le_bytes());
    put(4096 + 112, &(u64::from(CHUNKS) * STORED_BYTES).to_le_bytes());
    bytes
}

fn parse(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("bootstrap");
    for (name, bytes) in [("331 chunks", fixture("lz4-1m/image.boot")), ("100k", large_bootstrap())]
    {
        let bytes: std::sync::Arc<[u8]> = bytes.into();
        let parse = || Bootstrap::parse(bytes.clone()).unwrap();
        group.bench_function(format!("parse {name}"), |bench| bench.iter(parse));
        let bootstrap = parse();
        let build = || Layout::build(&bootstrap, 0, None).unwrap();
        group.bench_function(format!("layout {name}"), |bench| bench.iter(build));
        let cut = || Segmentation::of_image(&bootstrap).unwrap();
        group.bench_function(format!("segments {name}"), |bench| bench.iter(cut));
    }
    let bootstrap = Bootstrap::parse(fixture("lz4-1m/image.boot")).unwrap();
    let walk = || bootstrap.tree().walk().count();
    group.bench_function("walk 387 inodes", |bench| bench.iter(walk));
    let cut = Segmentation::of_image(&bootstrap).unwrap();
    let view = || KernelView::derive(&bootstrap, &cut).unwrap();
    group.bench_function("view 387 inodes", |bench| bench.iter(view));
}

fn look_up(criterion: &mut Criterion) {
    let bootstrap = Bootstrap::parse(large_bootstrap()).unwrap();
    let layout = Layout::build(&bootstrap, 0, None).unwrap();
    let mut group = criterion.benchmark_group("lookup");
    // A stride that visits the blob in no order a cache would like.
    let mut at = 0u64;
    let mut next = || {
        at = (at + 0x9e37_79b9_7f4a_7c15 % layout.uncompressed_size()) % layout.uncompressed_size();
        at
    };
    group.bench_function("chunks_in", |bench| {
        bench.iter(|| {
            let start = next();
            layout.chunks_in(start..start + 0x20000)
        });
    });
    group.bench_function("chunk", |bench| {
        bench.iter(|| layout.chunk(ChunkIndex((next() / CHUNK_BYTES) as u32)));
    });
    group.bench_function("unit", |bench| {
        bench.iter(|| layout.unit((next() / CHUNK_BYTES) as u32));
    });
}

fn compress(compressor: Compressor, plain: &[u8]) -> Vec<u8> {
    match compressor {
        Compressor::None => plain.to_vec(),
        Compressor::Lz4Block => lz4_flex::block::compress(plain),
        Compressor::Zstd => zstd::bulk::compress(plain, 3).unwrap(),
        Compressor::Gzip => {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), Default::default());
            encoder.write_all(plain).unwrap();
            encoder.finish().unwrap()
        }
    }
}

fn codecs(criterion: &mut Criterion) {
    let source = fixture("source.tar.gz");
    let mut data = Vec::new();
    flate2::read::MultiGzDecoder::new(&source[..]).read_to_end(&mut data).unwrap();
    let mut codec = Codec::new();
    let mut group = criterion.benchmark_group("codec");
    for (size, name) in [(64 << 10, "64 KiB"), (1 << 20, "1 MiB")] {
        // Behind a file of random bytes, which no codec shrinks.
        let plain = &data[1 << 20..][..size];
        let mut output = vec![0; size];
        group.throughput(Throughput::Bytes(size as u64));
        for compressor in
            [Compressor::None, Compressor::Lz4Block, Compressor::Zstd, Compressor::Gzip]
        {
            let stored = compress(compressor, plain);
            for digest in [DigestAlgorithm::Blake3, DigestAlgorithm::Sha256] {
                group.bench_function(format!("{compressor}+{digest} {name}"), |bench| {
                    bench.iter(|| {
                        codec.decompress(compressor, black_box(&stored), &mut output).unwrap();
                        digest.digest(&output)
                    });
                });
            }
        }
    }
}

fn zran(criterion: &mut Criterion) {
    let bootstrap = Bootstrap::parse(fixture("zran/image.boot")).unwrap();
    let record = &bootstrap.blobs()[0];
    let meta = record.meta_digest.unwrap();
    let meta = fixture(&format!("zran/{meta}"));
    let (table, header) = meta.split_at(record.ci_compressed_size as usize);
    let header = &header[..4096];
    let parse = || ContextTable::parse(record, table, header).unwrap();
    let context = parse();
    let layout = Layout::build(&bootstrap, 0, Some(&context)).unwrap();
    let blob = fixture("source.tar.gz");
    let unit = layout.unit(0);
    let stored = &blob[unit.compressed_offset as usize..][..unit.compressed_size as usize];
    let mut output = vec![0; unit.output_size as usize];
    let mut decoder = Decoder::new();
    let mut group = criterion.benchmark_group("zran");
    group.bench_function("parse context table", |bench| bench.iter(parse));
    group.throughput(Throughput::Bytes(output.len() as u64));
    group.bench_function("decode context", |bench| {
        bench.iter(|| decoder.decode_unit(&layout, 0, black_box(stored), &mut output).unwrap());
    });
}

criterion_group!(benches, parse, look_up, codecs, zran);
criterion_main!(benches);
