// What the gradients of linear layers share (gemm_bwd.cu, gemm_bwd_f32.cu): where their operands lie and how these come to shared memory.
//
//   linear_dx: dx[t, i] = epilogue(Σ_j dy[t, j]·W[j, i])     the terms of a sum are the rows of W, which may lie in up to three parts
//   linear_dw: dW[j, i] += Σ_t dy[t, j]·x[t, i]               ... the tokens
//
// In both the right operand has a row for each term. The left one, dy, has a column for each in linear_dx and a row in linear_dw: tiles come to
// shared memory as they lie, and are turned where they are read.
#pragma once

#include "gemm.cuh"
#include "packed.cuh"

namespace {

// The terms of a step: `n` of them, from number `first` of their part on, which are numbers `at` and on of all.
struct Terms {
    int part, first, n, at;
};

// All terms: up to three parts, each in steps of its own.
struct Sum {
    int n[3];

    __device__ int n_steps(int k) const { return ceil_div(n[0], k) + ceil_div(n[1], k) + ceil_div(n[2], k); }

    __device__ Terms of_step(int step, int k) const {
        int part = 0, before = 0, count = n[0];
#pragma unroll
        for (int i = 1; i < 3; ++i) {
            const int steps = ceil_div(count, k);
            if (part < i - 1 || step < steps) break;
            step -= steps;
            before += count;
            part = i;
            count = n[i];
        }
        const int first = step * k;
        return {part, first, min(k, count - first), before + first};
    }
};

// Part of a matrix in rows of `stride`: `rows` x `cols` from p on are there. They may be negative: nothing is.
template <typename T> struct Window {
    const T* p;
    size_t stride;
    int rows, cols;
};

// dy [tokens, stride], of which a product's columns begin at `p`; `n` of them, or `tokens` rows, make rows of the result.
template <typename T, bool TERMS_ARE_ROWS> struct Left {
    const T* p;
    size_t stride;
    int n;

    // Of the tile whose first row of the result is `row`.
    __device__ Window<T> window(int row, const Terms& terms) const {
        if (TERMS_ARE_ROWS) return {p + terms.at * stride + row, stride, terms.n, n - row};
        return {p + row * stride + terms.at, stride, n - row, terms.n};
    }
};

// Up to three dense matrices of k columns.
template <typename T> struct Dense {
    const T* w[3];
    int k;

    __device__ Window<T> window(int col, const Terms& terms) const {
        const T* p = terms.part == 0 ? w[0] : terms.part == 1 ? w[1] : w[2];
        return {p + size_t(terms.first) * k + col, size_t(k), terms.n, k - col};
    }
};

// ... or packed ones.
template <int BITS> struct PackedRows {
    Packed<BITS> w[3];

    // Rows and columns of a tile, of which `rows` rows are there.
    struct Window {
        Packed<BITS> w;
        int row, rows, col;
    };

    __device__ Window window(int col, const Terms& terms) const {
        return {terms.part == 0 ? w[0] : terms.part == 1 ? w[1] : w[2], terms.first, terms.n, col};
    }
};

// A thread's share of a tile on its way from global to shared memory. Layout::offset(row, chunk) is where 16 bytes of a row lie.
template <typename T, int ROWS, int COLS, int THREADS, typename Layout> struct Share {
    static constexpr int N = Vec16<T>::N, CHUNKS = COLS / N, COUNT = ROWS * CHUNKS / THREADS;
    static_assert(ROWS * CHUNKS % THREADS == 0, "every thread copies as much");
    Vec16<T> v[COUNT];

    __device__ void load(const Window<T>& from) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int at = i * THREADS + int(threadIdx.x), row = at / CHUNKS, col = at % CHUNKS * N;
            const int n = row < from.rows ? min(N, from.cols - col) : 0;
            const T* p = from.p + row * from.stride + col;
            v[i] = load_some(p, n, n == N && is_aligned16(p));
        }
    }
    __device__ void store(T* tile) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int at = i * THREADS + int(threadIdx.x);
            v[i].store(tile + Layout::offset(at / CHUNKS, at % CHUNKS));
        }
    }
};

}  // namespace

#define DX_ARGUMENTS float *partial, unsigned *arrived, int tokens, int n0, int n1, int n2, int k, int dy_stride, int epilogue
#define DX(S, T, RIGHT)                                                                                                    \
    SHARED_MEMORY(shared);                                                                                                 \
    const Output<T> out = {dx, nullptr, tokens, k, size_t(k), epilogue, sizeof(T) == 4};                                   \
    gemm_bwd<T, S>(out, Left<T, false>{dy, size_t(dy_stride), tokens}, RIGHT, Sum{{n0, n1, n2}}, partial, arrived, shared)
#define DX_DENSE(name, T, S)                                                                                               \
    KERNEL(THREADS) name(T* dx, const T* dy, const T* w0, const T* w1, const T* w2, DX_ARGUMENTS) {                        \
        DX(S, T, (Dense<T>{{w0, w1, w2}, k}));                                                                             \
    }                                                                                                                      \
    REGISTER_KERNEL(name)
#define DX_PACKED(name, T, BITS, S)                                                                                        \
    KERNEL(THREADS) name(T* dx, const T* dy, PACKED_POINTERS, DX_ARGUMENTS, int group) {                                   \
        DX(S, T, (PackedRows<BITS>{{PACKED_PART(BITS, 0), PACKED_PART(BITS, 1), PACKED_PART(BITS, 2)}}));                  \
    }                                                                                                                      \
    REGISTER_KERNEL(name)
#define DW(name, T, S)                                                                                                     \
    KERNEL(THREADS)                                                                                                        \
    name(float* dw, const T* dy, const T* x, float* partial, unsigned* arrived, int n, int tokens, int k, int dy_stride) { \
        SHARED_MEMORY(shared);                                                                                             \
        const Output<T> out = {dw, nullptr, n, k, size_t(k), ADD, true};                                                   \
        gemm_bwd<T, S>(out, Left<T, true>{dy, size_t(dy_stride), n}, Dense<T>{{x, x, x}, k}, Sum{{tokens, 0, 0}}, partial,  \
                       arrived, shared);                                                                                   \
    }                                                                                                                      \
    REGISTER_KERNEL(name)
