//! A file descriptor that goes over a Unix socket, beside one byte (SCM_RIGHTS, unix(7)).

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

/// The byte, which means nothing: a descriptor does not travel alone.
const BESIDE: [u8; 1] = [0];

/// Sends `file`, if the socket has room.
pub(super) fn send(socket: BorrowedFd<'_>, file: BorrowedFd<'_>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let files = [file];
    let fits = control.push(SendAncillaryMessage::ScmRights(&files));
    debug_assert!(fits, "there is room for one");
    sendmsg(socket, &[IoSlice::new(&BESIDE)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    Ok(())
}

/// What came with a byte.
#[derive(Debug)]
pub(super) enum Came {
    /// One descriptor.
    File(OwnedFd),
    /// None, or more than one, which are closed.
    NoFile,
    /// No byte: the other end has closed the connection.
    End,
}

/// Receives one byte, if it is there, and the descriptor beside it.
pub(super) fn receive(socket: BorrowedFd<'_>) -> io::Result<Came> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = BESIDE;
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut control, flags)?;
    let files = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(files) => Some(files),
        _ => None,
    });
    let mut files: Vec<OwnedFd> = files.flatten().collect();
    Ok(match (message.bytes, files.pop()) {
        (0, _) => Came::End,
        (_, Some(file)) if files.is_empty() && !message.flags.contains(ReturnFlags::CTRUNC) => Came::File(file),
        _ => Came::NoFile,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::io::{Read as _, Write as _};
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    fn send_many(socket: &UnixStream, files: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(files)));
        sendmsg(socket, &[IoSlice::new(&BESIDE)], &mut control, SendFlags::empty()).unwrap();
    }

    #[test]
    fn a_file_arrives_between_bytes_and_is_the_same() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let (mut out, pipe) = io::pipe().unwrap();
        near.write_all(b"before").unwrap();
        send(near.as_fd(), pipe.as_fd()).unwrap();
        near.write_all(b"after").unwrap();
        drop(pipe);
        let mut before = [0; 6];
        far.read_exact(&mut before).unwrap();
        let Came::File(file) = receive(far.as_fd()).unwrap() else { panic!("no file came") };
        let mut after = [0; 5];
        far.read_exact(&mut after).unwrap();
        assert_eq!((&before, &after), (b"before", b"after"));
        File::from(file).write_all(b"through").unwrap();
        let mut through = String::new();
        out.read_to_string(&mut through).unwrap();
        assert_eq!(through, "through");
    }

    #[test]
    fn a_byte_alone_several_files_and_the_end_are_told_apart() {
        let (mut near, far) = UnixStream::pair().unwrap();
        assert_eq!(receive(far.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        near.write_all(b"x").unwrap();
        assert!(matches!(receive(far.as_fd()).unwrap(), Came::NoFile));
        let zero = File::open("/dev/zero").unwrap();
        for count in 2..=4 {
            send_many(&near, &vec![zero.as_fd(); count]);
            assert!(matches!(receive(far.as_fd()).unwrap(), Came::NoFile), "{count} files");
        }
        drop(near);
        assert!(matches!(receive(far.as_fd()).unwrap(), Came::End));
    }
}
