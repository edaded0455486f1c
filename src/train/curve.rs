//! The course of the loss, as a picture.

use plotters::prelude::*;

use super::log::Row;
use crate::error::{Error, Result};

/// Share of the past in a smoothed loss.
const SMOOTHING: f64 = 0.9;
const SIZE: (u32, u32) = (960, 540);

/// An SVG of the losses: of each step, smoothed, and where there was an evaluation. Empty where there is no step.
///
/// # Errors
/// If it cannot be drawn.
pub fn svg(rows: &[Row]) -> Result<String> {
    let losses: Vec<(f64, f64)> =
        rows.iter().filter(|row| row.step.n_learned > 0).map(|row| (row.step.step as f64, row.step.loss)).collect();
    let mut evaluated: Vec<(f64, f64)> = rows.iter().filter_map(|row| Some((row.step.step as f64, row.eval_loss?))).collect();
    evaluated.retain(|point| point.1.is_finite());
    let mut out = String::new();
    draw(&mut out, &losses, &evaluated).map_err(|e| Error::usage(format!("the curve of the loss cannot be drawn: {e}")))?;
    Ok(out)
}

fn draw(out: &mut String, losses: &[(f64, f64)], evaluated: &[(f64, f64)]) -> Result<(), Box<dyn std::error::Error>> {
    let (Some(first), Some(last)) = (losses.first(), losses.last()) else { return Ok(()) };
    let all = || losses.iter().chain(evaluated).map(|point| point.1);
    let (low, high) = (all().fold(f64::INFINITY, f64::min), all().fold(f64::NEG_INFINITY, f64::max));
    let margin = ((high - low) * 0.05).max(1e-3);
    let root = SVGBackend::with_string(out, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(first.0..last.0.max(first.0 + 1.0), (low - margin).max(0.0)..high + margin)?;
    chart
        .configure_mesh()
        .x_desc("step")
        .y_desc("loss (nats per token)")
        .light_line_style(WHITE)
        .x_label_formatter(&|x| format!("{x:.0}"))
        .draw()?;
    chart.draw_series(LineSeries::new(losses.iter().copied(), BLUE.mix(0.3)))?.label("loss").legend(key(BLUE.mix(0.3)));
    chart.draw_series(LineSeries::new(smoothed(losses), BLUE.stroke_width(2)))?.label("smoothed").legend(key(BLUE.mix(1.0)));
    if !evaluated.is_empty() {
        let points = evaluated.iter().map(|point| Circle::new(*point, 4, RED.filled()));
        chart.draw_series(points)?.label("evaluation").legend(key(RED.mix(1.0)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK)
        .draw()?;
    root.present()?;
    Ok(())
}

fn key(colour: RGBAColor) -> impl Fn((i32, i32)) -> PathElement<(i32, i32)> {
    move |(x, y)| PathElement::new(vec![(x, y), (x + 18, y)], colour)
}

/// Means of the past that weighs less the longer it is ago, without the pull towards zero of the first.
fn smoothed(losses: &[(f64, f64)]) -> impl Iterator<Item = (f64, f64)> + '_ {
    let (mut sum, mut weight) = (0.0, 0.0);
    losses.iter().map(move |&(step, loss)| {
        sum = SMOOTHING * sum + (1.0 - SMOOTHING) * loss;
        weight = SMOOTHING * weight + 1.0 - SMOOTHING;
        (step, sum / weight)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_begins_at_the_first_loss_and_follows() {
        let losses: Vec<_> = (0..60).map(|i| (f64::from(i), if i < 10 { 4.0 } else { 1.0 })).collect();
        let smooth: Vec<_> = smoothed(&losses).collect();
        assert!(smooth[..10].iter().all(|p| (p.1 - 4.0).abs() < 1e-12), "{smooth:?}");
        assert!(smooth[10].1 > 3.0 && smooth[10].1 < 4.0 && (smooth[59].1 - 1.0).abs() < 0.03, "{smooth:?}");
    }
}
