// What attention and its gradients share.
#pragma once

#include "common.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;

// Copies rows as f32 and fills with zeros up to the stride: `from(i)` is where row i begins, null for a row of zeros.
template <typename T, int STRIDE, typename From> __device__ inline void copy_rows(float* to, int n_rows, int head_dim, From from) {
    constexpr int N = Vec16<T>::N;
    for (int i = threadIdx.x; i < n_rows * (STRIDE / N); i += THREADS) {
        const int row = i / (STRIDE / N), column = i % (STRIDE / N) * N;
        const T* source = from(row);
        const bool real = source && column < head_dim;
        const Vec16<T> v = real ? Vec16<T>::load(source + column) : Vec16<T>{{0, 0, 0, 0}};
#pragma unroll
        for (int j = 0; j < N; ++j) to[row * STRIDE + column + j] = v.get(j);
    }
}

}  // namespace
