//! llava-engine.

pub mod dtype;
pub mod error;
pub mod model;
pub mod tensor;
