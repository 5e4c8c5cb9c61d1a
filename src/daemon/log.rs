//! The log's writer: one thread that puts the journal's lines on standard error or into a file.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use crossbeam_channel::Receiver;

use crate::blob::journal::{Line, level_name};
use crate::error::{Error, Result};

/// Starts to write; ends when the journal is gone.
///
/// # Errors
/// A log file that cannot be opened, by name.
pub fn start(lines: Receiver<Line>, file: Option<&Path>) -> Result<JoinHandle<()>> {
    let mut out: Box<dyn Write + Send> = match file {
        None => Box::new(std::io::stderr()),
        Some(path) => {
            let opened = OpenOptions::new().append(true).create(true).open(path);
            let failed = |error| Error::io(&error, format!("log file {}", path.display()));
            Box::new(opened.map_err(failed)?)
        }
    };
    let write = move || {
        for line in lines {
            let time = timestamp(SystemTime::now());
            // A full disk or a closed pipe costs log lines, never readers.
            let _ = writeln!(out, "{time} {:5} {}", level_name(line.level), line.text);
        }
    };
    let thread = std::thread::Builder::new().name("log".into());
    thread.spawn(write).map_err(|error| Error::io(&error, "cannot start the log's thread"))
}

/// RFC 3339 in UTC, to the millisecond.
pub fn timestamp(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(days);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3600,
        second / 60 % 60,
        second % 60,
        since.subsec_millis()
    )
}

/// Year, month and day of a number of days since 1970, counted in 400-year eras that begin in March
/// so that the leap day is the last of its year.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let (year, month) = match month {
        0..=9 => (era * 400 + year, month + 3),
        _ => (era * 400 + year + 1, month - 9),
    };
    (year, month, date)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_civil() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_700_000_000, "2023-11-14T22:13:20.000Z"),
            (4_107_542_399, "2100-02-28T23:59:59.000Z"),
        ] {
            assert_eq!(timestamp(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }
}
