// Rotary embedding of queries and keys, fused with the append of keys and values to the paged cache.
//
//   rope_append_fwd: for each row of a span, at position t = past + (row − first row), and each head of q and k:
//                      (x_i, x_{i + d/2}) ← (x_i·cos − x_{i + d/2}·sin, x_{i + d/2}·cos + x_i·sin),   cos, sin at [t, i], i < d/2
//                    then k_cache[slot] = k, v_cache[slot] = v for each key head, slot = (page of t, head, t % page_tokens)
//
// Layouts: qkv [rows, (n_heads + 2·n_kv_heads)·d] of T, a row being queries, keys, values; k_cache, v_cache
// [n_pages, n_kv_heads, page_tokens, d] of T; cos, sin [positions, d/2] f32; spans [n_spans, 4] i32: first row, rows, past, index of the
// first page in `pages`; row_span [rows] i32: the span of a row, −1 for none; pages i32. All contiguous; d even, any alignment of T.
// Positions and pages are within their tables (checked in cuda/rows.rs), no two rows have the same slot.
// Grid: x one block for each row, y as many as make a thread for each vector of pairs. In f32, rounded once: the cache gets what qkv gets.
// Writes q and k in place and the caches with `=`. No shared memory.
#include "common.cuh"

namespace {

constexpr int THREADS = 128;

// N f32 from an address that is a multiple of 16 bytes.
template <int N> __device__ inline void load_f32(float (&out)[N], const float* p) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
        const Vec16<float> v = Vec16<float>::load(p + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) out[i + j] = v.get(j);
    }
}

// Where a token's d keys (or values) of the first key head begin in the cache; those of head h are h·page_tokens·d on.
__device__ inline size_t first_slot(const int* spans, const int* pages, int span, int position, int n_kv_heads, int page_tokens, int d) {
    const int page = pages[spans[span * 4 + 3] + position / page_tokens];
    return (size_t(page) * n_kv_heads * page_tokens + position % page_tokens) * d;
}

template <typename T>
__device__ inline void rope_append_fwd(T* qkv, T* k_cache, T* v_cache, const float* cos, const float* sin, const int* spans,
                                       const int* row_span, const int* pages, int n_heads, int n_kv_heads, int d, int page_tokens) {
    constexpr int N = Vec16<T>::N;
    begin_launch();
    const int row = blockIdx.x, span = row_span[row];
    if (span < 0) return;
    const int half = d / 2, position = spans[span * 4 + 2] + row - spans[span * 4];
    const int all_heads = n_heads + 2 * n_kv_heads;
    // A thread has N pairs of one head: its i-th to (i + N − 1)-th.
    const int vectors = ceil_div(half, N), item = blockIdx.y * THREADS + threadIdx.x;
    const int head = item / vectors, i = item % vectors * N;
    if (head >= all_heads) return;

    const bool rotated = head < n_heads + n_kv_heads;
    T* x = qkv + (size_t(row) * all_heads + head) * d + i;
    T* cache = nullptr;
    if (head >= n_heads) {
        const size_t slot = first_slot(spans, pages, span, position, n_kv_heads, page_tokens, d) + i;
        const int kv_head = rotated ? head - n_heads : head - n_heads - n_kv_heads;
        cache = (rotated ? k_cache : v_cache) + slot + size_t(kv_head) * page_tokens * d;
    }
    const size_t angle = size_t(position) * half + i;

    const bool aligned = is_aligned16(qkv) && is_aligned16(k_cache) && is_aligned16(v_cache) && is_aligned16(cos) && is_aligned16(sin);
    if (half % N == 0 && aligned) {
        Vec16<T> a = Vec16<T>::load(x), b = Vec16<T>::load(x + half);
        if (rotated) {
            float c[N], s[N];
            load_f32(c, cos + angle);
            load_f32(s, sin + angle);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const float first = a.get(j), second = b.get(j);
                a.set(j, first * c[j] - second * s[j]);
                b.set(j, second * c[j] + first * s[j]);
            }
            a.store(x);
            b.store(x + half);
        }
        if (cache) {
            a.store(cache);
            b.store(cache + half);
        }
    } else {
        for (int j = 0; j < min(N, half - i); ++j) {
            T a = x[j], b = x[half + j];
            if (rotated) {
                const float first = to_f32(a), second = to_f32(b), c = cos[angle + j], s = sin[angle + j];
                x[j] = a = from_f32<T>(first * c - second * s);
                x[half + j] = b = from_f32<T>(second * c + first * s);
            }
            if (cache) {
                cache[j] = a;
                cache[half + j] = b;
            }
        }
    }
}

}  // namespace

#define INSTANCE(T, suffix)                                                                                                          \
    KERNEL(THREADS)                                                                                                                  \
    rope_append_fwd_##suffix(T* qkv, T* k_cache, T* v_cache, const float* cos, const float* sin, const int* spans,                   \
                             const int* row_span, const int* pages, int n_heads, int n_kv_heads, int d, int page_tokens) {           \
        rope_append_fwd<T>(qkv, k_cache, v_cache, cos, sin, spans, row_span, pages, n_heads, n_kv_heads, d, page_tokens);            \
    }                                                                                                                                \
    REGISTER_KERNEL(rope_append_fwd_##suffix)
FOR_EACH_DTYPE(INSTANCE)
