//! The server over a real socket: hostile, slow and many clients against a real thread.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};

use super::control::{Act, Hooks};
use super::control_tests::{control, entry, fixture};
use super::server::Server;
use super::socket::{ControlSocket, Probe, probe};
use crate::config::{CONTROL_CONNECTIONS_MAX, CONTROL_SLOW_THREADS};

const GET_DAEMON: &str = "GET /api/v1/daemon HTTP/1.1\r\n\r\n";
/// Long enough for a loaded machine, short enough to notice a hang.
const PATIENCE: Duration = Duration::from_secs(60);

struct Daemon {
    server: Option<Server>,
    directory: tempfile::TempDir,
    path: PathBuf,
}

impl Daemon {
    fn start(hooks: Hooks) -> Daemon {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let socket = ControlSocket::bind(&path).unwrap();
        let server = Server::start(socket, Arc::new(control(hooks))).unwrap();
        Daemon { server: Some(server), directory, path }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    fn ask(&self, request: &str) -> String {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        read_response(&mut stream)
    }

    /// A PUT of an image; its hook may block.
    fn put_image(&self, id: &str) -> UnixStream {
        let body = entry("d", id, &fixture("zran"), self.directory.path()).to_string();
        let mut stream = self.connect();
        let length = body.len();
        write!(stream, "PUT /api/v2/blobs HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}")
            .unwrap();
        stream
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.stop();
        }
        assert_eq!(probe(&self.path), Ok(Probe::Absent));
    }
}

/// One response, by its length.
fn read_response(stream: &mut UnixStream) -> String {
    let mut text = String::new();
    let mut byte = [0];
    while !text.ends_with("\r\n\r\n") {
        if stream.read(&mut byte).unwrap() == 0 {
            return text;
        }
        text.push(byte[0] as char);
    }
    let length = text.lines().find_map(|line| line.strip_prefix("Content-Length: "));
    let mut body = vec![0; length.map_or(0, |length| length.parse().unwrap())];
    stream.read_exact(&mut body).unwrap();
    text + &String::from_utf8(body).unwrap()
}

#[track_caller]
fn check_ok(response: &str) {
    assert!(response.starts_with("HTTP/1.1 200 \r\n"), "{response:?}");
}

/// A hook that reports each call and waits until it is let go.
fn blocking_hook() -> (Hooks, Receiver<String>, Sender<()>) {
    let (report, reports) = crossbeam_channel::unbounded();
    let (release, wait) = crossbeam_channel::unbounded::<()>();
    let registered: super::control::Registered = Box::new(move |image, _| {
        report.send(image.id.clone()).unwrap();
        let _ = wait.recv_timeout(PATIENCE);
        Ok(())
    });
    (Hooks { registered, ..Hooks::idle() }, reports, release)
}

#[test]
fn connections_are_kept_and_several_requests_at_once_are_answered_in_order() {
    let daemon = Daemon::start(Hooks::idle());
    let mut stream = daemon.connect();
    for _ in 0..3 {
        stream.write_all(GET_DAEMON.as_bytes()).unwrap();
        check_ok(&read_response(&mut stream));
    }
    let several = format!("{GET_DAEMON}GET /nothing HTTP/1.1\r\n\r\n{GET_DAEMON}");
    stream.write_all(several.as_bytes()).unwrap();
    check_ok(&read_response(&mut stream));
    assert!(read_response(&mut stream).starts_with("HTTP/1.1 404 \r\n"));
    check_ok(&read_response(&mut stream));
}

#[test]
fn old_clients_see_the_end_of_the_connection() {
    let daemon = Daemon::start(Hooks::idle());
    let mut stream = daemon.connect();
    stream.write_all(b"GET /api/v1/daemon HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    check_ok(&text);
    assert!(text.contains("Connection: close\r\n"));
}

#[test]
fn a_client_that_closes_its_half_still_gets_the_answer() {
    let daemon = Daemon::start(Hooks::idle());
    let mut stream = daemon.connect();
    stream.write_all(GET_DAEMON.as_bytes()).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    check_ok(&read_response(&mut stream));
}

#[test]
fn a_client_that_awaits_continue_is_told() {
    let daemon = Daemon::start(Hooks::idle());
    let mut stream = daemon.connect();
    let head = "PUT /api/v1/daemon HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 20\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    assert_eq!(read_response(&mut stream), "HTTP/1.1 100 \r\n\r\n");
    stream.write_all(b"{\"log_level\":\"info\"}").unwrap();
    assert!(read_response(&mut stream).starts_with("HTTP/1.1 204 \r\n"));
}

#[test]
fn listing_blobs_does_not_end_the_daemon() {
    let daemon = Daemon::start(Hooks::idle());
    let response = daemon.ask("GET /api/v2/blobs?domain_id=d HTTP/1.1\r\n\r\n");
    check_ok(&response);
    assert!(response.ends_with("\r\n\r\n[]"));
    check_ok(&daemon.ask(GET_DAEMON));
}

#[test]
fn garbage_is_answered_400_and_harms_nobody() {
    let daemon = Daemon::start(Hooks::idle());
    for garbage in [
        "\0\0\0\0\r\n\r\n".to_owned(),
        "OPTIONS * HTTP/1.1\r\n\r\n".to_owned(),
        "PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        format!("GET / HTTP/1.1\r\na: {}", "a".repeat(100_000)),
        format!("PUT / HTTP/1.1\r\nContent-Length: 51201\r\n\r\n{}", "a".repeat(51_201)),
        format!("PUT / HTTP/1.1\r\nContent-Length: 9999999\r\n\r\n{}", "a".repeat(2_000_000)),
    ] {
        let mut stream = daemon.connect();
        // The far end may stop listening half-way, after it has answered.
        let _ = stream.write_all(garbage.as_bytes());
        let response = read_response(&mut stream);
        assert!(response.starts_with("HTTP/1.1 400 \r\nServer: Firecracker API"), "{response:?}");
        assert!(response.contains("previous unanswered requests will be dropped"));
    }
    check_ok(&daemon.ask(GET_DAEMON));
}

#[test]
fn a_body_of_the_largest_size_is_taken_and_refused_as_json() {
    let daemon = Daemon::start(Hooks::idle());
    let request = format!(
        "PUT /api/v2/blobs HTTP/1.1\r\nContent-Length: 51200\r\n\r\n{}",
        "[".repeat(51_200)
    );
    let response = daemon.ask(&request);
    assert!(response.starts_with("HTTP/1.1 400 \r\nServer: Nydus API"), "{response:?}");
    assert!(response.contains("ParseBody"));
}

#[test]
fn two_hundred_clients_at_once_are_answered_while_others_stall() {
    let daemon = Daemon::start(Hooks::idle());
    // These hold nothing but their connection: silent, in the middle of a head, of a body.
    let stalled: Vec<UnixStream> = (0..40)
        .map(|index| {
            let mut stream = daemon.connect();
            let part =
                ["", "GET /api", "PUT / HTTP/1.1\r\nContent-Length: 9\r\n\r\nabc"][index % 3];
            stream.write_all(part.as_bytes()).unwrap();
            stream
        })
        .collect();
    std::thread::scope(|scope| {
        for _ in 0..200 {
            scope.spawn(|| check_ok(&daemon.ask(GET_DAEMON)));
        }
    });
    drop(stalled);
}

#[test]
fn a_client_that_never_reads_holds_only_itself() {
    let daemon = Daemon::start(Hooks::idle());
    let mut stream = daemon.connect();
    stream.set_nonblocking(true).unwrap();
    // Until our answers fill its socket and it cannot send any more.
    let mut refused = 0;
    let end = Instant::now() + PATIENCE;
    while refused < 1000 && Instant::now() < end {
        match stream.write(GET_DAEMON.repeat(20).as_bytes()) {
            Ok(sent) if sent > 0 => refused = 0,
            _ => {
                refused += 1;
                std::thread::yield_now();
            }
        }
    }
    check_ok(&daemon.ask(GET_DAEMON));
}

#[test]
fn when_all_connections_are_idle_the_oldest_makes_room() {
    let daemon = Daemon::start(Hooks::idle());
    let mut idle: Vec<UnixStream> = (0..CONTROL_CONNECTIONS_MAX)
        .map(|_| {
            let mut stream = daemon.connect();
            stream.write_all(GET_DAEMON.as_bytes()).unwrap();
            check_ok(&read_response(&mut stream));
            stream
        })
        .collect();
    check_ok(&daemon.ask(GET_DAEMON));
    assert_eq!(idle[0].read(&mut [0]).unwrap(), 0);
    // The youngest is still there.
    let last = idle.last_mut().unwrap();
    last.write_all(GET_DAEMON.as_bytes()).unwrap();
    check_ok(&read_response(last));
}

#[test]
fn a_slow_registration_delays_nobody() {
    let (hooks, reports, release) = blocking_hook();
    let daemon = Daemon::start(hooks);
    let mut slow: Vec<UnixStream> =
        (0..CONTROL_SLOW_THREADS).map(|index| daemon.put_image(&format!("i{index}"))).collect();
    for _ in 0..CONTROL_SLOW_THREADS {
        reports.recv_timeout(PATIENCE).unwrap();
    }
    // Every thread for slow calls is taken; looking is as quick as ever, even at the new images.
    for path in ["/api/v1/daemon", "/api/v2/blobs?domain_id=d", "/api/sluice/v1/stat"] {
        check_ok(&daemon.ask(&format!("GET {path} HTTP/1.1\r\n\r\n")));
    }
    for _ in 0..CONTROL_SLOW_THREADS {
        release.send(()).unwrap();
    }
    for stream in &mut slow {
        assert!(read_response(stream).starts_with("HTTP/1.1 204 \r\n"));
    }
}

#[test]
fn a_client_that_left_before_its_answer_harms_nobody() {
    let (hooks, reports, release) = blocking_hook();
    let daemon = Daemon::start(hooks);
    drop(daemon.put_image("i"));
    assert_eq!(reports.recv_timeout(PATIENCE).unwrap(), "i");
    release.send(()).unwrap();
    check_ok(&daemon.ask(GET_DAEMON));
}

#[test]
fn exit_is_answered_before_the_server_stops() {
    let (sender, exits) = crossbeam_channel::bounded(1);
    let exit: Act = Box::new(move || {
        sender.send(()).unwrap();
        Ok(())
    });
    let mut daemon = Daemon::start(Hooks { exit, ..Hooks::idle() });
    let mut stream = daemon.connect();
    stream.write_all(b"PUT /api/v1/daemon/exit HTTP/1.1\r\n\r\n").unwrap();
    exits.recv_timeout(PATIENCE).unwrap();
    daemon.server.take().unwrap().stop();
    assert!(read_response(&mut stream).starts_with("HTTP/1.1 204 \r\n"));
}

#[test]
fn stopping_does_not_wait_for_clients_that_do_nothing() {
    let daemon = Daemon::start(Hooks::idle());
    let mut idle = daemon.connect();
    let mut partial = daemon.connect();
    partial.write_all(b"GET /").unwrap();
    check_ok(&daemon.ask(GET_DAEMON));
    drop(daemon);
    assert_eq!(idle.read(&mut [0]).unwrap_or(0), 0);
    assert_eq!(partial.read(&mut [0]).unwrap_or(0), 0);
}
