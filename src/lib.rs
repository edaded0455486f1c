#![doc = include_str!("../README.md")]
//!
//! # Map of the house
//!
//! | module | holds |
//! |---|---|
//! | [`engine`] | [`engine::Engine`]: open, tokenize, encode, generate, score; what everything else is built on |
//! | [`model`] | LLaVA itself, written once for any device; configurations and checkpoints |
//! | [`infer`] | the paged KV cache, the loop over prompt and answer, sampling |
//! | [`nn`] | layers with weights |
//! | [`ops`] | [`ops::Ops`], what a device does, each op with its equation |
//! | [`cpu`] | the CPU device |
//! | [`cuda`] | the CUDA device, on a GPU or in the kernel simulator |
//! | [`profile`], [`checked`] | a device whose ops are timed, or whose results are checked |
//! | [`image`] | from a file to pixels, as Pillow does it |
//! | [`text`] | tokenizers, templates, streaming |
//! | [`data`] | rows of LLaVA's instruction data |
//! | [`train`] | fine-tuning: settings, data, masks, order, schedules |
//! | [`export`] | writes a checkpoint in the other layout |
//! | [`quantize`] | makes checkpoints smaller: RTN, GPTQ, AWQ |
//! | [`weights`] | checkpoint files, mapped |
//! | [`tensor`], [`dtype`], [`error`], [`device`] | what all of them speak |
//! | [`capi`] | the C interface |

pub mod capi;
pub mod checked;
pub mod cpu;
pub mod cuda;
pub mod data;
pub mod device;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod export;
pub mod image;
pub mod infer;
pub mod model;
pub mod nn;
pub mod ops;
pub mod profile;
pub mod quantize;
pub mod tensor;
pub mod text;
pub mod train;
pub mod weights;
