//! What a container changed: `docker diff`.
//!
//! Compares what a stack of upper layers has with what the layers below show, name by name, and
//! only where the upper ones have something. A directory is reported when it is new, when its own
//! attributes differ, or when something in it is reported.

use std::collections::BTreeMap;

use nix::sys::stat::FileStat;

use super::stack::{self, Found, Stack, Visit};
use crate::config;
use crate::error::{Error, Result};

/// What happened to a path; the numbers are Docker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It was there and is another now.
    Modified = 0,
    /// It is new.
    Added = 1,
    /// It is gone.
    Deleted = 2,
}

/// One line of `docker diff`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// From the root, beginning with a slash.
    pub path: Vec<u8>,
    /// What happened.
    pub kind: Kind,
}

/// The changes that `upper` makes to `lower`, sorted by path.
pub fn changes(upper: Stack, lower: Stack) -> Result<Vec<Change>> {
    let mut changes = BTreeMap::new();
    stack::walk(upper, lower, |visit| compare(&visit, &mut changes))?;
    let change = |(path, kind)| Change { path, kind };
    Ok(changes.into_iter().map(change).collect())
}

fn compare(visit: &Visit<'_>, changes: &mut BTreeMap<Vec<u8>, Kind>) -> Result<()> {
    let path = [b"/", visit.path].concat();
    match (visit.found, visit.there) {
        (found, None) if found.is_whiteout() => Ok(()),
        (found, Some(_)) if found.is_whiteout() => note(changes, path, Kind::Deleted),
        (_, None) => note(changes, path, Kind::Added),
        (found, Some(there)) if found.is_directory() => {
            if !looks_same(&found.status, &there.status) {
                note(changes, path.clone(), Kind::Modified)?;
            }
            if found.hides { hidden(found, there, &path, changes) } else { Ok(()) }
        }
        (_, Some(_)) => note(changes, path, Kind::Modified),
    }
}

/// What only the lower layers have in a directory that hides them.
fn hidden(
    found: &Found,
    there: &Found,
    path: &[u8],
    changes: &mut BTreeMap<Vec<u8>, Kind>,
) -> Result<()> {
    let names = |found: &Found| found.below.names().map_err(|errno| stack::failed(path, errno));
    let kept = names(found)?;
    for name in names(there)?.into_iter().filter(|name| !kept.contains(name)) {
        let gone = there.below.find(&name).map_err(|errno| stack::failed(path, errno))?;
        if gone.is_some_and(|gone| !gone.is_whiteout()) {
            note(changes, [path, b"/", &name].concat(), Kind::Deleted)?;
        }
    }
    Ok(())
}

/// A directory that was only copied up keeps all of this.
fn looks_same(a: &FileStat, b: &FileStat) -> bool {
    let of = |s: &FileStat| (s.st_mode, s.st_uid, s.st_gid, s.st_mtime, s.st_mtime_nsec);
    of(a) == of(b)
}

/// Notes a change and, for directories on the way that are not noted yet, that they changed.
fn note(changes: &mut BTreeMap<Vec<u8>, Kind>, path: Vec<u8>, kind: Kind) -> Result<()> {
    let slashes = (1..path.len()).rev().filter(|&at| path[at] == b'/');
    for at in slashes.take_while(|&at| !changes.contains_key(&path[..at])).collect::<Vec<_>>() {
        changes.insert(path[..at].to_vec(), Kind::Modified);
    }
    changes.insert(path, kind);
    match changes.len() <= config::LAYER_CHANGES_MAX {
        true => Ok(()),
        false => Err(Error::Unsupported(format!(
            "more than {} paths were changed",
            config::LAYER_CHANGES_MAX
        ))),
    }
}
