//! What commands fetch from a registry: an image's bootstrap, ranges of blobs.
//!
//! Runs a private engine for as long as it takes. Everything below a tag is checked by digest,
//! except ranges, which their reader checks. Never writes anything.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};

use super::progress::Progress;
use crate::config;
use crate::engine::{self, Class, Core, Lane};
use crate::error::{Error, Result};
use crate::image::layer;
use crate::image::manifest::{self, Descriptor, Document, Manifest, Platform};
use crate::plug::pull::{Layer, Package, Piece};
use crate::registry::client::{BlobRef, Client, Response, Target};
use crate::registry::config::Backend;
use crate::registry::reference::Reference;
use crate::registry::route::{Route, Shared};

/// One range wanted of a blob.
pub struct Request {
    /// Which blob.
    pub blob_id: String,
    /// Which of its bytes.
    pub range: Range<u64>,
    /// Who wants to know.
    pub answer: Sender<Result<Vec<u8>>>,
}

/// The bootstrap of an image: manifest (through an index, for this machine's platform), bootstrap
/// layer, `image/image.boot` inside it.
///
/// # Errors
/// What the registry says; `Unsupported` for an image that cannot be loaded lazily.
pub fn bootstrap(backend: &Backend, reference: &Reference) -> Result<Vec<u8>> {
    let progress = Progress::waiting(format!("fetching the bootstrap of {reference}"));
    let (backend, wanted) = (backend.clone(), reference.clone());
    let fetched = engine::block_on(move |core| async move {
        let session = Session::open(core, &backend)?;
        let layer = session.bootstrap_layer(&wanted).await;
        session.client.close();
        layer
    });
    progress.finish();
    let layer = fetched?.map_err(|error| error.context(reference))?;
    layer::read_bootstrap(layer.as_slice()).map_err(|error| match error {
        Error::NotFound(_) => Error::Unsupported(format!(
            "{reference} has no {}: it is not a lazily loadable image; convert it to RAFS v6 first",
            layer::BOOTSTRAP_PATH
        )),
        error => error.context(reference),
    })
}

/// Everything of an image but its blobs: manifest (through an index, for this machine's platform),
/// configuration, and the layers that are no blobs.
///
/// # Errors
/// What the registry says; `Unsupported` for an image that cannot be loaded lazily.
pub fn package(backend: &Backend, reference: &Reference) -> Result<Package> {
    let progress = Progress::waiting(format!("fetching {reference} without its blobs"));
    let (backend, wanted) = (backend.clone(), reference.clone());
    let fetched = engine::block_on(move |core| async move {
        let session = Session::open(core, &backend)?;
        let package = session.package(&wanted).await;
        session.client.close();
        package
    });
    progress.finish();
    fetched?.map_err(|error| error.context(reference))
}

/// Answers requests until nobody can make any. Without an engine each gets the reason.
pub fn serve(backend: &Backend, requests: &Receiver<Request>) {
    let (backend, incoming) = (backend.clone(), requests.clone());
    let served = engine::block_on(move |core| async move {
        let session = Session::open(core, &backend)?;
        // This blocks the engine's thread between requests, which is all it has to do.
        while let Ok(Request { blob_id, range, answer }) = incoming.recv() {
            // The one who asked may have given up.
            let _ = answer.send(session.range(&blob_id, range).await);
        }
        session.client.close();
        Ok(())
    });
    if let Err(error) | Ok(Err(error)) = served {
        for request in requests {
            let _ = request.answer.send(Err(error.clone()));
        }
    }
}

/// A registry's repository as one engine talks to it.
struct Session {
    core: Core,
    client: Rc<Client>,
    route: Arc<Route>,
}

impl Session {
    fn open(core: Core, backend: &Backend) -> Result<Session> {
        let shared = Shared::new();
        let route = shared.route(backend)?;
        Ok(Session { core, client: Client::new(shared), route })
    }

    async fn bootstrap_layer(&self, reference: &Reference) -> Result<Vec<u8>> {
        let (manifest, _) = self.manifest(reference).await?;
        let layers = manifest.nydus_layers()?;
        let size = layers.bootstrap.size;
        if size > config::BOOTSTRAP_LAYER_MAX_BYTES as u64 {
            return Err(Error::Unsupported(match layers.is_marked {
                true => format!("a bootstrap layer of {size} bytes is more than we read"),
                false => {
                    "no layer is marked as a bootstrap: not a lazily loadable image".to_owned()
                }
            }));
        }
        self.blob(layers.bootstrap, config::BOOTSTRAP_LAYER_MAX_BYTES).await
    }

    async fn package(&self, reference: &Reference) -> Result<Package> {
        let (manifest, response) = self.manifest(reference).await?;
        let nydus = manifest.nydus_layers()?;
        if !nydus.is_marked {
            return Err(Error::Unsupported(
                "no layer is marked as a bootstrap: not a lazily loadable image; pull it with \
                 containerd's own client"
                    .to_owned(),
            ));
        }
        let limit = config::IMAGE_CONFIG_MAX_BYTES;
        let config = self.blob(&manifest.config, limit).await?;
        let mut layers = Vec::new();
        for layer in &manifest.layers {
            let bytes = match nydus.blobs.contains(&layer) {
                true => None,
                false => Some(self.blob(layer, config::BOOTSTRAP_LAYER_MAX_BYTES).await?),
            };
            layers.push(Layer {
                media_type: layer.media_type.clone(),
                digest: layer.digest_text(),
                size: layer.size,
                is_bootstrap: layer == nydus.bootstrap,
                bytes,
            });
        }
        let media_type = manifest.config.media_type.clone();
        let config = Piece { media_type, digest: manifest.config.digest_text(), bytes: config };
        let (media_type, digest) = (response.media_type, response.digest);
        let manifest = Piece { media_type, digest, bytes: response.bytes };
        Ok(Package { reference: reference.clone(), manifest, config, layers })
    }

    async fn manifest(&self, reference: &Reference) -> Result<(Manifest, Response)> {
        let response = self.document(reference.manifest()).await?;
        let index = match Document::parse(&response.bytes)? {
            Document::Manifest(manifest) => return Ok((manifest, response)),
            Document::Index(index) => index,
        };
        let response = self.document(&index.choose(&Platform::here())?.digest_text()).await?;
        match Document::parse(&response.bytes)? {
            Document::Manifest(manifest) => Ok((manifest, response)),
            Document::Index(_) => {
                Err(Error::Malformed("an index that leads to another index".to_owned()))
            }
        }
    }

    async fn document(&self, name: &str) -> Result<Response> {
        self.small(Target::Manifest(name), manifest::ACCEPT, config::MANIFEST_MAX_BYTES).await
    }

    /// A blob that is wanted whole, as long as its manifest says.
    async fn blob(&self, wanted: &Descriptor, limit: usize) -> Result<Vec<u8>> {
        let (size, id) = (wanted.size, wanted.blob_id()?);
        if size > limit as u64 {
            return Err(Error::Unsupported(format!("{id} has {size} bytes, {limit} at most")));
        }
        let response = self.small(Target::Blob(id.as_str()), "*/*", size as usize).await?;
        match response.bytes.len() as u64 == size {
            true => Ok(response.bytes),
            false => Err(Error::Malformed(format!("{id} is shorter than its manifest says"))),
        }
    }

    async fn small(&self, target: Target<'_>, accept: &str, limit: usize) -> Result<Response> {
        let deadline_ns = self.deadline_ns(limit as u64);
        let lane = Lane::Demand;
        let (core, route) = (&self.core, &self.route);
        self.client.fetch_small(core, route, target, accept, limit, deadline_ns, lane).await
    }

    async fn range(&self, blob_id: &str, range: Range<u64>) -> Result<Vec<u8>> {
        let deadline_ns = self.deadline_ns(range.end - range.start);
        let mut bytes = Vec::with_capacity((range.end - range.start) as usize);
        let blob = BlobRef { id: blob_id };
        let (core, route) = (&self.core, &self.route);
        let mut body =
            self.client.open(core, route, blob, range, deadline_ns, Lane::Demand).await?;
        let mut lease = core.lease(Class::Wire).await;
        while body.remaining() > 0 {
            let size = lease.len();
            let (back, count) = body.read_into(core, lease, 0..size).await;
            lease = back;
            bytes.extend_from_slice(&lease[..count?]);
        }
        body.finish();
        Ok(bytes)
    }

    /// Longer downloads get more time, down to a speed at which nobody would wait.
    fn deadline_ns(&self, bytes: u64) -> u64 {
        let transfer_ns = bytes.saturating_mul(config::SECOND_NS) / config::CLI_FETCH_SLOWEST_BYTES;
        self.core.now() + config::CLI_FETCH_DEADLINE_NS + transfer_ns
    }
}
