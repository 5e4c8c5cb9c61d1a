//! SIGNATURES ONLY, for the rooms that call us; the bodies land when src/engine does (not yet in mod.rs).

/// One per core. `!Send`, cheap to share as `Rc<Client>`.
pub struct Client;

/// A data blob by its id: 64 hex digits, without `sha256:`.
pub struct BlobRef<'a> {
    pub id: &'a str,
}

/// What `get_small` asks for.
pub enum Target<'a> {
    /// A tag or `sha256:...` of the route's repository.
    Manifest(&'a str),
    /// A blob by 64 hex digits.
    Blob(&'a str),
}

pub struct Response {
    pub bytes: Vec<u8>,
    /// `sha256:...` of `bytes`, computed here.
    pub digest: String,
    pub media_type: String,
}

// impl Shared {                                            // src/registry/route.rs, Send + Sync, one per process
//     pub fn new() -> Arc<Shared>;
//     pub fn route(&self, backend: &Backend) -> Result<Arc<Route>>;   // interned; no I/O
// }
//
// impl Client {
//     pub fn new(shared: Arc<Shared>) -> Rc<Client>;
//     /// Starts reading `range` of the blob's compressed bytes: retries, mirrors, proxy, tokens, redirects are inside.
//     /// Returns when the response head is known to be right (206, exact range).
//     pub async fn open(&self, core: &Core, route: &Arc<Route>, blob: BlobRef<'_>, range: Range<u64>,
//                       deadline_ns: u64, lane: Lane) -> Result<Body>;
//     pub async fn blob_size(&self, core, route, blob, deadline_ns, lane) -> Result<u64>;
//     pub async fn get_small(&self, core, route, target: Target<'_>, accept: &str, limit_bytes: usize,
//                            deadline_ns: u64, lane) -> Result<Response>;      // sha256 checked
//     /// Token, redirect and two warm connections, before the first fault. An image is usable when this fails.
//     pub async fn prepare(&self, core, route, blob: Option<BlobRef<'_>>, deadline_ns) -> Result<()>;
//     /// Never returns before close(): idle connections out, tokens renewed early, mirrors pinged. Spawn it
//     /// once per core in Lane::Background.
//     pub async fn maintain(&self, core: &Core);
//     pub fn close(&self);                                 // at shutdown: idle connections closed, maintain returns
// }
//
// impl Body {                                              // not Clone; owns its connection and one Wire lease
//     /// Reads at least one and at most range.len() bytes into lease[range.start..]; 0 only when remaining() == 0
//     /// or range is empty. After an Err the body is dead (drop it, open again for what is missing).
//     pub async fn read_into(&mut self, core: &Core, lease: Lease, range: Range<usize>) -> (Lease, Result<usize>);
//     pub fn remaining(&self) -> u64;
//     pub fn finish(self);                                 // exact end reached: connection back to the pool; else closes
// }
