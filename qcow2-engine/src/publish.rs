//! Changing the mapping: L2 tables made writable, entries set, the rules that follow recorded.
//!
//! This is the only module that writes L1 and L2 entries. Readers see each entry change at once;
//! the disk follows when the metadata is written back, in the order that is recorded here.

use crate::{
    cache::slices::SliceKey,
    error::{Error, Result},
    image::Image,
    io::{Buf, Io, exact},
    lane::Lane,
    meta::Meta,
    old::Old,
    order::rules::{Page, Rule},
    owner::Owner,
    redo::Record,
    territory::Conflict,
};
use qcow2_format::{Clusters, GuestCluster, HostCluster, HostOffset, L1Entry, Mapping};
use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

/// What becomes of an entry that is to have the value that it has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Equal {
    LeftAlone,
    /// What is read may be in the host's memory only.
    WrittenAnew,
}

/// How an attempt at a change went.
enum Attempt {
    Done,
    /// The slice has to be loaded first.
    Miss,
    /// The redo log is full, or every slot of the cache is dirty: a cut makes room.
    NoRoom,
}

/// An entry of a slice that changes.
struct Change {
    cluster: GuestCluster,
    /// Where in the slice it is.
    index: usize,
    old: Old,
    new: Mapping,
}

impl<I: Io> Lane<I> {
    /// Makes sure that the L2 table for a guest offset exists and belongs to the active mapping
    /// alone, so that its entries may be changed.
    pub(crate) async fn prepare_table(&self, guest: u64) -> Result<()> {
        let image = self.image();
        let layer = image.top();
        let index = layer.geometry.l1_index(guest);
        if image.is_vouched(index) {
            return Ok(());
        }
        let _table = image.locks.tables.acquire(index..index + 1).await;
        match layer.l1_entry(guest)? {
            L1Entry::Table { offset, copied: true } => self.check_sole_owner(offset).await?,
            L1Entry::Table { offset, copied: false } => self.copy_table(index, offset).await?,
            L1Entry::Unallocated => self.create_table(index).await?,
        }
        image.vouch(index);
        Ok(())
    }

    /// A table may be changed in place if its refcount is one: the entry's flag says so, but the flag may
    /// be what is damaged, and a snapshot may share the table. Asked once for each table.
    async fn check_sole_owner(&self, table: HostOffset) -> Result<()> {
        let image = self.image();
        match self.refcount(image.geometry().host_cluster(table)).await? {
            1 => Ok(()),
            value => Err(Error::Refcount {
                file: Arc::clone(&image.top().name),
                at: table.0,
                value,
                reason: "but the L1 entry says that this L2 table is referred to once".into(),
            }),
        }
    }

    /// Gives an L1 entry a new, empty table.
    async fn create_table(&self, index: u64) -> Result<()> {
        let image = self.image();
        let mut reservation = self.reserve(1).await?;
        if !reservation.is_fresh() {
            let zeros = Buf::zeroed(image.geometry().cluster_size() as usize);
            reservation.begin_writing();
            let written = self.write_table(reservation.clusters().start, &zeros).await;
            reservation.end_writing();
            written?;
        }
        self.publish_table(index, reservation.clusters().start, Range::default()).await?;
        reservation.commit();
        Ok(())
    }

    /// Replaces a table that a snapshot shares by a copy.
    async fn copy_table(&self, index: u64, shared: HostOffset) -> Result<()> {
        let image = self.image();
        let mut reservation = self.reserve(1).await?;
        let table = self.shared_table(shared).await?;
        reservation.begin_writing();
        let written = self.write_table(reservation.clusters().start, &table).await;
        reservation.end_writing();
        written?;
        let old = image.geometry().host_cluster(shared).row(1);
        self.publish_table(index, reservation.clusters().start, old).await?;
        reservation.commit();
        Ok(())
    }

    /// Points an L1 entry at a table whose content is in the file, instead of at `old`.
    async fn publish_table(&self, index: u64, cluster: HostCluster, old: Range<HostCluster>) -> Result<()> {
        let image = self.image();
        loop {
            {
                let mut meta = image.meta.lock();
                if meta.has_log_room(1) {
                    image.publish_table(&mut meta, index, cluster, old);
                    return Ok(());
                }
            }
            self.write_back().await?;
        }
    }

    /// The content of a table that a snapshot shares.
    pub(crate) async fn shared_table(&self, at: HostOffset) -> Result<Buf> {
        let (image, file) = (self.image(), self.image().top().file);
        let table = Buf::zeroed(image.geometry().cluster_size() as usize);
        exact::read_zero_extended(self.io(), file, at.0, &table)
            .await
            .map_err(|source| image.io_error("read of a shared L2 table", file, at.0, source))?;
        Ok(table)
    }

    pub(crate) async fn write_table(&self, cluster: HostCluster, bytes: &Buf) -> Result<()> {
        let image = self.image();
        let (file, at) = (image.top().file, image.geometry().host_offset(cluster).0);
        exact::write_all(self.io(), file, at, bytes)
            .await
            .map_err(|source| image.io_error("write of an L2 table", file, at, source))
    }

    /// Changes the mapping of guest clusters that lie in one slice, whose table is writable and
    /// whose range the caller has locked. `change` gives the new mapping, or `None` to leave a
    /// cluster alone. `referred` are the host clusters that the new mappings refer to. What the old
    /// mappings referred to, and the new ones do not, is freed.
    pub(crate) async fn publish(
        &self,
        guest: Range<GuestCluster>,
        referred: Option<Range<HostCluster>>,
        change: impl Fn(GuestCluster) -> Option<Mapping>,
    ) -> Result<()> {
        self.publish_as(guest, referred, Equal::LeftAlone, change).await
    }

    /// As [`Self::publish`], of one cluster, for a replay: also what is there already is written.
    pub(crate) async fn publish_anew(
        &self,
        guest: GuestCluster,
        referred: Option<Range<HostCluster>>,
        mapping: Mapping,
    ) -> Result<()> {
        self.publish_as(guest.row(1), referred, Equal::WrittenAnew, |_| Some(mapping)).await
    }

    async fn publish_as(
        &self,
        guest: Range<GuestCluster>,
        referred: Option<Range<HostCluster>>,
        equal: Equal,
        change: impl Fn(GuestCluster) -> Option<Mapping>,
    ) -> Result<()> {
        let image = self.image();
        let key = image.top().slice_at(image.geometry().guest_offset(guest.start)).0;
        loop {
            match image.try_publish(key, guest.clone(), referred.clone(), equal, &change)? {
                Attempt::Done => return Ok(()),
                Attempt::Miss => self.load_slice(key).await?,
                Attempt::NoRoom => self.write_back().await?,
            }
        }
    }
}

impl Image {
    /// Points an L1 entry at a table whose content is in the file, though not yet durable. `old` is the
    /// cluster of the table before, if there was one.
    pub(crate) fn publish_table(
        &self,
        meta: &mut Meta,
        index: u64,
        cluster: HostCluster,
        old: Range<HostCluster>,
    ) {
        meta.log([Record::Table { index, cluster }]);
        let entry = L1Entry::Table { offset: self.geometry().host_offset(cluster), copied: true };
        self.top().l1.set(index, entry.encode());
        meta.territory.add_l2_table(cluster);
        let page = self.l1_page(index);
        meta.graph.require(Rule::table_content_before_l1(page));
        meta.refer(cluster.row(1), page);
        old.clone().each().for_each(|table| meta.territory.remove_l2_table(table));
        meta.unmapped(old);
    }

    /// The page of the L1 table that holds an entry.
    pub(crate) fn l1_page(&self, index: u64) -> Page {
        Page::L1(index * 8 / self.top().slice_bytes)
    }

    /// Whether the table of an L1 entry is known to be the active mapping's alone.
    fn is_vouched(&self, index: u64) -> bool {
        let word = self.vouched[index as usize / 64].load(Ordering::Acquire);
        word & 1 << (index % 64) != 0
    }

    fn vouch(&self, index: u64) {
        self.vouched[index as usize / 64].fetch_or(1 << (index % 64), Ordering::Release);
    }

    /// One attempt at [`Lane::publish`].
    fn try_publish(
        &self,
        key: SliceKey,
        guest: Range<GuestCluster>,
        referred: Option<Range<HostCluster>>,
        equal: Equal,
        change: impl Fn(GuestCluster) -> Option<Mapping>,
    ) -> Result<Attempt> {
        let mut meta = self.meta.lock();
        let Some(changes) = self.changes(&meta, guest, equal, change)? else { return Ok(Attempt::Miss) };
        if changes.is_empty() {
            return Ok(Attempt::Done);
        }
        if !meta.has_log_room(changes.len() as u64) || !self.cache.unfold(key) || !self.cache.may_pin(key) {
            return Ok(Attempt::NoRoom);
        }
        self.enter(&mut meta, key, &changes);
        self.record_rules(&mut meta, key.slice, referred);
        for &Change { old, new, .. } in &changes {
            match old {
                Old::Mapping(old) if old == new || (old.host().is_some() && old.host() == new.host()) => {}
                Old::Mapping(old) => meta.unmapped(self.referred_by(old)),
                // A search for leaks takes it up when the entry is durably gone.
                Old::Senseless { named, .. } => meta.watch.going(named.row(1)),
            }
        }
        drop(meta);
        for Change { cluster, old, .. } in changes {
            if let Old::Senseless { source, .. } = old {
                self.tell_of_senseless(cluster, source);
            }
        }
        Ok(Attempt::Done)
    }

    /// What a publication changes, or `None` where the slice is not in memory. Old entries are all judged
    /// before the first one is changed, so that damage is found while nothing has happened.
    fn changes(
        &self,
        meta: &Meta,
        guest: Range<GuestCluster>,
        equal: Equal,
        change: impl Fn(GuestCluster) -> Option<Mapping>,
    ) -> Result<Option<Vec<Change>>> {
        let layer = self.top();
        let mut changes = Vec::with_capacity(guest.cluster_count() as usize);
        for cluster in guest.each() {
            let at = layer.geometry.guest_offset(cluster);
            // Whoever would have content in place of one that makes no sense was refused when it looked.
            let Some(old) = self.old(meta, cluster)? else { return Ok(None) };
            let is_change = |new: &Mapping| old != Old::Mapping(*new) || equal == Equal::WrittenAnew;
            if let Some(new) = change(cluster).filter(is_change) {
                if let Old::Mapping(old) = old
                    && old != new
                {
                    self.check_replaced(meta, at, old)?;
                }
                changes.push(Change { cluster, index: layer.slice_at(at).1, old, new });
            }
        }
        Ok(Some(changes))
    }

    /// Sets the entries of a slice that is in memory and has a slot, which it keeps.
    fn enter(&self, meta: &mut Meta, key: SliceKey, changes: &[Change]) {
        for &Change { cluster, index, new, .. } in changes {
            let entry = new.encode(self.geometry());
            meta.log([Record::Mapping { cluster, entry }]);
            self.cache.set_entry(key, index, entry);
        }
        self.cache.set_pinned(key, true);
        meta.graph.touch(Page::L2(key.slice));
    }

    /// Records what has to precede a slice whose entries have been set, and now refer to some clusters.
    fn record_rules(&self, meta: &mut Meta, slice: u64, referred: Option<Range<HostCluster>>) {
        let page = Page::L2(slice);
        let l1_page = self.l1_page(slice / self.top().slices_per_table());
        if meta.graph.is_dirty(l1_page) {
            meta.graph.require(Rule::l2_before_l1(page, l1_page));
        }
        if let Some(clusters) = referred {
            meta.graph.require(Rule::payload_before_mapping(page));
            meta.refer(clusters, page);
        }
    }

    /// What an entry named is going to be freed: it must not be metadata, and in the file. Of compressed data
    /// that goes for where it begins: a descriptor counts whole sectors, of which the last need not be there.
    /// Data that is also counted as somebody else's may be a snapshot's L2 table, which is what a repair makes
    /// of it: the table stays as it is, and loses a reference, as long as it has another one.
    pub(crate) fn check_replaced(&self, meta: &Meta, guest: u64, old: Mapping) -> Result<()> {
        let named = self.referred_by(old);
        let is_shared = matches!(old, Mapping::Data { copied: false, .. });
        let is_rest = |cluster| matches!(old, Mapping::Compressed(_)) && cluster > named.start;
        let conflict = |cluster| match meta.territory.conflict(cluster)? {
            Conflict::BeyondFile if is_rest(cluster) => None,
            Conflict::Holds(Owner::L2) if is_shared && meta.territory.is_snapshots_l2(cluster) => None,
            conflict => Some((cluster, conflict)),
        };
        match named.clone().each().find_map(conflict) {
            None => Ok(()),
            Some((cluster, conflict)) => {
                Err(self.conflict("L2", guest, self.geometry().host_offset(cluster), conflict))
            }
        }
    }

    /// The host clusters to which a mapping holds a reference.
    fn referred_by(&self, mapping: Mapping) -> Range<HostCluster> {
        let geometry = self.geometry();
        match mapping {
            Mapping::Unallocated | Mapping::Zero { host: None, .. } => Range::default(),
            Mapping::Data { host, .. } | Mapping::Zero { host: Some(host), .. } => {
                geometry.host_cluster(host).row(1)
            }
            // What a damaged descriptor claims beyond that is not its to give back.
            Mapping::Compressed(range) => range.plausible(geometry).host_clusters(geometry),
        }
    }
}
