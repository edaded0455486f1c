//! [`Evaluation`]: what quantizing has cost, on answers that it was not calibrated by.

use crate::data::Row;
use crate::engine::{Engine, Example, Turn, log_sum_exp};
use crate::error::{Error, Result};

/// A model before and after, over the tokens of held-out answers.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// Rows of data.
    pub n_rows: usize,
    /// Tokens of answers.
    pub n_tokens: usize,
    /// Mean of −log p of each token, in nats, by the model as it was.
    pub dense_loss: f64,
    /// The same by the quantized model.
    pub quantized_loss: f64,
    /// Mean of KL(dense ‖ quantized) = Σ p·(log p − log p̂) over the vocabulary, in nats.
    pub kl: f64,
}

impl Evaluation {
    /// exp(loss) of the model as it was, and of the quantized one.
    pub fn perplexities(&self) -> (f64, f64) {
        (self.dense_loss.exp(), self.quantized_loss.exp())
    }
}

/// A row as `engine` reads it.
///
/// # Errors
/// As [`Engine::example`], with the row's place.
pub(super) fn example_of(engine: &Engine, row: &Row) -> Result<Example> {
    let turns = row.exchanges.iter().map(|e| [Turn::user(&e.question, e.n_images), Turn::assistant(&e.answer)]);
    let turns: Vec<Turn> = turns.flatten().collect();
    engine.example(row.system.as_deref(), &turns, row.images.len()).map_err(|e| row.error(e))
}

/// Compares two models on `rows`, of which there is at least one.
///
/// # Errors
/// If a row does not fit the models, or a picture cannot be read; if the two have different vocabularies.
pub fn evaluate(dense: &mut Engine, quantized: &mut Engine, rows: &[Row]) -> Result<Evaluation> {
    let mut sums = Evaluation { n_rows: rows.len(), ..Evaluation::default() };
    for row in rows {
        let (example, images) = (example_of(dense, row)?, row.load_images()?);
        if example_of(quantized, row)? != example {
            return Err(Error::usage("the two models read a text as different tokens: they cannot be compared"));
        }
        let mut expected: Vec<Vec<f64>> = Vec::with_capacity(example.n_answer_tokens());
        dense.answer_logits(&example, &images, |token, logits| {
            expected.push(log_softmax(logits));
            sums.dense_loss -= expected.last().map_or(0.0, |p| p[token as usize]);
        })?;
        let mut expected = expected.iter();
        quantized.answer_logits(&example, &images, |token, logits| {
            let got = log_softmax(logits);
            sums.quantized_loss -= got[token as usize];
            let of_dense = expected.next().into_iter().flatten();
            sums.kl += of_dense.zip(&got).map(|(p, q)| p.exp() * (p - q)).sum::<f64>();
        })?;
        sums.n_tokens += example.n_answer_tokens();
    }
    let n = sums.n_tokens.max(1) as f64;
    Ok(Evaluation { dense_loss: sums.dense_loss / n, quantized_loss: sums.quantized_loss / n, kl: sums.kl / n, ..sums })
}

/// log p of each token.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let sum = log_sum_exp(logits);
    logits.iter().map(|&l| f64::from(l) - sum).collect()
}
