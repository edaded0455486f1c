//! LLaVA: vision tower, projector, decoder, and the configuration that gives their shapes.
//!
//! Nothing here names a device, a storage format or a page size.

mod acts;
pub mod checkpoint;
mod clip;
pub mod config;
mod config_json;
mod gguf;
mod keys;
mod llama;
mod llava;
mod load;
pub mod merge;
mod preprocess_json;
mod projector;
mod quantized;
pub mod save;
mod stage;
pub mod start;
mod tape;
mod training;

pub use acts::{BlockActs, ClipActs, Counted, LlamaActs};
pub use llama::{Block, Llama};
pub use llava::{IMAGES_AT_ONCE, Llava, Slot};
pub use load::Loader;
pub use stage::{Ctx, LinearInput, Observer, Stage};
pub use tape::Recompute;
pub use training::{Batch, LOSS_ROWS, Tape, Trained};
