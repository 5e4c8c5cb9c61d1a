//! Layers seen through each other, the way overlayfs shows them, without mounting anything.
//!
//! A `Stack` is the directories that meet at one path, topmost first. Whiteouts and opaque
//! directories count; links are never followed. What a container does meanwhile may make a walk
//! miss or find a name, never leave the layers. Walks keep their own stack: a container decides how
//! deep its directories are.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag};

use super::beneath::{self, Beneath};
use crate::config;
use crate::error::{Error, Result};

/// The directories of one path, topmost first; none where the path is no directory.
#[derive(Debug, Default)]
pub struct Stack {
    directories: Vec<OwnedFd>,
    /// Whether what lies below the stack's root is hidden.
    hides: bool,
}

/// What a stack shows under one name.
#[derive(Debug)]
pub struct Found {
    /// The directory of the layer that decides.
    pub layer: usize,
    /// What is there; perhaps a whiteout.
    pub status: FileStat,
    /// For a directory, what it is made of; otherwise empty.
    pub below: Stack,
    /// For a directory, whether it hides what layers below this stack have there.
    pub hides: bool,
}

/// What a walk comes by.
#[derive(Debug)]
pub struct Visit<'a> {
    /// The directory it is in.
    pub parent: &'a Stack,
    /// From the root, without a slash at either end.
    pub path: &'a [u8],
    /// The last name of the path.
    pub name: &'a [u8],
    /// What the upper layers have.
    pub found: &'a Found,
    /// What the lower layers show, if anything.
    pub there: Option<&'a Found>,
}

/// Visits every name that `upper` has, a directory before what is in it, names in order, each with
/// what `lower` shows there.
pub fn walk(
    upper: Stack,
    lower: Stack,
    mut visit: impl FnMut(Visit<'_>) -> Result<()>,
) -> Result<()> {
    let mut path = Vec::new();
    let mut levels = vec![Level::enter(upper, lower, &path)?];
    while let Some(level) = levels.last_mut() {
        path.truncate(level.path_bytes);
        let Some(name) = level.names.next() else {
            levels.pop();
            continue;
        };
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend(&name);
        // What went since it was listed is passed over.
        let Some(found) = level.upper.find(&name).map_err(|errno| failed(&path, errno))? else {
            continue;
        };
        let there = level.lower.find(&name).map_err(|errno| failed(&path, errno))?;
        let there = there.filter(|there| !there.is_whiteout());
        visit(Visit {
            parent: &level.upper,
            path: &path,
            name: &name,
            found: &found,
            there: there.as_ref(),
        })?;
        if found.is_directory() {
            let below = there.map(|there| there.below).unwrap_or_default();
            if levels.len() > config::LAYER_DEPTH_MAX {
                return Err(Error::Unsupported(format!(
                    "a layer's directories are more than {} deep",
                    config::LAYER_DEPTH_MAX
                )));
            }
            levels.push(Level::enter(found.below, below, &path)?);
        }
    }
    Ok(())
}

/// One directory of a walk.
struct Level {
    upper: Stack,
    lower: Stack,
    names: std::collections::btree_set::IntoIter<Vec<u8>>,
    path_bytes: usize,
}

impl Level {
    fn enter(upper: Stack, lower: Stack, path: &[u8]) -> Result<Level> {
        let names = upper.names().map_err(|errno| failed(path, errno))?.into_iter();
        Ok(Level { upper, lower, names, path_bytes: path.len() })
    }
}

/// A name of a layer could not be read.
pub fn failed(path: &[u8], errno: nix::Error) -> Error {
    let shown = String::from_utf8_lossy(path);
    Error::system(errno as i32, format!("cannot read {shown:?} of a layer"))
}

impl Found {
    /// Whether this is a directory.
    pub fn is_directory(&self) -> bool {
        beneath::file_type(&self.status) == SFlag::S_IFDIR
    }

    /// Whether this only hides what is below.
    pub fn is_whiteout(&self) -> bool {
        beneath::is_whiteout(&self.status)
    }
}

impl Stack {
    /// The roots of layers, topmost first; `hides` says that they let nothing below them through.
    pub fn open(roots: &[PathBuf], hides: bool) -> Result<Stack> {
        let open = |root: &PathBuf| {
            Beneath::open(root)?
                .directory(b"")
                .and_then(|root| beneath::open_directory(root, b"."))
                .map_err(|errno| {
                    Error::system(errno as i32, format!("cannot open {}", root.display()))
                })
        };
        Ok(Stack { directories: roots.iter().map(open).collect::<Result<_>>()?, hides })
    }

    /// Every name any of the layers has here, whiteouts included, sorted.
    pub fn names(&self) -> nix::Result<BTreeSet<Vec<u8>>> {
        let mut names = BTreeSet::new();
        for directory in &self.directories {
            names.extend(beneath::names(directory)?);
        }
        Ok(names)
    }

    /// Whether what lies below the stack's root is hidden.
    pub fn hides(&self) -> bool {
        self.hides
    }

    /// The directory of one layer.
    pub fn layer(&self, index: usize) -> &OwnedFd {
        &self.directories[index]
    }

    /// What is seen under a name; None if no layer has it.
    pub fn find(&self, name: &[u8]) -> nix::Result<Option<Found>> {
        let mut found: Option<Found> = None;
        for (layer, directory) in self.directories.iter().enumerate() {
            let status = match beneath::status(directory, name) {
                Ok(status) => status,
                Err(Errno::ENOENT) => continue,
                Err(errno) => return Err(errno),
            };
            let is_directory = beneath::file_type(&status) == SFlag::S_IFDIR;
            let top = found.get_or_insert_with(|| Found {
                layer,
                status,
                below: Stack::default(),
                hides: false,
            });
            if !is_directory {
                // Below a directory of a higher layer, this hides what is still lower.
                top.hides = top.is_directory();
                break;
            }
            top.below.directories.push(beneath::open_directory(directory, name)?);
            if beneath::is_opaque(directory, name)? {
                top.hides = true;
                break;
            }
        }
        Ok(found)
    }
}
