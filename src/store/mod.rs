//! Where bytes go: the cache objects behind the kernel's doors.

pub mod object;
