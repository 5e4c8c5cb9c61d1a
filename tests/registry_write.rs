//! Blobs and manifests on their way into registries, and whole blobs on their way out.
//!
//! Against `tools/registryd`, which fails on command and keeps a journal, and against Debian's
//! docker-registry, which is what others run.

mod support;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sluice::engine::block_on;
use sluice::error::{Error, Result};
use sluice::registry::client::Client;
use sluice::registry::config::Backend;
use sluice::registry::download::Whole;
use sluice::registry::repository::{Put, Repository};
use sluice::registry::route::{Route, Shared};
use sluice::registry::upload::{BlobFile, Pushed};
use std::cell::Cell;
use std::io::Write;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use support::distribution::Distribution;
use support::layouts::noise;
use support::registry::Registry;

const MIB: usize = 1 << 20;
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json";

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Runs `work` with a repository of the registry at `address`.
fn with_repository<T: 'static, F>(
    address: &str,
    repo: &str,
    basic: Option<&str>,
    work: impl FnOnce(Rc<Client>, Arc<Route>, Repository, sluice::engine::Core) -> F + 'static,
) -> Result<T>
where
    F: Future<Output = Result<T>> + 'static,
{
    let config = json!({"host": address, "repo": repo, "scheme": "http", "auth": basic});
    let shared = Shared::at(None, Path::new("/nonexistent"));
    with_backend(shared, Backend::parse("registry", &config).unwrap(), work)
}

fn with_backend<T: 'static, F>(
    shared: Arc<Shared>,
    backend: Backend,
    work: impl FnOnce(Rc<Client>, Arc<Route>, Repository, sluice::engine::Core) -> F + 'static,
) -> Result<T>
where
    F: Future<Output = Result<T>> + 'static,
{
    block_on(move |core| async move {
        let route = shared.route(&backend)?;
        let client = Client::new(shared);
        let sources = ["other/place".to_owned()];
        let repository = Repository::open(&core, &client, &route, &sources)?;
        let result = work(client.clone(), route, repository, core).await;
        client.close();
        result
    })?
}

fn push(
    address: &str,
    repo: &str,
    basic: Option<&str>,
    bytes: Vec<u8>,
    mount_from: Option<&'static str>,
) -> Result<Pushed> {
    let total = bytes.len() as u64;
    with_repository(address, repo, basic, move |_, _, repository, _| async move {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let seen = Cell::new(0);
        let blob = BlobFile {
            digest: &digest(&bytes),
            size: total,
            file: &file,
            on_progress: &|more| seen.set(seen.get() + more),
        };
        if let Some(source) = mount_from
            && repository.mount_blob(blob.digest, source).await?
        {
            return Ok(Pushed::Mounted);
        }
        let pushed = repository.push_blob(&blob).await?;
        assert_eq!(seen.get(), total, "progress is told once for each byte");
        Ok(pushed)
    })
}

fn pull(address: &str, repo: &str, digest: String, size: u64) -> Result<Vec<u8>> {
    with_repository(address, repo, None, move |client, route, _, core| async move {
        let mut bytes = Vec::new();
        let whole = Whole { digest: &digest, size };
        let sink = |piece: &[u8]| {
            bytes.extend_from_slice(piece);
            Ok(())
        };
        client.download(&core, &route, whole, sink).await?;
        Ok(bytes)
    })
}

fn writes(registry: &Registry) -> usize {
    let log = registry.log();
    log.iter().filter(|e| ["PUT", "PATCH", "POST"].contains(&e["method"].as_str().unwrap())).count()
}

fn patches(registry: &Registry) -> Vec<Value> {
    let mut log = registry.log();
    log.retain(|entry| entry["method"] == "PATCH");
    log
}

#[test]
fn a_blob_arrives_and_a_second_push_sends_nothing() {
    let registry = Registry::start(&[]);
    for size in [0, 1, 1000, 3 * MIB + 7] {
        let bytes = noise(size, 7);
        let there = push(registry.address(), "a/b", None, bytes.clone(), None);
        assert_eq!(there, Ok(Pushed::Sent), "{size}");
        let back = pull(registry.address(), "a/b", digest(&bytes), size as u64).unwrap();
        assert!(back == bytes, "{size}");
        registry.forget();
        let again = push(registry.address(), "a/b", None, bytes, None);
        assert_eq!(again, Ok(Pushed::Existed));
        assert_eq!(writes(&registry), 0);
    }
}

#[test]
fn a_broken_upload_goes_on_where_it_broke() {
    let registry = Registry::start(&[]);
    registry.fault(json!([
        {"method": "PATCH", "nth": 1, "count": 1, "effect": {"cut_body": 1_500_000}},
        {"method": "PATCH", "nth": 2, "count": 1, "effect": {"cut_body": 700_000}},
        {"method": "GET", "path": "/uploads/", "nth": 1, "count": 1, "effect": {"status": 503}},
    ]));
    let bytes = noise(4 * MIB, 3);
    assert_eq!(push(registry.address(), "a", None, bytes.clone(), None), Ok(Pushed::Sent));
    assert_eq!(patches(&registry).len(), 3);
    let begun = registry.log().iter().filter(|entry| entry["method"] == "POST").count();
    assert_eq!(begun, 1, "the upload was continued, not begun again");
    assert!(pull(registry.address(), "a", digest(&bytes), bytes.len() as u64).unwrap() == bytes);
}

#[test]
fn an_upload_that_is_lost_begins_again_and_then_gives_up() {
    let registry = Registry::start(&[]);
    registry.fault(json!([
        {"method": "PATCH", "nth": 1, "count": 1, "effect": {"cut_body": 1000}},
        {"method": "GET", "path": "/uploads/", "count": 1, "effect": {"status": 404}},
    ]));
    let bytes = noise(MIB, 4);
    assert_eq!(push(registry.address(), "a", None, bytes, None), Ok(Pushed::Sent));
    registry.fault(json!([{"method": "PATCH", "effect": {"cut_body": 0}}]));
    let error = push(registry.address(), "a", None, noise(MIB, 6), None).unwrap_err();
    assert!(error.to_string().contains("blob sha256:"), "{error}");
}

#[test]
fn refusals_say_what_the_registry_said() {
    let registry = Registry::start(&[]);
    for (method, status) in [("POST", 403), ("PATCH", 413), ("PUT", 507), ("POST", 500)] {
        registry.fault(json!([{"method": method, "effect": {"status": status}}]));
        let error = push(registry.address(), "a", None, noise(5000, status), None).unwrap_err();
        let text = error.to_string();
        assert!(text.contains(&status.to_string()), "{method} {status}: {text}");
        assert!(text.contains("so says a fault rule"), "{method} {status}: {text}");
    }
    registry.fault(json!([{"method": "POST", "count": 2, "effect": {"too_many": 0}}]));
    assert_eq!(push(registry.address(), "a", None, noise(5000, 9), None), Ok(Pushed::Sent));
}

#[test]
fn tokens_reach_as_far_as_a_push_needs_and_are_renewed_in_the_middle() {
    for auth in ["basic", "bearer"] {
        let registry = Registry::start(&["--auth", auth]);
        registry.fault(json!([{"method": "PATCH", "count": 1, "effect": {"expire_tokens": true}}]));
        // user:password
        let basic = Some("dXNlcjpwYXNzd29yZA==");
        let bytes = noise(2 * MIB, 11);
        assert_eq!(push(registry.address(), "a/b", basic, bytes, None), Ok(Pushed::Sent), "{auth}");
        let error = push(registry.address(), "a/b", None, noise(10, 1), None).unwrap_err();
        assert!(matches!(error, Error::Denied(_)), "{error}");
    }
}

#[test]
fn a_large_blob_goes_over_tls_and_comes_back() {
    let registry = Registry::start(&["--tls", "--auth", "bearer"]);
    let certificates = tempfile::tempdir().unwrap();
    let own = certificates.path().join(registry.address());
    std::fs::create_dir(&own).unwrap();
    std::fs::copy(registry.ca(), own.join("ca.crt")).unwrap();
    let basic = "dXNlcjpwYXNzd29yZA==";
    let config = json!({"host": registry.address(), "repo": "a", "auth": basic});
    let shared = Shared::at(None, certificates.path());
    let backend = Backend::parse("registry", &config).unwrap();
    let back = with_backend(shared, backend, |client, route, repository, core| async move {
        let bytes = noise(5 * MIB + 3, 51);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        let (digest, size) = (digest(&bytes), bytes.len() as u64);
        let on_progress = |_| {};
        let blob = BlobFile { digest: &digest, size, file: &file, on_progress: &on_progress };
        assert_eq!(repository.push_blob(&blob).await, Ok(Pushed::Sent));
        let mut back = Vec::new();
        let sink = |piece: &[u8]| {
            back.extend_from_slice(piece);
            Ok(())
        };
        client.download(&core, &route, Whole { digest: &digest, size }, sink).await?;
        Ok(back == bytes)
    });
    assert_eq!(back, Ok(true));
}

#[test]
fn what_the_registry_has_elsewhere_is_mounted() {
    let registry = Registry::start(&[]);
    let distribution = Distribution::start();
    for address in [registry.address(), distribution.address()] {
        let bytes = noise(MIB, 21);
        let place = "other/place";
        assert_eq!(push(address, place, None, bytes.clone(), None), Ok(Pushed::Sent));
        // registryd shares blobs between repositories: it has to be told to deny it.
        registry.fault(json!([{"method": "HEAD", "effect": {"status": 404}}]));
        let mounted = push(address, "here", None, bytes.clone(), Some(place));
        assert_eq!(mounted, Ok(Pushed::Mounted));
        assert!(pull(address, "here", digest(&bytes), bytes.len() as u64).unwrap() == bytes);
        let absent = push(address, "here", None, noise(MIB, 24), Some(place));
        assert_eq!(absent, Ok(Pushed::Sent));
    }
}

#[test]
fn the_reference_registry_takes_blobs_and_manifests() {
    let registry = Distribution::start();
    for size in [0, 1, 3 * MIB + 1] {
        let bytes = noise(size, 31);
        let pushed = push(registry.address(), "team/app", None, bytes.clone(), None);
        assert_eq!(pushed, Ok(Pushed::Sent), "{size}");
        let back = pull(registry.address(), "team/app", digest(&bytes), size as u64).unwrap();
        assert!(back == bytes);
    }
    let config = b"{}".to_vec();
    push(registry.address(), "team/app", None, config.clone(), None).unwrap();
    let text = manifest(&config).to_string();
    for existed in [false, true] {
        let text = text.clone();
        let put = with_repository(
            registry.address(),
            "team/app",
            None,
            |_, _, repository, _| async move {
                repository.put_manifest("v1", ACCEPT, text.as_bytes()).await
            },
        );
        assert_eq!(put.map(|put| put.existed), Ok(existed));
    }
}

fn manifest(config: &[u8]) -> Value {
    let media_type = "application/vnd.oci.image.config.v1+json";
    json!({
        "schemaVersion": 2, "mediaType": ACCEPT, "layers": [],
        "config": {"mediaType": media_type, "digest": digest(config), "size": config.len()},
    })
}

#[test]
fn a_manifest_is_put_once_and_retried_while_it_may_heal() {
    let registry = Registry::start(&[]);
    let text = manifest(b"{}").to_string();
    registry.fault(json!([{"method": "PUT", "count": 2, "effect": {"status": 502}}]));
    for existed in [false, true] {
        let text = text.clone();
        let put =
            with_repository(registry.address(), "a", None, |_, _, repository, _| async move {
                repository.put_manifest("v1", ACCEPT, text.as_bytes()).await
            });
        assert_eq!(put, Ok(Put { existed, has_subject: false }));
    }
    let puts = registry.log().iter().filter(|entry| entry["method"] == "PUT").count();
    assert_eq!(puts, 3);
}

#[test]
fn a_download_resumes_and_never_passes_wrong_bytes_for_right_ones() {
    let registry = Registry::start(&[]);
    let bytes = noise(3 * MIB, 41);
    let size = bytes.len() as u64;
    push(registry.address(), "a", None, bytes.clone(), None).unwrap();
    let blobs =
        |effect: Value| json!([{"blob": "", "method": "GET", "count": 2, "effect": effect}]);
    for effect in [json!({"reset": 1_000_000}), json!({"truncate": 5}), json!({"redirect": true})] {
        registry.fault(blobs(effect));
        assert!(pull(registry.address(), "a", digest(&bytes), size).unwrap() == bytes);
    }
    registry.fault(blobs(json!({"flip_bit": 77_777})));
    let error = pull(registry.address(), "a", digest(&bytes), size).unwrap_err();
    assert!(matches!(error, Error::Digest(_)), "{error}");
    registry.heal();
    let error = pull(registry.address(), "a", digest(&bytes), size + 1).unwrap_err();
    assert!(error.to_string().contains("were announced"), "{error}");
    let error = pull(registry.address(), "a", digest(b"absent"), 5).unwrap_err();
    assert!(matches!(error, Error::NotFound(_)), "{error}");
    registry.fault(json!([{"blob": "", "method": "GET", "effect": {"reset": 0}}]));
    assert!(pull(registry.address(), "a", digest(&bytes), size).is_err());
}
