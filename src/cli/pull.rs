//! `sluice pull`: an image into containerd, without its blobs.
//!
//! For clients that pass no labels, such as `ctr`; what pulls through CRI, nerdctl or Docker needs
//! no such help. Credentials are those of `~/.docker/config.json`.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use clap::Args;

use super::output::{self, Output};
use super::{Verdict, fetch};
use crate::config;
use crate::daemon::log;
use crate::error::Result;
use crate::plug::labels;
use crate::plug::pull::{self, Target};
use crate::registry::config::Backend;
use crate::registry::origin::Scheme;
use crate::registry::reference::Reference;

/// The options of `sluice pull`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice pull registry.example/team/app:1.0-nydus\n  \
    ctr run --rm --snapshotter nydus registry.example/team/app:1.0-nydus one\n  \
    sluice pull --namespace k8s.io registry.example/team/app:1.0-nydus\n\n\
    Needs `sluice snapshotter`, and containerd configured for it (tools/deploy).")]
pub struct Options {
    /// The image, HOST/REPO:TAG or HOST/REPO@DIGEST.
    #[arg(value_name = "IMAGE")]
    image: String,
    /// containerd's socket.
    #[arg(short, long, value_name = "PATH", default_value = config::CONTAINERD_SOCKET_DEFAULT)]
    address: PathBuf,
    /// containerd's namespace; Kubernetes uses k8s.io, Docker moby.
    #[arg(short, long, value_name = "NAME", default_value = "default")]
    namespace: String,
    /// What containerd calls the snapshotter.
    #[arg(long, value_name = "NAME", default_value = "nydus")]
    snapshotter: String,
    /// Talk to the registry without TLS; registries on this machine are talked to like that anyway.
    #[arg(long)]
    plain_http: bool,
}

/// Fetches and installs.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let reference = Reference::parse(&options.image)?;
    let is_plain = options.plain_http || labels::is_loopback(&reference.host);
    let scheme = if is_plain { Scheme::Http } else { Scheme::Https };
    let backend = Backend::registry(scheme, &reference.host, &reference.repo)?;
    let package = fetch::package(&backend, &reference)?;
    let expires = log::timestamp(SystemTime::now() + Duration::from_secs(config::PULL_LEASE_S));
    let target = Target {
        address: &options.address,
        namespace: &options.namespace,
        snapshotter: &options.snapshotter,
        expires: &expires,
    };
    let name = pull::install(target, &package)?;
    let (mut here, mut elsewhere) = (0, 0);
    for layer in &package.layers {
        *if layer.bytes.is_some() { &mut here } else { &mut elsewhere } += layer.size;
    }
    let (here, elsewhere) = (output::bytes(here), output::bytes(elsewhere));
    out.line(format!("pulled {name}: {here} fetched, {elsewhere} left in the registry"))?;
    Ok(Verdict::Good)
}
