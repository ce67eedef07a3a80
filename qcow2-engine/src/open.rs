//! Opening an image with its chain.

use crate::{
    alloc::{frees::Frees, refcounts::Refcounts, space::Space},
    autoclear::Autoclear,
    backing::{self, BackingPolicy, Format, MAX_CHAIN, MAX_CHAIN_L1_BYTES},
    cache::{directory::Shape, slices::SliceCache},
    check::dirty,
    damage::Damage,
    epoch::Epochs,
    error::{Error, Result},
    flat::Flat,
    flush::Flusher,
    image::Image,
    inspect::ImageFile,
    io::{Access, Io, Storage, whole_sectors},
    l1::{self, L1Table},
    layer::{Layer, Qcow2Layer, RawLayer},
    leaks::watch::Watch,
    locks::Locks,
    meta::{HeaderPage, Meta},
    opened::Opened,
    order::graph::Graph,
    paging::{MAX_PAGE, Paging},
    territory::{SnapshotPlaces, Sources, Territory},
    unpack::Unpacked,
};
use parking_lot::Mutex;
use qcow2_format::{FormatError, Geometry, Header, HostCluster, HostOffset, L1Entry, header, word};
use std::{
    ops::Range,
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicU64},
    },
};

/// The L2 cache's size where the caller does not say: QEMU's default, which maps 256 GiB at 64 KiB
/// clusters.
pub const DEFAULT_CACHE_BYTES: u64 = 32 << 20;
/// The extent that a lane reserves where the caller does not say: large enough that the refcount page
/// is written once for 256 clusters of 64 KiB, small enough that a crash leaks little.
pub const DEFAULT_EXTENT_BYTES: u64 = 16 << 20;

/// Bytes of snapshots' L1 tables that are read when an image is opened for writing: those of 256 snapshots of
/// a disk of 1 TiB at 64 KiB clusters, which name up to 2^19 L2 tables.
const MAX_SNAPSHOT_L1_BYTES: u64 = 4 << 20;
/// What a shorter one counts, because a read of it takes no less time: so there are 256 reads at the most.
const LEAST_L1_BYTES: u64 = 16 << 10;

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Never change the image.
    pub read_only: bool,
    /// Open an image for writing that is marked corrupt, as one whose damage was met in this session: what a
    /// redo log owes can be replayed, reads go on, changes are refused.
    pub serve_corrupt: bool,
    /// Bytes of L2 tables to keep in memory.
    pub cache_bytes: u64,
    /// Bytes of clusters that each lane counts ahead for its writes.
    pub extent_bytes: u64,
    /// The format of a backing file where the image does not say it, or says one that is not served.
    pub backing_format: Option<Format>,
    /// Which backing files may be opened.
    pub backing_policy: BackingPolicy,
    /// How metadata is cut into pages.
    pub paging: Paging,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            serve_corrupt: false,
            cache_bytes: DEFAULT_CACHE_BYTES,
            extent_bytes: DEFAULT_EXTENT_BYTES,
            backing_format: None,
            backing_policy: BackingPolicy::Any,
            paging: Paging::default(),
        }
    }
}

impl Image {
    /// Opens an image and its backing chain.
    ///
    /// # Errors
    /// A file cannot be opened or read, is not a sound QCOW2 image, needs a feature that is not
    /// served, or its backing chain cannot be followed. Nothing has been changed, but for refcounts
    /// of an image that was marked dirty.
    pub async fn open<I: Io>(
        io: &I,
        storage: &(impl Storage + ?Sized),
        path: &Path,
        options: &OpenOptions,
    ) -> Result<Arc<Self>> {
        Self::open_as(io, storage, path, options, None).await
    }

    /// [`Self::open`], as an image of another size than its header says: for one that is to get that size,
    /// and whose L1 table is long enough.
    pub(crate) async fn open_as<I: Io>(
        io: &I,
        storage: &(impl Storage + ?Sized),
        path: &Path,
        options: &OpenOptions,
        size: Option<u64>,
    ) -> Result<Arc<Self>> {
        let (top, mut header, first_page) = open_top(io, storage, path, options).await?;
        header.virtual_size = size.unwrap_or(header.virtual_size);
        let mut layers = vec![Layer::Qcow2(new_layer(&top, &header, 0, options.paging))];
        open_below(io, storage, path, options, &header, &mut layers).await?;
        l1::load_all(io, &layers).await?;
        let parts = if options.read_only {
            Changeable::nothing()
        } else {
            Changeable::read(io, storage, &top, &header, &layers).await?
        };
        Ok(Arc::new(Self::assemble(layers, &top, &header, first_page, parts, options)))
    }

    fn assemble(
        layers: Vec<Layer>,
        top: &Opened,
        header: &Header,
        first_page: Vec<u8>,
        parts: Changeable,
        options: &OpenOptions,
    ) -> Self {
        let Changeable { refcount_table, territory, damage, has_lost_snapshots } = parts;
        let geometry = header.geometry();
        let flat = Flat::over(&layers);
        let shapes: Vec<Shape> =
            layers.iter().map(Layer::shape).chain(flat.iter().map(Flat::shape)).collect();
        let slots = SliceCache::slots_in(options.cache_bytes, options.paging.least_slices, shapes.len());
        let cache = SliceCache::new(slots, &shapes);
        // A quarter of the L2 cache's size is kept of refcount pages.
        let refcount_pages = (slots / 4).max(options.paging.least_refcount_pages);
        let refcounts = Refcounts::new(
            Arc::clone(&top.name),
            geometry,
            refcount_table,
            header.refcount_table,
            options.paging,
            refcount_pages,
        );
        let frees = Frees::new(options.paging.max_batches);
        let meta = Meta::new(top, geometry, first_page, refcounts, territory, frees);
        let l1_entries = layers.first().and_then(Layer::as_qcow2).map_or(0, |layer| layer.l1.len());
        Self {
            layers,
            cache,
            flat,
            sieve: Arc::clone(meta.territory.sieve()),
            damage,
            has_lost_snapshots,
            unpacked: Unpacked::default(),
            workers: OnceLock::new(),
            vouched: (0..l1_entries.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            epochs: Arc::clone(&meta.epochs),
            meta: Mutex::new(meta),
            flusher: Flusher::default(),
            autoclear: Autoclear::of(header),
            has_told_of_holes: AtomicBool::new(false),
            has_told_of_counts: AtomicBool::new(false),
            has_told_of_entries: AtomicBool::new(false),
            is_searched: AtomicBool::new(false),
            read_only: options.read_only,
            header: header.clone(),
            opened_len: top.len,
            extent_clusters: (options.extent_bytes / geometry.cluster_size()).max(1),
            paging: options.paging,
            locks: Locks::default(),
        }
    }
}

/// Opens the chain below the top layer, whose file is at `path`.
async fn open_below<I: Io>(
    io: &I,
    storage: &(impl Storage + ?Sized),
    path: &Path,
    options: &OpenOptions,
    top: &Header,
    layers: &mut Vec<Layer>,
) -> Result<()> {
    let mut next = backing::of(top, path, options.backing_format)?;
    let mut l1_bytes = u64::from(top.l1_entries) * 8;
    while let Some(backing) = next.take() {
        let overlay = layers.last().map(|layer| Arc::clone(layer.name())).unwrap_or_default();
        if layers.len() == MAX_CHAIN {
            let reason = format!("the backing chain is longer than {MAX_CHAIN} files, or a loop");
            return Err(Error::Backing { file: overlay, reason });
        }
        let from = Path::new(&*overlay).to_owned();
        let path = options.backing_policy.admit(&from, backing.path)?;
        let opened = Opened::open(storage, &path, Access::ReadOnly)?;
        layers.push(match backing.format {
            Format::Raw => {
                Layer::Raw(RawLayer { file: opened.file, name: opened.name, len: whole_sectors(opened.len) })
            }
            Format::Qcow2 => {
                let (header, _) = read_header(io, &opened, Access::ReadOnly).await?;
                l1_bytes += u64::from(header.l1_entries) * 8;
                if l1_bytes > MAX_CHAIN_L1_BYTES {
                    let reason =
                        format!("the L1 tables of the chain are larger than {MAX_CHAIN_L1_BYTES} bytes");
                    return Err(Error::Backing { file: opened.name, reason });
                }
                next = backing::of(&header, &opened.path, options.backing_format)?;
                Layer::Qcow2(new_layer(&opened, &header, layers.len() as u16, options.paging))
            }
        });
    }
    Ok(())
}

impl Meta {
    /// That of an image as it is in the file.
    fn new(
        top: &Opened,
        geometry: Geometry,
        first_page: Vec<u8>,
        refcounts: Refcounts,
        territory: Territory,
        frees: Frees,
    ) -> Self {
        let space = Space {
            cursor: HostCluster(0),
            fresh_from: HostCluster(geometry.clusters_for(top.len)),
            file_end: top.len,
            found_end: HostCluster(geometry.clusters_for(top.len)),
            room: Range::default(),
            may_be_longer: false,
        };
        Self {
            file: Arc::clone(&top.name),
            geometry,
            graph: Graph::default(),
            refcounts,
            space,
            lanes: Vec::new(),
            frees,
            territory,
            watch: Watch::default(),
            header: HeaderPage(first_page),
            cuts_begun: 0,
            epochs: Arc::new(Epochs::new()),
            redo: None,
        }
    }
}

/// Opens the top file. If its refcounts may be behind, they are repaired before it is written to; for
/// reading nobody needs them.
async fn open_top(
    io: &impl Io,
    storage: &(impl Storage + ?Sized),
    path: &Path,
    options: &OpenOptions,
) -> Result<(Opened, Header, Vec<u8>)> {
    let access = if options.read_only { Access::ReadOnly } else { Access::ReadWrite };
    let mut top = Opened::open(storage, path, access)?;
    let (header, first_page) = read_header(io, &top, access).await?;
    let is_dirty = header.incompatible & header::DIRTY != 0;
    // A repair would change what is damaged in other ways, too.
    if access == Access::ReadWrite && (is_dirty || !options.serve_corrupt) {
        header.check_writable().map_err(|source| top.unsupported(source))?;
    }
    if options.read_only || !is_dirty {
        return Ok((top, header, first_page));
    }
    let mut file = ImageFile::around(io, storage, top.file, Arc::clone(&top.name), header, top.len);
    dirty::repair_at_open(&mut file).await?;
    // A new refcount structure makes the file longer.
    top.len = file.file_len;
    let (header, first_page) = read_header(io, &top, access).await?;
    Ok((top, header, first_page))
}

/// What is needed to change an image, besides what a reader needs.
struct Changeable {
    refcount_table: Vec<u64>,
    territory: Territory,
    damage: Damage,
    has_lost_snapshots: bool,
}

impl Changeable {
    /// Of an image that is not changed.
    fn nothing() -> Self {
        Self {
            refcount_table: Vec::new(),
            territory: Territory::none(),
            damage: Damage::default(),
            has_lost_snapshots: false,
        }
    }

    async fn read(
        io: &impl Io,
        storage: &(impl Storage + ?Sized),
        top: &Opened,
        header: &Header,
        layers: &[Layer],
    ) -> Result<Self> {
        let refcount_table = read_refcount_table(io, top, header).await?;
        let snapshots = snapshot_places(io, storage, top, header).await?;
        let no_table = L1Table::empty(0);
        let (territory, damage) = Territory::of(&Sources {
            file: &top.name,
            file_len: top.len,
            header,
            l1: layers.first().and_then(Layer::as_qcow2).map_or(&no_table, |layer| &layer.l1),
            refcount_table: &refcount_table,
            snapshots: &snapshots,
        });
        let damage = match header.check_writable() {
            Ok(()) => Damage::seen(damage),
            Err(source) => Damage::marked(top.unsupported(source)),
        };
        Ok(Self { refcount_table, territory, damage, has_lost_snapshots: snapshots.are_some_lost })
    }
}

/// Where the snapshots' tables are. One whose L1 table cannot be where its entry says, however long the file,
/// is lost, and its tables are not watched over: what it has is counted, and so is copied before it changes. A
/// place that the file only does not have yet is refused: grown over, it would be taken for the L1 table, and
/// what the snapshot has for leaks.
async fn snapshot_places(
    io: &impl Io,
    storage: &(impl Storage + ?Sized),
    top: &Opened,
    header: &Header,
) -> Result<SnapshotPlaces> {
    if header.snapshot_count == 0 {
        return Ok(SnapshotPlaces::default());
    }
    let file = ImageFile::around(io, storage, top.file, Arc::clone(&top.name), header.clone(), top.len);
    let (snapshots, len) = file.snapshot_table().await?;
    file.check_has_table(len)?;
    let (table, mut l1_tables, mut are_some_lost) = (header.snapshot_table, Vec::new(), false);
    for (index, snapshot) in (0..).zip(&snapshots) {
        let check = |file_len| snapshot.check(index, table, &header.geometry(), file_len);
        match check(top.len) {
            // QEMU takes entries of old images without it, and writes it when it writes the table.
            Ok(()) | Err(FormatError::SnapshotExtraData { .. }) => {
                l1_tables.push(snapshot.l1_table.bytes(u64::from(snapshot.l1_entries) * 8));
            }
            Err(source) if matches!(check(u64::MAX), Err(FormatError::SnapshotL1 { .. })) => {
                if !are_some_lost {
                    tracing::warn!(
                        "{}: {source}: its tables are not watched over, and no leaks are given back",
                        top.name
                    );
                }
                are_some_lost = true;
            }
            Err(source) => {
                let source = Arc::new(source);
                return Err(Error::SnapshotBeyondFile { file: Arc::clone(&top.name), source });
            }
        }
    }
    l1_tables.retain(|table| !table.is_empty());
    let l2_tables = snapshot_l2s(&file, &l1_tables).await;
    Ok(SnapshotPlaces { table: table.bytes(len), l1_tables, l2_tables, are_some_lost })
}

/// The L2 tables that snapshots' L1 tables name, the newest snapshots' first, up to
/// [`MAX_SNAPSHOT_L1_BYTES`]. They are only wanted to keep damage away from them: what cannot be read, or
/// makes no sense, is passed over.
async fn snapshot_l2s(file: &ImageFile<'_, impl Io>, l1_tables: &[Range<HostOffset>]) -> Arc<[HostCluster]> {
    let geometry = file.geometry();
    let (mut tables, mut left) = (Vec::new(), MAX_SNAPSHOT_L1_BYTES);
    for l1 in l1_tables.iter().rev() {
        let len = l1.end.0 - l1.start.0;
        let Some(rest) = left.checked_sub(len.max(LEAST_L1_BYTES)) else { break };
        left = rest;
        match file.read_entries(l1.start.0, len / 8).await {
            Ok(entries) => {
                tables.extend(entries.into_iter().filter_map(|raw| match L1Entry::decode(raw, &geometry) {
                    Ok(L1Entry::Table { offset, .. }) => Some(geometry.host_cluster(offset)),
                    Ok(L1Entry::Unallocated) | Err(_) => None,
                }))
            }
            Err(error) => tracing::warn!("{error}: a snapshot's L2 tables are not watched over"),
        }
    }
    tables.sort_unstable();
    tables.dedup();
    tables.into()
}

/// The checked header, and the first page of the file for later changes to it.
async fn read_header(io: &impl Io, opened: &Opened, access: Access) -> Result<(Header, Vec<u8>)> {
    let (header, defects, mut bytes) = opened.header(io).await?;
    let of_tables = defects.refcount_table.or(defects.snapshot_table);
    if access == Access::ReadOnly
        && let Some(defect) = &of_tables
    {
        tracing::warn!(
            "{}: {defect}: the image can be read only, until check --repair all has made a new table",
            opened.name
        );
    }
    let of_tables = of_tables.filter(|_| access == Access::ReadWrite);
    let unusable = defects.l1_table.or(of_tables).or(defects.snapshot_count);
    if let Some(source) = unusable {
        return Err(opened.damaged(source));
    }
    header.check_supported().map_err(|source| opened.unsupported(source))?;
    bytes.resize(header.geometry().cluster_size().min(MAX_PAGE) as usize, 0);
    Ok((header, bytes))
}

/// A layer, whose L1 table is still to be read.
fn new_layer(opened: &Opened, header: &Header, index: u16, paging: Paging) -> Qcow2Layer {
    let geometry = header.geometry();
    let slice_bytes = geometry.cluster_size().min(paging.page_bytes);
    let l1_bytes = (u64::from(header.l1_entries) * 8).next_multiple_of(slice_bytes);
    Qcow2Layer {
        index,
        file: opened.file,
        name: Arc::clone(&opened.name),
        geometry,
        slice_bytes,
        compression: header.compression,
        l1: L1Table::empty(l1_bytes as usize / 8),
        l1_at: header.l1_table,
    }
}

async fn read_refcount_table(io: &impl Io, opened: &Opened, header: &Header) -> Result<Vec<u64>> {
    let len = u64::from(header.refcount_table_clusters) * header.geometry().cluster_size();
    let bytes = opened.read(io, "refcount table read", header.refcount_table.0, len as usize).await?;
    Ok(word::all(&bytes).collect())
}
