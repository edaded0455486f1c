// Rotary embedding of queries and keys, fused with the append of keys and values to the paged cache; or by itself, for training.
//
//   rope_append: for each row of a span, at position t = past + (row − first row), and each head of q and k:
//                  (x_i, x_{i + d/2}) ← (x_i·cos − x_{i + d/2}·sin, x_{i + d/2}·cos + x_i·sin),   cos, sin at [t, i], i < d/2
//                then k_cache[slot] = k, v_cache[slot] = v for each key head, slot = (page of t, head, t % page_tokens)
//   rope_append_fwd keeps them in T; rope_append_i8_fwd as q = round(x / s), s = max_i |x_i| / 127, in the very bits of src/ops/kv.rs
//   rope_fwd: the rotation alone, with sign·sin for sin: −1 turns back
//
// Layouts: qkv [rows, (n_heads + 2·n_kv_heads)·d] of T, a row being queries, keys, values; k_cache, v_cache
// [n_pages, n_kv_heads, page_tokens, d] of T or i8, k_scales, v_scales [n_pages, n_kv_heads, page_tokens] f32; cos, sin
// [positions, d/2] f32; spans [n_spans, 4] i32: first row, rows, past, index of the first page in `pages`; row_span [rows] i32: the span
// of a row, −1 for none; pages i32. All contiguous; d even, any alignment of T; for i8 d is at most 256.
// Positions and pages are within their tables (checked in cuda/rows.rs), no two rows have the same slot.
// Grid: x one block for each row, y as many as make a thread for each vector of pairs; for i8 the threads of a head are made up to a power
// of two, so that they are neighbours in a warp. In f32, rounded once: the cache gets what qkv gets.
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

// Turns pairs by the angles from number `angle` on, or, with a `sign` of -1, back.
template <typename T>
__device__ inline void rotate(Vec16<T>& a, Vec16<T>& b, const float* cos, const float* sin, size_t angle, int n, bool vectors, float sign) {
    constexpr int N = Vec16<T>::N;
    float c[N] = {}, s[N] = {};
    if (vectors) {
        load_f32(c, cos + angle);
        load_f32(s, sin + angle);
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (j >= n) continue;
            c[j] = cos[angle + j];
            s[j] = sin[angle + j];
        }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const float first = a.get(j), second = b.get(j), turned = sign * s[j];
        a.set(j, first * c[j] - second * turned);
        b.set(j, second * c[j] + first * turned);
    }
}

// Keys, or values, as they are kept.
template <typename E> struct Side {
    E* cache;
    float* scales;  // of i8, else null
};

// Keeps a thread's part of a head in its slot: elements i and on, and half + i and on. All lanes of a warp call it, those without one with
// `cached` false; `lanes` neighbours have a head together.
template <typename T>
__device__ inline void keep(const Side<T>& side, size_t slot, bool cached, int, int i, int n, int half, bool vectors, const Vec16<T>& a,
                            const Vec16<T>& b) {
    if (!cached) return;
    T* to = side.cache + slot * (2 * half) + i;
    store_some(to, a, n, vectors);
    store_some(to + half, b, n, vectors);
}

template <typename T>
__device__ inline void keep(const Side<int8_t>& side, size_t slot, bool cached, int lanes, int i, int n, int half, bool vectors,
                            const Vec16<T>& a, const Vec16<T>& b) {
    constexpr int N = Vec16<T>::N;
    // As bits, which order magnitudes and put NaN on top. What is not there is zero.
    unsigned largest = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        largest = max(largest, __float_as_uint(a.get(j)) & 0x7fffffffu);
        largest = max(largest, __float_as_uint(b.get(j)) & 0x7fffffffu);
    }
    for (int offset = lanes / 2; offset > 0; offset /= 2) largest = max(largest, __shfl_xor_sync(ALL_LANES, largest, offset));
    if (!cached) return;
    const bool finite = largest < 0x7f800000u;
    const float scale = __fdiv_rn(__uint_as_float(largest), 127.0f);
    // Of a scale below the normal numbers there may be no inverse: then all are zero.
    const float inverse = scale >= 1.17549435e-38f ? __fdiv_rn(1.0f, scale) : 0.0f;
    struct alignas(N) Integers {
        int8_t q[N];
    };
    const auto integers = [&](const Vec16<T>& v) {
        Integers its;
#pragma unroll
        for (int j = 0; j < N; ++j)
            its.q[j] = finite ? int8_t(fminf(fmaxf(rintf(__fmul_rn(v.get(j), inverse)), -127.0f), 127.0f)) : int8_t(1);
        return its;
    };
    const Integers first = integers(a), second = integers(b);
    int8_t* to = side.cache + slot * (2 * half) + i;
    if (vectors) {
        *reinterpret_cast<Integers*>(to) = first;
        *reinterpret_cast<Integers*>(to + half) = second;
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (j >= n) continue;
            to[j] = first.q[j];
            to[half + j] = second.q[j];
        }
    }
    // What is no number stays none.
    if (i == 0) side.scales[slot] = finite ? scale : __uint_as_float(0x7fc00000u);
}

template <typename T, typename E>
__device__ inline void rope_append(T* qkv, const Side<E>& keys, const Side<E>& values, const float* cos, const float* sin,
                                   const int* spans, const int* row_span, const int* pages, int n_heads, int n_kv_heads, int d,
                                   int page_tokens) {
    constexpr int N = Vec16<T>::N;
    begin_launch();
    const int row = blockIdx.x, span = row_span[row];
    if (span < 0) return;
    const int half = d / 2, position = spans[span * 4 + 2] + row - spans[span * 4];
    const int all_heads = n_heads + 2 * n_kv_heads;
    // A thread has N pairs of one head: its i-th to (i + N − 1)-th.
    int lanes = ceil_div(half, N);
    if (sizeof(E) == 1)
        for (lanes = 1; lanes * N < half;) lanes *= 2;
    const int item = blockIdx.y * THREADS + threadIdx.x, head = item / lanes, i = item % lanes * N;
    const int n = head < all_heads ? max(0, min(N, half - i)) : 0;

    const bool rotated = head < n_heads + n_kv_heads, cached = head >= n_heads && n > 0;
    T* x = qkv + (size_t(row) * all_heads + head) * d + i;
    const bool aligned = is_aligned16(qkv) && is_aligned16(keys.cache) && is_aligned16(values.cache) && is_aligned16(cos) && is_aligned16(sin);
    const bool vectors = half % N == 0 && aligned && n > 0;
    Vec16<T> a = load_some(x, n, vectors), b = load_some(x + half, n, vectors);
    if (rotated) {
        rotate(a, b, cos, sin, size_t(position) * half + i, n, vectors, 1.0f);
        store_some(x, a, n, vectors);
        store_some(x + half, b, n, vectors);
    }
    size_t slot = 0;
    if (cached) {
        const int kv_head = rotated ? head - n_heads : head - n_heads - n_kv_heads;
        const int page = pages[spans[span * 4 + 3] + position / page_tokens];
        slot = (size_t(page) * n_kv_heads + kv_head) * page_tokens + position % page_tokens;
    }
    // Chosen member by member: of two structs, the compiler would put both in memory.
    const Side<E> side = {rotated ? keys.cache : values.cache, rotated ? keys.scales : values.scales};
    keep(side, slot, cached, lanes, i, n, half, vectors, a, b);
}

// The same without a cache, for training: a thread has N pairs of a query or a key.
template <typename T>
__device__ inline void rope(T* qkv, const float* cos, const float* sin, const int* spans, const int* row_span, int n_heads, int n_kv_heads,
                            int d, float sign) {
    constexpr int N = Vec16<T>::N;
    begin_launch();
    const int row = blockIdx.x, span = row_span[row];
    if (span < 0) return;
    const int half = d / 2, lanes = ceil_div(half, N), position = spans[span * 4 + 2] + row - spans[span * 4];
    const int item = blockIdx.y * THREADS + threadIdx.x, head = item / lanes, i = item % lanes * N;
    if (head >= n_heads + n_kv_heads) return;
    const int n = min(N, half - i);
    T* x = qkv + (size_t(row) * (n_heads + 2 * n_kv_heads) + head) * d + i;
    const bool vectors = half % N == 0 && is_aligned16(qkv) && is_aligned16(cos) && is_aligned16(sin);
    Vec16<T> a = load_some(x, n, vectors), b = load_some(x + half, n, vectors);
    rotate(a, b, cos, sin, size_t(position) * half + i, n, vectors, sign);
    store_some(x, a, n, vectors);
    store_some(x + half, b, n, vectors);
}

}  // namespace

#define TABLES                                                                                                                         \
    const float *cos, const float *sin, const int *spans, const int *row_span, const int *pages, int n_heads, int n_kv_heads, int d, \
        int page_tokens
#define INSTANCE(T, suffix)                                                                                                            \
    KERNEL(THREADS) rope_append_fwd_##suffix(T* qkv, T* k_cache, T* v_cache, TABLES) {                                                 \
        rope_append<T, T>(qkv, {k_cache, nullptr}, {v_cache, nullptr}, cos, sin, spans, row_span, pages, n_heads, n_kv_heads, d,       \
                          page_tokens);                                                                                                \
    }                                                                                                                                  \
    REGISTER_KERNEL(rope_append_fwd_##suffix)                                                                                          \
    KERNEL(THREADS)                                                                                                                    \
    rope_append_i8_fwd_##suffix(T* qkv, int8_t* k_cache, int8_t* v_cache, float* k_scales, float* v_scales, TABLES) {                  \
        rope_append<T, int8_t>(qkv, {k_cache, k_scales}, {v_cache, v_scales}, cos, sin, spans, row_span, pages, n_heads, n_kv_heads,   \
                               d, page_tokens);                                                                                        \
    }                                                                                                                                  \
    REGISTER_KERNEL(rope_append_i8_fwd_##suffix)                                                                                       \
    KERNEL(THREADS)                                                                                                                    \
    rope_fwd_##suffix(T* qkv, const float* cos, const float* sin, const int* spans, const int* row_span, int n_heads, int n_kv_heads,  \
                      int d, float sign) {                                                                                             \
        rope<T>(qkv, cos, sin, spans, row_span, n_heads, n_kv_heads, d, sign);                                                         \
    }                                                                                                                                  \
    REGISTER_KERNEL(rope_fwd_##suffix)
FOR_EACH_DTYPE(INSTANCE)
