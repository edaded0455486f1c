// Matrix products on tensor cores with packed integer weights, for 16-bit x and any number of tokens. (f32: gemm_f32.cu. Few tokens:
// gemv_packed.cu.)
//
//   y[t, j] = epilogue(Σ_i x[t, i]·W[j, i] + bias[j]),  W = s·q + o (packed.cuh), rounded to T
//
// Layouts: W as packed.cuh says, in up to three parts; x [tokens, k] of T, aligned to 16 bytes; bias [n] of f32 or null; y rows of
// `y_stride` elements of T or f32, of which n are written (epilogue, parts: gemm.cuh).
// Grid, splits and sums: as gemm.cu. Integers, scales and x come to shared memory by asynchronous copies, several steps ahead; integers
// become operands in registers, those of the next 8 columns of y while the products of these are under way.
//
//                          tile and step   stages   shared memory (4 bits, 8)   registers (sm_90a)   blocks on a multiprocessor of 228 KiB
//   gemm_packed*_*         128 x 128 x 64  3        63, 75 KiB                  254                  2
//   gemm_small_packed*_*    64 x 64 x 64   4        42, 50 KiB                  96 to 120            4
#include "gemm_tile.cuh"
#include "packed_tile.cuh"

namespace {

// As in gemm.cu. A warp has all rows of its columns, so that no other warp of the block makes operands of the same integers.
using Large = Shape<128, 128, 64, 3, 1>;
// A stage more than there, since it is small: for few tokens what counts is how much is under way.
using Small = Shape<64, 64, 64, 4, 1>;

// What a lane has of a slab: of each of its N columns of y the integers of 8 columns of x, those that an A fragment gives the lane of two
// 16-wide steps. Columns 2·pair and the next are half a word, as are those 8 on; with 4 bits, the same words have the columns 16 on.
template <int BITS, typename S, typename T> struct LaneSlab {
    using From = Stage<BITS, S>;
    uint32_t bytes[S::N][From::PIECES];
    Scale<BITS, T> scales[S::N];

    __device__ void load(const unsigned char* stage, int slab, bool has_offsets) {
        const int lane = threadIdx.x % WARP, group = lane / 4, pair = lane % 4;
#pragma unroll
        for (int j = 0; j < S::N; ++j) {
            const int col = S::warp_col() + j * 8 + group;
#pragma unroll
            for (int i = 0; i < From::PIECES; ++i) {
                const uint32_t* piece = reinterpret_cast<const uint32_t*>(stage + From::piece(slab, col, i)) + pair / 2;
                bytes[j][i] = __byte_perm(piece[0], piece[2], pair % 2 ? 0x7632 : 0x5410);
            }
            const auto scale = [&](int at) { return to_f32(reinterpret_cast<const f16*>(stage + at)[slab * S::COLS + col]); };
            const float s = scale(From::SCALES);
            scales[j] = has_offsets ? Scale<BITS, T>::with_offset(s, scale(From::OFFSETS)) : Scale<BITS, T>::symmetric(s);
        }
    }

    // The B fragment of column block j, in the first or the second step of the slab.
    __device__ void fragment(uint32_t (&b)[2], int j, int step) const {
        scales[j].weights(b, four_of<BITS>(bytes[j][BITS == 8 ? step : 0], step == 1));
    }
};

// Sums a split of the tile at `place`. Ends with all warps done with shared memory and all copies landed.
template <int BITS, typename S, typename T>
__device__ inline void multiply(float (&acc)[S::M * S::N][4], const T* x, const TilePlace<Packed<BITS>>& place, int tokens,
                                unsigned char* stages) {
    using At = Stage<BITS, S>;
    const Packed<BITS>& w = place.part.w;
    const bool has_offsets = w.offsets != nullptr;
    const Steps steps(w.k, S::K);
    const int first_col = steps.begin * S::K;
    Copier<T, S, S::ROWS> x_copier(x, place.row, tokens, first_col, w.k);
    PackedCopier<BITS, S> w_copier(w, place.part.n, place.col, first_col / SLAB);
    int cols_left = w.k - first_col - threadIdx.x % S::CHUNKS * CHUNK;
    const auto copy = [&](int step, unsigned char* stage) {
        if (step < steps.end) {
            x_copier.copy(reinterpret_cast<T*>(stage), max(0, min(CHUNK, cols_left)), true);
            w_copier.copy(stage);
            cols_left -= S::K;
        }
        // Empty groups too, so that a step's group has the same distance from the last at the end of k as before.
        async_copy_commit();
    };
    unsigned char* const last = stages + (S::STAGES - 1) * At::BYTES;
    const auto next = [&](unsigned char* stage) { return stage == last ? stages : stage + At::BYTES; };
#pragma unroll
    for (int i = 0; i < S::STAGES - 1; ++i) copy(steps.begin + i, stages + i * At::BYTES);
    async_copy_wait<S::STAGES - 2>();
    __syncthreads();

    // Of a 16-wide step, all rows are multiplied with one column block, then with the next. While the products of a block are under way, the
    // next one's integers become its operands; after the last block, each A fragment makes room for the next step's.
    const int a_at = S::a_offset();
    unsigned char *reading = stages, *writing = last;
    uint32_t a[S::M][4], b[2][2];
    LaneSlab<BITS, S, T> slab;
    const auto load_a = [&](int i, int inner) {
        ldmatrix_x4(a[i], reinterpret_cast<const T*>(reading) + (a_at ^ inner * 16) + i * 16 * S::K);
    };
    constexpr int N_INNER = S::K / 16;
    static_assert(S::N % 2 == 0, "the operands of the next block are those that this one has not");
    slab.load(reading, 0, has_offsets);
    slab.fragment(b[0], 0, 0);
#pragma unroll
    for (int i = 0; i < S::M; ++i) load_a(i, 0);
    for (int step = steps.begin; step < steps.end; ++step) {
#pragma unroll
        for (int inner = 0; inner < N_INNER; ++inner) {
#pragma unroll
            for (int j = 0; j < S::N; ++j) {
                const bool is_last = j == S::N - 1;
                const int next_inner = is_last ? (inner + 1) % N_INNER : inner;
                if (is_last && next_inner == 0) {
                    // The next stage has landed, and nobody will read this one any more: the copies of the next step may overwrite it.
                    async_copy_wait<S::STAGES - 2>();
                    __syncthreads();
                    reading = next(reading);
                }
                if (is_last && next_inner % 2 == 0) slab.load(reading, next_inner / 2, has_offsets);
                slab.fragment(b[(j + 1) % 2], (j + 1) % S::N, next_inner % 2);
#pragma unroll
                for (int i = 0; i < S::M; ++i) {
                    mma_m16n8k16<T>(acc[i * S::N + j], a[i], b[j % 2]);
                    if (is_last) load_a(i, next_inner);
                }
                if (inner == 0 && j == 0) {
                    copy(step + S::STAGES - 1, writing);
                    writing = next(writing);
                }
            }
        }
    }
    // No copy is under way: the wait of the last step was for a group that comes after all of them, an empty one.
    __syncthreads();
}

template <int BITS, typename S, typename T>
__device__ inline void gemm(const Output<T>& out, const T* x, const Parts<Packed<BITS>>& w, float* partial, unsigned* arrived,
                            unsigned char* shared) {
    begin_launch();
    const TilePlace<Packed<BITS>> place(S::ROWS, S::COLS, out.tokens, w);
    float acc[S::M * S::N][4] = {};
    multiply<BITS, S>(acc, x, place, out.tokens, shared);
    finish_tile<S, S::STAGES * Stage<BITS, S>::BYTES>(acc, out, place, partial, arrived, shared);
}

}  // namespace

#define INSTANCE_OF(name, BITS, T, S)                                                                                               \
    KERNEL(THREADS) name(void* y, const T* x, PACKED_POINTERS, const float* bias, float* partial, unsigned* arrived, int tokens,    \
                         int n0, int n1, int n2, int k, int y_stride, int epilogue, int y_is_f32, int group) {                      \
        SHARED_MEMORY(shared);                                                                                                      \
        const Output<T> out = {y, bias, tokens, n0 + n1 + n2, size_t(y_stride), epilogue, y_is_f32 != 0};                           \
        gemm<BITS, S>(out, x, PACKED_PARTS(BITS), partial, arrived, shared);                                                        \
    }                                                                                                                               \
    REGISTER_KERNEL(name)
#define INSTANCE(T, suffix)                                \
    INSTANCE_OF(gemm_packed4_##suffix, 4, T, Large)        \
    INSTANCE_OF(gemm_packed8_##suffix, 8, T, Large)        \
    INSTANCE_OF(gemm_small_packed4_##suffix, 4, T, Small)  \
    INSTANCE_OF(gemm_small_packed8_##suffix, 8, T, Small)
FOR_EACH_HALF(INSTANCE)
