//! The picture: a group of bars for each trace, as SVG.

use std::fmt::Write;

const COLOURS: [&str; 12] = [
    "#222222", "#9a9a9a", "#c9c9c9", "#b8860b", "#c2571a", "#b03a48", "#e0b0b0", "#d8c070", "#a8c8a0",
    "#3a7d44", "#2563a8", "#7a3e9d",
];

/// Miss ratios: a name for each bar, and for each trace its name and bars.
pub(crate) fn bars(title: &str, subtitle: &str, names: &[&str], groups: &[(String, Vec<f64>)]) -> String {
    const LEFT: f64 = 60.0;
    const TOP: f64 = 64.0;
    const HEIGHT: f64 = 320.0;
    const BAR: f64 = 11.0;
    let step = BAR * names.len() as f64 + 22.0;
    let right = LEFT + step * groups.len() as f64;
    let (width, height) = (right + 190.0, TOP + HEIGHT + 44.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"sans-serif\" font-size=\"13\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"16\" y=\"26\" font-size=\"16\">{title}</text>\n<text x=\"16\" y=\"46\">{subtitle}</text>\n"
    );
    let y = |ratio: f64| TOP + HEIGHT * (1.0 - ratio);
    for tenth in (0..=10).step_by(2) {
        let at = y(f64::from(tenth) / 10.0);
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{at:.1}\" x2=\"{right:.1}\" y2=\"{at:.1}\" stroke=\"#dddddd\"/>\n\
             <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{} %</text>",
            LEFT - 8.0,
            at + 4.0,
            tenth * 10
        );
    }
    for (group, (name, ratios)) in groups.iter().enumerate() {
        let start = LEFT + step * group as f64 + 11.0;
        for (index, ratio) in ratios.iter().enumerate() {
            let _ = writeln!(
                svg,
                "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"{}\" height=\"{:.1}\" fill=\"{}\"/>",
                start + BAR * index as f64,
                y(*ratio),
                BAR - 1.0,
                HEIGHT * ratio,
                COLOURS[index % COLOURS.len()]
            );
        }
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{name}</text>",
            start + (step - 22.0) / 2.0,
            TOP + HEIGHT + 20.0
        );
    }
    for (index, name) in names.iter().enumerate() {
        let at = TOP + 8.0 + 20.0 * index as f64;
        let _ = writeln!(
            svg,
            "<rect x=\"{:.1}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{}\"/>\n<text x=\"{:.1}\" \
             y=\"{:.1}\">{name}</text>",
            right + 16.0,
            at - 10.0,
            COLOURS[index % COLOURS.len()],
            right + 34.0,
            at
        );
    }
    svg + "</svg>\n"
}
