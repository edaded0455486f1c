// What tensor cores make of a warp's fragments: lane by lane, from where the PTX ISA says that their elements stand.
#pragma once

#include <cstdint>

#include "sim.h"

namespace sim {

constexpr unsigned MMA_LANES = 32;

// What each lane gives to a product, and where its part of the result goes.
struct MmaOperands {
    const void* in[MMA_LANES];
    void* out[MMA_LANES];
};

struct MmaIn {
    uint32_t a[4], b[2];
    float c[4];
};

inline float half_of(uint32_t pair, int i, bool is_f16) {
    const uint16_t bits = uint16_t(i ? pair >> 16 : pair);
    return is_f16 ? widen(f16{bits}) : widen(bf16{bits});
}

// D = A·B + C, m16n8k16, A row-major, B column-major: the fragments of "Matrix Fragments for mma.m16n8k16 with floating point type"
// (PTX ISA, 9.7.15.5.8).
inline void mma_m16n8k16(const MmaOperands& lanes, bool is_f16) {
    float a[16][16], b[16][8];
    for (unsigned lane = 0; lane < MMA_LANES; ++lane) {
        const MmaIn& in = *static_cast<const MmaIn*>(lanes.in[lane]);
        const unsigned group = lane / 4, pair = lane % 4 * 2;
        for (int i = 0; i < 2; ++i) {
            a[group][pair + i] = half_of(in.a[0], i, is_f16);
            a[group + 8][pair + i] = half_of(in.a[1], i, is_f16);
            a[group][pair + 8 + i] = half_of(in.a[2], i, is_f16);
            a[group + 8][pair + 8 + i] = half_of(in.a[3], i, is_f16);
            b[pair + i][group] = half_of(in.b[0], i, is_f16);
            b[pair + 8 + i][group] = half_of(in.b[1], i, is_f16);
        }
    }
    for (unsigned lane = 0; lane < MMA_LANES; ++lane) {
        const MmaIn& in = *static_cast<const MmaIn*>(lanes.in[lane]);
        float* d = static_cast<float*>(lanes.out[lane]);
        float sum[4] = {in.c[0], in.c[1], in.c[2], in.c[3]};
        for (int i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) sum[i] += a[row][k] * b[k][column];
        }
        for (int i = 0; i < 4; ++i) d[i] = sum[i];
    }
}

struct MmaS8In {
    uint32_t a[4], b[2];
    int32_t c[4];
};

// D = A·B + C of signed bytes, m16n8k32: the fragments of "Matrix Fragments for mma.m16n8k32" (PTX ISA).
inline void mma_m16n8k32_s8(const MmaOperands& lanes) {
    int a[16][32], b[32][8];
    const auto byte = [](uint32_t word, int i) { return int(int8_t(word >> 8 * i)); };
    for (unsigned lane = 0; lane < MMA_LANES; ++lane) {
        const MmaS8In& in = *static_cast<const MmaS8In*>(lanes.in[lane]);
        const unsigned group = lane / 4, four = lane % 4 * 4;
        for (int i = 0; i < 4; ++i) {
            a[group][four + i] = byte(in.a[0], i);
            a[group + 8][four + i] = byte(in.a[1], i);
            a[group][four + 16 + i] = byte(in.a[2], i);
            a[group + 8][four + 16 + i] = byte(in.a[3], i);
            b[four + i][group] = byte(in.b[0], i);
            b[four + 16 + i][group] = byte(in.b[1], i);
        }
    }
    for (unsigned lane = 0; lane < MMA_LANES; ++lane) {
        const MmaS8In& in = *static_cast<const MmaS8In*>(lanes.in[lane]);
        int32_t* d = static_cast<int32_t*>(lanes.out[lane]);
        for (int i = 0; i < 4; ++i) {
            const unsigned row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
            int32_t sum = in.c[i];
            for (int k = 0; k < 32; ++k) sum += a[row][k] * b[k][column];
            d[i] = sum;
        }
    }
}

}  // namespace sim
