//! Positions as types: a byte or a cluster of the image file is not taken for one of the virtual disk.
//!
//! Byte offsets on the virtual disk are plain numbers. Whether a place lies inside the file, or the disk, is
//! not known here; [`Geometry`](crate::Geometry) turns bytes into clusters and back.

use std::{
    fmt,
    ops::{Add, Range, Sub},
};

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

    /// `len` bytes of the file, of which this is the first.
    #[must_use]
    pub const fn bytes(self, len: u64) -> Range<Self> {
        self..Self(self.0 + len)
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

/// A cluster of the image file, counted from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostCluster(pub u64);

/// A cluster of the virtual disk, counted from its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestCluster(pub u64);

/// Clusters in a row: what a `Range` of them does beside `contains` and `is_empty`.
pub trait Clusters {
    /// Of the file, or of the disk.
    type Cluster;
    /// How many there are; 0 for an empty range.
    fn cluster_count(&self) -> u64;
    /// Each of them, upwards.
    fn each(self) -> impl DoubleEndedIterator<Item = Self::Cluster> + Clone;
}

macro_rules! cluster_arithmetic {
    ($cluster:ident) => {
        impl $cluster {
            /// `count` clusters in a row, of which this is the first.
            #[inline]
            #[must_use]
            pub const fn row(self, count: u64) -> Range<Self> {
                self..Self(self.0 + count)
            }
        }

        impl Add<u64> for $cluster {
            type Output = Self;
            #[inline]
            fn add(self, clusters: u64) -> Self {
                Self(self.0 + clusters)
            }
        }

        /// The distance, in clusters.
        impl Sub for $cluster {
            type Output = u64;
            #[inline]
            fn sub(self, other: Self) -> u64 {
                self.0 - other.0
            }
        }

        impl Clusters for Range<$cluster> {
            type Cluster = $cluster;
            #[inline]
            fn cluster_count(&self) -> u64 {
                self.end.0.saturating_sub(self.start.0)
            }
            #[inline]
            fn each(self) -> impl DoubleEndedIterator<Item = $cluster> + Clone {
                (self.start.0..self.end.0).map($cluster)
            }
        }
    };
}

cluster_arithmetic!(HostCluster);
cluster_arithmetic!(GuestCluster);

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
    fn rows_count_their_clusters() {
        let row = HostCluster(7).row(3);
        assert_eq!(row, HostCluster(7)..HostCluster(10));
        assert_eq!((row.cluster_count(), row.end - row.start), (3, 3));
        assert_eq!(row.each().collect::<Vec<_>>(), [HostCluster(7), HostCluster(8), HostCluster(9)]);
        assert_eq!((HostCluster(2)..HostCluster(1)).cluster_count(), 0);
    }

    #[test]
    fn alignment_is_judged_by_the_unit() {
        assert!(HostOffset(0).is_aligned(512));
        assert!(HostOffset(1024).is_aligned(512));
        assert!(!HostOffset(513).is_aligned(512));
    }
}
