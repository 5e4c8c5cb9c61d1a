//! Who asks: the kernel's doors. Messages in, faults to the blob room, answers out.
//!
//! The cachefiles door: `cachefiles.rs` is the pure codec of /dev/cachefiles, `device.rs` the open
//! device, `objects.rs` what the kernel has open, `intake.rs` and `opening.rs` the tasks of one
//! core. The fanotify door: `fanotify.rs` is the pure codec of events, `group.rs` the open group,
//! `bindings.rs` what is bound, `binder.rs` binds and mounts, `direct.rs` decides how the kernel
//! reads what it mounts, `watch.rs` has the tasks of one core.
//! `mounting.rs` mounts for both; `sys.rs` holds what needs unsafe code.

pub mod binder;
pub mod bindings;
pub mod cachefiles;
pub mod device;
mod direct;
pub mod fanotify;
pub mod group;
pub mod intake;
pub mod mountinfo;
pub mod mounting;
pub mod objects;
mod opening;
pub mod probe;
pub mod sys;
pub mod watch;
