//! The command line: what can be asked for, checked as far as it can be without doing anything.

use crate::{
    commands::{check::CheckArgs, create::CreateArgs, info::InfoArgs, io::IoArgs, resize::ResizeArgs},
    device::MAX_DEPTH,
};
use clap::{Args, Parser, Subcommand, ValueEnum};
use qcow2_engine::{BackingPolicy, Format, OpenOptions};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Serve a QCOW2 image as a block device, /dev/ublkbN.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Attach an image and print the device's name once it serves I/O.
    Add(AddArgs),
    /// Detach devices: drain, write back and close.
    Del(DelArgs),
    /// Serve a device again whose server has died; its users see a pause and no error.
    Recover(RecoverArgs),
    /// List the attached devices.
    List(ListArgs),
    /// Show what this kernel's ublk driver offers.
    Features,
    /// Make a new image.
    Create(CreateArgs),
    /// Show what an image says of itself; its backing file is not opened.
    Info(InfoArgs),
    Check(CheckArgs),
    /// Make the virtual disk of an image larger.
    Resize(ResizeArgs),
    Io(IoArgs),
}

#[derive(Debug, Args)]
pub(crate) struct AddArgs {
    /// The image file.
    pub(crate) image: PathBuf,
    /// Device number [default: the first that is free].
    #[arg(short = 'n', long = "number", value_name = "ID", value_parser = clap::value_parser!(u32).range(..MAX_ID))]
    pub(crate) id: Option<u32>,
    /// Number of queues, each with a thread of its own.
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=MAX_QUEUES))]
    pub(crate) queues: u16,
    /// Requests that each queue holds.
    #[arg(short, long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_DEPTH)))]
    pub(crate) depth: u16,
    /// Never change the image; the device is read-only.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Attach even if somebody writes to the image; what is read may then be torn.
    #[arg(short = 'U', long, requires = "read_only")]
    pub(crate) force_share: bool,
    /// Memory for the image's metadata, in bytes or with a suffix K, M, G, T: half of the machine's at the most.
    /// What the image has no use for is not taken.
    #[arg(long, value_name = "SIZE", default_value = "32M", value_parser = parse_size)]
    pub(crate) cache_size: u64,
    /// How the image file is read and written.
    #[arg(long, value_enum, default_value_t = IoMode::Auto)]
    pub(crate) io: IoMode,
    /// Whether the kernel moves data between requests and the image file without a copy (Linux 6.16 or
    /// newer).
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = ZeroCopy::Auto)]
    pub(crate) zero_copy: ZeroCopy,
    #[command(flatten)]
    pub(crate) backing: BackingArgs,
    /// Leave clusters that a crash has leaked as they are, instead of giving them back in the background.
    #[arg(long)]
    pub(crate) no_reclaim: bool,
    /// Do not have the kernel look for partitions in an image that is not trusted (Linux 7.0 or newer).
    #[arg(long)]
    pub(crate) no_part_scan: bool,
    /// Stay in the foreground; SIGINT or SIGTERM detaches.
    #[arg(long)]
    pub(crate) foreground: bool,
    /// If the server dies its device is dead: I/O fails, writes that were not flushed are lost.
    #[arg(long)]
    pub(crate) no_recovery: bool,
    /// If the server dies its device waits for `ublk-qcow2 recover`.
    #[arg(long)]
    pub(crate) no_supervisor: bool,
}

#[derive(Debug, Args)]
pub(crate) struct RecoverArgs {
    /// Device number.
    #[arg(short = 'n', long = "number", value_name = "ID", value_parser = clap::value_parser!(u32).range(..MAX_ID))]
    pub(crate) id: u32,
    /// Stay in the foreground; SIGINT or SIGTERM detaches.
    #[arg(long)]
    pub(crate) foreground: bool,
    /// If the new server dies as well the device waits again.
    #[arg(long)]
    pub(crate) no_supervisor: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DelArgs {
    #[command(flatten)]
    pub(crate) which: Which,
    /// Even if it is mounted, or another device is built on it (LUKS, LVM, a loop device, one whose image it is): its
    /// users' writes fail, what they have not flushed is lost. Who merely has it open is not noticed either way.
    #[arg(short, long)]
    pub(crate) force: bool,
    /// For `ExecStop=` of a systemd unit: only the device that this start of the unit has made. That it is gone already
    /// is no error; that its server had died, and none had taken its place, is one.
    #[arg(long, conflicts_with = "all")]
    pub(crate) unit: bool,
}

impl DelArgs {
    /// One device.
    pub(crate) fn of(id: u32) -> Self {
        Self { which: Which { id: Some(id), all: false }, force: false, unit: false }
    }
}

/// Which devices to detach.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Which {
    /// Device number.
    #[arg(short = 'n', long = "number", value_name = "ID", value_parser = clap::value_parser!(u32).range(..MAX_ID))]
    pub(crate) id: Option<u32>,
    /// All devices that this program serves.
    #[arg(long)]
    pub(crate) all: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// Only this device; it is an error if it is not attached.
    #[arg(short = 'n', long = "number", value_name = "ID", value_parser = clap::value_parser!(u32).range(..MAX_ID))]
    pub(crate) id: Option<u32>,
    /// Print a JSON array.
    #[arg(long)]
    pub(crate) json: bool,
}

/// How the tools print what they tell of an image.
#[derive(Clone, Debug, Args)]
pub(crate) struct OutputArgs {
    /// For people, or as JSON with the field names of qemu-img.
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = Output::Human)]
    output: Output,
    /// The same as --output=json.
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Human,
    Json,
}

impl OutputArgs {
    pub(crate) fn is_json(&self) -> bool {
        self.json || self.output == Output::Json
    }
}

/// How backing files are opened, and which; without an option, whatever local path the image names.
#[derive(Clone, Debug, Args)]
pub(crate) struct BackingArgs {
    /// Format of backing files where the image does not say it, or says one that is not served: qcow2 or raw. It
    /// is never guessed.
    #[arg(long, value_name = "FORMAT")]
    pub(crate) backing_format: Option<Format>,
    /// Refuse an image that has a backing file.
    #[arg(long, conflicts_with = "backing_dir")]
    no_backing: bool,
    /// Open backing files below this directory only; may be given several times.
    #[arg(long, value_name = "DIR")]
    backing_dir: Vec<PathBuf>,
}

impl BackingArgs {
    /// How a tool opens an image whose backing files these are.
    pub(crate) fn open_options(&self) -> OpenOptions {
        OpenOptions {
            backing_format: self.backing_format,
            backing_policy: self.policy(),
            ..OpenOptions::default()
        }
    }

    pub(crate) fn policy(&self) -> BackingPolicy {
        match (self.no_backing, &self.backing_dir[..]) {
            (true, _) => BackingPolicy::None,
            (false, []) => BackingPolicy::Any,
            // The server's working directory is another one.
            (false, directories) => {
                let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
                BackingPolicy::Under(directories.iter().map(absolute).collect())
            }
        }
    }
}

/// How the image file is read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum IoMode {
    /// Direct where the file allows it, else buffered.
    Auto,
    /// Past the host's page cache, or fail.
    Direct,
    /// Through the host's page cache.
    Buffered,
}

/// When data is moved without a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ZeroCopy {
    /// Where the kernel can.
    Auto,
    /// Always, or fail.
    On,
    /// Never.
    Off,
}

/// Queues at most: far more than any machine has use for, and each takes buffers for its depth.
const MAX_QUEUES: i64 = 64;
/// Device numbers end here: the kernel's minor numbers have 20 bits.
const MAX_ID: i64 = 1 << 20;

/// Reads a size as qemu-img does: a number, whole or with a fraction, and a binary suffix; or a hexadecimal
/// number.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    if let Some(digits) = text.strip_prefix("0x").or(text.strip_prefix("0X")) {
        // A sign is not a digit here.
        return match u64::from_str_radix(digits, 16) {
            Ok(size) if !digits.starts_with('+') => Ok(size),
            _ => Err(format!("{text:?} is not a hexadecimal number of at most 64 bits")),
        };
    }
    let (number, unit) = match text.char_indices().last() {
        Some((at, suffix)) if suffix.is_ascii_alphabetic() => (&text[..at], suffix),
        _ => (text, 'b'),
    };
    let shift = match unit.to_ascii_lowercase() {
        'b' => 0,
        'k' => 10,
        'm' => 20,
        'g' => 30,
        't' => 40,
        'p' => 50,
        'e' => 60,
        _ => return Err(format!("the suffix {unit:?} is none of b, K, M, G, T, P, E")),
    };
    let invalid = || format!("{text:?} is not a size such as 4096, 64K or 1.5G");
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let is_digits = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    if !is_digits(whole) || !is_digits(fraction) || fraction.len() > MAX_FRACTION_DIGITS {
        return Err(invalid());
    }
    if shift == 0 && fraction.bytes().any(|digit| digit != b'0') {
        return Err(format!("{text:?} is no whole number of bytes"));
    }
    let too_large = || format!("{text} is more than 2^64 bytes");
    let whole: u128 = whole.parse().map_err(|_| too_large())?;
    let digits = fraction.len() as u32;
    let fraction: u128 = fraction.parse().map_err(|_| invalid())?;
    let bytes =
        whole.checked_mul(1 << shift).ok_or_else(too_large)? + (fraction << shift) / 10_u128.pow(digits);
    u64::try_from(bytes).map_err(|_| too_large())
}

/// Digits after the point, so that the arithmetic fits in 128 bits: 2^60 * 10^18 does.
const MAX_FRACTION_DIGITS: usize = 18;

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
        let add = |args: &[&str]| Cli::try_parse_from([&["ublk-qcow2", "add"], args].concat());
        assert!(
            add(&["-n", "3", "-q", "2", "-d", "64", "--io", "direct", "--cache-size", "1G", "x"]).is_ok()
        );
        for bad in
            [&["-q", "0", "x"][..], &["-d", "4097", "x"], &["--io", "fast", "x"], &["-n", "-1", "x"], &[]]
        {
            assert!(add(bad).is_err(), "{bad:?}");
        }
        for bad in [&[][..], &["--all", "-n", "1"], &["--all", "--unit"], &["--unit"]] {
            assert!(Cli::try_parse_from([&["ublk-qcow2", "del"], bad].concat()).is_err(), "{bad:?}");
        }
    }

    /// The unit is used where nobody sees what a mistake in it says.
    #[test]
    fn the_command_lines_of_the_systemd_unit_are_such() {
        let unit = include_str!("../../dist/ublk-qcow2@.service");
        let parsed = |key: &str| {
            let line = unit.lines().find_map(|line| line.strip_prefix(key)).expect(key);
            let line = line.replace("%i", "7").replace("$OPTIONS", "-q 2").replace("${IMAGE}", "/image");
            Cli::try_parse_from(line.split_whitespace()).expect(key).command
        };
        let Command::Add(add) = parsed("ExecStart=") else { panic!("it attaches") };
        assert_eq!((add.id, add.queues, add.image.to_str()), (Some(7), 2, Some("/image")));
        let Command::Del(del) = parsed("ExecStop=") else { panic!("it detaches") };
        assert_eq!((del.which.id, del.force, del.unit), (Some(7), false, true));
        // What its type relies on.
        assert!(!add.foreground && !add.no_supervisor && unit.contains("Type=forking"));
    }

    #[test]
    fn sizes_are_read_as_qemu_img_reads_them() {
        for (text, size) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 65536),
            ("64k", 65536),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
            ("100b", 100),
            ("15E", 15 << 60),
            ("0x10000", 65536),
            ("1024.0", 1024),
            ("0.1k", 102),
        ] {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in [
            "",
            "K",
            "-1",
            "1X",
            "1..5M",
            ".5M",
            "16E",
            "99999999999999999999999999999999999999999",
            "1 M",
            "ä",
            "0x",
            "0x+1",
            "0x10K",
            "0x10000000000000000",
            "0.5",
            "4096.5b",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
