//! What the benchmarks share: the hot ops on the shapes of CLIP ViT-L/14-336 and LLaMA-7B, with the work that each is.

#![allow(dead_code)] // each bench uses its own part

use std::sync::Arc;

use llava_engine::cpu::Cpu;
use llava_engine::dtype::DType;
use llava_engine::nn::{RopeScaling, rope_table};
use llava_engine::ops::grad::{GradOps, Update};
use llava_engine::ops::{Draw, Epilogue, Heads, KvLayer, KvSource, Matrix, Ops, Span, Weight};
use llava_engine::tensor::Tensor;
use llava_engine::weights::Source;
use llava_engine::weights::random::Random;
use llava_engine::weights::recipe::Recipe;

/// Far larger than any last cache that is shared by few threads: what must come from memory is this much before it comes again.
pub const STREAM_BYTES: usize = 256 << 20;

const CLIP: Heads = Heads { n_heads: 16, n_kv_heads: 16, head_dim: 64 };
const LLAMA: Heads = Heads { n_heads: 32, n_kv_heads: 32, head_dim: 128 };
const PAGE_TOKENS: usize = 64;

/// What one call of an op is, in the unit of what bounds it.
#[derive(Clone, Copy)]
pub enum Work {
    /// Floating-point operations, a fused multiply-add counted as two.
    Flops(usize),
    /// The same, of which the matrix is bf16.
    Bf16Flops(usize),
    /// The same, of integers.
    IntOps(usize),
    /// Bytes that are read and written at least: weights and cache where they outweigh the activations by far, else each operand once.
    Bytes(usize),
}

/// An op with its operands, ready to be called.
pub type Call<'a> = Box<dyn FnMut() + 'a>;

/// Makes the operands of an op on a device.
type Prepare = dyn Fn(&dyn GradOps) -> Call<'_>;

/// One op on one shape. Its operands, up to half a gigabyte, are made when it is prepared, and not before.
pub struct Case {
    /// The op.
    pub op: &'static str,
    /// The shape, the dtype and whatever else tells it from the op's other cases.
    pub shape: String,
    /// What one call is.
    pub work: Work,
    prepare: Box<Prepare>,
}

impl Case {
    fn new(op: &'static str, shape: String, work: Work, prepare: impl Fn(&dyn GradOps) -> Call<'_> + 'static) -> Self {
        Self { op, shape, work, prepare: Box::new(prepare) }
    }

    /// Makes the operands.
    pub fn prepare<'a>(&self, ops: &'a dyn GradOps) -> Call<'a> {
        (self.prepare)(ops)
    }
}

/// The processor with as many threads as `LLAVA_THREADS` says, or as the machine runs at once.
pub fn cpu() -> Cpu {
    let n_threads = std::env::var("LLAVA_THREADS").map_or(0, |n| n.parse().expect("LLAVA_THREADS takes a number"));
    // bf16 lets kernels of bf16 weights use the processor's bf16 products; f32 weights never do.
    Cpu::new(n_threads, DType::Bf16).expect("LLAVA_ISA names an instruction set of this machine")
}

/// Linear layers of an image (577 tokens), a prompt (640), a short one (32), and of decoding (1, 4, 8).
pub fn linears(dtype: DType) -> Vec<Case> {
    let flops = if dtype == DType::Bf16 { Work::Bf16Flops } else { Work::Flops };
    let flops = MANY.map(|(tokens, n, k)| linear(tokens, n, k, dtype, flops(2 * tokens * n * k)));
    let bytes = FEW.map(|(tokens, n, k)| linear(tokens, n, k, dtype, Work::Bytes(n * k * dtype.size())));
    flops.into_iter().chain(bytes).collect()
}

/// The same with weights packed in so many bits.
pub fn packed_linears(bits: usize) -> Vec<Case> {
    let bytes = |n, k| n * k * bits / 8 + n * k / 128 * 2;
    let many = MANY.map(|(tokens, n, k)| packed_linear(tokens, n, k, bits, Work::IntOps(2 * tokens * n * k)));
    let few = FEW.map(|(tokens, n, k)| packed_linear(tokens, n, k, bits, Work::Bytes(bytes(n, k))));
    many.into_iter().chain(few).collect()
}

/// (tokens, n, k) that arithmetic bounds, and that bytes do.
const MANY: [(usize, usize, usize); 5] =
    [(577, 4096, 1024), (577, 1024, 4096), (640, 11008, 4096), (640, 4096, 11008), (32, 4096, 4096)];
const FEW: [(usize, usize, usize); 5] = [(1, 4096, 4096), (1, 11008, 4096), (1, 4096, 11008), (4, 11008, 4096), (8, 11008, 4096)];

/// Gradients of linear layers by x and by W, f32: of CLIP, of LLaMA-7B, and of the demo model with 2048 tokens at once.
pub fn linear_gradients() -> Vec<Case> {
    let shapes = [(577, 4096, 1024), (640, 11008, 4096), (2048, 768, 256), (2048, 256, 512), (2048, 768, 128), (2048, 128, 384)];
    shapes.into_iter().flat_map(|(tokens, n, k)| [linear_dx(tokens, n, k), linear_dw(tokens, n, k)]).collect()
}

fn linear_dx(tokens: usize, n: usize, k: usize) -> Case {
    Case::new("linear_dx", format!("{tokens}x{n}x{k}"), Work::Flops(2 * tokens * n * k), move |ops| {
        let w = Weight::stacked(vec![activations(ops, &[n, k]).into()]).unwrap();
        let (dy, mut dx) = (activations(ops, &[tokens, n]), activations(ops, &[tokens, k]));
        Box::new(move || ops.linear_dx(&mut dx, &dy, &w, Update::Set).unwrap())
    })
}

fn linear_dw(tokens: usize, n: usize, k: usize) -> Case {
    Case::new("linear_dw", format!("{tokens}x{n}x{k}"), Work::Flops(2 * tokens * n * k), move |ops| {
        let (dy, x, mut dw) = (activations(ops, &[tokens, n]), activations(ops, &[tokens, k]), activations(ops, &[n, k]));
        Box::new(move || ops.linear_dw(&mut dw, &dy, 0, &x).unwrap())
    })
}

/// Attention of an image, of a prompt, and of a token that looks back on a long context.
pub fn attentions(cache: &[DType]) -> Vec<Case> {
    let mut cases = vec![attention("clip 577", CLIP, 0, 577, None)];
    for &dtype in cache {
        cases.push(attention("prompt 640", LLAMA, 0, 640, Some(dtype)));
        cases.push(attention("decode at 8192", LLAMA, 8191, 1, Some(dtype)));
    }
    cases
}

/// y = x·Wᵀ. If bytes bound it, a set of weights larger than the caches is taken in turn: a model reads each of its own once a token.
fn linear(tokens: usize, n: usize, k: usize, dtype: DType, work: Work) -> Case {
    linear_of(tokens, n, k, &dtype.to_string(), work, move |ops| {
        let values = Tensor::from_slice(&[n, k], &random(n * k));
        Matrix::Dense(Arc::new(ops.upload(values.converted(dtype)).unwrap()))
    })
}

fn packed_linear(tokens: usize, n: usize, k: usize, bits: usize, work: Work) -> Case {
    linear_of(tokens, n, k, &format!("int{bits}"), work, move |_| {
        let source = Random::packed(DType::F32, Recipe::of_bits(bits, 128).unwrap());
        let packed = source.packed("llama.layers.0.mlp.up_proj", n, k).unwrap().expect("its columns are whole groups");
        // On the host already, where benchmarks run.
        Matrix::Packed(Arc::new(packed))
    })
}

fn linear_of(tokens: usize, n: usize, k: usize, storage: &str, work: Work, matrix: impl Fn(&dyn Ops) -> Matrix + 'static) -> Case {
    Case::new("linear", format!("{tokens}x{n}x{k} {storage}"), work, move |ops| {
        let copies = match work {
            Work::Flops(_) | Work::Bf16Flops(_) | Work::IntOps(_) => 1,
            Work::Bytes(bytes) => STREAM_BYTES.div_ceil(bytes),
        };
        let weights: Vec<Weight> = (0..copies).map(|_| Weight::of(vec![matrix(ops)]).unwrap()).collect();
        let x = activations(ops, &[tokens, k]);
        let mut y = activations(ops, &[tokens, n]);
        let mut turn = 0;
        Box::new(move || {
            ops.linear(&mut y, &x, &weights[turn % copies], None, Epilogue::Store).unwrap();
            turn += 1;
        })
    })
}

/// Causal with a cache, else not.
fn attention(name: &'static str, heads: Heads, past: usize, rows: usize, cache: Option<DType>) -> Case {
    let pairs = if cache.is_some() { rows * past + rows * (rows + 1) / 2 } else { rows * rows };
    let work = match cache {
        Some(dtype) if rows == 1 => Work::Bytes(2 * (past + rows) * heads.kv_width() * dtype.size()),
        _ => Work::Flops(4 * pairs * heads.q_width()),
    };
    let shape = format!("{name} {}", cache.map_or("own".to_owned(), |dtype| dtype.to_string()));
    Case::new("attention", shape, work, move |ops| {
        let qkv = activations(ops, &[rows, heads.qkv_width()]);
        let mut out = activations(ops, &[rows, heads.q_width()]);
        let pages = pages(past + rows);
        let layer = cache.map(|dtype| kv_layer(ops, heads, pages.len(), dtype));
        Box::new(move || {
            let span = Span { first_row: 0, n_rows: rows, past, pages: &pages };
            let source = layer.as_ref().map_or(KvSource::Own, KvSource::Paged);
            ops.attention(&mut out, &qkv, source, &[span], heads, layer.is_some()).unwrap();
        })
    })
}

/// The ops whose work is small beside the linear layers': norms, activation, rotation, of a prompt and of one token.
pub fn small_ops() -> Vec<Case> {
    let mut cases = vec![layer_norm(577, 1024)];
    for tokens in [640, 1] {
        cases.extend([rms_norm(tokens, 4096), silu_mul(tokens, 11008)]);
        cases.extend([DType::F32, DType::Bf16].map(|dtype| rope_append(tokens, LLAMA, dtype)));
    }
    cases.extend([("all", 0, 1.0), ("top-k", 40, 1.0), ("top-p", 0, 0.95)].map(|(kept, k, p)| sample(32000, kept, k, p)));
    cases
}

fn rms_norm(tokens: usize, hidden: usize) -> Case {
    Case::new("rms_norm", format!("{tokens}x{hidden}"), Work::Bytes(2 * 4 * tokens * hidden), move |ops| {
        let [x, mut y] = [(); 2].map(|()| activations(ops, &[tokens, hidden]));
        let w = activations(ops, &[hidden]);
        Box::new(move || ops.rms_norm(&mut y, &x, &w, 1e-5).unwrap())
    })
}

fn layer_norm(tokens: usize, hidden: usize) -> Case {
    Case::new("layer_norm", format!("{tokens}x{hidden}"), Work::Bytes(2 * 4 * tokens * hidden), move |ops| {
        let [x, mut y] = [(); 2].map(|()| activations(ops, &[tokens, hidden]));
        let [w, b] = [(); 2].map(|()| activations(ops, &[hidden]));
        Box::new(move || ops.layer_norm(&mut y, &x, &w, &b, 1e-5).unwrap())
    })
}

fn silu_mul(tokens: usize, n: usize) -> Case {
    Case::new("silu_mul", format!("{tokens}x{n}"), Work::Bytes(3 * 4 * tokens * n), move |ops| {
        let gate_up = activations(ops, &[tokens, 2 * n]);
        let mut y = activations(ops, &[tokens, n]);
        Box::new(move || ops.silu_mul(&mut y, &gate_up).unwrap())
    })
}

/// Queries and keys are read and written, values read, and keys and values written to the cache.
fn rope_append(tokens: usize, heads: Heads, cache: DType) -> Case {
    let rotated = 2 * 4 * (heads.q_width() + heads.kv_width());
    let work = Work::Bytes(tokens * (rotated + heads.kv_width() * (4 + 2 * cache.size())));
    Case::new("rope_append", format!("{tokens}x{} {cache}", heads.qkv_width()), work, move |ops| {
        let mut qkv = activations(ops, &[tokens, heads.qkv_width()]);
        let rope = rope_table(ops, tokens, heads.head_dim, 10000.0, &RopeScaling::None).unwrap();
        let pages = pages(tokens);
        let mut layer = kv_layer(ops, heads, pages.len(), cache);
        Box::new(move || {
            let span = Span { first_row: 0, n_rows: tokens, past: 0, pages: &pages };
            ops.rope_append(&mut qkv, &mut layer, &rope, &[span], heads).unwrap();
        })
    })
}

/// A row of logits of which thousands have a part in the draw: more work than a model that is sure of itself makes.
fn sample(vocab: usize, kept: &str, top_k: usize, top_p: f32) -> Case {
    Case::new("sample", format!("{vocab} {kept}"), Work::Bytes(4 * vocab), move |ops| {
        let logits = Tensor::from_slice(&[1, vocab], &random(vocab).iter().map(|l| 10.0 * l).collect::<Vec<_>>());
        let logits = ops.upload(logits).unwrap();
        let mut ids = ops.alloc(&[1], DType::I32).unwrap();
        let mut seen = ops.alloc(&[1, vocab.div_ceil(32)], DType::I32).unwrap();
        let draw = Draw { repetition_penalty: 1.0, temperature: 1.0, top_k, top_p, min_p: 0.0, random: 1 << 63 };
        Box::new(move || ops.sample(&mut ids, &logits, &mut seen, &[draw]).unwrap())
    })
}

/// Pages that hold `context` tokens.
fn pages(context: usize) -> Vec<u32> {
    (0..context.div_ceil(PAGE_TOKENS) as u32).collect()
}

fn kv_layer(ops: &dyn Ops, heads: Heads, n_pages: usize, dtype: DType) -> KvLayer {
    let shape = [n_pages, heads.n_kv_heads, PAGE_TOKENS, heads.head_dim];
    let values = || ops.upload(Tensor::from_slice(&shape, &random(shape.iter().product())).converted(dtype)).unwrap();
    KvLayer { k: values(), v: values(), scales: None }
}

fn activations(ops: &dyn Ops, shape: &[usize]) -> Tensor {
    ops.upload(Tensor::from_slice(shape, &random(shape.iter().product()))).unwrap()
}

/// Numbers in −1..1 that look random.
fn random(n: usize) -> Vec<f32> {
    let mut state = 1_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}
