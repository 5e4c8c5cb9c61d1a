//! An image's configuration: what of it is read, and how it changes when its layers do.
//!
//! Pure. Everything a runtime reads is kept as it is; `rootfs` and `history` are written anew so
//! that they tell of the new layers: one entry that is no `empty_layer` for each.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::config as limits;
use crate::error::{Error, Result};
use crate::image::manifest::Platform;

/// A parsed configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageConfig {
    /// What machine it is for.
    pub platform: Platform,
    /// The digests of the layers as plain tars, lowest first; `sha256:...` as far as anybody said.
    pub diff_ids: Vec<String>,
    raw: Map<String, Value>,
    history: Vec<Value>,
}

/// A layer of the new image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewLayer {
    /// `sha256:...` of its uncompressed form.
    pub diff_id: String,
    /// What it stands for.
    pub origin: Origin,
}

/// What a new layer stands for; layers stand in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Chunks that another image has.
    Foreign,
    /// What a recorded start needs.
    Start,
    /// A layer of the source, by its number.
    Layer(usize),
    /// Where in such a layer, which stays as it is, everything is.
    Index(usize),
    /// All of them together.
    Bootstrap,
}

impl Origin {
    fn line(self) -> Value {
        let comment = match self {
            Origin::Foreign => "chunks of another image",
            Origin::Start => "what a start needs",
            Origin::Layer(_) => "layer",
            Origin::Index(_) => "index of a layer",
            Origin::Bootstrap => "bootstrap",
        };
        json!({ "created_by": "sluice convert", "comment": comment })
    }
}

impl ImageConfig {
    /// Parses the bytes a manifest's `config` refers to.
    pub fn parse(bytes: &[u8]) -> Result<ImageConfig> {
        #[derive(Deserialize)]
        struct Read {
            architecture: String,
            os: String,
            variant: Option<String>,
            #[serde(rename = "os.version")]
            os_version: Option<String>,
            rootfs: Rootfs,
            #[serde(default)]
            history: Option<Vec<Map<String, Value>>>,
        }
        #[derive(Deserialize)]
        struct Rootfs {
            #[serde(default)]
            diff_ids: Option<Vec<String>>,
        }
        let bad = |error: serde_json::Error| {
            Error::Malformed(format!("this is not an image's configuration: {error}"))
        };
        let raw: Map<String, Value> = serde_json::from_slice(bytes).map_err(bad)?;
        let read: Read = serde_json::from_slice(bytes).map_err(bad)?;
        let history = read.history.unwrap_or_default();
        let diff_ids = read.rootfs.diff_ids.unwrap_or_default();
        if diff_ids.len() > limits::LAYERS_MAX || history.len() > limits::HISTORY_MAX {
            return Err(Error::Unsupported(format!(
                "an image of {} layers with {} lines of history; we take {} and {}",
                diff_ids.len(),
                history.len(),
                limits::LAYERS_MAX,
                limits::HISTORY_MAX
            )));
        }
        let platform = Platform {
            architecture: read.architecture,
            os: read.os,
            variant: read.variant.filter(|variant| !variant.is_empty()),
            os_version: read.os_version.filter(|version| !version.is_empty()),
            os_features: Vec::new(),
        };
        let history = history.into_iter().map(Value::Object).collect();
        Ok(ImageConfig { platform, diff_ids, raw, history })
    }

    /// The configuration of a file tree that never was an image.
    pub fn plain(platform: Platform) -> ImageConfig {
        let mut raw = Map::new();
        raw.insert("architecture".into(), json!(platform.architecture));
        raw.insert("os".into(), json!(platform.os));
        if let Some(variant) = &platform.variant {
            raw.insert("variant".into(), json!(variant));
        }
        raw.insert("config".into(), json!({}));
        ImageConfig { platform, diff_ids: Vec::new(), raw, history: Vec::new() }
    }

    /// The same configuration over other layers.
    pub fn rewritten(&self, layers: &[NewLayer]) -> Vec<u8> {
        let mut raw = self.raw.clone();
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        raw.insert("rootfs".into(), json!({ "type": "layers", "diff_ids": diff_ids }));
        raw.insert("history".into(), Value::Array(self.history_of(layers)));
        // A map of values has no key that is not text and no number that is not finite.
        serde_json::to_vec(&raw).unwrap_or_default()
    }

    /// The old lines in their order; one is an `empty_layer` when no new layer stands for its own.
    /// Lines of ours that are said anew go, or each time an image is optimised it would have more.
    fn history_of(&self, layers: &[NewLayer]) -> Vec<Value> {
        let is_empty = |line: &Value| line.get("empty_layer") == Some(&Value::Bool(true));
        let told = self.history.iter().filter(|line| !is_empty(line)).count();
        let speaks_of_all = told == self.diff_ids.len();
        let has = |origin: Origin| layers.iter().any(|layer| layer.origin == origin);
        let of = |wanted: fn(&Origin) -> bool| {
            layers.iter().map(|layer| layer.origin).filter(wanted).map(Origin::line)
        };
        let mut history: Vec<Value> = of(|origin| *origin < Origin::Layer(0)).collect();
        let mut number = 0;
        for line in &self.history {
            let mut line = line.clone();
            if !is_empty(&line) {
                let is_kept = speaks_of_all && has(Origin::Layer(number));
                number += 1;
                if !is_kept && [Origin::Start, Origin::Bootstrap].map(Origin::line).contains(&line)
                {
                    continue;
                }
                if let (false, Some(line)) = (is_kept, line.as_object_mut()) {
                    line.insert("empty_layer".into(), Value::Bool(true));
                }
            }
            history.push(line);
        }
        if !speaks_of_all {
            history.extend(of(|origin| matches!(origin, Origin::Layer(_))));
        }
        history.extend(of(|origin| *origin > Origin::Layer(usize::MAX)));
        history
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(history: Value) -> ImageConfig {
        let text = json!({
            "architecture": "arm", "os": "linux", "variant": "v7",
            "config": { "Env": ["A=b"], "Healthcheck": { "Interval": 30_000_000_000_u64 } },
            "rootfs": { "type": "layers", "diff_ids": ["sha256:a", "sha256:b", "sha256:c"] },
            "history": history,
        });
        ImageConfig::parse(text.to_string().as_bytes()).unwrap()
    }

    fn new(diff_id: &str, origin: Origin) -> NewLayer {
        NewLayer { diff_id: diff_id.to_owned(), origin }
    }

    fn lines(config: &ImageConfig, layers: &[NewLayer]) -> Vec<(String, bool)> {
        let written: Value = serde_json::from_slice(&config.rewritten(layers)).unwrap();
        let line = |line: &Value| {
            let text = line["created_by"].as_str().unwrap_or("").to_owned();
            (text, line["empty_layer"] == true)
        };
        written["history"].as_array().unwrap().iter().map(line).collect()
    }

    #[test]
    fn every_new_layer_has_one_line_and_no_old_line_is_lost() {
        let told = json!([
            { "created_by": "ADD a" }, { "created_by": "ENV x", "empty_layer": true },
            { "created_by": "RUN b" }, { "created_by": "RUN c" },
        ]);
        // The second source layer has no blob of its own.
        let layers = [
            new("sha256:0", Origin::Foreign),
            new("sha256:1", Origin::Layer(0)),
            new("sha256:2", Origin::Layer(2)),
            new("sha256:3", Origin::Bootstrap),
        ];
        let found = lines(&config(told), &layers);
        let expected = [
            ("sluice convert", false),
            ("ADD a", false),
            ("ENV x", true),
            ("RUN b", true),
            ("RUN c", false),
            ("sluice convert", false),
        ];
        assert_eq!(found, expected.map(|(text, empty)| (text.to_owned(), empty)));
    }

    #[test]
    fn a_second_start_says_nothing_more_than_the_first() {
        let optimised = [
            new("sha256:0", Origin::Start),
            new("sha256:1", Origin::Layer(1)),
            new("sha256:2", Origin::Layer(2)),
            new("sha256:3", Origin::Bootstrap),
        ];
        let told = json!([{ "created_by": "a" }, { "created_by": "b" }, { "created_by": "c" }]);
        let written = config(told).rewritten(&optimised);
        let once = ImageConfig::parse(&written).unwrap();
        assert_eq!(once.rewritten(&optimised), written);
    }

    #[test]
    fn a_history_that_does_not_fit_its_layers_is_not_believed() {
        let layers = [new("sha256:1", Origin::Layer(0)), new("sha256:2", Origin::Bootstrap)];
        for told in [json!([]), json!(null), json!([{ "created_by": "one of three" }])] {
            let found = lines(&config(told), &layers);
            assert_eq!(found.iter().filter(|(_, is_empty)| !is_empty).count(), layers.len());
        }
    }

    #[test]
    fn the_rest_stays_as_it_was() {
        let written = config(json!([])).rewritten(&[new("sha256:1", Origin::Bootstrap)]);
        let value: Value = serde_json::from_slice(&written).unwrap();
        assert_eq!(value["config"]["Healthcheck"]["Interval"], 30_000_000_000_u64);
        assert_eq!(value["variant"], "v7");
        assert_eq!(value["rootfs"]["diff_ids"], json!(["sha256:1"]));
        let again = ImageConfig::parse(&written).unwrap();
        assert_eq!(again.platform.variant.as_deref(), Some("v7"));
        let plain =
            ImageConfig::plain(again.platform).rewritten(&[new("sha256:1", Origin::Bootstrap)]);
        assert!(ImageConfig::parse(&plain).is_ok());
    }

    #[test]
    fn what_is_no_configuration_is_refused() {
        let many = vec!["sha256:x"; limits::LAYERS_MAX + 1];
        let large = json!({"architecture": "a", "os": "l", "rootfs": {"diff_ids": many}});
        for text in
            ["", "[]", "{}", r#"{"architecture":1,"os":"l","rootfs":{}}"#, &large.to_string()]
        {
            assert!(ImageConfig::parse(text.as_bytes()).is_err(), "{text:.60}");
        }
    }
}
