//! Every parser against mutated input: it must return, in time and within bounds.
//!
//! Each test replays the kept corpus in `tests/corpus/<target>`, then mutates it for
//! `FUZZ_SECONDS` (3 if not set; 600 for a long run):
//! `FUZZ_SECONDS=600 cargo test --release --test fuzz`. An input whose outcome has not been seen
//! before joins the pool that is mutated further: outcomes are error texts without their numbers,
//! a poor man's coverage. A failing input is kept under the target directory, and its path is in
//! the message; put it into the corpus when the fault is fixed. `FUZZ_SEED` repeats a run.
//!
//! To add a parser: a function from bytes to an outcome, a test that calls `fuzz`, and seeds.

use prost::Message as _;
use sluice::daemon::api::route;
use sluice::daemon::entry::Entry;
use sluice::daemon::http::{Progress, parse as parse_request};
use sluice::error::{Error, Result};
use sluice::image::layer::read_bootstrap;
use sluice::image::manifest::{Document, Platform};
use sluice::image::toc::{BOOTSTRAP_NAME, TAIL_BYTES, Tail};
use sluice::image::{
    Bootstrap, ChunkIndex, ContextTable, Decoder, KernelView, Layout, Segmentation,
};
use sluice::plug::containerd_messages::CreateSnapshotRequest;
use sluice::plug::labels;
use sluice::plug::snapshot_filter::Filters;
use sluice::registry::auth::{Challenge, parse_challenges, parse_token};
use sluice::registry::config::Backend;
use sluice::registry::credentials::DockerConfig;
use sluice::registry::framing::Decoder as Framed;
use sluice::registry::http::{Method, Span, check_range, parse_response};
use sluice::registry::origin::Location;
use sluice::registry::redirects::life_ns;
use sluice::registry::reference::Reference;
use sluice::registry::timestamp::parse_retry_after_ms;
use sluice::upcall::cachefiles::{open_fd, parse as parse_message};
use sluice::upcall::fanotify::parse as parse_events;
use sluice::upcall::mountinfo;
use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

/// A single run may not take longer: whatever the input, it is small.
const RUN_LIMIT: Duration = Duration::from_secs(10);
/// Address space of this process: an allocation by a wild length aborts it.
const MEMORY_LIMIT_BYTES: u64 = 8 << 30;
const POOL_MAX: usize = 4000;
/// Mutated inputs do not grow beyond.
const INPUT_MAX_BYTES: usize = 1 << 20;

fn fixture_bootstraps() -> Vec<Vec<u8>> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let images = ["lz4-1m", "zstd-64k", "zran"];
    images.map(|name| std::fs::read(fixtures.join(name).join("image.boot")).unwrap()).into()
}

#[test]
fn bootstraps() {
    fuzz("bootstrap", fixture_bootstraps(), |input| walk(&Bootstrap::parse(input)?));
}

/// What the kernel would mount is no larger than it says, and every chunk is in a segment.
#[test]
fn views() {
    let seeds = [fixture_bootstraps(), corpus("bootstrap")].concat();
    fuzz("view", seeds, |input| {
        let bootstrap = Bootstrap::parse(input)?;
        let segmentations = Segmentation::of_image(&bootstrap)?;
        for (blob, cut) in segmentations.iter().enumerate() {
            for chunk in bootstrap.chunks_of(blob as u32) {
                let segment = cut.segment(cut.place_of(chunk.index).expect("it is listed"));
                let end = chunk.uncompressed_offset + u64::from(chunk.uncompressed_size);
                assert!(segment.base <= chunk.uncompressed_offset);
                assert!(end <= segment.base + segment.size);
            }
        }
        let view = KernelView::derive(&bootstrap, &segmentations)?;
        let devices = segmentations.iter().map(Segmentation::count).sum::<u32>();
        assert_eq!(view.devices.len(), devices as usize);
        assert!(view.metadata.len().is_multiple_of(4096));
        let blocks = u32::from_le_bytes(view.metadata[1060..1064].try_into().unwrap());
        assert_eq!(blocks as usize * 4096, view.metadata.len());
        Ok(())
    });
}

#[test]
fn images() {
    fuzz("image", Vec::new(), read_image);
}

#[test]
fn tails() {
    fuzz("tail", Vec::new(), |input| {
        let tail = &input[input.len().saturating_sub(TAIL_BYTES)..];
        match Tail::parse(tail, input.len() as u64)? {
            Tail::Toc(toc) => {
                let entry = toc.find(BOOTSTRAP_NAME)?;
                let range = entry.range();
                entry.extract(&input[range.start as usize..range.end as usize]).map(drop)
            }
            Tail::Bootstrap(range) => {
                assert!(range.start <= range.end && range.end <= input.len() as u64);
                Ok(())
            }
            Tail::Plain => Ok(()),
        }
    });
}

#[test]
fn manifests() {
    fuzz("manifest", Vec::new(), |input| match Document::parse(input)? {
        Document::Index(index) => index.choose(&Platform::here()).map(drop),
        Document::Manifest(manifest) => {
            let layers = manifest.nydus_layers()?;
            layers.blobs.iter().try_for_each(|blob| blob.blob_id().map(drop))
        }
    });
}

#[test]
fn layers() {
    fuzz("layer", Vec::new(), |input| read_bootstrap(input).map(drop));
}

/// A response head and the body behind it, as a connection reads them.
#[test]
fn responses() {
    let seeds: [&[u8]; 3] = [
        b"HTTP/1.1 206 P\r\nContent-Range: bytes 5-9/20\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 206 P\r\nContent-Range: bytes 5-9/*\r\nTransfer-Encoding: chunked\r\n\r\n\
          3;x=y\r\nhel\r\n2\r\nlo\r\n0\r\nT: v\r\n\r\n",
        b"HTTP/1.1 401 U\r\nWWW-Authenticate: Bearer realm=\"https://a/t\",service=\"s\"\r\n\
          Location: ../x?y\r\nRetry-After: Sun, 06 Nov 1994 08:49:37 GMT\r\n\r\n",
    ];
    fuzz("response", seeds.map(<[u8]>::to_vec).into(), read_response);
}

fn read_response(input: &[u8]) -> Result<()> {
    let Some(head) = parse_response(input, Method::Get)? else { return Ok(()) };
    let base = Location::parse("https://h/v2/")?;
    let text = |span: Span| span.text(input).unwrap_or_default().to_owned();
    for challenge in parse_challenges(&text(head.challenges[0])) {
        if let Challenge::Bearer(bearer) = challenge {
            bearer.token_location(&bearer.realm(&base.origin)?, "scope")?;
        }
    }
    parse_retry_after_ms(&text(head.retry_after), 0);
    if head.status != 206 {
        let joined = base.join(&text(head.location))?;
        life_ns(&joined, 0);
        return Ok(());
    }
    check_range(&head, &(5..10))?;
    let (mut body, mut at, mut output) = (Framed::new(head.framing), head.size, [0; 3]);
    while !body.is_done() && at < input.len() {
        let step = body.decode(&input[at..input.len().min(at + 7)], &mut output)?;
        assert!(step.consumed > 0 && step.produced <= step.consumed);
        at += step.consumed;
    }
    body.closed()
}

#[test]
fn registry_documents() {
    let seeds = [
        r#"{"auths":{"h":{"auth":"dTpw"},"docker.io":{"identitytoken":"i"}},"credsStore":"x"}"#,
        r#"{"token":"t","expires_in":300,"issued_at":"2024-02-29T12:00:00.5+01:00"}"#,
        r#"{"host":"h:1","repo":"a/b","auth":"dTpw","proxy":{"url":"http://u:p@p"},
            "mirrors":[{"host":"http://m/x","headers":{"A":"b"},"ping_url":"http://m/p"}]}"#,
        "localhost:5000/a/b:tag",
    ];
    fuzz("registry", seeds.map(|seed| seed.as_bytes().to_vec()).into(), |input| {
        let text = String::from_utf8_lossy(input);
        if let Ok(value) = serde_json::from_slice(input) {
            drop((Backend::parse("registry", &value), parse_token(input, 0, 0)));
        }
        if let Ok(reference) = Reference::parse(&text) {
            assert_eq!(Reference::parse(&reference.to_string())?, reference);
        }
        DockerConfig::parse(input)?.find("docker.io").map(drop)
    });
}

/// What the kernel's device says.
#[test]
fn messages() {
    let mut read = Vec::new();
    for field in [7u32, 2, 32, 9, 4096, 0, 4096, 0] {
        read.extend(field.to_ne_bytes());
    }
    let mut open = Vec::new();
    for field in [7u32, 0, 47, 9, 11, 4, 5, 0] {
        open.extend(field.to_ne_bytes());
    }
    open.extend(b"erofs,demo\0demo");
    fuzz("message", vec![read, open], |input| {
        let _ = open_fd(input);
        parse_message(input).map(drop)
    });
}

/// What a fanotify group says, and the kernel's list of mounts.
#[test]
fn events() {
    let mut event = Vec::new();
    for field in [48u32, 3 | 24 << 16, 0x10_0000, 0, 9, 77, 6 | 24 << 16, 0, 4096, 0, 65536, 0] {
        event.extend(field.to_ne_bytes());
    }
    let line = b"40 22 0:40 / /mnt/a\\040b ro shared:7 - erofs none ro,fsid=demo\n";
    fuzz("event", vec![event.repeat(3), event, line.to_vec()], |input| {
        mountinfo::parse(input);
        let events = parse_events(input).collect::<Result<Vec<_>>>()?;
        assert!(events.iter().all(|event| event.range.start <= event.range.end));
        Ok(())
    });
}

/// What containerd's clients say of snapshots: filters, labels, and the messages they come in.
#[test]
fn snapshot_requests() {
    let filter = br#"labels."containerd.io/snapshot.ref"==sha256:5b,parent=="a\x41/b",name~=|^k/|"#;
    let labels = [("containerd.io/snapshot/cri.image-ref", "r.example:5000/app:1")];
    let labels = labels.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let (key, parent) = ("k".to_owned(), "p".to_owned());
    let message =
        CreateSnapshotRequest { key, parent, labels: labels.into(), ..Default::default() };
    fuzz("snapshot", vec![filter.to_vec(), message.encode_to_vec()], |input| {
        let text = String::from_utf8_lossy(input).into_owned();
        if let Ok(filters) = Filters::parse(std::slice::from_ref(&text)) {
            filters.matches(|path| (path.len() > 1).then_some("k/1"));
            return Ok(());
        }
        let message = CreateSnapshotRequest::decode(input)
            .map_err(|error| Error::Malformed(error.to_string()))?;
        let labels = message.labels.into_iter().collect();
        labels::backend(&labels, labels::is_loopback).map(drop)
    });
}

/// What a client of the control API sends, and the entries it registers.
#[test]
fn control_requests() {
    let seeds = [
        "PUT /api/v2/blobs HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}",
        "GET /api/v2/blobs?domain_id=d&blob_id=b HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "PUT /api/v1/config?id=/ HTTP/1.1\r\nContent-Length: 27\r\n\r\n\
         {\"registry_auth\":\"dTpw\"}  \n",
        r#"{"type":"bootstrap","id":"i","config":{"backend_type":"registry","backend_config":
            {"host":"h","repo":"r"},"cache_type":"fscache","cache_config":{"work_dir":"."},
            "metadata_path":"/b"}}"#,
    ];
    fuzz("control", seeds.map(|seed| seed.as_bytes().to_vec()).into(), |input| {
        if let Ok(entry) = Entry::parse(input) {
            return entry.into_spec().map(drop);
        }
        match parse_request(input).map_err(Error::Malformed)? {
            Progress::Whole { request, .. } => match route(&request) {
                Ok(_) => Ok(()),
                Err(response) => Err(Error::Unsupported(format!("{response:?}"))),
            },
            Progress::More { .. } => Ok(()),
        }
    });
}

/// Everything that can be read of a tree.
fn walk(bootstrap: &Bootstrap) -> Result<()> {
    let tree = bootstrap.tree();
    let mut chunks = 0;
    for visit in tree.walk() {
        let inode = visit?.inode;
        tree.xattrs(&inode)?;
        if let Ok(file) = tree.file_chunks(&inode) {
            // Names may share an inode: a hostile image makes this quadratic, not the parser.
            chunks += file.size_hint().0;
            if chunks < 1_000_000 {
                file.collect::<Result<Vec<_>>>()?;
            }
        }
        let _ = tree.read_link(&inode);
    }
    Ok(())
}

/// Three parts, each behind its length: bootstrap, blob, the file that has the context table.
fn read_image(mut input: &[u8]) -> Result<()> {
    let mut part = || {
        let (length, rest) = input.split_first_chunk::<4>().unwrap_or((&[0; 4], &[]));
        let (part, rest) = rest.split_at((u32::from_le_bytes(*length) as usize).min(rest.len()));
        input = rest;
        part
    };
    let (bootstrap, blob, meta) = (Bootstrap::parse(part())?, part(), part());
    walk(&bootstrap)?;
    let mut decoder = Decoder::new();
    for record in bootstrap.blobs() {
        let end = record.ci_offset + record.ci_compressed_size;
        let slice = |from: u64, to: u64| meta.get(from as usize..to as usize).unwrap_or(&[]);
        let (table, header) = (slice(record.ci_offset, end), slice(end, end + 4096));
        let context = ContextTable::parse(record, table, header);
        let layout = match Layout::needs_context(record) {
            true => Layout::build(&bootstrap, record.index, Some(&context?))?,
            false => Layout::build(&bootstrap, record.index, None)?,
        };
        layout.clone().merge_digests(&layout)?;
        for index in layout.chunks_in(0..u64::MAX).take(1000) {
            layout.chunk(ChunkIndex(index));
        }
        for number in 0..layout.unit_count() {
            let unit = layout.unit(number);
            let end = unit.compressed_offset.saturating_add(unit.compressed_size.into());
            let Some(stored) = blob.get(unit.compressed_offset as usize..end as usize) else {
                continue;
            };
            let mut output = vec![0; unit.output_size as usize];
            decoder.decode_unit(&layout, number, stored, &mut output)?;
        }
    }
    Ok(())
}

/// Replays and mutates; panics with the path of the input when a run panics or takes too long.
fn fuzz(target: &str, mut pool: Vec<Vec<u8>>, run: fn(&[u8]) -> Result<()>) {
    let limit = nix::sys::resource::Resource::RLIMIT_AS;
    nix::sys::resource::setrlimit(limit, MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES).unwrap();
    pool.extend(corpus(target));
    assert!(!pool.is_empty(), "no seeds for {target}");
    let seed = match std::env::var("FUZZ_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
    };
    let seconds = std::env::var("FUZZ_SECONDS").map_or(3, |seconds| seconds.parse().unwrap());
    let mut seen = HashSet::new();
    for input in &pool {
        seen.insert(outcome(target, seed, input, run));
    }
    assert!(seen.contains("ok"), "no seed of {target} is right: mutations of it reach little");
    let (mut random, mut runs) = (Random(seed), 0u64);
    let started = Instant::now();
    while started.elapsed() < Duration::from_secs(seconds) {
        let mut input = pool[random.below(pool.len())].clone();
        for _ in 0..1 + random.below(6) {
            mutate(&mut input, &pool, &mut random);
        }
        input.truncate(INPUT_MAX_BYTES);
        let outcome = outcome(target, seed, &input, run);
        if pool.len() < POOL_MAX && seen.insert(outcome) {
            pool.push(input);
        }
        runs += 1;
    }
    println!("{target}: seed {seed}, {runs} runs, {} outcomes", seen.len());
}

fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target);
    let mut paths: Vec<PathBuf> = match std::fs::read_dir(&folder) {
        Ok(entries) => entries.map(|entry| entry.unwrap().path()).collect(),
        Err(_) => Vec::new(),
    };
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).unwrap()).collect()
}

fn outcome(target: &str, seed: u64, input: &[u8], run: fn(&[u8]) -> Result<()>) -> String {
    let started = Instant::now();
    let result = std::panic::catch_unwind(|| run(input));
    let slow = started.elapsed() > RUN_LIMIT;
    let Ok(result) = result.map_err(drop).and_then(|ok| if slow { Err(()) } else { Ok(ok) }) else {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-{seed}"));
        std::fs::write(&path, input).unwrap();
        let what = if slow { "takes too long" } else { "panics" };
        panic!("{target} {what} on the input kept in {} (seed {seed})", path.display());
    };
    match result {
        Ok(()) => "ok".into(),
        Err(error) => {
            // Names and numbers would make every outcome new.
            let text = error.to_string();
            text.chars().filter(|letter| letter.is_ascii_lowercase()).take(120).collect()
        }
    }
}

fn mutate(input: &mut Vec<u8>, pool: &[Vec<u8>], random: &mut Random) {
    if input.is_empty() {
        input.push(random.next() as u8);
    }
    let at = random.below(input.len());
    let length = 1 + random.below(64.min(input.len() - at));
    match random.below(10) {
        0..=2 => input[at] ^= 1 << random.below(8),
        3 => input[at] = random.interesting() as u8,
        4 | 5 => {
            // A field of 2, 4 or 8 bytes at its natural place.
            let size = 2 << random.below(3);
            let at = at / size * size;
            let field = random.interesting().to_le_bytes();
            let end = (at + size).min(input.len());
            input[at..end].copy_from_slice(&field[..end - at]);
        }
        6 => input.truncate(at),
        7 => drop(input.drain(at..at + length)),
        8 => {
            let other = &pool[random.below(pool.len())];
            let from = random.below(other.len().max(1)).min(other.len());
            let piece = &other[from..(from + length).min(other.len())];
            input.splice(at..at, piece.iter().copied());
        }
        _ => {
            let to = random.below(input.len() - length + 1);
            input.copy_within(at..at + length, to);
        }
    }
}

/// splitmix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut value = self.0;
        value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        value ^ value >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// A number near which things go wrong.
    fn interesting(&mut self) -> u64 {
        let power = 1u64 << self.below(64);
        match self.below(6) {
            0 => 0,
            1 => u64::MAX - self.below(600) as u64,
            2 => power,
            3 => power - 1,
            4 => power.wrapping_add(self.next() % 5),
            _ => self.next() >> self.below(64),
        }
    }
}
