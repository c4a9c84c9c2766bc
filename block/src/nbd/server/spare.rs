//! Memory for requests that is used again and again, so that it is not mapped and cleared each time.

use crate::memory::Scratch;
use std::sync::Arc;

/// The most pieces that are kept, and the longest in bytes: longer ones are mapped faster than they are filled.
const KEPT: usize = 64;
const LONGEST: usize = 256 << 10;
/// The shortest piece in bytes.
const SHORTEST: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Spare {
    /// All that was given back, whether others still reach it or not.
    pieces: Vec<Arc<Scratch>>,
}

impl Spare {
    /// Memory of at least `length` bytes, with anything in it.
    pub(super) fn take(&mut self, length: usize) -> Arc<Scratch> {
        let length = length.max(SHORTEST).next_power_of_two();
        let free = self.pieces.iter_mut().position(|piece| piece.length() == length && piece.bytes().is_some());
        free.map_or_else(|| Scratch::new(length), |place| self.pieces.swap_remove(place))
    }

    /// Takes memory back; it may be reached by buffers for a while.
    pub(super) fn give(&mut self, piece: Arc<Scratch>) {
        if piece.length() > LONGEST {
            return;
        }
        if self.pieces.len() == KEPT {
            self.pieces.swap_remove(0);
        }
        self.pieces.push(piece);
    }
}
