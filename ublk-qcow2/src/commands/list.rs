//! `list`: the attached devices.

use super::{CommandError, image};
use crate::{
    cli::ListArgs,
    device,
    runfile::{self, Entry, Phase},
};
use serde::Serialize;
use std::{
    fmt::Write as _,
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

/// A line of the list.
#[derive(Debug, Serialize)]
struct Line<'a> {
    id: u32,
    device: PathBuf,
    state: State,
    pid: i32,
    size: u64,
    queues: u16,
    depth: u16,
    read_only: bool,
    image: &'a Path,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// A server is there, and is getting ready.
    Starting,
    Serving,
    /// The server has died; `recover` replaces it.
    Waiting,
    /// The server has died; `del` is removing the rest.
    Removing,
    /// The server has died; `del` removes the rest.
    Dead,
}

/// Prints the list.
pub(crate) fn run(args: &ListArgs) -> Result<(), CommandError> {
    let entries = match args.id {
        Some(id) => vec![runfile::load(id)?.ok_or(CommandError::NoDevice(id))?],
        None => runfile::load_all()?,
    };
    let boot = runfile::boot()?;
    let lines: Vec<_> = entries.iter().map(|entry| line(entry, &boot)).collect();
    let text = if args.json {
        serde_json::to_string_pretty(&lines).map_err(io::Error::from)? + "\n"
    } else {
        table(&lines)
    };
    Ok(io::stdout().lock().write_all(text.as_bytes())?)
}

fn line<'a>(entry: &'a Entry, boot: &str) -> Line<'a> {
    let record = &entry.record;
    Line {
        id: record.id,
        device: device::block_path(record.id),
        state: state(entry, boot),
        pid: record.pid,
        size: record.size,
        queues: record.queues,
        depth: record.depth,
        read_only: record.config.read_only,
        image: &record.config.image,
    }
}

fn state(Entry { record, is_alive }: &Entry, boot: &str) -> State {
    match (is_alive, record.phase) {
        (true, _) if record.is_inherited => State::Starting,
        (true, Phase::Serving) => State::Serving,
        (true, Phase::Removing) => State::Removing,
        (true, _) => State::Starting,
        // Its device has not outlived the machine's last start.
        (false, _) if record.boot != boot => State::Dead,
        (false, Phase::Removing) => State::Dead,
        (false, _) if record.config.recovery => State::Waiting,
        (false, _) => State::Dead,
    }
}

fn table(lines: &[Line<'_>]) -> String {
    let mut text = format!(
        "{:<14} {:<9} {:>8} {:>16} {:>6} {:>5}  {}\n",
        "DEVICE", "STATE", "PID", "BYTES", "QUEUES", "DEPTH", "IMAGE"
    );
    for line in lines {
        let state = match line.state {
            State::Serving => "serving",
            State::Starting => "starting",
            State::Waiting => "waiting",
            State::Removing => "removing",
            State::Dead => "dead",
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "{:<14} {:<9} {:>8} {:>16} {:>6} {:>5}  {}",
            line.device.display(),
            format!("{state}{}", if line.read_only { "*" } else { "" }),
            line.pid,
            line.size,
            line.queues,
            line.depth,
            image::printable(line.image.as_os_str().as_bytes())
        );
    }
    if lines.iter().any(|line| line.read_only) {
        text.push_str("* read-only\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::Config, runfile::Record};

    /// With a run directory that outlives the machine's uptime a device that was gone was said to wait for
    /// `recover`.
    #[test]
    fn a_device_of_another_boot_does_not_wait() {
        let record = runfile::example();
        let waiting = Record { config: Config { recovery: true, ..record.config.clone() }, ..record };
        let boot = waiting.boot.clone();
        let dead = Entry { record: waiting, is_alive: false };
        assert_eq!(state(&dead, &boot), State::Waiting);
        assert_eq!(state(&dead, "another"), State::Dead);
    }

    #[test]
    fn an_image_s_name_cannot_steer_the_terminal() {
        let line = Line {
            id: 0,
            device: device::block_path(0),
            state: State::Serving,
            pid: 1,
            size: 512,
            queues: 1,
            depth: 1,
            read_only: false,
            image: Path::new("a\u{1b}[2Jb\nc"),
        };
        let text = table(&[line]);
        assert!(text.contains("a\u{fffd}[2Jb\u{fffd}c") && text.lines().count() == 2, "{text}");
    }
}
