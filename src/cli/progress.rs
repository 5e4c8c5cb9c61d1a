//! How far a long piece of work has come, on standard error and only where a person watches.
//!
//! Callers count; a closed or redirected standard error costs nothing. Safe to share between
//! threads.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

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

fn target() -> ProgressDrawTarget {
    match std::io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    }
}
