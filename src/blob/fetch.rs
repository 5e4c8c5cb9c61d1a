//! The story of one flight: GET, decode, verify, fill, publish, and what happens when a step fails.
//!
//! The first unit of a flight is filled and published alone, because somebody may wait for just
//! that; what has arrived by then goes in long writes. Bytes that fail their digest are asked for
//! again, a unit at a time; other units of the flight are not held up. Whatever happens, a flight
//! settles every chunk it claimed and wakes everybody.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use super::crew::Crew;
use super::flight::{FlightId, Plan};
use super::latency::{Cause, Step};
use super::open::OpenBlob;
use super::plan::{Run, extent};
use super::retry::Tries;
use super::statistics::Counter;
use super::workbench::{Batch, Job, Workbench};
use crate::config::{
    DECODE_INLINE_MAX_BYTES, DIGEST_TRIES, FILL_PAUSE_NS, FILL_TRIES, FILL_TRIES_AHEAD,
    PACE_REQUEST_MAX_BYTES, RANGE_LEASE_SIZE, ROOM_MIN_BYTES,
};
use crate::engine::offload::Errand;
use crate::engine::{Class, CoreId, Lane, Lease};
use crate::error::{Error, Result};
use crate::image::layout::Layout;
use crate::registry::body::Body;
use crate::registry::client::BlobRef;

/// One attempt at a row of units of a flight.
struct Attempt<'a> {
    id: FlightId,
    plan: &'a Plan,
    /// The first unit that has not been settled.
    next: u32,
    /// Behind the last unit.
    end: u32,
    /// Units whose bytes were wrong.
    failed: Vec<u32>,
    /// What ended the last GET is in the log: a chunk that was bad.
    is_logged: bool,
}

impl<'a> Attempt<'a> {
    fn new(id: FlightId, plan: &'a Plan, units: Range<u32>) -> Self {
        let (next, end) = (units.start, units.end);
        Attempt { id, plan, next, end, failed: Vec::new(), is_logged: false }
    }
}

/// The buffers of a body that is arriving.
pub(super) struct Landing {
    input: Lease,
    output: Lease,
    bench: Box<Workbench>,
}

/// A batch for a helper thread, with all that decoding it takes.
pub(super) struct LongBatch {
    landing: Landing,
    batch: Batch,
    layout: Arc<Layout>,
    blob: Arc<OpenBlob>,
    core: CoreId,
    chunks: Range<u32>,
    clock: fn() -> u64,
}

impl LongBatch {
    fn decode(self) -> Landing {
        let LongBatch { mut landing, batch, layout, blob, core, chunks, clock } = self;
        let Landing { input, output, bench } = &mut landing;
        let job = Job { layout: &layout, cache: &blob.cache, core, chunks, clock };
        bench.process(&job, &batch, input, output);
        landing
    }
}

impl Crew {
    /// A fetcher: takes flights of its lane, one at a time, for ever.
    pub(super) async fn fetch_for(self: &Rc<Self>, lane: Lane) {
        let queue = match lane {
            Lane::Demand => &self.demand,
            Lane::Background => &self.ahead,
        };
        loop {
            let id = queue.pop(&self.core, |&id| self.may_take(id, lane)).await;
            // One that was promoted flies as what it has become.
            let mut plan = self.flights.plan(id);
            let is_prefetch = plan.cause == Cause::Prefetch;
            if lane == Lane::Demand {
                plan.cause = Cause::Demand;
            }
            self.record_step(&plan.blob, plan.cause, Step::Queue, plan.planned_ns);
            self.fetchers.begin(id, &plan.blob.route, lane);
            let is_whole = self.fly(id, &plan).await;
            if is_prefetch {
                let range = &plan.run.compressed;
                plan.blob.prefetch_landed(range.end - range.start, is_whole);
            }
            self.fetchers.end(id);
        }
    }

    /// Whether a fetcher of the lane may take a flight that waits.
    pub(super) fn may_take(&self, id: FlightId, lane: Lane) -> bool {
        self.flights.matches(id, |plan| self.fetchers.have_room(&plan.blob.route, lane))
    }

    /// Says whether all of it came.
    async fn fly(self: &Rc<Self>, id: FlightId, plan: &Plan) -> bool {
        let _inside = self.gate.enter(&self.core);
        let units = plan.run.units.clone();
        let mut attempt = Attempt::new(id, plan, units);
        self.fetch_run(&mut attempt).await;
        let mut is_whole = attempt.next == attempt.end;
        let failed = std::mem::take(&mut attempt.failed);
        for unit in failed {
            is_whole &= self.fetch_again(id, plan, unit).await;
        }
        plan.blob.cache.release(plan.run.chunks.clone(), self.id());
        self.announce(id, plan);
        if plan.cause != Cause::Demand {
            self.record_step(&plan.blob, plan.cause, Step::Whole, plan.planned_ns);
        }
        self.flights.end(id);
        is_whole
    }

    /// Fetches one unit alone whose bytes were wrong the first time; says whether they came.
    async fn fetch_again(self: &Rc<Self>, id: FlightId, plan: &Plan, unit: u32) -> bool {
        for _ in 1..DIGEST_TRIES {
            let mut attempt = Attempt::new(id, plan, unit..unit + 1);
            self.parts.counters.count(Counter::Retries);
            self.fetch_run(&mut attempt).await;
            if attempt.failed.is_empty() {
                return attempt.next == attempt.end;
            }
        }
        false
    }

    /// Lands units until none is left; a body that breaks off is asked for again from there.
    async fn fetch_run(self: &Rc<Self>, attempt: &mut Attempt<'_>) {
        let Plan { blob, cause, deadline_ns, .. } = attempt.plan;
        let mut tries = Tries::new(blob, *cause, *deadline_ns).of_flight(attempt.id);
        while attempt.next < attempt.end {
            attempt.is_logged = false;
            let first = attempt.next;
            let Err(error) = self.land(attempt).await else { continue };
            if attempt.next > first {
                tries.progressed();
            }
            if self.try_again(&mut tries, &error).await {
                continue;
            }
            if !attempt.is_logged {
                let (name, Attempt { next, end, .. }) = (blob.name(), attempt);
                self.parts.journal.error(format!("{name}, units {next}..{end}: {error}"));
            }
            return;
        }
    }

    /// One GET: from the first unsettled unit to the end of the attempt.
    async fn land(self: &Rc<Self>, attempt: &mut Attempt<'_>) -> Result<()> {
        let Plan { blob, layout, cause, deadline_ns, .. } = attempt.plan;
        let lane = cause.lane();
        let run = Run::longest(layout, attempt.next..attempt.end);
        let range = run.compressed.clone();
        let size = (range.end - range.start) as usize;
        let began_ns = self.core.now();
        let blob_ref = BlobRef { id: blob.id().as_str() };
        let client = &self.parts.client;
        let mut body =
            client.open(&self.core, &blob.route, blob_ref, range, *deadline_ns, lane).await?;
        if let Some((connect_ns, first_byte_ns)) = body.waits_ns() {
            self.record_span(blob, *cause, Step::Connect, connect_ns);
            self.record_span(blob, *cause, Step::FirstByte, first_byte_ns);
        }
        if body.is_repeated() {
            self.parts.counters.count(Counter::RequestsRepeated);
        }

        let _landing = self.landings.acquire(&self.core).await;
        let is_large = size.max(run.output_size_max as usize) > RANGE_LEASE_SIZE;
        let _large = match is_large {
            true => Some(self.large_landings.acquire(&self.core).await),
            false => None,
        };
        let input = self.lease_of(lane, size).await?;
        let output = self.lease_of(lane, run.output_size_max as usize).await?;
        let bench = self.benches.borrow_mut().pop().unwrap_or_default();
        let mut landing = Landing { input, output, bench };
        let landed;
        (landing, landed) = self.receive(attempt, landing, &mut body, &run).await;
        self.benches.borrow_mut().push(landing.bench);
        landed?;
        body.finish();
        blob.route.proven();
        let elapsed_ns = self.core.now().saturating_sub(began_ns);
        self.statistics.borrow_mut().record_request(size as u64, elapsed_ns);
        Ok(())
    }

    /// Takes the body in and settles the units as they become whole.
    async fn receive(
        self: &Rc<Self>,
        attempt: &mut Attempt<'_>,
        mut landing: Landing,
        body: &mut Body,
        run: &Run,
    ) -> (Landing, Result<()>) {
        let layout = &attempt.plan.layout;
        let (start, size) = (run.compressed.start, run.compressed.end - run.compressed.start);
        let (mut landed, mut is_first, mut waited_ns) = (0, true, 0);
        while attempt.next < run.units.end {
            let needed = (extent(&layout.unit(attempt.next)).end - start) as usize;
            let began_ns = self.core.now();
            while landed < needed {
                let got;
                (landing.input, got) =
                    body.read_into(&self.core, landing.input, landed..size as usize).await;
                match got {
                    Ok(count) => {
                        landed += count;
                        self.parts.counters.add(Counter::BytesFetched, count as u64);
                    }
                    Err(error) => return (landing, Err(error)),
                }
            }
            waited_ns += self.core.now() - began_ns;
            let end = if is_first { attempt.next + 1 } else { run.units.end };
            is_first = false;
            let room = landing.output.len();
            let landed_end = start + landed as u64;
            let batch = Batch::longest(layout, attempt.next, end, start, landed_end, room);
            let settled;
            (landing, settled) = self.settle_batch(attempt, landing, batch).await;
            if !landing.bench.failures.is_empty() {
                body.blame(&self.core);
            }
            if let Err(error) = settled {
                return (landing, Err(error));
            }
        }
        let Plan { blob, cause, .. } = attempt.plan;
        self.record_span(blob, *cause, Step::Body, waited_ns);
        if *cause == Cause::Demand && size <= PACE_REQUEST_MAX_BYTES {
            let (connect_ns, first_byte_ns) = body.waits_ns().unwrap_or_default();
            blob.route.pace.measured(connect_ns + first_byte_ns + waited_ns);
        }
        (landing, Ok(()))
    }

    /// Decodes, verifies, fills and publishes units that have arrived.
    async fn settle_batch(
        self: &Rc<Self>,
        attempt: &mut Attempt<'_>,
        mut landing: Landing,
        batch: Batch,
    ) -> (Landing, Result<()>) {
        let Plan { blob, layout, cause, deadline_ns, .. } = attempt.plan;
        landing = self.decode(attempt.plan, landing, batch.clone()).await;
        self.record_span(blob, *cause, Step::Decode, landing.bench.decode_ns);
        self.record_span(blob, *cause, Step::Verify, landing.bench.verify_ns);
        self.report(attempt, &landing.bench);
        for place in 0..landing.bench.rows.len() {
            let row = landing.bench.rows[place].clone();
            let began_ns = self.core.now();
            let (start, mut filled) = (batch.output_start, Ok(()));
            let tries = match cause.lane() {
                Lane::Demand => FILL_TRIES,
                Lane::Background => FILL_TRIES_AHEAD,
            };
            for number in 1..=tries {
                (landing.output, filled) =
                    blob.cache.fill(&self.core, landing.output, &row, start, cause.lane()).await;
                let is_short = matches!(filled, Err(Error::System { errno: libc::ENOSPC, .. }));
                let is_over = self.core.now() >= *deadline_ns || self.gate.is_closed();
                if !is_short || is_over || number == tries {
                    break;
                }
                if number > 1 {
                    // Somebody was faster, or is still making room.
                    let _ = self.core.sleep(FILL_PAUSE_NS).await;
                }
                let (make_room, size) = (Arc::clone(&self.parts.make_room), row.bytes.len() as u64);
                if self.core.offload(move || make_room(size.max(ROOM_MIN_BYTES))).await < size {
                    break;
                }
            }
            if let Err(error) = filled {
                return (landing, Err(error));
            }
            self.record_step(blob, *cause, Step::Fill, began_ns);
            let size = row.bytes.len() as u64;
            self.parts.counters.add(Counter::BytesFilled, size);
            if *cause == Cause::Prefetch {
                self.parts.counters.add(Counter::PrefetchBytes, size);
            }
            let published = blob.cache.publish(layout, &row, self.id());
            self.parts.counters.add(Counter::ChunksFilled, u64::from(published));
            self.announce(attempt.id, attempt.plan);
        }
        let failure = landing.bench.failures.first().filter(|_| blob.cache.is_ordered());
        if let Some(failure) = failure.cloned() {
            // Nothing behind it may be filled before it: the GET is made again from there.
            attempt.next = failure.unit;
            attempt.is_logged = true;
            return (landing, Err(failure.error));
        }
        attempt.next = batch.units.end;
        debug_assert!(attempt.next <= layout.unit_count());
        (landing, Ok(()))
    }

    /// Small batches are decoded here, between two polls; long ones on a helper thread, so that no
    /// other reader of this core waits for them.
    async fn decode(self: &Rc<Self>, plan: &Plan, mut landing: Landing, batch: Batch) -> Landing {
        let first = plan.layout.unit(batch.units.start);
        let last = plan.layout.unit(batch.units.end - 1);
        let output_size =
            last.uncompressed_offset + u64::from(last.output_size) - first.uncompressed_offset;
        let (core, chunks) = (self.id(), plan.run.chunks.clone());
        let clock = self.core.clock();
        if output_size as usize <= DECODE_INLINE_MAX_BYTES {
            let Landing { input, output, bench } = &mut landing;
            let job = Job { layout: &plan.layout, cache: &plan.blob.cache, core, chunks, clock };
            bench.process(&job, &batch, input, output);
            return landing;
        }
        let errand = self.errands.borrow_mut().pop();
        let errand = errand.unwrap_or_else(|| Errand::new(&self.core, LongBatch::decode));
        let (layout, blob) = (Arc::clone(&plan.layout), Arc::clone(&plan.blob));
        landing = errand.run(LongBatch { landing, batch, layout, blob, core, chunks, clock }).await;
        self.errands.borrow_mut().push(errand);
        landing
    }

    /// Counts and logs what was wrong, and notes the units to ask for again.
    fn report(&self, attempt: &mut Attempt<'_>, bench: &Workbench) {
        for failure in &bench.failures {
            let counter = match failure.chunk {
                Some(_) => Counter::DigestFailures,
                None => Counter::BadChunks,
            };
            self.parts.counters.count(counter);
            self.parts.journal.error(format!("{}: {}", attempt.plan.blob.name(), failure.error));
            let is_asked_again = !attempt.plan.blob.cache.is_ordered();
            if is_asked_again && attempt.failed.last() != Some(&failure.unit) {
                attempt.failed.push(failure.unit);
            }
        }
    }

    async fn lease_of(&self, lane: Lane, size: usize) -> Result<Lease> {
        let class = Class::holding(size).ok_or_else(|| {
            Error::Unsupported(format!("a unit of {size} bytes is larger than any buffer"))
        })?;
        // Wire leases stay with the connections.
        let class = if class == Class::Wire { Class::Range } else { class };
        Ok(self.core.lease_for(lane, class).await)
    }
}
