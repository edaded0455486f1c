// What the products of 1 to 8 tokens share: their blocks, and how the sums of a block's warps become rows of y.
#pragma once

#include "gemm.cuh"

namespace {

constexpr int WARPS = 8, THREADS = WARPS * WARP;
// Rows of W of a block, and the most tokens: M and N of the tensor cores' instruction.
constexpr int ROWS = 16, MAX_TOKENS = 8;

// Adds the sums that the block's warps left in `shared` [WARPS, MAX_TOKENS, ROWS], in the order of the warps, and hands them on.
// Barriers: all threads of the block must call it.
template <typename T> __device__ inline void finish_rows(const Output<T>& out, int first_row, const float* shared) {
    __syncthreads();
    if (threadIdx.x >= MAX_TOKENS * ROWS) return;
    float sum[1] = {0.0f};
#pragma unroll
    for (int i = 0; i < WARPS; ++i) sum[0] += shared[i * MAX_TOKENS * ROWS + threadIdx.x];
    const int col = first_row + threadIdx.x % ROWS;
    sum[0] += out.bias_of(col);
    out.put(threadIdx.x / ROWS, col, sum);
}

// The sums of an m16n8 product in a lane's registers to its warp's place there.
__device__ inline void leave_sums(const float (&acc)[4], float* shared) {
    const int lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4;
    float* sums = shared + threadIdx.x / WARP * MAX_TOKENS * ROWS;
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[(pair * 2 + i % 2) * ROWS + group + i / 2 * 8] = acc[i];
}

}  // namespace
