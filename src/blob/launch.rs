//! From chunks somebody wants to flights: claims what is absent and starts a flight for each run of
//! units that one GET serves well.
//!
//! Behind the cachefiles door a claim is on a chunk, so a run may leave present chunks out. Behind
//! the fanotify door a claim is on all that is absent of a segment, and one flight fetches it from
//! there to the segment's end, so that a segment has one filler who fills in order.

use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::cache::{Cache, Segments};
use super::crew::Crew;
use super::flight::Plan;
use super::latency::Cause;
use super::map::Map;
use super::open::OpenBlob;
use super::plan::Run;
use super::statistics::Counter;
use crate::engine::{CoreId, Lane};
use crate::error::{Error, Result};
use crate::image::identity::ChunkIndex;
use crate::image::layout::{Layout, Unit};

/// What all flights of one launch have in common.
struct Launch<'a> {
    blob: &'a Arc<OpenBlob>,
    layout: &'a Arc<Layout>,
    cause: Cause,
    deadline_ns: u64,
}

impl Crew {
    /// Claims what is absent among `chunks` and starts flights for it, a run of units each.
    ///
    /// # Errors
    /// `Busy` when all flight places are taken; what could not be started is released again.
    pub fn launch(
        self: &Rc<Self>,
        blob: &Arc<OpenBlob>,
        layout: &Arc<Layout>,
        chunks: Range<u32>,
        cause: Cause,
        deadline_ns: u64,
    ) -> Result<()> {
        if blob.is_closed.load(Ordering::Relaxed) || self.gate.is_closed() {
            return Err(Error::Shutdown);
        }
        let launch = Launch { blob, layout, cause, deadline_ns };
        match &blob.cache {
            Cache::Object { map, .. } => self.launch_chunks(&launch, map, chunks),
            Cache::Segments(segments) => self.launch_segments(&launch, segments, chunks),
        }
    }

    fn launch_chunks(
        self: &Rc<Self>,
        launch: &Launch<'_>,
        map: &Map,
        chunks: Range<u32>,
    ) -> Result<()> {
        let layout = launch.layout;
        let mut run: Option<Run> = None;
        let mut next = chunks.start;
        while next < chunks.end {
            let number = layout.chunk(ChunkIndex(next)).unit;
            if number == Layout::NO_UNIT {
                next += 1;
                continue;
            }
            let unit = layout.unit(number);
            if claim_unit(map, layout, &unit, self.id()) {
                let has_joined = run.as_mut().is_some_and(|run| run.extend(number, &unit));
                if !has_joined
                    && let Some(full) = run.replace(Run::of(number, &unit))
                    && let Err(error) = self.begin(launch, full)
                {
                    launch.blob.cache.release(unit.chunks, self.id());
                    return Err(error);
                }
            }
            next = unit.chunks.end.max(next + 1);
        }
        run.map_or(Ok(()), |run| self.begin(launch, run))
    }

    fn launch_segments(
        self: &Rc<Self>,
        launch: &Launch<'_>,
        segments: &Segments,
        chunks: Range<u32>,
    ) -> Result<()> {
        let mut run: Option<Run> = None;
        for place in segments.places(chunks) {
            let Some(claimed) = segments.claim(launch.layout, place, self.id()) else {
                // A run has only segments that are its own: another flight's may not lie between.
                run.take().map_or(Ok(()), |run| self.begin(launch, run))?;
                continue;
            };
            let next = Run::over(launch.layout, claimed.clone());
            let has_joined = run.as_mut().is_some_and(|run| run.join(&next));
            if !has_joined
                && let Some(full) = run.replace(next)
                && let Err(error) = self.begin(launch, full)
            {
                launch.blob.cache.release(claimed, self.id());
                return Err(error);
            }
        }
        run.map_or(Ok(()), |run| self.begin(launch, run))
    }

    fn begin(self: &Rc<Self>, launch: &Launch<'_>, run: Run) -> Result<()> {
        let &Launch { blob, layout, cause, deadline_ns } = launch;
        let (blob, layout) = (Arc::clone(blob), Arc::clone(layout));
        let planned_ns = self.core.now();
        let size = run.compressed.end - run.compressed.start;
        match cause {
            Cause::Demand => blob.route.pace.demanded(planned_ns),
            Cause::Prefetch => blob.prefetch_took_off(size),
            Cause::ReadAhead => {}
        }
        let plan = Plan { blob, layout, run, cause, planned_ns, deadline_ns };
        match self.flights.begin(plan) {
            Ok(id) => {
                let queue = match cause.lane() {
                    Lane::Demand => &self.demand,
                    Lane::Background => &self.ahead,
                };
                if cause == Cause::ReadAhead {
                    self.parts.counters.count(Counter::ReadAheadRequests);
                }
                queue.push(&self.core, id).expect("a queue has room for every flight place");
                Ok(())
            }
            Err(plan) => {
                if cause == Cause::Prefetch {
                    plan.blob.prefetch_landed(size, true);
                }
                plan.blob.cache.release(plan.run.chunks, self.id());
                Err(Error::Busy("all flight places are taken".into()))
            }
        }
    }
}

/// Claims the absent chunks of a unit; false when nothing of it was absent.
fn claim_unit(map: &Map, layout: &Layout, unit: &Unit, core: CoreId) -> bool {
    let mut has_claimed = false;
    for chunk in unit.chunks.clone().map(ChunkIndex) {
        if layout.chunk(chunk).digest.is_some() {
            has_claimed |= map.claim(chunk, core).is_ok();
        }
    }
    has_claimed
}
