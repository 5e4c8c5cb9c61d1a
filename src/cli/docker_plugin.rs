//! `sluice docker-plugin`: the graphdriver that Docker calls, with the daemon's API behind it.
//!
//! Owns the options and the calls to the daemon. One process may serve several names.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Value, json};

use super::client::{Api, query_value};
use super::docker_daemon::DaemonBeside;
use super::snapshotter::STARTS;
use super::{Daemon, Verdict, output};
use crate::config;
use crate::error::{Error, Result};
use crate::image::Bootstrap;
use crate::plug::docker::{Options as PluginOptions, Plugin};
use crate::plug::docker_origin::Settings;
use crate::plug::docker_server::{Socket, serve};
use crate::plug::driver_images::Service;
use crate::plug::start::Starts;
use crate::registry::config::Backend;

/// The options of `sluice docker-plugin`.
#[derive(Args)]
#[command(after_help = "Example: in /etc/docker/daemon.json (Docker up to 26.1)\n  \
    { \"experimental\": true, \"storage-driver\": \"hsiangkao/nydus-erofs-graphdriver:0.3.0\" }\n\
    and, beside `sluice daemon`, before Docker starts:\n  \
    sluice docker-plugin\n\n\
    `docker pull` and `docker run` of a bootstrap-only image then load it lazily; all other images \
    work as usual.")]
pub struct Options {
    /// The storage driver's name, as in Docker's daemon.json (repeatable).
    #[arg(long = "name", value_name = "NAME", default_value = config::DOCKER_NAME_DEFAULT)]
    names: Vec<String>,
    /// Listen here instead of /run/docker/plugins/NAME.sock.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Keep the layers here instead of where Docker says (DATA-ROOT/NAME).
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,
    /// Docker's DATA-ROOT/image, if it is not found beside the layers.
    #[arg(long, value_name = "DIR")]
    docker_images: Option<PathBuf>,
    /// The domain in which images share blobs; empty for none (Linux before 6.1).
    #[arg(long, value_name = "DOMAIN", default_value = "docker")]
    domain: String,
    /// Registries that need to be explained; nothing has to be in it.
    #[arg(long, value_name = "FILE", default_value = config::DOCKER_SETTINGS_DEFAULT)]
    settings: PathBuf,
    /// Where the plugin notes what must survive its own restart.
    #[arg(long, value_name = "DIR", default_value = config::STATE_DIR_DEFAULT)]
    state_dir: PathBuf,
    /// Run the daemon, too, with its cache here: for a managed plugin, where nobody else does.
    #[arg(long, value_name = "CACHE_DIR")]
    with_daemon: Option<PathBuf>,
    #[command(flatten)]
    daemon: Daemon,
}

/// Serves Docker until told to stop.
pub fn run(options: &Options) -> Result<Verdict> {
    if options.names.len() > 1 && (options.socket.is_some() || options.root.is_some()) {
        return Err(Error::Malformed(
            "--socket and --root are for one plugin: give one --name with them".to_owned(),
        ));
    }
    raise_descriptor_limit();
    let service = Arc::new(service(options.daemon.api(), &options.domain));
    let settings = settings(&options.settings)?;
    let socket = options.daemon.api().socket().to_owned();
    let start = |cache: &PathBuf| DaemonBeside::start(cache, &socket, &options.state_dir);
    // Dropped last: the plugin's own end may still want it.
    let _beside = options.with_daemon.as_ref().map(start).transpose()?;
    let mut served = Vec::new();
    for name in &options.names {
        check_name(name)?;
        let path = match &options.socket {
            Some(path) => path.clone(),
            None => Path::new(config::DOCKER_PLUGINS_DIR).join(format!("{name}.sock")),
        };
        let note = format!("{}.json", name.replace('/', "_"));
        let plugin = Plugin::new(
            PluginOptions {
                root: options.root.clone(),
                image_root: options.docker_images.clone(),
                note: options.state_dir.join("docker-plugin").join(note),
                settings: settings.clone(),
            },
            service.clone(),
        )?;
        served.push((Socket::bind(&path)?, Arc::new(plugin)));
    }
    serve(&served, &|text| output::complain(&format!("sluice: {text}")))?;
    Ok(Verdict::Good)
}

/// A plugin's name as Docker writes it: `NAME`, `OWNER/NAME:TAG`.
fn check_name(name: &str) -> Result<()> {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:".contains(&byte);
    let good = name
        .split('/')
        .all(|part| !part.is_empty() && !part.starts_with('.') && part.bytes().all(is_plain));
    match good && name.len() <= config::FILE_NAME_MAX_BYTES {
        true => Ok(()),
        false => Err(Error::Malformed(format!("--name {name:?} is no name of a plugin"))),
    }
}

fn settings(file: &Path) -> Result<Settings> {
    let bytes = match std::fs::read(file) {
        Ok(bytes) => bytes,
        Err(error)
            if error.kind() == std::io::ErrorKind::NotFound
                && file == Path::new(config::DOCKER_SETTINGS_DEFAULT) =>
        {
            return Ok(Settings::default());
        }
        Err(error) => return Err(Error::io(&error, format!("cannot read {}", file.display()))),
    };
    serde_json::from_slice(&bytes)
        .map_err(|error| Error::Malformed(format!("{}: {error}", file.display())))
}

/// Walks through deep trees hold a descriptor for each level.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
        && let Err(errno) = setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
    {
        output::complain(&format!("sluice: cannot raise the limit of open files: {errno}"));
    }
}

/// What the plugin needs, done by the daemon behind its API.
fn service(api: Api, domain: &str) -> Service {
    const MOUNTS: &str = "/api/sluice/v1/mounts";
    let api = Arc::new(api);
    let (unmounter, teller) = (api.clone(), api.clone());
    Service {
        mount: Box::new(move |entry, place| {
            api.put(MOUNTS, &json!({ "entry": entry, "mountpoint": place })).map(|_| ())
        }),
        unmount: Box::new(move |place| {
            let place = query_value(&place.to_string_lossy());
            unmounter.delete(&format!("{MOUNTS}?mountpoint={place}")).map(|_| ())
        }),
        reach: Box::new(reach),
        starts: Starts::new(Box::new(move |news| teller.put(STARTS, news).map(drop))),
        say: Box::new(|text| output::complain(&format!("sluice: {text}"))),
        domain: domain.to_owned(),
    }
}

/// Asks the registry of an image for the first byte of its first blob.
fn reach(entry: &Value) -> Result<()> {
    let entry = &entry["config"];
    let backend = Backend::parse("registry", &entry["backend_config"])?;
    let file = Path::new(entry["metadata_path"].as_str().unwrap_or_default());
    let bytes = std::fs::read(file)
        .map_err(|error| Error::io(&error, format!("cannot read {}", file.display())))?;
    match Bootstrap::parse(bytes)?.blobs().first() {
        Some(blob) => {
            let reader = super::blobs::Blobs::Registry(Box::new(backend)).reader()?;
            reader.read(blob.id.as_str(), 0..1).map(|_| ())
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_docker_allows() {
        for name in ["sluice", config::DOCKER_NAME_DEFAULT, "a/b/c:latest"] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", "/a", "a//b", "../a", "a/.b", "a b", &"x".repeat(300)] {
            assert!(check_name(name).is_err(), "{name}");
        }
    }

    #[test]
    fn settings_may_be_absent_only_where_nobody_named_them() {
        assert!(settings(Path::new("/nonexistent/docker.json")).is_err());
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), r#"{"repositories":{"h/r":{"start":"fail"}}}"#)
            .expect("written");
        assert_eq!(settings(file.path()).expect("settings").repositories.len(), 1);
        std::fs::write(file.path(), r#"{"repositories":{"h/r":{"start":"never"}}}"#)
            .expect("written");
        let error = settings(file.path()).expect_err("refused");
        assert!(error.to_string().contains("never"), "{error}");
    }
}
