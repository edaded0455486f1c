// What attention and its gradients share.
#pragma once

#include "common.cuh"
#include "mma.cuh"

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

// Elements from one row of a tile for tensor cores to the next: a gap of 16 bytes puts neighbouring rows into other banks.
template <int D> constexpr int MMA_STRIDE = D + 8;

// sums += s·Y for the 16 rows of a warp and a tile Y of 8·N rows; s is rounded to T: the sums of two neighbouring fragments are the
// operand of the next product as they lie.
template <typename T, int D, int N> __device__ inline void accumulate(float (&sums)[D / 8][4], const float (&s)[N][4], const T* tile) {
    static_assert(N % 2 == 0, "a step takes two fragments");
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < N / 2; ++k) {
        const uint32_t a[4] = {pack2<T>(s[2 * k][0], s[2 * k][1]), pack2<T>(s[2 * k][2], s[2 * k][3]),
                               pack2<T>(s[2 * k + 1][0], s[2 * k + 1][1]), pack2<T>(s[2 * k + 1][2], s[2 * k + 1][3])};
#pragma unroll
        for (int n = 0; n < D / 16; ++n) {
            uint32_t b[4];
            ldmatrix_x4_trans(b, tile + (16 * k + lane % 16) * MMA_STRIDE<D> + 16 * n + lane / 16 * 8);
            const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
            mma_m16n8k16<T>(sums[2 * n], a, low);
            mma_m16n8k16<T>(sums[2 * n + 1], a, high);
        }
    }
}

}  // namespace
