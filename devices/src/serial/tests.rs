//! The port as a driver, a console and the machine see it.

use super::*;
use crate::virtio::testing::wait_until;
use crate::worker::Worker;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use tempfile::TempDir;

const DATA: u64 = 0;
const INTERRUPT_ENABLE: u64 = 1;
const INTERRUPT_IDENTIFICATION: u64 = 2;
const LINE_STATUS: u64 = 5;

#[derive(Debug, Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct Rig {
    port: SerialPort,
    irq: EventFd,
    screen: Screen,
}

fn parts(sink: Box<dyn Write + Send>) -> (SerialParts, EventFd) {
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    (SerialParts { id: "com1".into(), irq: irq.try_clone().unwrap(), sink }, irq)
}

impl Rig {
    fn new() -> Self {
        let screen = Screen::default();
        let (parts, irq) = parts(Box::new(screen.clone()));
        Self { port: SerialPort::new(parts).unwrap(), irq, screen }
    }

    fn moved(&self) -> Self {
        self.port.quiesce(Duration::ZERO).unwrap();
        let mut state = SavedState::new();
        self.port.save(&mut state).unwrap();
        let screen = Screen::default();
        let (parts, irq) = parts(Box::new(screen.clone()));
        let port = SerialPort::new(parts).unwrap();
        port.restore(&mut state).unwrap();
        Self { port, irq, screen }
    }

    fn read(&self, register: u64) -> u8 {
        let mut data = [0];
        self.port.read(register, &mut data);
        data[0]
    }

    fn write(&self, register: u64, value: u8) {
        self.port.write(register, &[value]);
    }

    fn interrupted(&self) -> bool {
        self.irq.read().is_ok()
    }

    fn drain(&self) -> Vec<u8> {
        std::iter::from_fn(|| (self.read(LINE_STATUS) & 1 != 0).then(|| self.read(DATA))).collect()
    }
}

#[test]
fn output_reaches_the_sink_byte_by_byte() {
    let rig = Rig::new();
    for byte in *b"ready" {
        rig.write(DATA, byte);
    }
    assert_eq!(*rig.screen.0.lock().unwrap(), b"ready");
    assert_eq!(rig.read(LINE_STATUS) & 0x60, 0x60, "the transmitter is empty always");
    rig.port.write(u64::MAX, b"x");
    rig.port.read(1 << 40, &mut [0]);
}

#[test]
fn input_interrupts_and_is_read() {
    let rig = Rig::new();
    rig.write(INTERRUPT_ENABLE, 1);
    assert_eq!(rig.port.input().offer(b"ls\n"), 3);
    assert!(rig.interrupted());
    assert_eq!(rig.read(INTERRUPT_IDENTIFICATION) & 0xf, 4);
    assert_eq!(rig.drain(), b"ls\n");
}

#[test]
fn input_waits_for_room() {
    let rig = Rig::new();
    let input = rig.port.input();
    let text = [b'x'; 100];
    assert_eq!(input.offer(&text), 64);
    assert_eq!(input.offer(&text[64..]), 0);
    assert!(input.drained().read().is_err());
    assert_eq!(rig.drain().len(), 64);
    assert!(input.drained().read().is_ok(), "there is room again");
    assert_eq!(input.offer(&text[64..]), 36);
}

struct Broken(usize);
impl Write for Broken {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        self.0 += 1;
        Err(io::Error::from(if self.0 > 2 { io::ErrorKind::WouldBlock } else { io::ErrorKind::BrokenPipe }))
    }
    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

#[test]
fn a_broken_sink_costs_output_only() {
    let (parts, irq) = parts(Box::new(Broken(0)));
    let port = SerialPort::new(parts).unwrap();
    port.write(INTERRUPT_ENABLE, &[2]);
    irq.read().unwrap();
    for _ in 0..100 {
        port.read(INTERRUPT_IDENTIFICATION, &mut [0]);
        port.write(DATA, b"x");
        assert!(irq.read().is_ok(), "the transmitter is empty again");
    }
    assert!(format!("{port:?}").contains("has_warned: true"));
}

#[test]
fn a_pending_transmit_interrupt_moves() {
    let rig = Rig::new();
    rig.write(INTERRUPT_ENABLE, 2);
    assert!(rig.interrupted());
    let there = rig.moved();
    while there.interrupted() {}
    there.port.resume();
    assert!(there.interrupted(), "raised again once the chips can take it");
    assert_eq!(there.read(INTERRUPT_IDENTIFICATION) & 0xf, 2);
    there.port.quiesce(Duration::ZERO).unwrap();
    there.port.resume();
    assert!(!there.interrupted(), "nothing is pending any more");
}

#[test]
fn unread_input_and_registers_move() {
    let rig = Rig::new();
    rig.write(INTERRUPT_ENABLE, 5);
    rig.write(7, 0x5a);
    rig.port.input().offer(b"half a li");
    let there = rig.moved();
    assert_eq!(rig.port.input().offer(b"x"), 0, "what stands still takes no input");
    assert_eq!(there.port.input().offer(b"x"), 0);
    there.port.resume();
    assert!(there.port.input().drained().read().is_ok(), "the console is asked to offer again");
    assert_eq!(there.port.input().offer(b"ne"), 2);
    assert_eq!(there.drain(), b"half a line");
    assert_eq!((there.read(7), there.read(INTERRUPT_ENABLE)), (0x5a, 5));
}

#[test]
fn a_reset_keeps_the_console() {
    let rig = Rig::new();
    rig.write(7, 1);
    rig.port.input().offer(b"typed");
    rig.port.quiesce(Duration::ZERO).unwrap();
    rig.port.reset();
    rig.port.resume();
    assert_eq!((rig.read(7), rig.drain()), (0, Vec::new()));
    rig.write(DATA, b'!');
    assert_eq!(*rig.screen.0.lock().unwrap(), b"!");
    assert_eq!(rig.port.input().offer(b"on"), 2);
}

fn saved() -> SerialSavedV1 {
    SerialSavedV1 {
        divisor_low: 12,
        divisor_high: 0,
        interrupt_enable: 1,
        interrupt_identification: 4,
        line_control: 3,
        line_status: 0x61,
        modem_control: 8,
        modem_status: 0xb0,
        scratch: 0,
        input: b"hi".to_vec(),
    }
}

/// The bytes of the first released version: a change here is a break of the format.
#[test]
fn golden_bytes() {
    let rig = Rig::new();
    rig.write(INTERRUPT_ENABLE, 1);
    rig.port.input().offer(b"hi");
    let mut state = SavedState::new();
    rig.port.save(&mut state).unwrap();
    let golden =
        b"GWSTATE1\x01\0\0\0\x04\0com1\x0d\0serial-16550a\x01\0\x0c\0\0\0\x0c\0\x01\x04\x03\x61\x08\xb0\0\x02hi";
    assert_eq!(state.encode(), golden);
    assert_eq!(state.take::<SerialSavedV1>("com1").unwrap(), saved());
}

#[test]
fn impossible_registers_are_refused() {
    for (field, saved) in [
        ("enable", SerialSavedV1 { interrupt_enable: 0x10, ..saved() }),
        ("identification", SerialSavedV1 { interrupt_identification: 0x40, ..saved() }),
        ("input", SerialSavedV1 { input: vec![0; 65], ..saved() }),
    ] {
        let mut state = SavedState::new();
        state.put("com1", &saved).unwrap();
        let port = SerialPort::new(parts(Box::new(io::sink())).0).unwrap();
        let error = port.restore(&mut state).unwrap_err();
        assert!(error.to_string().contains(field) && error.to_string().contains("com1"), "{error}");
    }
}

/// A port on a console, with the far end of it connected.
fn connected(console: Console) -> (SerialPort, ConsoleLink) {
    let (sink, input) = console.split();
    let port = SerialPort::new(parts(sink).0).unwrap();
    let link = input.connect(port.input(), &Worker::spawn("console", || {}).unwrap()).unwrap();
    (port, link)
}

fn typed(port: &SerialPort) -> u8 {
    let mut data = [0];
    wait_until("input arrives", || {
        port.read(LINE_STATUS, &mut data);
        data[0] & 1 != 0
    });
    port.read(DATA, &mut data);
    data[0]
}

#[test]
fn a_file_keeps_what_was_there() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("console.log");
    for text in [b"first ", b"second"] {
        let (port, _link) = connected(Console::file(&path).unwrap());
        text.iter().for_each(|byte| port.write(DATA, &[*byte]));
    }
    assert_eq!(std::fs::read(&path).unwrap(), b"first second");
    let error = Console::file(&directory.path().join("no/such/directory")).unwrap_err();
    assert!(error.to_string().contains("no/such/directory"), "{error}");
}

#[test]
fn a_socket_serves_one_client_after_another() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("console.sock");
    let (port, link) = connected(Console::socket(&path).unwrap());
    port.write(DATA, b"?");
    let mut first = UnixStream::connect(&path).unwrap();
    first.write_all(b"a").unwrap();
    assert_eq!(typed(&port), b'a');
    let mut second = UnixStream::connect(&path).unwrap();
    second.write_all(b"b").unwrap();
    port.write(DATA, b"1");
    let mut data = [0];
    first.read_exact(&mut data).unwrap();
    assert_eq!(data, *b"1", "what was written before it came is lost");
    port.read(LINE_STATUS, &mut data);
    assert_eq!(data[0] & 1, 0, "the second client waits");
    drop(first);
    assert_eq!(typed(&port), b'b');
    port.write(DATA, b"2");
    second.read_exact(&mut data).unwrap();
    assert_eq!(data, *b"2");
    drop(link);
    assert!(!path.exists());
}

#[test]
fn a_lot_of_input_comes_whole_through_a_small_fifo() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("console.sock");
    let (port, _link) = connected(Console::socket(&path).unwrap());
    let text: Vec<u8> = (0..=255).cycle().take(5000).collect();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(&text).unwrap();
    drop(client);
    let back: Vec<u8> = text.iter().map(|_| typed(&port)).collect();
    assert_eq!(back, text);
}

#[test]
fn sockets_in_the_way() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("console.sock");
    let refusal = |path: &Path| Console::socket(path).unwrap_err();
    // A dead process leaves its socket.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    let console = Console::socket(&path).unwrap();
    assert!(matches!(refusal(&path), ConsoleError::InUse { .. }));
    drop(console);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(refusal(&path), ConsoleError::NotASocket { .. }));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    let long = directory.path().join("x".repeat(120));
    assert!(matches!(refusal(&long), ConsoleError::PathTooLong { .. }));
    assert!(matches!(refusal(&directory.path().join("no/such")), ConsoleError::Socket { .. }));
}

#[test]
fn keys_reach_the_guest_and_the_escape_reaches_us() {
    let (near, mut far) = UnixStream::pair().unwrap();
    let keyboard = std::fs::File::from(std::os::fd::OwnedFd::from(near));
    let rig = Rig::new();
    let (quit, quits) = std::sync::mpsc::channel();
    let pump = terminal::TerminalPump::new(keyboard, rig.port.input(), Box::new(move || quit.send(()).unwrap()));
    let worker = Worker::spawn("keyboard", || {}).unwrap();
    let attachment = worker.attach(Box::new(pump)).unwrap();
    far.write_all(&[b'k'; 200]).unwrap();
    assert!((0..200).all(|_| typed(&rig.port) == b'k'));
    far.write_all(b"\x01x").unwrap();
    quits.recv_timeout(Duration::from_secs(10)).unwrap();
    far.write_all(b"z").unwrap();
    assert_eq!(typed(&rig.port), b'z');
    drop(far);
    drop(attachment);
}

#[test]
fn keys_may_come_from_a_file() {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&[b'f'; 100]).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let rig = Rig::new();
    let pump = terminal::TerminalPump::new(file, rig.port.input(), Box::new(|| {}));
    let worker = Worker::spawn("keyboard", || {}).unwrap();
    let _attachment = worker.attach(Box::new(pump)).unwrap();
    assert!((0..100).all(|_| typed(&rig.port) == b'f'));
}
