//! An HTML page with plots of runs: latency curves, the timeline of each start, and which parts of
//! the image it touched when.
//!
//! One file, no scripts, nothing from elsewhere. Works on the JSON that runs write; what a run does
//! not know is left out.

use std::fmt::Write;
use std::io::{self, Error};
use std::path::{Path, PathBuf};

use serde_json::Value;

const COLOURS: &[&str] =
    &["#1b6ca8", "#c8553d", "#3a7d44", "#8d5a97", "#b8860b", "#444444", "#2a9d8f", "#d81159"];
const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 70.0;
const BOTTOM: f64 = 40.0;
const CELLS: usize = 400;
const CELLS_PER_ROW: usize = 100;
const STYLE: &str = "body{font:14px sans-serif;max-width:920px;margin:2em auto;color:#222}\
    table{border-collapse:collapse}td,th{padding:2px 10px;text-align:right;\
    border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}\
    svg{display:block;margin:1em 0}text{font:11px sans-serif;fill:#444}";

/// Reads runs and writes the page.
pub fn make(out: &Path, runs: &[PathBuf]) -> io::Result<()> {
    let read = |path: &PathBuf| -> io::Result<Value> {
        let text = std::fs::read(path)?;
        serde_json::from_slice(&text)
            .map_err(|error| Error::other(format!("{}: {error}", path.display())))
    };
    let runs = runs.iter().map(read).collect::<io::Result<Vec<_>>>()?;
    std::fs::write(out, page(&runs))
}

fn page(runs: &[Value]) -> String {
    let mut html = format!(
        "<!doctype html><meta charset=utf-8><title>coldstart</title><style>{STYLE}</style>\
         <h1>Cold start</h1>{}<h2>Latency of reads that had to fetch</h2>{}",
        table(runs),
        curves(runs)
    );
    for (run, colour) in runs.iter().zip(COLOURS.iter().cycle()) {
        let name = escaped(run["name"].as_str().unwrap_or("run"));
        let _ = write!(html, "<h2>{name}: timeline</h2>{}", timeline(run, colour));
        let _ = write!(
            html,
            "<h3>{name}: what was touched, early to late from dark to light</h3>{}",
            touched(run)
        );
    }
    html
}

/// A heading, the value under it, and its digits behind the point.
type Column = (&'static str, fn(&Value) -> Option<f64>, usize);

fn table(runs: &[Value]) -> String {
    let columns: [Column; 9] = [
        ("p50 ms", |run| Some(run["miss_latency_us"]["p50"].as_f64()? / 1000.0), 3),
        ("p99 ms", |run| Some(run["miss_latency_us"]["p99"].as_f64()? / 1000.0), 3),
        ("p99.9 ms", |run| Some(run["miss_latency_us"]["p999"].as_f64()? / 1000.0), 3),
        ("max ms", |run| Some(run["miss_latency_us"]["max"].as_f64()? / 1000.0), 3),
        ("MiB/s", |run| run["mib_per_s"].as_f64(), 1),
        ("requests", |run| run["origin"]["requests"].as_f64(), 0),
        ("fetched/asked", |run| run["fetched_per_asked"].as_f64(), 2),
        ("CPU ms/MiB", |run| run["cpu_ms_per_mib_filled"].as_f64(), 2),
        ("peak MiB", |run| Some(run["resident_peak_kib"].as_f64()? / 1024.0), 1),
    ];
    let mut html = "<table><tr><th>run</th>".to_owned();
    columns.iter().for_each(|(name, _, _)| html.push_str(&format!("<th>{name}</th>")));
    for run in runs {
        let name = escaped(run["name"].as_str().unwrap_or("run"));
        let _ = write!(html, "</tr><tr><td>{name}</td>");
        for (_, value, digits) in &columns {
            match value(run) {
                Some(value) => drop(write!(html, "<td>{value:.digits$}</td>")),
                None => html.push_str("<td>-</td>"),
            }
        }
    }
    html + "</tr></table>"
}

/// A plot with a logarithmic upright axis.
struct Plot {
    svg: String,
    low: f64,
    high: f64,
}

impl Plot {
    /// Upright from a power of ten below `low` to one above `high`, in milliseconds.
    fn new(low: f64, high: f64) -> Self {
        let low = 10f64.powf(low.max(1e-3).log10().floor());
        let high = 10f64.powf(high.max(low * 10.0).log10().ceil());
        let (width, height) = (WIDTH + LEFT, HEIGHT + BOTTOM);
        let mut svg = format!("<svg width={width} height={height}>");
        let mut tick = low;
        while tick <= high * 1.01 {
            let y = HEIGHT - HEIGHT * (tick / low).log10() / (high / low).log10();
            let _ = write!(
                svg,
                "<line x1={LEFT} x2={width} y1={y:.1} y2={y:.1} stroke='#ddd'/>\
                 <text x=2 y={:.1}>{tick} ms</text>",
                y + 4.0
            );
            tick *= 10.0;
        }
        Plot { svg, low, high }
    }

    fn y(&self, ms: f64) -> f64 {
        let share = (ms.max(self.low) / self.low).log10() / (self.high / self.low).log10();
        HEIGHT - HEIGHT * share
    }

    fn label(&mut self, x: f64, text: &str) {
        let y = HEIGHT + 16.0;
        let _ = write!(self.svg, "<text x={x:.1} y={y} text-anchor='middle'>{text}</text>");
    }

    fn finish(self) -> String {
        self.svg + "</svg>"
    }
}

fn curves(runs: &[Value]) -> String {
    let points = |run: &Value| -> Vec<(f64, f64)> {
        let point = |point: &Value| Some((point[0].as_f64()?, point[1].as_f64()? / 1000.0));
        run["curve"].as_array().into_iter().flatten().filter_map(point).collect()
    };
    let all: Vec<_> = runs.iter().flat_map(points).map(|(_, ms)| ms).collect();
    let mut plot = Plot::new(smallest(&all), largest(&all));
    // The last 0.1 per mille get as much room as the first nine tenths: nines side by side.
    let x = |quantile: f64| LEFT + WIDTH * (-(1.0 - quantile).max(1e-4).log10() / 4.0);
    for quantile in [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999] {
        plot.label(x(quantile), &format!("{}%", quantile * 100.0));
    }
    for ((index, run), colour) in runs.iter().enumerate().zip(COLOURS.iter().cycle()) {
        let mut line = String::new();
        for (quantile, ms) in points(run) {
            let _ = write!(line, "{:.1},{:.1} ", x(quantile), plot.y(ms));
        }
        let name = escaped(run["name"].as_str().unwrap_or("run"));
        let (x, y) = (LEFT + 10.0, 16.0 + 15.0 * index as f64);
        let _ = write!(
            plot.svg,
            "<polyline points='{line}' fill='none' stroke='{colour}' stroke-width=2 />\
             <text x={x} y={y} style='fill:{colour}'>{name}</text>"
        );
    }
    plot.finish()
}

fn timeline(run: &Value, colour: &str) -> String {
    let samples = samples(run);
    let took: Vec<_> = samples.iter().map(|sample| sample.took_ms).collect();
    let end_s = samples.iter().map(|sample| sample.at_s).fold(1e-6, f64::max);
    let mut plot = Plot::new(smallest(&took), largest(&took));
    for part in 0..=4 {
        let share = f64::from(part) / 4.0;
        plot.label(LEFT + (WIDTH - 20.0) * share, &format!("{:.3} s", end_s * share));
    }
    for sample in &samples {
        let x = LEFT + (WIDTH - 20.0) * sample.at_s / end_s;
        let fill = match sample.touch {
            0 => "#bbb",
            1 => colour,
            _ => "#f00",
        };
        let y = plot.y(sample.took_ms);
        let _ = write!(plot.svg, "<circle cx={x:.1} cy={y:.1} r=1.6 fill='{fill}' />");
    }
    plot.finish() + "<p>Grey: was there. Red: refused.</p>"
}

fn touched(run: &Value) -> String {
    let size = run["size_bytes"].as_f64().unwrap_or(1.0).max(1.0);
    let samples = samples(run);
    let end_s = samples.iter().map(|sample| sample.at_s).fold(1e-6, f64::max);
    let mut first: Vec<Option<f64>> = vec![None; CELLS];
    for sample in &samples {
        let cell = |byte: f64| ((byte / size * CELLS as f64) as usize).min(CELLS - 1);
        for at in &mut first[cell(sample.place)..=cell(sample.place + sample.length - 1.0)] {
            at.get_or_insert(sample.at_s);
        }
    }
    let side = WIDTH / CELLS_PER_ROW as f64;
    let rows = CELLS / CELLS_PER_ROW;
    let mut svg = format!("<svg width={WIDTH} height={:.1}>", side * rows as f64);
    for (index, at) in first.iter().enumerate() {
        let (x, y) = ((index % CELLS_PER_ROW) as f64, (index / CELLS_PER_ROW) as f64);
        let fill = match at {
            Some(at) => format!("hsl(210 70% {:.0}%)", 20.0 + 60.0 * at / end_s),
            None => "#eee".to_owned(),
        };
        let (x, y, width) = (x * side, y * side, side - 1.0);
        let _ = write!(
            svg,
            "<rect x={x:.1} y={y:.1} width={width:.1} height={width:.1} fill='{fill}' />"
        );
    }
    svg + "</svg>"
}

struct Point {
    at_s: f64,
    took_ms: f64,
    place: f64,
    length: f64,
    touch: u64,
}

fn samples(run: &Value) -> Vec<Point> {
    let point = |sample: &Value| {
        Some(Point {
            at_s: sample[0].as_f64()? / 1e6,
            took_ms: sample[1].as_f64()? / 1e3,
            place: sample[2].as_f64()?,
            length: sample[3].as_f64()?,
            touch: sample[4].as_u64()?,
        })
    };
    run["samples"].as_array().into_iter().flatten().filter_map(point).collect()
}

fn smallest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::INFINITY, f64::min).min(1e6)
}

fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(0.0, f64::max)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
