//! Manual pages and shell completions, written from the command line's own description.
//!
//! For those who pack the program: `cargo xtask texts` builds it with the feature `texts` and has it write them.
//! It is no command, which would be in the completions itself.

use crate::cli::Cli;
use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;
use std::{io, path::Path};

/// Names the directory, which exists, in the environment.
#[cfg(feature = "texts")]
pub(crate) const DIRECTORY: &str = "UBLK_QCOW2_TEXTS";

const NAME: &str = "ublk-qcow2";
/// Of the manual: programs that only an administrator has use for.
const SECTION: &str = "8";

/// Writes them instead of doing anything else.
#[cfg(feature = "texts")]
pub(crate) fn main(directory: &Path) -> std::process::ExitCode {
    match write(directory) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            crate::commands::complain(&error);
            std::process::ExitCode::FAILURE
        }
    }
}

fn write(directory: &Path) -> io::Result<()> {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Cli::command(), NAME, directory)?;
    }
    // Built, so that a subcommand has its whole name.
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    for page in command.get_subcommands().chain([&command]) {
        Man::new(page.clone()).section(SECTION).generate_to(directory)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn each_command_has_a_page_and_each_shell_all_options() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path()).unwrap();
        let text = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        assert!(text("ublk-qcow2.8").contains("ublk\\-qcow2\\-add(8)"));
        for command in Cli::command().get_subcommands() {
            let page = text(&format!("ublk-qcow2-{}.8", command.get_name()));
            assert!(page.contains(".SH SYNOPSIS"), "{page}");
        }
        assert!(text("ublk-qcow2-add.8").contains("\\-\\-backing\\-dir"));
        for completions in ["ublk-qcow2.bash", "_ublk-qcow2", "ublk-qcow2.fish"] {
            assert!(text(completions).contains("backing-dir"), "{completions}");
        }
    }
}
