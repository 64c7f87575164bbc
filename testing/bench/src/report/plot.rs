//! Plots as SVG that follow the page's colours.

use std::fmt::Write;

use super::escape;
use super::scale::Scale;
use crate::model::{Bars, Failover, Line, Sweep};
use crate::text::number;

/// Drawn small, so that letters are readable on a phone.
const WIDTH: f64 = 460.0;
const HEIGHT: f64 = 270.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 40.0;
/// The colours of the style sheet, used in turn; the grey one is for what has no protection.
const COLOURS: [usize; 5] = [0, 1, 2, 3, 5];
const GREY: usize = 4;

/// The frame of a plot: its axes and where points lie in it.
struct Frame {
    x: Scale,
    y: Scale,
    width: f64,
    height: f64,
    left: f64,
}

impl Frame {
    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        let across = self.width - self.left - RIGHT;
        let down = self.height - TOP - BOTTOM;
        (
            self.left + self.x.at(x) * across,
            TOP + (1.0 - self.y.at(y)) * down,
        )
    }

    /// Opens the drawing with its grid, the numbers at the axes, and what x is.
    fn open(&self, x_name: &str, with_y: bool) -> String {
        let (width, height) = (self.width, self.height);
        let mut svg = format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\">");
        let bottom = height - BOTTOM;
        for tick in self.x.ticks() {
            let (x, _) = self.at(tick, 0.0);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{bottom}\"/>\
                 <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                bottom + 16.0,
                short(tick)
            );
        }
        for tick in self.y.ticks().into_iter().filter(|_| with_y) {
            let (_, y) = self.at(0.0, tick);
            let _ = write!(
                svg,
                "<line class=\"grid\" x1=\"{}\" y1=\"{y:.1}\" x2=\"{}\" y2=\"{y:.1}\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                self.left,
                width - RIGHT,
                self.left - 6.0,
                y + 4.0,
                short(tick)
            );
        }
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            f64::midpoint(self.left, width - RIGHT),
            height - 6.0,
            escape(x_name)
        );
        svg
    }
}

/// A number at an axis.
fn short(value: f64) -> String {
    match value.abs() {
        1e9.. => format!("{}G", trimmed(value / 1e9)),
        1e6.. => format!("{}M", trimmed(value / 1e6)),
        1e4.. => format!("{}k", trimmed(value / 1e3)),
        _ => trimmed(value),
    }
}

fn trimmed(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// A colour for each name.
fn colours(names: &[String]) -> Vec<usize> {
    let mut next = COLOURS.iter().cycle().copied();
    let mut colour = |name: &String| {
        let plain = name.contains("unprotected") || name.contains("machine");
        if plain {
            GREY
        } else {
            next.next().unwrap_or(GREY)
        }
    };
    names.iter().map(&mut colour).collect()
}

fn figure(title: &str, names: &[String], svg: &str) -> String {
    let mut legend = String::new();
    for (name, colour) in names.iter().zip(colours(names)) {
        let _ = write!(
            legend,
            "<span class=\"k{colour}\"><i></i>{}</span>",
            escape(name)
        );
    }
    format!(
        "<figure><figcaption>{}</figcaption><div class=\"legend\">{legend}</div>{svg}</figure>",
        escape(title)
    )
}

/// Lines over a quantity that grows by factors. A figure of zero lies on the axis.
pub fn sweep(sweep: &Sweep) -> String {
    let points = || sweep.lines.iter().flat_map(|line| line.points.iter());
    let frame = Frame {
        x: Scale::by_factors(points().map(|point| point.0)),
        y: if spans_factors(points().map(|point| point.1)) {
            Scale::by_factors(points().map(|point| point.1))
        } else {
            Scale::from_zero(points().map(|point| point.1))
        },
        width: WIDTH,
        height: HEIGHT,
        left: LEFT,
    };
    let names: Vec<String> = sweep.lines.iter().map(|line| line.name.clone()).collect();
    let mut svg = frame.open(&sweep.x, true);
    for (line, colour) in sweep.lines.iter().zip(colours(&names)) {
        draw_line(&mut svg, &frame, colour, line, sweep);
    }
    svg.push_str("</svg>");
    figure(&format!("{} ({})", sweep.title, sweep.y), &names, &svg)
}

/// Whether even steps would press most of the numbers into the bottom line.
fn spans_factors(numbers: impl Iterator<Item = f64>) -> bool {
    let above = numbers.filter(|number| *number > 0.0);
    let (least, most) = above.fold((f64::MAX, 0.0f64), |(least, most), number| {
        (least.min(number), most.max(number))
    });
    most > least * 8.0
}

fn draw_line(svg: &mut String, frame: &Frame, colour: usize, line: &Line, sweep: &Sweep) {
    let placed: Vec<(f64, f64)> = line.points.iter().map(|(x, y)| frame.at(*x, *y)).collect();
    let path: Vec<String> = placed
        .iter()
        .map(|(x, y)| format!("{x:.1},{y:.1}"))
        .collect();
    let _ = write!(
        svg,
        "<g class=\"k{colour}\"><polyline class=\"line\" points=\"{}\"/>",
        path.join(" ")
    );
    for ((x, y), (left, top)) in line.points.iter().zip(&placed) {
        let _ = write!(
            svg,
            "<circle class=\"point\" cx=\"{left:.1}\" cy=\"{top:.1}\" r=\"3.5\"><title>{}: {} {}, {} \
             {}</title></circle>",
            escape(&line.name),
            number(*x),
            escape(&sweep.x),
            number(*y),
            escape(&sweep.y)
        );
    }
    svg.push_str("</g>");
}

/// Sets of bars over one another, as steps.
pub fn histogram(bars: &Bars) -> String {
    let all = || bars.sets.iter().flat_map(|set| set.bars.iter());
    let frame = Frame {
        x: Scale::by_factors(all().filter(|bar| bar.1 > 0.0).map(|bar| bar.0)),
        y: Scale::from_zero(all().map(|bar| bar.1 * 100.0)),
        width: WIDTH,
        height: HEIGHT,
        left: LEFT,
    };
    let names: Vec<String> = bars.sets.iter().map(|set| set.name.clone()).collect();
    let mut svg = frame.open(&bars.x, true);
    for (set, colour) in bars.sets.iter().zip(colours(&names)) {
        let mut path = String::new();
        let mut from = set.bars.first().map_or(0.0, |bar| bar.0 / 1.25);
        let mut end = 0.0;
        for (edge, share) in &set.bars {
            let (left, top) = frame.at(from, share * 100.0);
            let (right, bottom) = frame.at(*edge, 0.0);
            if path.is_empty() {
                let _ = write!(path, "M{left:.1},{bottom:.1}");
            }
            let _ = write!(path, "L{left:.1},{top:.1}L{right:.1},{top:.1}");
            end = right;
            from = *edge;
        }
        let (_, bottom) = frame.at(from, 0.0);
        let _ = write!(
            svg,
            "<g class=\"k{colour}\"><path class=\"area\" d=\"{path}L{end:.1},{bottom:.1}Z\"/>\
             <path class=\"line\" d=\"{path}\"/></g>"
        );
    }
    svg.push_str("</svg>");
    figure(&format!("{} (% of all)", bars.title), &names, &svg)
}

/// One line a client, one dot an arrival, the kill at zero.
pub fn failover(failover: &Failover) -> String {
    const WIDE: f64 = 760.0;
    const BEFORE_MS: f64 = 10.0;
    const AFTER_MS: f64 = 30.0;
    const ROW: f64 = 11.0;
    let rows = failover.clients.len() as f64;
    let longest_ms = failover.gaps_ms.iter().copied().fold(0.0, f64::max);
    let frame = Frame {
        x: Scale::between(-BEFORE_MS, AFTER_MS.max(longest_ms * 1.3)),
        y: Scale::between(0.0, rows),
        width: WIDE,
        height: TOP + BOTTOM + rows * ROW,
        left: 14.0,
    };
    let mut svg = frame.open("milliseconds from the kill", false);
    let (zero, _) = frame.at(0.0, 0.0);
    let _ = write!(
        svg,
        "<line class=\"mark\" x1=\"{zero:.1}\" y1=\"0\" x2=\"{zero:.1}\" y2=\"{:.1}\"/>",
        frame.height - BOTTOM
    );
    for (index, arrivals) in failover.clients.iter().enumerate() {
        svg.push_str("<g class=\"k0\">");
        let (least, most) = (-BEFORE_MS, AFTER_MS.max(longest_ms * 1.3));
        for at in arrivals.iter().filter(|at| (least..=most).contains(*at)) {
            let (x, y) = frame.at(*at, rows - index as f64 - 0.5);
            let _ = write!(
                svg,
                "<circle class=\"point\" cx=\"{x:.2}\" cy=\"{y:.1}\" r=\"1.9\"/>"
            );
        }
        svg.push_str("</g>");
    }
    svg.push_str("</svg>");
    let takeover = failover
        .takeover_ms
        .map_or(String::new(), |ms| format!("takeover {ms:.2} ms, "));
    let gaps = crate::model::Spread::of(&failover.gaps_ms);
    let gaps = gaps.map_or(String::new(), |gaps| {
        format!(
            "silence of a client {:.1} ms (least {:.1}, most {:.1}; at other times {:.1})",
            gaps.middle, gaps.least, gaps.most, failover.usual_gap_ms
        )
    });
    let title = format!("{}: {takeover}{gaps}", failover.title);
    figure(
        &title,
        &["what each client received, one line a client".into()],
        &svg,
    )
}
