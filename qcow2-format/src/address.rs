//! A position in the image file, as a type, so that none on the virtual disk (plain numbers) is passed for
//! it.
//!
//! Whether it lies inside the file is not known here.

use std::fmt;

/// A byte offset in the image file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostOffset(pub u64);

impl HostOffset {
    /// This offset plus `bytes`, or `None` when the sum does not fit.
    #[must_use]
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }

    /// Whether the offset is a multiple of `unit` bytes; `unit` is a power of two.
    #[must_use]
    pub const fn is_aligned(self, unit: u64) -> bool {
        debug_assert!(unit.is_power_of_two());
        self.0 & (unit - 1) == 0
    }
}

impl fmt::Display for HostOffset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {:#x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_that_do_not_fit_are_refused() {
        assert_eq!(HostOffset(8).checked_add(8), Some(HostOffset(16)));
        assert_eq!(HostOffset(u64::MAX).checked_add(1), None);
        assert_eq!(HostOffset(u64::MAX - 1).checked_add(1), Some(HostOffset(u64::MAX)));
    }

    #[test]
    fn alignment_is_judged_by_the_unit() {
        assert!(HostOffset(0).is_aligned(512));
        assert!(HostOffset(1024).is_aligned(512));
        assert!(!HostOffset(513).is_aligned(512));
    }
}
