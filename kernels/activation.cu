// The gate of the feed-forward layers.
//
//   silu_mul_fwd: y = silu(gate) ⊙ up,   silu(g) = g / (1 + e^−g)
//
// Layouts: gate_up [rows, 2·n] of T, a row being gate, then up; y [rows, n] of T; contiguous; any n, any alignment of T.
// Grid: one block for each row (x) and COLUMNS columns of it (y). In f32, rounded once. Writes y with `=`. No shared memory.
#include "common.cuh"

namespace {

// Four warps: a row of 11008 in 16 bits makes 11 blocks, so that even one row is spread over several multiprocessors.
constexpr int THREADS = 128;

// e^−g overflows to infinity below −88, which gives the limit, −0.
__device__ inline float silu_mul(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

template <typename T> __device__ inline void silu_mul_fwd(T* y, const T* gate_up, int n) {
    constexpr int N = Vec16<T>::N;
    constexpr int COLUMNS = THREADS * N;
    begin_launch();
    const T* gate = gate_up + size_t(blockIdx.x) * 2 * n;
    const T* up = gate + n;
    T* out = y + size_t(blockIdx.x) * n;
    const int first = blockIdx.y * COLUMNS;
    if (n % N == 0 && is_aligned16(gate) && is_aligned16(out)) {
        const int i = first + threadIdx.x * N;
        if (i < n) {
            const Vec16<T> g = Vec16<T>::load(gate + i), u = Vec16<T>::load(up + i);
            Vec16<T> v;
#pragma unroll
            for (int j = 0; j < N; ++j) v.set(j, silu_mul(g.get(j), u.get(j)));
            v.store(out + i);
        }
    } else {
        for (int i = first + threadIdx.x; i < min(n, first + COLUMNS); i += THREADS)
            out[i] = from_f32<T>(silu_mul(to_f32(gate[i]), to_f32(up[i])));
    }
}

}  // namespace

#define INSTANCE(T, suffix)                                                                                  \
    KERNEL(THREADS) silu_mul_fwd_##suffix(T* y, const T* gate_up, int n) { silu_mul_fwd<T>(y, gate_up, n); } \
    REGISTER_KERNEL(silu_mul_fwd_##suffix)
FOR_EACH_DTYPE(INSTANCE)
