// Gradients of attention over spans of own rows (kernels/attention.cu without a cache), for training.
//
//   P = exp(q·Kᵀ/√d − lse),  D = Σ d_out ⊙ out,  dV = Pᵀ·d_out,  dS = P ⊙ (d_out·Vᵀ − D),  dq = dS·K/√d,  dK = dSᵀ·q/√d
//
// P is made again from the log-sum-exp of each row, tile by tile (flash attention, Dao et al., arXiv 2205.14135), in base 2.
//
//   attention_delta_*:              delta[row, head] = D
//   attention_bwd_queries_dN_*:     dq; a block keeps a tile of queries with their d_out, and keys with their values pass by
//   attention_bwd_keys_dN_*:        dK and dV; a block keeps a tile of keys with their values, and queries with their d_out pass by, those of
//                                   all heads that share the keys
// Both are one code: own rows X₁ and X₂, passing rows Y₁ and Y₂, S = X₁·Y₁ᵀ and d_out·Vᵀ = X₂·Y₂ᵀ, or those transposed; the result is dS·Y₁, and
// of keys also P·Y₂. Seven products where five would do if blocks added to each other's dq, in an order that nobody knows.
//
// Layouts, of T unless said otherwise: qkv, d_qkv [tokens, (n_heads + 2·n_kv_heads)·head_dim]; out, d_out [tokens, n_heads·head_dim]; lse, delta
// f32 [tokens, n_heads]; spans i32 [n_spans, 4]: first row, rows, and two that are not read. head_dim is up to N, a multiple of 8; all bases are
// multiples of 16 bytes. Spans share no rows. Grid: (tiles of own rows of the longest span, heads of queries or keys, n_spans); of
// attention_delta one warp for each row and head. Writes with `=`; rows of no span are left alone.
//
// Numerics: 16-bit dtypes up to N = 128 multiply on tensor cores with f32 sums, P and dS are rounded to T before they are multiplied. f32, and
// N = 256, run on plain cores in f32. Sums are taken in an order that depends on the span alone: the same bits from run to run.
#include "async_copy.cuh"
#include "attention.cuh"
#include "mma.cuh"

namespace {

// Rows of one head: row i is at p + i·stride.
template <typename T> struct Rows {
    T* p;
    size_t stride;
    __device__ T* at(int row) const { return p + row * stride; }
};

// What a block works on: a tile of queries, or, if KEYS, of keys.
template <typename T, bool KEYS> struct Work {
    Rows<const T> own[2], passing[2];
    Rows<T> result[2];         // the first for dS·Y₁, the second, of keys, for P·Y₂
    Rows<const float> lse, delta;  // of the first head of queries
    int n_rows, head_dim, rounds, first_own;
    bool causal;

    __device__ Work(T* d_qkv, const T* qkv, const T* d_out, const float* row_lse, const float* row_delta, const int* spans, int n_heads,
                    int n_kv_heads, int d, bool is_causal, int tile_rows) {
        const int* span = spans + 4 * blockIdx.z;
        const size_t first_row = span[0], qkv_stride = size_t(n_heads + 2 * n_kv_heads) * d, out_stride = size_t(n_heads) * d;
        const int shared_by = n_heads / n_kv_heads;
        const int kv_head = KEYS ? blockIdx.y : blockIdx.y / shared_by, head = KEYS ? kv_head * shared_by : blockIdx.y;
        const size_t q = first_row * qkv_stride + size_t(head) * d;
        const size_t k = first_row * qkv_stride + size_t(n_heads + kv_head) * d, v = k + size_t(n_kv_heads) * d;
        const Rows<const T> queries = {qkv + q, qkv_stride}, d_outs = {d_out + first_row * out_stride + size_t(head) * d, out_stride};
        const Rows<const T> keys = {qkv + k, qkv_stride}, values = {qkv + v, qkv_stride};
        own[0] = KEYS ? keys : queries;
        own[1] = KEYS ? values : d_outs;
        passing[0] = KEYS ? queries : keys;
        passing[1] = KEYS ? d_outs : values;
        result[0] = {d_qkv + (KEYS ? k : q), qkv_stride};
        result[1] = {d_qkv + v, qkv_stride};
        lse = {row_lse + first_row * n_heads + head, size_t(n_heads)};
        delta = {row_delta + first_row * n_heads + head, size_t(n_heads)};
        n_rows = span[1];
        head_dim = d;
        rounds = KEYS ? shared_by : 1;
        causal = is_causal;
        // Of a causal span the last queries see most, and the first keys are seen by most: they begin first.
        first_own = (KEYS ? int(blockIdx.x) : int(gridDim.x) - 1 - int(blockIdx.x)) * tile_rows;
    }

    // The passing rows that some own row of `rows` from `first` on has to do with.
    __device__ int begin(int pass) const { return KEYS && causal ? first_own / pass * pass : 0; }
    __device__ int end(int rows) const { return !KEYS && causal ? min(first_own + rows, n_rows) : n_rows; }
    // Whether a query sees a key: own row, passing row.
    __device__ bool sees(int own_row, int passing_row) const { return !causal || (KEYS ? own_row <= passing_row : passing_row <= own_row); }

    // lse in base 2 of a query of round `round`; infinite, so that all probabilities are zero, where there is no such row.
    __device__ float lse_of(int round, int row, int limit) const { return row < limit ? lse.at(row)[round] * 1.4426950408889634f : INFINITY; }
    __device__ float delta_of(int round, int row, int limit) const { return row < limit ? delta.at(row)[round] : 0.0f; }
};

// ---------------------------------------------------------------- tensor cores

// A warp has the 16 own rows of one fragment.
constexpr int MMA_OWN = 16 * WARPS;
// Passing rows of a tile: more, and the products of a warp leave no registers for dK and dV at D = 128.
constexpr int MMA_PASS = 32;
// One tile is computed while the next arrives.
constexpr int STAGES = 2;

// Tiles of own and of passing rows, D elements each.
template <int D> struct MmaTile {
    static constexpr int STRIDE = MMA_STRIDE<D>, CHUNKS = D / 8;
    static constexpr int OWN = MMA_OWN * STRIDE, PASS = MMA_PASS * STRIDE;
    // What a launch asks for; the same in src/cuda/attention_grad.rs: own rows, passing rows, lse and delta of these.
    static constexpr int SHARED_BYTES = 2 * (OWN + STAGES * PASS) * 2 + STAGES * 2 * MMA_PASS * 4;
    static_assert(SHARED_BYTES <= 99 << 10, "every GPU since sm_80 has as much");
};

// Begins to copy N rows from `first` on; zeros at and after `limit`, and beyond head_dim.
template <typename T, int D, int N>
__device__ inline void copy_tile(T* tile, const Rows<const T>& from, int first, int limit, int head_dim) {
    using Tile = MmaTile<D>;
#pragma unroll
    for (int i = 0; i < ceil_div(N * Tile::CHUNKS, THREADS); ++i) {
        const int chunk = i * THREADS + int(threadIdx.x), row = chunk / Tile::CHUNKS, column = chunk % Tile::CHUNKS * 8;
        if (N * Tile::CHUNKS % THREADS != 0 && row >= N) break;
        const bool real = first + row < limit && column < head_dim;
        async_copy_16(tile + row * Tile::STRIDE + column, real ? from.at(first + row) + column : from.p, real ? 16 : 0);
    }
}

// s = X·Yᵀ for a warp's own rows and a tile of passing ones.
template <typename T, int D> __device__ inline void multiply(float (&s)[MMA_PASS / 8][4], const T* own, const T* passing) {
    constexpr int STRIDE = MmaTile<D>::STRIDE;
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
        uint32_t a[4];
        ldmatrix_x4(a, own + (lane % 16) * STRIDE + 16 * k + lane / 16 * 8);
#pragma unroll
        for (int n = 0; n < MMA_PASS / 16; ++n) {
            uint32_t b[4];
            ldmatrix_x4(b, passing + (16 * n + lane / 16 * 8 + lane % 8) * STRIDE + 16 * k + lane / 8 % 2 * 8);
            const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
            mma_m16n8k16<T>(s[2 * n], a, low);
            mma_m16n8k16<T>(s[2 * n + 1], a, high);
        }
    }
}

// Writes a warp's own rows from `row` on.
template <typename T, int D>
__device__ inline void write(const Rows<T>& to, const float (&sums)[D / 8][4], float scale, int row, int n_rows, int head_dim) {
    const int lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (row + group + 8 * half >= n_rows) continue;
        T* p = to.at(row + group + 8 * half) + 2 * pair;
#pragma unroll
        for (int n = 0; n < D / 8; ++n)
            if (8 * n < head_dim) *reinterpret_cast<uint32_t*>(p + 8 * n) = pack2<T>(sums[n][2 * half] * scale, sums[n][2 * half + 1] * scale);
    }
}

template <typename T, int D, bool KEYS>
__device__ inline void attention_bwd_mma(const Work<T, KEYS>& work, float scale, float scale_log2, unsigned char* shared) {
    using Tile = MmaTile<D>;
    T* const own[2] = {reinterpret_cast<T*>(shared), reinterpret_cast<T*>(shared) + Tile::OWN};
    T* const passing = own[1] + Tile::OWN;                                            // [STAGES, 2, MMA_PASS, STRIDE]
    float* const stats = reinterpret_cast<float*>(passing + STAGES * 2 * Tile::PASS);  // [STAGES, 2, MMA_PASS]

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, pair = lane % 4;
    const int warp_row = work.first_own + 16 * warp, begin = work.begin(MMA_PASS), end = work.end(MMA_OWN);
    const int n_tiles = ceil_div(end - begin, MMA_PASS), n_steps = work.rounds * n_tiles;
    const auto copy = [&](int step) {
        const int round = step / n_tiles, first = begin + step % n_tiles * MMA_PASS, stage = step % STAGES;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const Rows<const T> from = {work.passing[i].p + round * work.head_dim, work.passing[i].stride};
            copy_tile<T, D, MMA_PASS>(passing + (2 * stage + i) * Tile::PASS, from, first, end, work.head_dim);
        }
        async_copy_commit();
        if (KEYS && threadIdx.x < MMA_PASS) {
            stats[2 * stage * MMA_PASS + threadIdx.x] = work.lse_of(round, first + threadIdx.x, end);
            stats[(2 * stage + 1) * MMA_PASS + threadIdx.x] = work.delta_of(round, first + threadIdx.x, end);
        }
    };
#pragma unroll
    for (int i = 0; i < 2; ++i) copy_tile<T, D, MMA_OWN>(own[i], work.own[i], work.first_own, work.n_rows, work.head_dim);
    copy(0);
    float lse[2], delta[2];
    if (!KEYS) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            lse[half] = work.lse_of(0, warp_row + group + 8 * half, work.n_rows);
            delta[half] = work.delta_of(0, warp_row + group + 8 * half, work.n_rows);
        }
    }

    float sums[D / 8][4] = {}, value_sums[KEYS ? D / 8 : 1][4] = {};
    for (int step = 0; step < n_steps; ++step) {
        // This tile is there, and all are done with the one before, whose place the next takes.
        async_copy_wait<0>();
        __syncthreads();
        if (step + 1 < n_steps) copy(step + 1);
        const int first = begin + step % n_tiles * MMA_PASS, stage = step % STAGES;
        // Warps none of whose rows have to do with the tile.
        if (warp_row >= work.n_rows || !work.sees(KEYS ? warp_row : warp_row + 15, KEYS ? first + MMA_PASS - 1 : first)) continue;
        const T* const y1 = passing + 2 * stage * Tile::PASS;
        const T* const y2 = y1 + Tile::PASS;
        const float* const column_stats = stats + 2 * stage * MMA_PASS;
        float p[MMA_PASS / 8][4] = {}, ds[MMA_PASS / 8][4] = {};
        multiply<T, D>(p, own[0] + 16 * warp * Tile::STRIDE, y1);
        multiply<T, D>(ds, own[1] + 16 * warp * Tile::STRIDE, y2);
#pragma unroll
        for (int n = 0; n < MMA_PASS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int column = 8 * n + 2 * pair + i % 2, row = warp_row + group + i / 2 * 8;
                const float its_lse = KEYS ? column_stats[column] : lse[i / 2];
                const float its_delta = KEYS ? column_stats[MMA_PASS + column] : delta[i / 2];
                const bool seen = first + column < end && work.sees(row, first + column);
                p[n][i] = seen ? exp2_approx(p[n][i] * scale_log2 - its_lse) : 0.0f;
                ds[n][i] = p[n][i] * (ds[n][i] - its_delta);
            }
        accumulate<T, D>(sums, ds, y1);
        if constexpr (KEYS) accumulate<T, D>(value_sums, p, y2);
    }
    write<T, D>(work.result[0], sums, scale, warp_row, work.n_rows, work.head_dim);
    if constexpr (KEYS) write<T, D>(work.result[1], value_sums, 1.0f, warp_row, work.n_rows, work.head_dim);
}

// ---------------------------------------------------------------- plain cores

constexpr int PLAIN_ROWS_PER_WARP = 4;
constexpr int PLAIN_OWN = PLAIN_ROWS_PER_WARP * WARPS;
// One for each lane.
constexpr int PLAIN_PASS = WARP;

template <int D> struct PlainTile {
    // Columns of a row that a lane has: lane, lane + 32, ...
    static constexpr int COLUMNS = ceil_div(D, WARP);
    static constexpr int STRIDE = COLUMNS * WARP + 4;
    // What a launch asks for; the same in src/cuda/attention_grad.rs.
    static constexpr int SHARED_BYTES = 2 * (PLAIN_OWN + PLAIN_PASS) * STRIDE * 4;
    static_assert(SHARED_BYTES <= 99 << 10, "every GPU since sm_80 has as much");
};

template <typename T, int D, bool KEYS>
__device__ inline void attention_bwd_plain(const Work<T, KEYS>& work, float scale, float scale_log2, unsigned char* shared) {
    using Tile = PlainTile<D>;
    constexpr int STRIDE = Tile::STRIDE, COLUMNS = Tile::COLUMNS, ROWS = PLAIN_ROWS_PER_WARP;
    float* const x1 = reinterpret_cast<float*>(shared);
    float* const x2 = x1 + PLAIN_OWN * STRIDE;
    float* const y1 = x2 + PLAIN_OWN * STRIDE;
    float* const y2 = y1 + PLAIN_PASS * STRIDE;

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int warp_row = work.first_own + ROWS * warp, begin = work.begin(PLAIN_PASS), end = work.end(PLAIN_OWN);
    const auto rows = [&](float* to, const Rows<const T>& from, int offset, int n, int first, int limit) {
        copy_rows<T, STRIDE>(to, n, work.head_dim, [&](int i) { return first + i < limit ? from.at(first + i) + offset : nullptr; });
    };
    rows(x1, work.own[0], 0, PLAIN_OWN, work.first_own, work.n_rows);
    rows(x2, work.own[1], 0, PLAIN_OWN, work.first_own, work.n_rows);

    float sums[ROWS][COLUMNS] = {}, value_sums[KEYS ? ROWS : 1][COLUMNS] = {};
    for (int round = 0; round < work.rounds; ++round) {
        for (int first = begin; first < end; first += PLAIN_PASS) {
            __syncthreads();  // all are done with the tile before
            rows(y1, work.passing[0], round * work.head_dim, PLAIN_PASS, first, end);
            rows(y2, work.passing[1], round * work.head_dim, PLAIN_PASS, first, end);
            __syncthreads();
            if (warp_row >= work.n_rows || !work.sees(KEYS ? warp_row : warp_row + ROWS - 1, KEYS ? first + PLAIN_PASS - 1 : first)) continue;
            float p[ROWS] = {}, ds[ROWS] = {};
#pragma unroll 1
            for (int i = 0; i < work.head_dim; i += 4) {
                const float4 a = *reinterpret_cast<const float4*>(y1 + lane * STRIDE + i);
                const float4 b = *reinterpret_cast<const float4*>(y2 + lane * STRIDE + i);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float4 c = *reinterpret_cast<const float4*>(x1 + (ROWS * warp + r) * STRIDE + i);
                    const float4 d = *reinterpret_cast<const float4*>(x2 + (ROWS * warp + r) * STRIDE + i);
                    p[r] += a.x * c.x + a.y * c.y + a.z * c.z + a.w * c.w;
                    ds[r] += b.x * d.x + b.y * d.y + b.z * d.z + b.w * d.w;
                }
            }
            const int passing_row = first + lane;
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                const int query = KEYS ? passing_row : warp_row + r;
                const bool seen = passing_row < end && work.sees(warp_row + r, passing_row);
                p[r] = seen ? exp2f(fmaf(p[r], scale_log2, -work.lse_of(round, query, work.n_rows))) : 0.0f;
                ds[r] = p[r] * (ds[r] - work.delta_of(round, query, work.n_rows));
            }
#pragma unroll 2
            for (int t = 0; t < PLAIN_PASS; ++t) {
                float a[COLUMNS], b[COLUMNS];
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) {
                    a[j] = y1[t * STRIDE + lane + WARP * j];
                    if (KEYS) b[j] = y2[t * STRIDE + lane + WARP * j];
                }
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float its_ds = __shfl_sync(ALL_LANES, ds[r], t);
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) sums[r][j] += its_ds * a[j];
                    if constexpr (KEYS) {
                        const float its_p = __shfl_sync(ALL_LANES, p[r], t);
#pragma unroll
                        for (int j = 0; j < COLUMNS; ++j) value_sums[r][j] += its_p * b[j];
                    }
                }
            }
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        if (warp_row + r >= work.n_rows) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
            const int column = lane + WARP * j;
            if (column >= work.head_dim) continue;
            work.result[0].at(warp_row + r)[column] = from_f32<T>(sums[r][j] * scale);
            if constexpr (KEYS) work.result[1].at(warp_row + r)[column] = from_f32<T>(value_sums[r][j]);
        }
    }
}

template <typename T, int D, bool KEYS>
__device__ inline void attention_bwd(T* d_qkv, const T* qkv, const T* d_out, const float* lse, const float* delta, const int* spans,
                                     int n_heads, int n_kv_heads, int head_dim, int causal, float scale, float scale_log2,
                                     unsigned char* shared) {
    constexpr bool MMA = sizeof(T) == 2 && D <= 128;
    begin_launch();
    const Work<T, KEYS> work(d_qkv, qkv, d_out, lse, delta, spans, n_heads, n_kv_heads, head_dim, causal != 0, MMA ? MMA_OWN : PLAIN_OWN);
    // Else the whole block has nothing to do: its span is shorter than the longest.
    if (work.first_own < work.n_rows) {
        if constexpr (MMA) {
            attention_bwd_mma<T, D, KEYS>(work, scale, scale_log2, shared);
        } else {
            attention_bwd_plain<T, D, KEYS>(work, scale, scale_log2, shared);
        }
    }
}

template <typename T> __device__ inline void attention_delta(float* delta, const T* out, const T* d_out, int n, int head_dim) {
    begin_launch();
    const int lane = threadIdx.x % WARP, item = blockIdx.x * WARPS + threadIdx.x / WARP;
    if (item >= n) return;
    const size_t at = size_t(item) * head_dim;
    float sum = 0.0f;
    for (int i = lane; i < head_dim; i += WARP) sum += to_f32(out[at + i]) * to_f32(d_out[at + i]);
    sum = warp_sum(sum);
    if (lane == 0) delta[item] = sum;
}

}  // namespace

#define INSTANCE_OF(name, T, D, KEYS)                                                                                               \
    KERNEL(THREADS)                                                                                                                 \
    name(T* d_qkv, const T* qkv, const T* d_out, const float* lse, const float* delta, const int* spans, int n_heads, int n_kv_heads, \
         int head_dim, int causal, float scale, float scale_log2) {                                                                 \
        SHARED_MEMORY(shared);                                                                                                      \
        attention_bwd<T, D, KEYS>(d_qkv, qkv, d_out, lse, delta, spans, n_heads, n_kv_heads, head_dim, causal, scale, scale_log2, shared); \
    }                                                                                                                               \
    REGISTER_KERNEL(name)
#define INSTANCE_OF_WIDTH(T, suffix, D)                              \
    INSTANCE_OF(attention_bwd_queries_d##D##_##suffix, T, D, false)  \
    INSTANCE_OF(attention_bwd_keys_d##D##_##suffix, T, D, true)
#define INSTANCE(T, suffix)                                                                                   \
    KERNEL(THREADS) attention_delta_##suffix(float* delta, const T* out, const T* d_out, int n, int head_dim) { \
        attention_delta<T>(delta, out, d_out, n, head_dim);                                                   \
    }                                                                                                         \
    REGISTER_KERNEL(attention_delta_##suffix)                                                                 \
    INSTANCE_OF_WIDTH(T, suffix, 64)                                                                          \
    INSTANCE_OF_WIDTH(T, suffix, 80)                                                                          \
    INSTANCE_OF_WIDTH(T, suffix, 96)                                                                          \
    INSTANCE_OF_WIDTH(T, suffix, 128)                                                                         \
    INSTANCE_OF_WIDTH(T, suffix, 256)
FOR_EACH_DTYPE(INSTANCE)
