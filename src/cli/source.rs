//! Where an image comes from: a reference in a registry, or a bootstrap on disk and where its blobs
//! are.
//!
//! Owns the options that say so and the download of manifest and bootstrap layer. Whatever is
//! fetched is checked against the digest it was asked for by (a tag is taken at the registry's
//! word).

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::blobs::Blobs;
use super::fetch;
use crate::build::{self, transport};
use crate::config;
use crate::error::{Error, Result};
use crate::image::{BlobId, Bootstrap};
use crate::registry::config::Backend;
use crate::registry::origin::Scheme;
use crate::registry::reference::{Reference, is_blob_id};

/// Where an image's blobs are.
#[derive(Args, Clone, Debug, Default)]
pub struct Place {
    /// Talk to the image's registry without TLS.
    #[arg(long)]
    plain_http: bool,
    /// The registry of a bootstrap's blobs, http://HOST[:PORT] or https://HOST[:PORT].
    #[arg(long, value_name = "URL", requires = "repo", conflicts_with = "blobs")]
    registry: Option<String>,
    /// The repository of a bootstrap's blobs.
    #[arg(long, value_name = "REPO", requires = "registry")]
    repo: Option<String>,
    /// A directory with a bootstrap's blobs, each in a file named by its id.
    #[arg(long, value_name = "DIR")]
    blobs: Option<PathBuf>,
}

/// An image: its metadata and where its data is.
#[derive(Clone, Debug)]
pub struct Source {
    /// The bytes of image.boot, as yet unparsed.
    pub bootstrap: Vec<u8>,
    /// `{"type": backend_type, "config": backend_config}` for a registration; Null if nobody said.
    pub backend: Value,
    /// The same for this program's own reading.
    pub blobs: Option<Blobs>,
}

impl Source {
    /// A bootstrap's file, a directory with one, an image in an OCI layout (`oci:DIR:TAG`), or the
    /// name of one in a registry: what is there decides.
    pub fn of(image: &Path, place: &Place) -> Result<Source> {
        if let Some(text) = image.to_str().filter(|text| text.starts_with("oci:")) {
            return Source::of_layout(text);
        }
        if image.is_dir() {
            return Source::built(image, place);
        }
        if image.exists() {
            return Source::read(image, place);
        }
        match image.to_str().filter(|text| text.contains('/') && !text.starts_with(['/', '.'])) {
            Some(_) => Source::of_image(image, place),
            None => Err(Error::NotFound(format!(
                "{}: no such file, and not an image's name (HOST/REPO:TAG)",
                image.display()
            ))),
        }
    }

    /// An image in an OCI layout; its blobs lie there by their digests.
    fn of_layout(text: &str) -> Result<Source> {
        let named = |error: Error| error.context(text);
        let place = build::place::Place::parse(text)?;
        let (dictionary, directory) = transport::layout(&place).map_err(named)?;
        let directory = std::fs::canonicalize(&directory)
            .map_err(|error| Error::io(&error, directory.display().to_string()))?;
        let backend = json!({ "type": "localfs", "config": { "dir": directory } });
        let bootstrap = dictionary.bootstrap.bytes().to_vec();
        Ok(Source { bootstrap, backend, blobs: Some(Blobs::Directory(directory)) })
    }

    /// What `sluice build` leaves: a directory with the bootstrap and, unless they are said to be
    /// elsewhere, the blobs.
    fn built(directory: &Path, place: &Place) -> Result<Source> {
        let here = Place { blobs: Some(directory.to_owned()), ..Place::default() };
        let elsewhere = place.blobs.is_some() || place.registry.is_some();
        let file = directory.join(super::build::BOOTSTRAP_NAME);
        Source::read(&file, if elsewhere { place } else { &here })
    }

    /// A bootstrap on disk whose blobs must be said to be somewhere.
    pub fn of_bootstrap(file: &Path, place: &Place) -> Result<Source> {
        let source = Source::read(file, place)?;
        match source.blobs {
            Some(_) => Ok(source),
            None => Err(Error::Malformed(
                "say where the blobs are: --registry URL --repo REPO, or --blobs DIR".to_owned(),
            )),
        }
    }

    /// An image in a registry.
    pub fn of_image(image: &Path, place: &Place) -> Result<Source> {
        let text = image
            .to_str()
            .ok_or_else(|| Error::Malformed(format!("{}: not an image's name", image.display())))?;
        if place.registry.is_some() || place.blobs.is_some() {
            return Err(Error::Malformed(format!(
                "{text} names its registry already; --registry and --blobs go with a bootstrap file"
            )));
        }
        let reference = Reference::parse(text)?;
        let scheme = if place.plain_http { Scheme::Http } else { Scheme::Https };
        let backend = Backend::registry(scheme, &reference.host, &reference.repo)?;
        let bootstrap = fetch::bootstrap(&backend, &reference)?;
        Ok(Source {
            bootstrap,
            backend: registry_entry(scheme, &reference.host, &reference.repo),
            blobs: Some(Blobs::Registry(Box::new(backend))),
        })
    }

    fn read(file: &Path, place: &Place) -> Result<Source> {
        let bootstrap = with_blob_id(read_bootstrap(file)?, file);
        let (backend, blobs) = place.resolve()?;
        Ok(Source { bootstrap, backend, blobs })
    }
}

impl Place {
    /// Nothing but a registry, spoken to as the user wants.
    pub fn of_registry(plain_http: bool) -> Self {
        Place { plain_http, ..Place::default() }
    }

    fn resolve(&self) -> Result<(Value, Option<Blobs>)> {
        if let Some(directory) = &self.blobs {
            let directory = std::fs::canonicalize(directory)
                .map_err(|error| Error::io(&error, format!("--blobs {}", directory.display())))?;
            let entry = json!({ "type": "localfs", "config": { "dir": directory } });
            return Ok((entry, Some(Blobs::Directory(directory))));
        }
        let (Some(url), Some(repo)) = (&self.registry, &self.repo) else {
            return Ok((Value::Null, None));
        };
        let (scheme, host) = self.split(url)?;
        let backend = Backend::registry(scheme, host, repo)?;
        Ok((registry_entry(scheme, host, repo), Some(Blobs::Registry(Box::new(backend)))))
    }

    fn split<'a>(&self, url: &'a str) -> Result<(Scheme, &'a str)> {
        let (scheme, host) = match url.split_once("://") {
            Some(("http", host)) => (Scheme::Http, host),
            Some(("https", host)) => (Scheme::Https, host),
            None if self.plain_http => (Scheme::Http, url),
            None => (Scheme::Https, url),
            Some((other, _)) => {
                return Err(Error::Malformed(format!(
                    "--registry {url}: {other} is neither http nor https"
                )));
            }
        };
        let host = host.trim_end_matches('/');
        match host.is_empty() || host.contains(['/', '?', '#', '@']) {
            true => Err(Error::Malformed(format!(
                "--registry {url}: write http://HOST[:PORT]; the repository goes into --repo"
            ))),
            false => Ok((scheme, host)),
        }
    }
}

fn registry_entry(scheme: Scheme, host: &str, repo: &str) -> Value {
    let config = json!({ "scheme": scheme.as_str(), "host": host, "repo": repo });
    json!({ "type": "registry", "config": config })
}

/// A bootstrap that was stored inside its own blob has a placeholder for the blob's id; the file's
/// name up to the first dot is the id then, by nydus's convention. Anything else stays as it is.
fn with_blob_id(bytes: Vec<u8>, file: &Path) -> Vec<u8> {
    let stem = file.file_name().and_then(|name| name.to_str()?.split('.').next());
    let id = stem.filter(|stem| is_blob_id(stem)).and_then(|stem| BlobId::parse(stem).ok());
    let Some(id) = id else { return bytes };
    match Bootstrap::parse(bytes.clone()).and_then(|parsed| parsed.with_inlined_id(&id)) {
        Ok(named) => named.bytes().to_vec(),
        Err(_) => bytes,
    }
}

/// The bytes of a bootstrap file.
pub fn read_bootstrap(file: &Path) -> Result<Vec<u8>> {
    let failed = |error: &std::io::Error| {
        Error::io(error, format!("cannot read the bootstrap {}", file.display()))
    };
    let limit = config::BOOTSTRAP_MAX_BYTES as u64;
    let mut bytes = Vec::new();
    std::fs::File::open(file)
        .and_then(|source| source.take(limit + 1).read_to_end(&mut bytes))
        .map_err(|error| failed(&error))?;
    match bytes.len() as u64 > limit {
        true => Err(Error::Unsupported(format!(
            "{}: a bootstrap has at most {limit} bytes; is this a blob?",
            file.display()
        ))),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(registry: Option<&str>, plain_http: bool) -> Place {
        let registry = registry.map(str::to_owned);
        Place { plain_http, registry, repo: Some("team/app".to_owned()), blobs: None }
    }

    #[test]
    fn a_registry_is_a_scheme_and_a_host() {
        let split = |url: &'static str, plain| place(None, plain).split(url);
        assert_eq!(split("http://127.0.0.1:5000/", false), Ok((Scheme::Http, "127.0.0.1:5000")));
        assert_eq!(split("https://r.example", true), Ok((Scheme::Https, "r.example")));
        assert_eq!(split("r.example", true), Ok((Scheme::Http, "r.example")));
        assert_eq!(split("r.example", false), Ok((Scheme::Https, "r.example")));
        for url in ["ftp://r", "http://", "http://r/repo", "http://u@r", "http://r?x"] {
            assert!(split(url, false).is_err(), "{url}");
        }
    }

    #[test]
    fn a_registration_says_what_was_asked_for() {
        let (entry, blobs) = place(Some("http://127.0.0.1:5000"), false).resolve().expect("valid");
        let config = json!({"scheme": "http", "host": "127.0.0.1:5000", "repo": "team/app"});
        assert_eq!(entry, json!({"type": "registry", "config": config}));
        assert!(matches!(blobs, Some(Blobs::Registry(_))));
        assert!(Backend::parse("registry", &entry["config"]).is_ok());
    }

    #[test]
    fn a_directory_of_blobs_is_resolved_and_must_exist() {
        let directory = tempfile::tempdir().expect("a directory");
        let blobs = Some(directory.path().to_owned());
        let (entry, _) = Place { blobs, ..Place::default() }.resolve().expect("valid");
        assert!(Backend::parse("localfs", &entry["config"]).is_ok());
        let blobs = Some(directory.path().join("absent"));
        assert!(Place { blobs, ..Place::default() }.resolve().is_err());
    }

    #[test]
    fn a_bootstrap_without_blobs_cannot_be_mounted() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let error = Source::of_bootstrap(file.path(), &Place::default()).expect_err("refused");
        assert!(error.to_string().contains("--registry"), "{error}");
    }

    #[test]
    fn a_bootstrap_out_of_its_blob_takes_the_id_of_its_file_name() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/lz4-1m/image.boot");
        let whole = std::fs::read(path).expect("a fixture");
        let id = Bootstrap::parse(whole.clone()).expect("parses").blobs()[0].id.to_string();
        let at = |start: usize| {
            (start..).find(|&at| whole[at..].starts_with(id.as_bytes())).expect("an id")
        };
        let first = at(0);
        let second = at(first + 1);
        let mut blank = whole.clone();
        blank[first..first + 64].fill(b'x');
        blank[second..second + 64].fill(b'x');
        let named = format!("/somewhere/{id}.boot");
        assert_eq!(with_blob_id(blank.clone(), Path::new(&named)), whole);
        assert_eq!(with_blob_id(blank.clone(), Path::new("/x/image.boot")), blank);
        assert_eq!(with_blob_id(vec![7; 10], Path::new(&named)), [7; 10]);
    }

    #[test]
    fn what_is_neither_a_file_nor_a_name_is_refused() {
        for name in ["image.boot.absent", "/nonexistent/image.boot", "./x/y"] {
            let error = Source::of(Path::new(name), &Place::default()).expect_err(name);
            assert!(matches!(error, Error::NotFound(_)), "{error}");
        }
    }
}
