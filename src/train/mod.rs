//! Fine-tuning: what a run is told ([`config`]), which rows it learns from ([`data`]), what of them it learns ([`mask`]), in which order
//! ([`sampler`]) and at which learning rate ([`schedule`]); [`optim`] makes the steps of a [`run`]; [`lora`] is what it adds to matrices instead of changing them; [`check`] looks through the data before anything is trained.

pub mod check;
pub mod checkpoint;
pub mod config;
pub mod curve;
pub mod data;
pub mod flops;
pub mod log;
pub mod lora;
pub mod loss_scale;
pub mod mask;
pub mod optim;
pub mod plan;
pub mod rows;
pub mod run;
pub mod sampler;
pub mod schedule;
pub mod tensorboard;
pub mod trial;
