// The CUDA that kernels are written in, for the host's C++ compiler: every kernel of kernels/*.cu runs block by block on the CPU.
//
// Each CUDA thread is a coroutine that the simulator (src/cuda/driver/simulator.rs) resumes in turn. Barriers and warp collectives end
// its turn until the others have come. Kernels are compiled with -fsanitize=thread, but linked with the hooks of sim.cpp instead of a
// sanitizer's library: so every load and store of a kernel passes by, and what leaves its allocation or races in shared memory is
// reported with kernel, block and thread.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <algorithm>
#include <type_traits>
#include <utility>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __align__(n) alignas(n)

struct uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct dim3 { unsigned x, y, z; };

// Storage of 16-bit floats; arithmetic is done in f32.
struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

namespace sim {

inline uint32_t bits_of(float x) { union { float f; uint32_t u; } c{x}; return c.u; }
inline float float_of(uint32_t u) { union { uint32_t u; float f; } c{u}; return c.f; }

inline float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }

// To nearest, ties to even, as __float2bfloat16_rn; NaN becomes the canonical one, as there.
inline bf16 narrow_bf16(float x) {
    uint32_t u = bits_of(x);
    if ((u & 0x7fffffff) > 0x7f800000) return {0x7fff};
    return {uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
}

inline float widen(f16 x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
    if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    // 2^112 moves the exponent from f16's bias to f32's, subnormal numbers included.
    return float_of(sign | bits_of(float_of(rest << 13) * float_of(0x77800000)));
}

// To nearest, ties to even, as __float2half_rn.
inline f16 narrow_f16(float x) {
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000, rest = u & 0x7fffffff;
    if (rest > 0x7f800000) return {0x7fff};
    if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 2^16 or more
    if (rest < 0x38800000) {                                    // subnormal: let f32 round at the last bit of 2^-24
        const float shifted = float_of(rest) + 0.5f;
        return {uint16_t(sign | (bits_of(shifted) - 0x3f000000))};
    }
    const uint32_t rounded = rest + 0xfff + ((rest >> 13) & 1);
    return {uint16_t(sign | ((rounded - 0x38000000) >> 13))};
}

// ---------------------------------------------------------------- what the runtime (sim.cpp) gives

dim3 thread_index();
dim3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned char* shared_memory();

struct Site { const char* file; int line; };

enum class Collective : int { Sync, Shfl, ShflXor, ShflDown, ShflUp, Ballot, LdMatrix, LdMatrixTrans, Mma, MmaS8 };

// Waits for the lanes of `mask`; the last to come computes every lane's `out` from all `in`.
void collective(Collective kind, unsigned mask, const void* in, void* out, int parameter, Site site);
void sync_threads(Site site);
// Stops the kernel if p is no multiple of `bytes`.
void expect_aligned(const void* p, size_t bytes);
// Stops the kernel with a message.
void trap(const char* message, Site site);

// The launch before is done: without it, whatever is read or written in global memory stops the kernel, but for constants.
void wait_for_previous();
// Reads what no launch writes.
void read_constant(void* to, const void* from, size_t bytes);

void async_copy_16(void* shared, const void* global, int valid_bytes);
void async_commit();
void async_wait(int groups_left);

int atomic_add(int* p, int x);
unsigned atomic_add(unsigned* p, unsigned x);

// ---------------------------------------------------------------- registry

// How a kernel is called with the addresses of its arguments, as cuLaunchKernel takes them.
using Invoke = void (*)(void** arguments);

void add_kernel(const char* name, Invoke invoke, const char* signature);

template <typename T> constexpr char kind_of() {
    if (std::is_pointer<T>::value) return 'p';
    if (std::is_same<T, float>::value) return 'f';
    if (std::is_same<T, int>::value) return 'i';
    if (std::is_same<T, unsigned>::value) return 'u';
    if (std::is_same<T, unsigned long long>::value) return 'l';
    return '?';
}

template <auto Kernel> struct Entry;
template <typename... Args, void (*Kernel)(Args...)> struct Entry<Kernel> {
    template <size_t... I> static void call(void** arguments, std::index_sequence<I...>) { Kernel(*static_cast<Args*>(arguments[I])...); }
    static void invoke(void** arguments) { call(arguments, std::index_sequence_for<Args...>{}); }
    explicit Entry(const char* name) {
        static const char signature[] = {kind_of<Args>()..., 0};
        add_kernel(name, invoke, signature);
    }
};

}  // namespace sim

#define threadIdx (sim::thread_index())
#define blockIdx (sim::block_index())
#define blockDim (sim::block_size())
#define gridDim (sim::grid_size())

#define SIM_SITE (sim::Site{__FILE__, __LINE__})
#define __syncthreads() sim::sync_threads(SIM_SITE)
#define __syncwarp(...) sim::collective(sim::Collective::Sync, 0xffffffffu, nullptr, nullptr, 0, SIM_SITE)
#define __shfl_sync(mask, x, lane) sim::shuffle(sim::Collective::Shfl, mask, x, lane, SIM_SITE)
#define __shfl_xor_sync(mask, x, lanes) sim::shuffle(sim::Collective::ShflXor, mask, x, lanes, SIM_SITE)
#define __shfl_down_sync(mask, x, lanes) sim::shuffle(sim::Collective::ShflDown, mask, x, lanes, SIM_SITE)
#define __shfl_up_sync(mask, x, lanes) sim::shuffle(sim::Collective::ShflUp, mask, x, lanes, SIM_SITE)
#define __ballot_sync(mask, predicate) sim::ballot(mask, predicate, SIM_SITE)
#define __any_sync(mask, predicate) (sim::ballot(mask, predicate, SIM_SITE) != 0)
#define __threadfence() ((void)0)

#define KERNEL(threads) static void
#define REGISTER_KERNEL(name) static sim::Entry<&name> name##_entry(#name);
#define SHARED_MEMORY(name) unsigned char* const name = sim::shared_memory()

namespace sim {

template <typename T> inline T shuffle(Collective kind, unsigned mask, T x, int parameter, Site site) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 32 bits, or twice 32");
    T out;
    for (size_t word = 0; word < sizeof(T); word += 4)
        collective(kind, mask, reinterpret_cast<char*>(&x) + word, reinterpret_cast<char*>(&out) + word, parameter, site);
    return out;
}

inline unsigned ballot(unsigned mask, bool predicate, Site site) {
    unsigned in = predicate, out;
    collective(Collective::Ballot, mask, &in, &out, 0, site);
    return out;
}

}  // namespace sim

inline int atomicAdd(int* p, int x) { return sim::atomic_add(p, x); }
inline unsigned atomicAdd(unsigned* p, unsigned x) { return sim::atomic_add(p, x); }

using std::max;
using std::min;

// Each rounded by itself: the kernels are compiled without contraction.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return (unsigned long long)(__uint128_t(a) * b >> 64); }
// Byte i of the result is byte (selector >> 4·i) % 8 of the eight of y:x.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long bytes = (unsigned long long)(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= unsigned(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}
inline int __ffs(unsigned x) { return __builtin_ffs(int(x)); }
using std::isinf;

inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline unsigned __float_as_uint(float x) { return sim::bits_of(x); }
inline float __uint_as_float(unsigned x) { return sim::float_of(x); }
