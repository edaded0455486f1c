// Matrix products on tensor cores, for 16-bit x and W and any number of tokens. (f32: gemm_f32.cu. Few tokens: gemv.cu.)
//
//   y[t, j] = epilogue(Σ_i x[t, i]·W[j, i] + bias[j])
//
// Layouts: x [tokens, k], W [n, k] of T, contiguous, or in parts; bias [n] of f32 or null; y rows of `y_stride` elements of T or f32, of
// which n are written (epilogue, parts: gemm.cuh). Any size and any alignment of T; where k % 8 != 0, rows are not 16-byte aligned and are copied by elements.
// Grid: (tiles, splits). A block sums its split of k for one tile of y; with several splits the last block of a tile to finish adds them up
// through `partial` [tiles, splits, ROWS, COLS] of f32 and `arrived` [tiles], which is zero before and after.
// Sums in f32, each in the order of k within a split and then in the order of splits: the same from run to run, and the same for a row
// whatever rows stand beside it, as long as the number of splits is the same.
//
//                  tile and step   stages   shared memory   registers (sm_90a)   blocks on a multiprocessor of 228 KiB
//   gemm_*         128 x 128 x 32  4        64 KiB          255                  2
//   gemm_small_*    64 x 64 x 64   3        48 KiB          110                  4
#include "gemm_tile.cuh"

namespace {

// Large enough that operands come from shared memory at half its bandwidth, small enough that two blocks fit on a multiprocessor.
using Large = Shape<128, 128, 32, 4, 2>;
// For products with too few large tiles, and for few tokens, where reading W is what takes the time.
using Small = Shape<64, 64, 64, 3, 2>;

// Elements of a stage: rows of x, then rows of W.
template <typename S> constexpr int STAGE = (S::ROWS + S::COLS) * S::K;

// The operands of one 16-wide step of a warp.
template <typename S> struct Fragments {
    uint32_t a[S::M][4], b[S::N][2];

    static_assert(S::K % 32 == 0, "they are double-buffered by the parity of a 16-wide step");
    static_assert(S::N % 2 == 0, "ldmatrix_x4 loads B fragments of two blocks");

    // As S::a_offset, of the first pair of B fragments of a warp at `col` of the tile.
    __device__ static int b_offset(int col) {
        return S::ROWS * S::K + S::offset(col + threadIdx.x / 16 % 2 * 8 + threadIdx.x % 8, threadIdx.x / 8 % 2);
    }

    template <typename T> __device__ void load(const T* stage, int a_at, int b_at, int step) {
        const T* x = stage + (a_at ^ step * 16);
        const T* w = stage + (b_at ^ step * 16);
#pragma unroll
        for (int i = 0; i < S::M; ++i) ldmatrix_x4(a[i], x + i * 16 * S::K);
#pragma unroll
        for (int j = 0; j < S::N; j += 2) {
            uint32_t r[4];
            ldmatrix_x4(r, w + j * 8 * S::K);
            b[j][0] = r[0];
            b[j][1] = r[1];
            b[j + 1][0] = r[2];
            b[j + 1][1] = r[3];
        }
    }
};

// Sums a split of the tile at `place`. Ends with all warps done with shared memory and all copies landed.
template <typename T, typename S>
__device__ inline void multiply(float (&acc)[S::M * S::N][4], const T* x, const TilePlace<const T*>& place, int tokens, int k, T* stages) {
    const T* const w = place.part.w;
    const bool vectors = k % CHUNK == 0 && is_aligned16(x) && is_aligned16(w);
    const Steps steps(k, S::K);
    const int first_col = steps.begin * S::K;
    Copier<T, S, S::ROWS> x_copier(x, place.row, tokens, first_col, k);
    Copier<T, S, S::COLS> w_copier(w, place.col, place.part.n, first_col, k);
    int cols_left = k - first_col - threadIdx.x % S::CHUNKS * CHUNK;
    const auto copy = [&](int step, T* stage) {
        if (step < steps.end) {
            const int n_cols = max(0, min(CHUNK, cols_left));
            x_copier.copy(stage, n_cols, vectors);
            w_copier.copy(stage + S::ROWS * S::K, n_cols, vectors);
            cols_left -= S::K;
        }
        // Empty groups too, so that a step's group has the same distance from the last at the end of k as before.
        async_copy_commit();
    };
    T* const last = stages + (S::STAGES - 1) * STAGE<S>;
    const auto next = [&](T* stage) { return stage == last ? stages : stage + STAGE<S>; };
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; ++i) copy(steps.begin + i, stages + i * STAGE<S>);
    async_copy_wait<S::STAGES - 2>();
    __syncthreads();

    // While one step's fragments are multiplied, the next step's are loaded.
    Fragments<S> fragments[2];
    const int a_at = S::a_offset(), b_at = Fragments<S>::b_offset(S::warp_col());
    T *reading = stages, *writing = last;
    fragments[0].load(reading, a_at, b_at, 0);
    constexpr int N_INNER = S::K / 16;
    for (int step = steps.begin; step < steps.end; ++step) {
#pragma unroll
        for (int inner = 0; inner < N_INNER; ++inner) {
            if (inner == N_INNER - 1) {
                // The next stage has landed, and nobody will read this one any more: the copies of the next step may overwrite it.
                async_copy_wait<S::STAGES - 2>();
                __syncthreads();
                reading = next(reading);
            }
            fragments[(inner + 1) % 2].load(reading, a_at, b_at, (inner + 1) % N_INNER);
            if (inner == 0) {
                copy(step + S::STAGES - 1, writing);
                writing = next(writing);
            }
            const Fragments<S>& f = fragments[inner % 2];
#pragma unroll
            for (int i = 0; i < S::M; ++i)
#pragma unroll
                for (int j = 0; j < S::N; ++j) mma_m16n8k16<T>(acc[i * S::N + j], f.a[i], f.b[j]);
        }
    }
    async_copy_wait<0>();
    __syncthreads();
}

template <typename T, typename S>
__device__ inline void gemm(const Output<T>& out, const T* x, const Parts<const T*>& w, float* partial, unsigned* arrived, int k,
                            unsigned char* shared) {
    begin_launch();
    const TilePlace<const T*> place(S::ROWS, S::COLS, out.tokens, w);
    float acc[S::M * S::N][4] = {};
    multiply<T, S>(acc, x, place, out.tokens, k, reinterpret_cast<T*>(shared));
    finish_tile<S, S::STAGES * STAGE<S> * sizeof(T)>(acc, out, place, partial, arrived, shared);
}

}  // namespace

#define INSTANCE_OF(name, T, S)                                                                                                    \
    KERNEL(THREADS) name(void* y, const T* x, const T* w0, const T* w1, const T* w2, const float* bias, float* partial,            \
                         unsigned* arrived, int tokens, int n0, int n1, int n2, int k, int y_stride, int epilogue, int y_is_f32) { \
        SHARED_MEMORY(shared);                                                                                                     \
        const Output<T> out = {y, bias, tokens, n0 + n1 + n2, size_t(y_stride), epilogue, y_is_f32 != 0};                          \
        gemm<T, S>(out, x, {{w0, w1, w2}, {n0, n1, n2}}, partial, arrived, k, shared);                                             \
    }                                                                                                                              \
    REGISTER_KERNEL(name)
#define INSTANCE(T, suffix)              \
    INSTANCE_OF(gemm_##suffix, T, Large) \
    INSTANCE_OF(gemm_small_##suffix, T, Small)
FOR_EACH_HALF(INSTANCE)
