// How fast memory can be read: the peak that decoding is measured against.
//
//   probe_read_f32: sums[b] = Σ of the elements that block b reads
//
// Layouts: x [4 · n_vectors] f32, 16-byte aligned, sums [blocks] f32, contiguous; n_vectors below 2^31.
// Grid: any number of blocks, which take THREADS · UNROLL vectors in turn. Every element is read once, and the sums are there so that no
// load can be left out. Sums in f32, in an order that depends on n_vectors and the grid alone. Writes sums with `=`.
// Shared memory: one f32 for each warp.
#include "common.cuh"

namespace {

constexpr int THREADS = 256;
// Loads that a thread has under way: with 8 blocks on a multiprocessor 128 KB, four times what latency times bandwidth asks for.
constexpr int UNROLL = 4;

}  // namespace

KERNEL(THREADS) probe_read_f32(float* sums, const float* x, int n_vectors) {
    SHARED_MEMORY(shared);
    begin_launch();
    using Vector = Vec16<float>;
    const size_t n = n_vectors, step = size_t(gridDim.x) * THREADS * UNROLL;
    float sum = 0.0f;
    for (size_t first = size_t(blockIdx.x) * THREADS * UNROLL; first < n; first += step) {
        const size_t mine = first + threadIdx.x;
        Vector v[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
            const size_t i = mine + u * THREADS;
            v[u] = i < n ? Vector::load_streaming(x + i * Vector::N) : Vector{};
        }
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) sum += (v[u].get(0) + v[u].get(1)) + (v[u].get(2) + v[u].get(3));
    }
    sum = block_sum(sum, reinterpret_cast<float*>(shared));
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
REGISTER_KERNEL(probe_read_f32)
