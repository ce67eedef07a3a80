//! What the systemd unit runs: its `del` is run as well when nobody of the unit is left, and tells how that came.

use crate::{command::Finished, device::Binary, qemu_img, stopping::wait_until_gone};
use anyhow::{Context, Result, ensure};
use std::{path::Path, time::Duration};

/// Bytes of the disk.
const DISK: u64 = 16 << 20;
/// How long a killed server may take to be gone.
const GONE: Duration = Duration::from_secs(60);

/// It ends well when somebody has detached the device by hand; leaves one alone that another start has made, or somebody
/// by hand; and fails if all had died. It failed in the first case only.
///
/// # Errors
/// What does not hold.
pub fn detached(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, DISK)?;
    let by_hand = binary.add(&[], &image)?;
    let number = by_hand.id().to_string();
    let [ours, other] = ["one", "two"].map(|start| binary.in_unit(start));
    let stop = |unit: &Binary| unit.run(["del", "--unit", "-n", &number]);

    stop(&ours)?.success().context("made by hand")?;
    ensure!(by_hand.listed()?.state == "serving", "one that was made by hand is {}", by_hand.listed()?.state);
    by_hand.detach()?;
    stop(&ours)?.success().context("detached by hand")?;

    let device = ours.add(&["-n", &number], &image)?;
    stop(&other)?.success().context("another start's")?;
    ensure!(device.listed()?.state == "serving", "another start's is {}", device.listed()?.state);
    stop(&ours)?.success().context("its own")?;
    device.has_gone()?;

    for option in ["--no-supervisor", "--no-recovery"] {
        let device = ours.add(&["-n", &number, option], &image)?;
        let server = device.listed()?.pid;
        device.kill_server()?;
        wait_until_gone(server, GONE)?;
        is_told_of_a_death(&stop(&ours)?).context(option)?;
        device.has_gone()?;
        stop(&ours)?.success().context("once more")?;
    }
    qemu_img::check_clean(&image)
}

fn is_told_of_a_death(stopped: &Finished) -> Result<()> {
    let text = stopped.text();
    ensure!(!stopped.status.success(), "all had died, and that is a success: {text}");
    ensure!(text.contains("had died"), "not told: {text}");
    Ok(())
}
