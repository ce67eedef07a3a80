//! `ublk-qcow2` serves a QCOW2 image as /dev/ublkbN: the command.
//!
//! This file reads the command line and turns a failure into one line on standard error and a
//! non-zero exit code. The way of a request: [`queue`] fetches it, [`request`] decodes it, the
//! engine carries it out, [`errno`] words its failure. The way of a device: [`commands`] →
//! [`daemon`] → [`device`] → [`control`].

mod cli;
mod commands;
mod control;
mod daemon;
mod detach;
mod device;
mod errno;
mod queue;
mod request;
mod runfile;

use clap::Parser;
use cli::{Cli, Command};
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false).with_ansi(false).init();
    let result = match &cli.command {
        Command::Add(args) => commands::add::run(args),
        Command::Del(args) => commands::del::run(args),
        Command::List(args) => commands::list::run(args),
        Command::Features => commands::features::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ublk-qcow2: {error}");
            ExitCode::FAILURE
        }
    }
}
