// Products with 8-bit packed weights and x rounded to 8 bits as well, on the integer tensor cores: for any dtype of x, and many tokens.
//
//   round_i8:    p[t, i] = x[t, i] / a[g, t], to the nearest;  a[g, t] = max |x[t, i]| / 127 over i in g,  g = i / group
//   gemm_*w8a8:  y[t, j] = epilogue(Σ_g s[j, g]·a[g, t]·Σ_{i in g} (q[j, i] - 128)·p[t, i] + bias[j])
//
// Layouts: x [tokens, k] of T; p [tokens, k] of i8, aligned to 16 bytes, a [k / group, tokens] f32; W as packed.cuh says, 8 bits without
// offsets, in up to three parts; bias [n] of f32 or null; y rows of `y_stride` elements of T or f32 (epilogue, parts: gemm.cuh).
// Integers and sums within a group are exact and those of the CPU's product (src/cpu/matmul_packed.rs); groups are added in f32, in an order
// that depends on k and on the splits alone. A row of x with a NaN or an infinity gives NaN, and so do no other rows.
// Grid: of round_i8 one block for each token; of the products as gemm.cu.
//
//                       tile and step   stages   shared memory
//   gemm_w8a8_*         128 x 64 x 64   4        50 KiB
//   gemm_small_w8a8_*    64 x 64 x 64   4        34 KiB
#include "gemm_tile.cuh"
#include "packed_tile.cuh"

namespace {

// Two integers of x count as one 16-bit element: they are copied, swizzled and loaded by ldmatrix as such.
using Pair = f16;
// Columns of a step: K of the shapes, which counts pairs, twice.
constexpr int COLUMNS = 64;
// Beside its f32 sums a warp has as many of integers, so that its part of the tile is no larger than 64 x 32.
using Large = Shape<128, 64, COLUMNS / 2, 4, 2>;
using Small = Shape<64, 64, COLUMNS / 2, 4, 2>;

// The widest group.
constexpr int MAX_GROUP = 128;

template <typename T> __device__ inline void round_i8(signed char* p, float* scales, const T* x, int tokens, int k, int group) {
    begin_launch();
    const int lane = threadIdx.x % WARP;
    const size_t row = size_t(blockIdx.x) * k;
    for (int g = threadIdx.x / WARP; g < k / group; g += THREADS / WARP) {
        const size_t first = row + size_t(g) * group + lane;
        float v[MAX_GROUP / WARP];
        // As bits, which order magnitudes and put NaN on top.
        unsigned largest = 0;
#pragma unroll
        for (int i = 0; i < MAX_GROUP / WARP; ++i) {
            v[i] = i * WARP < group ? to_f32(x[first + i * WARP]) : 0.0f;
            largest = max(largest, __float_as_uint(v[i]) & 0x7fffffffu);
        }
#pragma unroll
        for (int offset = WARP / 2; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, offset));
        const float scale = __uint_as_float(largest) / 127.0f;
        // 0 for a group of zeros; and where the scale is NaN or infinite, which makes the sum so too.
        const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
#pragma unroll
        for (int i = 0; i < MAX_GROUP / WARP; ++i) {
            if (i * WARP >= group) break;
            const float rounded = fminf(fmaxf(rintf(__fmul_rn(v[i], inverse)), -127.0f), 127.0f);
            p[first + i * WARP] = inverse > 0.0f ? static_cast<signed char>(rounded) : 0;
        }
        if (lane == 0) scales[size_t(g) * tokens + blockIdx.x] = scale;
    }
}

// Sums a split of the tile at `place`. Ends with all warps done with shared memory and all copies landed.
template <typename S>
__device__ inline void multiply(float (&acc)[S::M * S::N][4], const signed char* p, const float* x_scales,
                                const TilePlace<Packed<8>>& place, int tokens, unsigned char* stages) {
    using At = Stage<8, S, COLUMNS>;
    const Packed<8>& w = place.part.w;
    const int lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4;
    const Steps steps(w.k, COLUMNS);
    const int first_col = steps.begin * COLUMNS;
    Copier<Pair, S, S::ROWS> x_copier(reinterpret_cast<const Pair*>(p), place.row, tokens, first_col / 2, w.k / 2);
    PackedCopier<8, S, COLUMNS> w_copier(w, place.part.n, place.col, first_col / SLAB);
    int pairs_left = (w.k - first_col) / 2 - threadIdx.x % S::CHUNKS * CHUNK;
    const auto copy = [&](int step, unsigned char* stage) {
        if (step < steps.end) {
            x_copier.copy(reinterpret_cast<Pair*>(stage), max(0, min(CHUNK, pairs_left)), true);
            w_copier.copy(stage);
            pairs_left -= S::K;
        }
        // Empty groups too, so that a step's group has the same distance from the last at the end of k as before.
        async_copy_commit();
    };
    unsigned char* const last = stages + (S::STAGES - 1) * At::BYTES;
    const auto next = [&](unsigned char* stage) { return stage == last ? stages : stage + At::BYTES; };
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; ++i) copy(steps.begin + i, stages + i * At::BYTES);

    const int a_at = S::a_offset();
    const int slabs_of_group = 1 << w.group_log2 >> 5, end = min(steps.end * At::SLABS, w.n_slabs());
    static_assert(SLAB == 1 << 5, "a group is counted in slabs");
    int sums[S::M * S::N][4] = {};
    unsigned char *reading = stages, *writing = last;
    for (int step = steps.begin; step < steps.end; ++step) {
        async_copy_wait<S::STAGES - 2>();
        // The stage of this step has landed, and nobody reads that of the step before any more.
        __syncthreads();
        copy(step + S::STAGES - 1, writing);
        writing = next(writing);
#pragma unroll
        for (int inner = 0; inner < At::SLABS; ++inner) {
            const int slab = step * At::SLABS + inner;
            if (slab >= end) break;
            uint32_t a[S::M][4];
#pragma unroll
            for (int i = 0; i < S::M; ++i) ldmatrix_x4(a[i], reinterpret_cast<const Pair*>(reading) + (a_at ^ inner * 16) + i * 16 * S::K);
#pragma unroll
            for (int j = 0; j < S::N; ++j) {
                const int col = S::warp_col() + j * 8 + group;
                uint32_t b[2];
#pragma unroll
                // q - 128 is q with its highest bit turned over.
                for (int i = 0; i < 2; ++i)
                    b[i] = reinterpret_cast<const uint32_t*>(reading + At::piece(inner, col, i))[pair] ^ 0x80808080u;
#pragma unroll
                for (int i = 0; i < S::M; ++i) mma_m16n8k32_s8(sums[i * S::N + j], a[i], b);
            }
            // A split may end within a group: it adds what it has of it.
            if ((slab + 1) % slabs_of_group != 0 && slab + 1 != end) continue;
            const float* of_group = x_scales + size_t(slab / slabs_of_group) * tokens;
            const f16* w_scales = reinterpret_cast<const f16*>(reading + At::SCALES) + inner * S::COLS + S::warp_col() + pair * 2;
#pragma unroll
            for (int i = 0; i < S::M; ++i) {
                const int row = place.row + S::warp_row() + i * 16 + group;
                // Rows beyond the last are written nowhere.
                const float low = of_group[min(row, tokens - 1)], high = of_group[min(row + 8, tokens - 1)];
#pragma unroll
                for (int j = 0; j < S::N; ++j) {
                    int(&its)[4] = sums[i * S::N + j];
                    float(&to)[4] = acc[i * S::N + j];
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        to[c] += float(its[c]) * (to_f32(w_scales[j * 8 + c % 2]) * (c < 2 ? low : high));
                        its[c] = 0;
                    }
                }
            }
        }
        reading = next(reading);
    }
    // No copy is under way: the wait of the last step was for a group that comes after all of them, an empty one.
    __syncthreads();
}

template <typename S, typename T>
__device__ inline void gemm(const Output<T>& out, const signed char* p, const float* x_scales, const Parts<Packed<8>>& w, float* partial,
                            unsigned* arrived, unsigned char* shared) {
    begin_launch();
    const TilePlace<Packed<8>> place(S::ROWS, S::COLS, out.tokens, w);
    float acc[S::M * S::N][4] = {};
    multiply<S>(acc, p, x_scales, place, out.tokens, shared);
    finish_tile<S, S::STAGES * Stage<8, S, COLUMNS>::BYTES>(acc, out, place, partial, arrived, shared);
}

}  // namespace

#define INSTANCE_OF(name, T, S)                                                                                                       \
    KERNEL(THREADS) name(void* y, const signed char* p, PACKED_POINTERS, const float* bias, float* partial, unsigned* arrived,        \
                         int tokens, int n0, int n1, int n2, int k, int y_stride, int epilogue, int y_is_f32, int group,              \
                         const float* x_scales) {                                                                                     \
        SHARED_MEMORY(shared);                                                                                                        \
        const Output<T> out = {y, bias, tokens, n0 + n1 + n2, size_t(y_stride), epilogue, y_is_f32 != 0};                             \
        gemm<S>(out, p, x_scales, PACKED_PARTS(8), partial, arrived, shared);                                                         \
    }                                                                                                                                 \
    REGISTER_KERNEL(name)
#define INSTANCE(T, suffix)                                                                                                           \
    KERNEL(THREADS) round_i8_##suffix(signed char* p, float* scales, const T* x, int tokens, int k, int group) {                      \
        round_i8<T>(p, scales, x, tokens, k, group);                                                                                  \
    }                                                                                                                                 \
    REGISTER_KERNEL(round_i8_##suffix)                                                                                                \
    INSTANCE_OF(gemm_w8a8_##suffix, T, Large)                                                                                         \
    INSTANCE_OF(gemm_small_w8a8_##suffix, T, Small)
FOR_EACH_DTYPE(INSTANCE)
