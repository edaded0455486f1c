// Cross-entropy of next tokens, and its gradient in place of the logits.
//
//   loss[r] = ln Σ_i exp(logits[r, i]) − logits[r, labels[r]]
//   logits[r] ← scale·(softmax(logits[r]) − onehot(labels[r]))
//
// Layouts: logits [rows, vocab], loss [rows] f32; labels [rows] i32, below vocab (checked in src/ops/check_grad.rs); any alignment of f32.
// One block a row. exp in f32; a thread's terms are added up in f32, those of threads in f64, always in one order: a row whose other logits are
// far below has the small loss that it has. NaN and +∞ give a loss of NaN. Reads logits three times, writes them with `=`.
// Shared memory: one f64 for each warp.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

// Each warp's `x` in `scratch`, to be read by all. It may be called again at once.
template <typename X> __device__ inline void share(X x, X* scratch) {
    __syncthreads();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    __syncthreads();
}

__device__ inline void cross_entropy(float* logits, float* loss, const int* labels, int vocab, float scale, unsigned char* shared) {
    begin_launch();
    float* const row = logits + size_t(blockIdx.x) * vocab;
    const int label = labels[blockIdx.x];
    const float at_label = row[label];

    float largest = -INFINITY;
    for (int i = threadIdx.x; i < vocab; i += THREADS) largest = fmaxf(largest, row[i]);
    float* const maxima = reinterpret_cast<float*>(shared);
    share(warp_max(largest), maxima);
    for (int i = 0; i < WARPS; ++i) largest = fmaxf(largest, maxima[i]);

    float part = 0.0f;
    for (int i = threadIdx.x; i < vocab; i += THREADS) part += expf(row[i] - largest);
    double sum = part;
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
    double* const sums = reinterpret_cast<double*>(shared);
    share(sum, sums);
    sum = 0.0;
    for (int i = 0; i < WARPS; ++i) sum += sums[i];

    const float factor = float(double(scale) / sum);
    for (int i = threadIdx.x; i < vocab; i += THREADS) {
        const float p = expf(row[i] - largest) * factor;
        row[i] = i == label ? p - scale : p;
    }
    if (threadIdx.x == 0) loss[blockIdx.x] = float(double(largest) - double(at_label) + log(sum));
}

}  // namespace

KERNEL(THREADS) cross_entropy_f32(float* logits, float* loss, const int* labels, int vocab, float scale) {
    SHARED_MEMORY(shared);
    cross_entropy(logits, loss, labels, vocab, scale, shared);
}
REGISTER_KERNEL(cross_entropy_f32)
