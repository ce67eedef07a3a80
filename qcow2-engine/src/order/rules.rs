//! The ordering rules, each with its name and its one constructor.
//!
//! Their text and the argument for them stand in docs/crash-consistency.md. A [`Rule`] says that a page may
//! be written only after something else is durable: another page, or the payload that was written before the
//! page was changed. Rule 5 (freeing runs backwards) is not an edge between pages: [`crate::alloc::frees`]
//! holds a freed cluster back until the cut that unmaps it is durable. Rule 6 is what a flush waits for:
//! [`crate::flush`]. Rule 7 is what an acknowledgement waits for: [`crate::redo`]. Rule 8 is what the search
//! for leaks keeps away from: [`crate::leaks`]. Rules 9 and 10 are barriers between the steps of a repair
//! ([`mod@crate::check`]) and of making an image ([`crate::create`]).

/// A metadata page: the unit of write-back. Numbers count pages (or slices) from the table's start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Page {
    /// A page of the refcount blocks, counted over all blocks.
    Refcount(u64),
    /// A page of the refcount table.
    RefcountTable(u64),
    /// A slice of an L2 table, in guest order.
    L2(u64),
    /// A page of the active L1 table.
    L1(u64),
    /// The image header's first page.
    Header,
}

/// The rule that a mutation check has switched off. In what is served it is known to be none.
#[derive(Default)]
pub(crate) struct Disabled(Option<RuleName>);

impl Disabled {
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn set(&mut self, rule: RuleName) {
        self.0 = Some(rule);
    }

    pub(crate) fn is(&self, rule: RuleName) -> bool {
        cfg!(any(test, feature = "sim")) && self.0 == Some(rule)
    }
}

/// What has to be durable first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Before {
    /// The page's present content.
    Page(Page),
    /// Everything that was written to data clusters up to now.
    Payload,
}

/// The rules' numbers, as in docs/crash-consistency.md.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RuleName {
    /// R1: a refcount is raised before anything refers to the cluster.
    RefcountBeforeReference,
    /// R2: a new refcount block is written before the refcount table points to it.
    BlockBeforeTable,
    /// R2: a moved table, of refcounts or L1, is written before the header points to it.
    TableBeforeHeader,
    /// R3: payload, COW edges and zeroing of a new cluster precede the entry that publishes it.
    PayloadBeforeMapping,
    /// R4: a new L2 table's content precedes its L1 entry.
    L2BeforeL1,
    /// R5: an unmapping is durable before the cluster is counted down, punched or reused.
    UnmapBeforeReuse,
    /// R5: requests that were in flight at the unmapping end before the cluster is reused.
    RequestsBeforeReuse,
    /// R6: a flush returns when a cut that began after it arrived is durable.
    CutBeforeFlushReturns,
    /// R7: a change of the mapping is in the redo log before its request is acknowledged.
    RedoBeforeAcknowledgement,
    /// R8: a cluster whose count changes is no leak.
    CountedIsNoLeak,
    /// R8: a cluster that the mapping lets go of, or that waits to be freed, is no leak.
    UnmappedIsNoLeak,
    /// R8: a cluster in a lane's extent is no leak.
    ReservedIsNoLeak,
    /// R8: requests that were in flight when the search began end before references are counted.
    RequestsBeforeSearch,
    /// R8: what was changed before is on disk when references are counted.
    CutBeforeSearch,
    /// R9: a repair clears what names places beyond the end of the file before it makes the file longer.
    EntriesBeforeGrowth,
    /// R9: a rebuilt refcount structure is written before the header names it.
    RebuiltBeforeHeader,
    /// R9: a repair clears entries before it lowers the counts of what they named.
    EntriesBeforeCounts,
    /// R9: a repair lowers a count to one before it says that the cluster has one owner.
    CountsBeforeFlags,
    /// R9: all is repaired before the mark goes that asks for a repair.
    RepairBeforeMark,
    /// R10: what a file held before is no image any more when a new one is made of it.
    WipeBeforeContent,
    /// R10: a new image's tables are written before its header.
    ContentBeforeHeader,
}

impl RuleName {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::RefcountBeforeReference,
        Self::BlockBeforeTable,
        Self::TableBeforeHeader,
        Self::PayloadBeforeMapping,
        Self::L2BeforeL1,
        Self::UnmapBeforeReuse,
        Self::RequestsBeforeReuse,
        Self::CutBeforeFlushReturns,
        Self::RedoBeforeAcknowledgement,
        Self::CountedIsNoLeak,
        Self::UnmappedIsNoLeak,
        Self::ReservedIsNoLeak,
        Self::RequestsBeforeSearch,
        Self::CutBeforeSearch,
        Self::EntriesBeforeGrowth,
        Self::RebuiltBeforeHeader,
        Self::EntriesBeforeCounts,
        Self::CountsBeforeFlags,
        Self::RepairBeforeMark,
        Self::WipeBeforeContent,
        Self::ContentBeforeHeader,
    ];

    /// Whether it orders what a tool does to an image that nobody serves.
    #[must_use]
    pub fn is_of_tools(self) -> bool {
        matches!(
            self,
            Self::EntriesBeforeGrowth
                | Self::RebuiltBeforeHeader
                | Self::EntriesBeforeCounts
                | Self::CountsBeforeFlags
                | Self::RepairBeforeMark
                | Self::WipeBeforeContent
                | Self::ContentBeforeHeader
        )
    }
}

/// One ordering constraint: `before` is durable before `page` is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rule {
    pub(crate) name: RuleName,
    pub(crate) before: Before,
    pub(crate) page: Page,
}

impl Rule {
    /// R1. `count` holds (or leads to) the refcount of a cluster that `reference` now points to.
    pub(crate) fn refcount_before_reference(count: Page, reference: Page) -> Self {
        Self { name: RuleName::RefcountBeforeReference, before: Before::Page(count), page: reference }
    }

    /// R2. `block` is a page of a new refcount block that `table` now points to.
    pub(crate) fn block_before_table(block: Page, table: Page) -> Self {
        Self { name: RuleName::BlockBeforeTable, before: Before::Page(block), page: table }
    }

    /// R2. `table` is a page of a table whose place the header is about to name.
    pub(crate) fn table_before_header(table: Page) -> Self {
        Self { name: RuleName::TableBeforeHeader, before: Before::Page(table), page: Page::Header }
    }

    /// R2. The header is about to name an L1 table that was written, as a whole, before now. A crash shows
    /// the absence of this alone in no case: the new table's counts (R1) have a barrier at the same place.
    pub(crate) fn moved_l1_before_header() -> Self {
        Self { name: RuleName::TableBeforeHeader, before: Before::Payload, page: Page::Header }
    }

    /// R3. `mapping` publishes a cluster whose bytes were written before now.
    pub(crate) fn payload_before_mapping(mapping: Page) -> Self {
        Self { name: RuleName::PayloadBeforeMapping, before: Before::Payload, page: mapping }
    }

    /// R4. `l1` points to a new L2 table whose content was written, as a whole, before now.
    pub(crate) fn table_content_before_l1(l1: Page) -> Self {
        Self { name: RuleName::L2BeforeL1, before: Before::Payload, page: l1 }
    }

    /// R4. `slice` belongs to a new L2 table that `l1` now points to.
    pub(crate) fn l2_before_l1(slice: Page, l1: Page) -> Self {
        Self { name: RuleName::L2BeforeL1, before: Before::Page(slice), page: l1 }
    }
}
