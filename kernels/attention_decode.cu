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
// Layouts, all of T unless said otherwise, row-major:
//   qkv      [tokens, (n_heads + 2·n_kv_heads) · head_dim], of which the queries are read
//   out      [tokens, n_heads · head_dim]; rows of no span are left alone
//   k, v     pages [n_pages, n_kv_heads, page_tokens, head_dim]
//   spans    i32 [n_spans, 4]: first row, rows (1), past, index of the first page in `pages`; pages i32. They are read here and now: a
//            launch that is repeated as it is serves other lengths and pages.
//   parts    f32 [n_spans, n_heads, n_splits, head_dim + 2]: o, m, l
//   arrivals i32 [n_spans, n_heads], zero before and after the launch
// parts and arrivals are not touched if n_splits is 1.
// Grid: (n_splits, n_heads, n_spans). head_dim: a multiple of 8 up to 256; all bases are multiples of 16 bytes. Writes out with `=`.
//
// Numerics: all sums in f32, parts merged in their order whoever comes last: results depend on context and n_splits alone.
// Shared memory: f32 [WARPS, head_dim + 2] and one i32. Registers without spills (nvcc 13, sm_90a): 80 in f16 and bf16,
// 120 in f32.
#include "common.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int WARPS = THREADS / WARP;
// Elements of a head that a lane has; ceil(head_dim / 8) lanes, made up to a power of two, share a token.
constexpr int PART = 8;
// Tokens that a lane has under way: with K and V that is 128 bytes of 16-bit floats, 16 KiB a block. Two blocks on a multiprocessor
// then cover what memory delivers within its latency (4.8 TB/s · 0.7 µs / 132 = 25 KiB).
constexpr int UNROLL = 4;
// Below all scores, but finite: the difference of two is a number.
constexpr float LOWEST = -3.0e38f;

// PART elements at p as f32.
template <typename T> struct Part {
    static constexpr int N = Vec16<T>::N;
    Vec16<T> v[PART / N];

    __device__ static Part load(const T* p) {
        Part part;
#pragma unroll
        for (int i = 0; i < PART / N; ++i) part.v[i] = Vec16<T>::load_streaming(p + i * N);
        return part;
    }
    __device__ float get(int i) const { return v[i / N].get(i % N); }
};

// Σ exp2(s − m) · (1, v) over some tokens, m = max s.
struct Sums {
    float m, l, o[PART];

    // Adds the sums over other tokens; the order of the two does not matter.
    __device__ void add(const Sums& other) {
        const float top = fmaxf(m, other.m), mine = exp2f(m - top), theirs = exp2f(other.m - top);
        l = l * mine + other.l * theirs;
#pragma unroll
        for (int i = 0; i < PART; ++i) o[i] = o[i] * mine + other.o[i] * theirs;
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

template <typename T>
__device__ inline void attention_decode(T* out, float* parts, int* arrivals, const T* qkv, const T* k, const T* v, const int* spans,
                                        const int* pages, int n_heads, int n_kv_heads, int head_dim, int page_tokens, float scale_log2,
                                        unsigned char* shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    begin_launch();
    const int* span = spans + 4 * blockIdx.z;
    const int row = span[0], context = span[2] + 1;
    const int head = blockIdx.y, kv_head = head / (n_heads / n_kv_heads), n_splits = gridDim.x;
    const int split_tokens = ceil_div(context, n_splits), begin = int(blockIdx.x) * split_tokens, end = min(begin + split_tokens, context);
    pages += span[3];
    k += size_t(kv_head) * page_tokens * head_dim;
    v += size_t(kv_head) * page_tokens * head_dim;
    const size_t page_stride = size_t(n_kv_heads) * page_tokens * head_dim;

    // The lanes that share a token are neighbours.
    int lanes_per_token = 1;
    while (lanes_per_token * PART < head_dim) lanes_per_token *= 2;
    const int column = lane % lanes_per_token * PART, groups = WARP / lanes_per_token, n_slots = WARPS * groups;
    const int slot = warp * groups + lane / lanes_per_token;
    const bool has_columns = column < head_dim;

    float q[PART] = {};
    if (has_columns) {
        const Part<T> part = Part<T>::load(qkv + size_t(row) * (n_heads + 2 * n_kv_heads) * head_dim + head * head_dim + column);
#pragma unroll
        for (int i = 0; i < PART; ++i) q[i] = part.get(i) * scale_log2;
    }

    // Where tokens of this lane's slot are. Those of the next step are looked up while keys and values of this one are under way; tokens
    // that there are not stand for the last one.
    size_t from[UNROLL];
    const auto look_up = [&](int base) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const unsigned token = min(base + u * n_slots + slot, context - 1);
            from[u] = pages[token / unsigned(page_tokens)] * page_stride + size_t(token % unsigned(page_tokens)) * head_dim + column;
        }
    };
    look_up(begin);

    Sums sums = {LOWEST, 0.0f, {}};
    for (int base = begin; base < end; base += n_slots * UNROLL) {
        Part<T> keys[UNROLL] = {}, values[UNROLL] = {};
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            if (base + u * n_slots + slot < end && has_columns) {
                keys[u] = Part<T>::load(k + from[u]);
                values[u] = Part<T>::load(v + from[u]);
            }
        }
        look_up(base + n_slots * UNROLL);
        float s[UNROLL];
        float top = sums.m;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            s[u] = 0.0f;
#pragma unroll
            for (int i = 0; i < PART; ++i) s[u] += q[i] * keys[u].get(i);
            for (int lanes = lanes_per_token / 2; lanes > 0; lanes /= 2) s[u] += __shfl_xor_sync(ALL_LANES, s[u], lanes);
            if (base + u * n_slots + slot >= end) s[u] = -INFINITY;
            top = fmaxf(top, s[u]);
        }
        const float shrink = exp2f(sums.m - top);
        sums.m = top;
        sums.l *= shrink;
#pragma unroll
        for (int i = 0; i < PART; ++i) sums.o[i] *= shrink;
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const float p = exp2f(s[u] - top);
            sums.l += p;
#pragma unroll
            for (int i = 0; i < PART; ++i) sums.o[i] += p * values[u].get(i);
        }
    }

    // Groups of the warp, then warps, then splits.
    for (int lanes = lanes_per_token; lanes < WARP; lanes *= 2) {
        Sums other;
        other.m = __shfl_xor_sync(ALL_LANES, sums.m, lanes);
        other.l = __shfl_xor_sync(ALL_LANES, sums.l, lanes);
#pragma unroll
        for (int i = 0; i < PART; ++i) other.o[i] = __shfl_xor_sync(ALL_LANES, sums.o[i], lanes);
        sums.add(other);
    }
    float* const warp_parts = reinterpret_cast<float*>(shared);
    int* const is_last = reinterpret_cast<int*>(warp_parts + WARPS * (head_dim + 2));
    if (lane < lanes_per_token && has_columns) {
        float* to = warp_parts + warp * (head_dim + 2);
#pragma unroll
        for (int i = 0; i < PART; ++i) to[column + i] = sums.o[i];
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

#define INSTANCE(T, suffix)                                                                                                       \
    KERNEL(THREADS)                                                                                                               \
    attention_decode_##suffix(T* out, float* parts, int* arrivals, const T* qkv, const T* k, const T* v, const int* spans,       \
                              const int* pages, int n_heads, int n_kv_heads, int head_dim, int page_tokens, float scale_log2) {  \
        SHARED_MEMORY(shared);                                                                                                    \
        attention_decode<T>(out, parts, arrivals, qkv, k, v, spans, pages, n_heads, n_kv_heads, head_dim, page_tokens, scale_log2, \
                            shared);                                                                                              \
    }                                                                                                                             \
    REGISTER_KERNEL(attention_decode_##suffix)
FOR_EACH_DTYPE(INSTANCE)
