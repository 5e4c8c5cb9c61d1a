//! containerd's snapshots service over gRPC, one socket for each name a client knows us by.
//!
//! Translates: a path to a call, a message to its arguments, an error to a status. Each name has a
//! root of its own, because containerd removes every snapshot that it does not know of under that
//! name (`garbageCollect`, metadata/snapshot.go): two names, or two containerds, on one root would
//! destroy each other's containers. Runs on one thread of its own executor, away from any core.

use std::convert::Infallible;
use std::future::Future;
use std::os::unix::net::UnixListener;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio_stream::wrappers::UnixListenerStream;
use tonic::body::Body;
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;
use tower::service_fn;

use super::containerd_messages::{
    CommitSnapshotRequest, CreateSnapshotRequest, Empty, ListSnapshotsRequest,
    ListSnapshotsResponse, MountsResponse, SnapshotInfoResponse, SnapshotRequest,
    UpdateSnapshotRequest, UsageResponse,
};
use super::snapshot_records::Kind;
use super::snapshot_store::Store;
use crate::config::{
    SNAPSHOT_CALLS_AT_ONCE, SNAPSHOT_LIST_PART, SNAPSHOT_STOP_WAIT_MS, SNAPSHOT_THREADS,
};
use crate::error::{Error, Result};

/// Where containerd calls.
const SERVICE: &str = "/containerd.services.snapshots.v1.Snapshots/";

/// The service of one root.
#[derive(Clone)]
struct Snapshotter {
    store: Arc<Store>,
}

/// Serves until a signal ends the process's work, or a listener breaks. What is under way then is
/// finished for as long as [`SNAPSHOT_STOP_WAIT_MS`]; mounts stay, containers use them.
pub fn serve(services: Vec<(UnixListener, Arc<Store>)>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(SNAPSHOT_THREADS)
        .build()
        .map_err(|error| Error::io(&error, "cannot start the executor"))?;
    let served = runtime.block_on(serve_all(services));
    runtime.shutdown_timeout(Duration::from_millis(SNAPSHOT_STOP_WAIT_MS));
    served
}

async fn serve_all(services: Vec<(UnixListener, Arc<Store>)>) -> Result<()> {
    let (stop, _) = tokio::sync::watch::channel(false);
    let mut servers = tokio::task::JoinSet::new();
    for (listener, store) in services {
        let failed = |error: std::io::Error| Error::io(&error, "cannot listen");
        listener.set_nonblocking(true).map_err(failed)?;
        let incoming = tokio::net::UnixListener::from_std(listener).map_err(failed)?;
        let mut stopped = stop.subscribe();
        servers.spawn(async move {
            let stopped = async move { drop(stopped.wait_for(|stop| *stop).await) };
            tonic::transport::Server::builder()
                .concurrency_limit_per_connection(SNAPSHOT_CALLS_AT_ONCE)
                .serve_with_incoming_shutdown(
                    Snapshotter { store },
                    UnixListenerStream::new(incoming),
                    stopped,
                )
                .await
        });
    }
    signalled().await?;
    // The other end is gone only when all servers are.
    let _ = stop.send(true);
    let all = async { while servers.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(Duration::from_millis(SNAPSHOT_STOP_WAIT_MS), all).await;
    Ok(())
}

async fn signalled() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let listen =
        |kind| signal(kind).map_err(|error| Error::io(&error, "cannot listen for signals"));
    let (mut terminate, mut interrupt) =
        (listen(SignalKind::terminate())?, listen(SignalKind::interrupt())?);
    tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

impl tower::Service<http::Request<Body>> for Snapshotter {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future =
        Pin<Box<dyn Future<Output = std::result::Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let store = Arc::clone(&self.store);
        Box::pin(async move { Ok(dispatch(store, request).await) })
    }
}

async fn dispatch(store: Arc<Store>, request: http::Request<Body>) -> http::Response<Body> {
    let method = request.uri().path().strip_prefix(SERVICE).unwrap_or_default().to_owned();
    match method.as_str() {
        "Prepare" => unary(request, |it| create(store, Kind::Active, it)).await,
        "View" => unary(request, |it| create(store, Kind::View, it)).await,
        "Mounts" => {
            let mounts = |it: SnapshotRequest| async move {
                store.mounts(it.key).await.map(|mounts| MountsResponse { mounts })
            };
            unary(request, mounts).await
        }
        "Commit" => {
            let commit = |it: CommitSnapshotRequest| async move {
                let labels = it.labels.into_iter().collect();
                store.commit(it.name, it.key, labels).await.map(|()| Empty {})
            };
            unary(request, commit).await
        }
        "Remove" => {
            let remove =
                |it: SnapshotRequest| async move { store.remove(it.key).await.map(|()| Empty {}) };
            unary(request, remove).await
        }
        "Stat" => {
            let stat = |it: SnapshotRequest| async move {
                store.stat(it.key).await.map(|info| SnapshotInfoResponse { info: Some(info) })
            };
            unary(request, stat).await
        }
        "Update" => unary(request, |it| update(store, it)).await,
        "List" => list(store, request).await,
        "Usage" => unary(request, |it| usage(store, it)).await,
        "Cleanup" => {
            let cleanup =
                |_: SnapshotRequest| async move { store.cleanup().await.map(|()| Empty {}) };
            unary(request, cleanup).await
        }
        _ => Status::unimplemented(format!("{} is not served here", request.uri().path()))
            .into_http(),
    }
}

async fn create(
    store: Arc<Store>,
    kind: Kind,
    it: CreateSnapshotRequest,
) -> Result<MountsResponse> {
    let labels = it.labels.into_iter().collect();
    let mounts = store.create(kind, it.key, it.parent, labels).await?;
    Ok(MountsResponse { mounts })
}

async fn update(store: Arc<Store>, it: UpdateSnapshotRequest) -> Result<SnapshotInfoResponse> {
    let info = it.info.ok_or_else(|| Error::Malformed("no snapshot is named".to_owned()))?;
    let paths = it.update_mask.unwrap_or_default().paths;
    let info = store.update(info, paths).await?;
    Ok(SnapshotInfoResponse { info: Some(info) })
}

async fn usage(store: Arc<Store>, it: SnapshotRequest) -> Result<UsageResponse> {
    let usage = store.usage(it.key).await?;
    let number = |count: u64| i64::try_from(count).unwrap_or(i64::MAX);
    Ok(UsageResponse { size: number(usage.bytes), inodes: number(usage.inodes) })
}

async fn list(store: Arc<Store>, request: http::Request<Body>) -> http::Response<Body> {
    let call = service_fn(move |request: Request<ListSnapshotsRequest>| {
        let store = Arc::clone(&store);
        async move {
            let found = store.list(request.into_inner().filters).await.map_err(status)?;
            let parts: Vec<std::result::Result<ListSnapshotsResponse, Status>> = found
                .chunks(SNAPSHOT_LIST_PART)
                .map(|part| Ok(ListSnapshotsResponse { info: part.to_vec() }))
                .collect();
            Ok::<_, Status>(Response::new(tokio_stream::iter(parts)))
        }
    });
    let codec = ProstCodec::<ListSnapshotsResponse, ListSnapshotsRequest>::default();
    tonic::server::Grpc::new(codec).server_streaming(call, request).await
}

/// One message in, one message out. The work goes on when the client hangs up: half of a change to
/// a snapshot would be worse than one that nobody asked for any more.
async fn unary<Q, A, F>(
    request: http::Request<Body>,
    call: impl FnOnce(Q) -> F + Send + 'static,
) -> http::Response<Body>
where
    Q: prost::Message + Default + 'static,
    A: prost::Message + Default + 'static,
    F: Future<Output = Result<A>> + Send + 'static,
{
    let mut call = Some(call);
    let service = service_fn(move |request: Request<Q>| {
        let work = call.take().map(|call| tokio::spawn(call(request.into_inner())));
        async move {
            let Some(work) = work else { return Err(Status::internal("called twice")) };
            let done = work.await.map_err(|_| Status::internal("the call broke off"))?;
            done.map(Response::new).map_err(status)
        }
    });
    tonic::server::Grpc::new(ProstCodec::<A, Q>::default()).unary(service, request).await
}

/// containerd acts on these: NOT_FOUND and ALREADY_EXISTS above all.
fn status(error: Error) -> Status {
    let code = match &error {
        Error::Malformed(_) => Code::InvalidArgument,
        Error::NotFound(_) => Code::NotFound,
        Error::Exists(_) => Code::AlreadyExists,
        Error::Busy(_) => Code::FailedPrecondition,
        Error::Unsupported(_) => Code::Unimplemented,
        Error::Denied(_) => Code::PermissionDenied,
        Error::Unavailable { .. } | Error::Shutdown => Code::Unavailable,
        Error::Deadline(_) => Code::DeadlineExceeded,
        Error::Digest(_) => Code::DataLoss,
        Error::System { .. } => Code::Internal,
    };
    Status::new(code, error.to_string())
}
