//! The two ways servers write a moment: RFC 3339 (`issued_at`) and the HTTP date (`Retry-After`).
//!
//! Pure. Moments are seconds since 1970 in UTC; whatever is not exactly one is `None`.

const MONTHS: [&str; 12] =
    ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];

/// `2024-02-29T12:00:00[.123](Z|+01:00)`.
pub fn parse_rfc3339(text: &str) -> Option<u64> {
    let text = text.trim();
    let is_punctuated = [(4, b'-'), (7, b'-'), (13, b':'), (16, b':')]
        .iter()
        .all(|(at, mark)| text.as_bytes().get(*at) == Some(mark));
    if !is_punctuated || !matches!(text.as_bytes().get(10), Some(b'T' | b't' | b' ')) {
        return None;
    }
    let local = moment(
        [number(text, 0, 4)?, number(text, 5, 7)?, number(text, 8, 10)?],
        [number(text, 11, 13)?, number(text, 14, 16)?, number(text, 17, 19)?],
    )?;
    let zone = text.get(19..)?;
    let zone = match zone.strip_prefix('.') {
        Some(fraction) => fraction.trim_start_matches(|c: char| c.is_ascii_digit()),
        None => zone,
    };
    if zone.eq_ignore_ascii_case("z") {
        return Some(local);
    }
    let offset_s = match (zone.len(), zone.as_bytes().get(3)) {
        (6, Some(b':')) => (number(zone, 1, 3)? * 60 + number(zone, 4, 6)?) * 60,
        _ => return None,
    };
    match zone.as_bytes()[0] {
        b'+' => local.checked_sub(offset_s),
        b'-' => local.checked_add(offset_s),
        _ => None,
    }
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`, the only form servers may send (RFC 9110 section 5.6.7).
pub fn parse_http_date(text: &str) -> Option<u64> {
    let text = text.trim();
    if text.len() != 29 || !text.is_ascii() || !text.ends_with(" GMT") || &text[3..5] != ", " {
        return None;
    }
    let month = 1 + MONTHS.iter().position(|month| *month == &text[8..11])? as u64;
    moment(
        [number(text, 12, 16)?, month, number(text, 5, 7)?],
        [number(text, 17, 19)?, number(text, 20, 22)?, number(text, 23, 25)?],
    )
}

/// A Retry-After value as milliseconds from `unix_now_s`.
pub fn parse_retry_after_ms(text: &str, unix_now_s: u64) -> Option<u64> {
    let text = text.trim();
    if !text.is_empty() && text.len() <= 9 && text.bytes().all(|b| b.is_ascii_digit()) {
        return Some(text.parse::<u64>().ok()? * 1000);
    }
    parse_http_date(text).map(|moment| moment.saturating_sub(unix_now_s).saturating_mul(1000))
}

fn number(text: &str, from: usize, to: usize) -> Option<u64> {
    let digits = text.get(from..to)?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

/// Years are counted from March, so that the leap day comes last; 719468 days lie between the year
/// 0 counted so and 1970.
fn moment([year, month, day]: [u64; 3], [hour, minute, second]: [u64; 3]) -> Option<u64> {
    let is_leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let month_days = match month {
        2 if is_leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        1..=12 => 31,
        _ => return None,
    };
    let is_day = (1..=month_days).contains(&day) && (1970..=9999).contains(&year);
    if !is_day || hour > 23 || minute > 59 || second > 60 {
        return None;
    }
    let (year, month) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let day_of_year = (153 * month + 2) / 5 + day - 1;
    let days = year * 365 + year / 4 - year / 100 + year / 400 + day_of_year - 719_468;
    Some(((days * 24 + hour) * 60 + minute) * 60 + second)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments_are_read() {
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2001-09-09T01:46:40.999Z", 1_000_000_000),
            ("2024-02-29T23:59:59+01:00", 1_709_247_599),
            ("2000-01-01T00:00:00-00:30", 946_686_600),
        ] {
            assert_eq!(parse_rfc3339(text), Some(expected), "{text}");
        }
        assert_eq!(parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
        assert_eq!(parse_retry_after_ms("120", 0), Some(120_000));
        assert_eq!(parse_retry_after_ms("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_775), Some(2_000));
        assert_eq!(parse_retry_after_ms("Sun, 06 Nov 1994 08:49:37 GMT", 784_111_779), Some(0));
    }

    #[test]
    fn what_is_no_moment_is_none() {
        for text in [
            "",
            "2023-02-29T00:00:00Z",
            "2024-13-01T00:00:00Z",
            "2024-01-01",
            "2024-01-01T24:00:00Z",
            "2024-01-01T00:00:00",
            "2024-01-01T00:00:00+0100",
            "1969-12-31T00:00:00Z",
            "-1",
            "1e3",
            "99999999999999999999",
            "Sun, 06 Nov 1994 08:49:37 CET",
            "\u{e9}un, 06 Nov 1994 08:49:3 GMT",
        ] {
            assert_eq!(parse_rfc3339(text), None, "{text}");
            assert_eq!(parse_http_date(text), None, "{text}");
            assert_eq!(parse_retry_after_ms(text, 0), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_breaks_it(text in ".{0,40}") {
            let _ = (parse_rfc3339(&text), parse_http_date(&text));
        }
    }
}
