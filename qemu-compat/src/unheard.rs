//! Commands and servers of which nobody hears how they have fared.
//!
//! `add` and `recover` wait for what a server says. They may be killed while they wait, be unable to print,
//! or wait for a server that dies, or that cannot speak. A device of which nobody was told is to be gone; one
//! that has users is to go on.

use crate::{
    command::{TOOL_LIMIT, wait},
    device::{Binary, existing, free_number},
    lifecycle::{is_supervised, parent_of, still_written, written_unsupervised},
    patience, qemu_img,
    recovery::{only_leaks, wait_until_replaced},
    refusals::must_refuse,
};
use anyhow::{Context, Result, ensure};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
};

/// Whoever recovers a device may be unable to name it, or gone when it is served again: its users are not. It
/// was stopped and deleted.
///
/// # Errors
/// What does not hold.
pub fn recovered_unheard(binary: &Binary, dir: &Path) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let device = written_unsupervised(binary, &image)?;
    let id = device.id().to_string();

    device.kill_server()?;
    let mut command = binary.script("exec \"$BINARY\" recover -n \"$ID\" >/dev/full");
    must_refuse(command.env("ID", &id), &["served again"]).context("nothing can be printed")?;
    ensure!(device.listed()?.state == "serving", "it is {}", device.listed()?.state);
    ensure!(is_supervised(device.listed()?.pid)?, "it has no supervisor");

    // Its supervisor would replace the server.
    let dead = device.listed()?.pid;
    kill(Pid::from_raw(parent_of(dead)?), Signal::SIGKILL)?;
    device.kill_server()?;
    let mut command = binary.command();
    let mut recovering = command.args(["recover", "-n", &id]).stdout(Stdio::null()).spawn()?;
    // From now on it is there, and has not served yet.
    patience::until(TOOL_LIMIT, || "no successor".to_owned(), || Ok(device.listed()?.pid != dead))?;
    recovering.kill()?;
    recovering.wait()?;
    wait_until_replaced(&device, dead).context("it was interrupted")?;
    ensure!(is_supervised(device.listed()?.pid)?, "it has no supervisor when it was interrupted");
    still_written(device)
}

/// The log of a device that is recovered is none to which one can write, so its server serves and cannot say
/// so: `recover` said that it had died.
///
/// # Errors
/// What does not hold.
pub fn recovered_in_silence(binary: &Binary, dir: &Path) -> Result<()> {
    let (image, out) = (dir.join("image.qcow2"), dir.join("out"));
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let device = written_unsupervised(binary, &image)?;
    let id = device.id().to_string();
    let log = device.file("log");
    fs::remove_file(&log)?;
    fs::create_dir(&log)?;
    for option in ["--no-supervisor", ""] {
        device.kill_server()?;
        // The server keeps what it was started with, so that must not be a pipe of ours.
        let mut command = binary.script(r#"exec "$BINARY" recover $OPTION -n "$ID" </dev/null >"$OUT" 2>&1"#);
        let mut child = command.env("ID", &id).env("OUT", &out).env("OPTION", option).spawn()?;
        let status = wait(&mut child, TOOL_LIMIT)?.context("`recover` does not end")?;
        let said = fs::read_to_string(&out)?;
        ensure!(status.success() && said.contains(&format!("/dev/ublkb{id}")), "{option}: {said}");
        ensure!(device.listed()?.state == "serving", "{option}: it is {}", device.listed()?.state);
    }
    fs::remove_dir(&log)?;
    still_written(device)
}

/// Ends `add` while it waits: what it has begun ends as well, or has all that it should. The server was left
/// alone with a device that nobody knew of.
///
/// # Errors
/// What does not hold.
pub fn added_unheard(binary: &Binary, dir: &Path) -> Result<()> {
    let (image, binary) = (dir.join("image.qcow2"), binary.apart());
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    let before = existing();
    let has_record = || record_in(binary.run_dir()).is_some();
    for round in 0..3 {
        let mut command = binary.command();
        let mut adding = command.arg("add").arg(&image).stdout(Stdio::null()).spawn()?;
        // It has a device by then, and has not served yet.
        patience::until(TOOL_LIMIT, || format!("no server, in round {round}"), || Ok(has_record()))?;
        adding.kill()?;
        adding.wait()?;
        patience::until(
            TOOL_LIMIT,
            || format!("a device is left that nobody knows of, in round {round}"),
            || Ok(!has_record() && existing() == before),
        )?;
    }
    qemu_img::check_clean(&image)
}

/// Kills a server whose record says that it serves and that has not told anybody: it waits for who reads its
/// log, a pipe. `add` failed, and the device was left, waiting for another server.
///
/// # Errors
/// It is left, or `add` does not fail.
pub fn killed_before_it_is_heard(binary: &Binary, dir: &Path) -> Result<()> {
    let (image, binary) = (dir.join("image.qcow2"), binary.apart());
    qemu_img::create(&image, "cluster_size=64k", None, 16 << 20)?;
    fs::create_dir(binary.run_dir())?;
    let (before, number) = (existing(), free_number());
    for option in ["--zero-copy=auto", "--no-supervisor", "--no-recovery"] {
        mkfifo(&binary.file(number, "log"), Mode::S_IRUSR | Mode::S_IWUSR)?;
        let mut command = binary.command();
        let mut adding = command
            .args(["add", "-n", &number.to_string(), option])
            .arg(&image)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let server = server_that_serves(binary.run_dir()).context(option)?;
        kill(Pid::from_raw(server), Signal::SIGKILL)?;
        let status =
            wait(&mut adding, TOOL_LIMIT)?.with_context(|| format!("{option}: `add` does not end"))?;
        ensure!(!status.success(), "{option}: a server that was killed is said to serve");
        ensure!(existing() == before, "{option}: a device is left");
        ensure!(record_in(binary.run_dir()).is_none(), "{option}: a record is left");
    }
    only_leaks(&image)
}

/// The process whose record says that it serves.
fn server_that_serves(run_dir: &Path) -> Result<i32> {
    let mut pid = None;
    let mut serves = || {
        let text = record_in(run_dir).and_then(|record| fs::read_to_string(record).ok()).unwrap_or_default();
        let record: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
        if record["phase"] == "serving" {
            pid = Some(record["pid"].as_i64().context("no process in the record")?);
        }
        Ok(pid.is_some())
    };
    patience::until(TOOL_LIMIT, || "no server".to_owned(), &mut serves)?;
    Ok(i32::try_from(pid.unwrap_or_default())?)
}

/// A device's record in a run directory.
fn record_in(run_dir: &Path) -> Option<PathBuf> {
    let files = fs::read_dir(run_dir).into_iter().flatten().flatten().map(|file| file.path());
    files.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "json"))
}
