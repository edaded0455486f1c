// Attention over spans of many rows: prefill, and the image encoder.
//
//   out[row, head] = Σ_t p_t · v_t / Σ_t p_t,   p_t = exp(s_t − max_t s_t),   s_t = q · k_t / sqrt(head_dim)
//
// over the tokens t that the row sees: row r of a span the first past + r + 1 of its sequence if `causal`, else all past + n_rows. Scores
// never leave the chip: tiles of tokens pass by while maximum, sum and output of a row are kept and rescaled (flash attention, Dao et al.,
// arXiv 2205.14135), in base 2: exp(s) = exp2(q·k · scale_log2), scale_log2 = log2(e) / sqrt(head_dim).
//
// Layouts, all of T unless said otherwise, row-major:
//   qkv   [tokens, (n_heads + 2·n_kv_heads) · head_dim]: queries, keys, values
//   out   [tokens, n_heads · head_dim]; rows of no span are left alone
//   lse   f32 [tokens, n_heads], or null: ln Σ_t exp(s_t), for training
//   k, v  pages [n_pages, n_kv_heads, page_tokens, head_dim]; with page_tokens = 0 they are not read: keys are those of the span's own rows
//   spans i32 [n_spans, 4]: first row, rows, past, index of the first page in `pages`; pages i32
// Grid: (row tiles of the longest span, n_heads, n_spans). attention_fwd_dN takes head_dim up to N, a multiple of 8; all bases are
// multiples of 16 bytes. Writes out and lse with `=`.
//
// Numerics: 16-bit dtypes up to N = 128 multiply on tensor cores with f32 sums, softmax is in f32, probabilities are rounded to T before
// they meet V. f32, and N = 256, run on plain cores in f32. Sums are taken in an order that depends on the sequence alone.
//
// Registers and shared memory of f16 and bf16, without spills (nvcc 13, sm_90a): N = 64: 135, 36,864 bytes; 80: 168, 45,056; 96: 168,
// 53,248; 128: 243, 69,632. So three blocks share a multiprocessor, two at N = 128.
#include "async_copy.cuh"
#include "attention.cuh"
#include "mma.cuh"

namespace {

// One head of one span: what a block works on.
template <typename T> struct Work {
    const T* q;     // its first row; the next is q_stride further on
    T* out;         // the same, out_stride
    const T* k;     // where offset() counts from
    const T* v;
    const int* pages;
    size_t q_stride, out_stride, token_stride, page_stride;
    int page_tokens;
    int n_rows, past, head_dim;
    bool causal;

    // How many tokens row `row` of the span sees.
    __device__ int visible(int row) const { return causal ? past + row + 1 : past + n_rows; }

    // Elements from k or v to that token's.
    __device__ size_t offset(int token) const {
        if (page_tokens == 0) return token * token_stride;
        const unsigned page = unsigned(token) / unsigned(page_tokens), within = unsigned(token) % unsigned(page_tokens);
        return pages[page] * page_stride + within * token_stride;
    }
};

template <typename T>
__device__ inline Work<T> work_of_block(T* out, const T* qkv, const T* k, const T* v, const int* spans, const int* pages, int n_heads,
                                        int n_kv_heads, int head_dim, int page_tokens, int causal) {
    begin_launch();
    const int* span = spans + 4 * blockIdx.z;
    const int first_row = span[0], head = blockIdx.y, kv_head = head / (n_heads / n_kv_heads);
    const int qkv_width = (n_heads + 2 * n_kv_heads) * head_dim;
    const T* row = qkv + size_t(first_row) * qkv_width;
    Work<T> work;
    work.q = row + head * head_dim;
    work.q_stride = qkv_width;
    work.out = out + (size_t(first_row) * n_heads + head) * head_dim;
    work.out_stride = n_heads * head_dim;
    if (page_tokens == 0) {
        work.k = row + (n_heads + kv_head) * head_dim;
        work.v = work.k + n_kv_heads * head_dim;
        work.token_stride = qkv_width;
    } else {
        const size_t head_offset = size_t(kv_head) * page_tokens * head_dim;
        work.k = k + head_offset;
        work.v = v + head_offset;
        work.token_stride = head_dim;
    }
    work.pages = pages + span[3];
    work.page_stride = size_t(n_kv_heads) * page_tokens * head_dim;
    work.page_tokens = page_tokens;
    work.n_rows = span[1];
    work.past = span[2];
    work.head_dim = head_dim;
    work.causal = causal != 0;
    return work;
}

// Where ln Σ exp(s) of each row goes, if anybody wants it: arguments of the kernel alone, which take no registers until it is known.
struct Lse {
    float* lse;  // or null
    const int* spans;

    // Of a row of the block's span, of whose s `largest` is the largest and `total` the sum relative to it, both in base 2.
    __device__ void keep(int row, float largest, float total) const {
        if (lse) lse[size_t(spans[4 * blockIdx.z] + row) * gridDim.y + blockIdx.y] = (largest + log2f(total)) * 0.6931471805599453f;
    }
};

// First row of this block's tile. Of a causal span the last rows see most and take longest: they begin first.
__device__ inline int first_row_of_tile(int rows) { return (int(gridDim.x) - 1 - int(blockIdx.x)) * rows; }

// ---------------------------------------------------------------- tensor cores

// A warp has the 16 rows of one fragment, so that a row's maximum and sum are of four lanes and need no shared memory.
constexpr int MMA_ROWS = 16 * WARPS;
// 64 tokens: the scores of a warp take 32 registers a lane; 128 would not leave room for the output at D = 128. Also the page of the
// engine's cache, whose number is then looked up in one line of L1.
constexpr int MMA_TOKENS = 64;
// One tile is computed while the next arrives.
constexpr int STAGES = 2;
static_assert(MMA_ROWS <= MMA_TOKENS, "the tile of Q passes through a stage of K");

// Rows of D elements in shared memory, with a gap of 16 bytes: D / 8 + 1 chunks of 16 bytes is odd, so the eight rows that ldmatrix reads
// at once begin in eight different groups of banks.
template <int D> struct MmaTile {
    static constexpr int STRIDE = MMA_STRIDE<D>;
    static constexpr int ELEMENTS = MMA_TOKENS * STRIDE;
    static constexpr int CHUNKS = D / 8;
    static_assert(D % 16 == 0 && MMA_TOKENS * CHUNKS % THREADS == 0, "threads copy equal shares");
    // What a launch asks for; the same in src/cuda/attention.rs.
    static constexpr int SHARED_BYTES = 2 * STAGES * ELEMENTS * 2;
    static_assert(2 * (SHARED_BYTES + 1024) <= 164 << 10, "two blocks on a multiprocessor, from sm_80 on");
};

// Begins to copy MMA_TOKENS tokens from `first` on. What lies at or after `limit`, or beyond head_dim, becomes zero: V there is
// multiplied with probabilities of zero, and 0 · NaN would be NaN.
template <typename T, int D> __device__ inline void copy_tokens(T* k_tile, T* v_tile, const Work<T>& work, int first, int limit) {
    using Tile = MmaTile<D>;
    // One look-up is enough where a tile lies within a page, or in the span's own rows (page_tokens = 0).
    const bool evenly_spaced = work.page_tokens % MMA_TOKENS == 0;
    const size_t first_offset = work.offset(first);
#pragma unroll
    for (int i = 0; i < MMA_TOKENS * Tile::CHUNKS / THREADS; ++i) {
        const int chunk = i * THREADS + int(threadIdx.x), token = chunk / Tile::CHUNKS, column = chunk % Tile::CHUNKS * 8;
        const bool real = first + token < limit && column < work.head_dim;
        size_t from = 0;
        if (real) from = (evenly_spaced ? first_offset + token * work.token_stride : work.offset(first + token)) + column;
        const int to = token * Tile::STRIDE + column;
        async_copy_16(k_tile + to, work.k + from, real ? 16 : 0);
        async_copy_16(v_tile + to, work.v + from, real ? 16 : 0);
    }
    async_copy_commit();
}

template <typename T, int D> __device__ inline void attention_mma(const Work<T>& work, const Lse& lse, float scale_log2, unsigned char* shared) {
    using Tile = MmaTile<D>;
    constexpr int STRIDE = Tile::STRIDE;
    T* const k_tiles = reinterpret_cast<T*>(shared);
    T* const v_tiles = k_tiles + STAGES * Tile::ELEMENTS;
    // Free until the second tile of tokens is asked for, and then Q is in registers.
    T* const q_tile = k_tiles + Tile::ELEMENTS;

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, group = lane / 4, pair = lane % 4;
    const int tile_row = first_row_of_tile(MMA_ROWS), warp_row = tile_row + 16 * warp;
    const int limit = work.visible(min(tile_row + MMA_ROWS, work.n_rows) - 1), n_tiles = ceil_div(limit, MMA_TOKENS);

    copy_tokens<T, D>(k_tiles, v_tiles, work, 0, limit);
#pragma unroll
    for (int i = 0; i < MMA_ROWS * Tile::CHUNKS / THREADS; ++i) {
        const int chunk = i * THREADS + int(threadIdx.x), row = chunk / Tile::CHUNKS, column = chunk % Tile::CHUNKS * 8;
        const bool real = tile_row + row < work.n_rows && column < work.head_dim;
        const size_t from = real ? (tile_row + row) * work.q_stride + column : 0;
        async_copy_16(q_tile + row * STRIDE + column, work.q + from, real ? 16 : 0);
    }
    async_copy_commit();
    async_copy_wait<0>();
    __syncthreads();

    uint32_t q[D / 16][4];
#pragma unroll
    for (int k = 0; k < D / 16; ++k) ldmatrix_x4(q[k], q_tile + (16 * warp + lane % 16) * STRIDE + 16 * k + lane / 16 * 8);
    __syncthreads();

    // Tokens that some row of the warp sees, that all of them see, and that this lane's two rows see. Warps without rows see none.
    const int some_see = warp_row < work.n_rows ? min(work.visible(warp_row + 15), limit) : 0;
    const int all_see = min(work.visible(warp_row), limit);
    const int sees[2] = {min(work.visible(warp_row + group), limit), min(work.visible(warp_row + group + 8), limit)};

    float o[D / 8][4] = {};
    float largest[2] = {-INFINITY, -INFINITY};  // of the products q·k
    float sum[2] = {0.0f, 0.0f};                // this lane's part
    for (int tile = 0; tile < n_tiles; ++tile) {
        if (tile + 1 < n_tiles) {
            const int stage = (tile + 1) % STAGES * Tile::ELEMENTS;
            copy_tokens<T, D>(k_tiles + stage, v_tiles + stage, work, (tile + 1) * MMA_TOKENS, limit);
        }
        const int first = tile * MMA_TOKENS;
        const T* k_tile = k_tiles + tile % STAGES * Tile::ELEMENTS;
        const T* v_tile = v_tiles + tile % STAGES * Tile::ELEMENTS;
        if (first < some_see) {
            // s = Q·Kᵀ
            float s[MMA_TOKENS / 8][4] = {};
#pragma unroll
            for (int k = 0; k < D / 16; ++k) {
#pragma unroll
                for (int n = 0; n < MMA_TOKENS / 16; ++n) {
                    uint32_t b[4];
                    ldmatrix_x4(b, k_tile + (16 * n + lane / 16 * 8 + lane % 8) * STRIDE + 16 * k + lane / 8 % 2 * 8);
                    const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
                    mma_m16n8k16<T>(s[2 * n], q[k], low);
                    mma_m16n8k16<T>(s[2 * n + 1], q[k], high);
                }
            }
            if (first + MMA_TOKENS > all_see) {
#pragma unroll
                for (int n = 0; n < MMA_TOKENS / 8; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i)
                        if (first + 8 * n + 2 * pair + i % 2 >= sees[i / 2]) s[n][i] = -INFINITY;
            }
            // p = exp2((s − largest) · scale_log2). Every row sees token 0: the first tile makes `largest` finite for good. The
            // difference comes first, though one fma could do both: so the largest p is 1 exactly, however large the scores are, and
            // does not lose in T what `sum` still has.
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = -INFINITY;
#pragma unroll
                for (int n = 0; n < MMA_TOKENS / 8; ++n) top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 1));
                top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, 2));
                const float before = largest[half];
                largest[half] = fmaxf(before, top);
                const float shrink = exp2_approx((before - largest[half]) * scale_log2);
                sum[half] *= shrink;
#pragma unroll
                for (int n = 0; n < D / 8; ++n) {
                    o[n][2 * half] *= shrink;
                    o[n][2 * half + 1] *= shrink;
                }
#pragma unroll
                for (int n = 0; n < MMA_TOKENS / 8; ++n)
#pragma unroll
                    for (int i = 2 * half; i < 2 * half + 2; ++i) {
                        s[n][i] = exp2_approx((s[n][i] - largest[half]) * scale_log2);
                        sum[half] += s[n][i];
                    }
            }
            accumulate<T, D>(o, s, v_tile);
        }
        // The next tile is there, and all are done with this one, whose place the one after the next takes.
        async_copy_wait<0>();
        __syncthreads();
    }

#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float total = sum[half];
        total += __shfl_xor_sync(ALL_LANES, total, 1);
        total += __shfl_xor_sync(ALL_LANES, total, 2);
        const float scale = 1.0f / total;
        const int row = warp_row + group + 8 * half;
        if (row < work.n_rows) {
            if (pair == 0) lse.keep(row, largest[half] * scale_log2, total);
            T* out = work.out + row * work.out_stride;
#pragma unroll
            for (int n = 0; n < D / 8; ++n)
                if (8 * n < work.head_dim)
                    *reinterpret_cast<uint32_t*>(out + 8 * n + 2 * pair) = pack2<T>(o[n][2 * half] * scale, o[n][2 * half + 1] * scale);
        }
    }
}

// ---------------------------------------------------------------- plain cores

// Each read of K serves the rows of a warp: with four, a step of the products reads five vectors for sixteen multiplications.
constexpr int PLAIN_ROWS_PER_WARP = 4;
constexpr int PLAIN_ROWS = PLAIN_ROWS_PER_WARP * WARPS;
// One for each lane.
constexpr int PLAIN_TOKENS = WARP;

template <int D> struct PlainTile {
    // Columns of V and of the output that a lane has: lane, lane + 32, ...
    static constexpr int COLUMNS = ceil_div(D, WARP);
    // Rows in shared memory: an odd number of 16-byte chunks, as each lane reads another row of K.
    static constexpr int STRIDE = COLUMNS * WARP + 4;
    // What a launch asks for: Q, K and V in f32; the same in src/cuda/attention.rs.
    static constexpr int SHARED_BYTES = (PLAIN_ROWS + 2 * PLAIN_TOKENS) * STRIDE * 4;
    static_assert(SHARED_BYTES <= 99 << 10, "every GPU since sm_80 has as much");
};

template <typename T, int D> __device__ inline void attention_plain(const Work<T>& work, const Lse& lse, float scale_log2, unsigned char* shared) {
    using Tile = PlainTile<D>;
    constexpr int STRIDE = Tile::STRIDE, COLUMNS = Tile::COLUMNS, ROWS = PLAIN_ROWS_PER_WARP;
    float* const q_rows = reinterpret_cast<float*>(shared);
    float* const k_rows = q_rows + PLAIN_ROWS * STRIDE;
    float* const v_rows = k_rows + PLAIN_TOKENS * STRIDE;

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int tile_row = first_row_of_tile(PLAIN_ROWS), warp_row = tile_row + ROWS * warp;
    const int limit = work.visible(min(tile_row + PLAIN_ROWS, work.n_rows) - 1);
    const int some_see = warp_row < work.n_rows ? min(work.visible(warp_row + ROWS - 1), limit) : 0;
    copy_rows<T, STRIDE>(q_rows, PLAIN_ROWS, work.head_dim,
                         [&](int i) { return tile_row + i < work.n_rows ? work.q + (tile_row + i) * work.q_stride : nullptr; });

    float o[ROWS][COLUMNS] = {};
    float largest[ROWS], sum[ROWS] = {};
#pragma unroll
    for (int r = 0; r < ROWS; ++r) largest[r] = -INFINITY;
    for (int first = 0; first < limit; first += PLAIN_TOKENS) {
        __syncthreads();  // all are done with the tile before
        copy_rows<T, STRIDE>(k_rows, PLAIN_TOKENS, work.head_dim,
                             [&](int i) { return first + i < limit ? work.k + work.offset(first + i) : nullptr; });
        copy_rows<T, STRIDE>(v_rows, PLAIN_TOKENS, work.head_dim,
                             [&](int i) { return first + i < limit ? work.v + work.offset(first + i) : nullptr; });
        __syncthreads();
        if (first < some_see) {
            float s[ROWS] = {};
            for (int i = 0; i < work.head_dim; i += 4) {
                const float4 k = *reinterpret_cast<const float4*>(k_rows + lane * STRIDE + i);
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float4 q = *reinterpret_cast<const float4*>(q_rows + (ROWS * warp + r) * STRIDE + i);
                    s[r] += q.x * k.x + q.y * k.y + q.z * k.z + q.w * k.w;
                }
            }
#pragma unroll
            for (int r = 0; r < ROWS; ++r) {
                if (first + lane >= min(work.visible(warp_row + r), limit)) s[r] = -INFINITY;
                const float before = largest[r];
                largest[r] = fmaxf(before, warp_max(s[r]) * scale_log2);
                const float shrink = exp2f(before - largest[r]);
                s[r] = exp2f(fmaf(s[r], scale_log2, -largest[r]));
                sum[r] = sum[r] * shrink + s[r];
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) o[r][j] *= shrink;
            }
            for (int t = 0; t < PLAIN_TOKENS; ++t) {
                float v[COLUMNS];
#pragma unroll
                for (int j = 0; j < COLUMNS; ++j) v[j] = v_rows[t * STRIDE + lane + WARP * j];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    const float p = __shfl_sync(ALL_LANES, s[r], t);
#pragma unroll
                    for (int j = 0; j < COLUMNS; ++j) o[r][j] += p * v[j];
                }
            }
        }
    }

#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
        const float total = warp_sum(sum[r]), scale = 1.0f / total;
        if (warp_row + r < work.n_rows) {
            if (lane == 0) lse.keep(warp_row + r, largest[r], total);
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                const int column = lane + WARP * j;
                if (column < work.head_dim) work.out[(warp_row + r) * work.out_stride + column] = from_f32<T>(o[r][j] * scale);
            }
        }
    }
}

template <typename T, int D>
__device__ inline void attention_fwd(const Work<T>& work, const Lse& lse, float scale_log2, unsigned char* shared) {
    constexpr bool MMA = sizeof(T) == 2 && D <= 128;
    // Else the whole block has nothing to do: its span is shorter than the longest.
    if (first_row_of_tile(MMA ? MMA_ROWS : PLAIN_ROWS) < work.n_rows) {
        if constexpr (MMA) {
            attention_mma<T, D>(work, lse, scale_log2, shared);
        } else {
            attention_plain<T, D>(work, lse, scale_log2, shared);
        }
    }
}

}  // namespace

#define INSTANCE_OF_WIDTH(T, suffix, D)                                                                                          \
    KERNEL(THREADS)                                                                                                              \
    attention_fwd_d##D##_##suffix(T* out, float* lse, const T* qkv, const T* k, const T* v, const int* spans, const int* pages,  \
                                  int n_heads, int n_kv_heads, int head_dim, int page_tokens, int causal, float scale_log2) {    \
        SHARED_MEMORY(shared);                                                                                                   \
        attention_fwd<T, D>(work_of_block(out, qkv, k, v, spans, pages, n_heads, n_kv_heads, head_dim, page_tokens, causal),     \
                            Lse{lse, spans}, scale_log2, shared);                                                                \
    }                                                                                                                            \
    REGISTER_KERNEL(attention_fwd_d##D##_##suffix)

#define INSTANCE(T, suffix)           \
    INSTANCE_OF_WIDTH(T, suffix, 64)  \
    INSTANCE_OF_WIDTH(T, suffix, 80)  \
    INSTANCE_OF_WIDTH(T, suffix, 96)  \
    INSTANCE_OF_WIDTH(T, suffix, 128) \
    INSTANCE_OF_WIDTH(T, suffix, 256)
FOR_EACH_DTYPE(INSTANCE)
