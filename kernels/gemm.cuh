// What the matrix products share: what becomes of a sum on its way to y, and how several blocks make one sum.
//
//   y[t, j] = epilogue(Σ_i x[t, i]·W[j, i] + bias[j])
//
// W may lie in up to three parts, one on top of the other: Q, K and V, or gate and up, of which each has its own tiles.
#pragma once

#include "common.cuh"

namespace {

// What is done with r = x·Wᵀ + bias: the numbers of `Epilogue` in src/ops.rs.
constexpr int STORE = 0;       // y = r
constexpr int ADD = 1;         // y += r
constexpr int QUICK_GELU = 2;  // y = r·σ(1.702 r)
constexpr int GELU = 3;        // y = r·Φ(r)

__device__ inline float finish(float r, float old, int epilogue) {
    if (epilogue == ADD) return old + r;
    if (epilogue == QUICK_GELU) return r / (1.0f + expf(-1.702f * r));
    if (epilogue == GELU) return 0.5f * r * (1.0f + erff(r * 0.7071067811865475f));
    return r;
}

// Rows of W that lie together, and what they have in y. W is how they are found: `const T*`, or Packed (packed.cuh).
template <typename W> struct Part {
    W w;
    int first_col, n;
};

// W: parts [n[i], k] of one k; those that there are not have n = 0.
template <typename W> struct Parts {
    W w[3];
    int n[3];

    __device__ int n_tiles(int tile_cols) const { return ceil_div(n[0], tile_cols) + ceil_div(n[1], tile_cols) + ceil_div(n[2], tile_cols); }

    // The part that tile number `tile` is one of; `tile` becomes its number there.
    __device__ Part<W> of_tile(int& tile, int tile_cols) const {
        Part<W> part = {w[0], 0, n[0]};
#pragma unroll
        for (int i = 1; i < 3; ++i) {
            const int n_before = ceil_div(part.n, tile_cols);
            if (tile < n_before) break;
            tile -= n_before;
            part = {w[i], part.first_col + part.n, n[i]};
        }
        return part;
    }
};

// Where results go: row t, column j to y[t·stride + j], which is f32 or T.
template <typename T> struct Output {
    void* y;
    const float* bias;  // [n] or null
    int tokens, n;
    size_t stride;
    int epilogue;
    bool is_f32;

    // That of one part of W.
    template <typename W> __device__ Output of(const Part<W>& part) const {
        Output its = *this;
        its.y = static_cast<char*>(y) + size_t(part.first_col) * (is_f32 ? sizeof(float) : sizeof(T));
        its.bias = bias ? bias + part.first_col : nullptr;
        its.n = part.n;
        return its;
    }

    __device__ float bias_of(int col) const { return bias && col < n ? bias[col] : 0.0f; }

    // Finishes the N neighbours from (row, col) on; `r` has the bias in it. What lies beyond `tokens` or `n` is left out.
    template <int N> __device__ void put(int row, int col, const float (&r)[N]) const {
        if (row >= tokens || col >= n) return;
        if (is_f32) {
            put_as(static_cast<float*>(y) + row * stride + col, n - col, r);
        } else {
            put_as(static_cast<T*>(y) + row * stride + col, n - col, r);
        }
    }

    template <typename Y, int N> __device__ void put_as(Y* to, int n_valid, const float (&r)[N]) const {
        constexpr int V = Vec16<Y>::N;
        if (N % V == 0 && n_valid >= N && is_aligned16(to)) {
#pragma unroll
            for (int i = 0; i + V <= N; i += V) {
                Vec16<Y> v = {};
                if (epilogue == ADD) v = Vec16<Y>::load(to + i);
#pragma unroll
                for (int j = 0; j < V; ++j) v.set(j, finish(r[i + j], v.get(j), epilogue));
                v.store(to + i);
            }
        } else {
#pragma unroll
            for (int i = 0; i < N; ++i)
                if (i < n_valid) to[i] = from_f32<Y>(finish(r[i], epilogue == ADD ? to_f32(to[i]) : 0.0f, epilogue));
        }
    }
};

// A block's tile: its part of W, and its first row and column of what that gives. In x the grid has one block for each tile.
template <typename W> struct TilePlace {
    Part<W> part;
    int row, col;

    // Tiles are taken in groups of GROUP rows of tiles, within a group column by column: the blocks that run at one time then read few
    // different rows of x and few of W, and find most of them in L2.
    __device__ TilePlace(int tile_rows, int tile_cols, int tokens, const Parts<W>& parts) {
        constexpr int GROUP = 16;
        const int n_rows = ceil_div(tokens, tile_rows), n_cols = parts.n_tiles(tile_cols);
        const int tile = blockIdx.x, per_group = GROUP * n_cols;
        const int first = tile / per_group * GROUP, height = min(GROUP, n_rows - first);
        row = (first + tile % per_group % height) * tile_rows;
        int tile_col = tile % per_group / height;
        part = parts.of_tile(tile_col, tile_cols);
        col = tile_col * tile_cols;
    }
};

// Steps along k that are this block's: the grid has one block in y for each of a tile's splits.
struct Steps {
    int begin, end;

    __device__ Steps(int k, int k_step) {
        const int n = ceil_div(k, k_step), each = ceil_div(n, int(gridDim.y));
        begin = min(int(blockIdx.y) * each, n);
        end = min(begin + each, n);
    }
};

// Adds the sums of all splits of a tile. All blocks call it, with their own part in `acc`; true in the one that came last, whose `acc` is
// then the whole. It adds in the order of the splits, whoever came last: the result is the same from run to run.
//
// partial [tiles, splits, N, THREADS] of float4, arrived [tiles], zero before and after. `is_last` lies in shared memory that the block
// does not use otherwise. Barriers: all threads of the block must call it.
template <int THREADS, int N> __device__ inline bool join_splits(float (&acc)[N][4], float* partial, unsigned* arrived, int* is_last) {
    const int n_splits = gridDim.y;
    if (n_splits == 1) return true;
    float4* tile = reinterpret_cast<float4*>(partial) + size_t(blockIdx.x) * n_splits * N * THREADS + threadIdx.x;
    float4* mine = tile + size_t(blockIdx.y) * N * THREADS;
#pragma unroll
    for (int i = 0; i < N; ++i) mine[i * THREADS] = {acc[i][0], acc[i][1], acc[i][2], acc[i][3]};
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        *is_last = atomicAdd(arrived + blockIdx.x, 1u) == unsigned(n_splits) - 1;
        if (*is_last) arrived[blockIdx.x] = 0;
    }
    __syncthreads();
    if (!*is_last) return false;
    __threadfence();
#pragma unroll
    for (int i = 0; i < N; ++i)
        for (float& sum : acc[i]) sum = 0.0f;
    for (int split = 0; split < n_splits; ++split) {
        const float4* part = tile + size_t(split) * N * THREADS;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const float4 v = part[i * THREADS];
            acc[i][0] += v.x;
            acc[i][1] += v.y;
            acc[i][2] += v.z;
            acc[i][3] += v.w;
        }
    }
    return true;
}

}  // namespace
