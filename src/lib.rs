//! llava-engine.

pub mod cpu;
pub mod dtype;
pub mod error;
pub mod model;
pub mod ops;
pub mod tensor;
