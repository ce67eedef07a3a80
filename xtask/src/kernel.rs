//! The kernels of the throw-away machine: which exist, how they are fetched, and what is in them.
//!
//! A kernel is unpacked from its Debian packages into the cache and never installed. Knows apt and the layout
//! of the packages; does not know how a machine is booted.

use crate::{
    apt::PrivateApt,
    process::{capture, program},
    workspace,
};
use anyhow::{Context, Result, bail};
use std::{
    fmt, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

/// The kernels that the project is tested on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Kernel {
    /// The floor of features: Debian 12's backports kernel.
    #[value(name = "6.12")]
    V6_12,
    /// Zero copy and all newer feature bits: Debian 13's backports kernel.
    #[value(name = "7.3")]
    V7_3,
}

impl Kernel {
    pub(crate) const ALL: [Self; 2] = [Self::V6_12, Self::V7_3];

    /// Its version's first two numbers.
    pub(crate) const fn series(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V7_3 => "7.3",
        }
    }

    const fn suite(self) -> &'static str {
        match self {
            Self::V6_12 => "bookworm-backports",
            Self::V7_3 => "trixie-backports",
        }
    }

    /// The package that holds the kernel image, up to its version.
    const fn image_prefix(self) -> &'static str {
        match self {
            Self::V6_12 => "linux-image-",
            Self::V7_3 => "linux-binary-",
        }
    }

    /// All packages of the kernel whose image package is `image`. Since 7.x the modules are apart.
    fn packages(self, image: &str) -> Vec<String> {
        match self {
            Self::V6_12 => vec![image.to_owned()],
            Self::V7_3 => vec![image.to_owned(), image.replacen("linux-binary-", "linux-modules-", 1)],
        }
    }

    fn dir(self) -> Result<PathBuf> {
        Ok(workspace::cache()?.join("kernels").join(self.series()))
    }

    /// The unpacked kernel, or None when it has not been fetched yet.
    ///
    /// # Errors
    /// Fails when the cache holds something that is no kernel.
    pub(crate) fn unpacked(self) -> Result<Option<UnpackedKernel>> {
        let dir = self.dir()?;
        if dir.exists() { UnpackedKernel::open(&dir).map(Some) } else { Ok(None) }
    }

    /// Downloads and unpacks the newest matching kernel. The caller holds the setup lock.
    ///
    /// # Errors
    /// Fails when the suite has no such kernel, or apt cannot fetch it.
    pub(crate) fn fetch(self) -> Result<UnpackedKernel> {
        let dir = self.dir()?;
        let kernels = dir.parent().context("the cache has no parent")?;
        fs::create_dir_all(kernels)?;
        let apt = PrivateApt::only("kernels", &[Self::V6_12.suite(), Self::V7_3.suite()])?;
        let image = self.newest(&apt)?;

        let staging = tempfile::Builder::new().prefix(".unpack-").tempdir_in(kernels)?;
        let root = staging.path().join("root");
        apt.unpack(&self.packages(&image), &root)?;
        unify_lib(&root)?;
        let release = UnpackedKernel::open(&root)?.release;
        // It warns about lists of built-in modules, which newer packages do not carry and nothing here needs.
        capture(program("depmod")?.arg("-b").arg(&root).arg(&release))?;

        fs::rename(&root, &dir).with_context(|| format!("cannot move the kernel to {}", dir.display()))?;
        UnpackedKernel::open(&dir)
    }

    /// The newest image package of the series; when the suite has moved on, the newest of a later one.
    fn newest(self, apt: &PrivateApt) -> Result<String> {
        let pattern = format!(r"^{}[0-9.]+\+deb[0-9.]+-cloud-amd64$", self.image_prefix());
        let floor = digits(self.series());
        let mut found = apt.search(&pattern)?;
        found.retain(|name| digits(name) >= floor);
        if self == Self::V6_12 {
            found.retain(|name| name.contains("+deb12")); // the same name without it comes from Debian 13
        }
        found.sort_by_key(|name| digits(name));
        let in_series = found.iter().rev().find(|name| digits(name).starts_with(&floor));
        let Some(newest) = in_series.or(found.last()) else {
            bail!("{} has no cloud kernel {} or later", self.suite(), self.series());
        };
        if in_series.is_none() {
            eprintln!("note: {} has no kernel {} any more; taking {newest}", self.suite(), self.series());
        }
        Ok(newest.clone())
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.series())
    }
}

/// A kernel in the cache: its image and its modules, with `modules.dep` made by depmod.
#[derive(Debug)]
pub(crate) struct UnpackedKernel {
    /// What `uname -r` says in it.
    pub release: String,
    /// The bootable image.
    pub image: PathBuf,
    /// The directory of `modules.dep`.
    pub modules: PathBuf,
}

impl UnpackedKernel {
    fn open(root: &Path) -> Result<Self> {
        let all = root.join("lib/modules");
        let release = fs::read_dir(&all)
            .with_context(|| format!("{} holds no kernel: delete it and run setup again", root.display()))?
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .next()
            .with_context(|| format!("{} is empty: delete it and run setup again", all.display()))?;
        let modules = all.join(&release);
        let image = [root.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")]
            .into_iter()
            .find(|path| path.is_file())
            .with_context(|| format!("{} holds no vmlinuz: delete it and run setup again", root.display()))?;
        Ok(Self { release, image, modules })
    }
}

/// Makes /lib and /usr/lib the same directory, as they are on an installed system.
fn unify_lib(root: &Path) -> Result<()> {
    let (lib, usr_lib) = (root.join("lib"), root.join("usr/lib"));
    match (lib.join("modules").exists(), usr_lib.join("modules").exists()) {
        (false, true) if !lib.exists() => symlink("usr/lib", &lib).context("cannot link lib"),
        (true, false) => Ok(()),
        _ => bail!("the kernel package has an unknown layout in {}", root.display()),
    }
}

/// The numbers of the version in a package name, an order for versions; `-cloud-amd64` is no part of it.
pub(crate) fn digits(name: &str) -> Vec<u32> {
    let version = name.split("-cloud").next().unwrap_or(name);
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|run| run.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_in_package_names_are_ordered_as_numbers() {
        let mut names = [
            "linux-image-6.12.90+deb12.1-cloud-amd64",
            "linux-image-6.12.9+deb12-cloud-amd64",
            "linux-image-6.12.90+deb12-cloud-amd64",
        ];
        names.sort_by_key(|name| digits(name));
        assert_eq!(names[0], "linux-image-6.12.9+deb12-cloud-amd64");
        assert_eq!(names[2], "linux-image-6.12.90+deb12.1-cloud-amd64");
        assert!(digits(names[0]).starts_with(&digits("6.12")));
    }
}
