//! The report drawn as SVG: a column of panels per metric, the upper over slots, the lower over bytes
//! per sequence; one line per method and slot type.

use locket_model::kv_cache::CacheMethod;
use plotters::{
    coord::Shift,
    prelude::{
        ChartBuilder, Circle, DrawingArea, IntoDrawingArea, LineSeries, PathElement, SVGBackend, Text,
    },
    style::{BLACK, Color, IntoFont, RGBColor, WHITE},
};

use crate::{
    Error,
    report::{Entry, Report},
};

const PANEL_WIDTH: u32 = 380;
const PANEL_HEIGHT: u32 = 300;
const LEGEND_WIDTH: u32 = 190;
const MEBIBYTE: f64 = (1u64 << 20) as f64;

/// One curve; a single value that holds for every x (the full cache over slots) has two points.
#[derive(Debug, Clone, PartialEq)]
struct Line {
    /// Index into the legend.
    series: usize,
    points: Vec<(f64, f64)>,
}

#[derive(Debug, Clone, PartialEq)]
struct Panel {
    title: String,
    x_label: &'static str,
    lines: Vec<Line>,
}

/// What a panel's x axis is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    Slots,
    Bytes,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws `report` as an SVG document.
///
/// # Errors
/// [`Error::Picture`] if nothing has run, or the drawing library's reason.
pub fn draw(report: &Report) -> Result<String, Error> {
    let entries: Vec<&Entry> = report.results.iter().filter(|entry| entry.has_run()).collect();
    let names = legend(&entries);
    let columns: Vec<[Panel; 2]> = metrics(&entries)
        .into_iter()
        .map(|(title, value)| {
            [Over::Slots, Over::Bytes].map(|over| panel(&entries, &names, &title, value.as_ref(), over))
        })
        .collect();
    draw_grid(&columns, &names)
}

/// A point of a line.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Point {
    /// The line, by name.
    pub series: String,
    /// At least 1: axes are of logarithms.
    pub x: f64,
    pub y: f64,
}

/// Lines over one axis; a line's points are joined in the order of their x.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Chart {
    pub title: String,
    pub x_label: &'static str,
    pub points: Vec<Point>,
}

/// Draws charts as an SVG document, two in a column, with one legend.
///
/// # Errors
/// [`Error::Picture`] if there are none, or the drawing library's reason.
pub(crate) fn draw_charts(charts: &[Chart]) -> Result<String, Error> {
    let mut names: Vec<String> = Vec::new();
    for point in charts.iter().flat_map(|chart| &chart.points) {
        if !names.contains(&point.series) {
            names.push(point.series.clone());
        }
    }
    let panel = |chart: Option<&Chart>| {
        let points = chart.map_or(&[][..], |chart| &chart.points);
        let line = |(series, name): (usize, &String)| {
            let of_line = points.iter().filter(|point| point.series == *name && point.y.is_finite());
            let mut points: Vec<(f64, f64)> = of_line.map(|point| (point.x, point.y)).collect();
            points.sort_by(|a, b| a.0.total_cmp(&b.0));
            Line { series, points }
        };
        Panel {
            title: chart.map(|chart| chart.title.clone()).unwrap_or_default(),
            x_label: chart.map_or("", |chart| chart.x_label),
            lines: names.iter().enumerate().map(line).collect(),
        }
    };
    let columns: Vec<[Panel; 2]> =
        charts.chunks(2).map(|pair| [panel(pair.first()), panel(pair.get(1))]).collect();
    draw_grid(&columns, &names)
}

/// Draws columns of panels beside a legend.
fn draw_grid(columns: &[[Panel; 2]], names: &[String]) -> Result<String, Error> {
    if columns.is_empty() {
        return Err(Error::Picture("nothing was measured".into()));
    }
    let mut svg = String::new();
    let size = (columns.len() as u32 * PANEL_WIDTH + LEGEND_WIDTH, 2 * PANEL_HEIGHT);
    let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
    root.fill(&WHITE).map_err(failed)?;
    let (panels, side) = root.split_horizontally(columns.len() as u32 * PANEL_WIDTH);
    let areas = panels.split_evenly((2, columns.len()));
    for (idx, area) in areas.iter().enumerate() {
        draw_panel(area, &columns[idx % columns.len()][idx / columns.len()])?;
    }
    draw_legend(&side, names)?;
    root.present().map_err(failed)?;
    drop((areas, panels, side, root));
    Ok(svg)
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::Picture(error.to_string())
}

/// Method and slot type of each entry, without repetition.
fn legend(entries: &[&Entry]) -> Vec<String> {
    let mut names = Vec::new();
    for entry in entries {
        let name = series_name(entry);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

fn series_name(entry: &Entry) -> String {
    format!("{} {}", entry.method, entry.slot_type)
}

type Metric = Box<dyn Fn(&Entry) -> Option<f64>>;

/// Title and value of every metric that was measured.
fn metrics(entries: &[&Entry]) -> Vec<(String, Metric)> {
    let Some(first) = entries.first() else { return Vec::new() };
    let mut metrics: Vec<(String, Metric)> = Vec::new();
    if let Some(perplexity) = &first.perplexity {
        let title = format!("perplexity from position {}", perplexity.late_from);
        metrics.push((title, Box::new(|entry| Some(entry.perplexity.as_ref()?.perplexity))));
    }
    for (idx, recall) in first.recall.iter().enumerate() {
        let title = format!("{}: right answer tokens", recall.task);
        metrics.push((title, Box::new(move |entry| Some(entry.recall.get(idx)?.accuracy.mean))));
    }
    metrics
}

fn panel(
    entries: &[&Entry],
    names: &[String],
    title: &str,
    value: &dyn Fn(&Entry) -> Option<f64>,
    over: Over,
) -> Panel {
    let x = |entry: &Entry| match over {
        Over::Slots => f64::from(entry.slots),
        Over::Bytes => entry.bytes_per_sequence as f64 / MEBIBYTE,
    };
    let is_flat = |entry: &Entry| over == Over::Slots && entry.method == CacheMethod::Full.name();
    let xs = entries.iter().filter(|entry| !is_flat(entry)).map(|entry| x(entry));
    let (low, high) = bounds(xs).unwrap_or((1.0, 2.0));
    let line = |(series, name): (usize, &String)| {
        let mut points = Vec::new();
        for entry in entries.iter().filter(|entry| series_name(entry) == *name) {
            let Some(y) = value(entry).filter(|y| y.is_finite()) else { continue };
            if is_flat(entry) {
                points.extend([(low, y), (high, y)]);
            } else {
                points.push((x(entry), y));
            }
        }
        points.sort_by(|a, b| a.0.total_cmp(&b.0));
        Line { series, points }
    };
    let x_label = match over {
        Over::Slots => "slots",
        Over::Bytes => "MiB per sequence",
    };
    Panel { title: title.to_owned(), x_label, lines: names.iter().enumerate().map(line).collect() }
}

/// Smallest and largest value, if there are any.
fn bounds(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    values.fold(None, |bounds, value| match bounds {
        None => Some((value, value)),
        Some((low, high)) => Some((low.min(value), high.max(value))),
    })
}

fn draw_panel(area: &Area<'_>, panel: &Panel) -> Result<(), Error> {
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let Some((left, right)) = bounds(points().map(|point| point.0)) else { return Ok(()) };
    let (bottom, top) = bounds(points().map(|point| point.1)).unwrap_or((0.0, 1.0));
    // Shares start at 0; perplexities would be flat if they did.
    let (bottom, top) = if top <= 1.0 { (0.0, 1.0) } else { (bottom, top) };
    let margin = ((top - bottom) * 0.05).max(0.02);
    // Sizes double: a linear axis of their logarithms has ticks inside every range.
    let (left, right) = (left.log2(), right.log2());
    let side = ((right - left) * 0.08).max(0.1);
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 15).into_font())
        .margin(10)
        .x_label_area_size(34)
        .y_label_area_size(44)
        .build_cartesian_2d(left - side..right + side, bottom - margin..top + margin)
        .map_err(failed)?;
    chart
        .configure_mesh()
        .x_desc(panel.x_label)
        .x_labels(6)
        .y_labels(6)
        .x_label_formatter(&|x| size_label(x.exp2()))
        .light_line_style(BLACK.mix(0.03))
        .bold_line_style(BLACK.mix(0.1))
        .draw()
        .map_err(failed)?;
    for Line { series, points } in &panel.lines {
        let points: Vec<(f64, f64)> = points.iter().map(|&(x, y)| (x.log2(), y)).collect();
        let style = color(*series).stroke_width(2);
        chart.draw_series(LineSeries::new(points.iter().copied(), style)).map_err(failed)?;
        let dots = points.iter().map(|&point| Circle::new(point, 3, color(*series).filled()));
        chart.draw_series(dots).map_err(failed)?;
    }
    Ok(())
}

fn size_label(size: f64) -> String {
    if size < 10.0 { format!("{size:.1}") } else { format!("{size:.0}") }
}

/// Dark enough for white paper, and told apart by most eyes when neighbours.
const COLORS: [RGBColor; 12] = [
    RGBColor(0, 0, 0),
    RGBColor(136, 136, 136),
    RGBColor(230, 159, 0),
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(204, 121, 167),
    RGBColor(0, 158, 115),
    RGBColor(148, 103, 189),
    RGBColor(213, 94, 0),
    RGBColor(140, 86, 75),
    RGBColor(188, 189, 34),
    RGBColor(23, 190, 207),
];

fn color(series: usize) -> RGBColor {
    COLORS[series % COLORS.len()]
}

fn draw_legend(area: &Area<'_>, names: &[String]) -> Result<(), Error> {
    for (idx, name) in names.iter().enumerate() {
        let y = 24 + 20 * idx as i32;
        let mark = PathElement::new(vec![(10, y), (34, y)], color(idx).stroke_width(3));
        area.draw(&mark).map_err(failed)?;
        let text = Text::new(name.as_str(), (42, y - 7), ("sans-serif", 14).into_font());
        area.draw(&text).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use locket_model::{TokenScore, kv_cache::SlotType};

    use super::*;
    use crate::{
        Configuration, Task,
        perplexity::Perplexity,
        probes::ProbeScore,
        report::{CorpusSummary, Inputs, Recall},
        test_model::options,
    };

    fn entry(configuration: &Configuration, nll: f32) -> Entry {
        let mut entry = Entry::new(configuration, 1 << 20);
        entry.perplexity = Some(Perplexity::of(&[vec![TokenScore { nll, best: 0 }; 100]]));
        let probe = ProbeScore { accuracy: 0.5, exact: false, nll };
        entry.recall.push(Recall::of(Task::Passkey, vec![probe]));
        entry
    }

    fn report() -> Report {
        let mut options = options();
        options.slot_types = vec![SlotType::F16, SlotType::I8];
        let configurations = options.configurations(None);
        let results =
            configurations.iter().enumerate().map(|(idx, one)| entry(one, 3.0 + 0.1 * idx as f32)).collect();
        Report {
            inputs: Inputs {
                checkpoint: String::new(),
                quantization: String::new(),
                side_car: None,
                text: Vec::new(),
                context: 0,
                probe_context: 0,
                ring: 0,
                tasks: Vec::new(),
                probes: 0,
                seed: 0,
            },
            corpus: CorpusSummary { read: 0, too_short: 0, haystacks: 0, names: Vec::new() },
            probes: [].into(),
            results,
            paired: Vec::new(),
        }
    }

    #[test]
    fn every_series_is_drawn_and_named() {
        let svg = draw(&report()).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"));
        for name in ["full f16", "tova f16", "observed int8", "passkey: right", "MiB per sequence", "slots"] {
            assert!(svg.contains(name), "{name}");
        }
        // Two metrics over two axes, eight series each; full has one point over bytes.
        assert!(svg.matches("<polyline").count() >= 4 * 6, "{}", svg.matches("<polyline").count());
    }

    #[test]
    fn the_full_cache_is_flat_over_slots_and_a_point_over_bytes() {
        let report = report();
        let entries: Vec<&Entry> = report.results.iter().collect();
        let names = legend(&entries);
        let value = |entry: &Entry| entry.perplexity.as_ref().map(|of| of.perplexity);
        let over_slots = panel(&entries, &names, "t", &value, Over::Slots);
        let full = &over_slots.lines[0].points;
        assert_eq!((full.len(), full[0].0, full[1].0), (2, 32.0, 64.0));
        assert_eq!(full[0].1, full[1].1);
        assert_eq!(panel(&entries, &names, "t", &value, Over::Bytes).lines[0].points.len(), 1);
    }

    #[test]
    fn nothing_measured_is_no_picture() {
        let mut report = report();
        report.results.clear();
        assert!(draw(&report).unwrap_err().to_string().contains("nothing was measured"));
    }
}
