//! Bar charts in SVG: groups of bars, one for each contender, on a logarithmic scale, since codecs differ by an order.

use anyhow::{Result, anyhow};
use plotters::prelude::*;

const SIZE: (u32, u32) = (1200, 560);
/// Room for the names of the contenders on the right.
const LEGEND_WIDTH: u32 = 150;
const FONT: &str = "sans-serif";

/// Colours that those who do not see all of them can tell apart (Okabe and Ito, "Color Universal Design", 2008).
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(230, 159, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(213, 94, 0),
    RGBColor(240, 228, 66),
    RGBColor(0, 0, 0),
];

/// What is drawn.
#[derive(Debug)]
pub(super) struct Chart {
    pub(super) title: String,
    /// Below the title, smaller.
    pub(super) subtitle: String,
    /// What the groups of bars are called.
    pub(super) groups: Vec<String>,
    /// Each contender and its value in each group, where it has one.
    pub(super) series: Vec<(String, Vec<Option<f64>>)>,
}

/// The chart as SVG; none without a value above 0.
pub(super) fn draw(chart: &Chart) -> Result<Option<String>> {
    let values = || chart.series.iter().flat_map(|(_, values)| values).flatten().copied().filter(|value| *value > 0.0);
    let (Some(least), Some(most)) = (values().reduce(f64::min), values().reduce(f64::max)) else {
        return Ok(None);
    };
    let mut svg = String::new();
    // A decade begins below the smallest bar, so that there is something of it to see.
    paint(chart, 10_f64.powf((least * 0.8).log10().floor()), most * 1.5, &mut svg)
        .map_err(|error| anyhow!("{error}"))?;
    Ok(Some(svg))
}

fn paint(chart: &Chart, bottom: f64, top: f64, svg: &mut String) -> Result<(), Box<dyn std::error::Error>> {
    let whole = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    whole.fill(&WHITE)?;
    let area = whole.titled(&chart.title, (FONT, 20))?.titled(&chart.subtitle, (FONT, 12))?;
    let groups = u32::try_from(chart.groups.len())?;
    let bars = u32::try_from(chart.series.len())?;
    let mut plot = ChartBuilder::on(&area)
        .margin(10)
        .margin_right(LEGEND_WIDTH)
        .x_label_area_size(40)
        .y_label_area_size(70)
        .build_cartesian_2d(0.0..f64::from(groups), (bottom..top).log_scale())?;
    plot.configure_mesh().disable_x_mesh().disable_x_axis().max_light_lines(0).draw()?;
    let style = TextStyle::from((FONT, 11).into_font());
    for (at, name) in (0..groups).zip(&chart.groups) {
        let place = plot.backend_coord(&(f64::from(at), bottom));
        // Names of guests are long: every other one is a line lower.
        let lower = if at % 2 == 0 { 8 } else { 24 };
        whole.draw_text(name, &style, (place.0, place.1 + lower))?;
    }
    let width = 0.9 / f64::from(bars);
    for (bar, (name, values)) in (0..bars).zip(&chart.series) {
        let colour = COLOURS[usize::try_from(bar)? % COLOURS.len()];
        let boxes = (0..groups).zip(values).filter_map(|(group, value)| {
            let left = f64::from(group) + width * f64::from(bar);
            let value = value.filter(|value| *value > 0.0)?;
            Some(Rectangle::new([(left, bottom), (left + width * 0.92, value)], colour.filled()))
        });
        plot.draw_series(boxes)?;
        let (left, top) = (i32::try_from(SIZE.0 - LEGEND_WIDTH)?, 60 + 20 * i32::try_from(bar)?);
        whole.draw(&Rectangle::new([(left, top), (left + 12, top + 12)], colour.filled()))?;
        whole.draw_text(name, &style, (left + 18, top))?;
    }
    whole.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_value_is_a_bar() {
        let chart = Chart {
            title: "title".to_owned(),
            subtitle: "a machine".to_owned(),
            groups: vec!["idle".to_owned(), "twin pages".to_owned()],
            series: vec![("a".to_owned(), vec![Some(1.0), Some(10.0)]), ("b".to_owned(), vec![None, Some(1000.0)])],
        };
        let svg = draw(&chart).unwrap().unwrap();
        for word in ["title", "a machine", "idle", "twin pages"] {
            assert!(svg.contains(word), "{word}: {svg}");
        }
        let bars = |colour: &str| svg.matches(&format!("fill=\"{colour}\" stroke=\"none\"")).count();
        // One more in the legend.
        assert_eq!((bars("#0072B2"), bars("#E69F00")), (3, 2), "{svg}");
        assert!(draw(&Chart { series: Vec::new(), ..chart }).unwrap().is_none());
    }
}
