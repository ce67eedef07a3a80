//! SIGKILL of a daemon without recovery, under load, over and over on the same image.
//!
//! Three regions of the disk: a *settled* one, changed at random and flushed before the load
//! begins; a *ledger*, whose slots are written and flushed while the load runs, so that it is known
//! what was durable at the moment of the kill; and the rest, which fio keeps busy. After each kill:
//! the dead device can be removed, `qemu-img check` finds nothing worse than leaks, and both known
//! regions hold what they must.

use crate::{
    command::wait,
    content::{self, Told, tagged},
    device::{Binary, Device, DeviceDisk, carry_out},
    disk::{Disk, Op, SECTOR, Server},
    fio,
    mirror::Mirror,
    patience,
    qemu_img::{self, Verdict},
    sequence::{Discards, Player},
};
use anyhow::{Context, Result, bail, ensure};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use std::{
    fs::{File, OpenOptions},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::Duration,
};

/// Bytes of the settled region, at the disk's beginning.
const SETTLED: u64 = 8 << 20;
/// The ledger comes after it: slots that share clusters with their neighbours.
const SLOTS: u64 = 48;
/// Bytes of a slot.
const SLOT: u64 = 12 << 10;
/// Where the load begins.
const LOAD: u64 = SETTLED + SLOTS * SLOT;
/// Size of the disk.
pub const DISK: u64 = 192 << 20;
/// Writes to the ledger between two flushes.
const WRITES_PER_FLUSH: u64 = 3;
/// How long a load that has lost its device may take to notice.
const LOAD_LIMIT: Duration = Duration::from_secs(60);
/// The load must have written by then.
const WARM_UP: Duration = Duration::from_secs(30);

/// What is known of the ledger: for each slot the write that is durable, and the last one issued.
struct Ledger {
    durable: Vec<u64>,
    issued: Vec<AtomicU64>,
    next: AtomicU64,
}

/// Kills the daemon `times` times.
///
/// # Errors
/// What did not hold, and after which kill.
pub fn kill_under_load(
    binary: &Binary,
    dir: &Path,
    options: &str,
    cluster: u64,
    queues: u16,
    times: u32,
    seed: u64,
) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, options, None, DISK)?;
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut settled = Mirror::new(SETTLED, cluster);
    let mut player = Player::new(&settled, Discards::Zero, seed);
    let mut ledger = Ledger::new();
    for kill in 1..=times {
        let patience = Duration::from_millis(rng.u64(300..2500));
        one_kill(binary, &image, queues, &mut player, &mut settled, &mut ledger, patience)
            .with_context(|| format!("kill {kill} of {times}"))?;
        if let Verdict::Damaged(text) = qemu_img::check(&image)? {
            bail!("after kill {kill} of {times} qemu-img check finds more than leaks: {text}");
        }
    }
    let mut disk = binary.attach(&image, queues)?;
    hold(&mut disk, &mut player, &mut settled, &mut ledger).context("after the last kill")?;
    disk.detach()?;
    if let Verdict::Damaged(text) = qemu_img::check(&image)? {
        bail!("after the last detach: {text}");
    }
    qemu_img::repair_leaks(&image)?;
    qemu_img::check_clean(&image).context("after the repair of leaks")
}

/// Attach, hold against what is known, change, load, kill, remove.
fn one_kill(
    binary: &Binary,
    image: &Path,
    queues: u16,
    player: &mut Player,
    settled: &mut Mirror,
    ledger: &mut Ledger,
    patience: Duration,
) -> Result<()> {
    let queues = queues.to_string();
    let mut disk = DeviceDisk::open(binary.add(&["--no-recovery", "-q", &queues], image)?)?;
    hold(&mut disk, player, settled, ledger)?;
    player.play(&mut Settled(&mut disk), settled, 4)?;
    let device = disk.into_device();
    let (path, server) = (device.path(), Pid::from_raw(device.listed()?.pid));
    let mut load = fio::start_load(&path, LOAD, Duration::from_secs(300))?;
    let (warm, ended, killed, durable) = thread::scope(|scope| {
        let writer = scope.spawn(|| ledger.keep(&path));
        let warm = wait_until_busy(&device);
        thread::sleep(patience);
        let ended = load.try_wait();
        // Whatever has gone wrong, the server dies: else the writer would never end.
        let killed = kill(server, Signal::SIGKILL);
        let durable = writer.join().unwrap_or_else(|_| bail!("the ledger's writer panicked"));
        (warm, ended, killed, durable)
    });
    let load_ended = wait(&mut load, LOAD_LIMIT)?;
    warm?;
    killed.with_context(|| format!("cannot kill process {server}"))?;
    ledger.durable = durable?;
    ensure!(ended?.is_none(), "fio had ended before the kill");
    ensure!(load_ended.is_some(), "fio hangs on the device of a dead server");
    ensure!(device.listed()?.state == "dead", "the list does not say that the server is dead");
    device.detach().context("removing the dead device")
}

/// Waits until the device has carried writes of the load out.
fn wait_until_busy(device: &Device) -> Result<()> {
    let writes =
        || -> Result<u64> { Ok(device.sysfs("stat")?.split_whitespace().nth(4).context("stat")?.parse()?) };
    let before = writes()?;
    patience::until(WARM_UP, || "fio has not begun to write".to_owned(), || Ok(writes()? >= before + 50))
}

fn hold(disk: &mut DeviceDisk, player: &mut Player, settled: &mut Mirror, ledger: &mut Ledger) -> Result<()> {
    player.verify(&mut Settled(disk), settled).context("the settled region")?;
    ledger.hold(disk).context("the ledger")
}

impl Ledger {
    fn new() -> Self {
        Self {
            durable: vec![0; SLOTS as usize],
            issued: (0..SLOTS).map(|_| AtomicU64::new(0)).collect(),
            next: AtomicU64::new(1),
        }
    }

    /// Writes slots and flushes until the device fails; returns what was durable by then.
    fn keep(&self, device: &Path) -> Result<Vec<u64>> {
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(device)?;
        let mut durable = self.durable.clone();
        let mut flushes = 0;
        while self.keep_once(&file, &mut durable).is_ok() {
            flushes += 1;
        }
        ensure!(flushes > 0, "no flush was completed before the kill");
        Ok(durable)
    }

    fn keep_once(&self, file: &File, durable: &mut [u64]) -> Result<()> {
        let mut acknowledged = Vec::new();
        for _ in 0..WRITES_PER_FLUSH {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let slot = (number * 7 % SLOTS) as usize;
            let at = SETTLED + slot as u64 * SLOT;
            self.issued[slot].store(number, Ordering::Relaxed);
            carry_out(file, &Op::Write { at, bytes: tagged(at, SLOT, number).into() })?;
            acknowledged.push((slot, number));
        }
        carry_out(file, &Op::Flush)?;
        acknowledged.into_iter().for_each(|(slot, number)| durable[slot] = number);
        Ok(())
    }

    /// Each sector of a slot holds the durable write or a later one. What it holds now is what the
    /// disk shows from here on.
    fn hold(&mut self, disk: &mut DeviceDisk) -> Result<()> {
        for slot in 0..SLOTS as usize {
            let at = SETTLED + slot as u64 * SLOT;
            let bytes = disk.run(&[Op::Read { at, len: SLOT }])?.pop().unwrap_or_default();
            let issued = self.issued[slot].load(Ordering::Relaxed);
            let mut oldest = u64::MAX;
            for (index, sector) in bytes.chunks(SECTOR as usize).enumerate() {
                let address = at + index as u64 * SECTOR;
                let number = number_of(sector, address)
                    .with_context(|| format!("slot {slot}, {address:#x}: found {}", Told(sector)))?;
                ensure!(
                    (self.durable[slot]..=issued).contains(&number),
                    "slot {slot}, {address:#x}: write {number} is there, {} was flushed and {issued} issued",
                    self.durable[slot]
                );
                oldest = oldest.min(number);
            }
            self.durable[slot] = oldest;
        }
        Ok(())
    }
}

/// The number of the write whose bytes a sector holds; 0 for zeros, none for anything else.
fn number_of(sector: &[u8], address: u64) -> Option<u64> {
    if sector.iter().all(|&byte| byte == 0) {
        return Some(0);
    }
    let number = content::number_of(sector)?;
    (tagged(address, SECTOR, number) == sector).then_some(number)
}

/// The settled region as a disk of its own.
struct Settled<'a>(&'a mut DeviceDisk);

impl Disk for Settled<'_> {
    fn size(&self) -> u64 {
        SETTLED
    }

    fn run(&mut self, batch: &[Op]) -> Result<Vec<Vec<u8>>> {
        self.0.run(batch)
    }

    fn detach(self) -> Result<()> {
        bail!("a region cannot be detached")
    }
}
