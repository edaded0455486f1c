// RMSNorm and LayerNorm over rows.
//
//   rms_norm_fwd:   y = x · w / sqrt(mean(x²) + eps)
//   layer_norm_fwd: y = (x − mean(x)) · w / sqrt(var(x) + eps) + b
//
// Layouts: x, y [rows, hidden] of T, w, b [hidden] of f32, all contiguous; any hidden, any alignment of T.
// One block a row. Sums in f32, in an order that depends on hidden alone: results are the same from run to run. Writes y with `=`.
// Shared memory: one f32 for each warp.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;

// Calls f(i, x[i]) for the elements of a row that are this thread's, 16 bytes at a time where the row allows it.
template <typename T, typename F> __device__ inline void for_each(const T* x, int n, F f) {
    constexpr int N = Vec16<T>::N;
    if (n % N == 0 && is_aligned16(x)) {
        for (int i = threadIdx.x * N; i < n; i += THREADS * N) {
            const Vec16<T> v = Vec16<T>::load(x + i);
#pragma unroll
            for (int j = 0; j < N; ++j) f(i + j, v.get(j));
        }
    } else {
        for (int i = threadIdx.x; i < n; i += THREADS) f(i, to_f32(x[i]));
    }
}

template <typename T> __device__ inline void rms_norm_fwd(T* y, const T* x, const float* w, int hidden, float eps, float* scratch) {
    begin_launch();
    const size_t row = size_t(blockIdx.x) * hidden;
    float square = 0.0f;
    for_each(x + row, hidden, [&](int, float v) { square += v * v; });
    const float scale = 1.0f / sqrtf(block_sum(square, scratch) / hidden + eps);
    for_each(x + row, hidden, [&](int i, float v) { y[row + i] = from_f32<T>(v * scale * w[i]); });
}

template <typename T>
__device__ inline void layer_norm_fwd(T* y, const T* x, const float* w, const float* b, int hidden, float eps, float* scratch) {
    begin_launch();
    const size_t row = size_t(blockIdx.x) * hidden;
    float sum = 0.0f;
    for_each(x + row, hidden, [&](int, float v) { sum += v; });
    const float mean = block_sum(sum, scratch) / hidden;
    // Around the mean, not as E[x²] − mean²: that loses all digits of rows far from zero.
    float square = 0.0f;
    for_each(x + row, hidden, [&](int, float v) { square += (v - mean) * (v - mean); });
    const float scale = 1.0f / sqrtf(block_sum(square, scratch) / hidden + eps);
    for_each(x + row, hidden, [&](int i, float v) { y[row + i] = from_f32<T>((v - mean) * scale * w[i] + b[i]); });
}

}  // namespace

#define INSTANCE(T, suffix)                                                                                                      \
    KERNEL(THREADS) rms_norm_fwd_##suffix(T* y, const T* x, const float* w, int hidden, float eps) {                            \
        SHARED_MEMORY(shared);                                                                                                  \
        rms_norm_fwd<T>(y, x, w, hidden, eps, reinterpret_cast<float*>(shared));                                                \
    }                                                                                                                           \
    REGISTER_KERNEL(rms_norm_fwd_##suffix)                                                                                      \
    KERNEL(THREADS) layer_norm_fwd_##suffix(T* y, const T* x, const float* w, const float* b, int hidden, float eps) {          \
        SHARED_MEMORY(shared);                                                                                                  \
        layer_norm_fwd<T>(y, x, w, b, hidden, eps, reinterpret_cast<float*>(shared));                                           \
    }                                                                                                                           \
    REGISTER_KERNEL(layer_norm_fwd_##suffix)
FOR_EACH_DTYPE(INSTANCE)
