// Matrix products of 1 to 8 tokens: the time is that of reading W once.
//
//   y[t, j] = epilogue(Σ_i x[t, i]·W[j, i] + bias[j])
//
// Layouts: x [tokens, k], W [n, k] of T, contiguous, or in parts; bias [n] of f32 or null; y rows of `y_stride` elements of T or f32, of
// which n are written (epilogue, parts: gemm.cuh). Any n and k, any alignment of T; where a row's length is no multiple of 16 bytes, it is read by elements.
// Grid: one block for 16 rows of a part of W. What a block reads of W first is asked for before it waits for the launch that makes x. W goes straight from memory to registers, past L1; x stays in L1, where the blocks of a multiprocessor
// share it. Shared memory: one f32 for each warp, row and token, 4 KiB. Registers (sm_90a): 126, f32 79: 2 and 3 blocks a multiprocessor.
// Sums in f32, in an order that depends on k alone: the same from run to run, and for a token whatever tokens stand beside it.
#include "gemv.cuh"
#include "mma.cuh"

namespace {

// Whether rows can be read 16 bytes at a time.
template <typename T> __device__ inline bool can_load_vectors(const T* x, const T* w, int k) {
    return k % Vec16<T>::N == 0 && is_aligned16(x) && is_aligned16(w);
}

// Elements [i, i + N) of a row of k, zeros beyond it. With VECTORS, k is a multiple of N: all are within the row or none.
template <bool STREAMING, bool VECTORS, typename T> __device__ inline Vec16<T> load_row(const T* row, int i, int k) {
    Vec16<T> v = {};
    if (VECTORS) {
        if (i < k) v = STREAMING ? Vec16<T>::load_constant(row + i) : Vec16<T>::load(row + i);
    } else {
#pragma unroll
        for (int j = 0; j < Vec16<T>::N; ++j)
            if (i + j < k) v.set(j, to_f32(row[i + j]));
    }
    return v;
}

// ---------------------------------------------------------------- f16, bf16: tensor cores
//
// Rows of W are A's rows and tokens are B's columns, so that 8 tokens cost the instructions of one. A sum may take its terms in any order
// as long as both operands have the same. Of every 32 elements, lane (group, pair) loads 8·pair and on of a row with one instruction, and
// calls them columns of A and rows of B as its registers have them (mma.cuh):
//   0, 1: 2·pair and the next;  2, 3: 2·pair + 8 and the next;  4 to 7: the same of a second product.
// So no element goes through shared memory.

// 32 elements of each row: one load of 16 bytes a lane.
constexpr int SLAB = 32;
// Loads in flight: 4 slabs of 2 rows a lane are 4 KiB for a warp, twice that when the next are asked for; 16 warps of a multiprocessor then
// have the 32 KiB in flight that its share of the memory's bandwidth takes.
constexpr int SLABS = 4;
// The warps of a block take turns along k, so that all read neighbouring memory.
constexpr int WARP_K = SLAB * SLABS, BLOCK_K = WARPS * WARP_K;

template <bool VECTORS, typename T>
__device__ inline void gemv_half(const Output<T>& out, int first_row, const T* x, const T* w, int k, float* shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, pair = lane % 4;
    const int row = first_row + group, row_k = row < out.n ? k : 0, row8_k = row + 8 < out.n ? k : 0;
    const int token_k = group < out.tokens ? k : 0;
    const T* w_row = w + size_t(row) * k;
    const T* w_row8 = w_row + size_t(8) * k;
    const T* x_row = x + size_t(group) * k;

    struct Rows {
        Vec16<T> low[SLABS], high[SLABS];  // of row `group` and row `group + 8`
    };
    const auto load = [&](Rows& rows, int k0) {
#pragma unroll
        for (int s = 0; s < SLABS; ++s) {
            const int i = k0 + s * SLAB + pair * 8;
            rows.low[s] = load_row<true, VECTORS>(w_row, i, row_k);
            rows.high[s] = load_row<true, VECTORS>(w_row8, i, row8_k);
        }
    };
    float acc[4] = {};
    Rows now, next;
    load(now, warp * WARP_K);
    wait_for_previous();
    for (int k0 = warp * WARP_K; k0 < k; k0 += BLOCK_K) {
        load(next, k0 + BLOCK_K);
#pragma unroll
        for (int s = 0; s < SLABS; ++s) {
            const uint4 a = now.low[s].raw, a8 = now.high[s].raw;
            const uint4 b = load_row<false, VECTORS>(x_row, k0 + s * SLAB + pair * 8, token_k).raw;
            mma_m16n8k16<T>(acc, {a.x, a8.x, a.y, a8.y}, {b.x, b.y});
            mma_m16n8k16<T>(acc, {a.z, a8.z, a.w, a8.w}, {b.z, b.w});
        }
        now = next;
    }

    leave_sums(acc, shared);
    finish_rows(out, first_row, shared);
}

// ---------------------------------------------------------------- f32: multiply-adds

// Rows of a warp: each x is loaded once for both.
constexpr int WARP_ROWS = ROWS / WARPS;
constexpr int UNROLL = 2;

// Of at least `out.tokens` tokens; those beyond do the last one's work again, which is not written.
template <int TOKENS, bool VECTORS>
__device__ inline void gemv_f32_of(const Output<float>& out, int first_row, const float* x, const float* w, int k) {
    constexpr int N = Vec16<float>::N;
    const int lane = threadIdx.x % WARP, row = first_row + threadIdx.x / WARP * WARP_ROWS;
    float acc[WARP_ROWS][TOKENS] = {};
    for (int k0 = lane * N; k0 < k; k0 += UNROLL * WARP * N) {
        Vec16<float> rows[UNROLL][WARP_ROWS];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int r = 0; r < WARP_ROWS; ++r)
                rows[u][r] = load_row<true, VECTORS>(w + size_t(row + r) * k, k0 + u * WARP * N, row + r < out.n ? k : 0);
#pragma unroll
        for (int u = 0; u < UNROLL; ++u)
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                const Vec16<float> v = load_row<false, VECTORS>(x + size_t(min(t, out.tokens - 1)) * k, k0 + u * WARP * N, k);
#pragma unroll
                for (int r = 0; r < WARP_ROWS; ++r)
#pragma unroll
                    for (int j = 0; j < N; ++j) acc[r][t] += rows[u][r].get(j) * v.get(j);
            }
    }
#pragma unroll
    for (int r = 0; r < WARP_ROWS; ++r)
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const float sum[1] = {warp_sum(acc[r][t]) + out.bias_of(row + r)};
            if (lane == r * TOKENS + t) out.put(t, row + r, sum);
        }
}

// What a block has to do: rows of a part of W from `row` on.
template <typename T> struct Work {
    Output<T> out;
    const T* w;
    int row;
    bool vectors;

    __device__ Work(const Output<T>& whole, const T* x, const Parts<const T*>& parts, int k) {
        int tile = blockIdx.x;
        const Part<const T*> part = parts.of_tile(tile, ROWS);
        out = whole.of(part);
        w = part.w;
        row = tile * ROWS;
        vectors = can_load_vectors(x, w, k);
    }
};

}  // namespace

#define ARGUMENTS(T)                                                                                                           \
    void *y, const T *x, const T *w0, const T *w1, const T *w2, const float *bias, int tokens, int n0, int n1, int n2, int k, \
        int y_stride, int epilogue, int y_is_f32
#define WORK(T) \
    Work<T>({y, bias, tokens, n0 + n1 + n2, size_t(y_stride), epilogue, y_is_f32 != 0}, x, {{w0, w1, w2}, {n0, n1, n2}}, k)

#define INSTANCE(T, suffix)                                            \
    KERNEL(THREADS) gemv_##suffix(ARGUMENTS(T)) {                      \
        SHARED_MEMORY(shared);                                         \
        let_next_begin();                                              \
        const Work<T> work = WORK(T);                                  \
        float* sums = reinterpret_cast<float*>(shared);                \
        if (work.vectors) {                                            \
            gemv_half<true>(work.out, work.row, x, work.w, k, sums);   \
        } else {                                                       \
            wait_for_previous();                                       \
            gemv_half<false>(work.out, work.row, x, work.w, k, sums);  \
        }                                                              \
    }                                                                  \
    REGISTER_KERNEL(gemv_##suffix)
FOR_EACH_HALF(INSTANCE)

KERNEL(THREADS) gemv_f32(ARGUMENTS(float)) {
    begin_launch();
    const Work<float> work = WORK(float);
    if (!work.vectors) gemv_f32_of<MAX_TOKENS, false>(work.out, work.row, x, work.w, k);
    else if (tokens <= 1) gemv_f32_of<1, true>(work.out, work.row, x, work.w, k);
    else if (tokens <= 2) gemv_f32_of<2, true>(work.out, work.row, x, work.w, k);
    else if (tokens <= 4) gemv_f32_of<4, true>(work.out, work.row, x, work.w, k);
    else gemv_f32_of<MAX_TOKENS, true>(work.out, work.row, x, work.w, k);
}
REGISTER_KERNEL(gemv_f32)
