//! Bytes that say where they belong.
//!
//! Every sector that a test writes begins with its own address and the number of the write, so that
//! a wrong sector tells whose bytes it holds. The rest is a repeated word (compressible) for even
//! numbers and noise for odd ones.

use crate::disk::SECTOR;
use std::fmt;

/// The bytes of write number `number` at `at`; both `at` and `len` are multiples of a sector.
#[must_use]
pub fn tagged(at: u64, len: u64, number: u64) -> Vec<u8> {
    let mut bytes = vec![0; len as usize];
    for (index, sector) in bytes.chunks_mut(SECTOR as usize).enumerate() {
        let address = at + index as u64 * SECTOR;
        let mut noise = fastrand::Rng::with_seed(address ^ number.rotate_left(40));
        if number % 2 == 1 {
            noise.fill(sector);
        } else {
            let word = noise.u64(1..).to_le_bytes();
            sector.iter_mut().zip(word.iter().cycle()).for_each(|(byte, fill)| *byte = *fill);
        }
        sector[..8].copy_from_slice(&address.to_le_bytes());
        sector[8..16].copy_from_slice(&number.to_le_bytes());
    }
    bytes
}

/// The number of the write whose bytes begin here.
#[must_use]
pub fn number_of(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(8..16)?.try_into().ok()?))
}

/// What a sector holds, told for people.
pub struct Told<'a>(pub &'a [u8]);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let word = |at: usize| {
            let bytes = self.0.get(at..at + 8).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
            u64::from_le_bytes(bytes)
        };
        if self.0.iter().all(|&byte| byte == 0) {
            return f.write_str("zeros");
        }
        if tagged(word(0) & !(SECTOR - 1), SECTOR, word(8)) == self.0 {
            return write!(f, "write {} of address {:#x}", word(8), word(0));
        }
        write!(f, "foreign bytes {:02x?}", &self.0[..self.0.len().min(16)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_tells_whose_it_is() {
        let bytes = tagged(0x1400, 1024, 7);
        assert_eq!(Told(&bytes[512..]).to_string(), "write 7 of address 0x1600");
        assert_eq!(Told(&[0; 512]).to_string(), "zeros");
        assert!(Told(&bytes[1..513]).to_string().starts_with("foreign"));
    }
}
