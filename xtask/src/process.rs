//! Child processes: finding programs, running them, and errors that show the command line.
//!
//! Knows nothing about what the programs are for. Every command of xtask starts its children through here, so
//! that one which cannot be started, or fails here, is named with its arguments and what it said.

use anyhow::{Context, Result, bail};
use std::{
    env,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

/// Directories that hold administration tools and are often missing from a user's `PATH`.
const SBIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Where `name` is installed, looking through `PATH` and then the sbin directories.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(SBIN.iter().map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|candidate| is_executable(candidate))
}

/// A command for `name`, found as [`find_program`] does.
///
/// # Errors
/// Fails when the program is not installed.
pub(crate) fn program(name: &str) -> Result<Command> {
    match find_program(name) {
        Some(path) => Ok(Command::new(path)),
        None => bail!("`{name}` is not installed; `cargo xtask setup` installs what the project needs"),
    }
}

/// Starts `command` with the standard streams that it has been given, else our own.
///
/// # Errors
/// Fails when it cannot be started.
pub(crate) fn start(command: &mut Command) -> Result<Child> {
    command.spawn().with_context(|| format!("cannot start `{}`", show(command)))
}

/// Runs `command` with our own standard streams.
///
/// # Errors
/// Fails when it cannot be started or exits with anything but zero.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let status = start(command)?.wait()?;
    if !status.success() {
        bail!("`{}` failed: {status}", show(command));
    }
    Ok(())
}

/// Runs `command` quietly and returns what it wrote to standard output.
///
/// # Errors
/// Fails as [`run`] does; the error carries what the command said on standard error.
pub(crate) fn capture(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        bail!("`{}` failed: {}\n{}", show(command), output.status, said(&output));
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` wrote something other than text", show(command)))
}

/// Runs `command` to its end, whatever its exit status, and collects both streams.
///
/// # Errors
/// Fails only when it cannot be started.
pub(crate) fn output(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{}`", show(command)))
}

/// The last words of a finished command: standard error, or standard output when that is empty.
pub(crate) fn said(output: &Output) -> String {
    let bytes = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}

/// The command line as a person would type it.
pub(crate) fn show(command: &Command) -> String {
    std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| quote(&word.to_string_lossy()))
        .collect::<Vec<_>>()
        .join(" ")
}

/// `word` quoted for a POSIX shell, or as it is when it needs no quotes.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    path.metadata().is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_only_when_they_must_be() {
        assert_eq!(quote("a-b_c/d.e"), "a-b_c/d.e");
        assert_eq!(quote("a b"), "'a b'");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }

    #[test]
    fn a_failure_names_the_command_and_its_words() {
        let error =
            capture(Command::new("sh").args(["-c", "echo no luck >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("no luck") && error.contains("sh -c"), "{error}");
    }
}
