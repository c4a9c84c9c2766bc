//! virtio-rng (virtio 1.3, 5.4): the host's random numbers for the guest.
//!
//! Each request is filled to at most [`MAX_REQUEST`] bytes, so that a guest cannot keep the shared device loop busy with
//! one; its driver asks again.

use super::queue::{Chain, slices};
use super::serve::serve;
use super::{Fault, Io, MmioSavedV1, Progress, QueueOwner, RestoreError, Source, VirtioDevice};
use crate::{Gpa, GuestRam};
use saved::Saved;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::time::Duration;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::ReadVolatile;

/// The most bytes that one request gets.
pub const MAX_REQUEST: usize = 16 << 10;

const QUEUE_SIZE: u16 = 64;

/// The random number generator.
#[derive(Debug)]
pub struct Rng {
    random: File,
}

/// The section of the random number generator, version 1. It has no state of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RngSavedV1 {
    /// Registers and queues.
    pub transport: MmioSavedV1,
}

impl Saved for RngSavedV1 {
    const KIND: &'static str = "virtio-rng";
    const VERSION: u16 = 1;
}

impl Rng {
    /// A generator that reads `random`, for which [`Self::host_random`] is the file.
    #[must_use]
    pub fn new(random: File) -> Self {
        Self { random }
    }

    /// The host's generator, which never blocks once the host is up.
    ///
    /// # Errors
    /// If the host has no `/dev/urandom`.
    pub fn host_random() -> std::io::Result<File> {
        File::open("/dev/urandom")
    }
}

fn fill(random: &mut File, ram: &GuestRam, chain: &Chain) -> u32 {
    let mut filled = 0;
    for mut slice in slices(ram, chain.writable(), 0, MAX_REQUEST) {
        if let Err(error) = random.read_exact_volatile(&mut slice) {
            // The driver gets what there is, and asks again.
            tracing::debug!(%error, "The host gives no random numbers");
            break;
        }
        filled += slice.len();
    }
    u32::try_from(filled).expect("at most MAX_REQUEST")
}

impl VirtioDevice for Rng {
    type Saved = RngSavedV1;
    type Parts = File;

    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn queue_owner(&self, _: usize) -> QueueOwner {
        QueueOwner::Worker
    }

    fn sources(&self) -> Vec<Source> {
        Vec::new()
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _: &mut Io, _: u64, _: &[u8]) {}

    fn start(&mut self, _: &mut Io) -> Result<(), Fault> {
        Ok(())
    }

    fn process(&mut self, io: &mut Io, queue: usize) -> Result<Progress, Fault> {
        Ok(serve(io, queue, |ram, chain| Ok(fill(&mut self.random, ram, chain)))?)
    }

    fn on_source(&mut self, _: &mut Io, _: u32) -> Result<(), Fault> {
        Ok(())
    }

    fn stop(&mut self, _: &mut Io, _: Duration) -> Result<(), usize> {
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn reset(&mut self) {}

    fn release(&mut self) {}

    fn reacquire(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    fn announce(&mut self, _: &mut Io) {}

    fn log_dirty(&mut self, _: &mut Io, _: bool) -> std::io::Result<()> {
        Ok(())
    }

    fn harvest_dirty(&mut self, _: &mut dyn FnMut(Gpa)) {}

    fn save(&self, transport: MmioSavedV1) -> RngSavedV1 {
        let Self { random: _ } = self;
        RngSavedV1 { transport }
    }

    fn restore(_: &str, saved: RngSavedV1, random: File) -> Result<(Self, MmioSavedV1), RestoreError> {
        let RngSavedV1 { transport } = saved;
        Ok((Self::new(random), transport))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{Bench, FREE, VERSION_1};
    use saved::SavedState;
    use std::io::{Seek, Write};
    use vm_memory::{Bytes, GuestAddress};

    fn bench() -> Bench {
        Bench::new(&[8], VERSION_1)
    }

    #[test]
    fn requests_are_filled() {
        let (mut bench, mut rng) = (bench(), Rng::new(Rng::host_random().unwrap()));
        bench.rings[0].offer(&[(FREE, 40, true), (FREE + 0x1000, 24, true)]);
        bench.rings[0].offer(&[(FREE + 0x2000, 8, true)]);
        assert_eq!(rng.process(&mut bench.io, 0).unwrap(), Progress::Idle);
        assert_eq!(bench.rings[0].completed(), [(0, 64), (2, 8)]);
        assert!(bench.interrupted());
        let mut data = [0; 24];
        bench.io.ram.read_slice(&mut data, GuestAddress(FREE + 0x1000)).unwrap();
        assert_ne!(data, [0; 24]);
    }

    #[test]
    fn one_request_is_bounded_and_a_useless_one_gets_nothing() {
        let (mut bench, mut rng) = (bench(), Rng::new(Rng::host_random().unwrap()));
        bench.rings[0].offer(&[(FREE, 0x3_0000, true)]);
        bench.rings[0].offer(&[(FREE, 8, false)]);
        rng.process(&mut bench.io, 0).unwrap();
        assert_eq!(bench.rings[0].completed(), [(0, 16 << 10), (1, 0)]);
    }

    #[test]
    fn a_host_without_random_numbers_gives_what_it_has() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[7; 10]).unwrap();
        file.rewind().unwrap();
        let (mut bench, mut rng) = (bench(), Rng::new(file));
        bench.rings[0].offer(&[(FREE, 10, true), (FREE + 16, 10, true)]);
        rng.process(&mut bench.io, 0).unwrap();
        assert_eq!(bench.rings[0].completed(), [(0, 10)]);
    }

    /// The bytes of the first released version: a change here is a break of the format.
    #[test]
    fn golden_bytes() {
        let transport = MmioSavedV1 {
            device_status: 0,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            interrupt_status: 0,
            config_generation: 0,
            queues: Vec::new(),
        };
        let rng = Rng::new(Rng::host_random().unwrap());
        let mut state = SavedState::new();
        state.put("rng0", &rng.save(transport.clone())).unwrap();
        assert_eq!(state.encode(), b"GWSTATE1\x01\0\0\0\x04\0rng0\x0a\0virtio-rng\x01\0\x08\0\0\0\0\0\0\0\0\0\0\0");
        let saved = state.take("rng0").unwrap();
        assert_eq!(Rng::restore("rng0", saved, Rng::host_random().unwrap()).unwrap().1, transport);
    }
}
