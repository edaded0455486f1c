// Packed integer weights (src/ops/packed.rs): where their integers lie, and how those become numbers.
//
//   W[j, i] = s[j, g]·q[j, i] + o[j, g],  g = i / group;  without offsets o = -2^(BITS-1)·s
//
// Layouts: words i32 [⌈n/16⌉, k/32, 16, BITS], scales and offsets f16 [⌈n/16⌉, k/group, 16]; k is a multiple of 32 and of the group, all
// are aligned to 16 bytes. With 8 bits, byte i of a row's part of a slab is column i; with 4 bits its low half is column i and its high
// half column 16 + i, i < 16. Rows that fill the last block up are there to be read.
#pragma once

#include "mma.cuh"

namespace {

// Columns of a slab: of each of the 16 rows of a block it has BITS words of 32 bits.
constexpr int SLAB = 32;
constexpr int BLOCK_ROWS = 16;

// What no launch writes: wait_for_previous() may come later.
__device__ inline float load_constant(const f16* p) {
#ifdef LLAVA_SIM
    f16 x;
    sim::read_constant(&x, p, sizeof x);
    return to_f32(x);
#else
    return to_f32(__ldg(p));
#endif
}

// Four integers of neighbouring columns in the bytes of a word as `Scale` takes them: 8 bits as they are; of 4 bits the low halves, or the
// high halves, whose columns are 16 on, as 0x80 + 8·q.
template <int BITS> __device__ inline uint32_t four_of(uint32_t word, bool high) {
    return BITS == 8 ? word : ((high ? word >> 1 : word << 3) & 0x78787878u) | 0x80808080u;
}

// What the integers of a row and a group mean.
//
// A conversion of an integer takes a GPU several times as long as an addition. So bytes are put into floats as they are: with the bytes above
// them that are chosen here, the float is BIAS + q. That W = s·(BIAS + q) + (o - BIAS·s) is rounded once: the second term is exact in f32, but
// for offsets that are small beside the scale, where at most 2^-20 of the scale is lost.
template <int BITS, typename T> struct Scale {
    static constexpr float BIAS = BITS == 8 ? 32768.0f : 16.0f;
    float scale, offset;  // s, and o - BIAS·s

    __device__ static Scale symmetric(float s) { return {s, -(BIAS + (1 << (BITS - 1))) * s}; }
    __device__ static Scale with_offset(float s, float o) { return {s, fmaf(-BIAS, s, o)}; }

    // W of the integer in byte i of `four`.
    __device__ float weight(uint32_t four, int i) const {
        // Bytes of the float from the lowest on: of 4 bits 0, 0, the byte, 0x41; of 8 bits 0, the byte, 0, 0x47.
        const uint32_t bits = BITS == 8 ? __byte_perm(four, 0x47000000u, 0x7404u | i << 4) : __byte_perm(four, 0x41000000u, 0x7044u | i << 8);
        return fmaf(scale, __uint_as_float(bits), offset);
    }

    // W of all four, rounded to T, as operands of tensor cores.
    __device__ void weights(uint32_t (&w)[2], uint32_t four) const {
        w[0] = pack2<T>(weight(four, 0), weight(four, 1));
        w[1] = pack2<T>(weight(four, 2), weight(four, 3));
    }
};

// The same in f16, two at a time: half the instructions. BIAS is subtracted from BIAS + q, which gives q, and s·q + o is rounded once.
// Without offsets, o = -2^(BITS-1)·s is exact while f16 holds it: beyond, it does not hold the weight at q = 0 either.
template <int BITS> struct Scale<BITS, f16> {
    // The byte above, and what the pair of bytes is at q = 0: 1024, or 144.
    static constexpr uint32_t HIGH = BITS == 8 ? 0x64646464u : 0x58585858u, BIAS = BITS == 8 ? 0x64006400u : 0x58805880u;
    uint32_t scale, offset;  // pairs of s and of o

    __device__ static Scale symmetric(float s) { return with_offset(s, -float(1 << (BITS - 1)) * s); }
    __device__ static Scale with_offset(float s, float o) { return {pack2<f16>(s, s), pack2<f16>(o, o)}; }

    __device__ void weights(uint32_t (&w)[2], uint32_t four) const {
        w[0] = fma2_f16(sub2_f16(__byte_perm(four, HIGH, 0x4140), BIAS), scale, offset);
        w[1] = fma2_f16(sub2_f16(__byte_perm(four, HIGH, 0x4342), BIAS), scale, offset);
    }
};

// A matrix, or a part of one.
template <int BITS> struct Packed {
    const int* words;
    const f16 *scales, *offsets;  // offsets may be null
    int k, group_log2;

    __device__ int n_slabs() const { return k / SLAB; }
    __device__ int n_groups() const { return k >> group_log2; }
    __device__ int group_of(int slab) const { return slab * SLAB >> group_log2; }

    // Of row `row` of block `block` in slab `slab`.
    template <typename T> __device__ Scale<BITS, T> scale(int block, int slab, int row) const {
        const size_t at = (size_t(block) * n_groups() + group_of(slab)) * BLOCK_ROWS + row;
        const float s = load_constant(scales + at);
        return offsets ? Scale<BITS, T>::with_offset(s, load_constant(offsets + at)) : Scale<BITS, T>::symmetric(s);
    }

    // W at (row, col): for who is in no hurry.
    __device__ float at(int row, int col) const {
        const int block = row / BLOCK_ROWS, slab = col / SLAB, i = col % SLAB;
        const size_t part = (size_t(block) * n_slabs() + slab) * BLOCK_ROWS + row % BLOCK_ROWS;
        const uint32_t word = words[part * BITS + (BITS == 8 ? i : i % 16) / 4];
        return scale<float>(block, slab, row % BLOCK_ROWS).weight(four_of<BITS>(word, i >= 16), i % 4);
    }
};

}  // namespace

// How kernels take up to three parts of W. All have one k and one group; those that there are not have no rows.
#define PACKED_POINTERS                                                                                                      \
    const int *words0, const f16 *scales0, const f16 *offsets0, const int *words1, const f16 *scales1, const f16 *offsets1, \
        const int *words2, const f16 *scales2, const f16 *offsets2
#define PACKED_PART(BITS, i) Packed<BITS>{words##i, scales##i, offsets##i, k, __ffs(group) - 1}
#define PACKED_PARTS(BITS) \
    Parts<Packed<BITS>>{{PACKED_PART(BITS, 0), PACKED_PART(BITS, 1), PACKED_PART(BITS, 2)}, {n0, n1, n2}}
