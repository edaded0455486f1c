//! Matrix products by cuBLASLt, where its library is installed: the way to the tensor cores of sm_90 and later, whose instructions our own
//! kernels do not use. It is loaded when the first product asks for it, and nothing needs it.

use std::ffi::c_void;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::{DevicePtr, Matmul};
use crate::dtype::DType;

/// Scratch memory that algorithms may ask for: what NVIDIA recommends for sm_90.
pub const WORKSPACE_BYTES: usize = 32 << 20;

/// The library.
pub struct Library(sys::cublasLtHandle_t);

// SAFETY: "the cuBLASLt API is thread-safe", of a handle and of descriptors that are not written any more.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl Library {
    /// Opens it for the context at hand; none if it is not installed or refuses.
    pub fn open() -> Option<Self> {
        // SAFETY: it only tries to open the library.
        let is_there = unsafe { sys::is_culib_present() };
        // A library that is too old lacks symbols, over which the bindings panic.
        let handle = is_there.then(|| std::panic::catch_unwind(result::create_handle).ok()?.ok()).flatten();
        handle.map(Self)
    }

    /// Prepares products of one size; none if the library has no algorithm for it.
    pub fn plan(&self, matmul: &Matmul) -> Option<Plan> {
        Plan::new(self, matmul).ok()
    }

    /// Makes a product on a stream: y = x·Wᵀ, or y += x·Wᵀ.
    ///
    /// # Safety
    /// The plan is this library's; the pointers lead to tensors as it was made for, 256-byte aligned, the workspace to
    /// [`WORKSPACE_BYTES`].
    pub unsafe fn run(
        &self,
        plan: &Plan,
        [y, x, w]: [DevicePtr; 3],
        workspace: DevicePtr,
        stream: *mut c_void,
    ) -> Result<(), CublasError> {
        let (one, beta) = (1.0f32, if plan.add { 1.0f32 } else { 0.0 });
        let scalar = |f: &f32| std::ptr::from_ref(f).cast::<c_void>();
        let pointer = |p: DevicePtr| p.0 as *mut c_void;
        // SAFETY: the caller's for the memory; descriptors live as long as the plan; the scalars are read before the call returns.
        unsafe {
            result::matmul(
                self.0,
                plan.product.0,
                scalar(&one),
                scalar(&beta),
                pointer(w),
                plan.w.0,
                pointer(x),
                plan.x.0,
                pointer(y),
                plan.y.0,
                pointer(y),
                plan.y.0,
                &plan.algorithm,
                pointer(workspace),
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: the handle is ours, and products hold the driver that holds it. An error in taking down is of no use to anybody.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// Everything about products of one size but the pointers.
pub struct Plan {
    product: Product,
    w: Layout,
    x: Layout,
    y: Layout,
    algorithm: sys::cublasLtMatmulAlgo_t,
    add: bool,
}

// SAFETY: as for `Library`; nothing is written after `new`.
unsafe impl Send for Plan {}

impl Plan {
    /// The library's matrices are column-major: what it makes is yᵀ = W·xᵀ, where W `[k, n]` is transposed and x `[k, tokens]` is not.
    fn new(library: &Library, matmul: &Matmul) -> Result<Self, CublasError> {
        let &Matmul { dtype, y_dtype, tokens, n, k, y_stride, add } = matmul;
        let data_type = |dtype| match dtype {
            DType::F16 => Ok(sys::cudaDataType::CUDA_R_16F),
            DType::Bf16 => Ok(sys::cudaDataType::CUDA_R_16BF),
            DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
            _ => Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED)),
        };
        let layout = |dtype, rows: usize, columns: usize, stride: usize| {
            result::create_matrix_layout(data_type(dtype)?, rows as u64, columns as u64, stride as i64).map(Layout)
        };
        let product =
            Product(result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, sys::cudaDataType::CUDA_R_32F)?);
        let (w, x, y) = (layout(dtype, k, n, k)?, layout(dtype, k, tokens, k)?, layout(y_dtype, n, tokens, y_stride)?);
        let preference = Preference(result::create_matmul_pref()?);
        let transposed = 1i32; // CUBLAS_OP_T, of an enum that the bindings lack
        use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA as TRANSPOSE_W;
        use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as WORKSPACE;
        // SAFETY: the descriptors were just made; attributes have the types that the library documents, and are read in the call.
        let found = unsafe {
            result::set_matmul_desc_attribute(
                product.0,
                TRANSPOSE_W,
                std::ptr::from_ref(&transposed).cast(),
                size_of_val(&transposed),
            )?;
            let bytes = std::ptr::from_ref(&WORKSPACE_BYTES).cast();
            result::set_matmul_pref_attribute(preference.0, WORKSPACE, bytes, size_of::<usize>())?;
            result::get_matmul_algo_heuristic(library.0, product.0, w.0, x.0, y.0, y.0, preference.0)?
        };
        Ok(Self { product, w, x, y, algorithm: found.algo, add })
    }
}

/// Declares an owner of a descriptor. An error in taking down is of no use to anybody.
macro_rules! owner {
    ($name:ident, $handle:ty, $destroy:path) => {
        struct $name($handle);

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: the descriptor is ours alone.
                let _ = unsafe { $destroy(self.0) };
            }
        }
    };
}

owner!(Product, sys::cublasLtMatmulDesc_t, result::destroy_matmul_desc);
owner!(Layout, sys::cublasLtMatrixLayout_t, result::destroy_matrix_layout);
owner!(Preference, sys::cublasLtMatmulPreference_t, result::destroy_matmul_pref);
