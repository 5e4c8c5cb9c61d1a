//! Arguments to configuration to run.

fn main() {}
