//! Every endpoint's statuses and messages, as nydusd answers them, without a socket in between.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};

use super::api::{self, Method, Request};
use super::control::{ControlPlane, Hooks};
use super::cookies::Cookies;
use super::cull::Culler;
use super::recording::Recordings;
use super::reply::{Identity, Response};
use super::state::{Event, State, StateMachine};
use super::statistics::Statistics;
use super::succession::Restored;
use crate::blob::catalog::Catalog;
use crate::blob::journal::{Journal, Level};
use crate::blob::statistics::{Counter, Counters};
use crate::error::Error;

/// A control plane in RUNNING, without cores.
pub fn control(hooks: Hooks) -> ControlPlane {
    let state = Arc::new(StateMachine::new());
    state.apply(Event::Mount, || Ok(())).unwrap();
    state.apply(Event::Start, || Ok(())).unwrap();
    ControlPlane {
        catalog: Arc::default(),
        state,
        statistics: Arc::new(Statistics::new(Counters::new(1), Vec::new())),
        journal: Journal::new(Level::Info).0,
        identity: Identity::default(),
        culler: None,
        ledger: None,
        mounts: super::mounts::Mounts::new(None, false, Box::new(|_, _, _| ()), Box::new(drop)),
        evictor: None,
        hooks,
        configured: Mutex::default(),
        restored: Restored::default(),
        recordings: Recordings::default(),
        starts: None,
    }
}

pub fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name).join("image.boot")
}

/// What nydus-snapshotter sends.
pub fn entry(domain_id: &str, id: &str, bootstrap: &Path, work_dir: &Path) -> Value {
    json!({
        "type": "bootstrap", "id": id, "domain_id": domain_id,
        "fs_prefetch": {"enable": true}, "readahead": 1,
        "config": {
            "id": "cfg",
            "backend_type": "registry",
            "backend_config": {"scheme": "http", "host": "127.0.0.1:5000", "repo": "a/b"},
            "cache_type": "fscache",
            "cache_config": {"work_dir": work_dir},
            "metadata_path": bootstrap,
        }
    })
}

fn ask(control: &ControlPlane, method: Method, target: &str, body: Option<&str>) -> Response {
    let body = body.map(|body| body.as_bytes().to_vec());
    let request = Request { method, target: target.to_owned(), body, peer: None };
    match api::route(&request) {
        Ok(call) => control.perform(call),
        Err(response) => response,
    }
}

fn get(control: &ControlPlane, target: &str) -> Response {
    ask(control, Method::Get, target, None)
}

fn put(control: &ControlPlane, target: &str, body: &Value) -> Response {
    ask(control, Method::Put, target, Some(&body.to_string()))
}

fn act(control: &ControlPlane, target: &str) -> Response {
    ask(control, Method::Put, target, None)
}

fn delete(control: &ControlPlane, target: &str) -> Response {
    ask(control, Method::Delete, target, None)
}

fn body(response: &Response) -> Value {
    serde_json::from_str(response.body.as_deref().unwrap()).unwrap()
}

#[track_caller]
fn check(response: &Response, status: u16, message: &str) {
    assert_eq!(response.status, status, "{response:?}");
    if status == 204 {
        assert_eq!(response.body, None);
        return;
    }
    let body = body(response);
    assert_eq!(body["code"], "UNDEFINED");
    let said = body["message"].as_str().unwrap();
    assert!(said.contains(message), "{said:?} lacks {message:?}");
}

#[test]
fn unknown_paths_and_ways_are_told_apart() {
    let control = control(Hooks::idle());
    for path in ["/", "/api/v1/daemon/", "/api/v3/daemon", "/api/v1/Daemon", "", "//api/v1/daemon"]
    {
        check(&get(&control, path), 404, "NoRoute");
    }
    let known = [
        "/api/v1/daemon",
        "/api/v1/daemon/events",
        "/api/v1/daemon/start",
        "/api/v1/daemon/exit",
        "/api/v1/daemon/fuse/sendfd",
        "/api/v1/daemon/fuse/takeover",
        "/api/v1/daemon/backend?mountpoint=/m",
        "/api/v1/mount?mountpoint=/m",
        "/api/v1/metrics",
        "/api/v1/metrics/files",
        "/api/v1/metrics/pattern",
        "/api/v1/metrics/inflight",
        "/api/v1/metrics/backend",
        "/api/v1/metrics/blobcache",
        "/api/v1/config",
        "/api/v2/daemon",
        "/api/v2/blobs?domain_id=d",
        "/api/sluice/v1/stat",
        "/api/sluice/v1/images",
    ];
    for path in known {
        for method in [Method::Head, Method::Patch] {
            check(&ask(&control, method, path, None), 400, "BadRequest");
        }
        check(&ask(&control, Method::Get, path, Some("{}")), 400, "BadRequest");
    }
    assert_eq!(get(&control, "http://localhost/api/v1/daemon").status, 200);
    check(&get(&control, "/api/v2/blobs?domain_id=%zz"), 400, "BadRequest");
}

#[test]
fn daemon_says_who_and_how_it_is() {
    let mut control = control(Hooks::idle());
    control.identity = Identity { id: Some("n1".into()), supervisor: Some("/s.sock".into()) };
    for path in ["/api/v1/daemon", "/api/v2/daemon"] {
        let info = body(&get(&control, path));
        assert_eq!(info["id"], "n1");
        assert_eq!(info["supervisor"], "/s.sock");
        assert_eq!(info["state"], "RUNNING");
        assert_eq!(info["backend_collection"], Value::Null);
        for key in ["package_ver", "git_commit", "build_time", "profile", "rustc"] {
            assert!(info["version"][key].is_string());
        }
    }
}

#[test]
fn log_level_is_set_or_refused() {
    let control = control(Hooks::idle());
    for level in ["off", "error", "warn", "info", "debug", "trace"] {
        check(&put(&control, "/api/v1/daemon", &json!({"log_level": level})), 204, "");
    }
    assert_eq!(control.journal.level(), Level::Trace);
    let refused = put(&control, "/api/v2/daemon", &json!({"log_level": "loud"}));
    check(&refused, 500, "Configure(ResponsePayloadType)");
    check(
        &put(&control, "/api/v1/daemon", &json!({})),
        400,
        "ParseBody(Error(\"missing field `log",
    );
    check(&act(&control, "/api/v1/daemon"), 400, "BadRequest");
}

#[test]
fn events_list_the_last_errors() {
    let control = control(Hooks::idle());
    control.journal.error("blob gone");
    let events = body(&get(&control, "/api/v1/daemon/events"));
    assert_eq!(
        events,
        json!({"max_errors": 500, "total_errors": 1, "max_size": 51200, "total_size": 9,
               "errors": ["blob gone"]})
    );
}

#[test]
fn states_change_as_in_nydusd() {
    let exits = Arc::new(Mutex::new(0));
    let seen = exits.clone();
    let exit = Box::new(move || {
        *seen.lock().unwrap() += 1;
        Ok(())
    });
    let control = control(Hooks { exit, ..Hooks::idle() });
    let unexpected = "Configure(DaemonAbnormal(UnexpectedEvent(\"Start\")))";
    check(&act(&control, "/api/v1/daemon/start"), 400, unexpected);
    check(&act(&control, "/api/v1/daemon/fuse/takeover"), 400, "UnexpectedEvent(\"Takeover\")");
    check(&act(&control, "/api/v1/daemon/fuse/sendfd"), 204, "");
    check(&act(&control, "/api/v1/daemon/exit"), 204, "");
    assert_eq!(control.state.state(), State::Stopped);
    check(&act(&control, "/api/v1/daemon/exit"), 400, "UnexpectedEvent(\"Exit\")");
    assert_eq!(*exits.lock().unwrap(), 1);
}

#[test]
fn upgrade_goes_from_init_over_takeover_to_running() {
    let mut control = control(Hooks::idle());
    control.state = Arc::new(StateMachine::new());
    control.identity.supervisor = Some("/s.sock".into());
    let failing = || -> super::control::Act { Box::new(|| Err(Error::unavailable("no answer"))) };
    (control.hooks.takeover, control.hooks.send_fd) = (failing(), failing());
    check(&act(&control, "/api/v1/daemon/fuse/sendfd"), 500, "no answer");
    check(&act(&control, "/api/v1/daemon/start"), 400, "UnexpectedEvent(\"Start\")");
    check(&act(&control, "/api/v1/daemon/fuse/takeover"), 500, "Other(\"no answer\")");
    assert_eq!(control.state.state(), State::Init);
    control.hooks = Hooks::idle();
    check(&act(&control, "/api/v1/daemon/fuse/takeover"), 501, "Upgrade(DaemonAbnormal(Unsupp");
    check(&act(&control, "/api/v1/daemon/fuse/sendfd"), 501, "Unsupported");
    assert_eq!(control.state.state(), State::Init);
    control.hooks.takeover = Box::new(|| Ok(()));
    check(&act(&control, "/api/v1/daemon/fuse/takeover"), 204, "");
    check(&act(&control, "/api/v1/daemon/start"), 204, "");
    assert_eq!(control.state.state(), State::Running);
}

#[test]
fn what_needs_fuse_is_refused_as_in_singleton_mode() {
    let control = control(Hooks::idle());
    check(&get(&control, "/api/v1/daemon/backend?mountpoint=/m"), 501, "Unsupported");
    let missing = "QueryString(\"'mountpoint' should be specified in query string\")";
    check(&get(&control, "/api/v1/daemon/backend"), 400, missing);
    let mount = json!({"source": "a", "fs_type": "rafs", "config": "{}"});
    check(&put(&control, "/api/v1/mount?mountpoint=/m", &mount), 501, "Unsupported");
    check(&put(&control, "/api/v1/mount?mountpoint=/m", &json!({})), 400, "ParseBody");
    check(&put(&control, "/api/v1/mount", &mount), 400, missing);
    check(&delete(&control, "/api/v1/mount?mountpoint=/m"), 501, "Unsupported");
    check(&get(&control, "/api/v1/metrics?id=x"), 404, "NoCounter");
    check(&get(&control, "/api/v1/metrics/files?id=x&latest=true"), 404, "NoCounter");
    check(&get(&control, "/api/v1/metrics/pattern"), 404, "NoCounter");
    check(&get(&control, "/api/v1/metrics/inflight"), 501, "Unsupported");
}

#[test]
fn metrics_appear_with_the_first_open() {
    let control = control(Hooks::idle());
    let no_counter = "BlobcacheMetrics(Metrics(Stats(NoCounter)))";
    check(&get(&control, "/api/v1/metrics/blobcache"), 404, no_counter);
    check(&get(&control, "/api/v1/metrics/backend?id=/"), 404, "NoCounter");
    control.statistics.counters().of_core(0).count(Counter::UpcallsOpen);
    assert_eq!(get(&control, "/api/v1/metrics/backend?id=/").status, 200);
    assert_eq!(body(&get(&control, "/api/v1/metrics/blobcache"))["whole_hits"], 0);
    check(&get(&control, "/api/v1/metrics/backend?id=other"), 404, "NoCounter");
}

#[test]
fn configuration_is_passed_on_and_never_shown() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    let configure: super::control::Configure = Box::new(move |update| {
        let auth = update.registry_auth.as_ref().map(|auth| auth.reveal().to_owned());
        log.lock().unwrap().push(auth);
        Ok(())
    });
    let control = control(Hooks { configure, ..Hooks::idle() });
    assert_eq!(body(&get(&control, "/api/v1/config")), json!({}));
    let auth = json!({"registry_auth": "dXNlcjpwdw=="});
    check(&put(&control, "/api/v1/config?id=/", &auth), 204, "");
    check(&put(&control, "/api/v1/config", &auth), 204, "");
    check(&put(&control, "/api/v1/config?id=cfg", &auth), 500, "id=/");
    check(&put(&control, "/api/v1/config", &json!({"registry_auth": "!"})), 500, "base64");
    check(&put(&control, "/api/v1/config", &json!({"colour": "red"})), 500, "\"colour\\\"");
    check(&put(&control, "/api/v1/config", &json!({"registry_auth": 7})), 400, "ParseBody");
    let auth = Some("dXNlcjpwdw==".to_owned());
    assert_eq!(*seen.lock().unwrap(), [auth.clone(), auth], "and not what is for one image");
    assert_eq!(body(&get(&control, "/api/v1/config?id=/")), json!({"registry_auth": "(set)"}));
    let mut control = control;
    control.hooks = Hooks::idle();
    let unsupported = put(&control, "/api/v1/config", &json!({"proxy_url": "http://p:1"}));
    check(&unsupported, 501, "Configure(DaemonAbnormal(Unsupported))");
    assert_eq!(body(&get(&control, "/api/v1/config")), json!({"registry_auth": "(set)"}));
}

#[test]
fn an_image_is_registered_listed_and_removed() {
    let work = tempfile::tempdir().unwrap();
    let told = Arc::new(Mutex::new(Vec::new()));
    let (log, forgot) = (told.clone(), told.clone());
    let hooks = Hooks {
        registered: Box::new(move |image, body| {
            assert!(body.starts_with(b"{"));
            log.lock().unwrap().push(format!("+{}/{}", image.domain_id, image.id));
            Ok(())
        }),
        forgotten: Box::new(move |domain, id| {
            forgot.lock().unwrap().push(format!("-{domain}/{id:?}"));
        }),
        ..Hooks::idle()
    };
    let control = control(hooks);
    let boot = fixture("lz4-1m");
    check(&put(&control, "/api/v2/blobs", &entry("d", "i", &boot, work.path())), 204, "");
    let twice = put(&control, "/api/v2/blobs", &entry("d", "i", &boot, work.path()));
    check(
        &twice,
        500,
        "CreateBlobObject(DaemonAbnormal(Other(\"blob_cache: bootstrap blob already",
    );
    let listed = body(&get(&control, "/api/v2/blobs?domain_id=d"));
    assert_eq!(listed.as_array().unwrap().len(), 2);
    assert_eq!(listed[0]["type"], "bootstrap");
    assert_eq!(listed[0]["id"], "i");
    assert_eq!(listed[1]["type"], "datablob");
    let blob = listed[1]["id"].as_str().unwrap().to_owned();
    let one = body(&get(&control, &format!("/api/v2/blobs?domain_id=d&blob_id={blob}")));
    assert_eq!(one, json!([listed[1]]));
    assert_eq!(body(&get(&control, "/api/v2/blobs?domain_id=unknown")), json!([]));
    check(&get(&control, "/api/v2/blobs"), 400, "BadRequest");
    assert_eq!(body(&get(&control, "/api/sluice/v1/images"))[0]["blobs"][0]["id"], blob.as_str());
    check(&delete(&control, "/api/v2/blobs?domain_id=d&blob_id=i"), 204, "");
    let gone = delete(&control, "/api/v2/blobs?domain_id=d&blob_id=i");
    check(&gone, 500, "No such file or directory (os error 2)");
    check(&delete(&control, "/api/v2/blobs?domain_id=d"), 204, "");
    check(&delete(&control, "/api/v2/blobs"), 400, "BadRequest");
    check(&delete(&control, "/api/v2/blobs?domain_id="), 400, "BadRequest");
    assert_eq!(*told.lock().unwrap(), ["+d/i", "-d/Some(\"i\")", "-d/None"]);
}

#[test]
fn an_image_without_a_domain_is_its_own_domain() {
    let work = tempfile::tempdir().unwrap();
    let control = control(Hooks::idle());
    check(&put(&control, "/api/v2/blobs", &entry("", "i", &fixture("zran"), work.path())), 204, "");
    assert!(control.catalog.object("i", "i").is_some());
    check(&delete(&control, "/api/v2/blobs?domain_id=&blob_id=i"), 204, "");
    assert!(control.catalog.images().is_empty());
}

#[test]
fn registrations_that_cannot_work_say_why() {
    let work = tempfile::tempdir().unwrap();
    let control = control(Hooks::idle());
    let good = entry("d", "i", &fixture("lz4-1m"), work.path());
    let short = work.path().join("short.boot");
    std::fs::write(&short, vec![0; 4096]).unwrap();
    let change = |pointer: &str, value: Value| {
        let mut entry = good.clone();
        *entry.pointer_mut(pointer).unwrap() = value;
        entry
    };
    for (entry, word) in [
        (change("/type", json!("datablob")), "Invalid argument (os error 22)"),
        (change("/id", json!("a/b")), "contains '/'"),
        (change("/id", json!("")), "is empty"),
        (change("/id", json!("a b")), "printable"),
        (change("/id", json!("a".repeat(255))), "longer than 254"),
        (change("/domain_id", json!("x/y")), "contains '/'"),
        (change("/domain_id", json!("d".repeat(249))), "longer than 248"),
        (change("/config/metadata_path", Value::Null), "metadata_path is missing"),
        (change("/config/metadata_path", json!("/nonexistent")), "No such file"),
        (change("/config/metadata_path", json!("/")), "not a regular file"),
        (change("/config/metadata_path", json!("/dev/zero")), "not a regular file"),
        (change("/config/metadata_path", json!(short)), "short.boot"),
        (change("/config/cache_config/work_dir", json!("/nonexistent")), "work_dir /nonexistent"),
    ] {
        check(&put(&control, "/api/v2/blobs", &entry), 500, word);
    }
    for (entry, word) in [
        (change("/config/cache_type", json!("dummycache")), "dummycache"),
        (change("/config/backend_type", json!("oss")), "oss"),
        (change("/config/backend_config/host", json!("")), "BadRequest: config.backend_config"),
        (change("/config", Value::Null), "neither config nor config_v2"),
    ] {
        check(&put(&control, "/api/v2/blobs", &entry), 400, word);
    }
    let broken = ask(&control, Method::Put, "/api/v2/blobs", Some("{\"type\":\"bootstrap\"}"));
    check(&broken, 400, "ParseBody(Error(\"missing field `id`\", line: 1, column: 20))");
    assert!(control.catalog.images().is_empty());
    check(&put(&control, "/api/v2/blobs", &good), 204, "");
}

#[test]
fn culling_needs_a_cache_and_names_what_stays() {
    let mut control = control(Hooks::idle());
    check(&delete(&control, "/api/v2/blobs?blob_id=b"), 501, "Unsupported");
    let cache = tempfile::tempdir().unwrap();
    let directory = cache.path().join("cache/Ierofs,d/@00");
    std::fs::create_dir_all(&directory).unwrap();
    let busy = Arc::new(|command: &str| Err(Error::system(libc::EBUSY, command)));
    control.culler = Some(Culler::new(cache.path(), Cookies::listed_in(cache.path()), busy));
    check(&delete(&control, "/api/v2/blobs?blob_id=b"), 204, "");
    std::fs::write(directory.join("Db"), "data").unwrap();
    let in_use = "DeleteBlobFile(DaemonAbnormal(Other(\"failed to start service, ";
    check(&delete(&control, "/api/v2/blobs?blob_id=b"), 500, in_use);
}

#[test]
fn our_own_statistics_have_everything() {
    let control = control(Hooks::idle());
    let stat = body(&get(&control, "/api/sluice/v1/stat"));
    assert_eq!(stat["state"], "RUNNING");
    assert_eq!(stat["images"], 0);
    assert_eq!(stat["log"]["level"], "info");
    assert!(stat["counters"]["upcalls_open"].is_u64());
    assert!(stat["latencies"]["read_ns"]["p999"].is_u64());
}

#[test]
fn starts_of_images_are_counted_as_they_are_told() {
    let control = control(Hooks::idle());
    let starts = "/api/sluice/v1/starts";
    check(&ask(&control, Method::Put, starts, Some(r#"{"lazy":2,"failed":1}"#)), 204, "");
    check(&ask(&control, Method::Put, starts, Some(r#"{"full":1,"lazy":1}"#)), 204, "");
    for refused in [r#"{"lazy":-1}"#, r#"{"other":1}"#, ""] {
        assert_eq!(ask(&control, Method::Put, starts, Some(refused)).status, 400, "{refused}");
    }
    let counters = &body(&get(&control, "/api/sluice/v1/stat"))["counters"];
    let counted =
        ["lazy", "waited", "full", "failed"].map(|name| &counters[format!("starts_{name}")]);
    assert_eq!(counted.map(|count| count.as_u64().unwrap()), [3, 0, 1, 1]);
}

#[test]
fn a_removal_while_the_hook_runs_is_passed_on() {
    let work = tempfile::tempdir().unwrap();
    let catalog: Arc<Catalog> = Arc::default();
    let removing = catalog.clone();
    let forgotten = Arc::new(Mutex::new(0));
    let count = forgotten.clone();
    let hooks = Hooks {
        registered: Box::new(move |image, _| {
            removing.unregister_domain(&image.domain_id);
            Ok(())
        }),
        forgotten: Box::new(move |_, _| *count.lock().unwrap() += 1),
        ..Hooks::idle()
    };
    let mut control = control(hooks);
    control.catalog = catalog;
    let entry = entry("d", "i", &fixture("zran"), work.path());
    check(&put(&control, "/api/v2/blobs", &entry), 204, "");
    assert_eq!(*forgotten.lock().unwrap(), 1);
}
