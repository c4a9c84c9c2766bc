//! A tap: the host's end of a guest's wire. Opened by the machine when a NIC is built, and handed to it as its port.
//!
//! A tap that is not there is created and brought up, and vanishes with this process; one that is there is attached to,
//! and stays as its administrator made it. Reads and writes carry a virtio-net header before each frame.

#![expect(unsafe_code, reason = "taps are set up by ioctls, which std does not wrap")]

use super::port::{HEADER, Offloads, Port};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixDatagram;
use thiserror::Error;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};

const TUN_PATH: &str = "/dev/net/tun";

/// Why a tap could not be opened.
#[derive(Debug, Error)]
pub enum TapError {
    /// The kernel takes no such name (`dev_valid_name` in net/core/dev.c).
    #[error("{name:?} cannot name a tap: use 1 to 15 ASCII characters without '/', ':', '%' and spaces")]
    BadName {
        /// The name.
        name: String,
    },
    /// The kernel has no TUN driver, or no device node for it.
    #[error("Tap {name} needs {TUN_PATH}, which cannot be opened: run `modprobe tun` as root")]
    NoDriver {
        /// The name.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The caller may not open or create it.
    #[error(
        "No permission to open tap {name}: run as root, or have root make it with \
         `ip tuntap add dev {name} mode tap user NAME`"
    )]
    NoPermission {
        /// The name.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// Someone else is attached to it.
    #[error("Tap {name} is taken by another process: end that process or choose another name")]
    Taken {
        /// The name.
        name: String,
    },
    /// The name belongs to a device of another kind.
    #[error("{name} is a network device, but not a tap with one queue: choose another name")]
    NotTap {
        /// The name.
        name: String,
    },
    /// One step of the set-up failed.
    #[error("Tap {name} could not be set up: {step} failed")]
    Setup {
        /// The name.
        name: String,
        /// The step.
        step: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// An open tap, not blocking. Nobody else can attach to it until this is dropped.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    offloads: Offloads,
}

impl Tap {
    /// Attaches to the tap `name`, which is created if there is none.
    ///
    /// # Errors
    /// [`TapError`], which says what to do.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let mut request = request(name)?;
        let setup = |step| move |source| TapError::Setup { name: name.to_owned(), step, source };
        let file = open_driver(name)?;
        // Any socket reaches the interface ioctls; one of the Unix domain needs no network.
        let socket = UnixDatagram::unbound().map_err(setup("making a socket"))?;
        let is_new = interface(&socket, libc::SIOCGIFINDEX, &mut request).is_err();
        attach(&file, name)?;
        // SAFETY: TUNSETVNETHDRSZ reads an int.
        check(unsafe { ioctl_with_ref(&file, libc::TUNSETVNETHDRSZ, &HEADER_SIZE) })
            .map_err(setup("setting the header size"))?;
        let offloads = probe(&file).map_err(setup("asking for offloads"))?;
        if is_new {
            interface(&socket, libc::SIOCGIFFLAGS, &mut request).map_err(setup("reading the flags"))?;
            // SAFETY: SIOCGIFFLAGS filled this member of the union.
            unsafe { request.ifr_ifru.ifru_flags |= UP };
            interface(&socket, libc::SIOCSIFFLAGS, &mut request).map_err(setup("bringing the link up"))?;
        }
        Ok(Self { file, name: name.to_owned(), offloads })
    }

    /// Another handle to the same tap, which stays until the last of them is dropped.
    ///
    /// # Errors
    /// If the host has no descriptor for it.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { file: self.file.try_clone()?, name: self.name.clone(), offloads: self.offloads })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Port for Tap {
    fn file(&self) -> &File {
        &self.file
    }

    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        set_offloads(&self.file, offloads)
    }
}

const HEADER_SIZE: libc::c_int = 12;
const _: () = assert!(HEADER == 12, "the tap and the queues agree on the header");

#[expect(clippy::cast_possible_truncation, reason = "IFF_UP is 1, and the kernel's field is a short")]
const UP: libc::c_short = libc::IFF_UP as libc::c_short;

#[expect(clippy::cast_possible_truncation, reason = "the flags are below 0x8000, and the kernel's field is a short")]
const TAP_FLAGS: libc::c_short = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;

/// An interface request for `name`, if that can be one.
fn request(name: &str) -> Result<libc::ifreq, TapError> {
    let good = |byte: u8| byte.is_ascii_graphic() && !b"/:%".contains(&byte);
    if name.is_empty() || name.len() >= libc::IFNAMSIZ || !name.bytes().all(good) || matches!(name, "." | "..") {
        return Err(TapError::BadName { name: name.to_owned() });
    }
    let mut ifr_name = [0; libc::IFNAMSIZ];
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    // The widest member goes first, so that the whole union is zeroed.
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_map: no_map() };
    Ok(libc::ifreq { ifr_name, ifr_ifru })
}

fn no_map() -> libc::__c_anonymous_ifru_map {
    libc::__c_anonymous_ifru_map { mem_start: 0, mem_end: 0, base_addr: 0, irq: 0, dma: 0, port: 0 }
}

fn open_driver(name: &str) -> Result<File, TapError> {
    let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN_PATH);
    options.map_err(|source| match source.kind() {
        io::ErrorKind::PermissionDenied => TapError::NoPermission { name: name.to_owned(), source },
        _ => TapError::NoDriver { name: name.to_owned(), source },
    })
}

/// Binds `file` to the tap `name`.
fn attach(file: &File, name: &str) -> Result<(), TapError> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = TAP_FLAGS;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`.
    let answer = check(unsafe { ioctl_with_mut_ref(file, libc::TUNSETIFF, &mut request) });
    let name = name.to_owned();
    answer.map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => TapError::Taken { name },
        Some(libc::EPERM | libc::EACCES) => TapError::NoPermission { name, source },
        Some(libc::EINVAL) => TapError::NotTap { name },
        _ => TapError::Setup { name, step: "attaching", source },
    })
}

/// What the kernel's tap can do: it refuses a set with a bit that it does not know.
fn probe(file: &File) -> io::Result<Offloads> {
    let most = Offloads::CHECKSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
    let able = [most | Offloads::UFO, most, Offloads::CHECKSUM];
    let able = able.into_iter().find(|&set| set_offloads(file, set).is_ok()).unwrap_or(Offloads::NONE);
    set_offloads(file, Offloads::NONE)?;
    Ok(able)
}

fn set_offloads(file: &File, offloads: Offloads) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    check(unsafe { ioctl_with_val(file, libc::TUNSETOFFLOAD, offloads.bits().into()) })
}

fn interface(socket: &UnixDatagram, command: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the SIOC[GS]IF* ioctls read and write one `ifreq`.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), command, std::ptr::from_mut(request)) })
}

fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
pub(super) mod tests;
