//! Every parser against mutated input: it must return, in time and within bounds.
//!
//! Each test replays the kept corpus in `tests/corpus/<target>`, then mutates it for
//! `FUZZ_SECONDS` (3 if not set; 600 for a long run):
//! `FUZZ_SECONDS=600 cargo test --release --test fuzz --test fuzz_making`. An input whose outcome
//! has not been seen before joins the pool that is mutated further: outcomes are error texts
//! without their numbers, a poor man's coverage. A failing input is kept under the target
//! directory, and its path is in the message; put it into the corpus when the fault is fixed.
//! `FUZZ_SEED` repeats a run.
//!
//! To add a parser: a function from bytes to an outcome, a test that calls `fuzz`, and seeds.

mod support;

use prost::Message as _;
use sluice::build::{Builder, Compression, Options};
use sluice::daemon::api::route;
use sluice::daemon::entry::Entry;
use sluice::daemon::http::{Progress, parse as parse_request};
use sluice::error::{Error, Result};
use sluice::image::layer::read_bootstrap;
use sluice::image::manifest::{Document, Platform};
use sluice::image::prefetch::listed_ranges;
use sluice::image::toc::{BOOTSTRAP_NAME, TAIL_BYTES, Tail};
use sluice::image::{
    BlobId, Bootstrap, ChunkIndex, ContextTable, Decoder, KernelView, Layout, Segmentation,
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
use std::path::Path;
use support::fuzzing::{corpus, fuzz};

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

/// Layers as they are built: whatever is accepted must be an image that we accept, whole.
#[test]
fn built_layers() {
    let names = ["kinds", "long", "sparse", "whiteouts"];
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/tar");
    let seeds = names.map(|name| std::fs::read(folder.join(name)).expect("a seed"));
    let packed = seeds.clone().map(|seed| zstd::bulk::compress(&seed, 1).expect("memory"));
    fuzz("tar", [seeds.to_vec(), packed.to_vec()].concat(), |input| {
        let input = &with_checksums(input)[..];
        let half = input.len() / 1024 * 512;
        build(|builder| {
            // The same as two layers, where it can be cut between blocks.
            builder.add_tar(input, &|_| ())?;
            builder.add_tar(&input[half..], &|_| ()).map(drop)
        })
        .or_else(|_| build(|builder| builder.add_tar(input, &|_| ()).map(drop)))
    });
}

/// Puts the sums of headers right: mutations would end there otherwise.
fn with_checksums(tar: &[u8]) -> Vec<u8> {
    let mut tar = tar.to_vec();
    for block in tar.chunks_exact_mut(512).filter(|block| block[257..262] == *b"ustar") {
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    }
    tar
}

/// gzip layers that stay as they are.
#[test]
fn indexed_layers() {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let tar = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus/tar/kinds"));
    encoder.write_all(&tar.expect("a seed")).expect("memory");
    let whole = encoder.finish().expect("memory");
    fuzz("gzip", vec![whole.clone(), [whole.clone(), whole].concat()], |input| {
        let id = BlobId::parse("layer").expect("a name");
        build(|builder| builder.add_gzip_as_is(input, id, &|_| ()).map(drop))
    });
}

/// Builds in memory-backed storage, and reads what was built.
fn build(layers: impl FnOnce(&mut Builder) -> Result<()>) -> Result<()> {
    let folder = tempfile::tempdir_in("/dev/shm").expect("a folder");
    let options = Options {
        compression: Compression::Lz4Block,
        chunk_size: 4096,
        threads: 1,
        ..Options::default()
    };
    let mut builder = Builder::new(options, folder.path())?;
    layers(&mut builder)?;
    let image = builder.finish()?;
    let bootstrap = Bootstrap::parse(image.bootstrap).expect("we accept what we build");
    walk(&bootstrap).expect("a whole tree");
    for record in bootstrap.blobs() {
        if !Layout::needs_context(record) {
            Layout::build(&bootstrap, record.index, None).expect("a right chunk table");
        }
    }
    Ok(())
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
    for blob_index in 0..bootstrap.blobs().len() as u32 {
        listed_ranges(bootstrap, blob_index)?;
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
