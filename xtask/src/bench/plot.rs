//! A group of rows as a picture (SVG): every engine's figure as a multiple of qemu-nbd's in the same round.
//!
//! Horizontal bars from zero, so that lengths compare; a thin line from the least to the most of the rounds.

use super::{document::Document, matrix::Engine, report::group_of, stats::Spread};
use std::fmt::Write;

const WIDTH: f64 = 900.0;
/// Where bars begin: right of the rows' names.
const LEFT: f64 = 300.0;
/// Room for the figure behind the longest bar.
const RIGHT: f64 = 60.0;
const TOP: f64 = 70.0;
const BAR: f64 = 12.0;
const GAP: f64 = 14.0;
/// More rows than this are not read in a picture.
const MOST_ROWS: usize = 12;

/// Told apart with every kind of colour vision, on white.
const fn colour(engine: Engine) -> &'static str {
    match engine {
        Engine::QemuNbd => "#999999",
        Engine::RublkQcow2 => "#e69f00",
        Engine::RublkLoop => "#56b4e9",
        Engine::KernelLoop => "#cc79a7",
        Engine::Us => "#009e73",
    }
}

/// The picture of `group`, or None when no row of it can be held against qemu-nbd.
pub(super) fn svg(document: &Document, group: &str) -> Option<String> {
    let rows = bars(document, group);
    let longest = rows.iter().flat_map(|row| &row.bars).map(|(_, spread)| spread.most).fold(1.0, f64::max);
    if rows.is_empty() {
        return None;
    }
    let scale = (WIDTH - LEFT - RIGHT) / longest;
    let count: usize = rows.iter().map(|row| row.bars.len()).sum();
    let height = TOP + count as f64 * BAR + rows.len() as f64 * GAP + 10.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height:.0}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let title = format!(
        "{group}: times qemu-nbd, Linux {}, {} mode; longer is better",
        document.kernel, document.mode
    );
    text(&mut out, 10.0, 20.0, "start", &format!("<tspan font-size=\"14\">{}</tspan>", escape(&title)));
    legend(&mut out);
    let mut y = TOP;
    for row in &rows {
        let middle = y + row.bars.len() as f64 * BAR / 2.0 + 4.0;
        text(&mut out, LEFT - 8.0, middle, "end", &escape(&row.name));
        for (engine, spread) in &row.bars {
            bar(&mut out, y, scale, *engine, spread);
            y += BAR;
        }
        y += GAP;
    }
    let one = LEFT + scale;
    let _ = writeln!(
        out,
        "<line x1=\"{one:.1}\" y1=\"{:.0}\" x2=\"{one:.1}\" y2=\"{:.0}\" stroke=\"#444\" stroke-dasharray=\"3 3\"/>",
        TOP - 6.0,
        height - 10.0
    );
    Some(out + "</svg>\n")
}

struct RowOfBars {
    name: String,
    bars: Vec<(Engine, Spread)>,
}

/// The rows of one job with a deep queue where there are more than a picture holds.
fn bars(document: &Document, group: &str) -> Vec<RowOfBars> {
    let names: Vec<_> = document.names().into_iter().filter(|name| group_of(name) == group).collect();
    let shown = |name: &&&str| names.len() <= MOST_ROWS || name.ends_with("/qd64/1job");
    let rows = names.iter().filter(shown).map(|name| {
        let against = |engine| Some((engine, document.advantage((name, engine), (name, Engine::QemuNbd))?));
        let bars = Engine::ALL.into_iter().filter(|engine| *engine != Engine::QemuNbd).filter_map(against);
        RowOfBars { name: (*name).to_owned(), bars: bars.collect() }
    });
    rows.filter(|row| !row.bars.is_empty()).collect()
}

fn legend(out: &mut String) {
    let mut x = LEFT;
    for engine in Engine::ALL.into_iter().filter(|engine| *engine != Engine::QemuNbd) {
        let _ = writeln!(
            out,
            "<rect x=\"{x:.0}\" y=\"34\" width=\"10\" height=\"10\" fill=\"{}\"/>",
            colour(engine)
        );
        text(out, x + 14.0, 43.0, "start", engine.name());
        x += 110.0;
    }
}

fn bar(out: &mut String, y: f64, scale: f64, engine: Engine, spread: &Spread) {
    let at = |value: f64| LEFT + value * scale;
    let _ = writeln!(
        out,
        "<rect x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\"/>",
        spread.median * scale,
        BAR - 2.0,
        colour(engine)
    );
    let middle = y + (BAR - 2.0) / 2.0;
    let _ = writeln!(
        out,
        "<line x1=\"{:.1}\" y1=\"{middle:.1}\" x2=\"{:.1}\" y2=\"{middle:.1}\" stroke=\"#222\"/>",
        at(spread.least),
        at(spread.most)
    );
    text(out, at(spread.most) + 4.0, y + BAR - 3.0, "start", &format!("{:.2}", spread.median));
}

/// `content` is SVG already.
fn text(out: &mut String, x: f64, y: f64, anchor: &str, content: &str) {
    let _ = writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" fill=\"#222\">{content}</text>"
    );
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::{
        super::document::{
            Unit,
            tests::{document, row},
        },
        *,
    };

    #[test]
    fn bars_are_as_long_as_the_ratios() {
        let measured = row(
            Unit::RequestsPerSecond,
            &[
                (Engine::QemuNbd, &[10.0, 10.0]),
                (Engine::Us, &[40.0, 40.0]),
                (Engine::RublkLoop, &[20.0, 20.0]),
            ],
        );
        let svg = svg(&document(vec![("empty/a<b", measured)]), "empty").unwrap();
        let full = WIDTH - LEFT - RIGHT;
        assert!(svg.contains(&format!("width=\"{full:.1}\" height=\"10.0\" fill=\"#009e73\"")), "{svg}");
        assert!(svg.contains(&format!("width=\"{:.1}\" height=\"10.0\" fill=\"#56b4e9\"", full / 2.0)));
        assert!(svg.contains("a&lt;b") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn without_qemu_nbd_there_is_no_picture() {
        let measured = row(Unit::RequestsPerSecond, &[(Engine::Us, &[40.0])]);
        assert_eq!(svg(&document(vec![("empty/a", measured)]), "empty"), None);
    }
}
