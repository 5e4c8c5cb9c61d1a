//! How far a long piece of work has come, on standard error and only where a person watches.
//!
//! Callers count; a closed or redirected standard error costs nothing. Safe to share between
//! threads.

use std::io::IsTerminal;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{RecvTimeoutError, Sender};
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::build::tally::Tally;

/// How often the sign of life changes.
const TICK_MS: u64 = 120;

/// A bar of bytes.
#[derive(Clone)]
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A bar for work named by one word; how much it is, `expect` says.
    pub fn new(work: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(0), target());
        let style = ProgressStyle::with_template(
            "{prefix} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        );
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_prefix(work);
        Progress { bar }
    }

    /// A count of bytes for work whose end is not known.
    pub fn counting(work: &'static str) -> Self {
        let bar = ProgressBar::with_draw_target(None, target());
        let style = ProgressStyle::with_template("{prefix} {bytes} {bytes_per_sec} {elapsed}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_prefix(work);
        Progress { bar }
    }

    /// A sign that something is being waited for.
    pub fn waiting(text: String) -> Self {
        let bar = ProgressBar::with_draw_target(None, target());
        bar.set_message(text);
        bar.enable_steady_tick(Duration::from_millis(TICK_MS));
        Progress { bar }
    }

    /// So many more bytes are to be done.
    pub fn expect(&self, bytes: u64) {
        self.bar.inc_length(bytes);
    }

    /// So many more bytes are done.
    pub fn advance(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// What is told of a conversion while it goes on: a bar for what is read, one for what is stored.
/// Dropping it takes both away.
pub struct Bars {
    stop: Option<Sender<()>>,
    drawing: Option<JoinHandle<()>>,
}

impl Bars {
    /// Draws until dropped.
    pub fn follow(tally: Arc<Tally>) -> Self {
        if target().is_hidden() {
            return Bars { stop: None, drawing: None };
        }
        let (stop, stopped) = crossbeam_channel::bounded::<()>(0);
        let draw = move || {
            let bars = MultiProgress::with_draw_target(ProgressDrawTarget::stderr());
            let read = bars.add(styled("read"));
            let stored = bars.add(styled("store"));
            while let Err(RecvTimeoutError::Timeout) =
                stopped.recv_timeout(Duration::from_millis(TICK_MS))
            {
                let layers = format!("{}/{}", tally.layers_done.value(), tally.layers.value());
                read.set_message(format!("layers {layers}"));
                read.set_length(tally.source_bytes.value());
                read.set_position(tally.source_bytes_done.value());
                stored.set_length(tally.stored_bytes.value());
                stored.set_position(tally.stored_bytes_done.value());
            }
            read.finish_and_clear();
            stored.finish_and_clear();
        };
        // Without a thread there are no bars, and nothing else is missing.
        let drawing = std::thread::Builder::new().name("progress".to_owned()).spawn(draw).ok();
        Bars { stop: Some(stop), drawing }
    }
}

impl Drop for Bars {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(drawing) = self.drawing.take() {
            // It owns nothing that anybody needs.
            let _ = drawing.join();
        }
    }
}

fn styled(work: &'static str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    let style = ProgressStyle::with_template(
        "{prefix:6} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}",
    );
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.set_prefix(work);
    bar
}

fn target() -> ProgressDrawTarget {
    match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    }
}
