// Products with packed integer weights (src/ops/packed.rs): of 1 to 8 tokens straight from the integers, for more after unpacking them once.
//
//   gemv_packed4, gemv_packed8:  y[t, j] = epilogue(Σ_i x[t, i]·W[j, i] + bias[j])
//   unpack4, unpack8:            w[j, i] = W[j, i], in the dtype of the device
//   W[j, i] = s[j, g]·q[j, i] + o[j, g], g = i / group; without offsets o = -2^(bits-1)·s; rounded to the device's dtype
//
// Layouts: words i32 [⌈n/16⌉, k/32, 16, bits], scales and offsets f16 [⌈n/16⌉, k/group, 16], offsets may be null; x [tokens, k] of T; y
// rows of `y_stride` elements of T or f32, bias [n] of f32 or null (epilogue: gemm.cuh); w [n, k] of T. k is a multiple of 32; words, x
// and w are aligned to 16 bytes. What fills the last block of rows up is read, but nothing is written of it.
// Grid: gemv one block for 16 rows of W, unpack as many as slabs of 16 rows take with one thread for each row. Integers go straight from
// memory to registers, past L1, 16 bytes a lane; those of a block's first step are asked for before it waits for the launch that makes x.
// Sums in f32, in an order that depends on k alone. Shared memory: as gemv.cu. Writes with the epilogue, unpack with `=`.
#include "gemv.cuh"
#include "mma.cuh"

namespace {

// Columns of a slab: of each of 16 rows it has `BITS` words of 32 bits.
constexpr int SLAB = 32;

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

    // The integers of columns i to i + 3, i a multiple of 4.
    __device__ void get(float (&q)[4], int i) const {
        const uint32_t four = BITS == 8 ? word(i / 4) : i < SLAB / 2 ? word(i / 4) : word(i / 4 - 4) >> 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) q[j] = float(four >> (8 * j) & (BITS == 8 ? 0xffu : 0xfu));
    }
};

// A scale or an offset. No launch writes them: wait_for_previous() may come later.
__device__ inline float load_constant(const f16* p) {
#ifdef LLAVA_SIM
    f16 x;
    sim::read_constant(&x, p, sizeof x);
    return to_f32(x);
#else
    return to_f32(__ldg(p));
#endif
}

// W: its integers, and what they mean.
template <int BITS> struct Packed {
    const int* words;
    const f16 *scales, *offsets;
    int k, group;

    // Scale and offset of row `row` of block `block` in slab `slab`.
    __device__ float2 scale_offset(int block, int slab, int row) const {
        const size_t at = (size_t(block) * (k / group) + slab * SLAB / group) * ROWS + row;
        const float scale = load_constant(scales + at);
        return {scale, offsets ? load_constant(offsets + at) : -float(1 << (BITS - 1)) * scale};
    }
};

__device__ inline float weight(float2 scale_offset, float q) { return fmaf(scale_offset.x, q, scale_offset.y); }

// ---------------------------------------------------------------- f16, bf16: tensor cores
//
// As gemv.cu: a sum may take its terms in any order as long as x and W have the same. Lane (group, pair) takes slab `pair` of four, all its
// 32 columns of rows `group` and `group + 8`, and of x the same columns of token `group`: eight products of 4 columns a lane.

template <int BITS, typename T>
__device__ inline void gemv_packed(const Output<T>& out, int block, const T* x, const Packed<BITS>& w, float* shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, pair = lane % 4;
    const int n_slabs = w.k / SLAB;
    struct Rows {
        SlabRow<BITS> low, high;
        float2 low_scale, high_scale;
    };
    const auto load = [&](int step) {
        Rows rows = {};
        const int slab = step * 4 + pair;
        if (slab < n_slabs) {
            const size_t at = size_t(block) * n_slabs + slab;
            rows = {SlabRow<BITS>::load(w.words, at, group), SlabRow<BITS>::load(w.words, at, group + 8),
                    w.scale_offset(block, slab, group), w.scale_offset(block, slab, group + 8)};
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
                float q[4], q8[4];
                now.low.get(q, i + half * 4);
                now.high.get(q8, i + half * 4);
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    q[j] = weight(now.low_scale, q[j]);
                    q8[j] = weight(now.high_scale, q8[j]);
                }
                mma_m16n8k16<T>(acc, {pack2<T>(q[0], q[1]), pack2<T>(q8[0], q8[1]), pack2<T>(q[2], q[3]), pack2<T>(q8[2], q8[3])},
                                {half ? b.z : b.x, half ? b.w : b.y});
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
    const int n_slabs = w.k / SLAB;
    float acc[MAX_TOKENS] = {};
    wait_for_previous();
    for (int slab = warp * 2 + lane / ROWS; slab < n_slabs; slab += WARPS * 2) {
        const SlabRow<BITS> its = SlabRow<BITS>::load(w.words, size_t(block) * n_slabs + slab, row);
        const float2 scale = w.scale_offset(block, slab, row);
#pragma unroll
        for (int i = 0; i < SLAB; i += 4) {
            float q[4];
            its.get(q, i);
#pragma unroll
            for (int t = 0; t < MAX_TOKENS; ++t) {
                if (t >= out.tokens) continue;
                const Vec16<float> v = Vec16<float>::load(x + size_t(t) * w.k + slab * SLAB + i);
#pragma unroll
                for (int j = 0; j < 4; ++j) acc[t] += weight(scale, q[j]) * v.get(j);
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

// ---------------------------------------------------------------- unpacking

template <int BITS, typename T> __device__ inline void unpack(T* y, int n, const Packed<BITS>& w) {
    constexpr int N = Vec16<T>::N;
    const int n_slabs = w.k / SLAB;
    const size_t i = size_t(blockIdx.x) * THREADS + threadIdx.x, at = i / ROWS;
    const int row = i % ROWS, block = at / n_slabs, slab = at % n_slabs;
    if (block * ROWS + row >= n) return;
    const SlabRow<BITS> its = SlabRow<BITS>::load(w.words, at, row);
    const float2 scale = w.scale_offset(block, slab, row);
    T* to = y + size_t(block * ROWS + row) * w.k + slab * SLAB;
#pragma unroll
    for (int col = 0; col < SLAB; col += N) {
        Vec16<T> v;
#pragma unroll
        for (int part = 0; part < N; part += 4) {
            float q[4];
            its.get(q, col + part);
#pragma unroll
            for (int j = 0; j < 4; ++j) v.set(part + j, weight(scale, q[j]));
        }
        v.store(to + col);
    }
}

}  // namespace

#define PACKED const int *words, const f16 *scales, const f16 *offsets, int k, int group

#define INSTANCE_OF(BITS, T, suffix)                                                                                                \
    KERNEL(THREADS)                                                                                                                 \
    gemv_packed##BITS##_##suffix(void* y, const T* x, PACKED, const float* bias, int tokens, int n, int y_stride, int epilogue,     \
                                 int y_is_f32) {                                                                                    \
        SHARED_MEMORY(shared);                                                                                                      \
        let_next_begin();                                                                                                           \
        const Output<T> out = {y, bias, tokens, n, size_t(y_stride), epilogue, y_is_f32 != 0};                                      \
        gemv_packed<BITS>(out, blockIdx.x, x, Packed<BITS>{words, scales, offsets, k, group}, reinterpret_cast<float*>(shared));    \
    }                                                                                                                               \
    REGISTER_KERNEL(gemv_packed##BITS##_##suffix)                                                                                   \
    KERNEL(THREADS) unpack##BITS##_##suffix(T* y, int n, PACKED) {                                                                  \
        begin_launch();                                                                                                             \
        unpack<BITS>(y, n, Packed<BITS>{words, scales, offsets, k, group});                                                         \
    }                                                                                                                               \
    REGISTER_KERNEL(unpack##BITS##_##suffix)
#define INSTANCE(T, suffix)   \
    INSTANCE_OF(4, T, suffix) \
    INSTANCE_OF(8, T, suffix)
FOR_EACH_DTYPE(INSTANCE)
