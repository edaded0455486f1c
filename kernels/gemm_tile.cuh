// What the products on tensor cores share (gemm.cu, gemm_packed.cu): the shape of a block's tile, the copies of rows to shared memory, and
// how sums become rows of y.
#pragma once

#include "async_copy.cuh"
#include "gemm.cuh"
#include "mma.cuh"

namespace {

// 4 warps, a tile's quarter each: one for each scheduler of a multiprocessor.
constexpr int THREADS = 128;
// Elements of the 16 bytes that one thread copies.
constexpr int CHUNK = 8;

// How a product is cut up: a block's tile of y is ROWS x COLS, it advances by K, and holds STAGES steps in shared memory. Its four warps
// share the tile out as a grid of WARPS_DOWN rows.
template <int ROWS_, int COLS_, int K_, int STAGES_, int WARPS_DOWN> struct Shape {
    static constexpr int ROWS = ROWS_, COLS = COLS_, K = K_, STAGES = STAGES_;
    static constexpr int CHUNKS = K / CHUNK;
    // A warp's part of the tile; blocks of 16 x 8 in it.
    static constexpr int WARPS_ACROSS = THREADS / WARP / WARPS_DOWN;
    static constexpr int WARP_ROWS = ROWS / WARPS_DOWN, WARP_COLS = COLS / WARPS_ACROSS;
    static constexpr int M = WARP_ROWS / 16, N = WARP_COLS / 8;
    // Rows of the f32 buffer that turns fragments into rows: 8 words to spare put the four rows that are written at once into other banks.
    static constexpr int TURN_STRIDE = WARP_COLS + 8;
    static constexpr int TURN = 16 * TURN_STRIDE;

    static_assert(WARP_ROWS % 16 == 0 && WARP_COLS % 8 == 0, "a warp has whole blocks");
    static_assert(CHUNKS == 4 || CHUNKS == 8, "the swizzle permutes within 64 or 128 bytes");
    static_assert(STAGES >= 3, "a stage that is copied into is neither read nor about to be");

    // Where a chunk of a row lies. ldmatrix reads one chunk of 8 neighbouring rows at a time: the swizzle lays those into all 32 banks.
    __device__ static int offset(int row, int chunk) { return row * K + (chunk ^ (row / (8 / CHUNKS) % CHUNKS)) * CHUNK; }

    // This warp's place in the tile.
    __device__ static int warp_row() { return threadIdx.x / WARP / WARPS_ACROSS * WARP_ROWS; }
    __device__ static int warp_col() { return threadIdx.x / WARP % WARPS_ACROSS * WARP_COLS; }

    // Where this lane's row of the warp's first A fragment lies in a stage. Further fragments are a multiple of 8 rows on, which are
    // swizzled alike; and a 16-wide step flips bits of the chunk only.
    __device__ static int a_offset() { return offset(warp_row() + threadIdx.x % 16, threadIdx.x / 16 % 2); }
};

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

// Writes a warp's sums: 16 rows at a time go through `turn`, memory of the warp alone, so that a lane then has 8 neighbours of a row.
template <typename S, typename T, typename W>
__device__ inline void write(const float (&acc)[S::M * S::N][4], const Output<T>& out, const TilePlace<W>& place, float* turn) {
    const int lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4;
    constexpr int LANES_OF_ROW = S::WARP_COLS / 8, ROWS_AT_ONCE = WARP / LANES_OF_ROW;
    const int row = place.row + S::warp_row(), col = place.col + S::warp_col() + lane % LANES_OF_ROW * 8;
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

// What a block does with the sums of its split: joins them with those of the others, and writes the tile. Of `shared`, SHARED_BYTES, nothing
// is needed any more. Barriers: all threads of the block must call it.
template <typename S, int SHARED_BYTES, typename T, typename W>
__device__ inline void finish_tile(float (&acc)[S::M * S::N][4], const Output<T>& out, const TilePlace<W>& place, float* partial,
                                   unsigned* arrived, unsigned char* shared) {
    static_assert(THREADS / WARP * S::TURN * sizeof(float) + sizeof(int) <= SHARED_BYTES, "the buffers lie over the stages");
    float* turn = reinterpret_cast<float*>(shared);
    int* is_last = reinterpret_cast<int*>(turn + THREADS / WARP * S::TURN);
    if (join_splits<THREADS>(acc, partial, arrived, is_last)) write<S>(acc, out.of(place.part), place, turn + threadIdx.x / WARP * S::TURN);
}

}  // namespace
