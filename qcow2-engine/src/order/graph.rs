//! The dependency graph of dirty metadata pages.
//!
//! Pages become dirty one by one, rules tie them together, and a *cut* takes everything that is
//! dirty at one moment: the pages are copied then, so that the cut is a consistent state of the
//! metadata whatever is changed afterwards. [`Plan`] arranges a cut in waves: the pages of a wave
//! depend only on earlier waves, so a wave is written in parallel and a barrier stands between two.
//! Only one cut is under way at a time; that the previous one has ended is what lets an edge to a
//! page that is not in the present cut be forgotten.

use super::rules::{Before, Disabled, Page, Rule, RuleName};
use std::collections::{BTreeMap, BTreeSet};

/// The dirty pages and what each waits for.
#[derive(Default)]
pub(crate) struct Graph {
    dirty: BTreeMap<Page, BTreeSet<Before>>,
    /// Pages of the cut under way: not durable yet, so still worth an edge.
    under_way: BTreeSet<Page>,
    disabled: Disabled,
}

/// A cut, arranged: wave after wave, with a barrier after each.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// The first wave may be empty: its barrier is then for the payload alone.
    pub(crate) waves: Vec<Vec<Page>>,
    edges: BTreeMap<Page, BTreeSet<Before>>,
}

impl Graph {
    /// Switches a rule off, for the mutation check.
    #[cfg(any(test, feature = "sim"))]
    pub(crate) fn disable(&mut self, rule: RuleName) {
        self.disabled.set(rule);
    }

    /// Whether a mutation check has switched the rule off.
    pub(crate) fn is_disabled(&self, rule: RuleName) -> bool {
        self.disabled.is(rule)
    }

    /// Number of dirty pages.
    pub(crate) fn len(&self) -> usize {
        self.dirty.len()
    }

    /// Whether a page must not be dropped from memory: dirty, or being written.
    pub(crate) fn holds(&self, page: Page) -> bool {
        self.dirty.contains_key(&page) || self.under_way.contains(&page)
    }

    /// Whether a page has changes that no cut has taken yet.
    pub(crate) fn is_dirty(&self, page: Page) -> bool {
        self.dirty.contains_key(&page)
    }

    /// Makes a page dirty.
    pub(crate) fn touch(&mut self, page: Page) {
        self.dirty.entry(page).or_default();
    }

    /// Adds a rule, and makes its page dirty. A page that is durable already is no obstacle.
    pub(crate) fn require(&mut self, rule: Rule) {
        let waits = match rule.before {
            Before::Page(before) => before != rule.page && self.holds(before),
            Before::Payload => true,
        };
        let binds = waits && !self.is_disabled(rule.name);
        self.dirty.entry(rule.page).or_default().extend(binds.then_some(rule.before));
    }

    /// Takes all dirty pages out, in waves. The caller copies the pages before it lets anyone
    /// change them, and ends the cut with [`Self::retire`] or [`Self::give_back`].
    ///
    /// # Panics
    /// When the rules form a cycle: a defect of this engine, not of an image.
    pub(crate) fn cut(&mut self) -> Plan {
        assert!(self.under_way.is_empty(), "one cut at a time");
        let edges = std::mem::take(&mut self.dirty);
        self.under_way = edges.keys().copied().collect();
        let mut waves: Vec<Vec<Page>> = Vec::new();
        let mut placed = BTreeMap::new();
        for &page in edges.keys() {
            let wave = depth(page, &edges, &mut placed, edges.len());
            waves.resize_with(waves.len().max(wave + 1), Vec::new);
            waves[wave].push(page);
        }
        Plan { waves, edges }
    }

    /// The page's copy of this cut is durable.
    pub(crate) fn retire(&mut self, page: Page) {
        self.under_way.remove(&page);
    }

    /// Ends a cut that failed: the pages that are not durable are dirty again, with their rules.
    pub(crate) fn give_back(&mut self, mut plan: Plan) {
        for page in std::mem::take(&mut self.under_way) {
            let edges = plan.edges.remove(&page).unwrap_or_default();
            self.dirty.entry(page).or_default().extend(edges);
        }
    }
}

/// The wave of a page: one more than the deepest thing that it waits for.
fn depth(
    page: Page,
    edges: &BTreeMap<Page, BTreeSet<Before>>,
    placed: &mut BTreeMap<Page, usize>,
    budget: usize,
) -> usize {
    if let Some(&wave) = placed.get(&page) {
        return wave;
    }
    assert!(budget > 0, "cycle of ordering rules through {page:?}");
    let wave = edges[&page]
        .iter()
        .map(|before| match before {
            Before::Payload => 1,
            Before::Page(before) if edges.contains_key(before) => {
                depth(*before, edges, placed, budget - 1) + 1
            }
            Before::Page(_) => 0,
        })
        .max()
        .unwrap_or(0);
    placed.insert(page, wave);
    wave
}

#[cfg(test)]
mod tests {
    use super::*;

    const COUNT: Page = Page::Refcount(3);
    const TABLE: Page = Page::RefcountTable(0);
    const SLICE: Page = Page::L2(9);
    const L1: Page = Page::L1(0);

    fn waves(rules: &[Rule], dirty: &[Page]) -> Vec<Vec<Page>> {
        let mut graph = Graph::default();
        dirty.iter().for_each(|&page| graph.touch(page));
        rules.iter().for_each(|&rule| graph.require(rule));
        graph.cut().waves
    }

    #[test]
    fn r1_refcount_before_reference() {
        assert_eq!(waves(&[Rule::refcount_before_reference(COUNT, SLICE)], &[COUNT]), [[COUNT], [SLICE]]);
    }

    #[test]
    fn r1_a_durable_refcount_is_no_obstacle() {
        assert_eq!(waves(&[Rule::refcount_before_reference(COUNT, SLICE)], &[]), [[SLICE]]);
    }

    #[test]
    fn r2_block_before_table() {
        assert_eq!(waves(&[Rule::block_before_table(COUNT, TABLE)], &[COUNT]), [[COUNT], [TABLE]]);
    }

    #[test]
    fn r2_table_before_header() {
        assert_eq!(waves(&[Rule::table_before_header(TABLE)], &[TABLE]), [[TABLE], [Page::Header]]);
    }

    #[test]
    fn r2_moved_l1_before_header() {
        assert_eq!(waves(&[Rule::moved_l1_before_header()], &[]), [vec![], vec![Page::Header]]);
    }

    #[test]
    fn r3_payload_before_mapping() {
        assert_eq!(waves(&[Rule::payload_before_mapping(SLICE)], &[]), [vec![], vec![SLICE]]);
    }

    #[test]
    fn r4_table_content_before_l1() {
        assert_eq!(waves(&[Rule::table_content_before_l1(L1)], &[]), [vec![], vec![L1]]);
    }

    #[test]
    fn r4_l2_before_l1() {
        assert_eq!(waves(&[Rule::l2_before_l1(SLICE, L1)], &[SLICE]), [[SLICE], [L1]]);
    }

    #[test]
    fn a_whole_allocation_falls_into_the_documented_order() {
        let rules = [
            Rule::block_before_table(COUNT, TABLE),
            Rule::refcount_before_reference(COUNT, SLICE),
            Rule::refcount_before_reference(TABLE, SLICE),
            Rule::payload_before_mapping(SLICE),
            Rule::l2_before_l1(SLICE, L1),
        ];
        assert_eq!(waves(&rules, &[COUNT, TABLE, SLICE]), [[COUNT], [TABLE], [SLICE], [L1]]);
    }

    /// Let go of while it is written, a page would be read back as it was before.
    #[test]
    fn a_page_is_held_until_its_copy_is_durable() {
        let (mut graph, page) = (Graph::default(), Page::Refcount(3));
        graph.touch(page);
        assert!(graph.holds(page) && graph.is_dirty(page));
        graph.cut();
        assert!(graph.holds(page) && !graph.is_dirty(page));
        graph.retire(page);
        assert!(!graph.holds(page));
    }

    #[test]
    fn an_edge_to_the_cut_under_way_survives_its_failure() {
        let mut graph = Graph::default();
        graph.touch(COUNT);
        let plan = graph.cut();
        graph.require(Rule::refcount_before_reference(COUNT, SLICE));
        graph.give_back(plan);
        assert_eq!(graph.cut().waves, [[COUNT], [SLICE]]);
    }

    #[test]
    fn a_disabled_rule_binds_nothing() {
        let mut graph = Graph::default();
        graph.disable(RuleName::PayloadBeforeMapping);
        graph.require(Rule::payload_before_mapping(SLICE));
        assert_eq!(graph.cut().waves, [[SLICE]]);
    }
}
