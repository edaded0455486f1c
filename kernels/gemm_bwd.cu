// Gradients of linear layers on tensor cores, for 16-bit dtypes. (f32: gemm_bwd_f32.cu.)
//
//   linear_dx_*:           dx[t, i] = epilogue(Σ_j dy[t, j]·W[j, i]), W dense
//   linear_dx_packed{4,8}_*: the same with packed integers (packed.cuh), which become T on their way to shared memory
//   linear_dw_*:           dW[j, i] += Σ_t dy[t, j]·x[t, i]
//
// Layouts: dy [tokens, dy_stride], of which n columns from the pointer on are read; x, dx [tokens, k], W [n, k] of T, or in parts; dW [n, k] f32.
// Any size and any alignment of T; where rows are not 16-byte aligned they are read by elements.
// Grid: (tiles, splits), as gemm.cu. The operands of the next step wait in registers while those of this one are multiplied: two stages.
// Sums in f32, in the order of terms within a split and then of splits: the same from run to run. dx is rounded once.
//
//                                  tile and step   shared memory
//   linear_dx_*, linear_dw_*       128 x 128 x 32  32 KiB
//   linear_*_small_*                64 x 64 x 64   32 KiB
#include "gemm_bwd.cuh"
#include "gemm_tile.cuh"

namespace {

// The stages of `Shape` are those of gemm.cu: here there are two.
using Large = Shape<128, 128, 32, 4, 2>;
using Small = Shape<64, 64, 64, 3, 2>;

// Rows of COLS elements, swizzled so that the chunks of 8 neighbouring rows that ldmatrix reads at once lie in all banks.
template <int COLS> struct Swizzled {
    static constexpr int CHUNKS = COLS / CHUNK;
    static_assert(CHUNKS == 4 || CHUNKS % 8 == 0, "the swizzle permutes within 64 or 128 bytes");
    __device__ static int offset(int row, int chunk) { return row * COLS + (chunk ^ (CHUNKS == 4 ? row / 2 % 4 : row % 8)) * CHUNK; }
};

// A thread's share of a tile of packed rows: one row's part of a slab, as integers until it is stored.
template <typename T, int BITS, int ROWS, int COLS> struct PackedShare {
    static constexpr int SLABS = COLS / SLAB;
    static_assert(ROWS * SLABS == THREADS, "every thread has one part");
    static_assert(ROWS % BLOCK_ROWS == 0, "tiles begin with blocks");
    uint4 words[BITS / 4];
    Scale<BITS, T> scale;
    bool real;

    __device__ static int row() { return threadIdx.x / (BLOCK_ROWS * SLABS) * BLOCK_ROWS + threadIdx.x % BLOCK_ROWS; }
    __device__ static int slab() { return threadIdx.x / BLOCK_ROWS % SLABS; }

    __device__ void load(const typename PackedRows<BITS>::Window& from) {
        const int at = from.col / SLAB + slab(), block = (from.row + row()) / BLOCK_ROWS, within = row() % BLOCK_ROWS;
        real = row() < from.rows && at < from.w.n_slabs();
        if (!real) return;
        const int* p = from.w.words + ((size_t(block) * from.w.n_slabs() + at) * BLOCK_ROWS + within) * BITS;
#pragma unroll
        for (int i = 0; i < BITS / 4; ++i) words[i] = Vec16<int>::load_streaming(p + 4 * i).raw;
        scale = from.w.template scale<T>(block, at, within);
    }

    __device__ void store(T* tile) const {
        // Of each word the four weights of its bytes; of 4 bits those of the low halves first, then of the high ones.
#pragma unroll
        for (int chunk = 0; chunk < SLAB / CHUNK; ++chunk) {
            Vec16<T> v = {};
            if (real) {
                const uint4 four = words[BITS == 8 ? chunk / 2 : 0];
                const bool upper = chunk % 2, high = BITS == 4 && chunk >= 2;
                uint32_t a[2], b[2];
                scale.weights(a, four_of<BITS>(upper ? four.z : four.x, high));
                scale.weights(b, four_of<BITS>(upper ? four.w : four.y, high));
                v.raw = {a[0], a[1], b[0], b[1]};
            }
            v.store(tile + Swizzled<COLS>::offset(row(), slab() * (SLAB / CHUNK) + chunk));
        }
    }
};

// How the tiles of a kernel come and lie.
template <typename T, typename S, typename Right> struct RightShare {
    using Type = Share<T, S::K, S::COLS, THREADS, Swizzled<S::COLS>>;
};
template <typename T, typename S, int BITS> struct RightShare<T, S, PackedRows<BITS>> {
    using Type = PackedShare<T, BITS, S::K, S::COLS>;
};

// Multiplies the tiles of a stage: 16 terms at a time.
template <typename T, typename S, bool TERMS_ARE_ROWS> __device__ inline void multiply(float (&acc)[S::M * S::N][4], const T* left, const T* right) {
    const int lane = threadIdx.x % WARP, eight = lane % 8, matrix = lane / 8;
    // Unrolled, it would take more registers than there are.
#pragma unroll 1
    for (int term = 0; term < S::K; term += 16) {
        uint32_t a[S::M][4];
#pragma unroll
        for (int i = 0; i < S::M; ++i) {
            const int row = S::warp_row() + 16 * i;
            if (TERMS_ARE_ROWS) {
                ldmatrix_x4_trans(a[i], left + Swizzled<S::ROWS>::offset(term + matrix / 2 * 8 + eight, row / CHUNK + matrix % 2));
            } else {
                ldmatrix_x4(a[i], left + Swizzled<S::K>::offset(row + matrix % 2 * 8 + eight, term / CHUNK + matrix / 2));
            }
        }
#pragma unroll
        for (int j = 0; j < S::N; j += 2) {
            uint32_t b[4];
            const int col = S::warp_col() + 8 * j;
            ldmatrix_x4_trans(b, right + Swizzled<S::COLS>::offset(term + matrix % 2 * 8 + eight, col / CHUNK + matrix / 2));
            const uint32_t low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
            for (int i = 0; i < S::M; ++i) {
                mma_m16n8k16<T>(acc[i * S::N + j], a[i], low);
                mma_m16n8k16<T>(acc[i * S::N + j + 1], a[i], high);
            }
        }
    }
}

template <typename T, typename S, bool TERMS_ARE_ROWS, typename Right>
__device__ inline void gemm_bwd(const Output<T>& out, const Left<T, TERMS_ARE_ROWS>& left, const Right& right, const Sum& sum, float* partial,
                                unsigned* arrived, unsigned char* shared) {
    constexpr int LEFT = S::ROWS * S::K, STAGE = LEFT + S::K * S::COLS;
    begin_launch();
    // The columns of the result have no parts.
    const TilePlace<int> place(S::ROWS, S::COLS, out.tokens, Parts<int>{{0, 0, 0}, {out.n, 0, 0}});
    T* const stages = reinterpret_cast<T*>(shared);
    float acc[S::M * S::N][4] = {};
    Share<T, TERMS_ARE_ROWS ? S::K : S::ROWS, TERMS_ARE_ROWS ? S::ROWS : S::K, THREADS, Swizzled<TERMS_ARE_ROWS ? S::ROWS : S::K>> left_share;
    typename RightShare<T, S, Right>::Type right_share;
    const auto load = [&](int step) {
        const Terms terms = sum.of_step(step, S::K);
        left_share.load(left.window(place.row, terms));
        right_share.load(right.window(place.col, terms));
    };
    const Steps steps(sum.n_steps(S::K), 1);
    if (steps.begin < steps.end) load(steps.begin);
    for (int step = steps.begin; step < steps.end; ++step) {
        // This stage was read two steps ago, and the barrier of the last step came after that.
        T* const stage = stages + step % 2 * STAGE;
        left_share.store(stage);
        right_share.store(stage + LEFT);
        __syncthreads();
        if (step + 1 < steps.end) load(step + 1);
        multiply<T, S, TERMS_ARE_ROWS>(acc, stage, stage + LEFT);
    }
    __syncthreads();
    finish_tile<S, 2 * STAGE * sizeof(T)>(acc, out, place, partial, arrived, shared);
}

}  // namespace

#define INSTANCE(T, suffix)                              \
    DX_DENSE(linear_dx_##suffix, T, Large)               \
    DX_DENSE(linear_dx_small_##suffix, T, Small)         \
    DX_PACKED(linear_dx_packed4_##suffix, T, 4, Large)   \
    DX_PACKED(linear_dx_packed8_##suffix, T, 8, Large)   \
    DX_PACKED(linear_dx_small_packed4_##suffix, T, 4, Small) \
    DX_PACKED(linear_dx_small_packed8_##suffix, T, 8, Small) \
    DW(linear_dw_##suffix, T, Large)                     \
    DW(linear_dw_small_##suffix, T, Small)
FOR_EACH_HALF(INSTANCE)
