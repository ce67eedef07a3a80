//! What a place in the file is used for: a word that serving and checking share.

use std::fmt;

/// What a part of the file is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Owner {
    /// The header cluster.
    Header = 1,
    /// The active L1 table.
    ActiveL1,
    /// The L1 table of a snapshot.
    SnapshotL1,
    /// An L2 table.
    L2,
    /// The refcount table.
    RefcountTable,
    /// A refcount block.
    RefcountBlock,
    /// The snapshot table.
    SnapshotTable,
    /// The LUKS header.
    EncryptionHeader,
    /// The bitmap directory.
    BitmapDirectory,
    /// A bitmap table.
    BitmapTable,
    /// The bits of a bitmap.
    BitmapData,
    /// A guest cluster.
    Data,
    /// Compressed guest clusters.
    Compressed,
}

impl Owner {
    const METADATA: [Self; 11] = [
        Self::Header,
        Self::ActiveL1,
        Self::SnapshotL1,
        Self::L2,
        Self::RefcountTable,
        Self::RefcountBlock,
        Self::SnapshotTable,
        Self::EncryptionHeader,
        Self::BitmapDirectory,
        Self::BitmapTable,
        Self::BitmapData,
    ];

    /// Whether it is a part of the refcount structure, which can be made anew from everything else.
    pub(crate) fn is_of_refcounts(self) -> bool {
        matches!(self, Self::RefcountTable | Self::RefcountBlock)
    }

    /// The metadata that `number` stands for: the reverse of `as u8`.
    pub(crate) fn metadata(number: u8) -> Option<Self> {
        Self::METADATA.get(usize::from(number).checked_sub(1)?).copied()
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Header => "header",
            Self::ActiveL1 => "active L1 table",
            Self::SnapshotL1 => "L1 table of a snapshot",
            Self::L2 => "L2 table",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::SnapshotTable => "snapshot table",
            Self::EncryptionHeader => "encryption header",
            Self::BitmapDirectory => "bitmap directory",
            Self::BitmapTable => "bitmap table",
            Self::BitmapData => "bitmap",
            Self::Data => "data cluster",
            Self::Compressed => "compressed data",
        })
    }
}
