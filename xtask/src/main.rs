//! The project's automation. This file only dispatches; each command is a file of its own.

mod apt;
mod bench;
mod campaign;
mod demo;
mod dist;
mod kernel;
mod lives;
mod peers;
mod place;
mod powercut;
mod process;
mod setup;
mod soak;
mod test;
mod test_compat;
mod texts;
mod timing;
mod tools;
mod vm;
mod workspace;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The project's automation", max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install what is missing on this machine and fetch the kernels
    Setup(setup::Options),
    /// Serve an image as a real block device, use it, and let QEMU judge the result
    Demo(demo::Options),
    /// Everything that must hold before a change is merged
    Test(test::Options),
    /// The full compatibility matrix on both kernels, and machines that are killed
    TestCompat(test_compat::Options),
    /// Crash simulated workloads at every moment and judge what is left
    Crash(campaign::CrashOptions),
    /// Kill a whole virtual machine under a writer, over and over, and judge what is left
    Powercut(powercut::Options),
    /// Damage images field by field, and hold what becomes of them against QEMU's tools
    Fuzz(campaign::FuzzOptions),
    /// Source trees, fio, a database and a guest on images that live through kills
    Soak(soak::Options),
    /// Compare the speed of the engines in the virtual machine
    Bench(bench::Options),
    /// Manual pages and shell completions, into target/texts
    Texts,
    /// The release binary in a tarball, with what belongs to it
    Dist,
    /// A shell, or one command, in a throw-away virtual machine with a ublk driver
    Vm(vm::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Task::Setup(options) => setup::command(&options).map(|()| ExitCode::SUCCESS),
        Task::Demo(options) => demo::command(&options),
        Task::Test(options) => test::command(&options),
        Task::TestCompat(options) => test_compat::command(&options),
        Task::Crash(options) => campaign::crash(&options),
        Task::Powercut(options) => powercut::command(&options),
        Task::Fuzz(options) => campaign::fuzz(&options),
        Task::Soak(options) => soak::command(&options),
        Task::Bench(options) => bench::command(&options),
        Task::Texts => texts::command().map(|()| ExitCode::SUCCESS),
        Task::Dist => dist::command().map(|()| ExitCode::SUCCESS),
        Task::Vm(options) => vm::command(&options),
    };
    result.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
