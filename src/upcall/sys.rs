//! File numbers that the kernel hands over, and its request numbers.
#![allow(unsafe_code)]

use std::os::fd::{FromRawFd, OwnedFd};

use crate::engine::Fd;

/// CACHEFILES_IOC_READ_COMPLETE, _IOW(0x98, 1, int): include/uapi/linux/cachefiles.h.
pub const READ_COMPLETE: u64 = 0x4004_9801;

/// Takes over a file that a message of the device has installed in this process.
///
/// Called once per OPEN message, by the code that parsed it: from then on the number belongs to the
/// returned value and is closed with it.
pub fn adopt(fd: Fd) -> OwnedFd {
    // SAFETY: the kernel installed this number for us with the message it came in
    // (cachefiles_ondemand_get_fd), and the one caller, intake.rs, adopts each message's file once.
    unsafe { OwnedFd::from_raw_fd(fd.0) }
}
