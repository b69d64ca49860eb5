//! The two pictures, as SVG.

use std::fmt::Write;

use crate::measure::Summary;
use crate::table::Unit;

const WIDTH: f64 = 860.0;
const OURS: &str = "#2563a8";
const THEIRS: &str = "#9a9a9a";
const COLOURS: [&str; 8] =
    ["#2563a8", "#c2571a", "#3a7d44", "#7a3e9d", "#b8860b", "#b03a48", "#666666", "#1aa0a0"];

/// A picture with its title, and a line for each part of the subtitle. What comes is below them.
fn begin(height: f64, title: &str, subtitle: &str) -> String {
    const LINE: f64 = 17.0;
    let lines: Vec<&str> = subtitle.split("; ").collect();
    let more = LINE * (lines.len() - 1) as f64;
    let height = height + more;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"16\">{}</text>\n",
        escaped(title)
    );
    for (index, line) in lines.iter().enumerate() {
        text(&mut svg, [16.0, 46.0 + LINE * index as f64], "start", line);
    }
    let _ = writeln!(svg, "<g transform=\"translate(0 {more})\">");
    svg
}

fn text(svg: &mut String, [x, y]: [f64; 2], anchor: &str, what: &str) {
    let what = escaped(what);
    let _ = writeln!(svg, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{what}</text>");
}

fn line(svg: &mut String, [x1, y1]: [f64; 2], [x2, y2]: [f64; 2], colour: &str) {
    let _ = writeln!(
        svg,
        "<line x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\" stroke=\"{colour}\"/>"
    );
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// A bar for each name: the median, with a line over the middle half of what was measured.
pub(crate) fn ladder(title: &str, subtitle: &str, bars: &[(String, Summary, bool)]) -> String {
    const LEFT: f64 = 270.0;
    const STEP: f64 = 26.0;
    const TOP: f64 = 62.0;
    let mut svg = begin(TOP + STEP * bars.len() as f64 + 20.0, title, subtitle);
    let most = bars.iter().map(|(_, bar, _)| bar.quartiles[1].max(bar.median)).fold(0.0, f64::max);
    let scale = (WIDTH - LEFT - 90.0) / most.max(f64::MIN_POSITIVE);
    for (index, (name, bar, ours)) in bars.iter().enumerate() {
        let y = TOP + STEP * index as f64;
        let (width, colour) = (bar.median * scale, if *ours { OURS } else { THEIRS });
        text(&mut svg, [LEFT - 8.0, y + 14.0], "end", name);
        let _ = writeln!(
            svg,
            "<rect x=\"{LEFT}\" y=\"{y}\" width=\"{width:.1}\" height=\"18\" fill=\"{colour}\"/>"
        );
        let [low, high] = bar.quartiles.map(|value| LEFT + value * scale);
        line(&mut svg, [low, y + 9.0], [high, y + 9.0], "black");
        text(&mut svg, [high.max(LEFT + width) + 6.0, y + 14.0], "start", &Unit::Time.format(bar.median));
    }
    svg + "</g>\n</svg>\n"
}

/// A curve for each name, of bytes in a second by block size. Both axes are logarithmic.
pub(crate) fn throughput(title: &str, subtitle: &str, curves: &[(String, Vec<(usize, f64)>)]) -> String {
    const LEFT: f64 = 80.0;
    const RIGHT: f64 = 690.0;
    const TOP: f64 = 66.0;
    const BOTTOM: f64 = 430.0;
    let points = || curves.iter().flat_map(|(_, points)| points);
    let least = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
    let most = points().map(|point| point.1).fold(0.0, f64::max);
    let (bottom, top) = (least.log10().floor(), most.log10().ceil().max(least.log10().floor() + 1.0));
    let first = points().map(|point| point.0).min().unwrap_or(1) as f64;
    let last = points().map(|point| point.0).max().unwrap_or(2) as f64;
    let x = |size: usize| LEFT + (RIGHT - LEFT) * (size as f64 / first).ln() / (last / first).ln().max(1e-9);
    let y = |rate: f64| BOTTOM - (BOTTOM - TOP) * (rate.log10() - bottom) / (top - bottom);

    let mut svg = begin(BOTTOM + 50.0, title, subtitle);
    for decade in bottom as i32..=top as i32 {
        let rate = 10f64.powi(decade);
        line(&mut svg, [LEFT, y(rate)], [RIGHT, y(rate)], "#dddddd");
        text(&mut svg, [LEFT - 8.0, y(rate) + 4.0], "end", &Unit::Bytes.format(rate));
    }
    let mut sizes: Vec<usize> = points().map(|point| point.0).collect();
    sizes.sort_unstable();
    sizes.dedup();
    for size in sizes {
        line(&mut svg, [x(size), TOP], [x(size), BOTTOM], "#eeeeee");
        text(&mut svg, [x(size), BOTTOM + 20.0], "middle", &block(size));
    }
    for (index, (name, points)) in curves.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let path: Vec<_> =
            points.iter().map(|(size, rate)| format!("{:.1},{:.1}", x(*size), y(*rate))).collect();
        let path = path.join(" ");
        let _ = writeln!(
            svg,
            "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>"
        );
        let at = TOP + 14.0 + 22.0 * index as f64;
        line(&mut svg, [RIGHT + 16.0, at - 4.0], [RIGHT + 36.0, at - 4.0], colour);
        text(&mut svg, [RIGHT + 42.0, at], "start", name);
    }
    svg + "</g>\n</svg>\n"
}

/// A number of bytes, by its largest unit.
pub(crate) fn block(bytes: usize) -> String {
    match bytes {
        0..0x10_0000 => format!("{} KiB", bytes >> 10),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{} GiB", bytes >> 30),
    }
}
