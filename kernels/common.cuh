// What every kernel file shares: element types and their conversions, 16-byte vectors, reductions, and how kernels are declared.
//
// A kernel file compiles twice: by nvcc for a GPU, and by the host's C++17 compiler with LLAVA_SIM defined, for the simulator.
// Rules that make both possible:
//  - shared memory is dynamic, taken with SHARED_MEMORY and carved up by the kernel (its launch says how many bytes);
//  - instructions that C++ has no word for (mma, ldmatrix, cp.async) are called through the wrappers of mma.cuh and async_copy.cuh;
//  - a kernel calls wait_for_previous() before it touches anything that another launch writes or reads;
//  - helpers stand in an anonymous namespace, kernels outside of it, and each kernel is registered by name.
#pragma once

#ifdef LLAVA_SIM
#include "sim/sim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define REGISTER_KERNEL(name)
#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
using bf16 = __nv_bfloat16;
using f16 = __half;
#endif

// Calls X(type, suffix) for each element type that activations may have.
#define FOR_EACH_DTYPE(X) \
    X(float, f32)         \
    X(f16, f16)           \
    X(bf16, bf16)
// ... and for those that tensor cores multiply.
#define FOR_EACH_HALF(X) \
    X(f16, f16)          \
    X(bf16, bf16)

namespace {

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// ---------------------------------------------------------------- elements

#ifndef LLAVA_SIM
__device__ inline float to_f32(float x) { return x; }
__device__ inline float to_f32(f16 x) { return __half2float(x); }
__device__ inline float to_f32(bf16 x) { return __bfloat162float(x); }
template <typename T> __device__ inline T from_f32(float x);
template <> __device__ inline float from_f32<float>(float x) { return x; }
template <> __device__ inline f16 from_f32<f16>(float x) { return __float2half_rn(x); }
template <> __device__ inline bf16 from_f32<bf16>(float x) { return __float2bfloat16_rn(x); }
#else
inline float to_f32(float x) { return x; }
inline float to_f32(f16 x) { return sim::widen(x); }
inline float to_f32(bf16 x) { return sim::widen(x); }
template <typename T> inline T from_f32(float x);
template <> inline float from_f32<float>(float x) { return x; }
template <> inline f16 from_f32<f16>(float x) { return sim::narrow_f16(x); }
template <> inline bf16 from_f32<bf16>(float x) { return sim::narrow_bf16(x); }
#endif

// 16 bytes of elements: what one thread moves with one instruction. Addresses must be multiples of 16.
template <typename T> struct Vec16 {
    static constexpr int N = 16 / sizeof(T);
    uint4 raw;

    __device__ static Vec16 load(const T* p) {
        expect_aligned(p);
        return {*reinterpret_cast<const uint4*>(p)};
    }
    // What is read once should not push activations out of L1.
    __device__ static Vec16 load_streaming(const T* p) {
#ifdef LLAVA_SIM
        return load(p);
#else
        return load_constant(p);
#endif
    }
    // The same, of weights, which no launch writes: wait_for_previous() may come later.
    __device__ static Vec16 load_constant(const T* p) {
        Vec16 v;
#ifdef LLAVA_SIM
        expect_aligned(p);
        sim::read_constant(&v.raw, p, sizeof v.raw);
#else
        asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.raw.x), "=r"(v.raw.y), "=r"(v.raw.z), "=r"(v.raw.w)
                     : "l"(p));
#endif
        return v;
    }
    __device__ void store(T* p) const {
        expect_aligned(p);
        *reinterpret_cast<uint4*>(p) = raw;
    }
    __device__ float get(int i) const { return to_f32(reinterpret_cast<const T*>(&raw)[i]); }
    __device__ void set(int i, float x) { reinterpret_cast<T*>(&raw)[i] = from_f32<T>(x); }

private:
    // A GPU stops at other addresses. The host does not: it may well move the bytes one word at a time.
    __device__ static void expect_aligned([[maybe_unused]] const void* p) {
#ifdef LLAVA_SIM
        sim::expect_aligned(p, 16);
#endif
    }
};

// Whether p is a multiple of 16 bytes.
__device__ inline bool is_aligned16(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15) == 0; }

// N neighbours from p on, of which the first n are there and the rest zero: as a vector where `vectors`, which all N are then.
template <typename T> __device__ inline Vec16<T> load_some(const T* p, int n, bool vectors) {
    if (vectors) return Vec16<T>::load(p);
    Vec16<T> v = {};
#pragma unroll
    for (int j = 0; j < Vec16<T>::N; ++j)
        if (j < n) v.set(j, to_f32(p[j]));
    return v;
}

template <typename T> __device__ inline void store_some(T* p, const Vec16<T>& v, int n, bool vectors) {
    if (vectors) return v.store(p);
#pragma unroll
    for (int j = 0; j < Vec16<T>::N; ++j)
        if (j < n) p[j] = from_f32<T>(v.get(j));
}

// ---------------------------------------------------------------- launches that overlap
//
// From sm_90 on, launches are made with programmatic stream serialization: a kernel may begin as soon as all blocks of the one before have
// called let_next_begin() or ended, and its blocks then take the places that those leave. What it does before wait_for_previous() (its
// indices, the first weights) costs no time of its own. Afterwards all launches before are done and what they wrote is seen: each waited
// for the one before it.

__device__ inline void wait_for_previous() {
#ifdef LLAVA_SIM
    sim::wait_for_previous();
#elif __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ inline void let_next_begin() {
#if !defined(LLAVA_SIM) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// How most kernels begin.
__device__ inline void begin_launch() {
    let_next_begin();
    wait_for_previous();
}

// ---------------------------------------------------------------- reductions

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
    return x;
}

__device__ inline float warp_max(float x) {
#pragma unroll
    for (int offset = WARP / 2; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, offset));
    return x;
}

// Sum over the block, the same in all threads and from run to run. `scratch` has one f32 for each warp; blockDim.x is a multiple of 32.
// It may be called again at once: the barrier at its start parts a call from the one before.
__device__ inline float block_sum(float x, float* scratch) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, n_warps = blockDim.x / WARP;
    x = warp_sum(x);
    __syncthreads();
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    return warp_sum(lane < n_warps ? scratch[lane] : 0.0f);
}

}  // namespace
