//! Inference: the paged KV cache, the loop over prompt and answer, and the choice of tokens.

pub mod kv;
pub mod layer;
pub mod lookup;
pub mod runner;
pub mod sampler;
