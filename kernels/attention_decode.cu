// Attention of one row a sequence over its pages: a step of decoding.
//
//   out[row, head] = Σ_t p_t · v_t / Σ_t p_t,   p_t = exp(s_t − max_t s_t),   s_t = q · k_t / sqrt(head_dim)
//
// over all past + 1 tokens t.
//
// K and V are read once and nothing is reused: what counts is that enough reads are under way. So the tokens of a sequence are split among
// gridDim.x blocks, each of which leaves m = max s, l = Σ exp2(s − m) and o = Σ exp2(s − m) · v of its part; the last block to come,
// for a row and head, merges the parts. Base 2 as in attention.cu: scale_log2 = log2(e) / sqrt(head_dim).
//
// attention_decode_i8 reads a cache of integers, k_t = sk_t·K_t and v_t = sv_t·V_t: s_t is multiplied by sk_t, and p_t by sv_t where it
// meets V_t, so that what streams by is a byte a number.
//
// Layouts, all of T unless said otherwise, row-major:
//   qkv      [tokens, (n_heads + 2·n_kv_heads) · head_dim], of which the queries are read
//   out      [tokens, n_heads · head_dim]; rows of no span are left alone
//   k, v     pages [n_pages, n_kv_heads, page_tokens, head_dim] of T or i8; scales of i8 f32 [n_pages, n_kv_heads, page_tokens]
//   spans    i32 [n_spans, 4]: first row, rows (1), past, index of the first page in `pages`; pages i32. They are read here and now: a
//            launch that is repeated as it is serves other lengths and pages.
//   parts    f32 [n_spans, n_heads, n_splits, head_dim + 2]: o, m, l
//   arrivals i32 [n_spans, n_heads], zero before and after the launch
// parts and arrivals are not touched if n_splits is 1.
// Grid: (n_splits, n_heads, n_spans). head_dim: a multiple of 8 up to 256; all bases are multiples of 16 bytes. Writes out with `=`.
//
// Numerics: all sums in f32, parts merged in their order whoever comes last: results depend on context and n_splits alone.
// Shared memory: f32 [WARPS, head_dim + 2] and one i32. Registers without spills (nvcc 13, sm_90a): 80 in f16 and bf16,
// 126 in f32 and over i8.
#include "common.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
// Tokens that a lane has under way: with K and V that is 128 bytes of 16-bit floats or of integers, 16 KiB a block. Two blocks on a
// multiprocessor then cover what memory delivers within its latency (4.8 TB/s · 0.7 µs / 132 = 25 KiB).
constexpr int UNROLL = 4;
// Below all scores, but finite: the difference of two is a number.
constexpr float LOWEST = -3.0e38f;

// N elements of E at p as f32: what a lane has of a head. ceil(head_dim / N) lanes, made up to a power of two, share a token.
template <typename E, int N> struct Part {
    static constexpr int IN_VECTOR = Vec16<E>::N;
    static_assert(N % IN_VECTOR == 0, "whole vectors");
    Vec16<E> v[N / IN_VECTOR];

    __device__ static Part load(const E* p) {
        Part part;
#pragma unroll
        for (int i = 0; i < N / IN_VECTOR; ++i) part.v[i] = Vec16<E>::load_streaming(p + i * IN_VECTOR);
        return part;
    }
    __device__ float get(int i) const { return v[i / IN_VECTOR].get(i % IN_VECTOR); }
};

// Integer i % 4 of a word of four. As the last bits of 2²³ + 128 + q, which is a number, it needs no conversion.
__device__ inline float integer(uint32_t four, int i) {
    return __uint_as_float(0x4b000000u | ((four ^ 0x80808080u) >> (i % 4 * 8) & 0xffu)) - 8388736.0f;
}

template <> struct Part<int8_t, 16> {
    uint4 v;

    __device__ static Part load(const int8_t* p) { return {Vec16<int8_t>::load_streaming(p).raw}; }
    __device__ float get(int i) const { return integer(i < 4 ? v.x : i < 8 ? v.y : i < 12 ? v.z : v.w, i); }
};

// Where heads are not a multiple of 16 wide, and so begin at any multiple of 8 bytes.
template <> struct Part<int8_t, 8> {
    uint2 v;

    __device__ static Part load(const int8_t* p) { return {*reinterpret_cast<const uint2*>(p)}; }
    __device__ float get(int i) const { return integer(i < 4 ? v.x : v.y, i); }
};

// Keys, or values.
template <typename E> struct Side {
    const E* elements;
    const float* scales;  // of i8, else null

    __device__ float scale(size_t slot) const { return sizeof(E) == 1 ? scales[slot] : 1.0f; }
};

// Σ exp2(s − m) · (1, v) over some tokens, m = max s.
template <int N> struct Sums {
    float m, l, o[N];

    // Adds the sums over other tokens; the order of the two does not matter.
    __device__ void add(const Sums& other) {
        const float top = fmaxf(m, other.m), mine = exp2f(m - top), theirs = exp2f(other.m - top);
        l = l * mine + other.l * theirs;
#pragma unroll
        for (int i = 0; i < N; ++i) o[i] = o[i] * mine + other.o[i] * theirs;
        m = top;
    }
};

// Merges n parts, each [head_dim + 2]: column i of the output without its division, and what it is to be divided by.
__device__ inline float merge(const float* parts, int n, int head_dim, int i, float& m, float& l) {
    m = LOWEST;
    for (int part = 0; part < n; ++part) m = fmaxf(m, parts[part * (head_dim + 2) + head_dim]);
    float o = 0.0f;
    l = 0.0f;
    for (int part = 0; part < n; ++part) {
        const float* p = parts + part * (head_dim + 2);
        const float weight = exp2f(p[head_dim] - m);
        o += p[i] * weight;
        l += p[head_dim + 1] * weight;
    }
    return o;
}

// A lane has N elements of a token: a multiple of 16 bytes of E, or 8 of i8.
template <int N, typename T, typename E>
__device__ inline void attention_decode(T* out, float* parts, int* arrivals, const T* qkv, Side<E> k, Side<E> v, const int* spans,
                                        const int* pages, int n_heads, int n_kv_heads, int head_dim, int page_tokens, float scale_log2,
                                        unsigned char* shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    begin_launch();
    const int* span = spans + 4 * blockIdx.z;
    const int row = span[0], context = span[2] + 1;
    const int head = blockIdx.y, kv_head = head / (n_heads / n_kv_heads), n_splits = gridDim.x;
    const int split_tokens = ceil_div(context, n_splits), begin = int(blockIdx.x) * split_tokens, end = min(begin + split_tokens, context);
    pages += span[3];
    const size_t first_slot = size_t(kv_head) * page_tokens, page_slots = size_t(n_kv_heads) * page_tokens;

    // The lanes that share a token are neighbours.
    int lanes_per_token = 1;
    while (lanes_per_token * N < head_dim) lanes_per_token *= 2;
    const int column = lane % lanes_per_token * N, groups = WARP / lanes_per_token, n_slots = WARPS * groups;
    const int slot = warp * groups + lane / lanes_per_token;
    const bool has_columns = column < head_dim;

    float q[N] = {};
    if (has_columns) {
        const auto part = Part<T, N>::load(qkv + size_t(row) * (n_heads + 2 * n_kv_heads) * head_dim + head * head_dim + column);
#pragma unroll
        for (int i = 0; i < N; ++i) q[i] = part.get(i) * scale_log2;
    }

    // Where this lane's tokens are in the cache, counted in tokens. Those of the next step are looked up while keys and values of this one are under way; tokens
    // that there are not stand for the last one.
    size_t from[UNROLL];
    const auto look_up = [&](int base) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const unsigned token = min(base + u * n_slots + slot, context - 1);
            from[u] = pages[token / unsigned(page_tokens)] * page_slots + first_slot + token % unsigned(page_tokens);
        }
    };
    look_up(begin);

    Sums<N> sums = {LOWEST, 0.0f, {}};
    for (int base = begin; base < end; base += n_slots * UNROLL) {
        Part<E, N> keys[UNROLL] = {}, values[UNROLL] = {};
        float k_scales[UNROLL] = {}, v_scales[UNROLL] = {};
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            if (base + u * n_slots + slot < end && has_columns) {
                keys[u] = Part<E, N>::load(k.elements + from[u] * head_dim + column);
                values[u] = Part<E, N>::load(v.elements + from[u] * head_dim + column);
                k_scales[u] = k.scale(from[u]);
                v_scales[u] = v.scale(from[u]);
            }
        }
        look_up(base + n_slots * UNROLL);
        float s[UNROLL];
        float top = sums.m;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            s[u] = 0.0f;
#pragma unroll
            for (int i = 0; i < N; ++i) s[u] += q[i] * keys[u].get(i);
            s[u] *= k_scales[u];
            for (int lanes = lanes_per_token / 2; lanes > 0; lanes /= 2) s[u] += __shfl_xor_sync(ALL_LANES, s[u], lanes);
            if (base + u * n_slots + slot >= end) s[u] = -INFINITY;
            top = fmaxf(top, s[u]);
        }
        const float shrink = exp2f(sums.m - top);
        sums.m = top;
        sums.l *= shrink;
#pragma unroll
        for (int i = 0; i < N; ++i) sums.o[i] *= shrink;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const float p = exp2f(s[u] - top);
            sums.l += p;
            const float weight = p * v_scales[u];
#pragma unroll
            for (int i = 0; i < N; ++i) sums.o[i] += weight * values[u].get(i);
        }
    }

    // Groups of the warp, then warps, then splits.
    for (int lanes = lanes_per_token; lanes < WARP; lanes *= 2) {
        Sums<N> other;
        other.m = __shfl_xor_sync(ALL_LANES, sums.m, lanes);
        other.l = __shfl_xor_sync(ALL_LANES, sums.l, lanes);
#pragma unroll
        for (int i = 0; i < N; ++i) other.o[i] = __shfl_xor_sync(ALL_LANES, sums.o[i], lanes);
        sums.add(other);
    }
    float* const warp_parts = reinterpret_cast<float*>(shared);
    int* const is_last = reinterpret_cast<int*>(warp_parts + WARPS * (head_dim + 2));
    if (lane < lanes_per_token && has_columns) {
        float* to = warp_parts + warp * (head_dim + 2);
#pragma unroll
        for (int i = 0; i < N; ++i) to[column + i] = sums.o[i];
        if (lane == 0) {
            to[head_dim] = sums.m;
            to[head_dim + 1] = sums.l;
        }
    }
    __syncthreads();

    T* const result = out + (size_t(row) * n_heads + head) * head_dim;
    const int row_head = int(blockIdx.z) * n_heads + head;
    float* const all_parts = parts + size_t(row_head) * n_splits * (head_dim + 2);
    float* const my_part = all_parts + size_t(blockIdx.x) * (head_dim + 2);
    float m, l;
    for (int i = threadIdx.x; i < head_dim; i += THREADS) {
        const float o = merge(warp_parts, WARPS, head_dim, i, m, l);
        if (n_splits == 1) {
            result[i] = from_f32<T>(o / l);
        } else {
            my_part[i] = o;
            if (i == 0) {
                my_part[head_dim] = m;
                my_part[head_dim + 1] = l;
            }
        }
    }
    if (n_splits > 1) {
        __threadfence();  // what this thread wrote is seen before the arrival
        __syncthreads();
        if (threadIdx.x == 0) *is_last = atomicAdd(arrivals + row_head, 1) == n_splits - 1;
        __syncthreads();
        if (*is_last) {
            __threadfence();  // what the others wrote is read after their arrivals
            for (int i = threadIdx.x; i < head_dim; i += THREADS) {
                const float o = merge(all_parts, n_splits, head_dim, i, m, l);
                result[i] = from_f32<T>(o / l);
            }
            if (threadIdx.x == 0) arrivals[row_head] = 0;
        }
    }
}

}  // namespace

#define SIZES int n_heads, int n_kv_heads, int head_dim, int page_tokens, float scale_log2

#define INSTANCE(T, suffix)                                                                                                            \
    KERNEL(THREADS)                                                                                                                    \
    attention_decode_##suffix(T* out, float* parts, int* arrivals, const T* qkv, const T* k, const T* v, const int* spans,            \
                              const int* pages, SIZES) {                                                                               \
        SHARED_MEMORY(shared);                                                                                                         \
        attention_decode<8>(out, parts, arrivals, qkv, Side<T>{k, nullptr}, Side<T>{v, nullptr}, spans, pages, n_heads, n_kv_heads,    \
                            head_dim, page_tokens, scale_log2, shared);                                                                \
    }                                                                                                                                  \
    REGISTER_KERNEL(attention_decode_##suffix)                                                                                         \
    KERNEL(THREADS)                                                                                                                    \
    attention_decode_i8_##suffix(T* out, float* parts, int* arrivals, const T* qkv, const int8_t* k, const int8_t* v,                  \
                                 const float* k_scales, const float* v_scales, const int* spans, const int* pages, SIZES) {            \
        SHARED_MEMORY(shared);                                                                                                         \
        const Side<int8_t> keys = {k, k_scales}, values = {v, v_scales};                                                               \
        if (head_dim % 16 == 0) {                                                                                                      \
            attention_decode<16>(out, parts, arrivals, qkv, keys, values, spans, pages, n_heads, n_kv_heads, head_dim, page_tokens,    \
                                 scale_log2, shared);                                                                                  \
        } else {                                                                                                                       \
            attention_decode<8>(out, parts, arrivals, qkv, keys, values, spans, pages, n_heads, n_kv_heads, head_dim, page_tokens,     \
                                scale_log2, shared);                                                                                   \
        }                                                                                                                              \
    }                                                                                                                                  \
    REGISTER_KERNEL(attention_decode_i8_##suffix)
FOR_EACH_DTYPE(INSTANCE)
