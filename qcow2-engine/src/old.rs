//! What an L2 entry was that is about to be replaced.
//!
//! An entry that makes no sense can only be thrown away: by a request that has its whole cluster read as
//! zeros, and nothing is freed for it. But a table with such an entry may be no table at all: a damaged L1
//! entry may lead to somebody's data. So the entry has to look like one that something has happened to (without
//! what is wrong with it, it names a place where data may be), and all others of its slice must be what
//! entries are. Otherwise the change fails for damage.

use crate::{error::Result, image::Image, io::Io, lane::Lane, layer::Lookup, meta::Meta};
use qcow2_format::{Corruption, GuestCluster, HostCluster, Mapping, l2};
use std::sync::atomic::Ordering;

/// What an entry was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Old {
    Mapping(Mapping),
    /// It makes no sense, and can be thrown away.
    Senseless {
        /// The cluster that it may have named, which stays counted.
        named: HostCluster,
        source: Corruption,
    },
}

impl<I: Io> Lane<I> {
    /// What the entry of a guest cluster in the top layer is, to a request that has no use for its content.
    pub(crate) async fn old(&self, cluster: GuestCluster) -> Result<Old> {
        let image = self.image();
        let layer = image.top();
        loop {
            match layer.find(&image.cache, layer.geometry.guest_offset(cluster))? {
                Lookup::NoTable => return Ok(Old::Mapping(Mapping::Unallocated)),
                Lookup::Miss(key) => self.load_slice(key).await?,
                Lookup::Entry(raw) => match Mapping::decode(raw, &layer.geometry) {
                    Ok(mapping) => return Ok(Old::Mapping(mapping)),
                    Err(_) => {
                        let old = image.old(&image.meta.lock(), cluster)?;
                        // Else the slice has just been evicted.
                        if let Some(old) = old {
                            return Ok(old);
                        }
                    }
                },
            }
        }
    }
}

impl Image {
    /// What the entry of a guest cluster is, or `None` where its slice is not in memory.
    pub(crate) fn old(&self, meta: &Meta, cluster: GuestCluster) -> Result<Option<Old>> {
        let layer = self.top();
        let at = layer.geometry.guest_offset(cluster);
        let (key, index) = layer.slice_at(at);
        let Some(raw) = self.cache.entry(key, index) else { return Ok(None) };
        let source = match Mapping::decode(raw, &layer.geometry) {
            Ok(mapping) => return Ok(Some(Old::Mapping(mapping))),
            Err(source) => source,
        };
        let named = l2::named_by_damaged(raw, &layer.geometry).filter(|&named| {
            meta.territory.conflict(named).is_none() && self.are_others_sound(meta, cluster)
        });
        match named {
            Some(named) => Ok(Some(Old::Senseless { named, source })),
            None => Err(layer.corrupt("L2", at, source)),
        }
    }

    /// Whether every entry of a slice in memory but that of one cluster could be replaced.
    fn are_others_sound(&self, meta: &Meta, but: GuestCluster) -> bool {
        let layer = self.top();
        let (key, but) = layer.slice_at(layer.geometry.guest_offset(but));
        (0..layer.slice_entries() as usize).filter(|&index| index != but).all(|index| {
            let raw = self.cache.entry(key, index);
            let mapping = raw.and_then(|raw| Mapping::decode(raw, &layer.geometry).ok());
            mapping.is_some_and(|mapping| self.check_replaced(meta, 0, mapping).is_ok())
        })
    }

    /// Says, once, that an entry which makes no sense was thrown away.
    #[cold]
    pub(crate) fn tell_of_senseless(&self, cluster: GuestCluster, source: Corruption) {
        if !self.has_told_of_entries.swap(true, Ordering::Relaxed) {
            let error = self.top().corrupt("L2", self.geometry().guest_offset(cluster), source);
            tracing::warn!(
                "{error}: a discard or zeros have replaced it; what it may have named stays counted, \
                 until check --repair leaks"
            );
        }
    }
}
