//! What making images reads, against mutated input: documents of sources, traces, answers.
//!
//! As `tests/fuzz.rs`, which says how to run it for long.

mod support;

use sluice::build::docker_archive::{choose as choose_listed, parse_list};
use sluice::build::documents::{describe, with_referrer};
use sluice::build::image_config::{ImageConfig, NewLayer, Origin};
use sluice::build::oci_layout::choose as choose_entry;
use sluice::build::place::Place;
use sluice::build::source::Images;
use sluice::build::trace::parse as parse_trace;
use sluice::image::manifest::{Descriptor, Document};
use sluice::registry::complaint::parse as parse_complaint;
use support::fuzzing::fuzz;

/// What a conversion reads of its source, top to bottom; every document may be any other.
#[test]
fn sources() {
    let digest = "0".repeat(64);
    let entry = format!(r#"{{"mediaType":"x.tar","digest":"sha256:{digest}","size":9}}"#);
    // Its own configuration: whatever is asked for, this is what comes.
    let config = r#""architecture":"amd64","os":"linux","rootfs":{"diff_ids":["sha256:0"]}"#;
    let image = format!(r#"{{"schemaVersion":2,"config":{entry},"layers":[{entry}],{config}}}"#);
    let platform = r#""platform":{"os":"linux","architecture":"amd64"}"#;
    let entry = format!(r#"{{"digest":"sha256:{digest}","size":9,{platform}}}"#);
    let index = format!(r#"{{"schemaVersion":2,"manifests":[{entry}]}}"#);
    let seeds = [image, index].map(String::into_bytes);
    fuzz("source", seeds.into(), |input| {
        let (top, mut rounds) = (describe("", input), 0);
        let mut fetch = |_: &Descriptor| {
            rounds += 1;
            assert!(rounds < 1000, "it asks for ever");
            Ok(input.to_vec())
        };
        let images = Images::read(&top, input, None, &mut fetch)?;
        assert!(images.images.len() <= 64);
        match Document::parse(input)? {
            Document::Index(index) => {
                with_referrer(Some(input), &top)?;
                choose_entry(&index, Some("v1")).map(drop)
            }
            Document::Manifest(_) => Ok(()),
        }
    });
}

#[test]
fn image_configs() {
    let seed = br#"{"architecture":"amd64","os":"linux","config":{"Env":["A=b"]},"rootfs":
        {"type":"layers","diff_ids":["sha256:0","sha256:1"]},"history":[{"created_by":"x"},
        {"empty_layer":true},{"created_by":"y"}]}"#;
    fuzz("image-config", vec![seed.to_vec()], |input| {
        let config = ImageConfig::parse(input)?;
        let told = |origin| NewLayer { diff_id: "sha256:2".to_owned(), origin };
        let layers = [told(Origin::Layer(1)), told(Origin::Bootstrap)];
        let written = ImageConfig::parse(&config.rewritten(&layers))?;
        assert_eq!((written.diff_ids.len(), &written.platform), (2, &config.platform));
        Ok(())
    });
}

#[test]
fn archive_lists() {
    let seed = br#"[{"Config":"c.json","RepoTags":["app:1"],"Layers":["a/layer.tar"]}]"#;
    fuzz("archive-list", vec![seed.to_vec()], |input| {
        let list = parse_list(input)?;
        choose_listed(&list, Some("app:1"))?;
        choose_listed(&list, None).map(drop)
    });
}

#[test]
fn traces() {
    let seed = br#"{"path":"/a","offset":0,"length":1,"t_ms":1.5}
        {"path":"/b","offset":4096,"length":8192,"t_ms":2}"#;
    fuzz("trace", vec![seed.to_vec()], |input| parse_trace(input).map(drop));
}

/// What an upload is answered with, and what a user writes.
#[test]
fn places_and_complaints() {
    let seeds = ["oci:a:b", "docker-archive:a:b:c", "dir:x", r#"{"errors":[{"code":"A"}]}"#];
    fuzz("place", seeds.map(|seed| seed.as_bytes().to_vec()).into(), |input| {
        if let Some(said) = parse_complaint(input) {
            assert!(!said.chars().any(char::is_control));
        }
        let place = Place::parse(&String::from_utf8_lossy(input))?;
        assert_eq!(Place::parse(&place.to_string())?, place);
        Ok(())
    });
}
