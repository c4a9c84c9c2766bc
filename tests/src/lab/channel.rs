//! The harness's end of the agent's port: sends frames, and gives each command the frames that belong to it.
//!
//! One reader thread per lab. When the machine goes, every command that still waits learns it by its closed channel.

use std::collections::HashMap;
use std::process::{ChildStdin, ChildStdout};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result};

use super::wire::{End, Frame, Kind, Ready};

/// What a command tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It wrote to its standard output, or to its terminal.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It is over; nothing follows.
    Ended(End),
}

/// The commands that run, by number. `None` once the machine has gone.
type Listeners = Option<HashMap<u32, Sender<Event>>>;

/// The port, shared by the lab and its commands.
#[derive(Debug)]
pub(super) struct Channel {
    writer: Mutex<ChildStdin>,
    listeners: Arc<Mutex<Listeners>>,
    last: Mutex<u32>,
}

impl Channel {
    /// Starts to listen; the receiver gets the machine's greeting, or closes when there is none.
    pub(super) fn open(writer: ChildStdin, reader: ChildStdout) -> Result<(Arc<Self>, Receiver<Ready>)> {
        let listeners = Arc::new(Mutex::new(Some(HashMap::new())));
        let (greeting, greeted) = mpsc::channel();
        let told = listeners.clone();
        thread::Builder::new().name("lab-reader".to_owned()).spawn(move || {
            listen(reader, &greeting, &told);
            *lock(&told) = None;
        })?;
        Ok((Arc::new(Self { writer: Mutex::new(writer), listeners, last: Mutex::new(0) }), greeted))
    }

    /// A number for a new command, and where its events arrive.
    pub(super) fn register(&self) -> Result<(u32, Receiver<Event>)> {
        let mut last = lock(&self.last);
        *last += 1;
        let (sender, events) = mpsc::channel();
        lock(&self.listeners).as_mut().context("The lab is gone")?.insert(*last, sender);
        Ok((*last, events))
    }

    /// Sends a frame.
    pub(super) fn send(&self, frame: &Frame) -> Result<()> {
        frame.write(&mut *lock(&self.writer)).context("Cannot reach the lab's agent")
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads until the port closes, which it does when QEMU ends.
fn listen(mut reader: ChildStdout, greeting: &Sender<Ready>, listeners: &Mutex<Listeners>) {
    while let Ok(frame) = Frame::read(&mut reader) {
        let number = frame.command;
        let event = match frame.kind {
            Kind::Ready => match frame.parse() {
                Ok(ready) => {
                    // The builder may have given up waiting.
                    drop(greeting.send(ready));
                    continue;
                }
                Err(_) => return,
            },
            Kind::Stdout => Event::Stdout(frame.body),
            Kind::Stderr => Event::Stderr(frame.body),
            Kind::Ended => match frame.parse() {
                Ok(end) => Event::Ended(end),
                Err(_) => return,
            },
            Kind::Start | Kind::Input | Kind::EndOfInput | Kind::Kill | Kind::Resize | Kind::PowerOff => return,
        };
        let mut listeners = lock(listeners);
        let Some(listeners) = listeners.as_mut() else { return };
        let last = matches!(event, Event::Ended(_));
        let heard = listeners.get(&number).is_some_and(|listener| listener.send(event).is_ok());
        if last || !heard {
            listeners.remove(&number);
        }
    }
}
