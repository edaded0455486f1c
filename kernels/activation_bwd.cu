// Activation functions by themselves, where training keeps their input, and the gradients of those and of the gate.
//
//   silu_mul_bwd: d_gate = dy ⊙ up ⊙ silu′(gate),  d_up = dy ⊙ silu(gate),   silu′(g) = σ(g) + g·σ(g)·(1 − σ(g))
//   activate_fwd: y = f(x);   activate_bwd: dx = dy ⊙ f′(x)
//                 gelu′(x) = Φ(x) + x·φ(x);   quick_gelu′(x) = s + z·s·(1 − s), s = σ(z), z = 1.702 x
//   dropout_fwd:  y = x·scale, or 0 where the random bits of an element are below `threshold`
//   scale_fwd:    x = factor·x
//
// Layouts: gate_up, d_gate_up [rows, 2·n] of T, a row being gate, then up; dy [rows, n]; else n elements of T in a row. All contiguous; any n,
// any alignment of T. Grid: silu_mul_bwd one block for each row (x) and THREADS vectors of it (y); else x one block for each THREADS vectors.
// In f32, rounded once. Writes with `=`. No shared memory.
//
// Dropout's bits are those of src/ops/dropout.rs: Philox4x32-10 (Salmon et al., SC11), element i having word i % 4 of block i / 4.
#include "common.cuh"

namespace {

constexpr int THREADS = 128;

// σ(x), and 1 − σ(x) as exact as that.
struct Sigmoid {
    float s, rest;

    __device__ explicit Sigmoid(float x) {
        const float e = expf(-fabsf(x)), larger = 1.0f / (1.0f + e), smaller = e * larger;
        s = x > 0.0f ? larger : smaller;
        rest = x > 0.0f ? smaller : larger;
    }
    // The derivative of x·σ(x).
    __device__ float slope(float x) const { return s + x * s * rest; }
};

template <typename T> __device__ inline void silu_mul_bwd(T* d_gate_up, const T* dy, const T* gate_up, int n) {
    constexpr int N = Vec16<T>::N;
    begin_launch();
    const size_t row = blockIdx.x;
    const int i = (blockIdx.y * THREADS + threadIdx.x) * N, left = min(N, n - i);
    if (left <= 0) return;
    const bool vectors = n % N == 0 && is_aligned16(d_gate_up) && is_aligned16(dy) && is_aligned16(gate_up);
    const T* in = gate_up + row * 2 * n + i;
    T* out = d_gate_up + row * 2 * n + i;
    const Vec16<T> gate = load_some(in, left, vectors), up = load_some(in + n, left, vectors);
    const Vec16<T> d = load_some(dy + row * n + i, left, vectors);
    Vec16<T> d_gate = {}, d_up = {};
#pragma unroll
    for (int j = 0; j < N; ++j) {
        const float g = gate.get(j);
        const Sigmoid sigmoid(g);
        d_gate.set(j, d.get(j) * up.get(j) * sigmoid.slope(g));
        d_up.set(j, d.get(j) * g * sigmoid.s);
    }
    store_some(out, d_gate, left, vectors);
    store_some(out + n, d_up, left, vectors);
}

// y[i + j] = f(i, j, x[i + j], dy[i + j]) for the elements of this thread, the first of which is i; without dy it is zero.
template <typename T, typename F> __device__ inline void map(T* y, const T* x, const T* dy, int n, F f) {
    constexpr int N = Vec16<T>::N;
    begin_launch();
    const long long first = (static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x) * N;
    if (first >= n) return;
    const int i = int(first), left = min(N, n - i);
    const bool vectors = left == N && is_aligned16(y) && is_aligned16(x) && (!dy || is_aligned16(dy));
    const Vec16<T> in = load_some(x + i, left, vectors);
    Vec16<T> d = {}, out = {};
    if (dy) d = load_some(dy + i, left, vectors);
#pragma unroll
    for (int j = 0; j < N; ++j) out.set(j, f(i, j, in.get(j), d.get(j)));
    store_some(y + i, out, left, vectors);
}

__device__ inline float cdf(float x) { return 0.5f * (1.0f + erff(x * 0.7071067811865475f)); }

__device__ inline float activation(float x, bool quick) { return quick ? x * Sigmoid(1.702f * x).s : x * cdf(x); }

__device__ inline float slope(float x, bool quick) {
    if (!quick) return cdf(x) + x * 0.3989422804014327f * expf(-0.5f * x * x);
    return Sigmoid(1.702f * x).slope(1.702f * x);
}

// The words of block `block`, whose number has no more than 32 bits here.
struct Philox {
    unsigned word[4];

    __device__ Philox(unsigned block, unsigned key0, unsigned key1) : word{block, 0, 0, 0} {
#pragma unroll
        for (int round = 0; round < 10; ++round) {
            const unsigned long long a = 0xd2511f53ull * word[0], b = 0xcd9e8d57ull * word[2];
            const unsigned w1 = word[1], w3 = word[3];
            word[0] = unsigned(b >> 32) ^ w1 ^ key0;
            word[1] = unsigned(b);
            word[2] = unsigned(a >> 32) ^ w3 ^ key1;
            word[3] = unsigned(a);
            key0 += 0x9e3779b9u;
            key1 += 0xbb67ae85u;
        }
    }
};

template <typename T> __device__ inline void dropout(T* y, const T* x, unsigned threshold, float scale, unsigned key0, unsigned key1, int n) {
    Philox bits(0, 0, 0);
    map<T>(y, x, nullptr, n, [&](int i, int j, float v, float) {
        // The elements of a thread come in order, and its first is the first of a block.
        if (j % 4 == 0) bits = Philox(unsigned(i + j) / 4, key0, key1);
        return bits.word[j % 4] < threshold ? 0.0f : v * scale;
    });
}

}  // namespace

#define INSTANCE(T, suffix)                                                                                                         \
    KERNEL(THREADS) silu_mul_bwd_##suffix(T* d_gate_up, const T* dy, const T* gate_up, int n) {                                     \
        silu_mul_bwd<T>(d_gate_up, dy, gate_up, n);                                                                                 \
    }                                                                                                                               \
    REGISTER_KERNEL(silu_mul_bwd_##suffix)                                                                                          \
    KERNEL(THREADS) activate_fwd_##suffix(T* y, const T* x, int n, int quick) {                                                     \
        map<T>(y, x, nullptr, n, [=](int, int, float v, float) { return activation(v, quick != 0); });                                   \
    }                                                                                                                               \
    REGISTER_KERNEL(activate_fwd_##suffix)                                                                                          \
    KERNEL(THREADS) activate_bwd_##suffix(T* dx, const T* dy, const T* x, int n, int quick) {                                       \
        map<T>(dx, x, dy, n, [=](int, int, float v, float d) { return d * slope(v, quick != 0); });                                      \
    }                                                                                                                               \
    REGISTER_KERNEL(activate_bwd_##suffix)                                                                                          \
    KERNEL(THREADS) dropout_fwd_##suffix(T* y, const T* x, int threshold, float scale, int key0, int key1, int n) {                 \
        dropout<T>(y, x, unsigned(threshold), scale, unsigned(key0), unsigned(key1), n);                                            \
    }                                                                                                                               \
    REGISTER_KERNEL(dropout_fwd_##suffix)                                                                                           \
    KERNEL(THREADS) scale_fwd_##suffix(T* x, float factor, int n) {                                                                 \
        map<T>(x, x, nullptr, n, [=](int, int, float v, float) { return v * factor; });                                                  \
    }                                                                                                                               \
    REGISTER_KERNEL(scale_fwd_##suffix)
FOR_EACH_DTYPE(INSTANCE)
