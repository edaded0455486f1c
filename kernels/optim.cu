// The optimizer: sums of squares of gradients, and steps of AdamW.
//
//   sq_norm_f32: sums[b] = Σ x², over the b-th RUN of x, in f64
//   adamw_f32:   g = grad_scale·grad,  m += (1 − β₁)·(g − m),  v = β₂·v + (1 − β₂)·g²,
//                param = param·decay − step_size·m / (√v/√(1 − β₂ᵗ) + eps);  rounded = param
//
// Layouts: n elements each of param, m, v, grad and x, f32; rounded n of f32, f16 or bf16 (`kind` 1, 2, 3), or none (0). Any alignment.
// Grid: sq_norm_f32 one block for each RUN, adamw_f32 one for each THREADS elements. Sums are taken in an order that depends on n alone.
// Shared memory: sq_norm_f32 one f64 for each warp.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
// Elements of a block of sq_norm_f32: the same in src/cuda/optim.rs.
constexpr int RUN = 65536;

__device__ inline void sq_norm(double* sums, const float* x, int n, double* scratch) {
    begin_launch();
    const long long first = static_cast<long long>(blockIdx.x) * RUN;
    const int count = int(min(static_cast<long long>(RUN), n - first));
    double sum = 0.0;
#pragma unroll 4
    for (int i = threadIdx.x; i < count; i += THREADS) sum += double(x[first + i]) * double(x[first + i]);
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    sum = 0.0;
    for (int i = 0; i < WARPS; ++i) sum += scratch[i];
    sums[blockIdx.x] = sum;
}

// What AdamWFactors of src/ops/grad.rs has.
struct Factors {
    float grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, sqrt_correction2, eps, step_size;
};

__device__ inline void adamw(float* param, float* m, float* v, const float* grad, void* rounded, int kind, int n, const Factors& f) {
    // The next launch may read weights before it waits for this one: it must not begin before all blocks have ended.
    wait_for_previous();
    const long long i = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= n) return;
    const float g = f.grad_scale * grad[i];
    const float first = m[i] + f.one_minus_beta1 * (g - m[i]), second = f.beta2 * v[i] + f.one_minus_beta2 * g * g;
    m[i] = first;
    v[i] = second;
    const float p = param[i] * f.decay - f.step_size * (first / (sqrtf(second) / f.sqrt_correction2 + f.eps));
    param[i] = p;
    if (kind == 1) static_cast<float*>(rounded)[i] = p;
    if (kind == 2) static_cast<f16*>(rounded)[i] = from_f32<f16>(p);
    if (kind == 3) static_cast<bf16*>(rounded)[i] = from_f32<bf16>(p);
}

}  // namespace

KERNEL(THREADS) sq_norm_f32(double* sums, const float* x, int n) {
    SHARED_MEMORY(shared);
    sq_norm(sums, x, n, reinterpret_cast<double*>(shared));
}
REGISTER_KERNEL(sq_norm_f32)

KERNEL(THREADS)
adamw_f32(float* param, float* m, float* v, const float* grad, void* rounded, int kind, int n, float grad_scale, float decay,
          float one_minus_beta1, float beta2, float one_minus_beta2, float sqrt_correction2, float eps, float step_size) {
    adamw(param, m, v, grad, rounded, kind, n,
          {grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, sqrt_correction2, eps, step_size});
}
REGISTER_KERNEL(adamw_f32)
