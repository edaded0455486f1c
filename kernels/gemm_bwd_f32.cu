// Gradients of linear layers in f32, with ordinary multiply-adds: the dtype for comparisons, not for speed.
//
// Products, layouts, grid and splits: as gemm_bwd.cu. Each sum in the order of terms, then of splits.
//
//   linear_dx_*, linear_dw_*   64 x 64 x 16: 19 KiB of shared memory at most
//   linear_*_small_*           32 x 32 x 16: 10 KiB
#include "gemm_bwd.cuh"

namespace {

constexpr int THREADS = 128;
// Terms of a step.
constexpr int K = 16;

// A block's tile is ROWS x COLS, a thread's 4 columns of M rows.
template <int ROWS_, int COLS_> struct Shape {
    static constexpr int ROWS = ROWS_, COLS = COLS_;
    static constexpr int THREAD_COLS = COLS / 4, M = ROWS / (THREADS / THREAD_COLS);
};

using Large = Shape<64, 64>;
using Small = Shape<32, 32>;

// Rows of COLS floats with 4 to spare, which keep float4 aligned and spread a column over the banks.
template <int COLS> struct Padded {
    static constexpr int STRIDE = COLS + 4;
    __device__ static int offset(int row, int chunk) { return row * STRIDE + chunk * 4; }
};

// A thread's share of a tile of packed rows.
template <int BITS, int ROWS, int COLS> struct PackedShare {
    static constexpr int COUNT = ROWS * COLS / THREADS;
    float values[COUNT];

    __device__ void load(const typename PackedRows<BITS>::Window& from) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int at = i * THREADS + int(threadIdx.x), row = at / COLS, col = from.col + at % COLS;
            values[i] = row < from.rows && col < from.w.k ? from.w.at(from.row + row, col) : 0.0f;
        }
    }
    __device__ void store(float* tile) const {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            const int at = i * THREADS + int(threadIdx.x);
            tile[at / COLS * Padded<COLS>::STRIDE + at % COLS] = values[i];
        }
    }
};

template <typename S, typename Right> struct RightShare {
    using Type = Share<float, K, S::COLS, THREADS, Padded<S::COLS>>;
};
template <typename S, int BITS> struct RightShare<S, PackedRows<BITS>> {
    using Type = PackedShare<BITS, K, S::COLS>;
};

template <typename T, typename S, bool TERMS_ARE_ROWS, typename Right>
__device__ inline void gemm_bwd(const Output<T>& out, const Left<T, TERMS_ARE_ROWS>& left, const Right& right, const Sum& sum, float* partial,
                                unsigned* arrived, unsigned char* shared) {
    // The left tile as it lies.
    constexpr int LEFT_ROWS = TERMS_ARE_ROWS ? K : S::ROWS, LEFT_COLS = TERMS_ARE_ROWS ? S::ROWS : K;
    constexpr int LEFT_STRIDE = Padded<LEFT_COLS>::STRIDE, RIGHT_STRIDE = Padded<S::COLS>::STRIDE;
    constexpr int LEFT = LEFT_ROWS * LEFT_STRIDE, STAGE = LEFT + K * RIGHT_STRIDE;
    begin_launch();
    const TilePlace<int> place(S::ROWS, S::COLS, out.tokens, Parts<int>{{0, 0, 0}, {out.n, 0, 0}});
    const int row = threadIdx.x / S::THREAD_COLS * S::M, col = threadIdx.x % S::THREAD_COLS * 4;
    float* const stages = reinterpret_cast<float*>(shared);
    float acc[S::M][4] = {};
    Share<float, LEFT_ROWS, LEFT_COLS, THREADS, Padded<LEFT_COLS>> left_share;
    typename RightShare<S, Right>::Type right_share;
    const auto load = [&](int step) {
        const Terms terms = sum.of_step(step, K);
        left_share.load(left.window(place.row, terms));
        right_share.load(right.window(place.col, terms));
    };
    const Steps steps(sum.n_steps(K), 1);
    if (steps.begin < steps.end) load(steps.begin);
    for (int step = steps.begin; step < steps.end; ++step) {
        // This stage was read two steps ago, and the barrier of the last step came after that.
        float* const stage = stages + step % 2 * STAGE;
        left_share.store(stage);
        right_share.store(stage + LEFT);
        __syncthreads();
        if (step + 1 < steps.end) load(step + 1);
#pragma unroll 4
        for (int term = 0; term < K; ++term) {
            const float4 b = *reinterpret_cast<const float4*>(stage + LEFT + term * RIGHT_STRIDE + col);
#pragma unroll
            for (int r = 0; r < S::M; ++r) {
                const float a = TERMS_ARE_ROWS ? stage[term * LEFT_STRIDE + row + r] : stage[(row + r) * LEFT_STRIDE + term];
                acc[r][0] += a * b.x;
                acc[r][1] += a * b.y;
                acc[r][2] += a * b.z;
                acc[r][3] += a * b.w;
            }
        }
    }
    if (!join_splits<THREADS>(acc, partial, arrived, reinterpret_cast<int*>(stages + 2 * STAGE))) return;
#pragma unroll
    for (int r = 0; r < S::M; ++r) out.put(place.row + row + r, place.col + col, acc[r]);
}

}  // namespace

DX_DENSE(linear_dx_f32, float, Large)
DX_DENSE(linear_dx_small_f32, float, Small)
DX_PACKED(linear_dx_packed4_f32, float, 4, Large)
DX_PACKED(linear_dx_packed8_f32, float, 8, Large)
DX_PACKED(linear_dx_small_packed4_f32, float, 4, Small)
DX_PACKED(linear_dx_small_packed8_f32, float, 8, Small)
DW(linear_dw_f32, float, Large)
DW(linear_dw_small_f32, float, Small)
