//! Telling the network that a guest lives here now, after a move.
//!
//! Switches learn where an address is from the frames that it sends. The device sends some in the guest's name at once
//! (reverse ARP requests, RFC 903, which nobody answers and which need no IP address), and again with growing pauses for
//! the case that a switch port was not forwarding yet. The guest is asked to announce itself too, by
//! VIRTIO_NET_S_ANNOUNCE: only it knows its IP addresses. The device's worker drives this.

use super::mac::MacAddress;
use super::port::HEADER;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};
use vmm_sys_util::timerfd::TimerFd;

/// How long one frame is without its checksum, the shortest that Ethernet allows (IEEE 802.3, 3.2.8).
const FRAME: usize = 60;

/// How many times the device announces the guest.
pub(super) const ROUNDS: u32 = 5;

/// A virtio-net header, all zero, and a reverse ARP request from `mac` to everyone.
pub(super) fn rarp(mac: MacAddress) -> [u8; HEADER + FRAME] {
    let mac = mac.octets();
    let fields: [&[u8]; 12] = [
        &[0; HEADER],
        &[0xff; 6],    // to everyone
        &mac,          // from the guest
        &[0x80, 0x35], // reverse ARP
        &[0, 1],       // over Ethernet
        &[8, 0],       // for IPv4
        &[6, 4],       // address lengths
        &[0, 3],       // request reverse
        &mac,          // the sender's hardware address
        &[0; 4],       // and protocol address, which is unknown
        &mac,          // the hardware address that is asked for
        &[0; 4],       // and its protocol address
    ];
    let mut frame = [0; HEADER + FRAME];
    let mut rest = &mut frame[..];
    for field in fields {
        let (place, after) = rest.split_at_mut(field.len());
        place.copy_from_slice(field);
        rest = after;
    }
    frame
}

/// How long to wait after the announcement `round` (from 0) for the next, or `None` after the last.
pub(super) fn pause_after(round: u32) -> Option<Duration> {
    (round + 1 < ROUNDS).then(|| Duration::from_millis(50 + 100 * u64::from(round)))
}

/// Sends the announcements of one NIC.
#[derive(Debug)]
pub(super) struct Announcer {
    timer: TimerFd,
    next: Option<Next>,
}

#[derive(Debug, Clone, Copy)]
struct Next {
    round: u32,
    due: Instant,
}

impl Announcer {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self { timer: TimerFd::new()?, next: None })
    }

    /// What becomes ready when the next announcement is due. It is polled for edges and never read.
    pub(super) fn timer(&self) -> RawFd {
        self.timer.as_raw_fd()
    }

    /// Announces `mac` now, and again later.
    pub(super) fn begin(&mut self, port: &File, mac: MacAddress) {
        self.send(port, mac, 0);
    }

    /// Goes on if the next announcement is due.
    pub(super) fn go_on(&mut self, port: &File, mac: MacAddress) {
        if let Some(Next { round, due }) = self.next
            && due <= Instant::now()
        {
            self.send(port, mac, round);
        }
    }

    fn send(&mut self, mut port: &File, mac: MacAddress, round: u32) {
        if let Err(error) = port.write(&rarp(mac)) {
            tracing::warn!(%error, %mac, "The network could not be told where the guest is");
        }
        self.next = pause_after(round).map(|pause| Next { round: round + 1, due: Instant::now() + pause });
        if let Some(pause) = pause_after(round)
            && let Err(error) = self.timer.reset(pause, None)
        {
            tracing::warn!(%error, "A NIC announces itself only once");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_frame() {
        let frame = rarp("52:54:00:12:34:56".parse().unwrap());
        let golden = b"\0\0\0\0\0\0\0\0\0\0\0\0\
            \xff\xff\xff\xff\xff\xff\x52\x54\x00\x12\x34\x56\x80\x35\
            \x00\x01\x08\x00\x06\x04\x00\x03\
            \x52\x54\x00\x12\x34\x56\x00\x00\x00\x00\
            \x52\x54\x00\x12\x34\x56\x00\x00\x00\x00\
            \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        assert_eq!(&frame, golden);
    }

    #[test]
    fn pauses_grow_and_end() {
        let pauses: Vec<_> = (0..).map_while(pause_after).map(|pause| pause.as_millis()).collect();
        assert_eq!(pauses, [50, 150, 250, 350]);
        assert_eq!(pause_after(u32::MAX - 1), None);
    }
}
