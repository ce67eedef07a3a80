//! Numbers about the guest's clusters, counted while the active mapping is walked.

use super::entry::{Judged, Target};
use qcow2_format::{Geometry, HostCluster};

/// Numbers about the guest's clusters, as `qemu-img check` gives them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Clusters of the virtual disk.
    pub total_clusters: u64,
    /// Those that the image maps to data.
    pub allocated_clusters: u64,
    /// Those that do not follow the one before in the file.
    pub fragmented_clusters: u64,
    /// Those that are compressed.
    pub compressed_clusters: u64,
    /// Where the last used cluster ends, in bytes.
    pub image_end_offset: u64,
}

impl Statistics {
    pub(super) fn new(geometry: &Geometry) -> Self {
        Self { total_clusters: geometry.clusters_for(geometry.virtual_size), ..Self::default() }
    }

    /// Counts an entry of an L2 table. `expected` is the cluster behind that of the entry before.
    ///
    /// As QEMU makes them: a compressed cluster always counts as fragmented, and the first cluster of an L2
    /// table never does.
    pub(super) fn count(&mut self, judged: &Judged, expected: &mut Option<HostCluster>) {
        match judged.target {
            Target::Compressed(_) => {
                self.allocated_clusters += 1;
                self.compressed_clusters += 1;
                self.fragmented_clusters += 1;
            }
            Target::Cluster { host, .. } => {
                self.allocated_clusters += 1;
                self.fragmented_clusters += u64::from(expected.is_some_and(|expected| expected != host));
                *expected = Some(host + 1);
            }
            Target::External { .. } => self.allocated_clusters += 1,
            Target::Nothing | Target::Unknown => {}
        }
    }
}
