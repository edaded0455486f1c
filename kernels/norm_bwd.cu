// Gradients of RMSNorm, LayerNorm and biases. With x̂ = (x − mean)·rstd, where RMSNorm has a mean of zero, and g = dy ⊙ w:
//
//   rms_norm_bwd:    dx += rstd·(g − x̂·mean(g ⊙ x̂)),             rstd = 1/sqrt(mean(x²) + eps)
//   layer_norm_bwd:  dx += rstd·(g − mean(g) − x̂·mean(g ⊙ x̂)),   rstd = 1/sqrt(var(x) + eps)
//   sum_columns_bwd: dw += Σ_t dy[t] ⊙ x̂[t],  db += Σ_t dy[t]
//
// Layouts: dx, dy, x [rows, hidden] of T, contiguous (of sum_columns_bwd dy has rows of `stride`); w, dw, db [hidden] f32; stats f32 [rows, 2]:
// mean and rstd, which the first two write for the third. stats, and dw or db, may be null: then they are not wanted, and without dw x and
// stats are not read. Any hidden, any alignment of T.
// Grid: one block for each row; sum_columns_bwd one for each 32 columns, whose 8 warps take every eighth row each. Sums in f32, in an order that
// depends on the shape alone. dx is rounded once.
// Shared memory: one f32 for each warp; sum_columns_bwd 2·8·32 f32.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

template <typename T, bool CENTRED>
__device__ inline void norm_bwd(T* dx, const T* dy, const T* x, const float* w, float* stats, int hidden, float eps, float* scratch) {
    begin_launch();
    const size_t row = size_t(blockIdx.x) * hidden;
    dx += row;
    dy += row;
    x += row;
    float mean = 0.0f;
    if (CENTRED) {
        float sum = 0.0f;
        for (int i = threadIdx.x; i < hidden; i += THREADS) sum += to_f32(x[i]);
        mean = block_sum(sum, scratch) / hidden;
    }
    float square = 0.0f, sum_g = 0.0f, sum_gx = 0.0f;
    for (int i = threadIdx.x; i < hidden; i += THREADS) {
        const float v = to_f32(x[i]) - mean, g = to_f32(dy[i]) * w[i];
        square += v * v;
        sum_g += g;
        sum_gx += g * v;
    }
    const float rstd = 1.0f / sqrtf(block_sum(square, scratch) / hidden + eps);
    const float mean_gx = block_sum(sum_gx, scratch) * rstd / hidden;
    const float mean_g = CENTRED ? block_sum(sum_g, scratch) / hidden : 0.0f;
    for (int i = threadIdx.x; i < hidden; i += THREADS) {
        const float normed = (to_f32(x[i]) - mean) * rstd, g = to_f32(dy[i]) * w[i];
        dx[i] = from_f32<T>(to_f32(dx[i]) + rstd * (g - mean_g - normed * mean_gx));
    }
    if (stats && threadIdx.x == 0) {
        stats[2 * size_t(blockIdx.x)] = mean;
        stats[2 * size_t(blockIdx.x) + 1] = rstd;
    }
}

template <typename T>
__device__ inline void sum_columns_bwd(float* dw, float* db, const T* dy, const T* x, const float* stats, int rows, int hidden, int stride,
                                       float* shared) {
    begin_launch();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, column = blockIdx.x * WARP + lane;
    float sum_w = 0.0f, sum_b = 0.0f;
    if (column < hidden) {
#pragma unroll 4
        for (int row = warp; row < rows; row += WARPS) {
            const float d = to_f32(dy[size_t(row) * stride + column]);
            sum_b += d;
            if (dw) sum_w += d * ((to_f32(x[size_t(row) * hidden + column]) - stats[2 * size_t(row)]) * stats[2 * size_t(row) + 1]);
        }
    }
    shared[threadIdx.x] = sum_w;
    shared[THREADS + threadIdx.x] = sum_b;
    __syncthreads();
    if (warp > 0 || column >= hidden) return;
    sum_w = sum_b = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
        sum_w += shared[i * WARP + lane];
        sum_b += shared[THREADS + i * WARP + lane];
    }
    if (dw) dw[column] += sum_w;
    if (db) db[column] += sum_b;
}

}  // namespace

#define NORM(name, CENTRED, T)                                                                                                     \
    KERNEL(THREADS) name(T* dx, const T* dy, const T* x, const float* w, float* stats, int hidden, float eps) {                     \
        SHARED_MEMORY(shared);                                                                                                     \
        norm_bwd<T, CENTRED>(dx, dy, x, w, stats, hidden, eps, reinterpret_cast<float*>(shared));                                   \
    }                                                                                                                              \
    REGISTER_KERNEL(name)
#define INSTANCE(T, suffix)                                                                                                        \
    NORM(rms_norm_bwd_##suffix, false, T)                                                                                          \
    NORM(layer_norm_bwd_##suffix, true, T)                                                                                         \
    KERNEL(THREADS)                                                                                                                \
    sum_columns_bwd_##suffix(float* dw, float* db, const T* dy, const T* x, const float* stats, int rows, int hidden, int stride) { \
        SHARED_MEMORY(shared);                                                                                                     \
        sum_columns_bwd<T>(dw, db, dy, x, stats, rows, hidden, stride, reinterpret_cast<float*>(shared));                          \
    }                                                                                                                              \
    REGISTER_KERNEL(sum_columns_bwd_##suffix)
FOR_EACH_DTYPE(INSTANCE)
