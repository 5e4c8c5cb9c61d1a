//! The messages of containerd's gRPC services, as far as they are spoken here.
//!
//! Written by hand after `api/services/*/v1/*.proto` of containerd: a message is its numbers, and
//! there are few, so that no build needs protoc. Fields that nobody here reads are left out; prost
//! passes over them. Shapes and meanings are documented there.

use std::collections::HashMap;

use prost::Message;

/// google.protobuf.Empty.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Empty {}

/// google.protobuf.Timestamp.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Timestamp {
    /// Seconds since 1970.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// Nanoseconds of the second.
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

/// google.protobuf.FieldMask.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct FieldMask {
    /// Which fields are meant; none means all.
    #[prost(string, repeated, tag = "1")]
    pub paths: Vec<String>,
}

/// containerd.types.Mount: what mount(2) is to be told. (3 is `target`, which we never need.)
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Mount {
    /// The file system, or "bind".
    #[prost(string, tag = "1")]
    pub kind: String,
    /// A device or a directory.
    #[prost(string, tag = "2")]
    pub source: String,
    /// As in fstab, one each.
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

/// containerd.types.Descriptor.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Descriptor {
    /// What the content is.
    #[prost(string, tag = "1")]
    pub media_type: String,
    /// `sha256:` and 64 digits.
    #[prost(string, tag = "2")]
    pub digest: String,
    /// Its bytes.
    #[prost(int64, tag = "3")]
    pub size: i64,
}

// ---- containerd.services.snapshots.v1

/// PrepareSnapshotRequest and ViewSnapshotRequest.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct CreateSnapshotRequest {
    /// containerd's name of the snapshotter; empty when it calls the snapshotter itself.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// What the new snapshot is called.
    #[prost(string, tag = "2")]
    pub key: String,
    /// What it stands on.
    #[prost(string, tag = "3")]
    pub parent: String,
    /// What the client says of it.
    #[prost(map = "string, string", tag = "4")]
    pub labels: HashMap<String, String>,
}

/// PrepareSnapshotResponse, ViewSnapshotResponse and MountsResponse.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct MountsResponse {
    /// To be mounted one over the other.
    #[prost(message, repeated, tag = "1")]
    pub mounts: Vec<Mount>,
}

/// MountsRequest, RemoveSnapshotRequest, StatSnapshotRequest and UsageRequest.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SnapshotRequest {
    /// As above.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Which snapshot.
    #[prost(string, tag = "2")]
    pub key: String,
}

/// CommitSnapshotRequest.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct CommitSnapshotRequest {
    /// As above.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// What the layer will be called.
    #[prost(string, tag = "2")]
    pub name: String,
    /// The active snapshot.
    #[prost(string, tag = "3")]
    pub key: String,
    /// What the client says of the layer.
    #[prost(map = "string, string", tag = "4")]
    pub labels: HashMap<String, String>,
}

/// Info of a snapshot.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SnapshotInfo {
    /// Its key or name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What it stands on.
    #[prost(string, tag = "2")]
    pub parent: String,
    /// 1 view, 2 active, 3 committed.
    #[prost(int32, tag = "3")]
    pub kind: i32,
    /// When it was made.
    #[prost(message, optional, tag = "4")]
    pub created_at: Option<Timestamp>,
    /// When it was changed.
    #[prost(message, optional, tag = "5")]
    pub updated_at: Option<Timestamp>,
    /// What was said of it.
    #[prost(map = "string, string", tag = "6")]
    pub labels: HashMap<String, String>,
}

/// StatSnapshotResponse and UpdateSnapshotResponse.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct SnapshotInfoResponse {
    /// The snapshot.
    #[prost(message, optional, tag = "1")]
    pub info: Option<SnapshotInfo>,
}

/// UpdateSnapshotRequest.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct UpdateSnapshotRequest {
    /// As above.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Its name, and what is to be changed.
    #[prost(message, optional, tag = "2")]
    pub info: Option<SnapshotInfo>,
    /// What of it is meant.
    #[prost(message, optional, tag = "3")]
    pub update_mask: Option<FieldMask>,
}

/// ListSnapshotsRequest.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ListSnapshotsRequest {
    /// As above.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// One of them must match.
    #[prost(string, repeated, tag = "2")]
    pub filters: Vec<String>,
}

/// ListSnapshotsResponse: a part of the list.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ListSnapshotsResponse {
    /// Some of them.
    #[prost(message, repeated, tag = "1")]
    pub info: Vec<SnapshotInfo>,
}

/// UsageResponse.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct UsageResponse {
    /// Bytes.
    #[prost(int64, tag = "1")]
    pub size: i64,
    /// Names, hard links once.
    #[prost(int64, tag = "2")]
    pub inodes: i64,
}

// ---- containerd.services.content.v1

/// WriteContentRequest. Actions: 0 asks, 1 writes, 2 writes and commits.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WriteContentRequest {
    /// What to do.
    #[prost(int32, tag = "1")]
    pub action: i32,
    /// What the unfinished write is called.
    #[prost(string, tag = "2")]
    pub reference: String,
    /// How long it will be.
    #[prost(int64, tag = "3")]
    pub total: i64,
    /// What its digest will be.
    #[prost(string, tag = "4")]
    pub expected: String,
    /// Where the data goes.
    #[prost(int64, tag = "5")]
    pub offset: i64,
    /// The data.
    #[prost(bytes = "vec", tag = "6")]
    pub data: Vec<u8>,
    /// Labels, with a commit.
    #[prost(map = "string, string", tag = "7")]
    pub labels: HashMap<String, String>,
}

/// WriteContentResponse.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct WriteContentResponse {
    /// What was done.
    #[prost(int32, tag = "1")]
    pub action: i32,
    /// How much is there.
    #[prost(int64, tag = "4")]
    pub offset: i64,
}

/// Info of a piece of content.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ContentInfo {
    /// Which.
    #[prost(string, tag = "1")]
    pub digest: String,
    /// What is said of it.
    #[prost(map = "string, string", tag = "5")]
    pub labels: HashMap<String, String>,
}

/// UpdateRequest of content; its response is not read.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct UpdateContentRequest {
    /// Which, and the new values.
    #[prost(message, optional, tag = "1")]
    pub info: Option<ContentInfo>,
    /// What of it is meant.
    #[prost(message, optional, tag = "2")]
    pub update_mask: Option<FieldMask>,
}

// ---- containerd.services.images.v1

/// Image: a name for content.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Image {
    /// As `ctr images ls` shows it.
    #[prost(string, tag = "1")]
    pub name: String,
    /// What is said of it.
    #[prost(map = "string, string", tag = "2")]
    pub labels: HashMap<String, String>,
    /// A manifest or an index.
    #[prost(message, optional, tag = "3")]
    pub target: Option<Descriptor>,
}

/// CreateImageRequest, and UpdateImageRequest without a mask; the responses are not read.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ImageRequest {
    /// The image.
    #[prost(message, optional, tag = "1")]
    pub image: Option<Image>,
}

// ---- containerd.services.leases.v1

/// CreateRequest of a lease.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct CreateLeaseRequest {
    /// Its name.
    #[prost(string, tag = "1")]
    pub id: String,
    /// When it ends by itself is one of them.
    #[prost(map = "string, string", tag = "3")]
    pub labels: HashMap<String, String>,
}

/// DeleteRequest of a lease.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct DeleteLeaseRequest {
    /// Its name.
    #[prost(string, tag = "1")]
    pub id: String,
    /// Whether to collect garbage before answering.
    #[prost(bool, tag = "2")]
    pub sync: bool,
}

// ---- containerd.services.diff.v1

/// ApplyRequest: unpack a layer.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ApplyRequest {
    /// The layer, in the content store.
    #[prost(message, optional, tag = "1")]
    pub diff: Option<Descriptor>,
    /// Where to.
    #[prost(message, repeated, tag = "2")]
    pub mounts: Vec<Mount>,
}

/// ApplyResponse.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct ApplyResponse {
    /// What was unpacked, without its compression.
    #[prost(message, optional, tag = "1")]
    pub applied: Option<Descriptor>,
}
