//! What a training pass costs, counted from shapes.

use crate::model::Trained;
use crate::model::config::{LlavaConfig, ProjectorConfig};

/// What a batch is, as far as its cost goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Size {
    /// Positions of each sequence.
    pub lengths: Vec<usize>,
    /// Pictures.
    pub n_images: usize,
    /// Tokens to be learned.
    pub n_learned: usize,
}

/// FLOPs of a batch's forward and backward, a multiplication and an addition two; nothing that is computed again counts.
///
/// A matrix costs 2 a weight and token forward, as many for the gradient by its input where that leads on to something that learns, and as
/// many for its own where it learns; `n_added` parameters of low-rank additions, in decoder and tower, all learn. Attention costs 4·head_dim a pair and head, and 8 on the way back. Norms and the like cost nothing.
pub fn model_flops(config: &LlavaConfig, trained: Trained, n_added: [usize; 2], batch: &Size) -> f64 {
    let passes = |dx: bool, dw: bool| 1.0 + f64::from(u8::from(dx)) + f64::from(u8::from(dw));
    let product = |rows: usize, weights: usize, dx: bool, dw: bool| 2.0 * rows as f64 * weights as f64 * passes(dx, dw);
    let attention = |pairs: usize, width: usize, n_layers: usize, back: bool| {
        let forward = 4.0 * pairs as f64 * width as f64 * n_layers as f64;
        forward * if back { 3.0 } else { 1.0 }
    };

    let (v, t) = (&config.vision, &config.text);
    let n_tokens: usize = batch.lengths.iter().sum();
    // Down to the embeddings: of pictures if the projector learns, of words if the decoder does.
    let back = trained.vision || trained.projector || trained.decoder || n_added != [0; 2];
    let back_to_tower = trained.vision || n_added[1] > 0;
    let heads = t.heads();
    let layer = t.hidden_size * (heads.qkv_width() + heads.q_width() + 3 * t.intermediate_size);
    let pairs = batch.lengths.iter().map(|n| n * (n + 1) / 2).sum();
    let decoder = product(n_tokens, layer * t.n_layers, back, trained.decoder)
        + attention(pairs, heads.q_width(), t.n_layers, back)
        + product(batch.n_learned, t.hidden_size * t.vocab_size, back, trained.decoder);

    let n_features = batch.n_images * config.tokens_per_image();
    let projector = match &config.projector {
        ProjectorConfig::Identity => 0.0,
        ProjectorConfig::Mlp { n_linear, .. } => {
            let others = (n_linear - 1) * t.hidden_size * t.hidden_size;
            product(n_features, v.hidden_size * t.hidden_size, back_to_tower, trained.projector)
                + product(n_features, others, back, trained.projector)
        }
    };

    let (n_patches, n_seen) = (v.n_patches(), 1 + v.n_patches());
    let layer = v.hidden_size * (4 * v.hidden_size + 2 * v.intermediate_size);
    let n_layers = config.n_vision_layers;
    let patch = 3 * v.patch_size * v.patch_size;
    let vision = product(batch.n_images * n_seen, layer * n_layers, back_to_tower, trained.vision)
        + attention(batch.n_images * n_seen * n_seen, v.hidden_size, n_layers, back_to_tower)
        + product(batch.n_images * n_patches, patch * v.hidden_size, false, trained.vision);
    let added = product(n_tokens, n_added[0], true, true) + product(batch.n_images * n_seen, n_added[1], true, true);
    decoder + projector + vision + added
}

#[cfg(test)]
mod tests {
    use super::*;

    /// LLaVA-1.5-7B: 6.74 billion weights in the decoder, of which 131 million are embeddings that multiply nothing; 4096 tokens.
    #[test]
    fn a_step_costs_what_its_weights_say() {
        let config = LlavaConfig::by_name("llava-1.5-7b").unwrap();
        let batch = |n_images| Size { lengths: vec![1024; 4], n_images, n_learned: 4096 };
        let flops = |trained, n_images| model_flops(&config, trained, [0; 2], &batch(n_images));
        let of = |vision, projector, decoder| Trained { vision, projector, decoder };
        let close = |got: f64, expected: f64| assert!((got / expected - 1.0).abs() < 1e-3, "{got:e}, expected {expected:e}");
        // Attention: 4 sequences of 1024·1025/2 pairs, 32 layers of width 4096, 4 FLOPs, three times.
        let attention = 4.0 * 524_800.0 * 32.0 * 4096.0 * 4.0 * 3.0;
        close(flops(of(false, false, true), 0), 6.0 * 4096.0 * (6.738e9 - 131e6) + attention);
        // Gradients flow through a decoder that does not learn; but they take no products for its weights.
        close(flops(of(false, true, false), 0), 4.0 * 4096.0 * (6.738e9 - 131e6) + attention);
        close(flops(of(false, false, false), 0), 2.0 * 4096.0 * (6.738e9 - 131e6) + attention / 3.0);
        // 23 layers of the tower, 12.6 million weights each: 577 tokens a picture, forward only; 21 million weights in the projector,
        // whose first layer's input wants no gradient.
        let pictures = flops(of(false, true, false), 4) - flops(of(false, true, false), 0);
        let attention = 4.0 * 577.0 * 577.0 * 23.0 * 1024.0 * 4.0;
        close(
            pictures,
            2.0 * 4.0 * (577.0 * 23.0 * 12.58e6 + 576.0 * 0.6e6) + attention + 4.0 * 576.0 * (4.0 * 4.19e6 + 6.0 * 16.78e6),
        );
        // Additions of 160 million parameters, which learn in a decoder that does not.
        let frozen = of(false, true, false);
        close(model_flops(&config, frozen, [160_000_000, 0], &batch(0)) - flops(frozen, 0), 6.0 * 4096.0 * 160e6);
        let tower = 2.0 * (2.0 * 4.0 * 577.0 * 23.0 * 12.58e6 + attention);
        let ends = 2.0 * 4.0 * 576.0 * (0.6e6 + 4.19e6);
        close(flops(of(true, true, false), 4) - flops(of(false, true, false), 4), tower + ends);
    }
}
