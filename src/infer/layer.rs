//! One decoder layer by itself: for whoever goes through a model layer by layer, with many sequences.

use super::kv::{KvCache, PageTable};
use crate::error::Result;
use crate::model::config::LlavaConfig;
use crate::model::{Block, BlockActs, Ctx, Loader, Observer};
use crate::nn::rope_table;
use crate::ops::{Ops, RopeTable, RowCopy, Span};
use crate::tensor::Tensor;
use crate::weights::Source;

/// Buffers for any layer of a decoder, one sequence at a time.
pub struct LayerRunner<'a> {
    ops: &'a dyn Ops,
    acts: BlockActs,
    /// Of one layer.
    kv: KvCache,
    table: PageTable,
    rope: RopeTable,
}

impl<'a> LayerRunner<'a> {
    /// For the decoder of `config`, and sequences of up to `max_tokens` tokens; keys and values are kept in the device's own dtype.
    pub fn new(ops: &'a dyn Ops, config: &LlavaConfig, max_tokens: usize) -> Result<Self> {
        let text = &config.text;
        let kv = KvCache::new(ops, 1, text.heads(), max_tokens, ops.activation_dtype())?;
        let mut table = kv.sequence();
        table.reserve(max_tokens)?;
        Ok(Self {
            ops,
            acts: BlockActs::plan(ops, text, max_tokens)?,
            kv,
            table,
            rope: rope_table(ops, max_tokens, text.head_dim, text.rope_theta, &text.rope_scaling)?,
        })
    }

    /// The layer's matrices as they are stored, on the device.
    pub fn load(&self, config: &LlavaConfig, weights: &dyn Source, index: usize) -> Result<Block> {
        let dtype = self.ops.weight_dtype();
        Block::load(&Loader::new(self.ops, weights, dtype), &config.text, index)
    }

    /// The output of `block` for x `[tokens, hidden]`, a whole sequence; it is left in x. What happens inside is shown to `observer`.
    pub fn run(&mut self, block: &Block, x: &mut Tensor, observer: Option<Observer<'_>>) -> Result<()> {
        let n_rows = x.rows();
        let all = [RowCopy { dst: 0, src: 0, n_rows }];
        let mut ctx = Ctx { observer: observer.map(|o| o as _), ..Ctx::new(self.ops) };
        self.acts.set_tokens(n_rows);
        self.ops.copy_rows(&mut self.acts.x, x, &all)?;
        let span = Span { first_row: 0, n_rows, past: 0, pages: self.table.pages() };
        block.forward(&mut ctx, &mut self.acts, &mut self.kv.layers[0], &self.rope, &[span])?;
        self.ops.copy_rows(x, &self.acts.x, &all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::Cpu;
    use crate::dtype::DType;
    use crate::infer::runner::Runner;
    use crate::model::checkpoint::Checkpoint;
    use crate::model::{LinearInput, Llava, Slot, Stage};
    use std::path::Path;
    use std::sync::{Arc, Mutex};

    /// Layer after layer, a sequence becomes what the whole decoder makes of it.
    #[test]
    fn layers_by_themselves_are_the_decoder() {
        let cpu = || Cpu::new(2, DType::F32).unwrap();
        for name in ["hf_mha_f32", "hf_gqa_bf16"] {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints").join(name);
            let checkpoint = Checkpoint::open(&folder, None).unwrap();
            let config = &checkpoint.config;
            let mut runner =
                Runner::new(Box::new(cpu()), Llava::load(&cpu(), config, &checkpoint.weights, None).unwrap(), DType::F32, 1)
                    .unwrap();
            let seen: Arc<Mutex<Vec<(Stage, Tensor)>>> = Arc::default();
            let sink = seen.clone();
            runner.observe(Some(Box::new(move |stage, t| sink.lock().unwrap().push((stage, t.converted(DType::F32))))));
            let slots: Vec<_> = (3..40).map(Slot::Token).collect();
            let mut table = runner.kv().sequence();
            runner.extend(&mut table, 0, &slots, None, 0, |_| {}).unwrap();
            let seen = std::mem::take(&mut *seen.lock().unwrap());
            let at = |stage| seen.iter().find(|(s, _)| *s == stage).map(|(_, t)| t).unwrap();

            let ops = cpu();
            let mut layers = LayerRunner::new(&ops, config, slots.len()).unwrap();
            let mut x = at(Stage::InputEmbeds).converted(DType::F32);
            for i in 0..config.text.n_layers {
                let block = layers.load(config, &checkpoint.weights, i).unwrap();
                let mut inputs = Vec::new();
                let mut observe = |stage, t: &Tensor| inputs.push((stage, t.shape().to_vec()));
                layers.run(&block, &mut x, Some(&mut observe)).unwrap();
                assert_eq!(x.as_slice::<f32>(), at(Stage::DecoderHidden(i + 1)).as_slice::<f32>(), "{name}: layer {i}");
                let text = &config.text;
                let widths = [
                    (LinearInput::Qkv, text.hidden_size),
                    (LinearInput::Out, text.heads().q_width()),
                    (LinearInput::GateUp, text.hidden_size),
                    (LinearInput::Down, text.intermediate_size),
                ];
                let expected = widths.map(|(input, width)| (Stage::DecoderLinear(input), vec![slots.len(), width]));
                assert_eq!(inputs, expected);
            }
        }
    }
}
