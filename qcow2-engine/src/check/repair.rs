//! Repair, in an order in which a crash at any moment leaves the image no worse than it was.
//!
//! ```text
//! entries that cannot be right are cleared, counts are raised or rebuilt, wrong copied flags removed
//!   → counts are lowered → copied flags that are missing are set → the image's mark is cleared
//! ```
//!
//! with a barrier at each arrow, and in a rebuild one before the file grows and one before the header
//! changes (R9). Within the first line the order does not matter: a reference fewer, a count higher and a
//! flag fewer are no harm alone. So a count is never below the number of references where it was not
//! before, and a copied flag is set only where the count has durably become 1.

use super::{
    clear_unknown_autoclear,
    compare::chunks_in_use,
    entry::{L2Words, Target, l2_words, put_l2_words},
    findings::{Findings, Owner},
    on_disk::CountsOnDisk,
    rebuild,
    survey::Survey,
    tables::L1Place,
};
use crate::{
    error::Result,
    inspect::ImageFile,
    io::{Io, whole_sectors},
    order::rules::RuleName,
};
use qcow2_format::{Clusters, HostCluster, HostOffset, geometry::TABLE_ENTRY_BYTES, l1, l2, refcount, word};
use std::collections::HashSet;

/// How far a repair goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Repair {
    /// Nothing is changed.
    #[default]
    None,
    /// Leaked clusters are freed.
    Leaks,
    /// Whatever can be repaired without guessing.
    All,
}

/// Which way refcounts are changed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    Raise,
    Lower,
}

/// What is changed in L1 and L2 tables.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    /// Damaged entries are corrected, those beyond the file cleared.
    Entries,
    /// Copied flags are removed where the count is not 1.
    UnsetCopied,
    /// Copied flags are set where the count is 1.
    SetCopied,
}

/// Repairs what `survey` has found. Returns what could not be done, in words.
pub(super) async fn run(
    file: &mut ImageFile<'_, impl Io>,
    mut survey: Survey,
    repair: Repair,
) -> Result<Vec<&'static str>> {
    let mut refused = Vec::new();
    if repair == Repair::All && !survey.doubts.tables.is_empty() {
        refused.push("L2 tables with entries that make no sense, or that overlap data, are left as they are");
    }
    if repair == Repair::All && !survey.doubts.shared_l1.is_empty() {
        refused.push("entries of L1 tables that overlap something else are left as they are");
    }
    if repair == Repair::All && !survey.doubts.senseless_l1.is_empty() {
        refused.push("L1 tables with entries that make no sense are left as they are");
    }
    clear_unknown_autoclear(file).await?;
    let had_corruptions = survey.findings.corruptions > 0;
    if repair == Repair::All && had_corruptions {
        edit_tables(file, &mut survey, Pass::Entries).await?;
        adjust_counts(file, &survey, Direction::Raise).await?;
        if survey.replacement.is_needed {
            refused.extend(rebuild::run(file, &mut survey).await?);
        }
        // Snapshots that should have gone are still there, and are not to lose what they refer to.
        survey.doubts.hides_references |= survey.replacement.snapshots.is_some();
        survey.forget_counts();
        edit_tables(file, &mut survey, Pass::UnsetCopied).await?;
        file.barrier(RuleName::EntriesBeforeCounts).await?;
    }
    let may_lower = match repair {
        Repair::All => !survey.doubts.hides_references,
        _ => !survey.doubts.hides_references && !survey.doubts.lost_tables,
    };
    if may_lower {
        adjust_counts(file, &survey, Direction::Lower).await?;
        file.barrier(RuleName::CountsBeforeFlags).await?;
    } else if survey.findings.leaks > 0 {
        refused.push("leaked clusters are kept: damaged tables may hide references to them");
    }
    // Where nothing but flags was wrong, they follow from the counts. A cluster to which references may be
    // hidden is not said to have one owner.
    let Findings { leaks, corruptions, wrong_flags, .. } = survey.findings;
    let may_set = repair == Repair::All || corruptions == wrong_flags && leaks + wrong_flags > 0;
    if !may_set {
        return Ok(refused);
    }
    if !survey.doubts.hides_references {
        correct_flags(file, &mut survey, repair).await?;
    } else if wrong_flags > 0 {
        refused.push("copied flags that are missing are left so: damaged tables may hide references");
    }
    Ok(refused)
}

impl Survey {
    /// The counts on disk have changed.
    fn forget_counts(&mut self) {
        let blocks = std::mem::take(&mut self.on_disk.blocks);
        self.on_disk = CountsOnDisk::new(self.rules.geometry, blocks);
    }
}

/// Has the copied flags follow from the counts.
async fn correct_flags(file: &mut ImageFile<'_, impl Io>, survey: &mut Survey, repair: Repair) -> Result<()> {
    survey.forget_counts();
    if repair != Repair::All {
        edit_tables(file, survey, Pass::UnsetCopied).await?;
    }
    edit_tables(file, survey, Pass::SetCopied).await?;
    file.barrier(RuleName::RepairBeforeMark).await
}

/// Makes the counts agree with the references, in one direction.
async fn adjust_counts(file: &ImageFile<'_, impl Io>, survey: &Survey, direction: Direction) -> Result<()> {
    let geometry = *survey.geometry();
    let order = geometry.refcount_order;
    let referred = survey.blocks_in_use();
    for (&index, &block) in &survey.on_disk.blocks {
        if direction == Direction::Raise && !referred.contains(&index) {
            continue;
        }
        let old = match file.read_cluster(block).await {
            Ok(Some(old)) => old,
            Ok(None) if direction == Direction::Raise => vec![0; geometry.cluster_size() as usize],
            // There is nothing to lower; what could not be read was reported, and stays.
            Ok(None) | Err(_) => continue,
        };
        let mut new = old.clone();
        for cluster in chunks_in_use(survey, index, &old).flat_map(Clusters::each) {
            let in_block = geometry.refcount_block_index(cluster) as usize;
            let count = refcount::get(&old, order, in_block);
            let wanted = survey.tally.references(cluster).min(geometry.refcount_max());
            let changes = match direction {
                Direction::Raise => count < wanted,
                Direction::Lower => count > wanted,
            };
            if changes {
                refcount::set(&mut new, order, in_block, wanted);
            }
        }
        file.write_changes(geometry.host_offset(block).0, &old, &new).await?;
    }
    Ok(())
}

/// Goes over all L1 and L2 tables that the survey has walked, and corrects entries.
async fn edit_tables(file: &ImageFile<'_, impl Io>, survey: &mut Survey, pass: Pass) -> Result<()> {
    let mut edited = HashSet::new();
    for l1 in survey.tables.l1.clone() {
        if pass != Pass::Entries && l1.owner != Owner::ActiveL1 {
            continue;
        }
        let len = whole_sectors(l1.entries * TABLE_ENTRY_BYTES);
        let old = match file.read(l1.at, len).await {
            Ok(old) => old,
            Err(error) => {
                survey.unusable(l1.owner, l1.at, error);
                continue;
            }
        };
        let mut new = old.clone();
        for (index, raw) in word::all(&old).take(l1.entries as usize).enumerate() {
            let (changed, table) = edit_l1_entry(file, survey, pass, raw).await?;
            word::set(&mut new, index * TABLE_ENTRY_BYTES as usize, changed);
            if let Some(table) = table.filter(|&table| survey.is_l2_table(table) && edited.insert(table)) {
                edit_l2_table(file, survey, pass, &l1, table).await?;
            }
        }
        if pass != Pass::Entries || !survey.is_doubtful(&l1) {
            file.write_changes(l1.at, &old, &new).await?;
        }
    }
    Ok(())
}

impl Survey {
    /// Whether an L1 table is something else, too, all of it or a part, or may be.
    fn is_doubtful(&self, l1: &L1Place) -> bool {
        let bytes = HostOffset(l1.at).bytes(l1.entries * TABLE_ENTRY_BYTES);
        let mut clusters = self.geometry().host_clusters(&bytes).each();
        self.doubts.senseless_l1.contains(&l1.at)
            || clusters.any(|cluster| self.doubts.shared_l1.contains(&cluster))
    }

    /// Whether an L2 table is that and nothing else, as far as can be known.
    fn is_l2_table(&self, cluster: HostCluster) -> bool {
        self.tally.metadata(cluster) == Some(Owner::L2) && !self.doubts.concern(cluster)
    }

    /// Whether the copied flag of an entry that names `host` has to change.
    async fn flag_changes(
        &mut self,
        file: &ImageFile<'_, impl Io>,
        pass: Pass,
        host: HostCluster,
        copied: bool,
    ) -> Result<bool> {
        let is_candidate = match pass {
            Pass::Entries => false,
            Pass::UnsetCopied => copied,
            Pass::SetCopied => !copied,
        };
        if !is_candidate {
            return Ok(false);
        }
        let count = self.on_disk.get(file, host).await?;
        Ok(copied != (count == 1))
    }
}

/// The entry as it should be, and the L2 table that it names.
async fn edit_l1_entry(
    file: &ImageFile<'_, impl Io>,
    survey: &mut Survey,
    pass: Pass,
    raw: u64,
) -> Result<(u64, Option<HostCluster>)> {
    let judged = survey.rules.judge_l1(raw);
    let kept = if pass == Pass::Entries { judged.repaired.unwrap_or(raw) } else { raw };
    let Some((host, copied)) = judged.table else { return Ok((kept, None)) };
    if survey.rules.is_table_beyond_file(host) {
        return Ok((if pass == Pass::Entries { 0 } else { kept }, None));
    }
    let flag = if survey.flag_changes(file, pass, host, copied).await? { l1::COPIED } else { 0 };
    Ok((kept ^ flag, Some(host)))
}

async fn edit_l2_table(
    file: &ImageFile<'_, impl Io>,
    survey: &mut Survey,
    pass: Pass,
    l1: &L1Place,
    table: HostCluster,
) -> Result<()> {
    debug_assert!(pass == Pass::Entries || l1.owner == Owner::ActiveL1);
    let rules = survey.rules;
    let old = match file.read_cluster(table).await {
        Ok(Some(old)) => old,
        Ok(None) => return Ok(()),
        // It could be read a moment ago. What it refers to is hidden now, from the steps that follow too.
        Err(error) => {
            survey.unusable(Owner::L2, rules.geometry.host_offset(table).0, error);
            return Ok(());
        }
    };
    let mut new = old.clone();
    for (index, words) in l2_words(&old, &rules).enumerate() {
        if words == L2Words::default() {
            continue;
        }
        let changed = match pass {
            Pass::Entries => corrected(survey, words),
            _ => with_right_flag(file, survey, pass, words).await?,
        };
        put_l2_words(&mut new, &rules, index, changed);
    }
    file.write_changes(rules.geometry.host_offset(table).0, &old, &new).await
}

fn corrected(survey: &Survey, words: L2Words) -> L2Words {
    let rules = &survey.rules;
    let judged = rules.judge(words);
    let kept = judged.repaired.unwrap_or(words);
    let goes = rules.missing(judged.target).is_some() || survey.needless(words).is_some();
    if goes { rules.without_cluster(words).unwrap_or(kept) } else { kept }
}

async fn with_right_flag(
    file: &ImageFile<'_, impl Io>,
    survey: &mut Survey,
    pass: Pass,
    words: L2Words,
) -> Result<L2Words> {
    let flips = match survey.rules.judge(words).target {
        Target::Cluster { host, copied } => survey.flag_changes(file, pass, host, copied).await?,
        Target::External { copied, .. } => pass == Pass::SetCopied && !copied,
        _ => false,
    };
    Ok(L2Words { entry: words.entry ^ if flips { l2::COPIED } else { 0 }, ..words })
}
