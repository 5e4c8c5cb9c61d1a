//! The control socket as a file: who may connect, and who had it before.
//!
//! The socket never exists with a mode other than 0600: it is bound inside a private directory and
//! renamed into place. (umask would do too, but it belongs to the whole process.) A file nobody
//! accepts on is what a dead daemon left; it is replaced. One somebody accepts on is refused.

use std::fs::{DirBuilder, File, Permissions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::config::{CONTROL_BIND_PAUSE_MS, CONTROL_BIND_TRIES_MAX};
use crate::error::{Error, Result};

/// What is at a socket's path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// Nothing.
    Absent,
    /// A socket nobody accepts on: its daemon died.
    Stale,
    /// A socket somebody accepts on.
    Alive,
}

/// A bound, listening control socket. The file goes when this is dropped, if it is still ours.
#[derive(Debug)]
pub struct ControlSocket {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
    replaced: bool,
}

impl ControlSocket {
    /// Binds `path`, mode 0600, replacing what a dead daemon left there.
    ///
    /// # Errors
    /// `Busy` when another daemon listens there, `Exists` when there is something else.
    pub fn bind(path: &Path) -> Result<ControlSocket> {
        let failed = |error: std::io::Error| {
            Error::io(&error, format!("cannot listen on {}", path.display()))
        };
        let path = std::path::absolute(path).map_err(failed)?;
        let parent = path.parent().unwrap_or(Path::new("/"));
        // Two daemons that start at once look and replace one after the other.
        let _turn = take_turn(File::open(parent).map_err(failed)?).map_err(failed)?;
        let found = probe(&path)?;
        if found == Probe::Alive {
            return Err(Error::Busy(format!(
                "{}: another daemon is running; stop it or choose another socket",
                path.display()
            )));
        }
        let private = parent.join(format!(".sluice-{}", std::process::id()));
        DirBuilder::new().mode(0o700).create(&private).or_else(|error| match error.kind() {
            // Left by a process of our number that died here; as private as ours.
            ErrorKind::AlreadyExists => Ok(()),
            _ => Err(failed(error)),
        })?;
        let bound = bind_in(&private, &path).map_err(failed);
        let _ = std::fs::remove_dir_all(&private);
        let (listener, inode) = bound?;
        Ok(ControlSocket { listener, path, inode, replaced: found == Probe::Stale })
    }

    /// The listening socket; it does not block.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Whether a daemon that died had left its own there.
    pub fn has_replaced(&self) -> bool {
        self.replaced
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // A successor may have taken the path over.
        let metadata = std::fs::symlink_metadata(&self.path);
        if metadata.is_ok_and(|it| (it.dev(), it.ino()) == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Finds out whether somebody accepts on `path`. Never waits.
pub fn probe(path: &Path) -> Result<Probe> {
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Probe::Absent),
        Err(error) => return Err(Error::io(&error, path.display().to_string())),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(Error::Exists(format!(
                "{} is there and is no socket; remove it or choose another path",
                path.display()
            )));
        }
        Ok(_) => {}
    }
    let failed = |errno: Errno| Error::system(errno as i32, format!("{}", path.display()));
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let probe = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(failed)?;
    match connect(probe.as_raw_fd(), &UnixAddr::new(path).map_err(failed)?) {
        // EAGAIN: somebody listens and has a full queue.
        Ok(()) | Err(Errno::EAGAIN | Errno::EINPROGRESS) => Ok(Probe::Alive),
        Err(Errno::ECONNREFUSED) => Ok(Probe::Stale),
        Err(Errno::ENOENT) => Ok(Probe::Absent),
        Err(errno) => Err(failed(errno)),
    }
}

/// Locks the directory, or gives up after a while: somebody else may use this lock for their own.
pub(super) fn take_turn(directory: File) -> std::io::Result<Flock<File>> {
    let mut attempt = Flock::lock(directory, FlockArg::LockExclusiveNonblock);
    for _ in 0..CONTROL_BIND_TRIES_MAX {
        match attempt {
            Ok(lock) => return Ok(lock),
            Err((directory, Errno::EAGAIN)) => {
                std::thread::sleep(Duration::from_millis(CONTROL_BIND_PAUSE_MS));
                attempt = Flock::lock(directory, FlockArg::LockExclusiveNonblock);
            }
            Err((_, errno)) => return Err(errno.into()),
        }
    }
    attempt.map_err(|(_, errno)| errno.into())
}

/// Binds in `private` and renames to `path`. The name goes through /proc because `private` is
/// longer than `path` and an address has 108 bytes.
fn bind_in(private: &Path, path: &Path) -> std::io::Result<(UnixListener, (u64, u64))> {
    UnixAddr::new(path)?;
    let directory = File::open(private)?;
    let inside = private.join("socket");
    let _ = std::fs::remove_file(&inside);
    let address = format!("/proc/self/fd/{}/socket", directory.as_raw_fd());
    let listener = UnixListener::bind(address)?;
    std::fs::set_permissions(&inside, Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    let metadata = std::fs::symlink_metadata(&inside)?;
    std::fs::rename(&inside, path)?;
    Ok((listener, (metadata.dev(), metadata.ino())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn socket_has_mode_0600_and_goes_with_its_owner() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let socket = ControlSocket::bind(&path).unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(probe(&path), Ok(Probe::Alive));
        drop(socket);
        assert_eq!(probe(&path), Ok(Probe::Absent));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn socket_is_private_before_it_can_be_found() {
        // The private directory is made with 0700 and the rename is the last step, so a watcher of
        // the path never sees another mode.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    if let Ok(metadata) = std::fs::symlink_metadata(&path) {
                        assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
                    }
                }
            });
            for _ in 0..100 {
                ControlSocket::bind(&path).unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }

    #[test]
    fn stale_socket_is_replaced_live_one_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert_eq!(probe(&path), Ok(Probe::Stale));
        let socket = ControlSocket::bind(&path).unwrap();
        let error = ControlSocket::bind(&path).unwrap_err();
        assert!(matches!(&error, Error::Busy(text) if text.contains("another daemon is running")));
        assert_eq!(probe(&path), Ok(Probe::Alive));
        drop(socket);
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(ControlSocket::bind(&path), Err(Error::Exists(_))));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_successors_socket_survives_our_end() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        let socket = ControlSocket::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let successor = ControlSocket::bind(&path).unwrap();
        drop(socket);
        assert_eq!(probe(&path), Ok(Probe::Alive));
        drop(successor);
    }

    #[test]
    fn of_many_that_start_at_once_one_wins() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        let bind = || ControlSocket::bind(&path);
        let sockets: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(bind)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(sockets.iter().filter(|socket| socket.is_ok()).count(), 1);
    }
}
