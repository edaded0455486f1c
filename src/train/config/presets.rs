//! Settings of LLaVA's own scripts.

use super::{AspectRatio, Config, Stage, Tune};
use crate::error::{Error, Result};
use crate::train::sampler::Grouping;

/// Names of the presets, and the script of haotian-liu/LLaVA (commit c121f04) that each is.
///
/// Those run on 8 GPUs with one batch each; here a step has 8 batches, so that it sees as many rows.
pub const PRESETS: [(&str, &str); 6] = [
    ("llava-1.5-pretrain", "scripts/v1_5/pretrain.sh"),
    ("llava-1.5-finetune", "scripts/v1_5/finetune.sh"),
    ("llava-1.5-lora", "scripts/v1_5/finetune_lora.sh"),
    ("llava-1.5-task-lora", "scripts/v1_5/finetune_task_lora.sh"),
    ("llava-1-pretrain", "scripts/pretrain.sh"),
    ("llava-1-qlora", "scripts/finetune_qlora.sh"),
];

impl Config {
    /// The settings of a preset.
    ///
    /// # Errors
    /// If there is none of that name; the message has those that there are.
    pub fn preset(name: &str) -> Result<Self> {
        let base = Self { preset: Some(name.to_owned()), ..Self::default() };
        let template = |name: &str| Some(name.to_owned());
        // What the scripts of LLaVA-1.5's second stage have in common.
        let instruct = Self {
            template: template("v1"),
            image_aspect_ratio: Some(AspectRatio::Pad),
            grouping: Grouping::Modality,
            save_steps: 50_000,
            ..base.clone()
        };
        let pretrain = Self {
            stage: Stage::Pretrain,
            tune: Tune::Projector,
            template: template("plain"),
            image_aspect_ratio: Some(AspectRatio::Square),
            grouping: Grouping::None,
            save_steps: 24_000,
            ..base
        };
        match name {
            "llava-1.5-pretrain" => Ok(Self { lr: 1e-3, batch_size: 32, ..pretrain }),
            "llava-1.5-finetune" => Ok(Self { tune: Tune::Full, lr: 2e-5, ..instruct }),
            "llava-1.5-lora" | "llava-1.5-task-lora" => Ok(Self { projector_lr: Some(2e-5), ..instruct }),
            "llava-1-pretrain" => Ok(Self { lr: 2e-3, ..pretrain }),
            "llava-1-qlora" => Ok(Self {
                base_bits: 4,
                lora_r: 64,
                lora_alpha: 16.0,
                lr: 2e-5,
                image_aspect_ratio: Some(AspectRatio::Square),
                grouping: Grouping::None,
                ..instruct
            }),
            _ => {
                let known = PRESETS.map(|(name, _)| name).join(", ");
                Err(Error::usage(format!("no preset `{name}`; there are: {known}")))
            }
        }
    }
}
