//! A document as Markdown, and its short form for the terminal. Pure: the same document gives the same text.

use super::{
    document::{Document, EngineResult, Sample, Unit},
    matrix::{self, Engine},
    stats::Spread,
    targets::{TARGETS, Verdict},
};
use std::fmt::Write;

/// The page of a document. `plots` are the names of the groups that have one, and its file.
pub(super) fn page(document: &Document, plots: &[(String, String)]) -> String {
    let mut text = format!(
        "# Linux {}, {}\n\nWritten by `cargo xtask bench`; [what is measured, and how](README.md).\n\n",
        document.kernel,
        mode(document)
    );
    text += &targets(document);
    for group in groups(document) {
        let _ = write!(text, "## {group}\n\n");
        if let Some((_, file)) = plots.iter().find(|(name, _)| *name == group) {
            let _ = write!(text, "![{group}, against qemu-nbd]({file})\n\n");
        }
        text += &table(document, &group);
        text += "\n";
    }
    text += &silent(document);
    text + &boots(document)
}

/// What a run has to say on the terminal: its targets and tables.
pub(super) fn summary(document: &Document) -> String {
    let mut text = targets(document);
    for group in groups(document) {
        let _ = write!(text, "{group}\n\n{}\n", table(document, &group));
    }
    text + &silent(document)
}

fn mode(document: &Document) -> &'static str {
    if document.mode == "count" { "instruction counts" } else { "wall-clock time" }
}

/// The first parts of the rows' names, in the order of the rows.
pub(super) fn groups(document: &Document) -> Vec<String> {
    let mut groups: Vec<String> = Vec::new();
    for name in document.names() {
        let group = group_of(name);
        if !groups.iter().any(|known| known == group) {
            groups.push(group.to_owned());
        }
    }
    groups
}

/// Chains belong together, and so do sizes.
pub(super) fn group_of(row: &str) -> &str {
    let first = row.split('/').next().unwrap_or(row);
    match first {
        _ if first.starts_with("chain-") => "chains",
        _ if first.starts_with("mapped-") => "sizes",
        _ => first,
    }
}

fn targets(document: &Document) -> String {
    let mut text = String::from("## Targets\n\n| work | target | measured | |\n|---|---|---|---|\n");
    for target in TARGETS {
        let (measured, verdict) = match target.judge(document) {
            Verdict::Reached(spread) => (span(&spread), "reached".to_owned()),
            Verdict::NotReached(spread) => (span(&spread), "**not reached**".to_owned()),
            Verdict::NotMeasured(why) => ("–".to_owned(), why),
        };
        let _ = writeln!(text, "| {} | {} | {measured} | {verdict} |", target.work(), target.wanted());
    }
    text + "\n"
}

/// Figures of every engine, and how many times better we are, round by round: median (least–most).
fn table(document: &Document, group: &str) -> String {
    let peers = Engine::ALL.into_iter().filter(|engine| *engine != Engine::Us);
    let heads: Vec<_> = Engine::ALL.map(|engine| engine.name().to_owned()).into();
    let ratios: Vec<_> = peers.clone().map(|peer| format!("us / {}", peer.name())).collect();
    let unit = document.rows.iter().find(|(name, _)| group_of(name) == group).map(|(_, row)| row.unit);
    let first = match unit {
        Some(Unit::Milliseconds) => "milliseconds",
        Some(Unit::MiB) => "MiB",
        _ => "requests per second",
    };
    let mut text = format!("| {first} | {} | {} |\n", heads.join(" | "), ratios.join(" | "));
    text += &format!("|---|{}\n", "---:|".repeat(heads.len() + ratios.len()));
    for name in document.names().into_iter().filter(|name| group_of(name) == group) {
        let figures: Vec<_> = Engine::ALL.iter().map(|engine| cell(document, name, *engine)).collect();
        let ratios = peers.clone().map(|peer| {
            document
                .advantage((name, Engine::Us), (name, peer))
                .map_or("–".to_owned(), |spread| span(&spread))
        });
        let ratios: Vec<_> = ratios.collect();
        let _ = writeln!(text, "| {name} | {} | {} |", figures.join(" | "), ratios.join(" | "));
    }
    text + &excluded(document, group)
}

/// Why engines have no part in rows of the group.
fn excluded(document: &Document, group: &str) -> String {
    let rows = matrix::rows();
    let shown = |row: &&matrix::Row| {
        let name = row.name();
        group_of(&name) == group && document.rows.contains_key(&name)
    };
    let mut notes = Vec::new();
    for row in rows.iter().filter(shown) {
        for engine in Engine::ALL {
            let note = row.image.excludes(engine).map(|why| format!("{}: {why}", engine.name()));
            notes.extend(note.filter(|note| !notes.contains(note)));
        }
    }
    if notes.is_empty() { String::new() } else { format!("\nNo part in some rows: {}.\n", notes.join("; ")) }
}

fn cell(document: &Document, row: &str, engine: Engine) -> String {
    let Some(result) = document.engine(row, engine) else { return "–".into() };
    let unit = document.rows[row].unit;
    let side = |pick: fn(&Sample) -> f64| document.figure(row, engine, pick).map(|spread| spread.median);
    match (side(|s| s.read), side(|s| s.write), side(|s| s.value)) {
        (Some(read), Some(write), _) if read > 0.0 && write > 0.0 => {
            format!("{} / {}", short(read), short(write))
        }
        (_, _, Some(value)) if unit == Unit::RequestsPerSecond => short(value),
        (_, _, Some(value)) => format!("{value:.1}"),
        _ if result.failures.is_empty() => "–".into(),
        _ => "**failed**".into(),
    }
}

/// `1.05 (1.03–1.06)`, or the figure alone when there was one round.
fn span(spread: &Spread) -> String {
    if spread.count == 1 {
        return format!("{:.2}", spread.median);
    }
    format!("{:.2} ({:.2}–{:.2})", spread.median, spread.least, spread.most)
}

/// `26.1k`, `149`.
fn short(figure: f64) -> String {
    if figure >= 1000.0 { format!("{:.1}k", figure / 1000.0) } else { format!("{figure:.0}") }
}

/// Every measurement that has no figure, with its reason, and every image that a check found fault with.
fn silent(document: &Document) -> String {
    let mut lines = Vec::new();
    for name in document.names() {
        for (engine, EngineResult { samples, failures, check }) in &document.rows[name].engines {
            for why in failures {
                let rounds = if samples.is_empty() { "no figure" } else { "a round has no figure" };
                lines.push(format!("- {name}, {engine}: {rounds}: {why}"));
            }
            if let Some(found) = check {
                lines.push(format!(
                    "- {name}, {engine}: `qemu-img check` finds {found} in the image it leaves"
                ));
            }
        }
    }
    if lines.is_empty() {
        return String::new();
    }
    format!("## Not measured, and left behind\n\n{}\n\n", lines.join("\n"))
}

fn boots(document: &Document) -> String {
    let mut text = String::from("## Made with\n\n");
    for boot in &document.boots {
        let rows = document.rows.values().filter(|row| row.boot == boot.number).count();
        let _ = writeln!(
            text,
            "- {}, {}, commit {}, {} round(s), seed {}, images of {} MiB, {rows} row(s): `{}`; {}; {}",
            boot.number,
            boot.date,
            boot.commit,
            boot.rounds,
            boot.seed,
            boot.image_mib,
            boot.command,
            boot.processor,
            boot.versions.join(", ")
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{
        super::document::tests::{document, row},
        *,
    };

    fn example() -> Document {
        let mut failing =
            row(Unit::RequestsPerSecond, &[(Engine::Us, &[100.0, 110.0]), (Engine::RublkQcow2, &[])]);
        failing.engines.get_mut("rublk-qcow2").unwrap().failures.insert("panics".into());
        failing.engines.get_mut("ublk-qcow2").unwrap().check = Some("leaks".into());
        let mut mixed =
            row(Unit::RequestsPerSecond, &[(Engine::Us, &[3000.0]), (Engine::QemuNbd, &[1500.0])]);
        let sample = &mut mixed.engines.get_mut("ublk-qcow2").unwrap().samples[0];
        (sample.read, sample.write) = (1600.0, 1400.0);
        document(vec![("chain-8/x", failing), ("chain-1/x", mixed)])
    }

    #[test]
    fn a_table_has_figures_ratios_and_gaps() {
        let page = page(&example(), &[]);
        assert!(page.contains("| chain-1/x | 1.5k | – | – | – | 1.6k / 1.4k | 2.00 |"), "{page}");
        assert!(page.contains("| chain-8/x | – | **failed** |"), "{page}");
        assert!(page.contains("- chain-8/x, rublk-qcow2: no figure: panics"), "{page}");
        assert!(page.contains("finds leaks"), "{page}");
    }

    #[test]
    fn who_has_no_part_in_a_row_is_said() {
        let measured = row(Unit::RequestsPerSecond, &[(Engine::Us, &[1.0])]);
        let text = page(&document(vec![("backed/randread-4k/qd64/1job", measured)]), &[]);
        assert!(text.contains("rublk-loop: a raw file has no backing file"), "{text}");
    }

    #[test]
    fn chains_and_sizes_are_one_group_each() {
        assert_eq!(groups(&example()), ["chains"]);
        assert_eq!(group_of("mapped-4TiB/randread"), "sizes");
        assert_eq!(group_of("empty/rw-1m"), "empty");
    }

    #[test]
    fn spreads_are_shown_where_there_are_several_rounds() {
        let spread = |count| Spread { median: 1.051, least: 1.0, most: 1.1, count };
        assert_eq!(span(&spread(5)), "1.05 (1.00–1.10)");
        assert_eq!(span(&spread(1)), "1.05");
    }
}
