//! systemd as the keeper: its store of files, and word of how the daemon is (sd_notify(3)).
//!
//! Messages are datagrams to $NOTIFY_SOCKET; files come with them. At the next start systemd hands
//! everything back from number 3 on and names it in the environment (sd_listen_fds(3)). systemd
//! drops the files when the service stays down, so nothing has to be said at an orderly end.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, socket,
};

use super::keeper_wire::Name;
use crate::config::KEEPER_FILES_MAX;
use crate::engine::Fd;
use crate::error::{Error, Result};
use crate::upcall::sys;

/// The first number of a file that systemd hands over (SD_LISTEN_FDS_START).
const FIRST_FILE: i32 = 3;

/// What systemd says in a service's environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Environment {
    /// $NOTIFY_SOCKET: where to say how we are.
    pub notify_socket: Option<String>,
    /// $FDSTORE: how many files may be stored; not set where none may, or before systemd 254.
    pub store_size: Option<usize>,
    /// $LISTEN_FDNAMES of the files handed over, in order, if they are for this process.
    pub names: Vec<String>,
}

/// The way to systemd.
#[derive(Debug)]
pub struct Systemd {
    socket: OwnedFd,
    address: UnixAddr,
}

impl Environment {
    /// Reads variables. Those that make no sense, or are meant for another process, count as not
    /// set.
    pub fn read(variable: impl Fn(&str) -> Option<String>, process: u32) -> Environment {
        let number = |name: &str| variable(name).and_then(|text| text.parse::<usize>().ok());
        let is_for_us = number("LISTEN_PID") == Some(process as usize);
        let count = number("LISTEN_FDS").filter(|_| is_for_us).unwrap_or(0).min(KEEPER_FILES_MAX);
        let text = variable("LISTEN_FDNAMES").unwrap_or_default();
        let mut names: Vec<String> = text.split(':').map(str::to_owned).take(count).collect();
        names.resize(count, "unknown".to_owned());
        Environment {
            notify_socket: variable("NOTIFY_SOCKET").filter(|path| path.len() > 1),
            store_size: number("FDSTORE").filter(|size| *size > 0),
            names,
        }
    }

    /// This process's.
    pub fn of_process() -> Environment {
        Environment::read(|name| std::env::var(name).ok(), std::process::id())
    }

    /// Takes over the files that were handed to this process; to be called once, before anything
    /// else could have their numbers. Names that are not ours are closed.
    pub fn files(&self) -> Vec<(Name, OwnedFd)> {
        let mut files = Vec::new();
        for (number, name) in (FIRST_FILE..).zip(&self.names) {
            let is_open = std::fs::symlink_metadata(format!("/proc/self/fd/{number}")).is_ok();
            if !is_open {
                continue;
            }
            let file = sys::adopt(Fd(number));
            let _ = fcntl(&file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC));
            if let Ok(name) = Name::new(name) {
                files.push((name, file));
            }
        }
        files
    }
}

impl Systemd {
    /// The one at $NOTIFY_SOCKET: a path, or an abstract name after '@'.
    pub fn at(notify_socket: &str) -> Result<Systemd> {
        let failed = |errno: nix::Error| {
            Error::system(errno as i32, format!("NOTIFY_SOCKET={notify_socket}"))
        };
        let address = match notify_socket.strip_prefix('@') {
            Some(name) => UnixAddr::new_abstract(name.as_bytes()),
            None => UnixAddr::new(notify_socket),
        };
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::Datagram, flags, None);
        Ok(Systemd { socket: socket.map_err(failed)?, address: address.map_err(failed)? })
    }

    /// Has a file stored in place of another of that name. systemd must not watch it and drop it
    /// when it reports an error: that would be our death.
    pub fn put(&self, name: &Name, file: BorrowedFd<'_>) -> Result<()> {
        self.release(name)?;
        self.send(&format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}", name.as_str()), Some(file))
    }

    /// Has all files of a name dropped.
    pub fn release(&self, name: &Name) -> Result<()> {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={}", name.as_str()), None)
    }

    /// The daemon serves from now on.
    pub fn ready(&self) -> Result<()> {
        self.send("READY=1", None)
    }

    /// The daemon is about to end.
    pub fn stopping(&self) -> Result<()> {
        self.send("STOPPING=1", None)
    }

    fn send(&self, text: &str, file: Option<BorrowedFd<'_>>) -> Result<()> {
        let numbers: Vec<i32> = file.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        let control = if numbers.is_empty() { &[] } else { &rights[..] };
        let (number, flags) = (self.socket.as_fd().as_raw_fd(), MsgFlags::MSG_NOSIGNAL);
        let text = [std::io::IoSlice::new(text.as_bytes())];
        sendmsg(number, &text, control, flags, Some(&self.address))
            .map(drop)
            .map_err(|errno| Error::system(errno as i32, "cannot speak to systemd"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Environment {
        let find = |name: &str| variables.iter().find(|it| it.0 == name).map(|it| it.1.to_owned());
        Environment::read(find, 77)
    }

    #[test]
    fn only_files_for_this_process_are_taken() {
        let names = [("LISTEN_FDS", "2"), ("LISTEN_FDNAMES", "cachefiles:group")];
        let of = |process| read(&[("LISTEN_PID", process), names[0], names[1]]).names;
        assert_eq!(of("77"), ["cachefiles", "group"]);
        assert!(of("78").is_empty());
        assert!(of("").is_empty());
        assert!(read(&names).names.is_empty());
    }

    #[test]
    fn files_without_names_and_too_many_are_survived() {
        let names = |count, names| {
            read(&[("LISTEN_PID", "77"), ("LISTEN_FDS", count), ("LISTEN_FDNAMES", names)]).names
        };
        assert_eq!(names("2", "group"), ["group", "unknown"]);
        assert_eq!(names("1", "group:more"), ["group"]);
        assert_eq!(names("99999999", "group").len(), KEEPER_FILES_MAX);
        assert!(names("-1", "group").is_empty());
    }

    #[test]
    fn a_store_is_used_where_there_is_one() {
        assert_eq!(read(&[("FDSTORE", "16")]).store_size, Some(16));
        assert_eq!(read(&[("FDSTORE", "0")]).store_size, None);
        assert_eq!(read(&[("FDSTORE", "x"), ("NOTIFY_SOCKET", "")]), Environment::default());
    }
}
