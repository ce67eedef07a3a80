//! File systems on other block devices on ours (partitions, the device mapper, a loop device, a device of our
//! own), and fsx, which verifies all it has written, on these while the servers are killed: guest/stack.sh.
//! Swap space on a device while memory is short: guest/swap.sh.

use super::{LIB, rounds::whole_rounds};
use crate::{
    peers,
    place::{Job, Place},
    test::Count,
    workspace::build_release,
};
use anyhow::{Result, ensure};
use std::time::Duration;

const STORY: &str = include_str!("../../guest/stack.sh");
const SWAP: &str = include_str!("../../guest/swap.sh");
/// What a round that has begun may still take.
const GRACE: Duration = Duration::from_secs(3600);

/// Options of `cargo xtask soak`.
#[derive(Debug, clap::Args)]
pub(super) struct Stacks {
    /// Operations of each fsx on each stack of devices
    #[arg(long, default_value_t = 1000)]
    operations: u64,
    /// Only these stacks, of plain, partition, thin, crypt, snapshot, loop, nested and swap (only when named,
    /// in the machine)
    #[arg(long, default_value = "")]
    stacks: String,
}

impl Stacks {
    /// Whether this place is for them.
    fn check(&self, place: Place) -> Result<()> {
        let has_swap = self.stacks.split_whitespace().any(|kind| kind == "swap");
        ensure!(
            place != Place::Host || !has_swap,
            "swap takes nearly all memory, which on this host is not ours: ask for the machine, with --kernel"
        );
        Ok(())
    }
}

/// Rounds until the time is up. Each is a test that passed.
///
/// # Errors
/// What did not hold.
pub(super) fn lane(place: Place, stacks: &Stacks, time: Duration, seed: u64) -> Result<Count> {
    stacks.check(place)?;
    let script = format!("{LIB}{SWAP}{STORY}");
    let job = Job::new(&script, time + GRACE)
        .program(&build_release("ublk-qcow2", "ublk-qcow2")?)
        .program(&peers::fsx()?)
        .variable("SOAK_SECONDS", &time.as_secs().to_string())
        .variable("SEED", &seed.to_string())
        .variable("OPERATIONS", &stacks.operations.to_string())
        .variable("KINDS", &stacks.stacks);
    let finished = job.run(place)?;
    ensure!(finished.status == 0, "the story ended with status {}", finished.status);
    whole_rounds(&finished.output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Kernel;

    #[test]
    fn a_hosts_memory_is_not_taken() {
        let of = |stacks: &str| Stacks { operations: 1, stacks: stacks.to_owned() };
        assert!(of("plain swap").check(Place::Host).is_err());
        assert!(of("").check(Place::Host).is_ok() && of("plain loop").check(Place::Host).is_ok());
        assert!(of("swap").check(Place::Machine(Kernel::V6_12)).is_ok());
    }
}
