//! `add` and `recover`: serve an image, or go on serving it after its server has died.

use super::{CommandError, del};
use crate::{
    cli::{AddArgs, DelArgs, RecoverArgs},
    config::Config,
    control::Control,
    daemon::{self, ServeError, Start},
    detach::{self, Side, Unserved},
    device, namespace,
    runfile::{self, Entry, Record},
    supervisor,
};
use std::{
    io::{self, Write},
    process,
};

/// Who looks after a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Care {
    /// Whoever started it: it stays in the foreground.
    Foreground,
    /// Nobody.
    Alone,
    /// A supervisor.
    Supervised,
}

/// Attaches an image. In the background, returns once the device serves I/O; in the foreground, once
/// it has been detached.
pub(crate) fn run(args: &AddArgs) -> Result<(), CommandError> {
    let config = Config::from_args(args)
        .map_err(|source| CommandError::Path { path: args.image.display().to_string(), source })?;
    // Who is not root need not read of all that he cannot do, and see.
    Control::probe()?;
    runfile::refuse_awaited(&config)?;
    let care = care(args.foreground, args.no_supervisor || args.no_recovery);
    let cookie = runfile::new_cookie()?;
    begin(&Start::New { id: args.id, config, cookie }, care)
}

/// Serves a device whose server has died. Returns as [`run`] does.
pub(crate) fn recover(args: &RecoverArgs) -> Result<(), CommandError> {
    Control::probe()?;
    begin(&Start::Recover { id: args.id }, care(args.foreground, args.no_supervisor))
}

fn care(foreground: bool, alone: bool) -> Care {
    match (foreground, alone) {
        (true, _) => Care::Foreground,
        (false, true) => Care::Alone,
        (false, false) => Care::Supervised,
    }
}

fn begin(start: &Start, care: Care) -> Result<(), CommandError> {
    if care == Care::Foreground {
        let (namespace, _hold) = namespace::leave(start.image().as_deref());
        return daemon::run(start, namespace, None, |_, id| print_device(id))
            .map_err(|error| with_what_is_left(start, error));
    }
    detach::let_go_of_inherited();
    match detach::into_background().map_err(CommandError::Background)? {
        Side::Parent { outcome: Ok(id), .. } => print_device(id).or_else(|source| match start {
            Start::New { .. } => {
                del::run(&DelArgs::of(id))?;
                Err(CommandError::Unheard { source, what: "so it was detached again" })
            }
            // It has users, whoever knows that they need not wait any more.
            Start::Recover { .. } => Err(CommandError::Unheard { source, what: "which is served again" }),
        }),
        Side::Parent { child, outcome: Err(error) } => match *start {
            Start::New { cookie, .. } => {
                supervisor::remove_unheard_of(child, cookie);
                Err(CommandError::Server(error.to_string()))
            }
            Start::Recover { id } => not_heard_of(id, error, care),
        },
        Side::Child(reporter) if care == Care::Alone => {
            let (namespace, _hold) = namespace::leave(start.image().as_deref());
            process::exit(supervisor::serve(start, namespace, None, reporter))
        }
        // What it has to say it says in its log, and to its parent.
        Side::Child(reporter) => process::exit(supervisor::run(start, reporter).map_or(1, |()| 0)),
    }
}

/// The error with which a server has ended that nobody looks after, and what it could not remove itself.
fn with_what_is_left(start: &Start, error: ServeError) -> CommandError {
    let Start::New { cookie, .. } = start else { return error.into() };
    match runfile::load_made(*cookie) {
        Some(Record { id, .. }) => CommandError::LeftBehind { id, source: error },
        None => error.into(),
    }
}

/// What has become of a device that was to be recovered, when its server has not said that it serves.
fn not_heard_of(id: u32, error: Unserved, care: Care) -> Result<(), CommandError> {
    if let Unserved::Failed(error) = error {
        return Err(CommandError::Server(error));
    }
    match left_by_silence(id, runfile::load(id)?.as_ref(), care) {
        None => {
            print_device(id).map_err(|source| CommandError::Unheard { source, what: "which is served again" })
        }
        Some(error) => Err(error),
    }
}

fn left_by_silence(id: u32, entry: Option<&Entry>, care: Care) -> Option<CommandError> {
    match entry {
        // It could not write to its log, say; or the next one was quicker than we were.
        Some(entry) if entry.serves() => None,
        Some(_) if care == Care::Supervised => Some(CommandError::NotYet(id)),
        Some(_) => Some(CommandError::Waits(id)),
        None => Some(CommandError::NoDevice(id)),
    }
}

fn print_device(id: u32) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", device::block_path(id).display())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `recover` said that the server had died before it served the device, though that served and could not
    /// say so, or a supervisor went on to the next.
    #[test]
    fn what_has_become_of_a_device_is_what_its_record_says() {
        let served = Entry { record: runfile::example(), is_alive: true };
        let told = |entry: &Entry, care| left_by_silence(7, Some(entry), care).map(|error| error.to_string());
        assert_eq!(told(&served, Care::Supervised), None);
        assert_eq!(told(&served, Care::Alone), None);
        let dead = Entry { is_alive: false, ..served.clone() };
        let begun = Entry { record: Record { is_inherited: true, ..runfile::example() }, is_alive: true };
        for entry in [&dead, &begun] {
            let supervised = told(entry, Care::Supervised).unwrap();
            assert!(supervised.contains("another one") && supervised.contains("list"), "{supervised}");
        }
        let alone = told(&dead, Care::Alone).unwrap();
        assert!(alone.contains("waits") && alone.contains("recover -n 7"), "{alone}");
    }
}
