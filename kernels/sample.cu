// Which token comes next, so that logits need not leave the device: sampling as src/ops/sample.rs defines it, in whole numbers.
//
//   sample_fwd: ids[row] = the token drawn from logits[row] by draws[row], and its bit in seen[row] is set; −1 if the row holds NaN
//
//   weight w_i = ⌊2^(30 − t)⌋, at most 2^30 − 1, t = (max − l_i)·scale, l_i being penalised where seen
//   kept       = tokens down to a cut in the order (weight down, index up): the narrowest of top-k's, top-p's and min-p's
//   drawn      = the first i with Σ_{j ≤ i, kept} w_j > random · Σ_{kept} w_j / 2^64
//
// Layouts: logits [rows, vocab] f32, ids [rows] i32, seen [rows, ⌈vocab/32⌉] u32, draws [rows, DRAW_WORDS] i32 as read_draw has them;
// contiguous; any vocab.
// Grid: one block a row. Weights are computed anew in each pass over the row: that is cheaper than to store them.
// Sums are of whole numbers: results are the same however threads share the row, and the same as the CPU's. Logits and weights need each
// f32 operation rounded by itself: they are written with the __f*_rn functions, which nvcc does not fuse.
// Writes ids with `=`, seen with `|=`. Shared memory: see Shared.
#include "common.cuh"

namespace {

using u64 = unsigned long long;

// As many as there can be: a row of 32000 is read by one multiprocessor, and takes as long as its loads wait for memory.
constexpr int THREADS = 1024;
constexpr int N_WARPS = THREADS / WARP;

constexpr int WEIGHT_BITS = 30;
constexpr unsigned MAX_WEIGHT = (1u << WEIGHT_BITS) - 1;
// A weight is found digit by digit, in a histogram with a bin for each thread.
constexpr int DIGIT_BITS = 10, N_DIGITS = 1 << DIGIT_BITS;
static_assert(N_DIGITS == THREADS && WEIGHT_BITS % DIGIT_BITS == 0, "a thread clears one bin, digits make up a weight");

constexpr int DRAW_WORDS = 8;

struct Draw {
    float scale;          // log2(e) / temperature; infinite: the largest logit is taken
    float penalty;        // of tokens seen
    int top_k;            // 0: all
    unsigned min_weight;  // of min-p
    u64 top_p;            // a fraction of 2^64; 0: all
    u64 random;           // a fraction of 2^64
};

__device__ inline u64 two_words(const int* low) { return u64(unsigned(low[1])) << 32 | unsigned(low[0]); }

__device__ inline Draw read_draw(const int* words) {
    return {__uint_as_float(words[0]), __uint_as_float(words[1]), words[2], unsigned(words[3]), two_words(words + 4), two_words(words + 6)};
}

struct Shared {
    u64 totals[N_WARPS];
    unsigned bins_low[N_DIGITS], bins_high[N_DIGITS];  // halves of the sums of digits: see add_to_bin
    float warp_logits[N_WARPS];
    int warp_indices[N_WARPS];
};

// ---------------------------------------------------------------- logits and weights

// A row of logits.
struct Row {
    const float* logits;
    const unsigned* seen;
    int vocab;
    float penalty, scale, max;

    __device__ float logit(int i) const {
        const float l = logits[i];
        if (penalty == 1.0f || !(seen[i / 32] >> (i % 32) & 1)) return l;
        return l > 0.0f ? __fdiv_rn(l, penalty) : __fmul_rn(l, penalty);
    }

    __device__ unsigned weight(int i) const {
        const float l = logit(i);
        // Infinite ones are equal too, and have no difference. At 31 the weight is 0; fminf takes NaN, of two infinite extremes, there too.
        const float t = l == max ? 0.0f : fminf(__fmul_rn(__fsub_rn(max, l), scale), WEIGHT_BITS + 1.0f);
        const int octaves = int(t);
        const float f = __fsub_rn(t, float(octaves));
        // (2^−f − 1)/f, as in src/ops/sample.rs
        float q = 0.000114919952f;
        q = __fadd_rn(__fmul_rn(q, f), -0.00129163684f);
        q = __fadd_rn(__fmul_rn(q, f), 0.00959703512f);
        q = __fadd_rn(__fmul_rn(q, f), -0.0554992296f);
        q = __fadd_rn(__fmul_rn(q, f), 0.24022609f);
        q = __fadd_rn(__fmul_rn(q, f), -0.693147182f);
        const float power = __uint_as_float(unsigned(127 + WEIGHT_BITS - octaves) << 23);  // 2^(30 − octaves)
        return min(unsigned(__fmul_rn(__fadd_rn(__fmul_rn(q, f), 1.0f), power)), MAX_WEIGHT);
    }
};

// ---------------------------------------------------------------- the largest logit

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

// The first of the largest logits; the same in all threads.
__device__ inline Candidate block_best(const Row& row, Shared& shared) {
    Candidate best = {-INFINITY, 0x7fffffff};  // worse than any token, −∞ included
    for (int i = threadIdx.x; i < row.vocab; i += THREADS) best = better(best, candidate(row.logit(i), i));
    static_assert(N_WARPS == WARP, "a warp takes the best of all warps");
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    best = warp_best(best);
    if (lane == 0) {
        shared.warp_logits[warp] = best.logit;
        shared.warp_indices[warp] = best.index;
    }
    __syncthreads();
    return warp_best({shared.warp_logits[lane], shared.warp_indices[lane]});
}

// ---------------------------------------------------------------- running sums

__device__ inline u64 warp_total(u64 x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

// Σ over this lane and those below it.
__device__ inline u64 warp_running(u64 x) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int offset = 1; offset < WARP; offset *= 2) {
        const u64 below = __shfl_up_sync(ALL_LANES, x, offset);
        if (lane >= offset) x += below;
    }
    return x;
}

// A place in a sequence, and the sum of what comes before it.
struct Place {
    int index;
    u64 before;
};

// The first of n items at which the running sum of value(i) exceeds target(total); (n, total) if it never does. The same in all threads.
// Each warp sums a 32nd of the items, then a 32nd of the part where the sum is exceeded, until that is one item.
template <typename Value, typename Target> __device__ inline Place block_find(int n, Value value, Target target, Shared& shared) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int begin = 0, end = n;
    u64 before = 0, wanted = 0;
    for (;;) {
        const int part = ceil_div(end - begin, N_WARPS);
        const int last = min(begin + (warp + 1) * part, end);
        u64 sum = 0;
        for (int i = begin + warp * part + lane; i < last; i += WARP) sum += value(i);
        sum = warp_total(sum);
        __syncthreads();  // the totals of the round or call before have been read
        if (lane == 0) shared.totals[warp] = sum;
        __syncthreads();
        const u64 running = before + warp_running(shared.totals[lane]);
        if (end - begin == n) {
            const u64 total = __shfl_sync(ALL_LANES, running, WARP - 1);
            wanted = target(total);
            if (total <= wanted) return {n, total};
        }
        const int found = __ffs(__ballot_sync(ALL_LANES, running > wanted)) - 1;
        const u64 below = __shfl_sync(ALL_LANES, running, max(found - 1, 0));
        if (found > 0) before = below;
        begin += found * part;
        end = min(begin + part, end);
        if (part == 1) return {begin, before};
    }
}

// ---------------------------------------------------------------- cuts

// The least probable token that is kept: those of larger weight are, and of its own weight those up to its index.
struct Cut {
    unsigned weight;
    int last;

    __device__ bool keeps(unsigned w, int i) const { return w > weight || (w == weight && i <= last); }
};

// Adds x to a bin. GPUs add 32 bits to shared memory at once, but 64 bits only by trying again whenever another thread came first. So the
// halves are added to by themselves: whoever makes the lower one overflow carries, and the sum is the same in whatever order they come.
__device__ inline void add_to_bin(Shared& shared, unsigned digit, unsigned x) {
    const unsigned before = atomicAdd(&shared.bins_low[digit], x);
    if (before + x < before) atomicAdd(&shared.bins_high[digit], 1u);
}

// What a filter adds up along the order: tokens (top-k), or their weights (top-p).
enum class Measure { Tokens, Weights };

// The cut at which the sum over what is kept reaches `needed`, 1 or more and at most the sum over all tokens.
template <Measure MEASURE> __device__ inline Cut find_cut(const Row& row, u64 needed, Shared& shared) {
    unsigned weight = 0;  // its digits so far
    for (int shift = WEIGHT_BITS - DIGIT_BITS; shift >= 0; shift -= DIGIT_BITS) {
        shared.bins_low[threadIdx.x] = shared.bins_high[threadIdx.x] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < row.vocab; i += THREADS) {
            const unsigned w = row.weight(i), digit = w >> shift & (N_DIGITS - 1);
            // Digit 0 needs no bin: if the others do not reach, it is there. Most tokens have it, and would queue for the bin.
            if (digit != 0 && (w ^ weight) >> (shift + DIGIT_BITS) == 0)
                add_to_bin(shared, digit, MEASURE == Measure::Tokens ? 1 : w);
        }
        __syncthreads();
        const auto bin = [&](int i) {  // the largest digit first
            const int digit = N_DIGITS - 1 - i;
            return u64(shared.bins_high[digit]) << 32 | shared.bins_low[digit];
        };
        const Place place = block_find(N_DIGITS - 1, bin, [&](u64) { return needed - 1; }, shared);
        weight |= unsigned(N_DIGITS - 1 - place.index) << shift;
        needed -= place.before;
    }
    if (MEASURE == Measure::Weights) needed = (needed + weight - 1) / weight;
    const auto equals = [&](int i) { return u64(row.weight(i) == weight); };
    return {weight, block_find(row.vocab, equals, [&](u64) { return needed - 1; }, shared).index};
}

// ⌈share·total / 2^64⌉
__device__ inline u64 reaches(u64 total, u64 share) { return __umul64hi(total, share) + (total * share != 0); }

__device__ inline int sample(Row& row, const Draw& draw, Shared& shared) {
    const Candidate best = block_best(row, shared);
    if (best.index < 0 || isinf(draw.scale)) return best.index;
    row.max = best.logit;
    Cut cut = {0, row.vocab};
    const auto kept = [&](int i) {
        const unsigned w = row.weight(i);
        return cut.keeps(w, i) ? u64(w) : u64(0);
    };
    if (draw.top_k > 0) cut = find_cut<Measure::Tokens>(row, draw.top_k, shared);
    if (draw.top_p > 0) {
        const u64 total = block_find(row.vocab, kept, [](u64 total) { return total; }, shared).before;
        cut = find_cut<Measure::Weights>(row, reaches(total, draw.top_p), shared);
    }
    if (draw.min_weight > cut.weight) cut = {draw.min_weight, row.vocab};
    return block_find(row.vocab, kept, [&](u64 total) { return __umul64hi(total, draw.random); }, shared).index;
}

}  // namespace

KERNEL(THREADS) sample_fwd_f32(int* ids, const float* logits, unsigned* seen, const int* draws, int vocab) {
    SHARED_MEMORY(memory);
    begin_launch();
    const size_t r = blockIdx.x;
    const Draw draw = read_draw(draws + r * DRAW_WORDS);
    unsigned* row_seen = seen + r * ceil_div(vocab, 32);
    Row row = {logits + r * vocab, row_seen, vocab, draw.penalty, draw.scale, 0.0f};
    const int id = sample(row, draw, *reinterpret_cast<Shared*>(memory));
    // All threads have passed a barrier since they last read `seen`.
    if (threadIdx.x == 0) {
        ids[r] = id;
        if (id >= 0) row_seen[id / 32] |= 1u << (id % 32);
    }
}
REGISTER_KERNEL(sample_fwd_f32)
