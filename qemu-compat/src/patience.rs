//! Waiting for what has to come, and not for ever.

use anyhow::{Result, bail};
use std::{
    thread,
    time::{Duration, Instant},
};

/// Between two looks: some of what has to come is over soon.
const LOOK: Duration = Duration::from_millis(2);

/// Looks again and again until it is so; after `limit` fails with what `otherwise` says.
///
/// # Errors
/// It is not so, or nobody can tell.
pub(crate) fn until(
    limit: Duration,
    otherwise: impl FnOnce() -> String,
    mut is_so: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !is_so()? {
        if Instant::now() >= deadline {
            bail!(otherwise());
        }
        thread::sleep(LOOK);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_is_waited_for_and_what_does_not_is_told() {
        let mut looks = 0;
        let third = || {
            looks += 1;
            Ok(looks == 3)
        };
        until(Duration::from_secs(60), || unreachable!("it comes"), third).unwrap();
        let error = until(Duration::ZERO, || "it stays away".to_owned(), || Ok(false)).unwrap_err();
        assert_eq!(error.to_string(), "it stays away");
    }
}
