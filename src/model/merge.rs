//! An adapter merged into its base: a checkpoint like any other.

use std::path::Path;
use std::sync::Arc;

use super::checkpoint::Checkpoint;
use super::save;
use crate::dtype::DType;
use crate::error::Result;
use crate::ops::{Epilogue, Ops, Weight};
use crate::tensor::Tensor;
use crate::weights::adapter::Adapter;
use crate::weights::{LowRank, Source};

/// What was merged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Merged {
    /// Matrices that something was added to.
    pub n_added: usize,
    /// Tensors that the adapter had whole.
    pub n_replaced: usize,
}

/// Writes the checkpoint from the folder `model` with `adapter` merged into it into the new folder `output`, in its layout and its dtypes:
/// W + s·B·A, in f32, then rounded.
///
/// # Errors
/// If the checkpoint is packed, whose integers have no room for sums; if the adapter does not fit it: the tensor is named; if the folder is
/// not empty or cannot be written.
pub fn merge(ops: &dyn Ops, model: &Path, checkpoint: &Checkpoint, adapter: &Adapter, output: &Path) -> Result<Merged> {
    checkpoint.expect_unpacked()?;
    let weights = &checkpoint.weights;
    let adapted = adapter.over(weights);
    // Before anything is written: whether all of it fits.
    for entry in weights.entries() {
        let Some(canonical) = &entry.canonical else { continue };
        if adapter.replaces(canonical) {
            adapted.tensor(canonical, &entry.shape)?;
        }
        low_rank(&adapted, canonical, &entry.shape)?;
    }
    adapter.expect_taken(|name| checkpoint.config.is_not_run(name))?;
    save::new_folder(output)?;
    let mut merged = Merged::default();
    let mut rewrite = save::Rewrite::begin(checkpoint, output)?;
    for (canonical, shape) in rewrite.tensors() {
        let replaced = adapter.replaces(&canonical).then(|| adapted.tensor(&canonical, &shape)).transpose()?;
        merged.n_replaced += usize::from(replaced.is_some());
        if let Some(low_rank) = low_rank(&adapted, &canonical, &shape)? {
            merged.n_added += 1;
            let base = replaced.map_or_else(|| weights.tensor(&canonical, &shape), Ok)?;
            rewrite.put(&canonical, &sum(ops, &base, &low_rank)?)?;
        } else if let Some(replaced) = replaced {
            rewrite.put(&canonical, &replaced)?;
        }
    }
    rewrite.finish(model, output)?;
    Ok(merged)
}

/// What is added to a tensor, if it is a matrix.
fn low_rank(adapted: &dyn Source, canonical: &str, shape: &[usize]) -> Result<Option<LowRank>> {
    match (canonical.strip_suffix(".weight"), shape) {
        (Some(module), &[n, k]) => adapted.low_rank(module, n, k),
        _ => Ok(None),
    }
}

/// W + s·B·A, f32 `[n, k]`.
fn sum(ops: &dyn Ops, base: &Tensor, low_rank: &LowRank) -> Result<Tensor> {
    let (a, b) = (low_rank.a.to_f32(), low_rank.b.to_f32());
    let [r, k] = low_rank.a.dims2("merge", "A")?;
    let b: Vec<f32> = b.iter().map(|b| b * low_rank.scale).collect();
    let transposed: Vec<f32> = (0..k * r).map(|i| a[i % r * k + i / r]).collect();
    let mut y = ops.upload(base.converted(DType::F32))?;
    let weight = Weight::stacked(vec![Arc::new(ops.upload(Tensor::from_slice(&[k, r], &transposed))?)])?;
    ops.linear(&mut y, &ops.upload(Tensor::from_slice(low_rank.b.shape(), &b))?, &weight, None, Epilogue::Add)?;
    ops.to_host(&y)
}
