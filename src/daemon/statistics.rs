//! Gathers what the cores count and measure, and shows it: in our words and in nydus's.
//!
//! Asking a core is a message to its mailbox; a core that does not answer in time is left out and
//! said to be silent. Showing statistics never stops anybody from serving.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

use super::api::Starts;
use super::reply;
use crate::blob::latency::{Cause, DoorKind, Step};
use crate::blob::registration::Image;
use crate::blob::statistics::{CoreStatistics, Counter, Counters, SnapshotRequest, Stage};
use crate::config::STATISTICS_WAIT_MS;

/// Puts a request into one core's mailbox; false when that is full or the core is gone.
pub type AskCore = Box<dyn Fn(SnapshotRequest) -> bool + Send + Sync>;

/// Everything that is counted in this process.
pub struct Statistics {
    counters: Arc<Counters>,
    cores: Vec<AskCore>,
}

/// What all cores together measured.
#[derive(Debug)]
pub struct Gathered {
    /// The sum.
    pub measured: CoreStatistics,
    /// Cores that are in it.
    pub cores_heard: usize,
    /// Cores that are not.
    pub cores_silent: usize,
}

impl Statistics {
    /// Statistics of `counters` and of the cores behind `cores`.
    pub fn new(counters: Arc<Counters>, cores: Vec<AskCore>) -> Self {
        Self { counters, cores }
    }

    /// The counters.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    /// Counts what container services say of images.
    pub fn count_starts(&self, starts: Starts) {
        let counters = self.counters.of_core(0);
        for (counter, amount) in [
            (Counter::StartsLazy, starts.lazy),
            (Counter::StartsWaited, starts.waited),
            (Counter::StartsFull, starts.full),
            (Counter::StartsFailed, starts.failed),
        ] {
            counters.add(counter, amount.into());
        }
    }

    /// Asks every core, waits at most [`STATISTICS_WAIT_MS`] for all of them together.
    pub fn gather(&self) -> Gathered {
        let (reply, answers) = crossbeam_channel::bounded(self.cores.len());
        let asked = self.cores.iter().filter(|ask| ask(SnapshotRequest::new(reply.clone())));
        let asked = asked.count();
        drop(reply);
        let deadline = Instant::now() + Duration::from_millis(STATISTICS_WAIT_MS);
        let mut measured = CoreStatistics::default();
        let mut cores_heard = 0;
        while cores_heard < asked {
            let Ok(answer) = answers.recv_deadline(deadline) else { break };
            measured.merge(&answer);
            cores_heard += 1;
        }
        Gathered { measured, cores_heard, cores_silent: self.cores.len() - cores_heard }
    }

    /// All of it, for `sluice stat`.
    pub fn document(&self, gathered: &Gathered) -> Value {
        let counters: Map<_, _> = Counter::ALL
            .iter()
            .map(|&counter| (counter.name().to_owned(), self.counters.total(counter).into()))
            .collect();
        let latencies: Map<_, _> = Stage::ALL
            .iter()
            .map(|&stage| (stage.name().to_owned(), quantiles(gathered.measured.stage(stage))))
            .collect();
        json!({
            "counters": counters,
            "latencies": latencies,
            "steps": steps(&gathered.measured),
            "cores": { "heard": gathered.cores_heard, "silent": gathered.cores_silent },
        })
    }

    /// nydus's backend metrics. None before the kernel opened anything, as in nydusd.
    pub fn backend(&self, images: &[Arc<Image>], id: Option<&str>) -> Option<Value> {
        self.check_id(images, id)?;
        let measured = self.gather().measured;
        let by_size = |row: &[u64; 8]| row.iter().sum::<u64>();
        // nydus files requests by latency class, then size class; ours stand the other way round.
        let transposed: Vec<Vec<u64>> = (0..8)
            .map(|latency| measured.requests.iter().map(|sizes| sizes[latency]).collect())
            .collect();
        let total_ns: u64 = measured.request_ns.iter().fold(0, |sum, ns| sum.saturating_add(*ns));
        let backend =
            images.first().map_or("registry", |image| reply::backend_type(&image.backend));
        Some(json!({
            "backend_type": backend,
            "read_count": self.counters.total(Counter::Requests),
            "read_errors": self.counters.total(Counter::RequestsFailed),
            "read_amount_total": self.counters.total(Counter::BytesFetched),
            "read_cumulative_latency_millis_total": total_ns / 1_000_000,
            "read_cumulative_latency_millis_dist": measured.request_ns.map(|ns| ns / 1_000_000),
            "read_count_block_size_dist":
                measured.requests.iter().map(by_size).collect::<Vec<_>>(),
            "read_latency_sizes_dist": transposed,
        }))
    }

    /// nydus's cache metrics. None before the kernel opened anything. The kernel answers hits
    /// itself, so those counters stay 0, as in nydusd's fscache mode.
    pub fn blobcache(&self, images: &[Arc<Image>], id: Option<&str>) -> Option<Value> {
        self.check_id(images, id)?;
        let first = images.first();
        let files = images.iter().flat_map(|image| &image.blobs);
        let files: Vec<&str> = files.map(|blob| blob.id.as_str()).collect();
        let total = |counter| self.counters.total(counter);
        Some(json!({
            "underlying_files": files,
            "store_path": first.map(|image| image.work_dir.to_string_lossy()),
            "partial_hits": 0,
            "whole_hits": 0,
            "total": total(Counter::UpcallsRead),
            "entries_count": total(Counter::ChunksFilled),
            "prefetch_data_amount": total(Counter::PrefetchBytes),
            "prefetch_requests_count": total(Counter::PrefetchRequests),
            "prefetch_workers": first.map_or(0, |image| image.prefetch.threads),
            "prefetch_unmerged_chunks": 0,
            "prefetch_cumulative_time_millis": 0,
            "prefetch_begin_time_secs": 0,
            "prefetch_begin_time_millis": 0,
            "prefetch_end_time_secs": 0,
            "prefetch_end_time_millis": 0,
            "buffered_backend_size": 0,
            "data_all_ready": false,
        }))
    }

    /// All images share one set of numbers. It answers to nydusd's "/", to every image's
    /// configuration id and id, and to no id at all.
    fn check_id(&self, images: &[Arc<Image>], id: Option<&str>) -> Option<()> {
        let opened = self.counters.total(Counter::UpcallsOpen) > 0;
        let known = id.is_none_or(|id| {
            id == "/" || images.iter().any(|image| image.config_id == id || image.id == id)
        });
        (opened && known).then_some(())
    }
}

impl std::fmt::Debug for Statistics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Statistics of {} cores", self.cores.len())
    }
}

/// Where the time of reads and fetches went; what never happened is left out.
fn steps(measured: &CoreStatistics) -> Vec<Value> {
    let of_one = |(door, cause, step, histogram): (DoorKind, Cause, Step, &Histogram<u64>)| {
        let mut row = quantiles(histogram);
        let name = format!("{}.{}.{}", door.name(), cause.name(), step.name());
        for (key, text) in [
            ("name", &*name),
            ("door", door.name()),
            ("cause", cause.name()),
            ("step", step.name()),
        ] {
            row[key] = text.into();
        }
        row
    };
    measured.latencies.all().map(of_one).collect()
}

fn quantiles(histogram: &Histogram<u64>) -> Value {
    json!({
        "count": histogram.len(),
        "p50": histogram.value_at_quantile(0.5),
        "p99": histogram.value_at_quantile(0.99),
        "p999": histogram.value_at_quantile(0.999),
        "max": histogram.max(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn core(reads: u64) -> AskCore {
        Box::new(move |request| {
            let mut core = CoreStatistics::default();
            (0..reads).for_each(|_| core.record(Stage::Read, 5_000_000));
            let (door, cause) = (DoorKind::Fanotify, Cause::ReadAhead);
            (0..reads).for_each(|_| core.latencies.record(door, cause, Step::Body, 7_000_000));
            core.record_request(4096, 30_000_000);
            request.answer(&core);
            true
        })
    }

    #[test]
    fn all_cores_are_merged() {
        let statistics = Statistics::new(Counters::new(2), vec![core(3), core(4)]);
        let document = statistics.document(&statistics.gather());
        assert_eq!(document["latencies"]["read_ns"]["count"], 7);
        assert_eq!(document["cores"], json!({"heard": 2, "silent": 0}));
        assert_eq!(document["steps"].as_array().map(Vec::len), Some(1));
        assert_eq!(document["steps"][0]["name"], "fanotify.read_ahead.body");
        assert_eq!(document["steps"][0]["count"], 7);
        assert_eq!(document["counters"]["retries"], 0);
    }

    #[test]
    fn a_core_that_is_gone_or_silent_is_left_out_and_said_so() {
        let gone: AskCore = Box::new(|_| false);
        let dropped: AskCore = Box::new(|request| {
            drop(request);
            true
        });
        let statistics = Statistics::new(Counters::new(3), vec![core(1), gone, dropped]);
        let gathered = statistics.gather();
        assert_eq!((gathered.cores_heard, gathered.cores_silent), (1, 2));
    }

    #[test]
    fn nydus_metrics_appear_with_the_first_open_and_transpose_the_classes() {
        let counters = Counters::new(1);
        let statistics = Statistics::new(counters.clone(), vec![core(0)]);
        assert_eq!(statistics.backend(&[], None), None);
        assert_eq!(statistics.blobcache(&[], None), None);
        counters.of_core(0).count(Counter::UpcallsOpen);
        let backend = statistics.backend(&[], Some("/")).unwrap();
        assert_eq!(backend["read_latency_sizes_dist"][2][2], 1);
        assert_eq!(backend["read_count_block_size_dist"][2], 1);
        assert_eq!(backend["read_cumulative_latency_millis_dist"][2], 30);
        assert_eq!(backend["read_cumulative_latency_millis_total"], 30);
        assert_eq!(statistics.backend(&[], Some("other")), None);
        assert!(statistics.blobcache(&[], None).unwrap()["underlying_files"].is_array());
    }
}
