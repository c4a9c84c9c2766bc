//! `cargo xtask image`: makes a guest image and puts it into a folder under plain names, for `godwit` by hand.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use guest_images::{DEFAULT_CACHE, Images};

use crate::packages;
use crate::workspace::{binaries, build, root};

/// Which image and where to.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The image.
    image: Name,
    /// The folder for its files, which is made if it is not there.
    #[arg(long, default_value = ".")]
    into: PathBuf,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Name {
    /// Debian's kernel and a small initramfs with busybox and the verifier: vmlinux, initramfs
    Tiny,
    /// Debian with systemd, sshd and PostgreSQL on a disk; needs root: vmlinux, initramfs, debian.img, ssh-key
    Debian,
    /// The micro guest: micro.elf
    Micro,
}

/// Makes the image and tells its files.
pub(crate) fn image(options: &Options) -> Result<ExitCode> {
    packages::ensure(&packages::for_test())?;
    build(&["--package", "verifier"])?;
    let images = Images::open(&root().join(DEFAULT_CACHE))?;
    let verifier = binaries()?.join("verifier");
    fs::create_dir_all(&options.into).with_context(|| format!("Cannot make {}", options.into.display()))?;
    let files = match options.image {
        Name::Micro => vec![("micro.elf", images.micro()?)],
        Name::Tiny => {
            let tiny = images.tiny(&verifier)?;
            vec![("vmlinux", tiny.kernel.vmlinux()), ("initramfs", tiny.initramfs)]
        }
        Name::Debian => {
            let debian = images.debian(&verifier)?;
            vec![
                ("vmlinux", debian.boot.kernel.vmlinux()),
                ("initramfs", debian.boot.initramfs),
                ("debian.img", debian.disk),
                ("ssh-key", debian.ssh_key),
            ]
        }
    };
    for (name, file) in files {
        let copy = options.into.join(name);
        copy_sparse(&file, &copy)?;
        println!("{}", copy.display());
    }
    Ok(ExitCode::SUCCESS)
}

fn copy_sparse(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").args(["--sparse=always", "--preserve=mode", "--"]).args([from, to]).status()?;
    ensure!(status.success(), "Cannot copy {} to {}", from.display(), to.display());
    Ok(())
}
