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
#include "async_copy.cuh"
#include "gemm.cuh"
#include "mma.cuh"

namespace {

// 4 warps, a tile's quarter each: one for each scheduler of a multiprocessor.
constexpr int THREADS = 128;
// Elements of the 16 bytes that one thread copies.
constexpr int CHUNK = 8;

// How a product is cut up: a block's tile of y is ROWS x COLS, it advances by K, and holds STAGES steps in shared memory.
template <int ROWS_, int COLS_, int K_, int STAGES_> struct Shape {
    static constexpr int ROWS = ROWS_, COLS = COLS_, K = K_, STAGES = STAGES_;
    static constexpr int CHUNKS = K / CHUNK;
    // A warp's part of the tile; blocks of 16 x 8 in it.
    static constexpr int WARP_ROWS = ROWS / 2, WARP_COLS = COLS / 2;
    static constexpr int M = WARP_ROWS / 16, N = WARP_COLS / 8;
    static constexpr int STAGE = (ROWS + COLS) * K;  // elements of a stage: rows of x, then rows of W
    // Rows of the f32 buffer that turns fragments into rows: 8 words to spare put the four rows that are written at once into other banks.
    static constexpr int TURN_STRIDE = WARP_COLS + 8;
    static constexpr int TURN = 16 * TURN_STRIDE;

    static_assert(THREADS == 4 * WARP, "2 x 2 warps");
    static_assert(N % 2 == 0, "ldmatrix_x4 loads B fragments of two blocks");
    static_assert(K % 32 == 0, "fragments are double-buffered by the parity of a 16-wide step");
    static_assert(CHUNKS == 4 || CHUNKS == 8, "the swizzle permutes within 64 or 128 bytes");
    static_assert(STAGES >= 3, "a stage that is copied into is neither read nor about to be");
    static_assert(THREADS / WARP * TURN * sizeof(float) + sizeof(int) <= STAGES * STAGE * 2, "the buffers of the end lie over the stages");

    // Where a chunk of a row lies. ldmatrix reads one chunk of 8 neighbouring rows at a time: the swizzle lays those into all 32 banks.
    __device__ static int offset(int row, int chunk) { return row * K + (chunk ^ (row / (8 / CHUNKS) % CHUNKS)) * CHUNK; }
};

// Large enough that operands come from shared memory at half its bandwidth, small enough that two blocks fit on a multiprocessor.
using Large = Shape<128, 128, 32, 4>;
// For products with too few large tiles, and for few tokens, where reading W is what takes the time.
using Small = Shape<64, 64, 64, 3>;

// Copies an operand's ROWS rows of the tile to shared memory, step by step along k; zeros beyond its rows and columns. Pointers advance, so
// that little is left to compute beside the products.
template <typename T, typename S, int ROWS> struct Copier {
    static constexpr int ROWS_AT_ONCE = THREADS / S::CHUNKS;
    static_assert(ROWS % ROWS_AT_ONCE == 0, "every thread copies as many chunks");
    static_assert(ROWS_AT_ONCE % 8 == 0, "a thread's chunks are swizzled alike");

    const T* source;    // this thread's chunk of its first row, at the next step; it may point beyond the rows
    size_t row_step;    // elements from a row of this thread to the next
    int n_rows;         // how many rows of this thread there are
    int offset;         // of the chunk within a stage's rows

    __device__ Copier(const T* from, int first_row, int rows, int first_col, int k) {
        const int row = threadIdx.x / S::CHUNKS, chunk = threadIdx.x % S::CHUNKS;
        source = from + size_t(first_row + row) * k + first_col + chunk * CHUNK;
        row_step = size_t(ROWS_AT_ONCE) * k;
        n_rows = ceil_div(max(0, rows - first_row - row), ROWS_AT_ONCE);
        offset = S::offset(row, chunk);
    }

    // `n_cols` elements of this thread's chunk are within k.
    __device__ void copy(T* rows, int n_cols, bool vectors) {
        T* to = rows + offset;
        const T* from = source;
        if (vectors) {
#pragma unroll
            for (int i = 0; i < ROWS / ROWS_AT_ONCE; ++i) {
                async_copy_16(to + i * ROWS_AT_ONCE * S::K, from, i < n_rows ? n_cols * int(sizeof(T)) : 0);
                from += row_step;
            }
        } else {
#pragma unroll 1
            for (int i = 0; i < ROWS / ROWS_AT_ONCE; ++i) {
                const int n = i < n_rows ? n_cols : 0;
#pragma unroll 1
                for (int j = 0; j < CHUNK; ++j) to[j] = j < n ? from[j] : from_f32<T>(0.0f);
                to += ROWS_AT_ONCE * S::K;
                from += row_step;
            }
        }
        source += S::K;
    }
};

// The operands of one 16-wide step of a warp.
template <typename S> struct Fragments {
    uint32_t a[S::M][4], b[S::N][2];

    // Where this lane's row of the first A and the first pair of B fragments lies, for a warp at (row, col) of the tile. Further fragments
    // are a multiple of 8 rows on, which are swizzled alike; and a step flips bits of the chunk only.
    __device__ static int a_offset(int row) { return S::offset(row + threadIdx.x % 16, threadIdx.x / 16 % 2); }
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
__device__ inline void multiply(float (&acc)[S::M * S::N][4], const T* x, const TilePlace<T>& place, int tokens, int k, T* stages) {
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
    T* const last = stages + (S::STAGES - 1) * S::STAGE;
    const auto next = [&](T* stage) { return stage == last ? stages : stage + S::STAGE; };
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; ++i) copy(steps.begin + i, stages + i * S::STAGE);
    async_copy_wait<S::STAGES - 2>();
    __syncthreads();

    // While one step's fragments are multiplied, the next step's are loaded.
    Fragments<S> fragments[2];
    const int warp = threadIdx.x / WARP;
    const int a_at = Fragments<S>::a_offset(warp / 2 * S::WARP_ROWS), b_at = Fragments<S>::b_offset(warp % 2 * S::WARP_COLS);
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

// Writes a warp's sums: 16 rows at a time go through `turn`, memory of the warp alone, so that a lane then has 8 neighbours of a row.
template <typename T, typename S>
__device__ inline void write(const float (&acc)[S::M * S::N][4], const Output<T>& out, const TilePlace<T>& place, float* turn) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, pair = lane % 4;
    constexpr int LANES_OF_ROW = S::WARP_COLS / 8, ROWS_AT_ONCE = WARP / LANES_OF_ROW;
    const int row = place.row + warp / 2 * S::WARP_ROWS, col = place.col + warp % 2 * S::WARP_COLS + lane % LANES_OF_ROW * 8;
    float bias[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) bias[j] = out.bias_of(col + j);
#pragma unroll
    for (int i = 0; i < S::M; ++i) {
        __syncwarp();
#pragma unroll
        for (int j = 0; j < S::N; ++j) {
            const float(&c)[4] = acc[i * S::N + j];
            float* to = turn + group * S::TURN_STRIDE + j * 8 + pair * 2;
            *reinterpret_cast<float2*>(to) = {c[0], c[1]};
            *reinterpret_cast<float2*>(to + 8 * S::TURN_STRIDE) = {c[2], c[3]};
        }
        __syncwarp();
#pragma unroll 1
        for (int r = lane / LANES_OF_ROW; r < 16; r += ROWS_AT_ONCE) {
            const float4* from = reinterpret_cast<const float4*>(turn + r * S::TURN_STRIDE + lane % LANES_OF_ROW * 8);
            const float4 low = from[0], high = from[1];
            const float sums[8] = {low.x + bias[0],  low.y + bias[1],  low.z + bias[2],  low.w + bias[3],
                                   high.x + bias[4], high.y + bias[5], high.z + bias[6], high.w + bias[7]};
            out.put(row + i * 16 + r, col, sums);
        }
    }
}

template <typename T, typename S>
__device__ inline void gemm(const Output<T>& out, const T* x, const Parts<T>& w, float* partial, unsigned* arrived, int k,
                            unsigned char* shared) {
    begin_launch();
    const TilePlace<T> place(S::ROWS, S::COLS, out.tokens, w);
    float acc[S::M * S::N][4] = {};
    multiply<T, S>(acc, x, place, out.tokens, k, reinterpret_cast<T*>(shared));
    float* turn = reinterpret_cast<float*>(shared);
    int* is_last = reinterpret_cast<int*>(turn + THREADS / WARP * S::TURN);
    if (join_splits<THREADS>(acc, partial, arrived, is_last)) write<T, S>(acc, out.of(place.part), place, turn + threadIdx.x / WARP * S::TURN);
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
