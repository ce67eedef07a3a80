//! Closing an image so that nothing is left over: no leak, no tail.

use crate::{alloc::reserve::LaneSpace, error::Result, io::Io, lane::Lane};
use qcow2_format::HostCluster;

/// Rounds of "write back, give back": freed clusters → their counts → nothing. A request that never ended
/// would keep its clusters, and so does a count that cannot be read; they are then left as leaks.
const MAX_ROUNDS: usize = 4;

impl<I: Io> Lane<I> {
    /// Makes everything durable, gives reserved and freed clusters back and takes the unused tail
    /// off the file. To be called on one lane when no request is in flight on any; afterwards the
    /// image is not used any more.
    ///
    /// # Errors
    /// As [`Self::flush`]. What could not be given back is a leak, never a loss.
    pub async fn close(&self) -> Result<()> {
        let outcome = self.close_entered().await;
        self.settle(outcome).await
    }

    async fn close_entered(&self) -> Result<()> {
        let image = self.image();
        if image.read_only {
            return Ok(());
        }
        if image.damage.is_condemned() {
            // What was acknowledged before is made durable; nothing that is counted is believed.
            return self.write_back().await;
        }
        self.give_rests_back().await;
        for _ in 0..MAX_ROUNDS {
            image.meta.lock().frees.try_again();
            self.write_back().await?;
            self.reclaim().await?;
            let meta = image.meta.lock();
            if meta.graph.len() == 0 && meta.frees.all_given_back() {
                break;
            }
        }
        self.trim_file().await
    }

    /// What the lanes have reserved and not used. Where the file had it already only the count is lowered: it
    /// was free and nobody has written to it, or the image counts too low and it is somebody's data, in which
    /// no hole is to be punched.
    async fn give_rests_back(&self) {
        let rests: Vec<_> = {
            let mut meta = self.image().meta.lock();
            meta.lanes.iter_mut().filter_map(LaneSpace::take_rest).collect()
        };
        for rest in rests {
            if rest.fresh {
                self.image().meta.lock().unmapped(rest.clusters);
            } else {
                self.give_up(rest).await;
            }
        }
    }

    /// Cuts free clusters off the end of what this session has added to the file.
    async fn trim_file(&self) -> Result<()> {
        let image = self.image();
        let geometry = image.geometry();
        let (file_end, may_be_longer) = {
            let space = &image.meta.lock().space;
            (space.file_end, space.may_be_longer)
        };
        let lowest = geometry.clusters_for(image.opened_len);
        let mut used = geometry.clusters_for(file_end);
        while used > lowest && self.refcount(HostCluster(used - 1)).await? == 0 {
            used -= 1;
        }
        // Whole clusters: a file may have ended in the middle of one, and has become longer by a write there.
        let len = used * geometry.cluster_size();
        if len < file_end || may_be_longer {
            let file = image.top().file;
            self.io()
                .set_len(file, len)
                .await
                .map_err(|source| image.io_error("truncation", file, len, source))?;
            image.meta.lock().space.file_end = len;
            self.barrier().await?;
        }
        Ok(())
    }
}
