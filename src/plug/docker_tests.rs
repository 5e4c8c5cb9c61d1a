//! The protocol as Docker speaks it: over a socket, one method after the other.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::docker::{Options, Plugin};
use super::docker_origin::Settings;
use super::docker_server::{Gate, Socket, converse};
use super::driver_images::Service;
use super::start::Starts;
use crate::error::Error;

fn plugin(place: &Path) -> Plugin {
    let service = Service {
        mount: Box::new(|_, _| Err(Error::unavailable("no daemon"))),
        unmount: Box::new(|_| Ok(())),
        reach: Box::new(|_| Ok(())),
        starts: Starts::new(Box::new(|_| Ok(()))),
        say: Box::new(|_| ()),
        domain: String::new(),
    };
    let options = Options {
        root: None,
        image_root: None,
        note: place.join("state/plugin.json"),
        settings: Settings::default(),
    };
    Plugin::new(options, Arc::new(service)).expect("a plugin")
}

/// A connection that a thread of the server talks to.
fn connect(plugin: &Arc<Plugin>) -> UnixStream {
    let (client, server) = UnixStream::pair().expect("a pair");
    let plugin = plugin.clone();
    std::thread::spawn(move || converse(server, &plugin, &Gate::default()));
    client
}

/// Sends a request and reads one answer: status and body.
fn exchange(stream: &mut UnixStream, request: &[u8]) -> (u16, Vec<u8>) {
    stream.write_all(request).expect("sent");
    let mut bytes = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut response = httparse::Response::new(&mut headers);
        if let Ok(httparse::Status::Complete(start)) = response.parse(&bytes) {
            let header = |name: &str| {
                let found = response.headers.iter().find(|h| h.name.eq_ignore_ascii_case(name));
                found.map(|header| String::from_utf8_lossy(header.value).into_owned())
            };
            let body = &bytes[start..];
            let whole = match header("content-length") {
                Some(length) => body.len() == length.parse::<usize>().expect("a number"),
                None => body.ends_with(b"0\r\n\r\n"),
            };
            if whole {
                return (response.code.expect("a status"), body.to_vec());
            }
        }
        let count = stream.read(&mut piece).expect("an answer");
        assert!(count > 0, "hung up after {:?}", String::from_utf8_lossy(&bytes));
        bytes.extend(&piece[..count]);
    }
}

fn post(method: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!("POST /{method} HTTP/1.1\r\nHost: \r\nContent-Length: {length}\r\n\r\n{body}").into()
}

fn call(stream: &mut UnixStream, method: &str, arguments: &Value) -> Value {
    let (status, body) = exchange(stream, &post(method, &arguments.to_string()));
    assert_eq!(status, 200);
    serde_json::from_slice(&body).expect("JSON")
}

fn tar() -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(5);
    header.set_mode(0o644);
    builder.append_data(&mut header, "file", &b"hello"[..]).expect("a member");
    builder.into_inner().expect("a tar")
}

#[test]
fn every_method_answers_as_docker_expects() {
    let place = tempfile::tempdir().expect("a directory");
    let home = place.path().join("home");
    let plugin = Arc::new(plugin(place.path()));
    let mut docker = connect(&plugin);
    let answer = exchange(&mut docker, b"POST /Plugin.Activate HTTP/1.1\r\nHost: \r\n\r\n");
    assert_eq!(answer, (200, br#"{"Implements":["GraphDriver"]}"#.to_vec()));
    let early = call(&mut docker, "GraphDriver.Exists", &json!({"ID": "a"}));
    assert!(early["Err"].as_str().expect("refused").contains("restart Docker"));
    let init = json!({"Home": home, "Opts": null, "UIDMaps": null, "GIDMaps": []});
    assert_eq!(call(&mut docker, "GraphDriver.Init", &init), json!({}));
    let capabilities = call(&mut docker, "GraphDriver.Capabilities", &json!({}));
    assert_eq!(capabilities, json!({"Capabilities": {"ReproducesExactDiffs": false}}));
    assert_eq!(call(&mut docker, "GraphDriver.Create", &json!({"ID": "a"})), json!({}));
    assert_eq!(
        call(&mut docker, "GraphDriver.Exists", &json!({"ID": "a"})),
        json!({"Exists": true})
    );
    assert_eq!(
        call(&mut docker, "GraphDriver.Exists", &json!({"ID": "b"})),
        json!({"Exists": false})
    );
    let tar = tar();
    let mut request = b"POST /GraphDriver.ApplyDiff?id=%61&parent= HTTP/1.1\r\n\
        Transfer-Encoding: chunked\r\n\r\n"
        .to_vec();
    for chunk in tar.chunks(700) {
        request.extend(format!("{:x}\r\n", chunk.len()).as_bytes());
        request.extend([chunk, b"\r\n"].concat());
    }
    request.extend(b"0\r\n\r\n");
    assert_eq!(exchange(&mut docker, &request), (200, br#"{"Size":5}"#.to_vec()));
    let read_write = json!({"ID": "b", "Parent": "a", "MountLabel": "", "StorageOpt": null});
    assert_eq!(call(&mut docker, "GraphDriver.CreateReadWrite", &read_write), json!({}));
    let got = call(&mut docker, "GraphDriver.Get", &json!({"ID": "b"}));
    let merged = Path::new(got["Dir"].as_str().expect("a directory")).to_owned();
    assert_eq!(std::fs::read(merged.join("file")).expect("there"), b"hello");
    std::fs::write(merged.join("new"), "12").expect("written");
    let both = json!({"ID": "b", "Parent": "a"});
    let changes = json!({"Changes": [{"Path": "/new", "Kind": 1}]});
    assert_eq!(call(&mut docker, "GraphDriver.Changes", &both), changes);
    assert_eq!(call(&mut docker, "GraphDriver.DiffSize", &both), json!({"Size": 2}));
    let (status, diff) = exchange(&mut docker, &post("GraphDriver.Diff", &both.to_string()));
    assert!(status == 200 && diff.windows(4).any(|bytes| bytes == b"new\0"));
    let metadata = call(&mut docker, "GraphDriver.GetMetadata", &json!({"ID": "b"}));
    assert_eq!(metadata["Metadata"]["MergedDir"], json!(merged));
    assert!(call(&mut docker, "GraphDriver.Status", &json!({}))["Status"].is_array());
    for (method, id) in [("Put", "b"), ("Remove", "b"), ("Remove", "a"), ("Remove", "a")] {
        let answer = call(&mut docker, &format!("GraphDriver.{method}"), &json!({"ID": id}));
        assert_eq!(answer, json!({}), "{method} {id}");
    }
    assert_eq!(call(&mut docker, "GraphDriver.Cleanup", &json!({})), json!({}));
}

#[test]
fn a_restarted_plugin_serves_without_being_told_again() {
    let place = tempfile::tempdir().expect("a directory");
    let home = place.path().join("home");
    let first = Arc::new(plugin(place.path()));
    let mut docker = connect(&first);
    call(&mut docker, "GraphDriver.Init", &json!({"Home": home}));
    call(&mut docker, "GraphDriver.Create", &json!({"ID": "a"}));
    drop(docker);
    // The connection's thread lets go of the plugin, and that of its lock, a little later.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while Arc::strong_count(&first) > 1 && std::time::Instant::now() < deadline {
        std::thread::yield_now();
    }
    drop(first);
    let mut docker = connect(&Arc::new(plugin(place.path())));
    assert_eq!(
        call(&mut docker, "GraphDriver.Exists", &json!({"ID": "a"})),
        json!({"Exists": true})
    );
}

#[test]
fn refusals_are_sentences() {
    let place = tempfile::tempdir().expect("a directory");
    let plugin = Arc::new(plugin(place.path()));
    let mut docker = connect(&plugin);
    let maps = json!([{"container_id": 0, "host_id": 1000, "size": 1}]);
    for (method, arguments, word) in [
        ("GraphDriver.Init", json!({"Home": "/h", "UIDMaps": maps}), "userns-remap"),
        ("GraphDriver.Init", json!({"Home": "/h", "Opts": ["a=b"]}), "a=b"),
        ("GraphDriver.Init", json!({"Home": "h"}), "absolute"),
        ("VolumeDriver.Create", json!({}), "restart Docker"),
    ] {
        let answer = call(&mut docker, method, &arguments);
        assert!(answer["Err"].as_str().expect("refused").contains(word), "{answer}");
    }
    call(&mut docker, "GraphDriver.Init", &json!({"Home": place.path().join("home")}));
    for (method, arguments, word) in [
        ("GraphDriver.Create", json!({"ID": "../x"}), "../x"),
        ("GraphDriver.Create", json!({"ID": "a", "Parent": "none"}), "no layer none"),
        ("GraphDriver.Create", json!({"ID": "a", "StorageOpt": {"size": "1G"}}), "size"),
        ("GraphDriver.Get", json!({"ID": "none"}), "no layer none"),
        ("GraphDriver.Explode", json!({}), "Explode"),
    ] {
        let answer = call(&mut docker, method, &arguments);
        assert!(answer["Err"].as_str().expect("refused").contains(word), "{answer}");
    }
    // Where Docker expects a tar, JSON would be taken for one.
    let (status, body) = exchange(&mut docker, &post("GraphDriver.Diff", r#"{"ID":"none"}"#));
    assert!(status == 500 && body.starts_with(br#"{"Err":"#));
    let (_, body) = exchange(&mut docker, &post("GraphDriver.Get", "{"));
    assert!(String::from_utf8_lossy(&body).contains("not JSON"));
    let (status, _) = exchange(&mut docker, b"nonsense\r\n\r\n");
    assert_eq!(status, 500);
}

#[test]
fn a_torn_upload_is_an_error_and_the_layer_can_be_removed() {
    let place = tempfile::tempdir().expect("a directory");
    let plugin = Arc::new(plugin(place.path()));
    let mut docker = connect(&plugin);
    call(&mut docker, "GraphDriver.Init", &json!({"Home": place.path().join("home")}));
    call(&mut docker, "GraphDriver.Create", &json!({"ID": "a"}));
    let tar = tar();
    let mut request =
        b"POST /GraphDriver.ApplyDiff?id=a HTTP/1.1\r\nContent-Length: 700\r\n\r\n".to_vec();
    request.extend(&tar[..700]);
    let (status, body) = exchange(&mut docker, &request);
    assert_eq!(status, 200);
    assert!(String::from_utf8_lossy(&body).contains("ends within"), "cut within a member");
    assert_eq!(call(&mut docker, "GraphDriver.Remove", &json!({"ID": "a"})), json!({}));
}

#[test]
fn a_dead_socket_is_replaced_and_a_living_one_is_not() {
    let place = tempfile::tempdir().expect("a directory");
    let path = place.path().join("some/plugin:1.sock");
    let first = Socket::bind(&path).expect("bound");
    assert!(matches!(Socket::bind(&path), Err(Error::Busy(_))));
    let mode = std::os::unix::fs::MetadataExt::mode(&path.metadata().expect("there"));
    assert_eq!(mode & 0o777, 0o600);
    std::mem::drop(first);
    assert!(!path.exists());
    std::os::unix::net::UnixListener::bind(&path).expect("left by a dead plugin");
    Socket::bind(&path).expect("replaced");
}

#[test]
fn a_home_behind_a_link_goes_by_the_name_the_kernel_gives_it() {
    let place = tempfile::tempdir().expect("a directory");
    let home = place.path().join("link");
    std::fs::create_dir(place.path().join("real")).expect("made");
    std::os::unix::fs::symlink("real", &home).expect("made");
    let plugin = Arc::new(plugin(place.path()));
    let mut docker = connect(&plugin);
    for _ in 0..2 {
        assert_eq!(call(&mut docker, "GraphDriver.Init", &json!({"Home": home})), json!({}));
    }
    call(&mut docker, "GraphDriver.Create", &json!({"ID": "a"}));
    let got = call(&mut docker, "GraphDriver.Get", &json!({"ID": "a"}));
    let place = Path::new(got["Dir"].as_str().expect("a directory"));
    assert_eq!(place, place.canonicalize().expect("there"));
}
