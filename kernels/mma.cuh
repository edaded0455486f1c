// Tensor cores: one wrapper for each instruction, on 16-bit floats with f32 sums, and on bytes with i32 sums (sm_80 and later).
//
// Fragments of m16n8k16, for lane = 4·group + pair (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"); each register
// holds two neighbours, the lower column (A) or row (B) in its low half:
//   A [16 rows, 16 k]: a[0] = (group, 2·pair), a[1] = (group + 8, 2·pair), a[2] = (group, 2·pair + 8), a[3] = (group + 8, 2·pair + 8)
//   B [16 k, 8 columns]: b[0] = (2·pair, group), b[1] = (2·pair + 8, group)
//   C, D [16 rows, 8 columns], f32: c[0], c[1] = (group, 2·pair), (group, 2·pair + 1); c[2], c[3] = the same in row group + 8
// Those of m16n8k32 on bytes ("Matrix Fragments for mma.m16n8k32") are the same if two neighbouring bytes are taken for one 16-bit element:
//   A [16 rows, 32 k]: a[0] = (group, 4·pair to 4·pair + 3), a[1] = the same in row group + 8, a[2], a[3] = the same 16 columns on
//   B [32 k, 8 columns]: b[0] = (4·pair to 4·pair + 3, group), b[1] = the same 16 rows on;  C, D: i32, as above
#pragma once

#include "common.cuh"

namespace {

// d += A·B
template <typename T> __device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// d += A·B, signed bytes.
__device__ inline void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

// Loads four 8 x 8 matrices of 16 bits from shared memory: lane i gives the address of row i % 8 of matrix i / 8, 16-byte aligned.
// r[j] holds row lane / 4, columns 2·(lane % 4) and the next, of matrix j: of a row-major tile that is an A fragment, of a tile whose rows
// are columns of B (W as [n, k]) a B fragment.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row);

// The same with each matrix transposed: a B fragment of a tile stored as [k, n], such as V.
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row);

// Two f32 as two 16-bit floats in one register, `low` in the low half: how results become operands.
template <typename T> __device__ inline uint32_t pack2(float low, float high);

// a - b and a·b + c of such pairs of f16, each rounded once.
__device__ inline uint32_t sub2_f16(uint32_t a, uint32_t b);
__device__ inline uint32_t fma2_f16(uint32_t a, uint32_t b, uint32_t c);

// 2^x, at most 2 units in the last place off; 0 where that is below the normal numbers: for what is rounded to 16 bits next.
__device__ inline float exp2_approx(float x);

#ifdef LLAVA_SIM

inline float exp2_approx(float x) { return exp2f(x); }

template <typename T> inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct {
        uint32_t a[4], b[2];
        float c[4];
    } in = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
    sim::collective(sim::Collective::Mma, ALL_LANES, &in, d, std::is_same<T, f16>::value, SIM_SITE);
}

inline void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    struct {
        uint32_t a[4], b[2];
        int c[4];
    } in = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, {d[0], d[1], d[2], d[3]}};
    sim::collective(sim::Collective::MmaS8, ALL_LANES, &in, d, 0, SIM_SITE);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    sim::collective(sim::Collective::LdMatrix, ALL_LANES, &row, r, 4, SIM_SITE);
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    sim::collective(sim::Collective::LdMatrixTrans, ALL_LANES, &row, r, 4, SIM_SITE);
}

template <typename T> inline uint32_t pack2(float low, float high) {
    return uint32_t(from_f32<T>(low).bits) | uint32_t(from_f32<T>(high).bits) << 16;
}

inline float low_f16(uint32_t pair) { return to_f32(f16{uint16_t(pair)}); }
inline float high_f16(uint32_t pair) { return to_f32(f16{uint16_t(pair >> 16)}); }

inline uint32_t sub2_f16(uint32_t a, uint32_t b) { return pack2<f16>(low_f16(a) - low_f16(b), high_f16(a) - high_f16(b)); }

// Rounded to f32 first, which makes a difference for one sum in some thousands.
inline uint32_t fma2_f16(uint32_t a, uint32_t b, uint32_t c) {
    return pack2<f16>(fmaf(low_f16(a), low_f16(b), low_f16(c)), fmaf(high_f16(a), high_f16(b), high_f16(c)));
}

#else

__device__ inline uint32_t sub2_f16(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

__device__ inline uint32_t fma2_f16(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

template <> __device__ inline void mma_m16n8k16<bf16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <> __device__ inline void mma_m16n8k16<f16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void mma_m16n8k32_s8(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

template <> __device__ inline uint32_t pack2<bf16>(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

template <> __device__ inline uint32_t pack2<f16>(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}

#endif

}  // namespace
