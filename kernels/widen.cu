// Pages of a cache of integers as numbers of T, for attention over many rows, which multiplies tiles of K and V on tensor cores.
//
//   widen_cache_fwd: y[page, head, token, i] = round(scales[page, head, token]·x[page, head, token, i]) for the pages that are named
//
// Layouts: x [n_pages, n_kv_heads, page_tokens, d] of i8, y the same of T: a page keeps its number; scales [n_pages, n_kv_heads, page_tokens]
// f32; pages i32. A page that is named twice is written twice, with the same. page_slots = n_kv_heads·page_tokens; d is a multiple of 8; x
// and y are multiples of 16 bytes.
// Grid: x one block for each page named, y as many as make a thread for 8 numbers, z = 2: keys, then values. Writes with `=`.
#include "common.cuh"

namespace {

constexpr int THREADS = 128;
// Numbers of a thread: heads are a multiple of it.
constexpr int PART = 8;

template <typename T> __device__ inline void widen_cache(T* y, const int8_t* x, const float* scales, int page, int page_slots, int d) {
    constexpr int N = Vec16<T>::N;
    const int parts = d / PART, item = blockIdx.y * THREADS + threadIdx.x, within = item / parts;
    if (within >= page_slots) return;
    const size_t slot = size_t(page) * page_slots + within, at = slot * d + item % parts * PART;
    struct alignas(PART) Integers {
        int8_t q[PART];
    };
    const Integers its = *reinterpret_cast<const Integers*>(x + at);
    const float scale = scales[slot];
#pragma unroll
    for (int i = 0; i < PART; i += N) {
        Vec16<T> v;
#pragma unroll
        for (int j = 0; j < N; ++j) v.set(j, scale * float(its.q[i + j]));
        v.store(y + at + i);
    }
}

}  // namespace

#define INSTANCE(T, suffix)                                                                                                      \
    KERNEL(THREADS)                                                                                                              \
    widen_cache_fwd_##suffix(T* k_wide, T* v_wide, const int8_t* k, const int8_t* v, const float* k_scales, const float* v_scales, \
                             const int* pages, int page_slots, int d) {                                                          \
        begin_launch();                                                                                                          \
        const bool keys = blockIdx.z == 0;                                                                                       \
        widen_cache(keys ? k_wide : v_wide, keys ? k : v, keys ? k_scales : v_scales, pages[blockIdx.x], page_slots, d);         \
    }                                                                                                                            \
    REGISTER_KERNEL(widen_cache_fwd_##suffix)
FOR_EACH_DTYPE(INSTANCE)
