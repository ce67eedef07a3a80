//! How metadata is cut into pages, how many of them are kept however little memory there is, and how many
//! freed clusters may wait.

use crate::alloc::frees::MAX_BATCHES;

/// The pages of an image's metadata.
///
/// A page of an L2 table (a slice), of the L1 table, of a refcount block or of the refcount table is
/// read, ordered and written back as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Paging {
    /// Bytes of a page, at the most: a smaller cluster is one page. A power of two from 512 to
    /// [`MAX_PAGE`].
    pub(crate) page_bytes: u64,
    /// The fewest slices that are kept.
    pub(crate) least_slices: usize,
    /// The fewest pages of refcount blocks that are kept.
    pub(crate) least_refcount_pages: usize,
    /// References that wait to be given back before writers have to help.
    pub(crate) max_frees: u64,
    /// Batches in which they wait, at the most.
    pub(crate) max_batches: usize,
    /// Clusters given back per step, so that a step is bounded.
    pub(crate) free_step: usize,
}

/// Bytes of the longest page: the physical block of the disks there are.
pub(crate) const MAX_PAGE: u64 = 4096;

impl Paging {
    /// For images of a few hundred clusters: their tables have several pages all the same, and more of them
    /// than are kept.
    #[cfg(feature = "sim")]
    pub(crate) const SMALL: Self = Self {
        page_bytes: 512,
        least_slices: 4,
        least_refcount_pages: 2,
        max_frees: 1 << 16,
        max_batches: MAX_BATCHES,
        free_step: 4096,
    };
    /// And more is freed than may wait, or is given back in one step.
    #[cfg(feature = "sim")]
    pub(crate) const TINY: Self = Self { max_frees: 24, max_batches: 2, free_step: 10, ..Self::SMALL };
}

impl Default for Paging {
    /// Enough pages that a request which needs two, on each of several queues, cannot starve.
    fn default() -> Self {
        Self {
            page_bytes: MAX_PAGE,
            least_slices: 64,
            least_refcount_pages: 64,
            max_frees: 1 << 16,
            max_batches: MAX_BATCHES,
            free_step: 4096,
        }
    }
}
