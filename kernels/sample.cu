// Which token comes next, when the most probable one is wanted: so that logits need not leave the device.
//
//   argmax_fwd: ids[row] = the first i whose logits[row, i] is the largest; −1 if the row holds NaN
//
// Layouts: logits [rows, vocab] f32, ids [rows] i32, contiguous; any vocab.
// Grid: one block a row. Ties go to the lower index however the threads share the row: results are the same from run to run.
// Writes ids with `=`. Shared memory: one f32 and one i32 for each warp.
#include "common.cuh"

namespace {

// As many as there can be: a row of 32000 is read by one multiprocessor, and takes as long as its loads wait for memory.
constexpr int THREADS = 1024;

// A logit and its index; NaN is (∞, −1), which no other beats.
struct Candidate {
    float logit;
    int index;
};

__device__ inline Candidate candidate(float logit, int index) {
    if (logit != logit) return {INFINITY, -1};
    return {logit, index};
}

__device__ inline Candidate better(Candidate a, Candidate b) {
    return b.logit > a.logit || (b.logit == a.logit && b.index < a.index) ? b : a;
}

__device__ inline Candidate warp_best(Candidate best) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) {
        const float logit = __shfl_xor_sync(ALL_LANES, best.logit, offset);
        const int index = __shfl_xor_sync(ALL_LANES, best.index, offset);
        best = better(best, {logit, index});
    }
    return best;
}

}  // namespace

KERNEL(THREADS) argmax_fwd_f32(int* ids, const float* logits, int vocab) {
    SHARED_MEMORY(shared);
    begin_launch();
    constexpr int N_WARPS = THREADS / WARP, N = Vec16<float>::N;
    static_assert(N_WARPS == WARP, "one warp takes the best of all warps");
    float* warp_logits = reinterpret_cast<float*>(shared);
    int* warp_indices = reinterpret_cast<int*>(warp_logits + N_WARPS);
    const float* row = logits + size_t(blockIdx.x) * vocab;

    // Worse than any element, −∞ included.
    Candidate best = {-INFINITY, 0x7fffffff};
    if (vocab % N == 0 && is_aligned16(row)) {
        for (int i = threadIdx.x * N; i < vocab; i += THREADS * N) {
            const Vec16<float> v = Vec16<float>::load(row + i);
#pragma unroll
            for (int j = 0; j < N; ++j) best = better(best, candidate(v.get(j), i + j));
        }
    } else {
        for (int i = threadIdx.x; i < vocab; i += THREADS) best = better(best, candidate(row[i], i));
    }

    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    best = warp_best(best);
    if (lane == 0) {
        warp_logits[warp] = best.logit;
        warp_indices[warp] = best.index;
    }
    __syncthreads();
    if (warp == 0) {
        best = warp_best({warp_logits[lane], warp_indices[lane]});
        if (lane == 0) ids[blockIdx.x] = best.index;
    }
}
REGISTER_KERNEL(argmax_fwd_f32)
