//! Low-rank additions to the matrices of linear layers, which stay as they are (LoRA: Hu et al., arXiv 2106.09685).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::param::{TrainedMatrix, VisitParams};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::ops::grad::{GradOps, Update};
use crate::ops::{Epilogue, Ops, RowCopy, Weight};
use crate::tensor::Tensor;

/// y\[:, c..c+n\] += s·B·A·dropout(x), where c is the column of the part of a weight that it adds to.
#[derive(Debug)]
pub struct Lora {
    /// Which part of the layer's weight it adds to.
    pub part: usize,
    a: Weight, // [r, k]
    b: Weight, // [n, r]; its first column is that of the part
    scratch: Scratch,
    /// If there is none, s is in B and nothing is dropped.
    learning: Option<Learning>,
}

/// What learning needs beside the factors: s by itself, so that their gradients are those of the definition.
#[derive(Debug)]
struct Learning {
    scale: f32,
    /// Share of the elements of x that is dropped.
    dropout: f32,
    /// Tells the bits of this addition from those of others.
    seed: u64,
    /// Whether the pass at hand drops anything, and by which bits.
    key: Option<u64>,
    /// Gradients of A and B, once there is room for them.
    factors: Option<[TrainedMatrix; 2]>,
}

/// The output of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) for a state: neighbouring numbers become unrelated ones.
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Buffers of the additions of a model, which take them one after the other. They are made when they are first needed, and larger: on a GPU,
/// making memory ends a recorded sequence of launches.
#[derive(Clone, Debug, Default)]
pub struct Scratch(Arc<Mutex<Buffers>>);

#[derive(Debug, Default)]
struct Buffers {
    /// A·x by rank, and how many rows there is room for.
    hidden: HashMap<usize, (usize, Tensor)>,
    /// Identity matrices by their width.
    identities: HashMap<usize, Arc<Tensor>>,
}

impl Scratch {
    /// Runs `work` with a buffer of activations `[rows, rank]`.
    fn with_hidden(&self, ops: &dyn Ops, rows: usize, rank: usize, work: impl FnOnce(&mut Tensor) -> Result<()>) -> Result<()> {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if buffers.hidden.get(&rank).is_none_or(|(room, _)| *room < rows) {
            buffers.hidden.insert(rank, (rows, ops.alloc(&[rows, rank], ops.activation_dtype())?));
        }
        let (_, hidden) = buffers.hidden.get_mut(&rank).expect("it was just made");
        hidden.set_rows(rows);
        work(hidden)
    }

    /// y = f(r), both `[tokens, n]`, f the function of an epilogue.
    ///
    /// Devices apply it to products, so it is that of r, taken for rows of a few columns, with an identity matrix: exact, and cheap beside
    /// the product that made r.
    pub(super) fn activate(&self, ops: &dyn Ops, y: &mut Tensor, r: Tensor, epilogue: Epilogue) -> Result<()> {
        const MAX_WIDTH: usize = 64;
        let shape = r.shape().to_vec();
        let width = gcd(r.row_len(), MAX_WIDTH);
        let identity = self.identity(ops, width)?;
        let r = r.reshaped(&[shape.iter().product::<usize>() / width, width])?;
        let mut out = ops.alloc(r.shape(), ops.activation_dtype())?;
        ops.linear(&mut out, &r, &Weight::stacked(vec![identity])?, None, epilogue)?;
        let whole = RowCopy { dst: 0, src: 0, n_rows: shape[0] };
        ops.copy_rows(y, &out.reshaped(&shape)?, &[whole])
    }

    fn identity(&self, ops: &dyn Ops, width: usize) -> Result<Arc<Tensor>> {
        let mut buffers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = buffers.identities.get(&width) {
            return Ok(known.clone());
        }
        let ones: Vec<f32> = (0..width * width).map(|i| if i % (width + 1) == 0 { 1.0 } else { 0.0 }).collect();
        let dtype = ops.weight_dtype().unwrap_or(DType::F32);
        let identity = Arc::new(ops.upload(Tensor::from_slice(&[width, width], &ones).converted(dtype))?);
        buffers.identities.insert(width, identity.clone());
        Ok(identity)
    }
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

impl Lora {
    /// B·A added to part `part` of a weight, which begins at column `first_col` of the result: A `[r, k]`, B `[n, r]` on the device.
    pub fn new(part: usize, first_col: usize, a: Tensor, b: Tensor, scratch: Scratch) -> Result<Self> {
        let (a, b) = (Weight::stacked(vec![Arc::new(a)])?, Weight::stacked(vec![Arc::new(b)])?);
        if a.n() != b.k() {
            return Err(Error::shape("LoRA", "columns of B", a.n(), b.k()));
        }
        Ok(Self { part, a, b: Weight { first_col, ..b }, scratch, learning: None })
    }

    /// From now on its factors, which are f32, learn. It adds `scale` times B·A, of inputs a share `dropout` of which is dropped by bits that
    /// `seed` tells from those of other additions.
    pub fn learn(&mut self, scale: f32, dropout: f32, seed: u64) {
        self.learning = Some(Learning { scale, dropout, seed, key: None, factors: None });
    }

    /// Makes room for gradients, if it learns: products read its factors in `compute`.
    pub fn train(&mut self, ops: &dyn Ops, compute: DType) -> Result<()> {
        let Some(learning) = &mut self.learning else { return Ok(()) };
        let begin = |of: &mut Weight| TrainedMatrix::begin(ops, &mut of.parts[0], compute);
        learning.factors = Some([begin(&mut self.a)?, begin(&mut self.b)?]);
        Ok(())
    }

    pub(super) fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// Says which pass is next, of those that drop something; none drops nothing.
    pub fn set_pass(&mut self, pass: Option<u64>) {
        if let Some(learning) = &mut self.learning {
            learning.key = pass.filter(|_| learning.dropout > 0.0).map(|pass| mix(learning.seed ^ mix(pass)));
        }
    }

    /// y\[:, c..c+n\] += B·A·x
    pub fn add(&self, ops: &dyn Ops, y: &mut Tensor, x: &Tensor) -> Result<()> {
        if self.learning.is_some() {
            return Err(Error::Unsupported("running a LoRA that learns, but in a training pass".into()));
        }
        self.scratch.with_hidden(ops, x.rows(), self.a.n(), |hidden| {
            ops.linear(hidden, x, &self.a, None, Epilogue::Store)?;
            ops.linear(y, hidden, &self.b, None, Epilogue::Add)
        })
    }

    /// y\[:, c..c+n\] += s·B·A·dropout(x), in a training pass.
    pub fn add_training(&self, ops: &dyn GradOps, y: &mut Tensor, x: &Tensor) -> Result<()> {
        let Some(learning) = &self.learning else { return self.add(ops, y, x) };
        let dropped = learning.dropped(ops, x)?;
        let hidden = learning.hidden(ops, &self.a, dropped.as_ref().unwrap_or(x))?;
        ops.linear(y, &hidden, &self.b, None, Epilogue::Add)
    }

    /// With x̃ = dropout(x) and dh = s·dy·B: dB += dyᵀ·(s·A·x̃) and dA += dhᵀ·x̃, if it learns; dx += dropout(dh·A), if that is wanted.
    ///
    /// A·x̃ is made again, of rank r where keeping x̃ would take k.
    pub fn backward(&mut self, ops: &dyn GradOps, dx: Option<&mut Tensor>, dy: &Tensor, x: &Tensor) -> Result<()> {
        let d_hidden = self.d_hidden(ops, dy)?;
        if let Some(learning) = &mut self.learning {
            let dropped = learning.dropped(ops, x)?;
            let x = dropped.as_ref().unwrap_or(x);
            let hidden = learning.hidden(ops, &self.a, x)?;
            if let Some([a, b]) = &mut learning.factors {
                ops.linear_dw(&mut b.grad, dy, self.b.first_col, &hidden)?;
                ops.linear_dw(&mut a.grad, &d_hidden, 0, x)?;
            }
        }
        dx.map_or(Ok(()), |dx| self.add_input_gradient(ops, dx, &d_hidden))
    }

    /// dh = s·dy\[:, c..c+n\]·B
    pub(super) fn d_hidden(&self, ops: &dyn GradOps, dy: &Tensor) -> Result<Tensor> {
        let mut d_hidden = ops.alloc(&[dy.rows(), self.a.n()], ops.activation_dtype())?;
        ops.linear_dx(&mut d_hidden, dy, &self.b, Update::Set)?;
        self.learning.as_ref().map_or(Ok(()), |learning| ops.scale(&mut d_hidden, learning.scale))?;
        Ok(d_hidden)
    }

    /// dx += dropout(dh·A)
    pub(super) fn add_input_gradient(&self, ops: &dyn GradOps, dx: &mut Tensor, d_hidden: &Tensor) -> Result<()> {
        let Some((p, key)) = self.learning.as_ref().and_then(|l| Some((l.dropout, l.key?))) else {
            return ops.linear_dx(dx, d_hidden, &self.a, Update::Add);
        };
        let gradient = || ops.alloc(dx.shape(), ops.activation_dtype());
        let (mut through, mut kept) = (gradient()?, gradient()?);
        ops.linear_dx(&mut through, d_hidden, &self.a, Update::Set)?;
        ops.dropout(&mut kept, &through, p, key)?;
        ops.add_rows(dx, &kept, &[RowCopy { dst: 0, src: 0, n_rows: kept.rows() }])
    }

    /// Shows its factors, if they learn, as modules of `name`.
    pub fn visit(&mut self, name: &str, visit: VisitParams<'_>) -> Result<()> {
        let Some([a, b]) = self.learning.as_mut().and_then(|learning| learning.factors.as_mut()) else { return Ok(()) };
        a.visit(&format!("{name}.lora_a.weight"), &mut self.a.parts[0], visit)?;
        b.visit(&format!("{name}.lora_b.weight"), &mut self.b.parts[0], visit)
    }
}

impl Learning {
    /// dropout(x), if anything is dropped.
    fn dropped(&self, ops: &dyn GradOps, x: &Tensor) -> Result<Option<Tensor>> {
        let Some(key) = self.key else { return Ok(None) };
        let mut dropped = ops.alloc(x.shape(), ops.activation_dtype())?;
        ops.dropout(&mut dropped, x, self.dropout, key)?;
        Ok(Some(dropped))
    }

    /// h = s·A·x
    fn hidden(&self, ops: &dyn GradOps, a: &Weight, x: &Tensor) -> Result<Tensor> {
        let mut hidden = ops.alloc(&[x.rows(), a.n()], ops.activation_dtype())?;
        ops.linear(&mut hidden, x, a, None, Epilogue::Store)?;
        ops.scale(&mut hidden, self.scale)?;
        Ok(hidden)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of SplitMix64 from state 0, as its authors' reference gives them.
    #[test]
    fn mixing_is_splitmix() {
        assert_eq!(mix(0), 0xe220_a839_7b1d_cdaf);
        assert_eq!(mix(0x9e37_79b9_7f4a_7c15), 0x6e78_9e6a_a1b9_65f4);
    }
}
