//! The control queue: what the driver asks of the NIC beside moving frames (virtio 1.3, 5.1.6.5).

use super::CONTROL;
use super::mac::MacAddress;
use crate::virtio::queue::{BrokenRing, copy_from, copy_to, total_bytes};
use crate::virtio::serve::serve;
use crate::virtio::{Io, Progress};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
};

/// `VIRTIO_NET_OK`, as the byte that it is in an answer.
const OK: u8 = 0;
/// `VIRTIO_NET_ERR`.
const REFUSED: u8 = 1;

/// The longest command that is understood: class, command, and an address. A longer one is not understood either.
const LONGEST: usize = 2 + 6;

/// What a driver may ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    /// It has announced itself.
    AnnounceAck,
    /// It has another address from now on.
    SetMac(MacAddress),
}

/// Understands the readable part of a request; `None` if there is nothing such.
fn parse(request: &[u8]) -> Option<Command> {
    let (class_and_command, argument) = request.split_at_checked(2)?;
    match (u32::from(class_and_command[0]), u32::from(class_and_command[1])) {
        (VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK) => Some(Command::AnnounceAck),
        (VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET) => {
            MacAddress::unicast(argument.try_into().ok()?).ok().map(Command::SetMac)
        }
        _ => None,
    }
}

/// Answers what the driver asks, at most as many commands as the queue is long; `obey` carries each out.
pub(super) fn answer(io: &mut Io, mut obey: impl FnMut(Command)) -> Result<Progress, BrokenRing> {
    serve(io, CONTROL, |ram, chain| {
        if chain.writable().is_empty() {
            let head = chain.head();
            return Err(BrokenRing::Incomplete { queue: CONTROL, head, what: "room for the answer to a command" });
        }
        let mut request = [0; LONGEST];
        let length = copy_from(ram, chain.readable(), 0, &mut request);
        let is_whole = length == total_bytes(chain.readable());
        let answer = match parse(&request[..length]).filter(|_| is_whole) {
            Some(command) => {
                obey(command);
                OK
            }
            None => REFUSED,
        };
        // One byte fits, for no buffer is empty.
        let _ = copy_to(ram, chain.writable(), 0, &[answer]);
        Ok(1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_commands_are_understood() {
        assert_eq!(parse(&[3, 0]), Some(Command::AnnounceAck));
        let mac = MacAddress::unicast([2, 0, 0, 0, 0, 9]).unwrap();
        assert_eq!(parse(&[1, 1, 2, 0, 0, 0, 0, 9]), Some(Command::SetMac(mac)));
    }

    #[test]
    fn others_are_not() {
        let requests: [&[u8]; 9] = [
            &[],
            &[3],
            &[3, 1],
            &[0, 0, 1],
            &[4, 0, 1, 0],
            &[1, 1],
            &[1, 1, 2, 0, 0, 0, 0],
            &[1, 1, 3, 0, 0, 0, 0, 9],
            &[1, 1, 0, 0, 0, 0, 0, 0],
        ];
        for request in requests {
            assert_eq!(parse(request), None, "{request:?}");
        }
    }
}
