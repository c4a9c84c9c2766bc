//! A dynamically linked program of this machine together with all it needs to run in a lab.
//!
//! Godwit's own binaries are static. Programs of the distribution (`ip`, `tc`, a QEMU to compare with) are not, so their
//! libraries and loader go into the lab at the paths they have here, as `ldd` lists them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The program, its shared libraries and its loader: all as absolute paths of this machine.
pub fn program_with_libraries(program: &Path) -> Result<Vec<PathBuf>> {
    ensure!(program.is_absolute(), "{} is not an absolute path", program.display());
    ensure!(program.is_file(), "There is no program {}", program.display());
    let output = Command::new("ldd").arg(program).output().context("Cannot run ldd (package libc-bin)")?;
    let listing = String::from_utf8_lossy(&output.stdout);
    let mut paths = vec![program.to_path_buf()];
    // A static program, too, makes ldd fail, with this text on standard error.
    if output.status.success() {
        paths.extend(libraries(&listing).with_context(|| format!("Libraries of {}", program.display()))?);
    } else {
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(complaint.contains("not a dynamic executable"), "ldd {}: {}", program.display(), complaint.trim());
    }
    Ok(paths)
}

/// The paths in a listing of ldd: `name => /path (0x…)`, `/path (0x…)`, or `linux-vdso.so.1 (0x…)`, which is no file.
fn libraries(listing: &str) -> Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for line in listing.lines().map(str::trim) {
        ensure!(!line.ends_with("not found"), "{line}");
        let path = line.split_once(" => ").map_or(line, |(_, path)| path);
        let path = path.rsplit_once(" (0x").map_or(path, |(path, _)| path);
        if path.starts_with('/') {
            paths.push(PathBuf::from(path));
        }
    }
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_line_is_understood() {
        let listing = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\
                       \t/lib64/ld-linux-x86-64.so.2 (0x00007f)\n\tstatically linked\n";
        let expected = ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from);
        assert_eq!(libraries(listing).unwrap(), expected);
    }

    #[test]
    fn a_missing_library_is_named() {
        let error = libraries("\tlibodd.so.1 => not found\n").unwrap_err();
        assert!(error.to_string().contains("libodd.so.1"));
    }

    #[test]
    fn a_program_of_this_machine_brings_its_loader() {
        let paths = program_with_libraries(Path::new("/usr/bin/ls")).unwrap();
        assert!(paths.iter().any(|path| path.to_string_lossy().contains("ld-linux")), "{paths:?}");
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        let error = program_with_libraries(Path::new("/nonexistent/program")).unwrap_err();
        assert_eq!(error.to_string(), "There is no program /nonexistent/program");
    }
}
