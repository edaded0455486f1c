//! A model that nobody trained: its configuration and tokenizer are there, its weights are drawn.

use std::f64::consts::TAU;
use std::path::Path;

use rand_pcg::Pcg64;
use rand_pcg::rand_core::Rng;

use super::checkpoint::{Checkpoint, Description};
use super::config::{LlavaConfig, ProjectorConfig};
use super::save;
use crate::error::Result;
use crate::tensor::Tensor;
use crate::weights::names;
use crate::weights::write::{Planned, Writer, sync_folder};

/// How a tensor begins.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    Zeros,
    Ones,
    /// Normally distributed, with this standard deviation.
    Normal(f64),
}

/// Writes a checkpoint in llava-hf's layout into the new folder `output`: what the folder `model` says of its shape, with its tokenizer and
/// preprocessing, and weights as transformers draws them for such a model (but that it clears the row of the padding token, which nobody
/// reads), all of the tower among them, in the dtype that its configuration names. One seed gives one model.
/// Without a seed the weights are holes in the file, which take no room and read as zeros: enough for what only asks for shapes.
///
/// # Errors
/// If the folder does not describe a LLaVA in llava-hf's way; if the checkpoint cannot be written.
pub fn write(model: &Path, seed: Option<u64>, output: &Path) -> Result<()> {
    let description = Checkpoint::describe(model)?;
    let (tensors, dtype) = (tensors(&description), description.dtype);
    save::new_folder(output)?;
    let planned: Vec<_> = tensors.iter().map(|(planned, _)| planned.clone()).collect();
    let mut writer = Writer::create(&output.join(save::WEIGHTS), &planned)?;
    for (i, (Planned { name, shape, .. }, fill)) in tensors.iter().enumerate() {
        match seed {
            None => writer.leave_zero(name),
            // A stream for each tensor: none depends on the shapes of others.
            Some(seed) => {
                let drawn = drawn(*fill, shape.iter().product(), seed, i as u64);
                writer.write(name, Tensor::from_slice(shape, &drawn).converted(dtype).as_bytes())?;
            }
        }
    }
    writer.finish()?;
    save::companions_of(model, output)?;
    sync_folder(output)?;
    save::configuration_of(model, output, |_| {})
}

/// The tensors of a model, by the names that llava-hf's published checkpoints have, and how each begins.
///
/// Source: `_init_weights` of `modeling_clip.py`, `modeling_llama.py` and `modeling_llava.py` in transformers 5: with d the tower's width and L
/// its layers, Q, K, V and the MLP's second matrix begin with a deviation of d^-1/2 (2L)^-1/2, the output of attention and the class token with
/// d^-1/2, the MLP's first with (2d)^-1/2, and all else with `initializer_range`; norms begin with ones, biases with zeros. For
/// a narrow decoder the usual 0.02 is little: numbers of width d keep their size through deviations of d^-1/2.
fn tensors(description: &Description) -> Vec<(Planned, Fill)> {
    let &Description { ref config, dtype, text_std, vision_std } = description;
    let LlavaConfig { vision, text, .. } = config;
    // What has no rule of its own.
    let (of_text, of_vision) = (Fill::Normal(text_std), Fill::Normal(vision_std));
    let mut out = Vec::new();
    let mut add = |name: String, shape: &[usize], fill| {
        out.push((Planned { name, shape: shape.to_vec(), dtype }, fill));
    };
    // The first spelling is that of the published ones.
    let spelt = |canonical: &str| names::spellings(canonical).swap_remove(0);

    let (d, wide) = (vision.hidden_size, vision.intermediate_size);
    let narrow = (d as f64).powf(-0.5);
    let deep = narrow * (2.0 * vision.n_layers as f64).powf(-0.5);
    add(spelt("clip.class_embedding"), &[d], Fill::Normal(narrow));
    add(spelt("clip.patch_embedding.weight"), &[d, 3, vision.patch_size, vision.patch_size], of_vision);
    add(spelt("clip.position_embedding.weight"), &[vision.n_patches() + 1, d], of_vision);
    let mut module = |name: String, shape: &[usize], fill| {
        add(spelt(&format!("{name}.weight")), shape, fill);
        add(spelt(&format!("{name}.bias")), &shape[..1], Fill::Zeros);
    };
    module("clip.pre_layernorm".to_owned(), &[d], Fill::Ones);
    for i in 0..vision.n_layers {
        let layer = |rest: &str| format!("clip.layers.{i}.{rest}");
        module(layer("layer_norm1"), &[d], Fill::Ones);
        for projection in ["q_proj", "k_proj", "v_proj"] {
            module(layer(&format!("self_attn.{projection}")), &[d, d], Fill::Normal(deep));
        }
        module(layer("self_attn.out_proj"), &[d, d], Fill::Normal(narrow));
        module(layer("layer_norm2"), &[d], Fill::Ones);
        module(layer("mlp.fc1"), &[wide, d], Fill::Normal((2.0 * d as f64).powf(-0.5)));
        module(layer("mlp.fc2"), &[d, wide], Fill::Normal(deep));
    }
    if let ProjectorConfig::Mlp { n_linear, .. } = config.projector {
        for i in 1..=n_linear {
            let from = if i == 1 { d } else { text.hidden_size };
            module(format!("projector.linear_{i}"), &[text.hidden_size, from], of_text);
        }
    }
    // transformers misses the tower's last norm, which LLaVA never comes to.
    for (kind, fill) in [("weight", Fill::Ones), ("bias", Fill::Zeros)] {
        add(format!("vision_tower.vision_model.post_layernorm.{kind}"), &[d], fill);
    }

    let (d, wide, heads) = (text.hidden_size, text.intermediate_size, text.heads());
    let [q, kv] = [heads.n_heads, heads.n_kv_heads].map(|n| n * heads.head_dim);
    let mut weight = |name: &str, shape: &[usize], fill| add(spelt(&format!("llama.{name}.weight")), shape, fill);
    weight("embed_tokens", &[text.vocab_size, d], of_text);
    for i in 0..text.n_layers {
        let mut layer = |name: &str, shape: &[usize], fill| weight(&format!("layers.{i}.{name}"), shape, fill);
        layer("input_layernorm", &[d], Fill::Ones);
        layer("self_attn.q_proj", &[q, d], of_text);
        layer("self_attn.k_proj", &[kv, d], of_text);
        layer("self_attn.v_proj", &[kv, d], of_text);
        layer("self_attn.o_proj", &[d, q], of_text);
        layer("post_attention_layernorm", &[d], Fill::Ones);
        layer("mlp.gate_proj", &[wide, d], of_text);
        layer("mlp.up_proj", &[wide, d], of_text);
        layer("mlp.down_proj", &[d, wide], of_text);
    }
    weight("norm", &[d], Fill::Ones);
    if !text.tie_word_embeddings {
        weight("lm_head", &[text.vocab_size, d], of_text);
    }
    out
}

fn drawn(fill: Fill, n: usize, seed: u64, stream: u64) -> Vec<f32> {
    let std = match fill {
        Fill::Zeros => return vec![0.0; n],
        Fill::Ones => return vec![1.0; n],
        Fill::Normal(std) => std,
    };
    let mut rng = Pcg64::new(u128::from(seed), u128::from(stream));
    // In (0, 1], whose logarithm is finite.
    let mut uniform = || ((rng.next_u64() >> 11) + 1) as f64 / (1u64 << 53) as f64;
    let mut out = Vec::with_capacity(n + 1);
    while out.len() < n {
        // Box and Muller, 1958.
        let (radius, angle) = (std * (-2.0 * uniform().ln()).sqrt(), TAU * uniform());
        out.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
    }
    out.truncate(n);
    out
}
