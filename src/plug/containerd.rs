//! A client of containerd: content, images, leases, snapshots, unpacking.
//!
//! One connection, one namespace; every call has a deadline. Errors keep containerd's meaning:
//! `NotFound` and `Exists` are what its own clients act on.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use tonic::metadata::MetadataValue;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::containerd_messages::{
    ApplyRequest, ApplyResponse, CommitSnapshotRequest, ContentInfo, CreateLeaseRequest,
    CreateSnapshotRequest, DeleteLeaseRequest, Descriptor, Empty, FieldMask, Image, ImageRequest,
    Mount, MountsResponse, SnapshotRequest, UpdateContentRequest, WriteContentRequest,
    WriteContentResponse,
};
use crate::config::{CONTAINERD_CALL_TIMEOUT_MS, CONTENT_PIECE_BYTES};
use crate::error::{Error, Result};

const COMMIT: i32 = 2;
const WRITE: i32 = 1;

/// Labels, as containerd takes them.
pub type Map = HashMap<String, String>;

/// containerd, as one namespace of it is seen.
pub struct Containerd {
    channel: Channel,
    namespace: MetadataValue<tonic::metadata::Ascii>,
    /// What is made is kept by this lease.
    lease: Option<MetadataValue<tonic::metadata::Ascii>>,
}

impl Containerd {
    /// Connects.
    pub async fn connect(address: &Path, namespace: &str) -> Result<Containerd> {
        let shown = address.display();
        let wrong = |error: &dyn std::fmt::Display| {
            Error::unavailable(format!("containerd at {shown}: {error}; is --address right?"))
        };
        let endpoint =
            Endpoint::from_shared(format!("unix://{shown}")).map_err(|error| wrong(&error))?;
        let deadline = Duration::from_millis(CONTAINERD_CALL_TIMEOUT_MS);
        let channel = endpoint.timeout(deadline).connect().await.map_err(|error| wrong(&error))?;
        let namespace = ascii(namespace)?;
        Ok(Containerd { channel, namespace, lease: None })
    }

    /// From here on garbage collection leaves alone what is made, until the lease is deleted or
    /// `expires` (RFC 3339) has come.
    pub async fn take_lease(&mut self, id: &str, expires: String) -> Result<()> {
        let labels = Map::from([("containerd.io/gc.expire".to_owned(), expires)]);
        let request = CreateLeaseRequest { id: id.to_owned(), labels };
        let _: Empty = self.call("leases.v1.Leases/Create", request).await?;
        self.lease = Some(ascii(id)?);
        Ok(())
    }

    /// Gives the lease back: what nothing else refers to is garbage now.
    pub async fn drop_lease(&mut self, id: &str) -> Result<()> {
        self.lease = None;
        let request = DeleteLeaseRequest { id: id.to_owned(), sync: false };
        self.call::<_, Empty>("leases.v1.Leases/Delete", request).await.map(drop)
    }

    /// Puts content into the store with these labels; content that is there only gets the labels.
    pub async fn write(&self, digest: &str, bytes: &[u8], labels: &Map) -> Result<()> {
        let total = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
        let mut offset = 0;
        let mut messages = Vec::new();
        for piece in bytes.chunks(CONTENT_PIECE_BYTES) {
            messages.push(WriteContentRequest {
                action: WRITE,
                reference: format!("sluice-pull-{}-{digest}", std::process::id()),
                total,
                expected: digest.to_owned(),
                offset,
                data: piece.to_vec(),
                labels: Map::new(),
            });
            offset += i64::try_from(piece.len()).unwrap_or(0);
        }
        // The last piece commits.
        if let Some(last) = messages.last_mut() {
            last.action = COMMIT;
            last.labels.clone_from(labels);
        }
        match self.stream("content.v1.Content/Write", messages).await {
            Err(Error::Exists(_)) => self.label(digest, labels).await,
            written => written,
        }
    }

    async fn label(&self, digest: &str, labels: &Map) -> Result<()> {
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let info = ContentInfo { digest: digest.to_owned(), labels: labels.clone() };
        let update_mask = Some(FieldMask { paths });
        let request = UpdateContentRequest { info: Some(info), update_mask };
        self.call::<_, Empty>("content.v1.Content/Update", request).await.map(drop)
    }

    /// Whether a snapshot is there.
    pub async fn has_snapshot(&self, snapshotter: &str, name: &str) -> Result<bool> {
        let (snapshotter, key) = (snapshotter.to_owned(), name.to_owned());
        let request = SnapshotRequest { snapshotter, key };
        match self.call::<_, Empty>("snapshots.v1.Snapshots/Stat", request).await {
            Ok(_) => Ok(true),
            Err(Error::NotFound(_)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Prepares a snapshot; `Exists` also when the snapshotter has the layer already.
    pub async fn prepare(&self, request: CreateSnapshotRequest) -> Result<Vec<Mount>> {
        let response: MountsResponse = self.call("snapshots.v1.Snapshots/Prepare", request).await?;
        Ok(response.mounts)
    }

    /// Commits a snapshot.
    pub async fn commit(&self, request: CommitSnapshotRequest) -> Result<()> {
        self.call::<_, Empty>("snapshots.v1.Snapshots/Commit", request).await.map(drop)
    }

    /// Removes a snapshot.
    pub async fn remove(&self, snapshotter: &str, key: &str) -> Result<()> {
        let (snapshotter, key) = (snapshotter.to_owned(), key.to_owned());
        let request = SnapshotRequest { snapshotter, key };
        self.call::<_, Empty>("snapshots.v1.Snapshots/Remove", request).await.map(drop)
    }

    /// Unpacks a layer of the content store; gives the digest of what it was unpacked from.
    pub async fn apply(&self, layer: Descriptor, mounts: Vec<Mount>) -> Result<String> {
        let request = ApplyRequest { diff: Some(layer), mounts };
        let response: ApplyResponse = self.call("diff.v1.Diff/Apply", request).await?;
        Ok(response.applied.unwrap_or_default().digest)
    }

    /// Gives an image its name, or the name another image.
    pub async fn name_image(&self, image: Image) -> Result<()> {
        let request = ImageRequest { image: Some(image) };
        match self.call::<_, Empty>("images.v1.Images/Create", request.clone()).await {
            Err(Error::Exists(_)) => {
                self.call::<_, Empty>("images.v1.Images/Update", request).await.map(drop)
            }
            named => named.map(drop),
        }
    }

    async fn call<Q, A>(&self, method: &str, message: Q) -> Result<A>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut grpc = self.grpc(method).await?;
        let codec = ProstCodec::<Q, A>::default();
        let answer = grpc.unary(self.request(message), path(method)?, codec).await;
        answer.map(tonic::Response::into_inner).map_err(|status| error(method, &status))
    }

    /// Sends all messages and reads answers until the one that says it is committed.
    async fn stream(&self, method: &str, messages: Vec<WriteContentRequest>) -> Result<()> {
        let mut grpc = self.grpc(method).await?;
        let codec = ProstCodec::<WriteContentRequest, WriteContentResponse>::default();
        let request = self.request(tokio_stream::iter(messages));
        let answers = grpc.streaming(request, path(method)?, codec).await;
        let mut answers = answers.map_err(|status| error(method, &status))?.into_inner();
        loop {
            match answers.message().await.map_err(|status| error(method, &status))? {
                Some(answer) if answer.action == COMMIT => return Ok(()),
                Some(_) => {}
                None => return Err(Error::unavailable(format!("{method}: broke off"))),
            }
        }
    }

    async fn grpc(&self, method: &str) -> Result<tonic::client::Grpc<Channel>> {
        let mut grpc = tonic::client::Grpc::new(self.channel.clone());
        let ready = grpc.ready().await;
        ready.map_err(|error| Error::unavailable(format!("{method}: {error}")))?;
        Ok(grpc)
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        request
    }
}

fn ascii(text: &str) -> Result<MetadataValue<tonic::metadata::Ascii>> {
    text.parse().map_err(|_| Error::Malformed(format!("{text:?} is no name for containerd")))
}

fn path(method: &str) -> Result<http::uri::PathAndQuery> {
    let path = http::uri::PathAndQuery::try_from(format!("/containerd.services.{method}"));
    path.map_err(|error| Error::Malformed(format!("{method}: {error}")))
}

fn error(method: &str, status: &Status) -> Error {
    let text = format!("containerd, {method}: {}", status.message());
    match status.code() {
        Code::NotFound => Error::NotFound(text),
        Code::AlreadyExists => Error::Exists(text),
        Code::InvalidArgument | Code::OutOfRange => Error::Malformed(text),
        Code::FailedPrecondition => Error::Busy(text),
        Code::Unimplemented => Error::Unsupported(text),
        Code::PermissionDenied | Code::Unauthenticated => Error::Denied(text),
        Code::DeadlineExceeded => Error::Deadline(text),
        _ => Error::unavailable(text),
    }
}
