//! The ledger's rules, against a cache that is a list of names.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::ledger::Ledger;
use super::record::Record;
use crate::error::{Error, Result};

/// A cache: which cookies have files, and which of them are in use.
#[derive(Default)]
struct Cache {
    files: BTreeSet<String>,
    in_use: BTreeSet<String>,
    cleared: Vec<String>,
}

struct World {
    directory: tempfile::TempDir,
    cache: Arc<Mutex<Cache>>,
}

impl World {
    fn new() -> World {
        let directory = tempfile::tempdir().unwrap();
        for name in ["state", "cache"] {
            std::fs::create_dir(directory.path().join(name)).unwrap();
        }
        World { directory, cache: Arc::default() }
    }

    /// A daemon's start.
    fn ledger(&self) -> Ledger {
        let cache = Arc::clone(&self.cache);
        let clear = move |domain: &str, cookie: &str| -> Result<()> {
            let mut cache = cache.lock().unwrap();
            let name = format!("{domain}/{cookie}");
            if cache.in_use.contains(&name) {
                return Err(Error::Busy(format!("{name} is mounted")));
            }
            if cache.files.remove(&name) {
                cache.cleared.push(name);
            }
            Ok(())
        };
        Ledger::open(&self.path("state"), &self.path("cache"), Box::new(clear)).unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn fill(&self, name: &str) {
        self.cache.lock().unwrap().files.insert(name.into());
    }

    fn mount(&self, name: &str) {
        self.cache.lock().unwrap().in_use.insert(name.into());
    }

    /// What was removed since the last look.
    fn cleared(&self) -> Vec<String> {
        std::mem::take(&mut self.cache.lock().unwrap().cleared)
    }

    /// Every record, by path.
    fn records(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut records = Vec::new();
        for domain in std::fs::read_dir(self.path("state/filled")).unwrap() {
            let domain = domain.unwrap().path();
            for record in domain.is_dir().then(|| std::fs::read_dir(domain).unwrap()).into_iter() {
                let paths = record.map(|record| record.unwrap().path());
                records.extend(paths.map(|path| (path.clone(), std::fs::read(path).unwrap())));
            }
        }
        records.sort();
        records
    }
}

fn bootstrap(byte: u8) -> Record {
    Record::whole(4096, [byte; 32])
}

fn blob(chunks: &[(u32, u8)]) -> Record {
    Record::new(1 << 20, 16, chunks.iter().map(|(index, byte)| (*index, [*byte; 32])).collect())
}

#[test]
fn a_stale_bootstrap_is_culled_and_the_same_one_is_kept() {
    let world = World::new();
    let ledger = world.ledger();
    ledger.admit("d", vec![("i", bootstrap(1))]).unwrap();
    world.fill("d/i");
    ledger.admit("d", vec![("i", bootstrap(1))]).unwrap();
    assert!(world.cleared().is_empty());
    ledger.admit("d", vec![("i", bootstrap(2))]).unwrap();
    assert_eq!(world.cleared(), ["d/i"]);
    world.fill("d/i");
    // Over a restart too, and back again.
    world.ledger().admit("d", vec![("i", bootstrap(2))]).unwrap();
    assert!(world.cleared().is_empty());
    world.ledger().admit("d", vec![("i", bootstrap(1))]).unwrap();
    assert_eq!(world.cleared(), ["d/i"]);
}

#[test]
fn an_unknown_cache_file_is_culled() {
    let world = World::new();
    let ledger = world.ledger();
    for name in ["d/i", "d/b", "other/b", "d/unrelated"] {
        world.fill(name);
    }
    ledger.admit("d", vec![("i", bootstrap(1)), ("b", blob(&[(0, 1)]))]).unwrap();
    assert_eq!(world.cleared(), ["d/i", "d/b"]);
}

#[test]
fn conflicting_chunks_cull_and_new_ones_merge() {
    let world = World::new();
    let ledger = world.ledger();
    ledger.admit("d", vec![("b", blob(&[(1, 1), (2, 2)]))]).unwrap();
    world.fill("d/b");
    // Part, superset, and chunks beside.
    for chunks in [&[(1, 1)][..], &[(0, 9), (1, 1), (2, 2)], &[(7, 7)]] {
        ledger.admit("d", vec![("b", blob(chunks))]).unwrap();
    }
    assert!(world.cleared().is_empty());
    // Chunk 7 is known from the last one only: the records were merged.
    ledger.admit("d", vec![("b", blob(&[(7, 8)]))]).unwrap();
    assert_eq!(world.cleared(), ["d/b"]);
    world.fill("d/b");
    // The rest is still known, since those images may be registered.
    ledger.admit("d", vec![("b", blob(&[(0, 9), (1, 1), (2, 2), (7, 8)]))]).unwrap();
    assert!(world.cleared().is_empty());
    ledger.admit("d", vec![("b", blob(&[(2, 1)]))]).unwrap();
    assert_eq!(world.cleared(), ["d/b"]);
}

#[test]
fn another_size_or_count_is_a_contradiction() {
    let world = World::new();
    let ledger = world.ledger();
    for other in [Record::new(1 << 21, 16, vec![]), Record::new(1 << 20, 17, vec![])] {
        ledger.admit("d", vec![("b", blob(&[(1, 1)]))]).unwrap();
        world.cleared();
        world.fill("d/b");
        ledger.admit("d", vec![("b", other)]).unwrap();
        assert_eq!(world.cleared(), ["d/b"]);
    }
}

#[test]
fn a_damaged_record_counts_as_none() {
    let world = World::new();
    let ledger = world.ledger();
    let damages: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes.clear(),
        |bytes| bytes[60] ^= 1,
        |bytes| bytes.truncate(70),
        |bytes| {
            bytes.push(0);
        },
    ];
    for damage in damages {
        ledger.admit("d", vec![("b", blob(&[(1, 1)]))]).unwrap();
        world.cleared();
        world.fill("d/b");
        let (path, mut bytes) = world.records().remove(0);
        damage(&mut bytes);
        std::fs::write(path, bytes).unwrap();
        assert!(!ledger.has("d", "b"));
        ledger.admit("d", vec![("b", blob(&[(1, 1)]))]).unwrap();
        assert_eq!(world.cleared(), ["d/b"]);
        assert!(ledger.has("d", "b"));
    }
}

#[test]
fn in_use_refuses_and_changes_nothing() {
    let world = World::new();
    let ledger = world.ledger();
    ledger.admit("d", vec![("i", bootstrap(1)), ("b", blob(&[(1, 1)]))]).unwrap();
    let before = world.records();
    world.fill("d/b");
    world.mount("d/b");
    let contents = || vec![("new", bootstrap(2)), ("b", blob(&[(0, 1), (1, 2)]))];
    let refused = ledger.admit("d", contents()).unwrap_err();
    assert_eq!(refused, Error::Busy("d/b is mounted".into()));
    assert_eq!(world.records(), before);
    // What fits is admitted all the same.
    ledger.admit("d", vec![("b", blob(&[(0, 1), (1, 1)]))]).unwrap();
    world.cache.lock().unwrap().in_use.clear();
    ledger.admit("d", contents()).unwrap();
    assert_eq!(world.cleared(), ["d/b"]);
}

#[test]
fn a_record_without_its_registration_is_harmless() {
    let world = World::new();
    // The daemon ended after the record was written, and before anything was filled.
    world.ledger().admit("d", vec![("i", bootstrap(1))]).unwrap();
    std::fs::write(world.path("state/filled/unfinished"), "half a record").unwrap();
    let ledger = world.ledger();
    ledger.admit("d", vec![("i", bootstrap(2))]).unwrap();
    world.fill("d/i");
    ledger.admit("d", vec![("i", bootstrap(2))]).unwrap();
    assert!(world.cleared().is_empty());
}

#[test]
fn an_unchanged_record_is_not_written_again() {
    use std::os::unix::fs::MetadataExt;
    let world = World::new();
    let ledger = world.ledger();
    let inode = |path: &Path| std::fs::metadata(path).unwrap().ino();
    ledger.admit("d", vec![("b", blob(&[(1, 1), (2, 2)]))]).unwrap();
    let path = world.records().remove(0).0;
    let before = inode(&path);
    ledger.admit("d", vec![("b", blob(&[(2, 2)]))]).unwrap();
    assert_eq!(inode(&path), before);
    ledger.admit("d", vec![("b", blob(&[(3, 3)]))]).unwrap();
    assert_ne!(inode(&path), before);
}

#[test]
fn no_record_counts_when_state_and_cache_do_not_belong_together() {
    let world = World::new();
    let one = || vec![("i", bootstrap(1))];
    world.ledger().admit("d", one()).unwrap();
    // Another daemon, with a state directory of its own, used the cache in between.
    std::fs::rename(world.path("state"), world.path("first")).unwrap();
    std::fs::create_dir(world.path("state")).unwrap();
    world.ledger().admit("d", one()).unwrap();
    std::fs::remove_dir_all(world.path("state")).unwrap();
    std::fs::rename(world.path("first"), world.path("state")).unwrap();
    world.fill("d/i");
    world.ledger().admit("d", one()).unwrap();
    assert_eq!(world.cleared(), ["d/i"]);
    // Another cache directory, filled by who knows whom.
    std::fs::remove_file(world.path("cache/sluice-ledger")).unwrap();
    world.fill("d/i");
    world.ledger().admit("d", one()).unwrap();
    assert_eq!(world.cleared(), ["d/i"]);
}

#[test]
fn every_name_of_domain_and_cookie_is_a_good_file_name() {
    let world = World::new();
    let (domain, cookie) = ("d".repeat(248), "c".repeat(254));
    for (domain, cookie) in
        [("..", ".."), (".", "."), ("id", "unfinished"), (domain.as_str(), cookie.as_str())]
    {
        world.ledger().admit(domain, vec![(cookie, bootstrap(1))]).unwrap();
        assert!(world.ledger().has(domain, cookie));
    }
    assert_eq!(world.records().len(), 4);
}

#[test]
fn a_record_that_cannot_be_read_counts_as_none() {
    let world = World::new();
    let ledger = world.ledger();
    ledger.admit("d", vec![("i", bootstrap(1))]).unwrap();
    world.fill("d/i");
    let path = world.records().remove(0).0;
    std::fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink(&path, &path).unwrap();
    ledger.admit("d", vec![("i", bootstrap(1))]).unwrap();
    assert_eq!(world.cleared(), ["d/i"]);
    assert!(ledger.has("d", "i"));
}

#[test]
fn a_disk_that_takes_no_record_refuses_the_registration() {
    let world = World::new();
    let ledger = world.ledger();
    std::fs::write(world.path("state/filled/Id"), "in the way").unwrap();
    let error = ledger.admit("d", vec![("i", bootstrap(1))]).unwrap_err();
    assert!(error.to_string().contains("filled/Id/Di"), "{error}");
}
