//! A loopback OCI registry from a directory, with faults on command.

fn main() {}
