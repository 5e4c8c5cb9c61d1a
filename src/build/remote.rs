//! A registry as threads see it: calls that wait, and layers that are read.
//!
//! A few threads with an engine each take what is asked in its order; so many layers or blobs are
//! on their way at once, and whoever stops reading stops one of them. They end when the last handle
//! is dropped.

use std::future::Future;
use std::io::Read;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};

use crossbeam_channel::{Receiver, Sender};

use crate::config as limits;
use crate::engine::{self, Core};
use crate::error::{Error, Result};
use crate::image::manifest::{self, Descriptor};
use crate::registry::client::{Client, Response};
use crate::registry::config::Backend;
use crate::registry::download::Whole;
use crate::registry::repository::Repository;
use crate::registry::route::{Route, Shared};

use super::layer_stream::LayerStream;

type Task = Pin<Box<dyn Future<Output = ()>>>;
type Job = Box<dyn FnOnce(Rc<Session>) -> Task + Send>;

/// One engine's side of a repository.
pub struct Session {
    core: Core,
    client: Rc<Client>,
    route: Arc<Route>,
    /// To write to.
    pub repository: Repository,
}

/// A repository of a registry.
#[derive(Clone)]
pub struct Remote {
    jobs: Sender<Job>,
    /// Why the engines ended, if they did.
    failure: Arc<Mutex<Option<Error>>>,
}

/// What was asked for and is not known yet.
pub struct Pending<T> {
    answer: Receiver<Result<T>>,
    failure: Arc<Mutex<Option<Error>>>,
}

impl<T> Pending<T> {
    /// Waits for it.
    pub fn wait(self) -> Result<T> {
        self.answer.recv().unwrap_or_else(|_| {
            let failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take();
            Err(failure.unwrap_or(Error::Shutdown))
        })
    }
}

impl Remote {
    /// Starts the threads. Blobs may be mounted from the repositories `sources`.
    pub fn open(backend: &Backend, sources: &[String]) -> Result<Remote> {
        let shared = Shared::new();
        let (jobs, queue) = crossbeam_channel::bounded::<Job>(limits::TRANSFERS_MAX);
        let failure = Arc::new(Mutex::new(None));
        for number in 0..limits::TRANSFERS_MAX {
            let (backend, sources) = (backend.clone(), sources.to_vec());
            let (queue, shared, failure) = (queue.clone(), shared.clone(), Arc::clone(&failure));
            let serve = move || {
                let served =
                    engine::block_on(move |core| serve(core, shared, backend, sources, queue));
                if let Err(error) | Ok(Err(error)) = served {
                    *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                }
            };
            std::thread::Builder::new()
                .name(format!("transfer-{number}"))
                .spawn(serve)
                .map_err(|error| Error::io(&error, "cannot start a thread for transfers"))?;
        }
        Ok(Remote { jobs, failure })
    }

    /// Has something done on one of the engines; waits only while all have enough to do.
    pub fn begin<T, F>(&self, work: impl FnOnce(Rc<Session>) -> F + Send + 'static) -> Pending<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + 'static,
    {
        let (sender, answer) = crossbeam_channel::bounded(1);
        let job: Job = Box::new(move |session| {
            Box::pin(async move {
                // Who asked may have given up.
                let _ = sender.send(work(session).await);
            })
        });
        // Without engines the job is dropped, which `wait` notices.
        let _ = self.jobs.send(job);
        Pending { answer, failure: Arc::clone(&self.failure) }
    }

    /// A manifest or index by tag or digest, and what it is.
    pub fn manifest(&self, name: &str) -> Result<Option<Response>> {
        let name = name.to_owned();
        let pending = self.begin(|session| async move {
            session.repository.manifest(&name, manifest::ACCEPT).await
        });
        pending.wait()
    }

    /// A small blob, whole.
    pub fn blob(&self, descriptor: &Descriptor, limit: usize) -> Result<Vec<u8>> {
        if descriptor.size > limit as u64 {
            return Err(Error::Unsupported(format!(
                "{} has {} bytes, more than the {limit} we take",
                descriptor.digest_text(),
                descriptor.size
            )));
        }
        let mut bytes = Vec::new();
        self.layer(descriptor).read_to_end(&mut bytes).map_err(|error| {
            let own = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()).cloned();
            own.unwrap_or_else(|| Error::io(&error, descriptor.digest_text()))
        })?;
        Ok(bytes)
    }

    /// A blob as a stream that ends in an error if it is not what the descriptor says.
    pub fn layer(&self, descriptor: &Descriptor) -> LayerStream {
        let (pieces, incoming) = crossbeam_channel::bounded(limits::LAYER_PIECES_AHEAD);
        let (digest, size) = (descriptor.digest_text(), descriptor.size);
        let name = format!("layer {digest}");
        let end = pieces.clone();
        let pending = self.begin(move |session| async move {
            let whole = Whole { digest: &digest, size };
            let sink = |piece: &[u8]| {
                let gone = |_| Error::Shutdown;
                pieces.send(Ok(piece.to_vec())).map_err(gone)
            };
            let Session { core, client, route, .. } = &*session;
            let result = client.download(core, route, whole, sink).await;
            // The reader may have given up; an end without this word is an error.
            let _ = end.send(result.map(|()| Vec::new()));
            Ok(())
        });
        let stream = Pieces { incoming, pending: Some(pending), piece: Vec::new(), at: 0 };
        LayerStream::plain(stream, name)
    }
}

async fn serve(
    core: Core,
    shared: Arc<Shared>,
    backend: Backend,
    sources: Vec<String>,
    queue: Receiver<Job>,
) -> Result<()> {
    let route = shared.route(&backend)?;
    let client = Client::new(shared);
    let repository = Repository::open(&core, &client, &route, &sources)?;
    let session = Rc::new(Session { core, client: Rc::clone(&client), route, repository });
    // This blocks the engine's thread between jobs, which is all it has to do.
    while let Ok(job) = queue.recv() {
        job(Rc::clone(&session)).await;
    }
    client.close();
    Ok(())
}

/// The reading end of a download: pieces, then an empty one for a good end.
struct Pieces {
    incoming: Receiver<Result<Vec<u8>>>,
    pending: Option<Pending<()>>,
    piece: Vec<u8>,
    at: usize,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        if self.at == self.piece.len() && self.pending.is_some() {
            self.at = 0;
            self.piece = match self.incoming.recv() {
                Ok(Ok(piece)) => piece,
                Ok(Err(error)) => return Err(std::io::Error::other(error)),
                // The download is gone without a word: its engine has ended.
                Err(_) => {
                    let ended = self.pending.take().map_or(Ok(()), Pending::wait);
                    let error = ended.err().unwrap_or(Error::Shutdown);
                    return Err(std::io::Error::other(error));
                }
            };
            if self.piece.is_empty() {
                self.pending = None;
            }
        }
        let size = buffer.len().min(self.piece.len() - self.at);
        buffer[..size].copy_from_slice(&self.piece[self.at..self.at + size]);
        self.at += size;
        Ok(size)
    }
}
