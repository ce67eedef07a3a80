//! `add`: attach an image.

use super::CommandError;
use crate::{
    cli::{AddArgs, IoMode},
    daemon::{self, Config},
    detach::{self, Side},
    runfile,
};
use qcow2_engine::io::files::Caching;
use std::io::{self, Write};

/// Attaches the image. In the background, returns once the device serves I/O; in the foreground,
/// once it has been detached.
pub(crate) fn run(args: &AddArgs) -> Result<(), CommandError> {
    let config = config(args)?;
    if args.foreground {
        daemon::run(&config, |device, _| print_device(&device.display().to_string()))?;
        return Ok(());
    }
    match detach::into_background().map_err(CommandError::Background)? {
        Side::Parent(Ok(device)) => Ok(print_device(&device)?),
        Side::Parent(Err(error)) => Err(CommandError::Server(error)),
        Side::Child(reporter) => serve_in_background(&config, reporter),
    }
}

/// The child: tells its parent how it went, and later its log.
fn serve_in_background(config: &Config, reporter: detach::Reporter) -> Result<(), CommandError> {
    let mut reporter = Some(reporter);
    let result = daemon::run(config, |device, id| match reporter.take() {
        Some(reporter) => reporter.serving(device, &runfile::log_path(id)),
        None => Ok(()),
    });
    match (result, reporter) {
        (Err(error), Some(reporter)) => {
            reporter.failed(&error.to_string());
            // The parent prints the error.
            std::process::exit(1)
        }
        (result, _) => Ok(result?),
    }
}

fn config(args: &AddArgs) -> Result<Config, CommandError> {
    let image = std::path::absolute(&args.image)
        .map_err(|source| CommandError::Path { path: args.image.display().to_string(), source })?;
    Ok(Config {
        image,
        id: args.id,
        queues: args.queues,
        depth: args.depth,
        read_only: args.read_only,
        locking: super::image::locking(args.force_share),
        cache_bytes: args.cache_size,
        backing_format: args.backing_format,
        backing_policy: args.backing.policy(),
        caching: match args.io {
            IoMode::Auto => Caching::Auto,
            IoMode::Direct => Caching::Direct,
            IoMode::Buffered => Caching::Buffered,
        },
    })
}

fn print_device(device: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{device}")?;
    out.flush()
}
