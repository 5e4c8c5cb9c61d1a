//! Where a lazily loaded image came from: Docker itself has noted it.
//!
//! Docker hands a graphdriver a layer and does not say whose it is. But it files, under the layer's
//! diff id, every repository it was pulled from or pushed to (`distribution/v2metadata-by-diffid`),
//! and the names of all images (`repositories.json`). So nobody has to write anything: a pull is
//! enough. What an operator wrote into the settings goes first.
//!
//! Facts: distribution/metadata/v2_metadata_service.go and reference/store.go of moby 20.10. The
//! newest entry is the last; entries that a push made carry an HMAC, those of pulls do not.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::start::Policy;
use crate::config;
use crate::error::{Error, Result};
use crate::registry::origin::{Origin as Server, Scheme};
use crate::registry::reference::Reference;

/// Where an image's blobs are, and what to do when they are not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// How the registry is spoken to.
    pub scheme: Scheme,
    /// `HOST[:PORT]`.
    pub host: String,
    /// The repository.
    pub repo: String,
    /// What happens if the daemon or the registry fails at the start of a container.
    pub start: Policy,
}

/// What an operator may write down; nothing of it is needed.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// By repository as Docker knows it (`HOST/REPO`).
    pub repositories: BTreeMap<String, Place>,
    /// For layers Docker has no note of.
    pub default: Option<Place>,
    /// Registries without TLS besides this machine's own: `HOST[:PORT]`, or `A.B.C.D/N`.
    #[serde(rename = "insecure-registries")]
    pub insecure: Vec<String>,
}

/// Where a repository's blobs really are.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Place {
    /// `http://HOST[:PORT]` or `https://HOST[:PORT]`.
    pub registry: Option<String>,
    /// The repository there.
    pub repo: Option<String>,
    /// What happens if the daemon or the registry fails at the start of a container.
    pub start: Policy,
}

/// Docker's own notes about the images of one graphdriver, and the operator's.
#[derive(Debug, Default)]
pub struct ImageStore {
    /// Where `DATA-ROOT/image/DRIVER` may be; Docker makes it after the driver has started.
    candidates: Vec<PathBuf>,
    settings: Settings,
}

impl ImageStore {
    /// Finds Docker's notes: a driver's home is `DATA-ROOT/DRIVER`, and the driver's name may
    /// contain slashes. `image_root` says where `DATA-ROOT/image` is when that does not hold.
    pub fn beside(home: &Path, image_root: Option<&Path>, settings: Settings) -> ImageStore {
        let candidate = |root: &Path| {
            let images = image_root.map_or_else(|| root.join("image"), Path::to_owned);
            home.strip_prefix(root).map(|name| images.join(name)).ok()
        };
        ImageStore {
            candidates: home.ancestors().skip(1).filter_map(candidate).collect(),
            settings,
        }
    }

    /// Where the layer with this diff id (`sha256:...`) came from.
    ///
    /// # Errors
    /// `NotFound` when nobody has noted it, `Malformed` for what was noted.
    pub fn origin(&self, diff_id: &str) -> Result<Origin> {
        let noted = match self.pulled_from(diff_id)? {
            Some(repository) => Some(repository),
            None => self.named(diff_id)?,
        };
        if let Some(repository) = &noted {
            return self.place(repository);
        }
        match &self.settings.default {
            Some(Place { registry: Some(registry), repo: Some(repo), start }) => {
                let server = parse_registry(registry)?;
                let (scheme, host) = (server.scheme, server.authority());
                Ok(Origin { scheme, host, repo: repo.clone(), start: *start })
            }
            _ => Err(Error::NotFound(format!(
                "Docker has not noted where the layer {diff_id} was pulled from; `docker pull` its \
                 image once, or name a default registry in the plugin's settings"
            ))),
        }
    }

    /// A repository, as Docker writes it, with what the settings say about it.
    fn place(&self, repository: &str) -> Result<Origin> {
        let reference = Reference::parse(repository)?;
        let place = self.settings.repositories.get(repository).cloned().unwrap_or_default();
        let (scheme, host) = match &place.registry {
            Some(registry) => {
                let server = parse_registry(registry)?;
                (server.scheme, server.authority())
            }
            None => (self.scheme(&reference.host)?, reference.host),
        };
        let repo = place.repo.unwrap_or(reference.repo);
        Ok(Origin { scheme, host, repo, start: place.start })
    }

    /// As Docker itself does it, 127.0.0.0/8 is spoken to without TLS.
    fn scheme(&self, host: &str) -> Result<Scheme> {
        let server = Server::parse(Scheme::Https, host)?;
        let is_listed = self.settings.insecure.iter().any(|listed| covers(listed, host, &server));
        Ok(if server.is_loopback() || is_listed { Scheme::Http } else { Scheme::Https })
    }

    /// The repository of the newest pull; else of the newest push.
    fn pulled_from(&self, diff_id: &str) -> Result<Option<String>> {
        #[derive(Deserialize)]
        struct Note {
            #[serde(rename = "SourceRepository", default)]
            repository: String,
            #[serde(rename = "HMAC", default)]
            hmac: String,
        }
        let Some((algorithm, hex)) = diff_id.split_once(':') else { return Ok(None) };
        let name = format!("distribution/v2metadata-by-diffid/{algorithm}/{hex}");
        let Some(notes) = self.read::<Vec<Note>>(&name)? else { return Ok(None) };
        let mut known = notes.iter().rev().filter(|note| !note.repository.is_empty());
        let newest = known.clone().find(|note| note.hmac.is_empty()).or_else(|| known.next());
        Ok(newest.map(|note| note.repository.clone()))
    }

    /// The repository in the name of an image that has the layer: after a `docker load` there is
    /// nothing better.
    fn named(&self, diff_id: &str) -> Result<Option<String>> {
        #[derive(Deserialize)]
        struct Names {
            #[serde(rename = "Repositories", default)]
            repositories: BTreeMap<String, BTreeMap<String, String>>,
        }
        #[derive(Deserialize)]
        struct Image {
            rootfs: RootFs,
        }
        #[derive(Deserialize)]
        struct RootFs {
            #[serde(default)]
            diff_ids: Vec<String>,
        }
        let Some(names) = self.read::<Names>("repositories.json")? else { return Ok(None) };
        for (repository, references) in &names.repositories {
            for image in references.values() {
                let Some((algorithm, hex)) = image.split_once(':') else { continue };
                let image = self.read::<Image>(&format!("imagedb/content/{algorithm}/{hex}"))?;
                if image.is_some_and(|image| image.rootfs.diff_ids.iter().any(|id| id == diff_id)) {
                    let reference = Reference::parse(repository)?;
                    return Ok(Some(format!("{}/{}", reference.host, reference.repo)));
                }
            }
        }
        Ok(None)
    }

    /// None where there is no such file.
    fn read<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        let is_store = |directory: &&PathBuf| directory.join("layerdb").is_dir();
        let Some(directory) = self.candidates.iter().find(is_store) else { return Ok(None) };
        if name.split('/').any(|part| part.is_empty() || part.starts_with('.')) {
            return Err(Error::Malformed(format!("{name:?} in Docker's image store")));
        }
        let path = directory.join(name);
        let size = match path.metadata() {
            Ok(status) => status.len(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(Error::io(&error, format!("cannot read {}", path.display())));
            }
        };
        if size > config::DOCKER_NOTES_MAX_BYTES {
            return Err(Error::Unsupported(format!("{} has {size} bytes", path.display())));
        }
        let bytes = std::fs::read(&path)
            .map_err(|error| Error::io(&error, format!("cannot read {}", path.display())))?;
        serde_json::from_slice(&bytes).map(Some).map_err(|error| {
            Error::Malformed(format!("{} is not what Docker writes: {error}", path.display()))
        })
    }
}

fn parse_registry(url: &str) -> Result<Server> {
    let parsed = match url.split_once("://") {
        Some(("http", host)) => Server::parse(Scheme::Http, host),
        Some(("https", host)) => Server::parse(Scheme::Https, host),
        _ => Err(Error::Malformed("write http://HOST[:PORT] or https://HOST[:PORT]".to_owned())),
    };
    parsed.map_err(|error| error.context(format_args!("the registry {url:?} in the settings")))
}

/// Whether an entry of the list of insecure registries means this host.
fn covers(listed: &str, host: &str, server: &Server) -> bool {
    let Some((network, bits)) = listed.split_once('/') else {
        return listed.eq_ignore_ascii_case(host) || listed.eq_ignore_ascii_case(&server.host);
    };
    let (Ok(network), Ok(bits)) = (network.parse::<Ipv4Addr>(), bits.parse::<u32>()) else {
        return false;
    };
    let Ok(address) = server.host.parse::<Ipv4Addr>() else { return false };
    let mask = u32::MAX.checked_shl(32u32.saturating_sub(bits)).unwrap_or(0);
    (u32::from(address) ^ u32::from(network)) & mask == 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const LAYER: &str = "sha256:aaaa";

    /// Docker's data root with a driver whose name has a slash and a colon.
    fn docker(notes: Option<&str>, settings: &str) -> (tempfile::TempDir, ImageStore) {
        let root = tempfile::tempdir().expect("a directory");
        let home = root.path().join("some/driver:1.0");
        let images = root.path().join("image/some/driver:1.0");
        for name in
            ["layerdb", "imagedb/content/sha256", "distribution/v2metadata-by-diffid/sha256"]
        {
            fs::create_dir_all(images.join(name)).expect("made");
        }
        if let Some(notes) = notes {
            let path = images.join("distribution/v2metadata-by-diffid/sha256/aaaa");
            fs::write(path, notes).expect("written");
        }
        let settings = serde_json::from_str(settings).expect("settings");
        let store = ImageStore::beside(&home, None, settings);
        (root, store)
    }

    fn origin(scheme: Scheme, host: &str, repo: &str) -> Origin {
        let (host, repo) = (host.to_owned(), repo.to_owned());
        Origin { scheme, host, repo, start: Policy::Wait }
    }

    #[test]
    fn the_newest_pull_counts_and_a_push_only_without_one() {
        let pulls = r#"[{"Digest":"sha256:1","SourceRepository":"docker.io/library/old","HMAC":""},
            {"Digest":"sha256:1","SourceRepository":"127.0.0.1:5000/team/app","HMAC":""},
            {"Digest":"sha256:1","SourceRepository":"r.example/pushed","HMAC":"ab"}]"#;
        let (_root, store) = docker(Some(pulls), "{}");
        assert_eq!(store.origin(LAYER), Ok(origin(Scheme::Http, "127.0.0.1:5000", "team/app")));
        let push = r#"[{"Digest":"sha256:1","SourceRepository":"r.example/pushed","HMAC":"ab"}]"#;
        let (_root, store) = docker(Some(push), "{}");
        assert_eq!(store.origin(LAYER), Ok(origin(Scheme::Https, "r.example", "pushed")));
    }

    #[test]
    fn without_a_pull_the_images_name_says_where() {
        let (root, store) = docker(None, "{}");
        assert!(matches!(store.origin(LAYER), Err(Error::NotFound(_))));
        let images = root.path().join("image/some/driver:1.0");
        let names = r#"{"Repositories":{"other":{"other:1":"sha256:bb"},
            "r.example:5000/x":{"r.example:5000/x:1":"sha256:cc"}}}"#;
        fs::write(images.join("repositories.json"), names).expect("written");
        let content = r#"{"rootfs":{"type":"layers","diff_ids":["sha256:aaaa"]}}"#;
        fs::write(images.join("imagedb/content/sha256/cc"), content).expect("written");
        assert_eq!(store.origin(LAYER), Ok(origin(Scheme::Https, "r.example:5000", "x")));
    }

    #[test]
    fn the_settings_go_first() {
        let pull = r#"[{"Digest":"sha256:1","SourceRepository":"r.example/x"}]"#;
        let settings = r#"{"repositories":{"r.example/x":
            {"registry":"http://mirror:81","repo":"y","start":"fail"}}}"#;
        let (_root, store) = docker(Some(pull), settings);
        let wanted = Origin { start: Policy::Fail, ..origin(Scheme::Http, "mirror:81", "y") };
        assert_eq!(store.origin(LAYER), Ok(wanted));
        let settings = r#"{"default":{"registry":"https://r.example","repo":"z"}}"#;
        let (_root, store) = docker(None, settings);
        assert_eq!(store.origin(LAYER), Ok(origin(Scheme::Https, "r.example", "z")));
    }

    #[test]
    fn insecure_registries_are_hosts_or_networks() {
        let settings = r#"{"insecure-registries":["10.0.0.0/8","plain.example"]}"#;
        let (_root, store) = docker(None, settings);
        for (host, scheme) in [
            ("10.1.2.3:5000", Scheme::Http),
            ("11.1.2.3:5000", Scheme::Https),
            ("plain.example", Scheme::Http),
            ("plain.example:5000", Scheme::Http),
            ("localhost:5000", Scheme::Http),
            ("127.9.9.9", Scheme::Http),
            ("docker.io", Scheme::Https),
        ] {
            assert_eq!(store.scheme(host), Ok(scheme), "{host}");
        }
    }

    #[test]
    fn damaged_notes_are_named_and_unknown_settings_refused() {
        for notes in ["", "[{]", "{\"a\":1}"] {
            let (_root, store) = docker(Some(notes), "{}");
            let error = store.origin(LAYER).expect_err("refused");
            assert!(error.to_string().contains("v2metadata-by-diffid"), "{error}");
        }
        assert!(serde_json::from_str::<Settings>(r#"{"regstry":1}"#).is_err());
        let (_root, store) = docker(None, "{}");
        assert!(store.origin("sha256:../../x").is_err());
    }
}
