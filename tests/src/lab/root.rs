//! The root of a lab: a folder filled on this machine, turned into an ext4 image for one boot.
//!
//! Built by the lab's builder, read by the agent. Files are copied once and read lazily from the virtio disk, so a lab
//! may carry large things without paying for them at boot. The image belongs to one lab and is thrown away with it.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;

use super::libraries::program_with_libraries;

/// Folder of the kernel modules, in the initramfs and on the root; loaded in the order of their names.
pub(crate) const MODULES: &str = "/modules";

/// Serial number of the root disk.
pub(crate) const ROOT_SERIAL: &str = "lab-root";

/// Argument of the kernel, and with it a variable of process 1, that keeps what the lab runs off the first processor.
pub(crate) const BYSTANDER: &str = "lab_bystander";

/// Lists the further disks: per line a serial number and the path that the lab wants it at.
pub(crate) const DISKS_FILE: &str = "/etc/lab-disks";

/// Room for each file beside its content: its inode and the rounding to blocks.
const PER_FILE: u64 = 8 << 10;

/// What the file system itself needs.
const BASE: u64 = 16 << 20;

/// A root being filled.
#[derive(Debug)]
pub(super) struct RootTree {
    folder: TempDir,
    bytes: u64,
}

impl RootTree {
    /// The folders that every lab has, with one `/usr` as Debian has it, and busybox as its shell.
    pub(super) fn new(busybox: &Path) -> Result<Self> {
        let folder = TempDir::with_prefix("godwit-lab-root-").context("Cannot make a folder for the lab's root")?;
        let mut tree = Self { folder, bytes: 0 };
        for name in ["bin", "sbin", "lib", "lib64"] {
            fs::create_dir_all(tree.folder.path().join("usr").join(name))?;
            symlink(format!("usr/{name}"), tree.folder.path().join(name))?;
        }
        for name in ["dev", "etc", "lab", "proc", "root", "run", "sys", "tmp", "var", MODULES.trim_matches('/')] {
            fs::create_dir_all(tree.folder.path().join(name))?;
        }
        symlink("/run", tree.folder.path().join("var/run"))?;
        tree.add(busybox, "/bin/busybox")?;
        tree.applets(busybox)?;
        tree.write("/etc/passwd", "root:x:0:0:root:/root:/bin/sh\n", 0o644)?;
        tree.write("/etc/group", "root:x:0:\n", 0o644)?;
        tree.write("/etc/hosts", "127.0.0.1 localhost lab\n", 0o644)?;
        Ok(tree)
    }

    /// Links every applet of busybox, so that names like `sh` and `ping` are found.
    fn applets(&self, busybox: &Path) -> Result<()> {
        let output = Command::new(busybox).arg("--list").output().context("Cannot run busybox --list")?;
        for applet in String::from_utf8_lossy(&output.stdout).lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", self.folder.path().join("bin").join(applet))
                .with_context(|| format!("Cannot link the applet {applet}"))?;
        }
        Ok(())
    }

    /// Copies a file or folder of this machine to a path of the lab. A file that is there already is replaced.
    pub(super) fn add(&mut self, from: &Path, to: &str) -> Result<()> {
        let place = self.place(to)?;
        self.copy(from, &place).with_context(|| format!("Cannot put {} into the lab as {to}", from.display()))
    }

    /// Copies a program of this machine with its libraries, each to the path it has here.
    pub(super) fn add_program(&mut self, program: &Path) -> Result<()> {
        for path in program_with_libraries(program)? {
            let to = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
            self.add(&path, to)?;
        }
        Ok(())
    }

    /// Writes a file of the lab.
    pub(super) fn write(&mut self, to: &str, content: &str, mode: u32) -> Result<()> {
        let place = self.place(to)?;
        self.bytes += content.len() as u64 + PER_FILE;
        remove_if_there(&place)?;
        fs::write(&place, content).with_context(|| format!("Cannot write the lab's {to}"))?;
        Ok(fs::set_permissions(&place, fs::Permissions::from_mode(mode))?)
    }

    /// Makes a symbolic link of the lab.
    pub(super) fn link(&self, at: &str, target: &str) -> Result<()> {
        let place = self.place(at)?;
        remove_if_there(&place)?;
        symlink(target, &place).with_context(|| format!("Cannot make the lab's link {at}"))
    }

    /// Makes the ext4 image, with `free` bytes to spare for what the lab writes.
    pub(super) fn into_image(self, image: &Path, free: u64) -> Result<()> {
        let size = BASE + self.bytes + self.bytes / 16 + free;
        let output = Command::new("mke2fs")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal,^resize_inode"])
            .args(["-E", "lazy_itable_init=1,root_owner=0:0", "-d"])
            .args([self.folder.path(), image])
            .arg(format!("{}k", size.div_ceil(1024)))
            .output()
            .context("Cannot run mke2fs (package e2fsprogs)")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "mke2fs could not make the lab's root: {}", complaint.trim());
        Ok(())
    }

    /// Where a path of the lab lies in the folder; its parent is made.
    fn place(&self, to: &str) -> Result<PathBuf> {
        let inner = Path::new(to).strip_prefix("/").with_context(|| format!("{to:?} is not an absolute path"))?;
        let plain = inner.components().all(|part| matches!(part, Component::Normal(_)));
        ensure!(plain && inner.components().next().is_some(), "{to:?} is not a path for a file of the lab");
        let place = self.folder.path().join(inner);
        let parent = place.parent().context("a path of the lab has a parent")?;
        fs::create_dir_all(parent).with_context(|| format!("Cannot make the folder of the lab's {to}"))?;
        Ok(place)
    }

    fn copy(&mut self, from: &Path, to: &Path) -> Result<()> {
        let metadata = fs::metadata(from)?;
        self.bytes += PER_FILE;
        if metadata.is_dir() {
            fs::create_dir_all(to)?;
            for entry in fs::read_dir(from)? {
                let entry = entry?;
                self.copy(&entry.path(), &to.join(entry.file_name()))?;
            }
            return Ok(());
        }
        ensure!(metadata.is_file(), "{} is neither a file nor a folder", from.display());
        self.bytes += metadata.len();
        // Something may be there as a link to busybox; writing through the link would overwrite busybox.
        remove_if_there(to)?;
        fs::copy(from, to)?;
        Ok(())
    }
}

fn remove_if_there(path: &Path) -> Result<()> {
    if path.symlink_metadata().is_ok_and(|metadata| !metadata.is_dir()) {
        fs::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree() -> RootTree {
        RootTree::new(Path::new("/bin/busybox")).unwrap()
    }

    #[test]
    fn files_folders_and_programs_land_where_they_belong() {
        let mut tree = tree();
        let host = TempDir::new().unwrap();
        fs::create_dir(host.path().join("inner")).unwrap();
        fs::write(host.path().join("inner/file"), "content").unwrap();
        tree.add(host.path(), "/lab/data").unwrap();
        tree.add_program(Path::new("/usr/bin/ls")).unwrap();
        let root = tree.folder.path();
        assert_eq!(fs::read(root.join("lab/data/inner/file")).unwrap(), b"content");
        assert!(!root.join("usr/bin/ls").is_symlink(), "the program takes the place of busybox's applet");
        assert!(root.join("usr/bin/sh").is_symlink());
        assert!(fs::metadata(root.join("bin/busybox")).unwrap().len() > 100_000, "busybox was not written through");
        assert!(root.join("lib64/ld-linux-x86-64.so.2").exists());
    }

    #[test]
    fn paths_that_leave_the_lab_are_refused() {
        for path in ["relative", "/", "/../up", "/a/../../b"] {
            assert!(tree().add(Path::new("/bin/busybox"), path).is_err(), "{path}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = tree().add(Path::new("/nonexistent/file"), "/lab/file").unwrap_err();
        assert_eq!(error.to_string(), "Cannot put /nonexistent/file into the lab as /lab/file");
    }
}
