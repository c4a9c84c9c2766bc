//! A guest under QEMU's `microvm`, with its serial port as our pipes.
//!
//! The recipes' own tests use it, so that an image is known to be good before Godwit meets it.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A running QEMU; it dies with this value.
pub(crate) struct Guest {
    qemu: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Guest {
    pub(crate) fn start(arguments: &[&str]) -> Self {
        // A guest that hangs must not hang the test: `timeout` ends QEMU, and the pipe ends with it.
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", "120", "qemu-system-x86_64", "-nographic", "-no-reboot", "-net", "none"]);
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut qemu = command.spawn().expect("`timeout` of coreutils starts");
        let (input, output) = (qemu.stdin.take().unwrap(), qemu.stdout.take().unwrap());
        Self { qemu, input, lines: BufReader::new(output).lines() }
    }

    /// The next line of the serial port.
    pub(crate) fn line(&mut self) -> String {
        let line = self.lines.next().expect("the guest ended (is the Debian package `qemu-system-x86` installed?)");
        let line = line.unwrap();
        eprintln!("guest: {line}");
        line
    }

    /// Reads lines until one of them is what is wanted.
    pub(crate) fn until<T>(&mut self, mut wanted: impl FnMut(&str) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(&self.line()) {
                return found;
            }
        }
    }

    pub(crate) fn write(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).unwrap();
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // `timeout` hands the signal on to QEMU; a kill would orphan it.
        let _ = Command::new("kill").arg(self.qemu.id().to_string()).status();
        let _ = self.qemu.wait();
    }
}
