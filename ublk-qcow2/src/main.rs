//! `ublk-qcow2` serves a QCOW2 image as /dev/ublkbN: the command.
//!
//! This file reads the command line and turns a failure into one line on standard error and a
//! non-zero exit code. The way of a request: [`queue`] fetches it, [`request`] decodes it, the
//! engine carries it out, [`errno`] words its failure. The way of a device: [`commands`] →
//! [`supervisor`] → [`daemon`] → [`device`] → [`control`].

mod cli;
mod commands;
mod config;
mod control;
mod crew;
mod daemon;
mod detach;
mod device;
mod errno;
mod handover;
mod keep;
mod namespace;
mod partitions;
mod queue;
mod redofile;
mod request;
mod runfile;
mod safety;
mod supervisor;

use clap::Parser;
use cli::{Cli, Command};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    // It would tell on standard error that it cannot write to it, and panic there.
    let log = tracing_subscriber::fmt().with_writer(std::io::stderr).log_internal_errors(false);
    log.with_target(false).with_ansi(false).init();
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
