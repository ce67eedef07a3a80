//! Lengths of time as options take them: `90s`, `20m`, `2h`. A bare number has the option's own unit.

use anyhow::{Context, Result, bail};
use std::time::Duration;

const MINUTE: u64 = 60;
const HOUR: u64 = 60 * MINUTE;

/// Of an option whose bare numbers are seconds.
///
/// # Errors
/// It is no such text.
pub(crate) fn or_seconds(text: &str) -> Result<Duration> {
    parse(text, 1)
}

/// Of an option whose bare numbers are minutes.
///
/// # Errors
/// It is no such text.
pub(crate) fn or_minutes(text: &str) -> Result<Duration> {
    parse(text, MINUTE)
}

fn parse(text: &str, bare: u64) -> Result<Duration> {
    let digits = text.trim_end_matches(|it: char| !it.is_ascii_digit());
    let unit = match &text[digits.len()..] {
        "" => bare,
        "s" => 1,
        "m" => MINUTE,
        "h" => HOUR,
        other => bail!("{other:?} is no unit of time: s, m and h are"),
    };
    let number: u64 = digits.parse().context("a whole number, and s, m or h, is wanted")?;
    Ok(Duration::from_secs(number.checked_mul(unit).context("that is too long")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_takes_every_unit() {
        for (text, seconds, minutes) in
            [("90", 90, 5400), ("90s", 90, 90), ("20m", 1200, 1200), ("2h", 7200, 7200)]
        {
            let found = [or_seconds(text), or_minutes(text)].map(|time| time.unwrap().as_secs());
            assert_eq!(found, [seconds, minutes], "{text}");
        }
        for wrong in ["", "h", "2d", "2 h", "-1", "1.5h", "1h30m", "99999999999999999h"] {
            assert!(or_seconds(wrong).is_err(), "{wrong}");
        }
    }
}
