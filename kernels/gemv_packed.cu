// Products of 1 to 8 tokens with packed integer weights: the time is that of reading the integers once.
//
//   y[t, j] = epilogue(Σ_i x[t, i]·W[j, i] + bias[j]),  W = s·q + o (packed.cuh), rounded to T
//
// Layouts: W as packed.cuh says, in up to three parts; x [tokens, k] of T, aligned to 16 bytes; bias [n] of f32 or null; y rows of
// `y_stride` elements of T or f32, of which n are written (epilogue, parts: gemm.cuh).
// Grid: one block for 16 rows of a part. Integers go straight from memory to registers, past L1, 16 bytes a lane; those of a block's first
// step are asked for before it waits for the launch that makes x. Sums in f32, in an order that depends on k alone. Shared memory: as gemv.cu.
#include "gemv.cuh"
#include "mma.cuh"
#include "packed.cuh"

namespace {

static_assert(ROWS == BLOCK_ROWS, "a block of threads has a block of rows");

// One row's part of a slab.
template <int BITS> struct SlabRow {
    Vec16<int> raw[BITS / 4];

    // Of row `row` of slab number `slab`, counted over all blocks of rows.
    __device__ static SlabRow load(const int* words, size_t slab, int row) {
        SlabRow its;
#pragma unroll
        for (int i = 0; i < BITS / 4; ++i) its.raw[i] = Vec16<int>::load_constant(words + (slab * ROWS + row) * BITS + i * 4);
        return its;
    }

    __device__ uint32_t word(int i) const {
        const uint4 v = raw[i / 4].raw;
        return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
    }

    // The integers of columns i to i + 3, i a multiple of 4, one in each byte.
    __device__ uint32_t four(int i) const { return four_of<BITS>(word(BITS == 8 ? i / 4 : i / 4 % 4), i >= SLAB / 2); }
};

// ---------------------------------------------------------------- f16, bf16: tensor cores
//
// As gemv.cu: a sum may take its terms in any order as long as x and W have the same. Lane (group, pair) takes slab `pair` of four, all its
// 32 columns of rows `group` and `group + 8`, and of x the same columns of token `group`: eight products of 4 columns a lane.

template <int BITS, typename T>
__device__ inline void gemv_packed(const Output<T>& out, int block, const T* x, const Packed<BITS>& w, float* shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, pair = lane % 4;
    const int n_slabs = w.n_slabs();
    struct Rows {
        SlabRow<BITS> low, high;
        Scale<BITS, T> low_scale, high_scale;
    };
    const auto load = [&](int step) {
        Rows rows = {};
        const int slab = step * 4 + pair;
        if (slab < n_slabs) {
            const size_t at = size_t(block) * n_slabs + slab;
            rows = {SlabRow<BITS>::load(w.words, at, group), SlabRow<BITS>::load(w.words, at, group + 8),
                    w.template scale<T>(block, slab, group), w.template scale<T>(block, slab, group + 8)};
        }
        return rows;
    };
    float acc[4] = {};
    Rows now = load(warp);
    wait_for_previous();
    for (int step = warp; step * 4 < n_slabs; step += WARPS) {
        const Rows next = load(step + WARPS);
        const int slab = step * 4 + pair;
        const bool has_x = group < out.tokens && slab < n_slabs;
        const T* x_slab = x + size_t(group) * w.k + slab * SLAB;
#pragma unroll
        for (int i = 0; i < SLAB; i += 8) {
            Vec16<T> v = {};
            if (has_x) v = Vec16<T>::load(x_slab + i);
            const uint4 b = v.raw;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                uint32_t low[2], high[2];
                now.low_scale.weights(low, now.low.four(i + half * 4));
                now.high_scale.weights(high, now.high.four(i + half * 4));
                mma_m16n8k16<T>(acc, {low[0], high[0], low[1], high[1]}, {half ? b.z : b.x, half ? b.w : b.y});
            }
        }
        now = next;
    }
    leave_sums(acc, shared);
    finish_rows(out, block * ROWS, shared);
}

// ---------------------------------------------------------------- f32: multiply-adds
//
// A lane has one row, and every other slab of its warp's; x is the same for the lanes of a slab.

template <int BITS>
__device__ inline void gemv_packed(const Output<float>& out, int block, const float* x, const Packed<BITS>& w, float* shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, row = lane % ROWS;
    const int n_slabs = w.n_slabs();
    float acc[MAX_TOKENS] = {};
    wait_for_previous();
    for (int slab = warp * 2 + lane / ROWS; slab < n_slabs; slab += WARPS * 2) {
        const SlabRow<BITS> its = SlabRow<BITS>::load(w.words, size_t(block) * n_slabs + slab, row);
        const Scale<BITS, float> scale = w.template scale<float>(block, slab, row);
#pragma unroll
        for (int i = 0; i < SLAB; i += 4) {
            const uint32_t four = its.four(i);
            const float weights[4] = {scale.weight(four, 0), scale.weight(four, 1), scale.weight(four, 2), scale.weight(four, 3)};
#pragma unroll
            for (int t = 0; t < MAX_TOKENS; ++t) {
                if (t >= out.tokens) continue;
                const Vec16<float> v = Vec16<float>::load(x + size_t(t) * w.k + slab * SLAB + i);
#pragma unroll
                for (int j = 0; j < 4; ++j) acc[t] += weights[j] * v.get(j);
            }
        }
    }
#pragma unroll
    for (int t = 0; t < MAX_TOKENS; ++t) {
        const float sum = acc[t] + __shfl_xor_sync(ALL_LANES, acc[t], ROWS);
        if (lane < ROWS) shared[(warp * MAX_TOKENS + t) * ROWS + row] = sum;
    }
    finish_rows(out, block * ROWS, shared);
}

}  // namespace

#define INSTANCE_OF(BITS, T, suffix)                                                                                                  \
    KERNEL(THREADS)                                                                                                                   \
    gemv_packed##BITS##_##suffix(void* y, const T* x, PACKED_POINTERS, const float* bias, int tokens, int n0, int n1, int n2, int k, \
                                 int y_stride, int epilogue, int y_is_f32, int group) {                                               \
        SHARED_MEMORY(shared);                                                                                                        \
        let_next_begin();                                                                                                             \
        const Output<T> out = {y, bias, tokens, n0 + n1 + n2, size_t(y_stride), epilogue, y_is_f32 != 0};                             \
        int block = blockIdx.x;                                                                                                       \
        const Part<Packed<BITS>> part = PACKED_PARTS(BITS).of_tile(block, ROWS);                                                      \
        gemv_packed<BITS>(out.of(part), block, x, part.w, reinterpret_cast<float*>(shared));                                          \
    }                                                                                                                                 \
    REGISTER_KERNEL(gemv_packed##BITS##_##suffix)
#define INSTANCE(T, suffix)   \
    INSTANCE_OF(4, T, suffix) \
    INSTANCE_OF(8, T, suffix)
FOR_EACH_DTYPE(INSTANCE)
