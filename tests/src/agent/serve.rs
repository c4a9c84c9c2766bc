//! The server of a lab: reads frames from the virtio-serial port and acts on them until the port or the machine goes.

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};

use super::boot::await_path;
use super::program::Program;
use crate::lab::wire::{Frame, Kind, PORT, Ready};

/// The writing side of the port, shared by the threads of all commands.
#[derive(Debug, Clone)]
pub(super) struct Port(Arc<Mutex<File>>);

impl Port {
    /// Sends a frame. A port that fails has lost its harness, and with it the reason to go on.
    pub(super) fn send(&self, frame: &Frame) {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = frame.write(&mut *file) {
            println!("The lab's agent cannot write to its port: {error}");
            std::process::exit(1);
        }
    }
}

/// Serves until the harness says power off.
pub(super) fn serve(problems: Vec<String>) -> Result<()> {
    let path = await_path("the agent's port", port_device)?;
    let mut reader = File::options().read(true).write(true).open(&path).context("open the port")?;
    let port = Port(Arc::new(Mutex::new(reader.try_clone()?)));
    let ready = Ready { kvm: Path::new("/dev/kvm").exists(), problems };
    port.send(&Frame::json(Kind::Ready, 0, &ready)?);
    let mut programs: HashMap<u32, Program> = HashMap::new();
    loop {
        let frame = Frame::read(&mut reader).context("read the port")?;
        programs.retain(|_, program| !program.is_over());
        let program = programs.get(&frame.command);
        match (frame.kind, program) {
            (Kind::Start, _) => {
                if let Some(program) = Program::start(frame.command, &frame.parse()?, &port) {
                    programs.insert(frame.command, program);
                }
            }
            (Kind::PowerOff, _) => return Ok(()),
            (Kind::Input, Some(program)) => program.input(frame.body),
            (Kind::EndOfInput, Some(program)) => program.input(Vec::new()),
            (Kind::Kill, Some(program)) => program.kill(),
            (Kind::Resize, Some(program)) => program.resize(frame.parse()?),
            // A command that ended before the harness knew of it.
            (Kind::Input | Kind::EndOfInput | Kind::Kill | Kind::Resize, None) => {}
            (Kind::Ready | Kind::Stdout | Kind::Stderr | Kind::Ended, _) => {
                println!("The lab's agent was sent {:?}, which only it may send", frame.kind);
            }
        }
    }
}

/// The device of the agent's port, by the name that QEMU gave it.
fn port_device() -> Option<PathBuf> {
    let ports = fs::read_dir("/sys/class/virtio-ports").ok()?.flatten();
    let port = ports
        .into_iter()
        .find(|port| fs::read_to_string(port.path().join("name")).is_ok_and(|name| name.trim() == PORT))?;
    Some(Path::new("/dev").join(port.file_name())).filter(|device| device.exists())
}
