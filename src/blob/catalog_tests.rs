//! The catalog's rules, on real bootstraps and against a naive model.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::catalog::{Catalog, Registered};
use super::registration::{Image, ImageSpec, PrefetchConfig};
use crate::error::Error;
use crate::registry::config::Backend;

/// A directory with bootstraps made from the fixtures.
struct Shelf {
    directory: tempfile::TempDir,
}

impl Shelf {
    fn new() -> Shelf {
        Shelf { directory: tempfile::tempdir().unwrap() }
    }

    /// A bootstrap of `fixture`, changed.
    fn put(&self, name: &str, fixture: &str, change: impl FnOnce(&mut Vec<u8>)) -> PathBuf {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let mut bytes = std::fs::read(root.join(fixture).join("image.boot")).unwrap();
        change(&mut bytes);
        let path = self.directory.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn spec(&self, domain_id: &str, id: &str, metadata_path: &Path) -> ImageSpec {
        ImageSpec {
            domain_id: domain_id.into(),
            id: id.into(),
            config_id: String::new(),
            metadata_path: metadata_path.into(),
            backend: Backend::parse("localfs", &json!({"dir": "/blobs"})).unwrap(),
            work_dir: self.directory.path().into(),
            prefetch: PrefetchConfig::default(),
        }
    }
}

/// The chunk table's offset and size, from the extended superblock.
fn chunk_table(bytes: &[u8]) -> (usize, usize) {
    let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
    (u64_at(1152 + 24), u64_at(1152 + 32))
}

/// Drops the first or the last chunk from the list.
fn drop_chunk(first: bool) -> impl FnOnce(&mut Vec<u8>) {
    move |bytes| {
        let (offset, size) = chunk_table(bytes);
        if first {
            bytes.copy_within(offset + 80..offset + size, offset);
        }
        bytes[1152 + 32..1152 + 40].copy_from_slice(&(size as u64 - 80).to_le_bytes());
    }
}

fn flip_last_digest(bytes: &mut [u8]) {
    let (offset, size) = chunk_table(bytes);
    bytes[offset + size - 80] ^= 1;
}

fn blob_of(image: &Image) -> String {
    image.blobs[0].id.to_string()
}

fn data(catalog: &Catalog, domain_id: &str, cookie: &str) -> Option<(Arc<Image>, Vec<String>)> {
    match catalog.object(domain_id, cookie)? {
        Registered::Data { image, others, .. } => {
            Some((image, others.iter().map(|other| other.image.id.clone()).collect()))
        }
        Registered::Bootstrap { .. } => None,
    }
}

#[test]
fn a_registered_image_is_found_by_both_cookies_in_its_domain_only() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let boot = shelf.put("a", "lz4-1m", |_| ());
    let image = catalog.register(shelf.spec("d", "i", &boot)).unwrap();
    let found = catalog.object("d", "i");
    assert!(matches!(found, Some(Registered::Bootstrap { image: it }) if Arc::ptr_eq(&it, &image)));
    assert!(Arc::ptr_eq(&data(&catalog, "d", &blob_of(&image)).unwrap().0, &image));
    assert_eq!(image.bootstrap_size_bytes, std::fs::metadata(&boot).unwrap().len());
    assert_eq!(image.read_bootstrap().unwrap(), std::fs::read(&boot).unwrap());
    for (domain_id, cookie) in [("e", "i"), ("d", "j"), ("", "i"), ("d", "")] {
        assert!(catalog.object(domain_id, cookie).is_none());
    }
}

#[test]
fn a_key_is_registered_once() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let boot = shelf.put("a", "lz4-1m", |_| ());
    let image = catalog.register(shelf.spec("d", "i", &boot)).unwrap();
    // As itself, and as one of the blobs that are there.
    for id in ["i", &blob_of(&image)] {
        let error = catalog.register(shelf.spec("d", id, &boot)).unwrap_err();
        assert!(
            matches!(&error, Error::Exists(it) if it.contains("bootstrap blob already exists"))
        );
    }
    catalog.register(shelf.spec("e", "i", &boot)).unwrap();
    let own_blob = catalog.register(shelf.spec("f", &blob_of(&image), &boot)).unwrap_err();
    assert!(matches!(own_blob, Error::Malformed(_)));
}

#[test]
fn an_image_may_not_have_the_id_of_a_blob_to_come() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let (one, other) = (shelf.put("a", "lz4-1m", |_| ()), shelf.put("b", "zran", |_| ()));
    let blob = blob_of(&catalog.register(shelf.spec("probe", "i", &one)).unwrap());
    catalog.register(shelf.spec("d", &blob, &other)).unwrap();
    let error = catalog.register(shelf.spec("d", "i", &one)).unwrap_err();
    assert!(matches!(error, Error::Exists(_)));
    assert!(catalog.object("d", "i").is_none());
}

#[test]
fn the_first_backend_is_kept_until_the_last_reference_goes() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let boot = shelf.put("a", "lz4-1m", |_| ());
    let first = catalog.register(shelf.spec("d", "one", &boot)).unwrap();
    let second = catalog.register(shelf.spec("d", "two", &boot)).unwrap();
    let blob = blob_of(&first);
    assert_eq!(data(&catalog, "d", &blob).unwrap().1, Vec::<String>::new());
    catalog.unregister("d", "one").unwrap();
    let (image, others) = data(&catalog, "d", &blob).unwrap();
    assert!(Arc::ptr_eq(&image, &first));
    // Its bootstrap may be gone by now: the second stands in.
    assert_eq!(others, ["two"]);
    catalog.unregister("d", "two").unwrap();
    assert!(data(&catalog, "d", &blob).is_none());
    drop(catalog);
    assert_eq!((Arc::strong_count(&second), Arc::strong_count(&image)), (1, 2));
}

#[test]
fn a_blob_goes_when_its_own_id_is_removed_as_often_as_it_was_registered() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let boot = shelf.put("a", "lz4-1m", |_| ());
    let blob = blob_of(&catalog.register(shelf.spec("d", "one", &boot)).unwrap());
    catalog.register(shelf.spec("d", "two", &boot)).unwrap();
    catalog.unregister("d", &blob).unwrap();
    assert!(data(&catalog, "d", &blob).is_some());
    catalog.unregister("d", &blob).unwrap();
    assert!(data(&catalog, "d", &blob).is_none());
    assert!(matches!(catalog.unregister("d", &blob), Err(Error::NotFound(_))));
    catalog.unregister("d", "one").unwrap();
    catalog.unregister("d", "two").unwrap();
}

#[test]
fn images_that_list_other_chunks_of_a_blob_are_all_offered() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let less = shelf.put("less", "lz4-1m", drop_chunk(false));
    let other = shelf.put("other", "lz4-1m", drop_chunk(true));
    let all = shelf.put("all", "lz4-1m", |_| ());
    let blob = blob_of(&catalog.register(shelf.spec("d", "less", &less)).unwrap());
    for (id, boot) in [("same", &less), ("other", &other), ("all", &all), ("again", &all)] {
        catalog.register(shelf.spec("d", id, boot)).unwrap();
    }
    let (image, others) = data(&catalog, "d", &blob).unwrap();
    assert_eq!(image.id, "less");
    assert_eq!(others, ["other", "all"]);
}

#[test]
fn two_digests_for_one_chunk_are_refused_within_a_domain() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let less = shelf.put("less", "lz4-1m", drop_chunk(false));
    let good = shelf.put("good", "lz4-1m", |_| ());
    let bad = shelf.put("bad", "lz4-1m", |bytes| flip_last_digest(bytes));
    catalog.register(shelf.spec("d", "less", &less)).unwrap();
    catalog.register(shelf.spec("d", "good", &good)).unwrap();
    // The first image does not list that chunk; the second does.
    let error = catalog.register(shelf.spec("d", "bad", &bad)).unwrap_err();
    assert!(matches!(&error, Error::Digest(text) if text.contains("d/good")), "{error}");
    assert!(catalog.object("d", "bad").is_none());
    catalog.register(shelf.spec("e", "bad", &bad)).unwrap();
    // An image whose file is gone cannot be opened and stands in nobody's way.
    std::fs::remove_file(&good).unwrap();
    catalog.register(shelf.spec("d", "bad", &bad)).unwrap();
}

#[test]
fn a_bootstrap_that_changed_after_registration_is_not_served() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let boot = shelf.put("a", "lz4-1m", |_| ());
    let image = catalog.register(shelf.spec("d", "i", &boot)).unwrap();
    shelf.put("a", "lz4-1m", |bytes| bytes[60_000] ^= 1);
    assert!(matches!(image.read_bootstrap(), Err(Error::Digest(_))));
    std::fs::remove_file(&boot).unwrap();
    assert!(matches!(image.read_bootstrap(), Err(Error::System { errno: libc::ENOENT, .. })));
}

/// A blob file that ends in `bootstrap`, whose own blob id is still unknown to it.
fn inlined_blob(bootstrap: &[u8]) -> Vec<u8> {
    let mut bootstrap = bootstrap.to_vec();
    let id = blob_id_field(&bootstrap);
    for at in (0..bootstrap.len() - 64).rev() {
        if bootstrap[at..at + 64] == id[..] {
            bootstrap[at..at + 64].fill(b'x');
        }
    }
    let mut header = tar::Header::new_gnu();
    header.set_path("image.boot").unwrap();
    header.set_size(bootstrap.len() as u64);
    header.set_cksum();
    [&[7; 9000][..], &bootstrap, header.as_bytes()].concat()
}

/// The first device slot's tag.
fn blob_id_field(bootstrap: &[u8]) -> [u8; 64] {
    bootstrap[1408..1472].try_into().unwrap()
}

#[test]
fn a_blob_with_its_bootstrap_inside_is_registered_under_its_file_name() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let id = "ab".repeat(32);
    let blob = shelf.put(&format!("{id}.blob"), "lz4-1m", |bytes| *bytes = inlined_blob(bytes));
    let image = catalog.register(shelf.spec("d", "i", &blob)).unwrap();
    assert_eq!(blob_of(&image), id);
    assert_eq!(image.bootstrap_path, shelf.directory.path().join(format!("{id}.image.boot")));
    let served = image.read_bootstrap().unwrap();
    assert_eq!(&blob_id_field(&served)[..], id.as_bytes());
    assert_eq!(std::fs::read_dir(shelf.directory.path()).unwrap().count(), 2);
    // Again, elsewhere: the same file is written anew.
    catalog.register(shelf.spec("e", "i", &blob)).unwrap();
    assert_eq!(image.read_bootstrap().unwrap(), served);
}

#[test]
fn blobs_without_a_bootstrap_inside_are_refused() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let cut = |from_end: usize| {
        move |bytes: &mut Vec<u8>| {
            *bytes = inlined_blob(bytes);
            bytes.truncate(bytes.len() - from_end);
        }
    };
    for (name, from_end) in [("one", 1), ("header", 512), ("most", 100_000)] {
        let path = shelf.put(name, "lz4-1m", cut(from_end));
        let error = catalog.register(shelf.spec("d", "i", &path)).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
    let empty = shelf.put("empty", "lz4-1m", Vec::clear);
    assert!(catalog.register(shelf.spec("d", "i", &empty)).is_err());
}

#[test]
fn many_threads_may_register_the_same_and_one_wins() {
    let (shelf, catalog) = (Shelf::new(), Catalog::default());
    let boot = shelf.put("a", "lz4-1m", |_| ());
    let register = |index: usize| {
        catalog.register(shelf.spec("d", "same", &boot)).is_ok() as usize
            + 100 * catalog.register(shelf.spec("d", &format!("i{index}"), &boot)).is_ok() as usize
    };
    let won: usize = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|index| scope.spawn(move || register(index))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    assert_eq!(won, 801);
    let listed = catalog.list("d", None);
    assert_eq!(listed.len(), 10);
    assert_eq!(listed[9].data, Some((0, 9)));
}

#[derive(Clone, Debug)]
enum Step {
    Register { domain: u8, id: u8, variant: u8 },
    Unregister { domain: u8, id: u8 },
    UnregisterBlob { domain: u8, variant: u8 },
    UnregisterDomain { domain: u8 },
}

fn step() -> impl Strategy<Value = Step> {
    let (domain, id, variant) = (0u8..2, 0u8..3, 0u8..3);
    prop_oneof![
        6 => (domain.clone(), id.clone(), variant.clone())
            .prop_map(|(domain, id, variant)| Step::Register { domain, id, variant }),
        3 => (domain.clone(), id).prop_map(|(domain, id)| Step::Unregister { domain, id }),
        1 => (domain.clone(), variant)
            .prop_map(|(domain, variant)| Step::UnregisterBlob { domain, variant }),
        1 => domain.prop_map(|domain| Step::UnregisterDomain { domain }),
    ]
}

/// Images with their blob, and blobs with their first image's number and their references.
#[derive(Default)]
struct Model {
    images: BTreeMap<(String, String), String>,
    blobs: BTreeMap<(String, String), (String, u32)>,
}

impl Model {
    fn register(&mut self, domain: &str, id: &str, blob: &str) -> bool {
        let key = (domain.to_owned(), id.to_owned());
        if self.images.contains_key(&key) {
            return false;
        }
        self.images.insert(key, blob.to_owned());
        let first = (id.to_owned(), 0);
        self.blobs.entry((domain.to_owned(), blob.to_owned())).or_insert(first).1 += 1;
        true
    }

    fn release(&mut self, domain: &str, blob: &str) -> bool {
        let key = (domain.to_owned(), blob.to_owned());
        let Some(entry) = self.blobs.get_mut(&key) else { return false };
        entry.1 -= 1;
        if entry.1 == 0 {
            self.blobs.remove(&key);
        }
        true
    }

    fn unregister(&mut self, domain: &str, id: &str) -> bool {
        let Some(blob) = self.images.remove(&(domain.to_owned(), id.to_owned())) else {
            return false;
        };
        self.release(domain, &blob);
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// Whatever is registered and removed in whatever order, images and reference counts are those
    /// of the model.
    #[test]
    fn reference_counts_follow_the_model(steps in proptest::collection::vec(step(), 1..30)) {
        let (shelf, catalog) = (Shelf::new(), Catalog::default());
        let boots = [
            shelf.put("a", "lz4-1m", |_| ()),
            shelf.put("b", "lz4-1m", drop_chunk(false)),
            shelf.put("c", "zran", |_| ()),
        ];
        let blobs = boots.each_ref().map(|boot| {
            blob_of(&Catalog::default().register(shelf.spec("d", "i", boot)).unwrap())
        });
        let mut model = Model::default();
        for step in steps {
            match step {
                Step::Register { domain, id, variant } => {
                    let (domain, id) = (format!("d{domain}"), format!("i{id}"));
                    let spec = shelf.spec(&domain, &id, &boots[usize::from(variant)]);
                    let expected = model.register(&domain, &id, &blobs[usize::from(variant)]);
                    prop_assert_eq!(catalog.register(spec).is_ok(), expected);
                }
                Step::Unregister { domain, id } => {
                    let (domain, id) = (format!("d{domain}"), format!("i{id}"));
                    let expected = model.unregister(&domain, &id);
                    prop_assert_eq!(catalog.unregister(&domain, &id).is_ok(), expected);
                }
                Step::UnregisterBlob { domain, variant } => {
                    let (domain, blob) = (format!("d{domain}"), &blobs[usize::from(variant)]);
                    let expected = model.release(&domain, blob);
                    prop_assert_eq!(catalog.unregister(&domain, blob).is_ok(), expected);
                }
                Step::UnregisterDomain { domain } => {
                    let domain = format!("d{domain}");
                    model.images.retain(|key, _| key.0 != domain);
                    model.blobs.retain(|key, _| key.0 != domain);
                    catalog.unregister_domain(&domain);
                }
            }
            let key = |image: &Image| (image.domain_id.clone(), image.id.clone());
            let images = catalog.images();
            let images = images.iter().map(|image| (key(image), blob_of(image)));
            prop_assert_eq!(images.collect::<BTreeMap<_, _>>(), model.images.clone());
            let domains = ["d0", "d1"].map(|domain| catalog.list(domain, None));
            let listed = domains.iter().flatten().filter_map(|it| {
                let (blob_index, references) = it.data?;
                let blob = it.image.blobs[blob_index as usize].id.to_string();
                Some(((it.image.domain_id.clone(), blob), (it.image.id.clone(), references)))
            });
            prop_assert_eq!(listed.collect::<BTreeMap<_, _>>(), model.blobs.clone());
        }
    }
}

#[test]
fn start_blob_is_fetched_ahead_at_a_start_and_not_later() {
    let shelf = Shelf::new();
    let path = shelf.put("boot", "zstd-64k", |_| {});
    let (mut image, _) = Image::load(shelf.spec("", "image", &path)).unwrap();
    assert!(image.start_bytes == 0 && !image.is_fetched_ahead(0), "it lists nothing");
    image.start_bytes = 8192;
    assert_eq!(image.start_ranges(0), std::slice::from_ref(&(0..8192)));
    assert!(image.is_fetched_ahead(0) && !image.is_fetched_ahead(1));
    image.touches.resume();
    assert!(!image.is_fetched_ahead(0), "it was mounted before");
    image.prefetch.enable = true;
    assert!(image.is_fetched_ahead(0) && image.start_ranges(0).is_empty());
}
