//! LLaVA: vision tower, projector, decoder.

pub mod config;
