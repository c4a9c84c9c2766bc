//! Running the Debian tools that the recipes are made of.
//!
//! Every recipe calls its tools through here, so that a missing one is answered with the name of the package that has
//! it, and a failing one with what it printed.

use std::io;
use std::process::{Command, Output};

use anyhow::{Context, Result, bail};

/// Lines of a failing tool's output that are worth repeating.
const LAST_LINES: usize = 15;

/// Runs `command` to its end and gives its standard output.
pub(crate) fn run(command: &mut Command, package: &str) -> Result<String> {
    let output = start(command, package)?;
    if !output.status.success() {
        bail!("`{}` failed ({}):\n{}", words(command), output.status, last_words(&output));
    }
    String::from_utf8(output.stdout).with_context(|| format!("`{}` printed something else than UTF-8", words(command)))
}

fn start(command: &mut Command, package: &str) -> Result<Output> {
    // The recipes read what tools print, so the tools must not translate it.
    command.env("LC_ALL", "C.UTF-8").output().map_err(|error| {
        let program = command.get_program().to_string_lossy().into_owned();
        if error.kind() == io::ErrorKind::NotFound {
            anyhow::anyhow!("`{program}` is not on this machine; install the Debian package `{package}`")
        } else {
            anyhow::Error::new(error).context(format!("Cannot start `{program}`"))
        }
    })
}

fn words(command: &Command) -> String {
    let arguments = command.get_args().map(|argument| argument.to_string_lossy());
    [command.get_program().to_string_lossy()].into_iter().chain(arguments).collect::<Vec<_>>().join(" ")
}

fn last_words(output: &Output) -> String {
    let printed = [&output.stdout[..], &output.stderr[..]].concat();
    let printed = String::from_utf8_lossy(&printed);
    let lines: Vec<_> = printed.lines().collect();
    lines[lines.len().saturating_sub(LAST_LINES)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_comes_back() {
        assert_eq!(run(Command::new("echo").arg("x"), "coreutils").unwrap(), "x\n");
    }

    #[test]
    fn a_missing_tool_names_its_package() {
        let error = run(&mut Command::new("no-such-tool"), "the-package").unwrap_err();
        assert_eq!(
            error.to_string(),
            "`no-such-tool` is not on this machine; install the Debian package `the-package`"
        );
    }

    #[test]
    fn a_failing_tool_is_quoted() {
        let error = run(Command::new("sh").args(["-c", "echo why >&2; exit 3"]), "dash").unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("why"), "{error}");
    }

    #[test]
    fn a_tool_that_cannot_start_is_another_error() {
        let error = run(&mut Command::new("/etc/passwd"), "x").unwrap_err();
        assert_eq!(error.to_string(), "Cannot start `/etc/passwd`");
    }
}
