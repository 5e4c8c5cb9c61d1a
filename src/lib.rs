//! sluice: containers start before their image has been downloaded.
//!
//! An image is an EROFS file system: a *bootstrap* (metadata) and *blobs* (one uncompressed
//! address space each). The kernel reads it natively and asks this daemon only for bytes that are
//! not on the node yet. This page is the architecture; each room's own page says more.
//!
//! # The rooms
//! ```text
//! cli -> daemon -> upcall -> blob -> { registry, store, image } -> engine
//! cli -> build -> { registry, image, tar } -> engine
//! cli -> plug -> { registry, image, tar }
//! config and error are leaves that all may use
//! ```
//! * [`engine`]: mechanism. One core is one thread, one io_uring, one loop; operations are data,
//!   buffers are leases, tasks are fixed crews. Knows nothing of the rest. A simulated driver
//!   behind the same enum runs several cores in one thread, in any order a seed can make.
//! * [`image`]: formats, pure. A [`image::layout::Layout`] is all the daemon keeps of a blob;
//!   [`image::segmentation`] and [`image::view`] are what the kernel sees of it behind the fanotify
//!   door.
//! * [`registry`]: where bytes come from: HTTP/1.1 by hand, TLS, tokens, mirrors; or a directory.
//! * [`store`]: where bytes go: cache objects and their ledger, segments and what is complete.
//! * [`blob`]: policy. Which bytes are here, who fetches the rest, in which order.
//! * [`upcall`]: who asks. Two doors: /dev/cachefiles, and fanotify's pre-content events.
//! * [`plug`]: what container engines plug in. Knows no daemon: [`cli`] hands it what it needs.
//! * [`daemon`]: wiring. Workers, the control API (nydusd's, and our own), mounts, statistics,
//!   space, and what outlives a daemon: registrations on disk, the keeper, the witness.
//! * [`build`]: making images: layers to blobs and a bootstrap, and from any place to any other.
//! * [`tar`]: the archives that layers are.
//! * [`cli`]: one file per command.
//!
//! Dependencies point one way, files stay short, and unsafe code lives in the few files that
//! `tests/tidy.rs` lists; it enforces all of this.
//!
//! # A fault, hop by hop
//! *Behind the cachefiles door* the kernel queues a READ; some core's poll fires;
//! `upcall/intake.rs` takes the message while a demand slot is free (the kernel queues the rest)
//! and hands it to the slot. *Behind the fanotify door* a read of a marked file that is not in the
//! page cache raises an event with an open file; `upcall/watch.rs` reads it, and if the file is
//! already as long as the read needs, it answers after one `fstat` and nothing more. Otherwise the
//! event goes to the core that owns the segment.
//!
//! From here both are one. `blob/serve.rs` claims the absent chunks of the range in `blob/map.rs`
//! (an atomic byte per chunk: one fetch per chunk, however many readers and cores) and starts a
//! *flight* for each run of units; or joins the flight that has them. A fetcher (`blob/fetch.rs`)
//! GETs the run, decodes and verifies what has arrived (`blob/workbench.rs`), fills the cache with
//! long page-aligned writes and publishes. The reader's own chunk goes first, where the cache lets
//! it, and its slot answers as soon as that is published; the rest goes on behind. Sequential
//! readers get a read-ahead that they have earned, in the background lane (`blob/schedule.rs`).
//!
//! # Two caches, one rule
//! What can be read was verified. Behind the cachefiles door the kernel keeps presence itself: a
//! hole is absent. Behind the fanotify door nothing in the kernel does, and a reader whose daemon
//! has died goes on unasked; so absence must be something that EROFS cannot read. A blob is cut
//! into *segments*, each a file that only ever grows, from its start, by verified bytes. Its size
//! is the presence map; beyond it is a short read, which EROFS makes EIO. When it is complete and
//! synced it is recorded, and its inode is ignored by the group: from then on the kernel is alone.
//! An image that is whole when it is mounted first is read past the page cache of its segments
//! (`upcall/direct.rs`).
//! After another boot, sizes without a record are not believed.
//!
//! # What keeps the promises
//! * *Never a wrong byte*: nothing is filled that did not match the bootstrap's digest, in every
//!   kind of chunk; a chunk no bootstrap lists is never filled. The kernel's cache outlives us, so
//!   a durable ledger ([`store::ledger`]) knows under which digests a cookie was filled; what it
//!   cannot vouch for is culled before the image is registered. A segment's name says which bytes
//!   may be in it.
//! * *Answered once, by a deadline*: the task that takes a message answers it, on every path; every
//!   operation has a deadline, which cancels it and awaits the cancelled completion.
//! * *Crash, restart and upgrade are one path* ([`daemon::lineage`]): what is registered is on disk
//!   before a client is told; a keeper, systemd or a supervisor holds the device and the group; the
//!   witness ([`daemon::witness`]) holds what was asked and not answered. A successor reads the
//!   registrations back and serves. Nothing is dumped: presence is read from the cache itself.
//! * *A failure is never permanent*: a failed flight releases its claims, a failed load is not
//!   remembered, and a present chunk that the kernel asks for again is looked for in the cache.
//! * *A reader waits for its own bytes only*: demand slots (`blob/seats.rs`) and fetchers
//!   (`blob/fetchers.rs`) are shared out by repository and by host, so dead registries leave room
//!   for healthy ones; large chunks are decoded on helper threads.
//! * *Everything is bounded*: the sums stand in [`config`]. A full disk costs the cache its least
//!   recently used bytes first ([`daemon::evictor`]), and one read an error at last.
//!
//! # Decisions that measurements made
//! * Data blobs are served from the bootstrap's own chunk table; blob.meta is fetched only for
//!   kinds whose bootstrap does not say where a chunk lies (ZRAN, BATCH). That saves a round trip
//!   at an image's first read.
//! * The bootstrap is filled whole at the first READ of its cookie: before the OPEN is answered the
//!   kernel has not attached the file and refuses writes (ENOBUFS). A full walk costs one upcall.
//!   Behind the fanotify door it is a file of ours, and costs none.
//! * A successor may be asked to open what it does not know, for readers that wait already. After
//!   an error it would be asked again, for ever (the kernel reopens an object for as long as reads
//!   of it wait), so such an object is opened and its reads are refused, for a second.
//! * How the cores share the device is chosen with `tools/intake`; the README has the table.
//! * Segments are at least 64 KiB and grow with the blob: a file costs an inode and a device slot
//!   (1.2 to 1.7 KB of kernel memory, and 65,535 of them seconds of mount time), a large segment
//!   costs its first reader the bytes in front.
//! * What a start needs is noted and fetched first at the next one (`blob/touches.rs`): python3 at
//!   20 ms from its registry is ready after 0.5 s instead of 2.7 s, with the same bytes. That each
//!   request of a first start brings more was tried on the journal of one, and is not done: 128
//!   KiB more forward saves a third of its requests and costs two thirds more bytes.
//! * A reader's answer that is late is given up and asked for once more (`registry/patience.rs`),
//!   rather than both awaited: it needs no second buffer and no select, and what is given up is
//!   what was late. Answers must have paid for it, so a slow registry is not asked twice.

#[macro_use]
pub mod error;

pub mod blob;
pub mod build;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod engine;
pub mod image;
pub mod plug;
pub mod registry;
pub mod store;
pub mod tar;
pub mod upcall;
