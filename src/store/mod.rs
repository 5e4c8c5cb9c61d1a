//! Where bytes go: the cache objects behind the kernel's doors, and the record of what is in them.

pub mod ledger;
pub mod object;
pub mod record;

#[cfg(test)]
mod ledger_tests;
