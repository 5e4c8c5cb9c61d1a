//! The tree of names that layers make, applied one on the other.
//!
//! Owns who is whose child, and what a new entry does to what is there, as containerd and umoci
//! unpack layers one after the other as root:
//! - symbolic links in the middle of a path are followed, never out of the root;
//! - a directory over a directory replaces its attributes only; anything else replaces what is
//!   there, with everything below it;
//! - a whiteout takes away what lower layers had there, and nothing of its own layer, wherever in
//!   the layer it stands; an opaque mark does so for everything in a directory.
//!
//! Purely in memory: hostile paths meet no file system. After every `apply` the tree is one the
//! format can hold: names have 1 to 255 bytes, paths at most `PATH_MAX_BYTES`.

use super::entry::{Attributes, Entry, check_link_target, clean};
pub(super) use super::node::{Child, Content};
pub use super::node::{InodeId, Node};
use crate::config::{
    BOOTSTRAP_MAX_BYTES, BUILD_INODES_MAX, FILE_NAME_MAX_BYTES, LINKS_FOLLOWED_MAX, PATH_MAX_BYTES,
    WALK_NAMES_MAX,
};
use crate::error::{Error, Result};
use crate::image::inode_writer::DIRENT_BYTES;
use std::collections::{BTreeMap, HashSet, VecDeque};

/// Names of whiteouts start with this; the rest is what they take away.
const WHITEOUT: &[u8] = b".wh.";
/// The mark that makes the directory it is in opaque.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Bookkeeping of aufs at the root of a layer, except the opaque mark: no part of the image.
const AUFS: &[u8] = b".wh..wh.";

/// The names and inodes of an image in the making.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
    /// The layer being applied, counted from 1.
    layer: u32,
    /// Directories below which a whiteout of this layer has been: nothing of lower layers is left
    /// there, and nothing of them can come back. So each is gone through once a layer, however
    /// many whiteouts name it.
    cleared: HashSet<InodeId>,
    /// Bytes of the names, link targets and attributes that are held: at most what a bootstrap
    /// could hold, wherever the layers came from.
    pub(super) held_bytes: usize,
    /// Names that whiteouts looked at.
    #[cfg(test)]
    pub(super) visits: u64,
}

/// A file and where it was found.
struct Found {
    parent: InodeId,
    name: Box<[u8]>,
    inode: InodeId,
}

/// A directory reached on the way along a path.
#[derive(Clone, Copy)]
struct Step {
    directory: InodeId,
    /// Bytes of the path to it.
    path_bytes: usize,
}

impl Tree {
    /// The root, and nothing else.
    pub const ROOT: InodeId = InodeId(0);

    /// An empty root directory.
    pub fn new() -> Self {
        let content = Content::Directory(BTreeMap::new());
        Tree {
            nodes: vec![Node { attributes: Attributes::unknown(), content, names: 1 }],
            layer: 0,
            cleared: HashSet::new(),
            held_bytes: 0,
            #[cfg(test)]
            visits: 0,
        }
    }

    /// What is applied from now on belongs to the next layer.
    pub fn begin_layer(&mut self) {
        self.layer += 1;
        self.cleared.clear();
    }

    /// One inode.
    pub(super) fn node(&self, inode: InodeId) -> &Node {
        &self.nodes[inode.0 as usize]
    }

    /// Inodes made so far, those no name leads to included.
    pub(super) fn inode_count(&self) -> usize {
        self.nodes.len()
    }

    /// The inode at a path whose last component is not followed.
    pub(super) fn find(&mut self, path: &[u8]) -> Result<Option<InodeId>> {
        Ok(self.find_name(path)?.map(|found| found.inode))
    }

    /// The same with the directory that has its name.
    fn find_name(&mut self, path: &[u8]) -> Result<Option<Found>> {
        let components = clean(path)?;
        let Some((&name, parents)) = components.split_last() else {
            return Ok(Some(Found { parent: Self::ROOT, name: Box::default(), inode: Self::ROOT }));
        };
        let Some(parent) = self.walk(parents, false)? else { return Ok(None) };
        let parent = parent.directory;
        let child = self.children(parent).and_then(|children| children.get(name));
        Ok(child.map(|child| Found { parent, name: name.into(), inode: child.inode }))
    }

    /// Applies what a layer says of a path, whiteouts included.
    ///
    /// # Errors
    /// `Malformed` names the path and says why no runtime could unpack this; the tree is as it was,
    /// but for directories on the way.
    pub fn apply(&mut self, path: &[u8], entry: Entry) -> Result<()> {
        match self.apply_whiteout(path) {
            Ok(false) => self.put(path, entry),
            Ok(true) => Ok(()),
            Err(error) => Err(named(error, path)),
        }
    }

    /// Puts a file at a path, whatever its name.
    ///
    /// # Errors
    /// As `apply`.
    pub fn put(&mut self, path: &[u8], entry: Entry) -> Result<()> {
        self.put_cleaned(path, entry).map_err(|error| named(error, path))
    }

    /// False if the path is none of a whiteout.
    fn apply_whiteout(&mut self, path: &[u8]) -> Result<bool> {
        let components = clean(path)?;
        let Some((&name, parents)) = components.split_last() else { return Ok(false) };
        if name == OPAQUE {
            self.white_out(parents, None)?;
        } else if components[0].starts_with(AUFS) {
            return Ok(true);
        } else if let Some(gone) = name.strip_prefix(WHITEOUT) {
            if matches!(gone, b"" | b"." | b"..") {
                return Err(malformed!("a whiteout of nothing"));
            }
            self.white_out(parents, Some(gone))?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    fn put_cleaned(&mut self, path: &[u8], entry: Entry) -> Result<()> {
        let components = clean(path)?;
        let Some((&name, parents)) = components.split_last() else {
            return self.apply_root(entry);
        };
        // What a hard link leads to is looked up before anything is taken away for it.
        let linked = match &entry {
            Entry::HardLink(target) => Some(self.link_target(target)?),
            _ => None,
        };
        let parent = self.walk(parents, true)?;
        let parent = parent.expect("invariant: what is missing on the way has been made");
        check_name(name, parent.path_bytes)?;
        self.place(parent.directory, name, entry, linked)
    }

    fn apply_root(&mut self, entry: Entry) -> Result<()> {
        match entry {
            Entry::Directory(attributes) => self.set_attributes(Self::ROOT, attributes),
            _ => Err(malformed!("the root is to become something else than a directory")),
        }
    }

    fn place(
        &mut self,
        parent: InodeId,
        name: &[u8],
        entry: Entry,
        linked: Option<Found>,
    ) -> Result<()> {
        let present = self.children(parent).and_then(|children| children.get(name)).copied();
        let (attributes, content) = match entry {
            Entry::Directory(attributes) => {
                if let Some(child) = present
                    && self.children(child.inode).is_some()
                {
                    self.set_attributes(child.inode, attributes)?;
                    self.touch(parent, name);
                    return Ok(());
                }
                (attributes, Content::Directory(BTreeMap::new()))
            }
            Entry::File(attributes, data) => (attributes, Content::File(data)),
            Entry::Link(attributes, target) => {
                check_link_target(&target)?;
                // Whatever an archiver wrote, Linux has no other mode for links.
                (Attributes { permissions: 0o777, ..attributes }, Content::Link(target.into()))
            }
            Entry::Device(attributes, kind, major, minor) => {
                check_device(major, minor)?;
                (attributes, Content::Device(kind, major, minor))
            }
            Entry::Special(attributes, kind) => (attributes, Content::Special(kind)),
            Entry::HardLink(_) => {
                let target = linked.expect("invariant: a hard link's target was looked up");
                if (target.parent, &*target.name) == (parent, name) {
                    return Err(malformed!("a hard link to itself"));
                }
                // One that is there already is said once more: it belongs to this layer too.
                return self.insert(parent, name, target.inode);
            }
        };
        let inode = self.add(attributes, content)?;
        self.insert(parent, name, inode)
    }

    fn add(&mut self, attributes: Attributes, content: Content) -> Result<InodeId> {
        if self.nodes.len() >= BUILD_INODES_MAX {
            return Err(unsupported!("more than {BUILD_INODES_MAX} files"));
        }
        let node = Node { attributes, content, names: 0 };
        self.hold(node.held_bytes())?;
        self.nodes.push(node);
        Ok(InodeId(self.nodes.len() as u32 - 1))
    }

    fn set_attributes(&mut self, inode: InodeId, attributes: Attributes) -> Result<()> {
        self.hold(attributes.xattr_bytes())?;
        let node = &mut self.nodes[inode.0 as usize];
        self.held_bytes -= node.attributes.xattr_bytes();
        node.attributes = attributes;
        Ok(())
    }

    fn hold(&mut self, bytes: usize) -> Result<()> {
        if self.held_bytes + bytes > BOOTSTRAP_MAX_BYTES {
            return Err(unsupported!(
                "with it the image has more than {BOOTSTRAP_MAX_BYTES} bytes of names, link \
                 targets and extended attributes, and no bootstrap can hold them: leave some out"
            ));
        }
        self.held_bytes += bytes;
        Ok(())
    }

    fn insert(&mut self, parent: InodeId, name: &[u8], inode: InodeId) -> Result<()> {
        self.hold(name_bytes(name))?;
        self.nodes[inode.0 as usize].names += 1;
        let child = Child { inode, layer: self.layer };
        if let Content::Directory(children) = &mut self.nodes[parent.0 as usize].content
            && let Some(replaced) = children.insert(name.into(), child)
        {
            self.release(name, replaced.inode);
        }
        Ok(())
    }

    /// Gives up a name that led to an inode; with the last one what the inode has, and so on below.
    fn release(&mut self, name: &[u8], inode: InodeId) {
        self.held_bytes -= name_bytes(name);
        let mut pending = vec![inode];
        while let Some(inode) = pending.pop() {
            let node = &mut self.nodes[inode.0 as usize];
            node.names -= 1;
            if node.names > 0 {
                continue;
            }
            self.held_bytes -= node.held_bytes();
            node.attributes.xattrs = Box::default();
            match &mut node.content {
                Content::Link(target) => *target = Box::default(),
                Content::Directory(children) => {
                    for (name, child) in std::mem::take(children) {
                        self.held_bytes -= name_bytes(&name);
                        pending.push(child.inode);
                    }
                }
                _ => {}
            }
        }
    }

    /// The names in a directory; `None` for what is no directory.
    pub(super) fn children(&self, inode: InodeId) -> Option<&BTreeMap<Box<[u8]>, Child>> {
        match &self.node(inode).content {
            Content::Directory(children) => Some(children),
            _ => None,
        }
    }

    /// Remembers that this layer has something at a name or below it.
    fn touch(&mut self, parent: InodeId, name: &[u8]) {
        let layer = self.layer;
        if let Content::Directory(children) = &mut self.nodes[parent.0 as usize].content
            && let Some(child) = children.get_mut(name)
        {
            child.layer = layer;
        }
    }

    /// Takes away what lower layers have under a name, or under all names of the directory.
    fn white_out(&mut self, parents: &[&[u8]], name: Option<&[u8]>) -> Result<()> {
        let Some(parent) = self.walk(parents, false)? else { return Ok(()) };
        let mut pending: Vec<(InodeId, Box<[u8]>)> = match name {
            Some(name) => vec![(parent.directory, name.into())],
            None => self.uncleared(parent.directory),
        };
        // What this layer put here stays, without what lower layers have below it.
        while let Some((directory, name)) = pending.pop() {
            #[cfg(test)]
            (self.visits += 1);
            let layer = self.layer;
            let Content::Directory(children) = &mut self.nodes[directory.0 as usize].content else {
                continue;
            };
            let Some(child) = children.get(&name).copied() else { continue };
            if child.layer != layer {
                children.remove(&name);
                self.release(&name, child.inode);
            } else {
                pending.extend(self.uncleared(child.inode));
            }
        }
        Ok(())
    }

    /// The names in a directory that whiteouts have not been through in this layer.
    fn uncleared(&mut self, inode: InodeId) -> Vec<(InodeId, Box<[u8]>)> {
        if self.cleared.contains(&inode) {
            return Vec::new();
        }
        let Some(children) = self.children(inode) else { return Vec::new() };
        let names = children.keys().map(|name| (inode, name.clone())).collect();
        self.cleared.insert(inode);
        names
    }

    /// The inode a hard link leads to. Its last component is not followed.
    fn link_target(&mut self, target: &[u8]) -> Result<Found> {
        let shown = String::from_utf8_lossy(target);
        let nothing = || malformed!("a hard link to {shown:?}, which is not there");
        let found = self.find_name(target)?.ok_or_else(nothing)?;
        match self.children(found.inode) {
            Some(_) => Err(malformed!("a hard link to {shown:?}, which is a directory")),
            None => Ok(found),
        }
    }

    /// Goes along a path to a directory, following links as if the root were that of the system.
    /// What is missing is made (and what is passed counts as touched) if `make`; otherwise a
    /// missing name is `None`.
    fn walk(&mut self, components: &[&[u8]], make: bool) -> Result<Option<Step>> {
        let mut way = vec![Step { directory: Self::ROOT, path_bytes: 0 }];
        let mut rest: VecDeque<Box<[u8]>> = components.iter().map(|&name| name.into()).collect();
        let (mut followed, mut passed) = (0, components.len());
        while let Some(name) = rest.pop_front() {
            let here = way[way.len() - 1];
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    way.truncate((way.len() - 1).max(1));
                    continue;
                }
                _ => {}
            }
            let child = self.children(here.directory).and_then(|children| children.get(&name));
            let inode = match child.map(|child| child.inode) {
                Some(inode) => inode,
                None if make => self.make_directory(here, &name)?,
                None => return Ok(None),
            };
            match &self.node(inode).content {
                Content::Directory(_) => {
                    let path_bytes = here.path_bytes + name.len() + 1;
                    way.push(Step { directory: inode, path_bytes });
                }
                Content::Link(target) => {
                    followed += 1;
                    if followed > LINKS_FOLLOWED_MAX {
                        return Err(malformed!("more than {LINKS_FOLLOWED_MAX} symbolic links"));
                    }
                    if target.starts_with(b"/") {
                        way.truncate(1);
                    }
                    passed += target.split(|&byte| byte == b'/').count();
                    if passed > WALK_NAMES_MAX {
                        return Err(malformed!(
                            "symbolic links on the way make it more than {WALK_NAMES_MAX} names \
                             long: shorten what they lead to"
                        ));
                    }
                    for part in target.split(|&byte| byte == b'/').rev() {
                        rest.push_front(part.into());
                    }
                }
                _ if !make => return Ok(None),
                _ => {
                    let name = String::from_utf8_lossy(&name);
                    return Err(malformed!("{name:?} on the way is not a directory"));
                }
            }
            if make {
                self.touch(here.directory, &name);
            }
        }
        Ok(way.pop())
    }

    fn make_directory(&mut self, parent: Step, name: &[u8]) -> Result<InodeId> {
        check_name(name, parent.path_bytes)?;
        let content = Content::Directory(BTreeMap::new());
        let inode = self.add(Attributes::unknown(), content)?;
        self.insert(parent.directory, name, inode)?;
        Ok(inode)
    }
}

impl Default for Tree {
    fn default() -> Self {
        Tree::new()
    }
}

/// What a name costs in a directory of the image.
fn name_bytes(name: &[u8]) -> usize {
    DIRENT_BYTES + name.len()
}

fn named(error: Error, path: &[u8]) -> Error {
    error.context(format!("{:?}", String::from_utf8_lossy(path)))
}

/// Links in the middle of paths can make the real path longer than the one that was given.
fn check_name(name: &[u8], parent_bytes: usize) -> Result<()> {
    if name.len() > FILE_NAME_MAX_BYTES {
        return Err(malformed!("a name of {} bytes, {FILE_NAME_MAX_BYTES} at most", name.len()));
    }
    if parent_bytes + name.len() > PATH_MAX_BYTES {
        return Err(malformed!("its path has more than {PATH_MAX_BYTES} bytes"));
    }
    Ok(())
}

/// EROFS has 12 bits for the major and 20 for the minor number.
fn check_device(major: u32, minor: u32) -> Result<()> {
    match major < 1 << 12 && minor < 1 << 20 {
        true => Ok(()),
        false => Err(malformed!("device {major}:{minor} is out of range")),
    }
}
