//! Who asks: the kernel's doors. Messages in, faults to the blob room, answers out.
//!
//! `cachefiles.rs` is the pure codec of /dev/cachefiles, `device.rs` the open device, `objects.rs`
//! what the kernel has open, `intake.rs` and `opening.rs` the tasks of one core; `sys.rs` holds
//! what needs unsafe code.

pub mod cachefiles;
pub mod device;
pub mod fanotify;
pub mod group;
pub mod intake;
pub mod mountinfo;
pub mod mounting;
pub mod objects;
mod opening;
pub mod sys;
