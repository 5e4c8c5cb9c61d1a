//! What a run came to: one JSON document, and the same as text for people.
//!
//! Units stand in the keys. Latencies are those of [`crate::load`]; bytes fetched and requests come
//! from the origin's own counters, upcalls from the emulated kernel or the daemon, processor time
//! and memory from /proc.

use std::io;

use hdrhistogram::Histogram;
use serde_json::{Value, json};

use crate::daemon::Usage;
use crate::load::{Run, Touch};

/// The quantiles of a latency curve: ever closer to 1.
const CURVE: &[f64] = &[
    0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97,
    0.98, 0.985, 0.99, 0.992, 0.994, 0.995, 0.996, 0.997, 0.998, 0.999, 0.9995, 0.9999, 1.0,
];
const MIB: f64 = 1048576.0;

/// What surrounded a run, as far as it is known.
#[derive(Debug, Default)]
pub struct Surroundings {
    /// What the run is called.
    pub name: String,
    /// What was read, and how.
    pub settings: Value,
    /// Bytes of everything that could have been read.
    pub size_bytes: u64,
    /// The origin's counters.
    pub origin: Value,
    /// READs the kernel sent.
    pub upcalls: Option<u64>,
    /// Used by the daemon during the run; its memory at the end.
    pub usage: Option<Usage>,
    /// Bytes that were put into caches.
    pub filled_bytes: Option<u64>,
    /// Bytes of caches that were compared with the image.
    pub verified_bytes: Option<u64>,
    /// The OPENs of all objects together.
    pub opening_us: Option<u64>,
    /// The daemon's own figures.
    pub daemon: Value,
}

/// Makes the document.
pub fn document(run: &Run, about: Surroundings) -> Value {
    let asked = run.bytes;
    let seconds = run.elapsed.as_secs_f64();
    let fetched = about.origin["bytes"].as_u64();
    let processor_s = about.usage.map(|usage| usage.processor.as_secs_f64());
    let filled_mib = about.filled_bytes.map(|bytes| bytes as f64 / MIB).filter(|mib| *mib > 0.0);
    let per_mib = |seconds: Option<f64>| Some(seconds? * 1000.0 / filled_mib?);
    let samples: Vec<Value> = run
        .samples
        .iter()
        .map(|sample| {
            let operation = &sample.operation;
            let touch = match sample.touch {
                Touch::Hit => 0,
                Touch::Miss => 1,
                Touch::Refused => 2,
            };
            let (at, took) = (sample.at.as_micros() as u64, sample.took.as_micros() as u64);
            json!([at, took, operation.place, operation.length, touch])
        })
        .collect();
    json!({
        "name": about.name,
        "settings": about.settings,
        "size_bytes": about.size_bytes,
        "operations": run.all.len(),
        "misses": run.misses.len(),
        "refused": run.refused,
        "elapsed_s": seconds,
        "asked_bytes": asked,
        "mib_per_s": asked as f64 / MIB / seconds,
        "latency_us": latency(&run.all),
        "miss_latency_us": latency(&run.misses),
        "opening_us": about.opening_us,
        "first_read_us": run.samples.first().map(|sample| sample.took.as_micros() as u64),
        "origin": about.origin,
        "fetched_per_asked": fetched.map(|bytes| bytes as f64 / asked as f64),
        "filled_bytes": about.filled_bytes,
        "verified_bytes": about.verified_bytes,
        "upcalls": about.upcalls,
        "cpu_s": processor_s,
        "cpu_ms_per_mib_filled": per_mib(processor_s),
        "cpu_s_per_gib_asked": processor_s.map(|s| s / (asked as f64 / MIB / 1024.0)),
        "resident_peak_kib": about.usage.map(|usage| usage.resident_peak_kib),
        "resident_kib": about.usage.map(|usage| usage.resident_kib),
        "curve": curve(&run.misses),
        "samples": samples,
        "daemon": about.daemon,
    })
}

fn latency(histogram: &Histogram<u64>) -> Value {
    let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1000.0;
    json!({
        "p50": at(0.5), "p90": at(0.9), "p99": at(0.99), "p999": at(0.999),
        "max": histogram.max() as f64 / 1000.0,
    })
}

fn curve(histogram: &Histogram<u64>) -> Vec<(f64, f64)> {
    let point = |&q: &f64| (q, histogram.value_at_quantile(q) as f64 / 1000.0);
    CURVE.iter().map(point).collect()
}

/// The document for people.
pub fn print(document: &Value, out: &mut impl io::Write) -> io::Result<()> {
    let number = |key: &str| document[key].as_f64();
    writeln!(out, "{}", document["name"].as_str().unwrap_or("run"))?;
    writeln!(
        out,
        "  {} reads, {} misses, {} refused, {:.1} MiB in {:.3} s: {:.1} MiB/s",
        document["operations"],
        document["misses"],
        document["refused"],
        number("asked_bytes").unwrap_or(0.0) / MIB,
        number("elapsed_s").unwrap_or(0.0),
        number("mib_per_s").unwrap_or(0.0)
    )?;
    for (name, key) in [("all", "latency_us"), ("misses", "miss_latency_us")] {
        let value = |quantile: &str| document[key][quantile].as_f64().unwrap_or(0.0) / 1000.0;
        writeln!(
            out,
            "  {name:6} p50 {:.3} ms, p90 {:.3}, p99 {:.3}, p99.9 {:.3}, max {:.3}",
            value("p50"),
            value("p90"),
            value("p99"),
            value("p999"),
            value("max")
        )?;
    }
    let mut line = |name: &str, value: Option<f64>, unit: &str| match value {
        Some(value) => writeln!(out, "  {name}: {value:.3} {unit}"),
        None => Ok(()),
    };
    line("opening", number("opening_us").map(|us| us / 1000.0), "ms")?;
    line("first read", number("first_read_us").map(|us| us / 1000.0), "ms")?;
    line("requests", document["origin"]["requests"].as_f64(), "")?;
    line("fetched", document["origin"]["bytes"].as_f64().map(|bytes| bytes / MIB), "MiB")?;
    line("fetched per asked byte", number("fetched_per_asked"), "")?;
    line("verified by us afterwards", number("verified_bytes").map(|b| b / MIB), "MiB")?;
    line("upcalls", number("upcalls"), "")?;
    line("processor", number("cpu_s"), "s")?;
    line("processor per MiB filled", number("cpu_ms_per_mib_filled"), "ms")?;
    line("processor per GiB asked", number("cpu_s_per_gib_asked"), "s")?;
    line("resident at most", number("resident_peak_kib").map(|kib| kib / 1024.0), "MiB")
}
