//! Which kernels there are, and what every launch goes through.

use super::Cuda;
use super::driver::{Arg, DevicePtr, Driver, Function, Grid, Launch};
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

macro_rules! kernels {
    ($($variant:ident $name:literal)*) => {
        /// A kernel: one for each dtype of activations, as `name_dtype`, unless its own name ends in what it writes.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(super) enum Kernel { $($variant),* }

        impl Kernel {
            /// All, in the order of their numbers, with their names.
            const ALL: &[(Self, &str)] = &[$((Self::$variant, $name)),*];
        }
    };
}

kernels! {
    RmsNorm "rms_norm_fwd"
    LayerNorm "layer_norm_fwd"
    SiluMul "silu_mul_fwd"
    Embed "embed_fwd"
    EmbedPacked4 "embed_packed4_fwd"
    EmbedPacked8 "embed_packed8_fwd"
    CopyRows "copy_rows_fwd"
    Patchify "patchify_fwd"
    ClipEmbed "clip_embed_fwd"
    RopeAppend "rope_append_fwd"
    RopeAppendI8 "rope_append_i8_fwd"
    ResizeHorizontal "resize_horizontal_u8"
    ResizeVertical "resize_vertical_u8"
    Normalize "normalize_f32"
    Sample "sample_fwd_f32"
    AttentionD64 "attention_fwd_d64"
    AttentionD80 "attention_fwd_d80"
    AttentionD96 "attention_fwd_d96"
    AttentionD128 "attention_fwd_d128"
    AttentionD256 "attention_fwd_d256"
    AttentionDecode "attention_decode"
    AttentionDecodeI8 "attention_decode_i8"
    WidenCache "widen_cache_fwd"
    Gemm "gemm"
    GemmSmall "gemm_small"
    Gemv "gemv"
    GemmPacked4 "gemm_packed4"
    GemmPacked8 "gemm_packed8"
    GemmSmallPacked4 "gemm_small_packed4"
    GemmSmallPacked8 "gemm_small_packed8"
    RoundI8 "round_i8"
    GemmW8a8 "gemm_w8a8"
    GemmSmallW8a8 "gemm_small_w8a8"
    GemvPacked4 "gemv_packed4"
    GemvPacked8 "gemv_packed8"
    ProbeRead "probe_read_f32"
    Rope "rope_fwd"
    SiluMulBackward "silu_mul_bwd"
    Activate "activate_fwd"
    ActivateBackward "activate_bwd"
    Dropout "dropout_fwd"
    Scale "scale_fwd"
    ScaleF32 "scale_fwd_f32"
    AddRows "add_rows_bwd"
    EmbedBackward "embed_bwd"
    ClipEmbedBackward "clip_embed_bwd"
    RoundRows "round_rows_fwd"
    RmsNormBackward "rms_norm_bwd"
    LayerNormBackward "layer_norm_bwd"
    SumColumns "sum_columns_bwd"
    CrossEntropy "cross_entropy_f32"
    SqNorm "sq_norm_f32"
    AdamW "adamw_f32"
    LinearDx "linear_dx"
    LinearDxSmall "linear_dx_small"
    LinearDxPacked4 "linear_dx_packed4"
    LinearDxPacked8 "linear_dx_packed8"
    LinearDxSmallPacked4 "linear_dx_small_packed4"
    LinearDxSmallPacked8 "linear_dx_small_packed8"
    LinearDw "linear_dw"
    LinearDwSmall "linear_dw_small"
    AttentionDelta "attention_delta"
    AttentionQueriesD64 "attention_bwd_queries_d64"
    AttentionQueriesD80 "attention_bwd_queries_d80"
    AttentionQueriesD96 "attention_bwd_queries_d96"
    AttentionQueriesD128 "attention_bwd_queries_d128"
    AttentionQueriesD256 "attention_bwd_queries_d256"
    AttentionKeysD64 "attention_bwd_keys_d64"
    AttentionKeysD80 "attention_bwd_keys_d80"
    AttentionKeysD96 "attention_bwd_keys_d96"
    AttentionKeysD128 "attention_bwd_keys_d128"
    AttentionKeysD256 "attention_bwd_keys_d256"
}

/// The kernels of one dtype, found once.
pub(super) struct Functions(Vec<Function>);

impl Functions {
    /// Looks all of them up.
    pub fn resolve(driver: &dyn Driver, dtype: DType) -> Result<Self> {
        let is_full = |name: &str| ["_f32", "_u8"].iter().any(|written| name.ends_with(written));
        let full_name = |name: &str| if is_full(name) { name.to_owned() } else { format!("{name}_{dtype}") };
        Kernel::ALL.iter().map(|(_, name)| driver.function(&full_name(name))).collect::<Result<_>>().map(Self)
    }
}

/// The address of a tensor of this device.
pub(super) fn address(op: &'static str, what: &str, tensor: &Tensor) -> Result<DevicePtr> {
    tensor.device_address().map(DevicePtr).ok_or_else(|| Error::shape(op, what, "a tensor on the device", "one of the host"))
}

/// A size as a kernel takes it.
pub(super) fn int(op: &'static str, what: &str, n: usize) -> Result<Arg> {
    i32::try_from(n).map(Arg::Int).map_err(|_| Error::shape(op, what, "below 2^31", n))
}

impl Cuda {
    /// Queues a launch of the kernel of this device's dtype. What goes wrong in it is reported by whoever asks for results.
    ///
    /// # Safety
    /// That of [`Driver::launch`].
    pub(super) unsafe fn launch(&self, kernel: Kernel, grid: Grid, args: &[Arg]) -> Result<()> {
        // SAFETY: the caller's; memory goes back to the driver only after the queue is gone.
        unsafe { self.queue.push(Launch { function: self.functions.0[kernel as usize], grid, args: args.to_vec() }) };
        Ok(())
    }
}
