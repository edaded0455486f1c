//! Layers with weights: a matrix and its storage, a norm and its epsilon, a rotary table.

mod linear;
mod lora;
mod norm;
mod param;
mod rope;

pub use linear::{Linear, LinearGrad};
pub use lora::{Lora, Scratch};
pub use norm::{LayerNorm, RmsNorm};
pub use param::{Param, TrainedMatrix, VisitParams};
pub use rope::{RopeScaling, rope_table};
