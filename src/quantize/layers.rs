//! The decoder, layer by layer: each sees calibration data as the quantized layers before it give it, and is packed for that.
//!
//! One layer's statistics are in memory at a time, and the hidden states of all tokens: for a 7B model 16 kB a token, 1.1 GB for 96 rows of
//! 700. With GPTQ, 0.35 GB of Hessians come on top, and 0.4 GB while a large matrix is rounded.
//!
//! Work is two passes of all tokens through the decoder, and for GPTQ half of one for the Hessians: 2·10¹⁵ operations for these 96 rows, at
//! 180 GFLOP/s (two cores) three hours. Factors and updates of GPTQ are 7·10¹³ in all; AWQ's search makes, packs and tries 20 versions of each
//! matrix, about as long as GPTQ's Hessians. (Counted, and not measured: no 7B model was calibrated yet.)

use std::cell::RefCell;
use std::collections::HashMap;

use super::awq::{self, Fold};
use super::inputs::Inputs;
use super::round::{self, Loss};
use super::{Machine, Method, gptq};
use crate::error::{Error, Result};
use crate::infer::layer::LayerRunner;
use crate::model::checkpoint::Checkpoint;
use crate::model::config::LlavaConfig;
use crate::model::{LinearInput, Stage};
use crate::ops::Packed;
use crate::ops::packed::Format;
use crate::tensor::Tensor;
use crate::weights::recipe::Recipe;
use crate::weights::{Source, Store};

/// The matrices of a layer by what they multiply.
const GROUPS: [(LinearInput, &[&str]); 4] = [
    (LinearInput::Qkv, &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
    (LinearInput::Out, &["self_attn.o_proj"]),
    (LinearInput::GateUp, &["mlp.gate_proj", "mlp.up_proj"]),
    (LinearInput::Down, &["mlp.down_proj"]),
];

/// A decoder that is being quantized, with the calibration data that has come through the layers that are done.
pub struct Layers<'a> {
    machine: &'a Machine,
    method: Method,
    recipe: Recipe,
    config: &'a LlavaConfig,
    weights: &'a Store,
    runner: LayerRunner<'a>,
    /// Of each row of the data, `[tokens, hidden]`.
    hidden: Vec<Tensor>,
}

/// A layer that is done.
#[derive(Default)]
pub struct Layer {
    /// Its packed matrices by module (`llama.layers.0.mlp.up_proj`).
    pub matrices: HashMap<String, Rounded>,
    /// Its tensors that have changed otherwise, by canonical name, in the dtype of their file.
    pub changed: HashMap<String, Tensor>,
}

/// A packed matrix.
pub struct Rounded {
    /// The matrix.
    pub packed: Packed,
    /// What packing changed of the weights.
    pub loss: Loss,
    /// What it changed of the output for calibration data.
    pub output_loss: Loss,
}

/// A matrix of the layer at work.
struct Task {
    module: String,
    matrix: Tensor,
    format: Format,
    fold: Fold,
}

impl<'a> Layers<'a> {
    /// For the inputs `hidden` of the decoder, f32 `[tokens, hidden]` for each row of data.
    pub fn new(
        machine: &'a Machine,
        method: Method,
        recipe: Recipe,
        checkpoint: &'a Checkpoint,
        hidden: Vec<Tensor>,
    ) -> Result<Self> {
        let longest = hidden.iter().map(Tensor::rows).max().unwrap_or(0);
        let config = &checkpoint.config;
        let runner = LayerRunner::new(&machine.ops, config, longest)?;
        Ok(Self { machine, method, recipe, config, weights: &checkpoint.weights, runner, hidden })
    }

    /// Packs layer `index`; `keep` sees it before the data goes through it, on to the next.
    ///
    /// # Errors
    /// A weight that cannot be packed, by tensor, row and column; inputs that are no finite numbers.
    pub fn quantize(&mut self, index: usize, keep: impl FnOnce(&Layer) -> Result<()>) -> Result<()> {
        let pool = &self.machine.pool;
        let mut groups = self.load(index)?;
        let inputs = self.observe(index)?;
        for (tasks, inputs) in groups.iter().zip(&inputs) {
            tasks.first().map_or(Ok(()), |task| inputs.check().map_err(|e| e.within(&task.module)))?;
        }
        let mut layer = Layer::default();
        if self.method == Method::Awq {
            self.fold(index, &mut groups, &inputs, &mut layer)?;
        }
        for (tasks, mut inputs) in groups.iter().zip(inputs) {
            let Some(first) = tasks.first() else { continue };
            let factor = match inputs.hessian.take() {
                Some(hessian) => Some(hessian.factor(self.machine).map_err(|e| e.within(&first.module))?),
                None => None,
            };
            for task in tasks {
                let scaled = task.fold.apply(pool, &task.matrix);
                let packed = match &factor {
                    Some(factor) => gptq::pack(self.machine, &scaled, factor, task.format)?,
                    None => {
                        let ones = vec![1.0; scaled.row_len()];
                        let importance = match self.method {
                            Method::Awq => inputs.importance(task.fold.columns.as_ref().unwrap_or(&ones)),
                            _ => ones,
                        };
                        round::pack_for(pool, self.machine.isa, &scaled, task.format, &importance).map(|(packed, _)| packed)
                    }
                };
                let packed = packed.map_err(|problem| self.refused(task, problem))?;
                let rounded = task.fold.undo(pool, &round::dense(pool, &packed));
                let output_loss = inputs.output_loss(self.machine, &task.matrix, &rounded)?;
                let rounded = Rounded { packed, loss: Loss::between(&task.matrix, &rounded), output_loss };
                layer.matrices.insert(task.module.clone(), rounded);
            }
        }
        keep(&layer)?;
        self.advance(index, layer)
    }

    fn refused(&self, task: &Task, problem: String) -> Error {
        Error::tensor(&task.module, self.weights.root(), problem)
    }

    /// The matrices that are to be packed, by group, all of finite numbers.
    fn load(&self, index: usize) -> Result<Vec<Vec<Task>>> {
        let task = |name: &&str| {
            let module = format!("llama.layers.{index}.{name}");
            let tensor = format!("{module}.weight");
            let &[n, k] = self.weights.shape(&tensor).unwrap_or_default() else { return Ok(None) };
            let Some(format) = self.recipe.format(&module, k) else { return Ok(None) };
            let task = Task { module, matrix: self.weights.tensor(&tensor, &[n, k])?, format, fold: Fold::default() };
            round::check_finite(&task.matrix).map_err(|problem| self.refused(&task, problem))?;
            Ok(Some(task))
        };
        GROUPS.iter().map(|(_, names)| names.iter().filter_map(|name| task(name).transpose()).collect()).collect()
    }

    /// The inputs of each group, by the layer as it was.
    fn observe(&mut self, index: usize) -> Result<Vec<Inputs>> {
        let n_tokens = self.hidden.iter().map(Tensor::rows).sum();
        let (text, with_hessian) = (&self.config.text, self.method == Method::Gptq);
        let mut all: Vec<Inputs> = [text.hidden_size, text.heads().q_width(), text.hidden_size, text.intermediate_size]
            .map(|k| Inputs::new(k, n_tokens, with_hessian))
            .into();
        let block = self.runner.load(self.config, self.weights, index)?;
        for x in &self.hidden {
            let mut problem = Ok(());
            let mut see = |stage, x: &Tensor| {
                let group = GROUPS.iter().position(|(input, _)| stage == Stage::DecoderLinear(*input));
                if let (Some(group), Ok(())) = (group, &problem) {
                    problem = all[group].see(self.machine, x);
                }
            };
            // The output is that of the old weights: nobody's input.
            let mut x = x.converted(x.dtype());
            self.runner.run(&block, &mut x, Some(&mut see))?;
            problem?;
        }
        Ok(all)
    }

    /// Finds AWQ's scales and folds them into the matrices, the norms, and whatever makes the inputs.
    ///
    /// Inputs of the attention's output matrix come from V's rows, one for one where every head has its own; where heads share theirs, no
    /// scale fits all, and there is none. Inputs of down come from up's rows.
    fn fold(&self, index: usize, groups: &mut [Vec<Task>], inputs: &[Inputs], layer: &mut Layer) -> Result<()> {
        let heads = self.config.text.heads();
        for (group, (input, names)) in GROUPS.iter().enumerate() {
            let tasks = &groups[group];
            // A scale goes on all that share the input, or on none.
            if tasks.len() < names.len() {
                continue;
            }
            let maker = match input {
                LinearInput::Out if heads.n_heads == heads.n_kv_heads => Some("self_attn.v_proj"),
                LinearInput::Down => Some("mlp.up_proj"),
                LinearInput::Out => continue,
                LinearInput::Qkv | LinearInput::GateUp => None,
            };
            let maker = maker.map(|name| format!("llama.layers.{index}.{name}"));
            let maker =
                maker.map(|module| groups.iter().position(|tasks| tasks.iter().any(|t| t.module == module)).zip(Some(module)));
            let matrices: Vec<_> = tasks.iter().map(|task| (&task.matrix, task.format)).collect();
            let search = || awq::search(self.machine, &matrices, &inputs[group])?.map_err(|p| self.refused(&tasks[0], p));
            let scales = match maker {
                // What makes the inputs is not packed: it stays as it is.
                Some(None) => continue,
                Some(Some((makers, module))) => {
                    let scales = search()?;
                    let maker = groups[makers].iter_mut().find(|task| task.module == module);
                    maker.expect("just found").fold.rows = Some(scales.clone());
                    scales
                }
                None => {
                    let norm = if *input == LinearInput::Qkv { "input_layernorm" } else { "post_attention_layernorm" };
                    let name = format!("llama.layers.{index}.{norm}.weight");
                    let norm = self.weights.tensor(&name, &[self.config.text.hidden_size])?;
                    let (folded, real) = awq::fold_into_norm(&norm, &search()?);
                    layer.changed.insert(name, folded);
                    real
                }
            };
            groups[group].iter_mut().for_each(|task| task.fold.columns = Some(scales.clone()));
        }
        Ok(())
    }

    /// Brings the data through the quantized layer.
    fn advance(&mut self, index: usize, layer: Layer) -> Result<()> {
        let matrices = layer.matrices.into_iter().map(|(module, rounded)| (module, rounded.packed)).collect();
        let quantized = Overlay { under: self.weights, packed: RefCell::new(matrices), changed: layer.changed };
        let block = self.runner.load(self.config, &quantized, index)?;
        self.hidden.iter_mut().try_for_each(|x| self.runner.run(&block, x, None))
    }
}

/// A checkpoint of which some modules are packed, and some tensors others.
struct Overlay<'a> {
    under: &'a Store,
    /// Handed out once.
    packed: RefCell<HashMap<String, Packed>>,
    changed: HashMap<String, Tensor>,
}

impl Source for Overlay<'_> {
    fn tensor(&self, canonical: &str, shape: &[usize]) -> Result<Tensor> {
        match self.changed.get(canonical) {
            Some(tensor) => Ok(tensor.converted(tensor.dtype())),
            None => self.under.tensor(canonical, shape),
        }
    }

    fn packed(&self, module: &str, n: usize, k: usize) -> Result<Option<Packed>> {
        match self.packed.borrow_mut().remove(module) {
            Some(packed) => Ok(Some(packed)),
            None => self.under.packed(module, n, k),
        }
    }
}
