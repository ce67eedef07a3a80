//! The cases of the device suite, in the order in which they run.
//!
//! Cheap and telling ones come first: when the device does not work at all, that shows in seconds.

use crate::{
    barriers, between, condemned, data_path,
    device::{Binary, DeviceDisk},
    disk::{Disk, Op, Server},
    durability,
    fio::Verified,
    fixture::{Backing, Compat, Preallocation, Recipe},
    fs,
    journey::{Effort, journey},
    kill, leaks, lifecycle, matrix,
    mirror::Mirror,
    origins,
    power::{self, Outage},
    qemu_img, recovery, refusals,
    report::Case,
    server, shape,
    share::Share,
    stacked, stopping, unheard, unit, unsynced,
};
use anyhow::{Context, Result, ensure};
use std::{
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

/// Block size of the file systems on which images lie, in bytes.
const HOST_BLOCK: u64 = 4096;

/// How much there is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Each feature once: minutes, in an emulated machine.
    Quick,
    /// Every pair of features, and longer runs.
    Full,
}

/// What all cases share.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The program under test.
    pub binary: Binary,
    /// Where images go.
    pub dir: PathBuf,
    /// Seed of everything random.
    pub seed: u64,
    /// How much there is to do.
    pub scale: Scale,
    /// Whether other machines have a part in it.
    pub share: Share,
}

/// Name, limit in seconds, and what is done.
type Named<Body> = (&'static str, u64, Body);
type Plain = fn(&Binary, &Path) -> Result<()>;
type Seeded = fn(&Binary, &Path, u64) -> Result<()>;

/// Devices that change hands.
const LIFECYCLES: &[Named<Plain>] = &[
    ("lifecycle/mounts-let-go", 300, lifecycle::mounts_let_go),
    ("lifecycle/mounted", 300, lifecycle::mounted_devices_stay),
    ("lifecycle/mounted-stacks", 240, stacked::lower_devices_stay),
    ("leaks/after-a-kill", 120, leaks::none_after_a_kill),
    ("lifecycle/ended-together", 120, stacked::ended_together),
    ("lifecycle/of-a-unit", 120, unit::detached),
    ("lifecycle/interrupted-recovery", 120, between::recovery_interrupted),
    ("lifecycle/failed-barriers", 300, barriers::failed),
    ("lifecycle/records", 120, lifecycle::records_outlive_devices),
    ("lifecycle/images", 120, lifecycle::images_stay),
    ("lifecycle/failed-recovery", 120, lifecycle::removed_after_a_failed_recovery),
    ("lifecycle/any-phase", 300, lifecycle::recovered_from_any_phase),
    ("lifecycle/added-while-recovered", 120, between::added_while_recovered),
    ("lifecycle/image-back", 200, between::recovered_when_the_image_is_back),
    ("lifecycle/image-gone", 120, between::removed_though_the_image_is_gone),
    ("lifecycle/successor-dies", 300, lifecycle::recovered_although_the_successor_dies),
    ("lifecycle/recovered-unheard", 300, unheard::recovered_unheard),
    ("lifecycle/condemned-detached", 120, condemned::detached_and_repaired),
    ("lifecycle/condemned-recovered", 120, condemned::served_by_a_successor),
    ("origin/block-device", 180, origins::on_a_block_device),
    ("origin/grown", 60, origins::grown),
    ("origin/bitmaps", 180, origins::with_bitmaps),
    ("lifecycle/by-a-stranger", 180, stopping::by_a_stranger),
    ("lifecycle/killed-while-stopping", 400, stopping::killed),
    ("lifecycle/killed-while-writing-back", 300, stopping::killed_while_it_writes_back),
    ("lifecycle/recovered-in-silence", 300, unheard::recovered_in_silence),
    ("lifecycle/killed-unheard", 300, unheard::killed_before_it_is_heard),
    ("lifecycle/killed-unrecorded", 120, between::killed_before_it_is_recorded),
    ("lifecycle/added-unheard", 300, unheard::added_unheard),
];

/// Devices to which the kernel still has something to write.
const UNSYNCED: &[Named<Seeded>] = &[
    ("lifecycle/ended-while-mounted", 240, unsynced::ended_while_mounted),
    ("lifecycle/written-to-a-partition", 60, unsynced::written_to_a_partition),
    ("lifecycle/detached-by-a-stranger", 60, unsynced::written_and_detached_by_a_stranger),
];

/// Gathers cases; each gets a directory of its own, removed when it ends.
struct Cases {
    setting: Arc<Setting>,
    cases: Vec<Case>,
}

/// All cases.
#[must_use]
pub fn cases(setting: Setting) -> Vec<Case> {
    let mut cases = Cases { setting: Arc::new(setting), cases: Vec::new() };
    cases.refusals();
    cases.shapes();
    cases.servers();
    cases.lifecycles();
    cases.matrix();
    cases.file_systems();
    cases.fio();
    cases.kills();
    cases.recoveries();
    cases.power_cuts();
    cases.cases
}

impl Cases {
    fn add(
        &mut self,
        name: impl Into<String>,
        limit: u64,
        body: impl FnOnce(&Setting, &Path) -> Result<()> + Send + 'static,
    ) {
        let setting = Arc::clone(&self.setting);
        // The machine may be shared with others; the full suite is alone with it least of all.
        let factor = if setting.scale == Scale::Full { 3 } else { 2 };
        self.cases.push(Case::new(name, Duration::from_secs(limit * factor), move || {
            let dir = tempfile::Builder::new().prefix("compat-").tempdir_in(&setting.dir)?;
            body(&setting, dir.path())
        }));
    }

    /// Those of the cases which differ by their images that are for this machine. How requests get to the
    /// server, and how it lives and dies, depends on the kernel, and is seen on each.
    fn share_of<T>(&self, all: impl IntoIterator<Item = T>) -> Vec<T> {
        self.setting.share.of(all).collect()
    }

    fn refusals(&mut self) {
        for refusal in self.share_of(refusals::REFUSALS) {
            self.add(format!("refusal/{}", refusal.name), 60, |it, dir| refusal.hold(&it.binary, dir));
        }
        self.add("refusal/command-lines", 60, |it, dir| refusals::command_lines(&it.binary, dir));
        self.add("refusal/surroundings", 60, |it, dir| refusals::surroundings(&it.binary, dir));
        self.add("refusal/number-in-use", 60, |it, dir| refusals::number_in_use(&it.binary, dir));
    }

    fn shapes(&mut self) {
        let recipes = [
            Recipe { queues: 2, ..Recipe::plain(16) },
            Recipe::plain(9),
            Recipe { size: (48 << 20) + 1536, ..Recipe::plain(21) },
            Recipe { compat: Compat::V2, backing: Backing::Raw, ..Recipe::plain(16) },
        ];
        for recipe in recipes {
            self.add(format!("limits/{}", recipe.name()), 60, move |it, dir| {
                shape::limits(&it.binary, dir, &recipe)
            });
        }
        for recipe in [Recipe::plain(16), Recipe { backing: Backing::Chain, ..Recipe::plain(12) }] {
            let name = format!("read-only/{}", recipe.name());
            self.add(name, 60, move |it, dir| shape::read_only(&it.binary, dir, &recipe));
        }
        self.add("limits/beyond-the-end", 60, |it, dir| {
            let image = dir.join("image.qcow2");
            qemu_img::create(&image, "cluster_size=64k", None, 1_048_064)?;
            let mut disk = it.binary.attach(&image, 1)?;
            shape::beyond_the_end(&mut disk)?;
            disk.detach()?;
            qemu_img::check_clean(&image)
        });
    }

    fn servers(&mut self) {
        self.add("server/guarded", 60, |it, dir| server::guarded(&it.binary, dir));
        self.add("server/partitions", 60, |it, dir| server::partitions(&it.binary, dir));
        self.add("server/data-paths", 240, |it, dir| {
            data_path::both(&it.binary, dir, it.seed).with_context(|| format!("seed {}", it.seed))
        });
        self.add("server/durable", 120, |it, dir| durability::each_is_passed_on(&it.binary, dir));
        self.add("server/given-away", 60, |it, dir| server::given_away(&it.binary, dir));
        self.add("server/let-go", 180, |it, dir| server::file_system_let_go(&it.binary, dir));
        let queues: &[u16] = if self.setting.scale == Scale::Full { &[1, 2] } else { &[2] };
        for &queues in queues {
            self.add(format!("leaks/{queues}q"), 120, move |it, dir| {
                leaks::given_back(&it.binary, dir, queues, it.seed)
                    .with_context(|| format!("seed {}", it.seed))
            });
        }
    }

    /// Devices that change hands.
    fn lifecycles(&mut self) {
        let is_full = self.setting.scale == Scale::Full;
        let times = if is_full { 10 } else { 1 };
        self.add("lifecycle/removed-after-a-kill", 300, move |it, dir| {
            lifecycle::removed_after_a_kill(&it.binary, dir, 3 * times)
        });
        self.add("lifecycle/watched", 120, move |it, dir| lifecycle::watched(&it.binary, dir, 2 * times));
        self.add("lifecycle/numbers", 240, move |it, dir| lifecycle::numbers(&it.binary, dir, 3, 4 * times));
        self.add("lifecycle/mounted-stacks-all", 240, move |it, dir| {
            stacked::all_from_the_top(&it.binary, dir, if is_full { 12 } else { 4 })
        });
        for &(name, limit, body) in LIFECYCLES {
            self.add(name, limit, move |it, dir| body(&it.binary, dir));
        }
        // It takes as long as a write-back may take.
        if is_full {
            self.add("lifecycle/not-written-back", 400, |it, dir| {
                stopping::kept_until_it_is_written_back(&it.binary, dir)
            });
        }
        for &(name, limit, body) in UNSYNCED {
            self.add(name, limit, move |it, dir| body(&it.binary, dir, it.seed));
        }
    }

    fn matrix(&mut self) {
        let (recipes, batches) = match self.setting.scale {
            Scale::Quick => (matrix::quick(), 12),
            Scale::Full => (matrix::full(), 40),
        };
        for (index, recipe) in self.share_of(recipes.into_iter().enumerate()) {
            // The way back through qemu-io doubles the work; half of the quick ones take it, and not
            // the huge one, whose comparison is slow.
            let is_huge = recipe.size > 1 << 30;
            let returns = usize::from(self.setting.scale == Scale::Full || (index % 2 == 1 && !is_huge));
            let effort = Effort { batches, returns };
            let limit = if is_huge { 300 } else { 120 };
            self.add(format!("matrix/{}", recipe.name()), limit, move |it, dir| {
                journey(&it.binary, dir, &recipe, effort, it.seed)
                    .with_context(|| format!("seed {}", it.seed))
            });
        }
    }

    fn file_systems(&mut self) {
        let mut variants =
            vec![(fs::Kind::Xfs, "cluster_size=64k", "2"), (fs::Kind::Ext4, "cluster_size=4k", "1")];
        if self.setting.scale == Scale::Full {
            variants.push((fs::Kind::Ext4, "cluster_size=2M,refcount_bits=1", "2"));
            variants.push((fs::Kind::Xfs, "cluster_size=512", "2"));
            variants.push((fs::Kind::Xfs, "cluster_size=64k,compat=0.10", "1"));
        }
        for (kind, options, queues) in variants {
            self.add(format!("fs/{}/{options}/{queues}q", kind.name()), 240, move |it, dir| {
                fs::life(&it.binary, dir, kind, options, queues, it.seed)
            });
        }
    }

    fn fio(&mut self) {
        let (most, sizes): (u64, &[u64]) = match self.setting.scale {
            Scale::Quick => (1 << 20, &[65536]),
            Scale::Full => (16 << 20, &[512, 4096, 65536, 2 << 20]),
        };
        for &cluster in sizes {
            for queues in [1, 2] {
                // In an emulated machine small clusters are allocated at one or two MiB a second. Each
                // job needs room for fio's largest block.
                let bytes_per_job = (cluster * 512).clamp(1 << 20, most);
                self.add(format!("fio/verify-and-trim/{cluster}/{queues}q"), 300, move |it, dir| {
                    let load = Verified { bytes_per_job, seed: it.seed };
                    verified(&it.binary, dir, cluster, queues, load)
                });
            }
        }
    }

    fn kills(&mut self) {
        let mut variants = vec![("cluster_size=64k", 65536, 2)];
        if self.setting.scale == Scale::Full {
            variants.push(("cluster_size=512", 512, 1));
            variants.push(("cluster_size=4k,refcount_bits=1", 4096, 2));
            variants.push(("cluster_size=2M,lazy_refcounts=on", 2 << 20, 2));
            variants.push(("cluster_size=64k,compat=0.10", 65536, 1));
        }
        for (options, cluster, queues) in variants {
            self.add(format!("kill/{options}/{queues}q"), 300, move |it, dir| {
                kill::kill_under_load(&it.binary, dir, options, cluster, queues, 4, it.seed)
                    .with_context(|| format!("seed {}", it.seed))
            });
        }
    }
}

impl Cases {
    /// Kills that nobody may notice: 4 of each kind, or 50.
    fn recoveries(&mut self) {
        let (kills, bytes_per_job) = match self.setting.scale {
            Scale::Quick => (4, 1 << 20),
            Scale::Full => (50, 4 << 20),
        };
        for (cluster, queues) in [(65536, 2), (4096, 1)] {
            self.add(format!("recovery/fio/{cluster}/{queues}q"), 300, move |it, dir| {
                let load = Verified { bytes_per_job, seed: it.seed };
                recovery::under_fio(&it.binary, dir, cluster, queues, kills, load)
                    .with_context(|| format!("seed {}", it.seed))
            });
        }
        self.add("recovery/xfs", 300, move |it, dir| {
            recovery::under_files(&it.binary, dir, fs::Kind::Xfs, kills, it.seed)
                .with_context(|| format!("seed {}", it.seed))
        });
    }
}

impl Cases {
    /// The host's power fails, at many moments of a history.
    fn power_cuts(&mut self) {
        let preallocated = Recipe { preallocation: Preallocation::Full, queues: 2, ..Recipe::plain(16) };
        let overlay = Recipe { backing: Backing::Qcow2, snapshots: 1, ..Recipe::plain(12) };
        let mut outages = vec![(fs::Kind::Xfs, preallocated), (fs::Kind::Ext4, overlay)];
        let (histories, flushes, states, served_again) = match self.setting.scale {
            Scale::Quick => (2, 12, 5, 4),
            Scale::Full => (2, 60, 24, 8),
        };
        if self.setting.scale == Scale::Full {
            let small = Recipe { queues: 2, ..Recipe::plain(12) };
            outages.extend([
                (fs::Kind::Xfs, overlay),
                (fs::Kind::Ext4, preallocated),
                (fs::Kind::Xfs, Recipe { queues: 2, ..Recipe::plain(16) }),
                (fs::Kind::Ext4, small),
                (fs::Kind::Xfs, Recipe { preallocation: Preallocation::Metadata, ..small }),
                (fs::Kind::Xfs, Recipe::plain(9)),
                (fs::Kind::Ext4, Recipe { compat: Compat::V2, backing: Backing::Chain, ..Recipe::plain(16) }),
            ]);
        }
        for (host, recipe) in self.share_of(outages) {
            let outage = Outage { host, recipe, histories, flushes, states, served_again };
            self.add(format!("power/{}", outage.name()), 400, move |it, dir| {
                power::cut(&it.binary, dir, &outage, it.seed).with_context(|| format!("seed {}", it.seed))
            });
        }
    }
}

/// fio's verified load; then everything is discarded, and the image file shrinks.
fn verified(binary: &Binary, dir: &Path, cluster: u64, queues: u16, load: Verified) -> Result<()> {
    let image = dir.join("image.qcow2");
    qemu_img::create(&image, &format!("cluster_size={cluster}"), None, load.device_bytes())?;
    let empty = std::fs::metadata(&image)?.blocks();
    let device = binary.add(&["-q", &queues.to_string()], &image)?;
    load.run(&device.path())?;
    let mut disk = DeviceDisk::open(device)?;
    let mirror = Mirror::new(disk.size(), cluster);
    disk.run(&[Op::Discard { at: 0, len: disk.size() }])?;
    for at in (0..disk.size()).step_by(1 << 20) {
        let bytes = disk.run(&[Op::Read { at, len: 1 << 20 }])?;
        mirror.compare(at, &bytes[0]).context("after discarding everything")?;
    }
    disk.detach()?;
    qemu_img::check_clean(&image)?;
    if cluster < HOST_BLOCK {
        // Clusters that share a block of the host's file system are freed at different times, and a
        // hole in a part of a block gives nothing back.
        return Ok(());
    }
    // Tables stay, at most as many as there were; one entry of 8 bytes maps a cluster.
    let tables = load.device_bytes() / cluster * 8 + 16 * cluster;
    let left = std::fs::metadata(&image)?.blocks() * 512;
    let most = empty * 512 + 2 * tables;
    ensure!(
        left <= most,
        "everything was discarded, yet {left} bytes of the file are in use, not {most} at most"
    );
    Ok(())
}
