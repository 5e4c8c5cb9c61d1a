//! A daemon of one thread: answers a group's events as the test says, and remembers them.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use sluice::upcall::fanotify::{Answer, encode, parse};
use sluice::upcall::group::Group;
use sluice::upcall::sys;

type Seen = Arc<Mutex<Vec<(u64, Range<u64>)>>>;

pub struct Listener {
    pub group: Arc<Group>,
    seen: Seen,
    stop: Option<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Answers until dropped. The file is the event's own: reads and writes of it raise nothing.
    pub fn start(answer: impl Fn(&File, Range<u64>) -> Answer + Send + 'static) -> Listener {
        let group = Arc::new(Group::open().expect("a group"));
        let (quit, stop) = nix::unistd::pipe().expect("a pipe");
        let (ours, seen) = (Arc::clone(&group), Seen::default());
        let heard = Arc::clone(&seen);
        let thread = std::thread::spawn(move || listen(&ours, &quit, &heard, &answer));
        Listener { group, seen, stop: Some(stop), thread: Some(thread) }
    }

    /// The ranges asked of a file since the last call that named it.
    pub fn take(&self, path: &Path) -> Vec<Range<u64>> {
        let inode = path.metadata().expect("a file").ino();
        let mut seen = self.seen.lock().expect("no panic");
        let (of_it, rest) = seen.drain(..).partition::<Vec<_>, _>(|(other, _)| *other == inode);
        *seen = rest;
        of_it.into_iter().map(|(_, range)| range).collect()
    }

    /// How many events there were since the last call of this.
    pub fn take_all(&self) -> usize {
        self.seen.lock().expect("no panic").drain(..).count()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn listen(
    group: &Group,
    quit: &OwnedFd,
    seen: &Seen,
    answer: &dyn Fn(&File, Range<u64>) -> Answer,
) {
    let mut source = File::from(group.as_fd().try_clone_to_owned().expect("a descriptor"));
    let mut buffer = [0; 4096];
    loop {
        let mut fds = [&group.as_fd(), &quit.as_fd()].map(|fd| PollFd::new(*fd, PollFlags::POLLIN));
        poll(&mut fds, PollTimeout::NONE).expect("it can be polled");
        if fds[1].any().unwrap_or(true) {
            return;
        }
        let Ok(size) = source.read(&mut buffer) else { continue };
        for event in parse(&buffer[..size]) {
            let event = event.expect("a good event");
            assert!(event.is_pre_access());
            let number = event.file.expect("a file");
            let file = File::from(sys::adopt(number));
            let inode = file.metadata().expect("a file").ino();
            seen.lock().expect("no panic").push((inode, event.range.clone()));
            // A reader must not wait for a test that has failed.
            let decide = std::panic::AssertUnwindSafe(|| answer(&file, event.range));
            let answer = std::panic::catch_unwind(decide).unwrap_or(Answer::Deny);
            let bytes = encode(number, answer);
            nix::unistd::write(group, &bytes).expect("it is taken");
        }
    }
}
