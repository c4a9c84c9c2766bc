//! Memory that requests read from and write to: a guest's, or this process' own.
//!
//! It is shared with whoever else has it mapped, a running guest for instance, and so no reference of Rust ever points to
//! it while a request is in flight. Invariant: the memory of a [`Buffers`] stays mapped as long as that exists, because it
//! holds on to the owner.

#![expect(unsafe_code, reason = "memory that the kernel, guests and other threads access is reached by pointers")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::Arc;

/// Alignment of [`Scratch`] in bytes: a page, which is what direct I/O asks of any device.
const ALIGNMENT: usize = 4096;
/// Length in bytes of the memory of [`Buffers::zeroes`].
const ZEROES: usize = 64 << 10;

/// A piece of mapped memory, laid out as the kernel's `iovec`.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Piece(libc::iovec);

// SAFETY: a piece is an address and a length. What may be done with it is said where it is used.
unsafe impl Send for Piece {}
// SAFETY: as for Send; it has no interior mutability.
unsafe impl Sync for Piece {}

impl Piece {
    /// A piece of `length` bytes at `start`.
    #[must_use]
    pub fn new(start: NonNull<u8>, length: usize) -> Self {
        Self(libc::iovec { iov_base: start.as_ptr().cast(), iov_len: length })
    }

    /// Where it begins.
    #[must_use]
    pub fn start(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.0.iov_len
    }

    /// The piece without its first `count` bytes, of which it has as many.
    fn without(&self, count: usize) -> Self {
        debug_assert!(count <= self.length(), "a piece loses no more than it has");
        Self(libc::iovec { iov_base: self.start().wrapping_add(count).cast(), iov_len: self.length() - count })
    }

    /// The first `count` bytes of the piece, or all of it if it has fewer.
    fn first(&self, count: usize) -> Self {
        Self(libc::iovec { iov_base: self.0.iov_base, iov_len: self.length().min(count) })
    }
}

impl fmt::Debug for Piece {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}+{:#x}", self.start(), self.length())
    }
}

/// The memory of one request: pieces in the order in which they are filled or written out.
pub struct Buffers {
    pieces: Vec<Piece>,
    length: usize,
    owner: Arc<dyn Any + Send + Sync>,
}

impl Buffers {
    /// The memory of `pieces`, which `owner` keeps mapped.
    ///
    /// # Safety
    /// As long as `owner` lives, each piece must be mapped, readable, and, if the buffers are to be filled, writable; and
    /// nobody may hold a reference of Rust to its bytes while these buffers exist, since they change at any time.
    #[must_use]
    pub unsafe fn new(pieces: Vec<Piece>, owner: Arc<dyn Any + Send + Sync>) -> Self {
        let length = pieces.iter().map(Piece::length).sum();
        Self { pieces, length, owner }
    }

    /// All of `scratch`. Its bytes are out of reach until the buffers are dropped.
    #[must_use]
    pub fn of(scratch: &Arc<Scratch>) -> Self {
        Self::part_of(scratch, 0, scratch.length)
    }

    /// The `length` bytes of `scratch` from `start` on.
    ///
    /// # Panics
    /// If it does not have them.
    #[must_use]
    pub fn part_of(scratch: &Arc<Scratch>, start: usize, length: usize) -> Self {
        assert!(start.checked_add(length).is_some_and(|end| end <= scratch.length), "the part lies in the memory");
        let piece = Piece::new(scratch.start, scratch.length).without(start).first(length);
        // SAFETY: the memory is mapped and writable as long as the `Scratch` lives, and that gives out its bytes only to
        // who holds it alone, which nobody does while these buffers do.
        unsafe { Self::new(vec![piece], Arc::clone(scratch) as Arc<dyn Any + Send + Sync>) }
    }

    /// The same memory once more, for a request that takes the place of this one.
    #[must_use]
    pub fn again(&self) -> Self {
        Self { pieces: self.pieces.clone(), length: self.length, owner: Arc::clone(&self.owner) }
    }

    /// So many zeros to be written from, a few of which are meant again and again. Nothing may be written to them.
    #[must_use]
    pub fn zeroes(length: u64) -> Self {
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let scratch = Scratch::new(length.clamp(1, ZEROES));
        let piece = Piece::new(scratch.start, scratch.length);
        let rest = piece.first(length % scratch.length);
        let whole = std::iter::repeat_n(piece, length / scratch.length);
        let pieces = whole.chain((rest.length() > 0).then_some(rest)).collect();
        // SAFETY: each is a piece of `scratch`, which is the owner. They overlap, but are only read.
        unsafe { Self::new(pieces, scratch) }
    }

    /// Length of all pieces in bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// The pieces.
    #[must_use]
    pub fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Whether each piece begins and ends at a multiple of `alignment`, a power of two.
    #[must_use]
    pub fn is_aligned(&self, alignment: usize) -> bool {
        let mask = alignment - 1;
        self.pieces.iter().all(|piece| (piece.start().addr() | piece.length()) & mask == 0)
    }

    /// The pieces of the bytes from `start` on, at most `length` bytes long.
    #[must_use]
    pub fn range(&self, start: usize, length: usize) -> Vec<Piece> {
        let (mut skip, mut take) = (start, length);
        let mut out = Vec::with_capacity(self.pieces.len());
        for piece in &self.pieces {
            let skipped = skip.min(piece.length());
            skip -= skipped;
            let part = piece.without(skipped).first(take);
            take -= part.length();
            if part.length() > 0 {
                out.push(part);
            }
            if take == 0 {
                break;
            }
        }
        out
    }

    /// A handle to the bytes from `start` on, at most `length` bytes long.
    #[must_use]
    pub fn part(&self, start: usize, length: usize) -> Self {
        let pieces = self.range(start, length);
        // SAFETY: the pieces are parts of pieces of which this holds, and the owner is the same.
        unsafe { Self::new(pieces, Arc::clone(&self.owner)) }
    }

    /// Drops the first `count` bytes, or all if there are fewer.
    pub fn advance(&mut self, count: usize) {
        self.pieces = self.range(count, usize::MAX);
        self.length -= count.min(self.length);
    }

    /// Copies `bytes` to the memory from `start` on; how many had room.
    pub fn write(&self, start: usize, bytes: &[u8]) -> usize {
        let mut done = 0;
        for piece in self.range(start, bytes.len()) {
            let part = &bytes[done..done + piece.length()];
            // SAFETY: the piece is mapped and writable, as `new` was promised; `part` is as long, and no other memory,
            // since nobody holds a reference to the bytes of the piece.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), piece.start(), part.len()) };
            done += part.len();
        }
        done
    }

    /// Copies the memory from `start` on to `bytes`; how many there were.
    pub fn read(&self, start: usize, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for piece in self.range(start, bytes.len()) {
            let part = &mut bytes[done..done + piece.length()];
            // SAFETY: as for `write`, the other way.
            unsafe { std::ptr::copy_nonoverlapping(piece.start(), part.as_mut_ptr(), part.len()) };
            done += part.len();
        }
        done
    }

    /// Fills the memory from `start` on with at most `length` zeros.
    pub fn write_zeroes(&self, start: usize, length: usize) {
        for piece in self.range(start, length) {
            // SAFETY: the piece is mapped and writable, as `new` was promised.
            unsafe { std::ptr::write_bytes(piece.start(), 0, piece.length()) };
        }
    }
}

impl fmt::Debug for Buffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffers").field("pieces", &self.pieces).finish_non_exhaustive()
    }
}

/// Memory of this process for requests, zeros at first, aligned to a page.
pub struct Scratch {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: it owns its memory, and gives it out by `&mut self` or within `Buffers` only.
unsafe impl Send for Scratch {}
// SAFETY: as for Send; there is nothing to be done with a shared reference but to make buffers of it.
unsafe impl Sync for Scratch {}

impl Scratch {
    /// So many bytes of zeros.
    ///
    /// # Panics
    /// If `length` is 0 or more than the address space.
    #[must_use]
    pub fn new(length: usize) -> Arc<Self> {
        let layout = Self::layout(length);
        // SAFETY: the layout's size is not 0.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Arc::new(Self { start, length })
    }

    /// A copy of `bytes`, of which there must be some.
    #[must_use]
    pub fn copy_of(bytes: &[u8]) -> Arc<Self> {
        let scratch = Self::new(bytes.len());
        Buffers::of(&scratch).write(0, bytes);
        scratch
    }

    fn layout(length: usize) -> Layout {
        assert!(length > 0, "memory for a request is not empty");
        Layout::from_size_align(length, ALIGNMENT).expect("it is shorter than the address space")
    }

    /// Length in bytes.
    #[must_use]
    pub fn length(&self) -> usize {
        self.length
    }

    /// The bytes; `None` while buffers of it exist.
    pub fn bytes(self: &mut Arc<Self>) -> Option<&mut [u8]> {
        let scratch = Arc::get_mut(self)?;
        // SAFETY: the memory is `length` bytes long, was given values at its allocation, and is this one's alone: buffers,
        // by which others reach it, would hold another reference.
        Some(unsafe { std::slice::from_raw_parts_mut(scratch.start.as_ptr(), scratch.length) })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // SAFETY: it was allocated with this layout, and nobody has a pointer to it any more.
        unsafe { dealloc(self.start.as_ptr(), Self::layout(self.length)) };
    }
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scratch").field("length", &self.length).finish_non_exhaustive()
    }
}

#[cfg(any(test, feature = "conformance"))]
impl Buffers {
    /// Parts of `scratch`, each by start and length, in this order.
    ///
    /// # Panics
    /// If it does not have them.
    #[must_use]
    pub fn scattered(scratch: &Arc<Scratch>, parts: &[(usize, usize)]) -> Self {
        let pieces = parts.iter().map(|&(start, length)| Self::part_of(scratch, start, length).pieces[0]).collect();
        // SAFETY: all are pieces of `scratch`, which is the owner.
        unsafe { Self::new(pieces, Arc::clone(scratch) as Arc<dyn Any + Send + Sync>) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_in_and_out_across_pieces() {
        let mut scratch = Scratch::new(16);
        let mut buffers = Buffers::scattered(&scratch, &[(4, 3), (10, 5)]);
        assert_eq!(buffers.length(), 8);
        assert_eq!(buffers.write(1, b"abcdefghij"), 7);
        let mut back = [0xff; 10];
        assert_eq!(buffers.read(0, &mut back), 8);
        assert_eq!(&back, b"\0abcdefg\xff\xff");
        buffers.write_zeroes(2, 2);
        buffers.advance(2);
        assert_eq!(buffers.length(), 6);
        let part = buffers.part(1, 3);
        assert_eq!((part.length(), part.read(0, &mut back)), (3, 3));
        assert_eq!(&back[..3], b"\0de");
        buffers.advance(100);
        assert_eq!((buffers.length(), buffers.pieces().len()), (0, 0));
        assert!(scratch.bytes().is_none(), "buffers still reach it");
        drop((buffers, part));
        assert_eq!(scratch.bytes().unwrap(), b"\0\0\0\0\0a\0\0\0\0\0defg\0");
    }

    #[test]
    fn scratch_is_aligned_and_parts_of_it_may_not_be() {
        let scratch = Scratch::copy_of(&[7; 8192]);
        assert!(Buffers::of(&scratch).is_aligned(4096));
        assert!(Buffers::part_of(&scratch, 512, 1024).is_aligned(512));
        assert!(!Buffers::part_of(&scratch, 512, 1024).is_aligned(4096));
        assert!(!Buffers::part_of(&scratch, 0, 100).is_aligned(512));
    }

    #[test]
    fn zeros_take_little_memory() {
        let zeroes = Buffers::zeroes((1 << 20) + 5);
        assert_eq!((zeroes.length(), zeroes.pieces().len()), ((1 << 20) + 5, 17));
        let mut bytes = vec![0xff; 70_000];
        assert_eq!(zeroes.read(1 << 19, &mut bytes), bytes.len());
        assert!(bytes.iter().all(|byte| *byte == 0));
        assert_eq!(Buffers::zeroes(0).length(), 0);
    }

    #[test]
    #[should_panic(expected = "the part lies in the memory")]
    fn a_part_does_not_reach_beyond() {
        let _ = Buffers::part_of(&Scratch::new(16), 10, 7);
    }
}
