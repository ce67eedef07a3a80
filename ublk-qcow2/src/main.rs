//! `ublk-qcow2` serves a QCOW2 image as /dev/ublkbN: the command.
//!
//! This file reads the command line and turns a failure into one line on standard error and a
//! non-zero exit code. The way of a request: [`queue`] fetches it, [`request`] decodes it, the
//! engine carries it out, [`errno`] words its failure. The way of a device: [`commands`] →
//! [`supervisor`] → [`daemon`] → [`device`] → [`control`].

#[cfg(test)]
mod alone;
mod cli;
mod commands;
mod config;
mod control;
mod crew;
mod daemon;
mod deputy;
mod detach;
mod device;
mod errno;
mod handover;
mod identity;
mod keep;
mod namespace;
mod orphans;
mod partitions;
mod processes;
mod queue;
mod redofile;
mod request;
mod runfile;
mod safety;
mod supervisor;
#[cfg(any(test, feature = "texts"))]
mod texts;
mod uapi;
mod wait;

use clap::Parser;
use cli::{Cli, Command};
use std::{
    io::{self, Write},
    process::ExitCode,
};
use tracing_subscriber::util::SubscriberInitExt;

fn main() -> ExitCode {
    #[cfg(feature = "texts")]
    if let Some(directory) = std::env::var_os(texts::DIRECTORY) {
        return texts::main(directory.as_ref());
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(answer) => return say(&answer),
    };
    log().init();
    if let Err(error) = runfile::check_directory() {
        commands::complain(&error);
        return ExitCode::FAILURE;
    }
    let success = |()| ExitCode::SUCCESS;
    let result = match &cli.command {
        Command::Add(args) => commands::add::run(args).map(success),
        Command::Recover(args) => commands::add::recover(args).map(success),
        Command::Del(args) => commands::del::run(args).map(success),
        Command::List(args) => commands::list::run(args).map(success),
        Command::Features => commands::features::run().map(success),
        Command::Create(args) => commands::create::run(args).map(success),
        Command::Info(args) => commands::info::run(args).map(success),
        Command::Resize(args) => commands::resize::run(args).map(success),
        Command::Check(args) => commands::check::run(args),
        Command::Io(args) => commands::io::run(args),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            commands::complain(&error);
            ExitCode::FAILURE
        }
    }
}

/// Prints what clap has for a command line that is none, or asks for help. A mistake exits with 1, as for
/// qemu-img: clap's own 2 is what `check` has for corruptions.
fn say(answer: &clap::Error) -> ExitCode {
    let is_said = answer.print().is_ok();
    if is_said && !answer.use_stderr() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What servers have to say goes to standard error. Where that takes nothing (a full disk, a terminal that is
/// gone) they say nothing: the library would complain about it in the same place, and panic when it cannot.
fn log() -> impl tracing::Subscriber {
    let log = tracing_subscriber::fmt().with_writer(|| Log).with_target(false).with_ansi(false);
    log.log_internal_errors(false).finish()
}

/// Standard error, for what is logged: each event is one line, whatever the names in it that an image has chosen.
struct Log;

impl Write for Log {
    /// The library writes an event at a time.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let line = event.strip_suffix(b"\n").unwrap_or(event);
        io::stderr().write_all((commands::printable(line) + "\n").as_bytes())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    /// Standard error belongs to a whole process, so a process of its own takes the test.
    #[test]
    fn a_log_that_takes_nothing_costs_no_server() {
        let Some(mut child) = alone::again("tests::a_log_that_takes_nothing_costs_no_server") else {
            tracing::subscriber::with_default(log(), || tracing::error!("nobody hears this"));
            commands::complain(&"nor this");
            return;
        };
        let full = File::options().write(true).open("/dev/full").unwrap();
        alone::check(&child.stderr(full).output().unwrap());
    }
}
