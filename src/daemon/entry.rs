//! The blob entry: the JSON document a client registers an image with (PUT /api/v2/blobs, and the
//! `blobs` list of nydusd's configuration file).
//!
//! Pure: it reads bytes and returns values. Two spellings exist, `config` (legacy, what
//! nydus-snapshotter sends) and `config_v2`, which wins when both are there. Keys we do not know
//! are passed over as nydusd does (clients send `fs_prefetch` and `readahead`), except in the
//! backend's part: there everything is honoured or refused, by `registry::config`.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use crate::blob::registration::{ImageSpec, PrefetchConfig};
use crate::config::{PREFETCH_MERGING_MAX_BYTES, PREFETCH_THREADS_MAX};
use crate::error::{Error, Result};
use crate::registry::config::Backend;

/// A blob entry that says everything it must; whether the files exist is not known yet.
#[derive(Clone, Debug)]
pub struct Entry {
    kind: String,
    metadata_path: Option<PathBuf>,
    spec: ImageSpec,
}

/// Why a body is not an entry. nydusd tells these apart, and so do we.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// Not JSON, or a field is missing or of another type.
    Parse(ParseError),
    /// JSON that contradicts itself or asks for what we do not do.
    Refused(String),
}

/// A JSON error and its place, shown as serde_json's Debug shows it: clients of nydusd log it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParseError {
    /// The path of the field, and what is wrong with it.
    pub message: String,
    /// One-based.
    pub line: usize,
    /// One-based; 0 when the line is empty.
    pub column: usize,
}

impl Entry {
    /// Reads one entry.
    pub fn parse(body: &[u8]) -> std::result::Result<Entry, Refusal> {
        let raw: RawEntry = from_json(body).map_err(Refusal::Parse)?;
        Entry::from_raw(raw).map_err(|error| Refusal::Refused(error.to_string()))
    }

    /// What to register. Here nydusd answers 500, where `parse` answers 400.
    ///
    /// # Errors
    /// `Unsupported` for a type other than `bootstrap`, `Malformed` without a metadata_path.
    pub fn into_spec(self) -> Result<ImageSpec> {
        if self.kind != "bootstrap" {
            return Err(Error::Unsupported(format!(
                "Invalid argument (os error 22): type is {:?}; only \"bootstrap\" is possible",
                self.kind
            )));
        }
        let Some(metadata_path) = self.metadata_path else {
            return Err(Error::Malformed(
                "Invalid argument (os error 22): metadata_path is missing; \
                 it names the image's bootstrap file"
                    .into(),
            ));
        };
        Ok(ImageSpec { metadata_path, ..self.spec })
    }

    fn from_raw(raw: RawEntry) -> Result<Entry> {
        let (config_id, metadata_path, backend, work_dir, prefetch) =
            match (raw.config_v2, raw.config) {
                (Some(config), _) => config.into_parts()?,
                (None, Some(config)) => config.into_parts()?,
                (None, None) => {
                    return Err(Error::Malformed("neither config nor config_v2 is given".into()));
                }
            };
        let spec = ImageSpec {
            domain_id: raw.domain_id,
            id: raw.id,
            config_id,
            metadata_path: PathBuf::new(),
            backend,
            work_dir,
            prefetch,
        };
        Ok(Entry { kind: raw.kind, metadata_path, spec })
    }
}

/// Reads the `blobs` list of nydusd's `--config FILE`; each entry comes with its own JSON. Such
/// entries are not converted from the legacy form there, so only `config_v2` counts; one bad entry
/// is an error for the whole file.
pub fn parse_list(body: &[u8]) -> std::result::Result<Vec<(Entry, Vec<u8>)>, Refusal> {
    let list: RawList<RawEntry> = from_json(body).map_err(Refusal::Parse)?;
    let sources: RawList<Value> = from_json(body).map_err(Refusal::Parse)?;
    let entries = list.blobs.into_iter().zip(sources.blobs).enumerate();
    let entries = entries.map(|(index, (raw, source))| {
        if raw.config_v2.is_none() {
            return Err(Refusal::Refused(format!("blobs[{index}]: config_v2 is missing")));
        }
        let entry = Entry::from_raw(raw)
            .map_err(|error| Refusal::Refused(format!("blobs[{index}]: {error}")))?;
        Ok((entry, source.to_string().into_bytes()))
    });
    entries.collect()
}

/// Deserialises all of `body`; an error names the field's path.
pub fn from_json<'a, T: Deserialize<'a>>(body: &'a [u8]) -> std::result::Result<T, ParseError> {
    let mut deserializer = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let path = if path == "." { None } else { Some(path) };
        ParseError::new(path.as_deref(), error.inner())
    })?;
    deserializer.end().map_err(|error| ParseError::new(None, &error))?;
    Ok(value)
}

impl ParseError {
    fn new(path: Option<&str>, error: &serde_json::Error) -> Self {
        let (line, column) = (error.line(), error.column());
        let text = error.to_string();
        let text = text.strip_suffix(&format!(" at line {line} column {column}")).unwrap_or(&text);
        let message = match path {
            Some(path) => format!("{path}: {text}"),
            None => text.to_owned(),
        };
        Self { message, line, column }
    }
}

impl std::fmt::Display for ParseError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { message, line, column } = self;
        write!(f, "Error({message:?}, line: {line}, column: {column})")
    }
}

/// Configuration id, metadata path, backend, work directory, prefetch.
type Parts = (String, Option<PathBuf>, Backend, PathBuf, PrefetchConfig);

#[derive(Deserialize)]
struct RawList<T> {
    #[serde(default = "Vec::new")]
    blobs: Vec<T>,
}

#[derive(Deserialize)]
struct RawEntry {
    #[serde(rename = "type")]
    kind: String,
    id: String,
    #[serde(default)]
    domain_id: String,
    #[serde(default)]
    config: Option<Legacy>,
    #[serde(default)]
    config_v2: Option<ConfigV2>,
}

#[derive(Deserialize)]
struct Legacy {
    #[serde(default)]
    id: String,
    backend_type: String,
    backend_config: Value,
    cache_type: String,
    cache_config: CacheDirectory,
    #[serde(default)]
    prefetch_config: Option<LegacyPrefetch>,
    #[serde(default)]
    metadata_path: Option<PathBuf>,
}

/// All four fields or none: nydusd has no defaults here.
#[derive(Deserialize)]
struct LegacyPrefetch {
    enable: bool,
    threads_count: u64,
    merging_size: u64,
    bandwidth_rate: u32,
}

/// The only part of a cache's configuration that means something here: the cache itself is the
/// kernel's, and every chunk is verified whatever `validate` says.
#[derive(Deserialize)]
struct CacheDirectory {
    #[serde(default = "current_directory")]
    work_dir: PathBuf,
}

#[derive(Deserialize)]
struct ConfigV2 {
    /// Required, and not looked at: nydusd accepts any number here.
    #[serde(rename = "version")]
    _version: u32,
    #[serde(default)]
    id: String,
    backend: BackendV2,
    #[serde(default)]
    external_backends: Vec<Value>,
    cache: CacheV2,
    #[serde(default)]
    metadata_path: Option<PathBuf>,
}

#[derive(Deserialize)]
struct BackendV2 {
    #[serde(rename = "type")]
    kind: String,
    #[serde(flatten)]
    sections: serde_json::Map<String, Value>,
}

#[derive(Deserialize)]
struct CacheV2 {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    prefetch: PrefetchV2,
    #[serde(default)]
    fscache: Option<CacheDirectory>,
    #[serde(default)]
    filecache: Option<CacheDirectory>,
}

/// `prefetch_all` is passed over: in fscache mode nydusd prefetches whole blobs, whatever it says.
#[derive(Deserialize)]
#[serde(default)]
struct PrefetchV2 {
    enable: bool,
    threads: u64,
    batch_size: u64,
    bandwidth_limit: u32,
}

impl Default for PrefetchV2 {
    fn default() -> Self {
        let default = PrefetchConfig::default();
        Self {
            enable: default.enable,
            threads: default.threads.into(),
            batch_size: default.merging_size_bytes,
            bandwidth_limit: 0,
        }
    }
}

impl Legacy {
    fn into_parts(self) -> Result<Parts> {
        check_cache_type("config.cache_type", &self.cache_type)?;
        let backend = Backend::parse(&self.backend_type, &self.backend_config)
            .map_err(|error| error.context("config.backend_config"))?;
        let prefetch = match self.prefetch_config {
            None => PrefetchConfig::default(),
            Some(it) => PrefetchV2 {
                enable: it.enable,
                threads: it.threads_count,
                batch_size: it.merging_size,
                bandwidth_limit: it.bandwidth_rate,
            }
            .check("config.prefetch_config")?,
        };
        Ok((self.id, self.metadata_path, backend, self.cache_config.work_dir, prefetch))
    }
}

impl ConfigV2 {
    fn into_parts(self) -> Result<Parts> {
        check_cache_type("config_v2.cache.type", &self.cache.kind)?;
        if !self.external_backends.is_empty() {
            return Err(Error::Unsupported(
                "config_v2.external_backends: external backends are not supported".into(),
            ));
        }
        let kind = &self.backend.kind;
        let Some(section) = self.backend.sections.get(kind) else {
            return Err(Error::Malformed(format!("config_v2.backend.{kind}: is missing")));
        };
        let backend = Backend::parse(kind, section)
            .map_err(|error| error.context(format_args!("config_v2.backend.{kind}")))?;
        let directory =
            if self.cache.kind == "fscache" { self.cache.fscache } else { self.cache.filecache };
        let work_dir = directory.map_or_else(current_directory, |directory| directory.work_dir);
        let prefetch = self.cache.prefetch.check("config_v2.cache.prefetch")?;
        Ok((self.id, self.metadata_path, backend, work_dir, prefetch))
    }
}

impl PrefetchV2 {
    /// The bounds hold only where prefetch is on, as in nydusd. A merging size of 0 asks for none
    /// in particular.
    fn check(self, field: &str) -> Result<PrefetchConfig> {
        let default = PrefetchConfig::default();
        if !self.enable {
            return Ok(default);
        }
        let threads = u32::try_from(self.threads).ok();
        let threads = threads.filter(|threads| (1..=PREFETCH_THREADS_MAX).contains(threads));
        let threads = threads.ok_or_else(|| {
            Error::Malformed(format!(
                "{field}: {} threads; 1 to {PREFETCH_THREADS_MAX} are possible",
                self.threads
            ))
        })?;
        if self.batch_size > PREFETCH_MERGING_MAX_BYTES as u64 {
            return Err(Error::Malformed(format!(
                "{field}: a merging size of {} is above {PREFETCH_MERGING_MAX_BYTES} bytes",
                self.batch_size
            )));
        }
        let merging_size_bytes =
            if self.batch_size == 0 { default.merging_size_bytes } else { self.batch_size };
        Ok(PrefetchConfig {
            enable: true,
            threads,
            merging_size_bytes,
            bandwidth_bytes_per_second: self.bandwidth_limit.into(),
        })
    }
}

fn check_cache_type(field: &str, kind: &str) -> Result<()> {
    match kind {
        "fscache" | "blobcache" | "filecache" => Ok(()),
        _ => {
            Err(Error::Unsupported(format!("{field}: {kind:?} is not supported; use \"fscache\"")))
        }
    }
}

fn current_directory() -> PathBuf {
    PathBuf::from(".")
}
