//! `io`: qemu-io's commands on an image, through the engine, without a device.
//!
//! [`parse`] reads a line, [`session`] carries it out, [`mod@print`] words the outcome as qemu-io does.
//! A command that fails says so and makes the exit code 1; the commands after it run all the same.

mod parse;
mod print;
mod session;

use super::CommandError;
use crate::{cli::BackingArgs, config, runfile};
use clap::Args;
use qcow2_engine::{
    Image, OpenOptions,
    exec::Executor,
    io::{Files, files::Caching, uring::Uring},
};
use session::Session;
use std::{
    io::{self, BufRead},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
};

/// Submission slots of the ring.
const RING: u32 = 128;

/// Run qemu-io's commands on an image, without a device.
///
/// Commands are read from standard input unless -c gives them; "help" lists them.
#[derive(Debug, Args)]
#[command(args_override_self = true)]
pub(crate) struct IoArgs {
    /// A command; may be given several times.
    #[arg(short = 'c', long = "cmd", value_name = "COMMAND")]
    commands: Vec<String>,
    /// Open the image for reading only.
    #[arg(short, long)]
    read_only: bool,
    /// Read the image even if somebody writes to it; what is read may then be torn.
    #[arg(short = 'U', long, requires = "read_only")]
    force_share: bool,
    #[command(flatten)]
    backing: BackingArgs,
    /// The format of the image.
    #[arg(short, long, value_name = "FORMAT", default_value = "qcow2", value_parser = ["qcow2"], hide = true)]
    format: String,
    /// The image file.
    image: PathBuf,
}

/// Whether to go on with the next command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    Command,
    End,
}

/// Runs the commands, then makes everything durable and closes the image.
pub(crate) fn run(args: &IoArgs) -> Result<ExitCode, CommandError> {
    if !args.read_only {
        runfile::refuse_served(&args.image)?;
    }
    let files = Arc::new(Files::with_locking(Caching::Auto, config::locking(args.force_share)));
    let ring = Uring::new(Arc::clone(&files), RING).map_err(CommandError::Ring)?;
    let executor = Executor::new(ring.clone());
    let options = OpenOptions { read_only: args.read_only, ..args.backing.open_options() };
    let image = executor
        .block_on(Image::open(&ring, &*files, &args.image, &options))
        .map_err(CommandError::Ring)??;
    let session = Session::new(&image, executor.clone());
    let ran = match &args.commands[..] {
        [] => run_all(io::stdin().lock().lines(), &session, &executor),
        commands => run_all(commands.iter().cloned().map(Ok), &session, &executor),
    };
    // Whatever ended them, what they wrote is to be in the image.
    executor.block_on(session.close()).map_err(CommandError::Ring)??;
    ran?;
    // What was in flight until then has its say too.
    session.printed()?;
    Ok(if session.has_failed() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs commands until there are no more, or nothing can be printed any more.
fn run_all(
    lines: impl Iterator<Item = io::Result<String>>,
    session: &Session,
    executor: &Executor,
) -> Result<(), CommandError> {
    for line in lines {
        let line = line.map_err(|source| CommandError::Path { path: "standard input".to_owned(), source })?;
        if executor.block_on(session.execute(&line)).map_err(CommandError::Ring)? == Next::End {
            break;
        }
        session.printed()?;
    }
    Ok(())
}
