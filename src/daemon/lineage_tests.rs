//! Daemons that follow each other by way of a supervisor, which this file plays: states, calls and
//! statuses as nydusd's managers expect them. The device is a socket that nobody answers at.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use serde_json::{Value, json};

use super::api::{self, Method, Request};
use super::control::{ControlPlane, Hooks};
use super::control_tests::{control, entry, fixture};
use super::doors::{Cachefiles, Doors};
use super::entry::Entry;
use super::keeper::{Ending, Keeper};
use super::lineage::Lineage;
use super::options;
use super::reply::Identity;
use super::state::State;
use crate::config::Config;
use crate::engine::Fd;
use crate::upcall::sys::adopt;

struct World {
    directory: tempfile::TempDir,
    listener: UnixListener,
}

struct Daemon {
    lineage: Arc<Lineage>,
    control: Arc<ControlPlane>,
}

impl World {
    fn new() -> World {
        let directory = tempfile::tempdir().unwrap();
        for name in ["cache", "other", "state"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        let listener = UnixListener::bind(directory.path().join("supervisor")).unwrap();
        World { directory, listener }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A daemon that was started with --upgrade.
    fn daemon(&self, cache: &str) -> Daemon {
        let arguments = ["--fscache", self.path(cache).to_str().unwrap()].map(Into::into);
        let supervisor = Some(self.path("supervisor"));
        let (state_dir, upgrade) = (self.path("state"), true);
        let config = options::parse(&arguments, &[0]).unwrap().config;
        let config = Config { supervisor, state_dir, upgrade, ..config };
        let (journal, _) = crate::blob::journal::Journal::new(config.log_level);
        let door = Cachefiles { device: Arc::default(), directory: self.path(cache) };
        let doors = Doors { cachefiles: Some(door), fanotify: None };
        let nobody = Keeper::nobody();
        let lineage = Lineage::begin(&config, nobody, &doors, Vec::new(), &journal).unwrap();
        let lineage = Arc::new(lineage);
        let (starting, saving) = (Arc::clone(&lineage), Arc::clone(&lineage));
        let (taking, remembering) = (Arc::clone(&lineage), Arc::clone(&lineage));
        let hooks = Hooks {
            start: Box::new(move || starting.start()),
            send_fd: Box::new(move || saving.save()),
            takeover: Box::new(move || taking.take_over()),
            registered: Box::new(move |image, body| {
                remembering.remembered.remember(image, body, || true)
            }),
            ..Hooks::idle()
        };
        let identity = Identity { id: Some("d".into()), supervisor: Some("s".into()) };
        let control = Arc::new(ControlPlane { state: Arc::default(), identity, ..control(hooks) });
        lineage.attach(Vec::new(), Vec::new(), &control);
        Daemon { lineage, control }
    }

    /// Receives as nydus-snapshotter does: one message with the file, then up to the end.
    fn fetch(&self) -> (Vec<u8>, OwnedFd) {
        let (mut stream, _) = self.listener.accept().unwrap();
        let mut bytes = vec![0; 32 * 1024];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut space = [IoSliceMut::new(&mut bytes)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message =
            recvmsg::<()>(stream.as_raw_fd(), &mut space, Some(&mut control), flags).unwrap();
        let mut numbers = Vec::new();
        for part in message.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(some) = part {
                numbers.extend(some);
            }
        }
        let [number] = numbers[..] else { panic!("{} files, not one", numbers.len()) };
        let (size, file) = (message.bytes, adopt(Fd(number)));
        bytes.truncate(size);
        stream.read_to_end(&mut bytes).unwrap();
        (bytes, file)
    }

    fn send(&self, state: &[u8], file: &OwnedFd) {
        let (mut stream, _): (UnixStream, _) = self.listener.accept().unwrap();
        let numbers = [file.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&numbers)];
        let (text, flags) = ([IoSlice::new(&state[..1])], MsgFlags::MSG_NOSIGNAL);
        sendmsg::<()>(stream.as_raw_fd(), &text, &rights, flags, None).unwrap();
        stream.write_all(&state[1..]).unwrap();
    }

    /// What a first daemon would have saved.
    fn state(&self, cache: &str) -> Value {
        json!({
            "sluice": 1, "door": "cachefiles", "images": [],
            "cache_dir": self.path(cache), "state_dir": self.path("state"),
        })
    }
}

impl Daemon {
    fn put(&self, target: &str) -> u16 {
        let request =
            Request { method: Method::Put, target: target.to_owned(), body: None, peer: None };
        self.control.perform(api::route(&request).unwrap()).status
    }

    fn register(&self, id: &str, directory: &Path) {
        let body = entry("d", id, &fixture("zran"), directory).to_string().into_bytes();
        self.control.register(Entry::parse(&body).unwrap(), &body).unwrap();
    }

    fn take_over(&self, world: &World, state: &[u8], file: &OwnedFd) -> u16 {
        std::thread::scope(|scope| {
            scope.spawn(|| world.send(state, file));
            self.put("/api/v1/daemon/fuse/takeover")
        })
    }

    fn images(&self) -> Vec<String> {
        self.control.catalog.images().iter().map(|image| image.id.clone()).collect()
    }

    /// What the device at the other end hears next.
    fn says(far: &OwnedFd) -> Vec<u8> {
        let mut bytes = vec![0; 64];
        let size = nix::unistd::read(far.as_fd(), &mut bytes).unwrap();
        bytes.truncate(size);
        bytes
    }
}

fn device() -> (OwnedFd, OwnedFd) {
    let kind = SockType::SeqPacket;
    let (family, flags) = (AddressFamily::Unix, SockFlag::SOCK_CLOEXEC);
    socketpair(family, kind, None, flags).unwrap()
}

#[test]
fn a_successor_takes_state_and_device_and_starts_when_told() {
    let world = World::new();
    let (near, far) = device();
    let first = world.daemon("cache");
    let state = world.state("cache").to_string();
    assert_eq!(first.take_over(&world, state.as_bytes(), &near), 204);
    assert_eq!(first.put("/api/v1/daemon/start"), 204);
    assert_eq!(Daemon::says(&far), b"restore");
    first.register("early", world.directory.path());

    let (state, file) = std::thread::scope(|scope| {
        let fetching = scope.spawn(|| world.fetch());
        assert_eq!(first.put("/api/v1/daemon/fuse/sendfd"), 204);
        fetching.join().unwrap()
    });
    let second = world.daemon("cache");
    assert_eq!(second.control.state.state(), State::Init);
    assert_eq!(second.put("/api/v1/daemon/start"), 400);
    assert_eq!(second.take_over(&world, &state, &file), 204);
    assert_eq!(
        (second.control.state.state(), second.images()),
        (State::Ready, vec!["early".into()])
    );
    assert_eq!(second.put("/api/v1/daemon/fuse/takeover"), 400);
    // The first serves on until it is told to go: what comes meanwhile is not lost.
    first.register("late", world.directory.path());
    first.lineage.end(Ending::HandOver);
    assert_eq!(second.put("/api/v1/daemon/start"), 204);
    second.lineage.wait();
    assert_eq!(Daemon::says(&far), b"restore");
    assert_eq!(second.images(), ["early", "late"]);
    assert_eq!(second.control.state.state(), State::Running);
}

#[test]
fn a_state_of_another_node_brings_its_images_along() {
    let world = World::new();
    let (near, _far) = device();
    let first = world.daemon("cache");
    first.register("i", world.directory.path());
    let mut state = world.state("cache");
    state["state_dir"] = "/elsewhere".into();
    state["images"] = serde_json::to_value(first.lineage.remembered.records()).unwrap();
    std::fs::remove_dir_all(world.path("state")).unwrap();
    std::fs::create_dir(world.path("state")).unwrap();
    let second = world.daemon("cache");
    assert_eq!(second.take_over(&world, state.to_string().as_bytes(), &near), 204);
    assert_eq!(second.images(), ["i"]);
    assert!(second.lineage.remembered.find("d", "i").is_some());
}

#[test]
fn a_state_of_no_use_leaves_the_daemon_waiting_for_a_better_one() {
    let world = World::new();
    let (near, _far) = device();
    let daemon = world.daemon("cache");
    let mut group = world.state("cache");
    group["door"] = "fanotify".into();
    for state in [world.state("other"), group, json!({"sluice": 2}), json!("nydusd")] {
        let status = daemon.take_over(&world, state.to_string().as_bytes(), &near);
        assert!(matches!(status, 500 | 501), "{state}: {status}");
        assert_eq!(daemon.control.state.state(), State::Init);
    }
    let good = world.state("cache").to_string();
    assert_eq!(daemon.take_over(&world, good.as_bytes(), &near), 204);
}
