// Matrix products of f32, for any number of tokens, with ordinary multiply-adds: the dtype for comparisons, not for speed.
//
//   y[t, j] = epilogue(Σ_i x[t, i]·W[j, i] + bias[j])
//
// Layouts, grid and splits: as gemm.cu. x and y of f32, W of f32, any size, or of packed integers (packed.cuh). Each sum in the order of k,
// then of splits.
//
//   gemm_*        64 x 64 x 16: 17 KiB of shared memory
//   gemm_small_*  32 x 32 x 16: 9 KiB of shared memory
#include "gemm.cuh"
#include "packed.cuh"

namespace {

constexpr int THREADS = 128;
// A step along k: 16 neighbours are 64 bytes of a row, two whole sectors.
constexpr int K = 16;

// A block's tile is ROWS x COLS, a thread's 4 columns of M rows.
template <int ROWS_, int COLS_> struct Shape {
    static constexpr int ROWS = ROWS_, COLS = COLS_;
    static constexpr int THREAD_COLS = COLS / 4, M = ROWS / (THREADS / THREAD_COLS);
    // Shared memory has k outside and rows inside; 4 words to spare keep float4 aligned and spread a column's elements over the banks.
    static constexpr int X_STRIDE = ROWS + 4, W_STRIDE = COLS + 4;
    static constexpr int STAGE = K * (X_STRIDE + W_STRIDE);

    static_assert(THREADS % THREAD_COLS == 0 && ROWS % (THREADS / THREAD_COLS) == 0, "threads cover the tile");
    static_assert(M % 2 == 0, "rows are read as float2");
    static_assert(ROWS * K % THREADS == 0 && COLS * K % THREADS == 0, "every thread copies as many elements");
};

using Large = Shape<64, 64>;
using Small = Shape<32, 32>;

// The element of an operand, a matrix [any, k], at (row, col).
__device__ inline float element(const float* matrix, int row, int col, int k) { return matrix[size_t(row) * k + col]; }
template <int BITS> __device__ inline float element(const Packed<BITS>& matrix, int row, int col, int) { return matrix.at(row, col); }

// A thread's share of ROWS rows of an operand, on its way from global to shared memory.
template <int ROWS, int STRIDE> struct Slice {
    static constexpr int N = ROWS * K / THREADS;
    float values[N];

    template <typename Matrix> __device__ void load(const Matrix& from, int first_row, int n_rows, int k0, int k) {
        const int col = k0 + threadIdx.x % K, row0 = first_row + threadIdx.x / K;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            const int row = row0 + i * (THREADS / K);
            values[i] = row < n_rows && col < k ? element(from, row, col, k) : 0.0f;
        }
    }
    __device__ void store(float* to) const {
#pragma unroll
        for (int i = 0; i < N; ++i) to[threadIdx.x % K * STRIDE + threadIdx.x / K + i * (THREADS / K)] = values[i];
    }
};

template <typename S, typename W>
__device__ inline void gemm(const Output<float>& whole, const float* x, const Parts<W>& w, float* partial, unsigned* arrived, int k,
                            float* shared) {
    begin_launch();
    const TilePlace<W> place(S::ROWS, S::COLS, whole.tokens, w);
    const Output<float> out = whole.of(place.part);
    const int row = threadIdx.x / S::THREAD_COLS * S::M, col = threadIdx.x % S::THREAD_COLS * 4;
    const Steps steps(k, K);
    float acc[S::M][4] = {};
    Slice<S::ROWS, S::X_STRIDE> x_slice;
    Slice<S::COLS, S::W_STRIDE> w_slice;
    const auto load = [&](int step) {
        x_slice.load(x, place.row, out.tokens, step * K, k);
        w_slice.load(place.part.w, place.col, out.n, step * K, k);
    };
    if (steps.begin < steps.end) load(steps.begin);
    for (int step = steps.begin; step < steps.end; ++step) {
        // Two stages: this one was read two steps ago, and the barrier of the last step came after that.
        float* stage = shared + step % 2 * S::STAGE;
        x_slice.store(stage);
        w_slice.store(stage + K * S::X_STRIDE);
        __syncthreads();
        if (step + 1 < steps.end) load(step + 1);
#pragma unroll
        for (int i = 0; i < K; ++i) {
            const float4 b = *reinterpret_cast<const float4*>(stage + K * S::X_STRIDE + i * S::W_STRIDE + col);
#pragma unroll
            for (int r = 0; r < S::M; r += 2) {
                const float2 a = *reinterpret_cast<const float2*>(stage + i * S::X_STRIDE + row + r);
                const float column[2] = {a.x, a.y};
#pragma unroll
                for (int j = 0; j < 2; ++j) {
                    acc[r + j][0] += column[j] * b.x;
                    acc[r + j][1] += column[j] * b.y;
                    acc[r + j][2] += column[j] * b.z;
                    acc[r + j][3] += column[j] * b.w;
                }
            }
        }
    }
    if (!join_splits<THREADS>(acc, partial, arrived, reinterpret_cast<int*>(shared + 2 * S::STAGE))) return;
#pragma unroll
    for (int r = 0; r < S::M; ++r) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[r][j] += out.bias_of(place.col + col + j);
        out.put(place.row + row + r, place.col + col, acc[r]);
    }
}

}  // namespace

#define ARGUMENTS                                                                                                                   \
    const float *bias, float *partial, unsigned *arrived, int tokens, int n0, int n1, int n2, int k, int y_stride, int epilogue, \
        int y_is_f32
#define GEMM(S, W)                                                                                                 \
    SHARED_MEMORY(shared);                                                                                         \
    const Output<float> out = {y, bias, tokens, n0 + n1 + n2, size_t(y_stride), epilogue, y_is_f32 != 0};          \
    gemm<S>(out, x, W, partial, arrived, k, reinterpret_cast<float*>(shared))

#define INSTANCE(name, S)                                                                                                 \
    KERNEL(THREADS) name(void* y, const float* x, const float* w0, const float* w1, const float* w2, ARGUMENTS) {         \
        GEMM(S, (Parts<const float*>{{w0, w1, w2}, {n0, n1, n2}}));                                                       \
    }                                                                                                                     \
    REGISTER_KERNEL(name)
INSTANCE(gemm_f32, Large)
INSTANCE(gemm_small_f32, Small)

#define PACKED_INSTANCE(name, BITS, S)                                                                 \
    KERNEL(THREADS) name(void* y, const float* x, PACKED_POINTERS, ARGUMENTS, int group) {             \
        GEMM(S, PACKED_PARTS(BITS));                                                                   \
    }                                                                                                  \
    REGISTER_KERNEL(name)
PACKED_INSTANCE(gemm_packed4_f32, 4, Large)
PACKED_INSTANCE(gemm_packed8_f32, 8, Large)
PACKED_INSTANCE(gemm_small_packed4_f32, 4, Small)
PACKED_INSTANCE(gemm_small_packed8_f32, 8, Small)
