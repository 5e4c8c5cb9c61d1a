//! System calls that have no safe form: a process that shares this one's open files, and files by
//! their numbers.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// Makes a process that is a copy of this one but for its open files, which stay one table for
/// both: what either opens the other has, and what one has open when it ends the other goes on to
/// have. Gives the new process's number in this one and none in the new one.
///
/// To be called while there is one thread: the copy has only that one, and locks that others hold
/// would stay locked in it. It sends no signal when it ends.
pub fn split() -> Result<Option<i32>, Errno> {
    // SAFETY: without a stack of its own the new process goes on with a copy of ours, as after
    // fork(2); no memory is shared, no pointer is passed. That there is one thread the caller says.
    let result = unsafe { libc::syscall(libc::SYS_clone, libc::CLONE_FILES, 0, 0, 0, 0) };
    let number = Errno::result(result)?;
    Ok((number != 0).then_some(number as i32))
}

/// Moves a file to a number that is free, or of no more use to anybody.
pub fn renumber(file: OwnedFd, number: RawFd) -> Result<OwnedFd, Errno> {
    if file.as_raw_fd() == number {
        return Ok(file);
    }
    // SAFETY: numbers only; the caller says that nobody owns the file that had the number.
    Errno::result(unsafe { libc::dup3(file.as_raw_fd(), number, libc::O_CLOEXEC) })?;
    // SAFETY: the call above has just made this number a file of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Whether something is open under a number.
pub fn is_open(number: RawFd) -> bool {
    // SAFETY: numbers only; this asks and changes nothing.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// A file that becomes readable when a process has ended.
pub fn watch(process: nix::unistd::Pid) -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only.
    let number = unsafe { libc::syscall(libc::SYS_pidfd_open, process.as_raw(), 0) };
    Errno::result(number).map(|number| inherit(number as RawFd))
}

/// Takes over a file by its number.
///
/// For what the kernel has just installed in this process, and for a process that shares its table
/// with one that has ended: the number's owner was there.
pub fn inherit(number: RawFd) -> OwnedFd {
    // SAFETY: nobody owns the number: it is new, or its owner in the shared table has ended.
    unsafe { OwnedFd::from_raw_fd(number) }
}
