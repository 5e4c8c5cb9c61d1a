//! System calls that libc has no safe form of, and file numbers that the kernel hands over.
//!
//! Each function is one call: it keeps the kernel's conventions about pointers and numbers and
//! nothing else. What a call means, and what its errors mean, is said where it is used.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::{c_int, c_long, c_uint};
use nix::errno::Errno;

use crate::engine::Fd;

/// CACHEFILES_IOC_READ_COMPLETE, _IOW(0x98, 1, int): include/uapi/linux/cachefiles.h.
pub const READ_COMPLETE: u64 = 0x4004_9801;
/// FAN_PRE_ACCESS: include/uapi/linux/fanotify.h, Linux 6.14.
pub const PRE_ACCESS: u64 = 0x0010_0000;

/// Takes over a file that the kernel has installed in this process under a number.
///
/// Called once per file, by the code that was told its number: for a message of a door, for a file
/// that came over a socket, for one that this process was started with. From then on the number
/// belongs to the returned value and is closed with it.
pub fn adopt(fd: Fd) -> OwnedFd {
    // SAFETY: the kernel installed this number for us (cachefiles_ondemand_get_fd,
    // copy_event_to_user, SCM_RIGHTS, accept4, exec), nothing else owns it, and each caller adopts
    // a number once: whoever parsed a door's message that of its file, keeper_wire.rs,
    // keeper_process.rs and supervisor.rs those that came over sockets, keeper_systemd.rs and
    // keeper_process.rs those that are open when the process starts.
    unsafe { OwnedFd::from_raw_fd(fd.0) }
}

/// dup3(2): `target`'s number stands for what `file` is from now on.
pub fn replace(target: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<(), Errno> {
    // SAFETY: numbers only; both stay owned by whom they are.
    let result = unsafe { libc::dup3(file.as_raw_fd(), target.as_raw_fd(), libc::O_CLOEXEC) };
    Errno::result(result).map(drop)
}

/// fsopen(2): an empty context for a mount of this file system.
pub fn fsopen(kind: &CStr) -> Result<OwnedFd, Errno> {
    // SAFETY: the name is a string that lives through the call.
    let fd = unsafe { libc::syscall(libc::SYS_fsopen, kind.as_ptr(), libc::FSOPEN_CLOEXEC) };
    owned(fd)
}

/// fsconfig(2) with FSCONFIG_SET_STRING.
pub fn set_string(context: BorrowedFd<'_>, key: &CStr, value: &CStr) -> Result<(), Errno> {
    fsconfig(context, libc::FSCONFIG_SET_STRING, Some(key), Some(value))
}

/// fsconfig(2) with FSCONFIG_SET_FLAG.
pub fn set_flag(context: BorrowedFd<'_>, key: &CStr) -> Result<(), Errno> {
    fsconfig(context, libc::FSCONFIG_SET_FLAG, Some(key), None)
}

/// fsconfig(2) with FSCONFIG_CMD_CREATE: makes the superblock.
pub fn create(context: BorrowedFd<'_>) -> Result<(), Errno> {
    fsconfig(context, libc::FSCONFIG_CMD_CREATE, None, None)
}

fn fsconfig(
    context: BorrowedFd<'_>,
    command: c_uint,
    key: Option<&CStr>,
    value: Option<&CStr>,
) -> Result<(), Errno> {
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    let (key, value) = (pointer(key), pointer(value));
    // SAFETY: key and value are null or strings that live through the call, which is what the
    // three commands above take.
    let result = unsafe {
        libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0 as c_int)
    };
    Errno::result(result).map(drop)
}

/// fsmount(2): the superblock of a context as a read-only mount that is nowhere yet.
pub fn fsmount(context: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let (flags, attributes) = (libc::FSMOUNT_CLOEXEC, libc::MOUNT_ATTR_RDONLY as c_uint);
    // SAFETY: numbers only.
    owned(unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), flags, attributes) })
}

/// open_tree(2) with OPEN_TREE_CLONE: a copy of the one mount that is seen at `path`, nowhere yet.
pub fn clone_mount(path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: the path is a string that lives through the call.
    owned(unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) })
}

/// move_mount(2): puts a mount that is nowhere at `path`.
pub fn move_mount(mount: BorrowedFd<'_>, path: &CStr) -> Result<(), Errno> {
    let (fd, here, flags) = (mount.as_raw_fd(), libc::AT_FDCWD, libc::MOVE_MOUNT_F_EMPTY_PATH);
    let from = c"".as_ptr();
    // SAFETY: both paths are strings that live through the call.
    let result =
        unsafe { libc::syscall(libc::SYS_move_mount, fd, from, here, path.as_ptr(), flags) };
    Errno::result(result).map(drop)
}

/// Whether anybody but `file` has the inode open, the kernel for a mounted image included: nobody
/// else may for a write lease (check_conflicting_open in fs/locks.c), which is given back at once.
pub fn is_open_elsewhere(file: BorrowedFd<'_>) -> Result<bool, Errno> {
    // fcntl(2), and SIGIO would end this process should somebody open the file just now.
    const F_SETSIG: c_int = 10;
    let set = |command, value: c_int| {
        // SAFETY: numbers only.
        Errno::result(unsafe { libc::fcntl(file.as_raw_fd(), command, value) }).map(drop)
    };
    set(F_SETSIG, libc::SIGURG)?;
    match set(libc::F_SETLEASE, libc::F_WRLCK) {
        Ok(()) => set(libc::F_SETLEASE, libc::F_UNLCK).map(|()| false),
        Err(Errno::EAGAIN) => Ok(true),
        Err(errno) => Err(errno),
    }
}

/// fanotify_init(2).
pub fn fanotify_init(flags: c_uint, event_flags: c_int) -> Result<OwnedFd, Errno> {
    // SAFETY: numbers only.
    owned(unsafe { libc::fanotify_init(flags, event_flags as c_uint) }.into())
}

/// fanotify_mark(2) for [`PRE_ACCESS`] on what `path` names, seen from `directory`.
pub fn fanotify_mark(
    group: BorrowedFd<'_>,
    flags: c_uint,
    directory: Option<BorrowedFd<'_>>,
    path: &CStr,
) -> Result<(), Errno> {
    let directory = directory.map_or(libc::AT_FDCWD, |directory| directory.as_raw_fd());
    let group = group.as_raw_fd();
    // SAFETY: the path is a string that lives through the call.
    let result = unsafe { libc::fanotify_mark(group, flags, PRE_ACCESS, directory, path.as_ptr()) };
    Errno::result(result).map(drop)
}

/// A new file's number, taken over.
fn owned(result: c_long) -> Result<OwnedFd, Errno> {
    let fd = Errno::result(result)?;
    // SAFETY: the call succeeded, so the number is that of a file it has just made for us, and
    // this is the only place that has seen it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as c_int) })
}

/// The size of an open file that is only known by its number.
pub fn file_size(file: Fd) -> Result<u64, Errno> {
    // SAFETY: the number is that of an event's file, which is open until the event is answered;
    // the borrow ends with this call.
    let file = unsafe { BorrowedFd::borrow_raw(file.0) };
    nix::sys::stat::fstat(file).map(|status| status.st_size.max(0) as u64)
}

/// The path of an open file as this process sees it, read into `buffer`.
pub fn file_path(file: Fd, buffer: &mut [u8]) -> Result<&[u8], Errno> {
    let mut link = [0; 32];
    let mut rest = &mut link[..31];
    let written = std::io::Write::write_fmt(&mut rest, format_args!("/proc/self/fd/{}", file.0));
    written.map_err(|_| Errno::EINVAL)?;
    let (start, room) = (buffer.as_mut_ptr().cast(), buffer.len());
    // SAFETY: the link's name ends with the NUL behind what was written; the buffer is valid for
    // the length passed with it.
    let size = Errno::result(unsafe { libc::readlink(link.as_ptr().cast(), start, room) })?;
    Ok(&buffer[..size as usize])
}
