//! Whether the kernel behaves as the fanotify door needs: tried, not looked up.
//!
//! A tiny image over files in the cache directory is mounted, read and answered for. Nothing of it
//! has a name: the files are unnamed, the mounts are nowhere, so nothing is left behind, whenever
//! this process ends. Reads are done by a thread of their own while this one answers; both are
//! given up at a deadline, with the group, which lets every reader go.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::fanotify::{Answer, EVENT_BYTES, encode, parse};
use super::group::Group;
use super::mounting::{self, DetachedMount, Reading};
use super::sys;
use crate::config::PROBE_WAIT_MS;
use crate::engine::Fd;
use crate::error::{Error, Result};
use crate::image::miniature::miniature;

/// What was found, in the order it was tried. The last one may be what stopped it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// One sentence each.
    pub findings: Vec<Finding>,
    /// Whether all that holds for images that are read directly, too ([`Reading::Direct`]).
    pub reads_directly: bool,
}

/// One thing that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What was tried, in a word or two.
    pub check: &'static str,
    /// Whether the door can be used as far as this is concerned.
    pub is_good: bool,
    /// What was seen, and what to do if it is not good.
    pub text: String,
}

impl Report {
    /// Whether the door can be used; not if nothing was tried.
    pub fn is_good(&self) -> bool {
        !self.findings.is_empty() && self.reason().is_none()
    }

    /// Why it cannot.
    pub fn reason(&self) -> Option<String> {
        let bad = self.findings.iter().find(|finding| !finding.is_good);
        bad.map(|finding| format!("{}: {}", finding.check, finding.text))
    }
}

/// The last one is for what is read directly.
const SEGMENTS: usize = 3;
const DROP: PosixFadviseAdvice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
/// Blocks of a segment: two, so that a file can be there in part.
const BLOCK_BITS: u32 = 1;
const BLOCK: usize = 4096;
const SEGMENT: usize = BLOCK << BLOCK_BITS;

/// Tries one thing: a sentence about what is so, or an error about what is in the way.
type Check = fn(&mut Scene) -> Result<String>;

/// Tries everything, with files in `cache`. Takes `PROBE_WAIT_MS` at most.
pub fn probe(cache: &Path) -> Report {
    const CHECKS: [(&str, Check); 6] = [
        ("fanotify events", absent_data_raises_an_event),
        ("fanotify short", short_file_is_an_error),
        ("fanotify filling", filled_file_is_read),
        ("fanotify refusal", refused_reader_gets_an_error),
        ("fanotify complete", ignored_file_raises_nothing),
        ("fanotify metadata", metadata_is_read),
    ];
    let (mut report, mut is_direct) = (Report::default(), false);
    let mut add = |check, result: Result<String>| {
        let is_good = result.is_ok();
        let text = result.unwrap_or_else(|error| error.to_string());
        report.findings.push(Finding { check, is_good, text });
        is_good
    };
    match Scene::set(cache) {
        Err(error) => drop(add("fanotify mounting", Err(error))),
        Ok(mut scene) => {
            let text = "an image over files is mounted, and its mount watched";
            add("fanotify mounting", Ok(text.to_owned()));
            if CHECKS.iter().all(|(name, check)| add(name, check(&mut scene))) {
                let direct = direct_reads_are_as_good(&mut scene);
                is_direct = direct.is_ok();
                let text = match direct {
                    Ok(()) => "a whole image can be read past the page cache of its files".into(),
                    Err(error) => format!("images are read through their files' cache: {error}"),
                };
                add("fanotify directio", Ok(text));
            }
        }
    }
    report.reads_directly = is_direct;
    report
}

/// The group and how long it is waited for.
struct Watch {
    /// Gone at the deadline, and with it whatever waits for an answer.
    group: Option<Group>,
    deadline: Instant,
}

/// What another thread did and how many events it caused.
struct Outcome<T> {
    result: T,
    events: usize,
}

impl Watch {
    /// Runs `act` on a thread of its own and answers the events it causes.
    fn during<T: Send + 'static>(
        &mut self,
        act: impl FnOnce() -> T + Send + 'static,
        answer: impl Fn() -> Answer,
    ) -> Result<Outcome<T>> {
        let (sender, results) = sync_channel(1);
        let pipe = nix::unistd::pipe2(OFlag::O_CLOEXEC);
        let (bell, ring) = pipe.map_err(|errno| failed(errno, "cannot make a pipe"))?;
        let work = move || {
            // Nobody listens any more if the deadline has passed.
            let _ = sender.send(act());
            drop(ring);
        };
        let thread = std::thread::Builder::new().name("probe".to_owned()).spawn(work);
        thread.map_err(|error| Error::io(&error, "cannot start a thread"))?;
        let mut events = 0;
        loop {
            match self.wait(&bell, &results)? {
                Some(result) => return Ok(Outcome { result, events }),
                None => events += self.answer_one(&answer)?,
            }
        }
    }

    /// The thread's result, or `None` when there may be an event.
    fn wait<T>(&mut self, bell: &OwnedFd, results: &Receiver<T>) -> Result<Option<T>> {
        let late = || Error::Deadline("the kernel did not go on in time".to_owned());
        let left = self.deadline.saturating_duration_since(Instant::now());
        let group = self.group.as_ref().ok_or_else(late)?;
        let mut fds = [group.as_fd(), bell.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Err(Errno::EINTR) => return Ok(None),
            Err(errno) => return Err(failed(errno, "cannot poll")),
            Ok(_) => {}
        }
        // An event that is there when the result is belongs to it all the same.
        let [asked, done] = [0, 1].map(|at: usize| fds[at].any() == Some(true));
        if !left.is_zero() && asked {
            return Ok(None);
        }
        if !left.is_zero() && done {
            return results.recv().map(Some).map_err(|_| late());
        }
        self.group = None;
        Err(late())
    }

    fn answer_one(&self, answer: &impl Fn() -> Answer) -> Result<usize> {
        let Some(group) = &self.group else { return Ok(0) };
        let mut buffer = [0; EVENT_BYTES];
        let size = match nix::unistd::read(group, &mut buffer) {
            Ok(size) => size,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(0),
            Err(errno) => return Err(failed(errno, "cannot read an event")),
        };
        let mut events = 0;
        for event in parse(&buffer[..size]) {
            let Some(number) = event?.file else { continue };
            let file = sys::adopt(number);
            let answer = encode(Fd(file.as_raw_fd()), answer());
            nix::unistd::write(group, &answer)
                .map_err(|errno| failed(errno, "cannot answer an event"))?;
            events += 1;
        }
        Ok(events)
    }

    fn group(&self) -> Result<&Group> {
        self.group.as_ref().ok_or_else(|| Error::Deadline("the group was given up".to_owned()))
    }
}

/// The image and what it is made of. Files were opened before there was a mark: what is written
/// through them raises no events.
struct Scene {
    watch: Watch,
    image: Arc<DetachedMount>,
    segments: Vec<File>,
    /// Metadata behind the mark, which no image of ours has.
    watched_metadata: File,
    /// The mount with the mark.
    door: OwnedFd,
}

impl Scene {
    fn set(cache: &Path) -> Result<Scene> {
        let deadline = Instant::now() + Duration::from_millis(PROBE_WAIT_MS);
        let mut watch = Watch { group: Some(Group::open()?), deadline };
        let door = mounting::clone_directory(cache)?;
        let path = name(&door);
        let segments = (0..SEGMENTS).map(|_| unnamed(Path::new(&path)));
        let segments = segments.collect::<Result<Vec<_>>>()?;
        let (metadata, watched_metadata) = (unnamed(cache)?, unnamed(Path::new(&path))?);
        for file in [&metadata, &watched_metadata] {
            file.write_all_at(&miniature(SEGMENTS, BLOCK_BITS), 0)
                .map_err(|error| Error::io(&error, "cannot write to the cache directory"))?;
        }
        watch.group()?.mark_mount(Path::new(&path))?;
        let mounting = mounting(&metadata, &segments, Reading::Cached);
        let mounting = watch.during(mounting, || Answer::Allow)?;
        let image = Arc::new(mounting.result?);
        match mounting.events {
            0 => Ok(Scene { watch, image, segments, watched_metadata, door }),
            events => Err(unexpected(format!("mounting an image raises {events} events"))),
        }
    }

    /// Reads `size` bytes at `start` of a file of the image, from the files below, not from memory.
    fn read(
        &mut self,
        file: usize,
        (start, size): (usize, usize),
        answer: impl Fn(&[File]) -> Answer,
    ) -> Result<Outcome<Bytes>> {
        let image = Arc::clone(&self.image);
        let act = move || read_afresh(&image, file, start, size);
        self.watch.during(act, || answer(&self.segments))
    }
}

/// What a reader gets: bytes or an errno.
type Bytes = std::result::Result<Vec<u8>, i32>;

fn read_afresh(image: &DetachedMount, file: usize, start: usize, size: usize) -> Bytes {
    let file = image.open(&file.to_string()).map_err(|error| error.errno())?;
    posix_fadvise(&file, 0, 0, DROP).map_err(|errno| errno as i32)?;
    let mut bytes = vec![0; size];
    let read = file.read_at(&mut bytes, start as u64);
    let count = read.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))?;
    bytes.truncate(count);
    Ok(bytes)
}

/// An unnamed file, opened through the mount of `directory`.
fn unnamed(directory: &Path) -> Result<File> {
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_TMPFILE).open(directory);
    file.map_err(|error| Error::io(&error, format!("an unnamed file in {}", directory.display())))
}

/// Names a file for the kernel: it opens it again, through the mount it was opened through.
fn name(file: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Makes an image that is nowhere, when it is run.
fn mounting(
    metadata: &File,
    segments: &[File],
    reading: Reading,
) -> impl FnOnce() -> Result<DetachedMount> + Send + 'static {
    let metadata = name(metadata);
    let segments: Vec<String> = segments.iter().map(name).collect();
    move || mounting::image_of_files(&metadata, segments, reading)
}

/// What a segment holds; never a zero.
fn contents(segment: usize) -> Vec<u8> {
    (0..SEGMENT).map(|at| (at / 5 + segment * 7) as u8 | 1).collect()
}

/// Only ever more of it: ftruncate(2) asks whoever watches the mount, which is us, also through a
/// file that was opened before (do_ftruncate, fs/open.c).
fn fill(segments: &[File], segment: usize, size: usize) -> Answer {
    match segments[segment].write_all_at(&contents(segment)[..size], 0) {
        Ok(()) => Answer::Allow,
        Err(_) => Answer::Deny,
    }
}

fn absent_data_raises_an_event(scene: &mut Scene) -> Result<String> {
    let outcome = scene.read(0, (0, BLOCK), |_| Answer::Allow)?;
    match outcome.events {
        0 => Err(Error::Unsupported(
            "a read of an image's data raises no event: this kernel's EROFS does not ask (Linux \
             6.14 or later with file-backed mounts does)"
                .to_owned(),
        )),
        _ => Ok("a read of data that is not there raises an event".to_owned()),
    }
}

/// Once with nothing in the file, once with its first half.
fn short_file_is_an_error(scene: &mut Scene) -> Result<String> {
    let empty = scene.read(0, (0, SEGMENT), |_| Answer::Allow)?.result;
    let whole = scene.read(0, (0, SEGMENT), |segments| fill(segments, 0, BLOCK))?.result;
    let behind = scene.read(0, (BLOCK, BLOCK), |_| Answer::Allow)?.result;
    // The half that is there may be read, when the kernel reads it apart from the other.
    let is_right = |bytes: &Vec<u8>| bytes.len() <= BLOCK && contents(0).starts_with(bytes);
    let good = empty == Err(libc::EIO)
        && (whole == Err(libc::EIO) || whole.as_ref().is_ok_and(is_right))
        && behind == Err(libc::EIO);
    match good {
        true => Ok("a reader of what is not in a file gets EIO".to_owned()),
        false => Err(Error::Unsupported(format!(
            "a reader of what is not in a file gets {}, not EIO: this kernel could show zeros for \
             data that was never loaded; take a newer one (6.18 of March 2026 is right)",
            [empty, whole, behind].iter().map(describe).collect::<Vec<_>>().join(", ")
        ))),
    }
}

fn describe(result: &Bytes) -> String {
    match result {
        Ok(bytes) if bytes.contains(&0) => format!("{} bytes with zeros", bytes.len()),
        Ok(bytes) => format!("{} bytes", bytes.len()),
        Err(libc::EIO) => "EIO".to_owned(),
        Err(errno) => format!("{:?}", Errno::from_raw(*errno)),
    }
}

fn filled_file_is_read(scene: &mut Scene) -> Result<String> {
    let filled = scene.read(0, (0, SEGMENT), |segments| fill(segments, 0, SEGMENT))?;
    let again = scene.read(0, (0, SEGMENT), |_| Answer::Allow)?;
    match filled.result == Ok(contents(0)) && again.result == Ok(contents(0)) && again.events > 0 {
        true => Ok("what is filled before the answer is what is read, also after an error".into()),
        false => Err(unexpected(format!(
            "after filling, a reader gets {}, and once more {} with {} events",
            describe(&filled.result),
            describe(&again.result),
            again.events
        ))),
    }
}

fn refused_reader_gets_an_error(scene: &mut Scene) -> Result<String> {
    let refused = scene.read(1, (0, SEGMENT), |_| Answer::Deny)?.result;
    let served = scene.read(1, (0, SEGMENT), |segments| fill(segments, 1, SEGMENT))?.result;
    match refused == Err(libc::EIO) && served == Ok(contents(1)) {
        true => Ok("a refused reader gets EIO, and data the next time".to_owned()),
        false => Err(unexpected(format!(
            "a refused reader gets {}, a later one {}",
            describe(&refused),
            describe(&served)
        ))),
    }
}

/// Checks before have shown that file 0 raises events when it is not ignored.
fn ignored_file_raises_nothing(scene: &mut Scene) -> Result<String> {
    let file = name(&scene.segments[0]);
    scene.watch.group()?.ignore(scene.door.as_fd(), &file)?;
    let outcome = scene.read(0, (0, SEGMENT), |_| Answer::Allow)?;
    match (outcome.events, outcome.result == Ok(contents(0))) {
        (0, true) => Ok("a complete file raises no more events".to_owned()),
        (events, _) => Err(unexpected(format!(
            "a file that is ignored raises {events} events, its reader gets {}",
            describe(&outcome.result)
        ))),
    }
}

/// The metadata of our images is outside of the mark, so either is good.
fn metadata_is_read(scene: &mut Scene) -> Result<String> {
    let dropped = scene.watched_metadata.sync_data().is_ok()
        && posix_fadvise(&scene.watched_metadata, 0, 0, DROP).is_ok();
    let mount = mounting(&scene.watched_metadata, &scene.segments, Reading::Cached);
    let look = move || mount().and_then(|image| image.open("0").map(drop));
    let outcome = scene.watch.during(look, || Answer::Allow)?;
    Ok(match (outcome.result, outcome.events) {
        (Ok(()), 0) if dropped => "metadata is read without events".to_owned(),
        (Ok(()), events) => {
            format!("reading metadata raises events ({events}); it is kept where none are raised")
        }
        (Err(error), _) => format!("metadata cannot be read behind a mark, and need not: {error}"),
    })
}

/// What the other checks show, of a file that is read directly: it raises events, and its reader
/// gets EIO while it is empty or short, and what is filled then.
fn direct_reads_are_as_good(scene: &mut Scene) -> Result<()> {
    const FILE: usize = SEGMENTS - 1;
    let mount = mounting(&scene.watched_metadata, &scene.segments, Reading::Direct);
    scene.image = Arc::new(scene.watch.during(mount, || Answer::Allow)?.result?);
    let empty = scene.read(FILE, (0, SEGMENT), |_| Answer::Allow)?;
    let behind = scene.read(FILE, (BLOCK, BLOCK), |segments| fill(segments, FILE, BLOCK))?.result;
    let filled = scene.read(FILE, (0, SEGMENT), |segments| fill(segments, FILE, SEGMENT))?;
    let is_refused = empty.result == Err(libc::EIO) && behind == Err(libc::EIO);
    match is_refused && empty.events > 0 && filled.result == Ok(contents(FILE)) {
        true => Ok(()),
        false => Err(Error::Unsupported(format!(
            "read directly, an empty file gives {}, what is behind its end {}, and a full one {}",
            describe(&empty.result),
            describe(&behind),
            describe(&filled.result)
        ))),
    }
}

fn unexpected(text: String) -> Error {
    Error::Unsupported(format!("{text}: this kernel does not behave as the fanotify door needs"))
}

fn failed(errno: Errno, what: &str) -> Error {
    Error::system(errno as i32, what)
}
