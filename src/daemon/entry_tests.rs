//! The acceptance rules of blob entries: what is required, defaulted, refused, and in which words.

use super::entry::{Entry, Refusal};
use crate::blob::registration::{ImageSpec, PrefetchConfig};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::PathBuf;

fn legacy() -> Value {
    json!({
        "type": "bootstrap", "id": "i", "domain_id": "d", "fs_prefetch": {}, "readahead": 3,
        "config": {
            "id": "cfg", "backend_type": "localfs", "backend_config": {"dir": "/blobs"},
            "cache_type": "fscache", "cache_config": {"work_dir": "/w"},
            "prefetch_config": {
                "enable": true, "threads_count": 3, "merging_size": 4096, "bandwidth_rate": 7
            },
            "metadata_path": "/m", "unknown": 1
        }
    })
}

fn v2() -> Value {
    json!({
        "type": "bootstrap", "id": "i",
        "config_v2": {
            "version": 1, "id": "cfg2",
            "backend": {"type": "localfs", "localfs": {"dir": "/blobs"}},
            "cache": {"type": "fscache", "fscache": {"work_dir": "/w2"},
                      "prefetch": {"enable": true, "threads": 5}},
            "metadata_path": "/m2"
        }
    })
}

fn spec(entry: &Value) -> ImageSpec {
    Entry::parse(entry.to_string().as_bytes()).unwrap().into_spec().unwrap()
}

fn without(mut entry: Value, pointer: &str) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    entry.pointer_mut(parent).unwrap().as_object_mut().unwrap().remove(key).unwrap();
    entry
}

fn with(mut entry: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    entry.pointer_mut(parent).unwrap()[key] = value;
    entry
}

#[test]
fn legacy_entry_says_what_it_says() {
    let spec = spec(&legacy());
    assert_eq!((spec.domain_id.as_str(), spec.id.as_str()), ("d", "i"));
    assert_eq!(spec.config_id, "cfg");
    assert_eq!(spec.metadata_path, PathBuf::from("/m"));
    assert_eq!(spec.work_dir, PathBuf::from("/w"));
    let prefetch = PrefetchConfig {
        enable: true,
        threads: 3,
        merging_size_bytes: 4096,
        bandwidth_bytes_per_second: 7,
    };
    assert_eq!(spec.prefetch, prefetch);
}

#[test]
fn config_v2_wins_and_has_a_default_for_each_prefetch_field() {
    let mut both = legacy();
    both["config_v2"] = v2()["config_v2"].clone();
    let spec = spec(&both);
    assert_eq!(spec.config_id, "cfg2");
    assert_eq!(spec.work_dir, PathBuf::from("/w2"));
    assert_eq!((spec.prefetch.threads, spec.prefetch.merging_size_bytes), (5, 1 << 20));
}

#[test]
fn optional_fields_have_nydusds_defaults() {
    for pointer in ["/domain_id", "/config/id", "/config/prefetch_config"] {
        spec(&without(legacy(), pointer));
    }
    let bare = spec(&with(legacy(), "/config/cache_config", json!({})));
    assert_eq!(bare.work_dir, PathBuf::from("."));
    for pointer in ["/config_v2/id", "/config_v2/cache/prefetch", "/config_v2/cache/fscache"] {
        spec(&without(v2(), pointer));
    }
}

#[test]
fn required_fields_are_named_when_missing() {
    let cases = [
        (legacy(), "/type", "missing field `type`"),
        (legacy(), "/id", "missing field `id`"),
        (legacy(), "/config/backend_type", "config: missing field `backend_type`"),
        (legacy(), "/config/backend_config", "config: missing field `backend_config`"),
        (legacy(), "/config/cache_type", "config: missing field `cache_type`"),
        (legacy(), "/config/cache_config", "config: missing field `cache_config`"),
        (legacy(), "/config/prefetch_config/enable", "config.prefetch_config: missing field"),
        (legacy(), "/config/prefetch_config/threads_count", "`threads_count`"),
        (legacy(), "/config/prefetch_config/merging_size", "`merging_size`"),
        (legacy(), "/config/prefetch_config/bandwidth_rate", "`bandwidth_rate`"),
        (v2(), "/config_v2/version", "config_v2: missing field `version`"),
        (v2(), "/config_v2/backend/type", "config_v2.backend: missing field `type`"),
        (v2(), "/config_v2/cache", "config_v2: missing field `cache`"),
    ];
    for (entry, pointer, word) in cases {
        let text = without(entry, pointer).to_string();
        match Entry::parse(text.as_bytes()) {
            Err(Refusal::Parse(error)) => assert!(error.message.contains(word), "{error}"),
            other => panic!("{pointer}: {other:?}"),
        }
    }
}

#[test]
fn contradictions_and_what_we_do_not_do_are_refused() {
    let cases = [
        (legacy(), "/config/cache_type", json!("dummycache"), "config.cache_type"),
        (legacy(), "/config/backend_type", json!("floppy"), "floppy"),
        (legacy(), "/config/backend_config", json!({"typo": 1}), "typo"),
        (legacy(), "/config/prefetch_config/threads_count", json!(0), "0 threads"),
        (legacy(), "/config/prefetch_config/threads_count", json!(1025), "1025 threads"),
        (legacy(), "/config/prefetch_config/merging_size", json!(268_435_457), "268435456"),
        (v2(), "/config_v2/external_backends", json!([{}]), "external_backends"),
        (v2(), "/config_v2/backend/type", json!("registry"), "config_v2.backend.registry"),
        (v2(), "/config_v2/cache/type", json!("tape"), "config_v2.cache.type"),
    ];
    for (entry, pointer, value, word) in cases {
        let text = with(entry, pointer, value).to_string();
        match Entry::parse(text.as_bytes()) {
            Err(Refusal::Refused(reason)) => assert!(reason.contains(word), "{reason}"),
            other => panic!("{pointer}: {other:?}"),
        }
    }
}

#[test]
fn prefetch_bounds_hold_only_where_prefetch_is_on() {
    let off = with(legacy(), "/config/prefetch_config/enable", json!(false));
    let off = with(off, "/config/prefetch_config/threads_count", json!(0));
    assert_eq!(spec(&off).prefetch, PrefetchConfig::default());
    let none = with(legacy(), "/config/prefetch_config/merging_size", json!(0));
    assert_eq!(spec(&none).prefetch.merging_size_bytes, 1 << 20);
}

#[test]
fn errors_name_field_line_and_column() {
    let text = "{\n \"type\": \"bootstrap\", \"id\": 7}";
    let Err(Refusal::Parse(error)) = Entry::parse(text.as_bytes()) else { panic!() };
    assert_eq!(error.message, "id: invalid type: integer `7`, expected a string");
    assert_eq!(error.line, 2);
    let trailing = format!("{} x", legacy());
    assert!(matches!(Entry::parse(trailing.as_bytes()), Err(Refusal::Parse(_))));
}

proptest! {
    #[test]
    fn any_bytes_are_an_entry_or_an_error(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = Entry::parse(&bytes);
    }

    #[test]
    fn broken_entries_are_entries_or_errors(
        is_legacy in any::<bool>(), at in any::<prop::sample::Index>(), byte in any::<u8>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = if is_legacy { legacy() } else { v2() }.to_string().into_bytes();
        let index = at.index(bytes.len());
        bytes[index] = byte;
        let _ = Entry::parse(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        prop_assert!(Entry::parse(&bytes).is_err());
    }
}
