//! Layers with weights: a matrix and its storage, a norm and its epsilon, a rotary table.

mod linear;
mod norm;
mod rope;

pub use linear::Linear;
pub use norm::{LayerNorm, RmsNorm};
pub use rope::{RopeScaling, rope_table};
