//! What commands print: lines, tables, JSON and human sizes.
//!
//! A reader that hangs up (`sluice images | head -1`) ends the printing, not the work: later lines
//! go nowhere and the command still finishes what it was asked to do. Nothing here panics on a
//! closed pipe; every other failure of standard output is an error.

use std::fmt::Write as _;
use std::io::{ErrorKind, Write};

use serde::Serialize;

use crate::error::{Error, Result};

/// Where a command prints.
pub struct Output {
    sink: Option<Box<dyn Write>>,
}

impl Output {
    /// Standard output, buffered; `flush` before the process ends.
    pub fn stdout() -> Self {
        Self::to(Box::new(std::io::BufWriter::new(std::io::stdout())))
    }

    /// Any writer.
    pub fn to(sink: Box<dyn Write>) -> Self {
        Output { sink: Some(sink) }
    }

    /// Prints the text and a newline.
    pub fn line(&mut self, text: impl AsRef<str>) -> Result<()> {
        self.write(text.as_ref().as_bytes())?;
        self.write(b"\n")
    }

    /// Prints a value as indented JSON.
    pub fn json(&mut self, value: &impl Serialize) -> Result<()> {
        let text = serde_json::to_string_pretty(value)
            .map_err(|error| Error::Malformed(format!("the result is not JSON: {error}")))?;
        self.line(text)
    }

    /// Prints a table; the first row is its head.
    pub fn table(&mut self, rows: &[Vec<String>]) -> Result<()> {
        self.write(table(rows).as_bytes())
    }

    /// Hands over what is still buffered.
    pub fn flush(&mut self) -> Result<()> {
        let Some(sink) = &mut self.sink else { return Ok(()) };
        let result = sink.flush();
        self.settle(result)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(sink) = &mut self.sink else { return Ok(()) };
        let result = sink.write_all(bytes);
        self.settle(result)
    }

    fn settle(&mut self, result: std::io::Result<()>) -> Result<()> {
        match result {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.sink = None;
                Ok(())
            }
            Err(error) => Err(Error::io(&error, "cannot write to standard output")),
            Ok(()) => Ok(()),
        }
    }
}

/// Prints a line for the operator on standard error, whatever has become of it.
pub fn complain(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Bytes for people: "0 B", "4.0 KiB", "1.5 GiB".
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    // 1023.95 would print as 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Reads a size: a number, or one with K, M, G or T behind it (powers of 1024).
///
/// # Errors
/// A sentence that says what is possible.
pub fn parse_size(text: &str) -> std::result::Result<u64, String> {
    let wrong = || format!("{text:?} is no size; write a number, or one like 200M or 50G");
    let digits = text.trim_end_matches(['K', 'M', 'G', 'T']);
    let shift = match &text[digits.len()..] {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        _ => return Err(wrong()),
    };
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

/// Nanoseconds for people: "800 ns", "12.5 us", "3.4 ms", "1.20 s".
pub fn duration(ns: u64) -> String {
    match ns {
        0..1_000 => format!("{ns} ns"),
        1_000..1_000_000 => format!("{:.1} us", ns as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} ms", ns as f64 / 1e6),
        _ => format!("{:.2} s", ns as f64 / 1e9),
    }
}

/// Aligned columns, two spaces apart; columns whose cells are all numbers or sizes lean right.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
    let width = |column| rows.iter().map(|row| cell(row, column).chars().count()).max();
    let right = |column| {
        let mut body = rows.iter().skip(1).map(|row| cell(row, column)).peekable();
        body.peek().is_some() && body.all(|text| text.starts_with(|c: char| c.is_ascii_digit()))
    };
    let shape: Vec<(usize, bool)> =
        (0..columns).map(|column| (width(column).unwrap_or(0), right(column))).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, &(width, right)) in shape.iter().enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let cell = cell(row, column);
            let _ = match right {
                true => write!(line, "{gap}{cell:>width$}"),
                false => write!(line, "{gap}{cell:<width$}"),
            };
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    struct Failing(ErrorKind, Rc<RefCell<usize>>);

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            *self.1.borrow_mut() += 1;
            Err(std::io::Error::from(self.0))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_closed_pipe_ends_the_printing_only() {
        let writes = Rc::new(RefCell::new(0));
        let mut out = Output::to(Box::new(Failing(ErrorKind::BrokenPipe, writes.clone())));
        for _ in 0..3 {
            out.line("text").expect("a closed pipe is no error");
        }
        assert_eq!(*writes.borrow(), 1);
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let mut out = Output::to(Box::new(Failing(ErrorKind::StorageFull, Rc::default())));
        assert!(out.line("text").is_err());
    }

    #[test]
    fn sizes_are_read_in_powers_of_1024() {
        assert_eq!(parse_size("200M"), Ok(200 << 20));
        assert_eq!((parse_size("7"), parse_size("1T")), (Ok(7), Ok(1 << 40)));
        for text in ["", "M", "1MM", "1.5G", "-1", "1g", "99999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_one_decimal_and_never_four_digits() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.0 KiB");
        assert_eq!(bytes(1024 * 1024 - 1), "1.0 MiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
    }

    #[test]
    fn durations_have_a_unit_that_fits() {
        assert_eq!(duration(999), "999 ns");
        assert_eq!(duration(12_500), "12.5 us");
        assert_eq!(duration(3_400_000), "3.4 ms");
        assert_eq!(duration(1_200_000_000), "1.20 s");
    }

    #[test]
    fn numbers_lean_right_and_lines_end_without_spaces() {
        let row = |cells: &[&str]| cells.iter().map(|c| (*c).to_owned()).collect::<Vec<_>>();
        let text = table(&[row(&["NAME", "SIZE"]), row(&["a", "7 B"]), row(&["bcd", "12 B"])]);
        assert_eq!(text, "NAME  SIZE\na      7 B\nbcd   12 B\n");
        assert_eq!(table(&[]), "");
    }
}
