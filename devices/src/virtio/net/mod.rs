//! virtio-net (virtio 1.3, 5.1): a NIC with one pair of queues on a tap, its frames moved by this process or by vhost-net.
//!
//! ```text
//! driver's buffers <-- receive --- Port (tap) <-- transmit --- driver's buffers       (or both by vhost-net)
//! control queue, announcements after a move: always here
//! ```
//!
//! `vmm` opens the [`Tap`] and perhaps [`Vhost`] and makes the [`Net`] of them; the transport and its worker do the rest.
//! A busy NIC has a worker of its own.

mod announce;
mod control;
mod counters;
mod dirty_log;
mod mac;
mod port;
mod receive;
mod saved;
mod tap;
mod transmit;
mod vhost;

pub use counters::{NetCounters, NetCounts};
pub use mac::{MacAddress, MacError};
pub use port::{HEADER, MAX_FRAME, Offloads, Port};
pub use saved::NetSavedV1;
pub use tap::{Tap, TapError};
pub use vhost::{Vhost, VhostError, VhostMode};

use super::{Fault, Io, MmioSavedV1, Progress, QueueOwner, RestoreError, Source, VirtioDevice, read_bytes};
use crate::Gpa;
use announce::Announcer;
use control::Command;
use receive::Receiver;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS,
};

/// Index of the receive queue (virtio 1.3, 5.1.2).
const RECEIVE: usize = 0;
/// Index of the transmit queue.
const TRANSMIT: usize = 1;
/// Index of the control queue, as there is one pair of the others.
const CONTROL: usize = 2;

const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// `VIRTIO_NET_S_LINK_UP` (virtio 1.3, 5.1.4).
const LINK_UP: u16 = 1;
/// `VIRTIO_NET_S_ANNOUNCE`.
const ANNOUNCE: u16 = 2;

/// What the device has whatever the port can do.
const OWN_FEATURES: [u32; 6] = [
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// What the driver may leave to the port, and what it may take from it, by what the port can do.
const OFFLOADS: [(Offloads, u32, u32); 5] = [
    (Offloads::CHECKSUM, VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM),
    (Offloads::TSO4, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_GUEST_TSO4),
    (Offloads::TSO6, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_GUEST_TSO6),
    (Offloads::ECN, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_GUEST_ECN),
    (Offloads::UFO, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO),
];

const PORT_READY: u32 = 0;
const ANNOUNCEMENT_DUE: u32 = 1;
const VHOST_CALLS: u32 = 2;

/// What a NIC needs of the host.
#[derive(Debug)]
pub struct NetParts {
    /// Where its frames go.
    pub port: Box<dyn Port>,
    /// Who moves them, if not this process.
    pub vhost: Option<Vhost>,
}

/// A NIC.
#[derive(Debug)]
pub struct Net {
    // Dropped before the port that it uses.
    vhost: Option<Vhost>,
    port: Box<dyn Port>,
    permanent_mac: MacAddress,
    mac: MacAddress,
    guest_announces: bool,
    counters: Arc<NetCounters>,
    receiver: Receiver,
    announcer: Announcer,
}

impl Net {
    /// A NIC with the address `mac`.
    ///
    /// # Errors
    /// The host's refusal of a timer.
    pub fn new(mac: MacAddress, parts: NetParts) -> io::Result<Self> {
        let NetParts { port, vhost } = parts;
        let counters = Arc::<NetCounters>::default();
        Ok(Self {
            vhost,
            port,
            permanent_mac: mac,
            mac,
            guest_announces: false,
            receiver: Receiver::new(Arc::clone(&counters)),
            counters,
            announcer: Announcer::new()?,
        })
    }

    /// What went through it since it was made, if this process moves its frames; `None` if vhost-net does, which does not
    /// count them.
    #[must_use]
    pub fn counters(&self) -> Option<&Arc<NetCounters>> {
        if self.vhost.is_none() { Some(&self.counters) } else { None }
    }

    /// Which unfinished frames the driver takes, as it said by `features`.
    fn taken_offloads(io: &Io) -> Offloads {
        if !io.has(VIRTIO_NET_F_GUEST_CSUM) {
            // All others need it (virtio 1.3, 5.1.3.1), and the tap refuses them without it.
            return Offloads::NONE;
        }
        let taken = OFFLOADS.into_iter().filter(|&(_, _, guest)| io.has(guest));
        taken.fold(Offloads::NONE, |all, (offload, ..)| all | offload)
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::AnnounceAck => self.guest_announces = false,
            Command::SetMac(mac) => self.mac = mac,
        }
    }

    fn receive(&mut self, io: &mut Io) -> Result<Progress, Fault> {
        Ok(self.receiver.receive(io, self.port.file())?)
    }

    fn on_port(&mut self, io: &mut Io) -> Result<(), Fault> {
        if self.receive(io)? == Progress::More {
            // Others have their turn before the rest is received, as though the driver had kicked.
            io.queues[RECEIVE].kick();
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    type Saved = NetSavedV1;
    type Parts = NetParts;

    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        let own = OWN_FEATURES.into_iter().fold(0, |set, bit| set | 1 << bit);
        let able = OFFLOADS.into_iter().filter(|&(offload, ..)| self.port.offloads().contains(offload));
        able.fold(own, |set, (_, host, guest)| set | 1 << host | 1 << guest)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn queue_owner(&self, queue: usize) -> QueueOwner {
        if self.vhost.is_some() && queue != CONTROL { QueueOwner::Accelerator } else { QueueOwner::Worker }
    }

    fn sources(&self) -> Vec<Source> {
        let frames = match &self.vhost {
            Some(vhost) => Source { token: VHOST_CALLS, fd: vhost.call() },
            None => Source { token: PORT_READY, fd: self.port.file().as_raw_fd() },
        };
        vec![frames, Source { token: ANNOUNCEMENT_DUE, fd: self.announcer.timer() }]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = LINK_UP | if self.guest_announces { ANNOUNCE } else { 0 };
        // `struct virtio_net_config` (virtio 1.3, 5.1.4) up to the number of queue pairs.
        let mut config = [0; 10];
        config[..6].copy_from_slice(&self.mac.octets());
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..].copy_from_slice(&1_u16.to_le_bytes());
        read_bytes(&config, offset, data);
    }

    fn write_config(&mut self, _: &mut Io, _: u64, _: &[u8]) {
        // All of it is read-only since version 1.
    }

    fn start(&mut self, io: &mut Io) -> Result<(), Fault> {
        let refused = |source| Fault::Host { what: "The port does not take the driver's offloads", source };
        self.port.set_offloads(Self::taken_offloads(io)).map_err(refused)?;
        match &mut self.vhost {
            Some(vhost) => vhost.start(io, self.port.file()),
            None => Ok(()),
        }
    }

    fn process(&mut self, io: &mut Io, queue: usize) -> Result<Progress, Fault> {
        match queue {
            RECEIVE => self.receive(io),
            TRANSMIT => Ok(transmit::transmit(io, self.port.file(), &self.counters)?),
            CONTROL => Ok(control::answer(io, |command| self.obey(command))?),
            _ => Ok(Progress::Idle),
        }
    }

    fn on_source(&mut self, io: &mut Io, token: u32) -> Result<(), Fault> {
        match token {
            PORT_READY => self.on_port(io)?,
            ANNOUNCEMENT_DUE => self.announcer.go_on(self.port.file(), self.mac),
            VHOST_CALLS => self.vhost.iter().for_each(|vhost| vhost.on_call(io)),
            _ => {}
        }
        Ok(())
    }

    fn stop(&mut self, io: &mut Io, _: Duration) -> Result<(), usize> {
        match &mut self.vhost {
            Some(vhost) => vhost.stop(io),
            None => Ok(()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {
        self.mac = self.permanent_mac;
        self.guest_announces = false;
        self.receiver.clear();
    }

    fn release(&mut self) {
        // The other end has a tap of its own.
    }

    fn reacquire(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn announce(&mut self, io: &mut Io) {
        self.announcer.begin(self.port.file(), self.mac);
        if io.has(VIRTIO_NET_F_GUEST_ANNOUNCE) {
            self.guest_announces = true;
            io.interrupt.config_changed();
        }
    }

    fn log_dirty(&mut self, io: &mut Io, on: bool) -> io::Result<()> {
        match &mut self.vhost {
            Some(vhost) => vhost.log_dirty(io, on),
            None => Ok(()),
        }
    }

    fn harvest_dirty(&mut self, mark: &mut dyn FnMut(Gpa)) {
        if let Some(vhost) = &self.vhost {
            vhost.harvest_dirty(mark);
        }
    }

    fn save(&self, transport: MmioSavedV1) -> NetSavedV1 {
        let Self { vhost: _, port: _, permanent_mac, mac, guest_announces, counters: _, receiver: _, announcer: _ } =
            self;
        NetSavedV1 {
            transport,
            permanent_mac: permanent_mac.octets(),
            mac: mac.octets(),
            guest_announces: *guest_announces,
        }
    }

    fn restore(id: &str, saved: NetSavedV1, parts: NetParts) -> Result<(Self, MmioSavedV1), RestoreError> {
        let NetSavedV1 { transport, permanent_mac, mac, guest_announces } = saved;
        let unicast = |field, octets: [u8; 6]| {
            let [a, b, c, d, e, f] = octets;
            let value = u64::from_be_bytes([0, 0, a, b, c, d, e, f]);
            MacAddress::unicast(octets).map_err(|_| RestoreError::BadField { id: id.to_owned(), field, value })
        };
        let refused = |error: io::Error| RestoreError::Host { id: id.to_owned(), reason: error.to_string() };
        let mut net = Self::new(unicast("permanent MAC address", permanent_mac)?, parts).map_err(refused)?;
        net.mac = unicast("MAC address", mac)?;
        net.guest_announces = guest_announces;
        Ok((net, transport))
    }
}

#[cfg(test)]
mod tests;
