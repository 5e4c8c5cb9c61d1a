//! `sluice stat`: the daemon's counters and latencies, as tables or as the JSON it answered.
//!
//! Knows the form of a figure, not its name: an object with a `p50` is a latency, a number is a
//! counter. So a newer daemon's figures are shown by an older command.

use clap::Args;
use serde_json::{Map, Value, json};

use super::output::{self, Output};
use super::{Daemon, Verdict};
use crate::error::Result;

/// Where the daemon answers with its statistics.
const PATH: &str = "/api/sluice/v1/stat";
/// Where in the answer the steps of reads and fetches are.
const STEPS: &str = "steps";

/// The options of `sluice stat`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
    sluice stat\n  \
    sluice stat --latency\n  \
    watch -n1 sluice stat\n  \
    sluice stat --json | jq .")]
pub struct Options {
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Show where the time of reads and fetches went, step by step, and nothing else.
    #[arg(long)]
    latency: bool,
    /// Leave out counters that are 0.
    #[arg(long)]
    nonzero: bool,
    #[command(flatten)]
    daemon: Daemon,
}

/// Asks and prints.
pub fn run(options: &Options, out: &mut Output) -> Result<Verdict> {
    let mut answer = options.daemon.api().fetch(PATH)?;
    let steps = answer.as_object_mut().and_then(|fields| fields.remove(STEPS));
    if options.latency {
        answer = json!({ STEPS: steps.unwrap_or(Value::Null) });
    } else if let (true, Some(steps)) = (options.json, steps) {
        answer[STEPS] = steps;
    }
    if options.json {
        out.json(&answer)?;
        return Ok(Verdict::Good);
    }
    let mut figures = Figures::default();
    figures.collect("", &answer);
    if options.nonzero {
        figures.counters.retain(|(_, count)| count != "0");
    }
    figures.print(out)?;
    Ok(Verdict::Good)
}

/// What is shown, in the daemon's order.
#[derive(Debug, Default, PartialEq, Eq)]
struct Figures {
    counters: Vec<(String, String)>,
    latencies: Vec<Vec<String>>,
}

impl Figures {
    fn collect(&mut self, name: &str, value: &Value) {
        match value {
            Value::Object(fields) => match latency(name, fields) {
                Some(row) => self.latencies.push(row),
                None => {
                    fields.iter().for_each(|(key, value)| self.collect(&join(name, key), value))
                }
            },
            Value::Array(items) => {
                for (index, item) in items.iter().enumerate() {
                    let key = ["id", "name", "blob", "core", "host"]
                        .iter()
                        .find_map(|key| item.get(key))
                        .map_or_else(|| index.to_string(), plain);
                    self.collect(&join(name, &key), item);
                }
            }
            Value::Number(number) => self.counters.push((name.to_owned(), amount(name, number))),
            Value::String(_) | Value::Bool(_) => {
                self.counters.push((name.to_owned(), plain(value)));
            }
            Value::Null => {}
        }
    }

    fn print(&self, out: &mut Output) -> Result<()> {
        let row = |cells: &[&str]| cells.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>();
        if !self.latencies.is_empty() {
            let mut rows = vec![row(&["LATENCY", "COUNT", "P50", "P99", "P99.9", "MAX"])];
            rows.extend(self.latencies.iter().cloned());
            out.table(&rows)?;
        }
        if !self.latencies.is_empty() && !self.counters.is_empty() {
            out.line("")?;
        }
        if !self.counters.is_empty() {
            let mut rows = vec![row(&["COUNTER", "VALUE"])];
            rows.extend(self.counters.iter().map(|(name, value)| row(&[name, value])));
            out.table(&rows)?;
        }
        Ok(())
    }
}

/// The groups the daemon sorts its figures into say nothing a table does not show.
fn join(name: &str, key: &str) -> String {
    match name {
        "" | "counters" | "latencies" | STEPS => key.to_owned(),
        _ => format!("{name}.{key}"),
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// Sizes read better with a unit; the exact number is in the JSON.
fn amount(name: &str, number: &serde_json::Number) -> String {
    match number.as_u64() {
        Some(count) if name.ends_with("bytes") || name.ends_with("_size") => output::bytes(count),
        Some(ns) if name.ends_with("_ns") => output::duration(ns),
        _ => number.to_string(),
    }
}

/// "p50_ns" and "p50_us" say their unit; without one it is nanoseconds.
fn latency(name: &str, fields: &Map<String, Value>) -> Option<Vec<String>> {
    let suffix = fields.keys().find_map(|key| key.strip_prefix("p50"))?;
    let scale = match suffix {
        "_us" => 1_000,
        "_ms" => 1_000_000,
        _ => 1,
    };
    let figure = |keys: &[&str]| {
        let found = keys.iter().find_map(|key| fields.get(&format!("{key}{suffix}")));
        found
            .and_then(Value::as_u64)
            .map_or("-".to_owned(), |value| output::duration(value.saturating_mul(scale)))
    };
    Some(vec![
        name.strip_suffix("_ns").unwrap_or(name).to_owned(),
        fields.get("count").map_or("-".to_owned(), plain),
        figure(&["p50"]),
        figure(&["p99"]),
        figure(&["p99_9", "p999", "p99.9"]),
        figure(&["max"]),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_and_counters_are_told_apart_by_their_form() {
        let mut figures = Figures::default();
        figures.collect(
            "",
            &json!({
                "upcalls": 7,
                "fetched_bytes": 2048,
                "fault": {
                    "count": 3, "p50_ns": 1500, "p99_ns": 2000, "p999_ns": 2500, "max_ns": 3000,
                },
                "images": [{"id": "demo", "errors": 0}],
                "nothing": null,
            }),
        );
        let latency = ["fault", "3", "1.5 us", "2.0 us", "2.5 us", "3.0 us"].map(str::to_owned);
        assert_eq!(figures.latencies, [latency.to_vec()]);
        let counters: Vec<_> =
            figures.counters.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        for expected in [
            ("upcalls", "7"),
            ("fetched_bytes", "2.0 KiB"),
            ("images.demo.errors", "0"),
            ("images.demo.id", "demo"),
        ] {
            assert!(counters.contains(&expected), "{expected:?} in {counters:?}");
        }
    }

    #[test]
    fn the_daemons_groups_are_not_repeated_in_every_name() {
        let mut figures = Figures::default();
        let read = json!({"count": 1, "p50": 900, "p99": 900, "p999": 900, "max": 900});
        figures.collect("", &json!({"counters": {"requests": 2}, "latencies": {"read_ns": read}}));
        assert_eq!(figures.counters, [("requests".to_owned(), "2".to_owned())]);
        assert_eq!(figures.latencies[0][..3], ["read", "1", "900 ns"].map(str::to_owned));
    }

    #[test]
    fn a_unit_in_the_key_is_honoured_and_a_gap_is_a_dash() {
        let fields = json!({"p50_us": 2, "p99_us": 3_000});
        let row = latency("x", fields.as_object().expect("an object")).expect("a latency");
        assert_eq!(row, ["x", "-", "2.0 us", "3.0 ms", "-", "-"]);
    }
}
