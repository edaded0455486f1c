// What the products of many tokens with packed weights share (gemm_packed.cu, gemm_w8a8.cu): a step of W in shared memory, and how it gets there.
#pragma once

#include "gemm_tile.cuh"
#include "packed.cuh"

namespace {

// What a step has in shared memory: rows of x; of each slab, the words of each column of y (row of W); then the scales of each slab's columns,
// and its offsets. Slabs of one group have copies. A step has COLUMNS of W: K of the shape, where its elements of 16 bits are one number each.
template <int BITS, typename S, int COLUMNS = S::K> struct Stage {
    static constexpr int SLABS = COLUMNS / SLAB;
    // Pieces of 16 bytes that a row has in a slab.
    static constexpr int PIECES = BITS / 4;
    // Bytes from the beginning of the stage.
    static constexpr int WORDS = S::ROWS * S::K * 2;
    static constexpr int SCALES = WORDS + SLABS * S::COLS * PIECES * 16;
    static constexpr int OFFSETS = SCALES + SLABS * S::COLS * int(sizeof(f16));
    static constexpr int BYTES = OFFSETS + SLABS * S::COLS * int(sizeof(f16));

    // Of a piece. A warp reads a word each of 8 neighbouring columns at a time: where a column has two pieces, every other four columns have
    // them the other way round, which lays those words into all 32 banks.
    __device__ static int piece(int slab, int col, int i) {
        return WORDS + ((slab * S::COLS + col) * PIECES + (PIECES == 2 ? i ^ col / 4 % 2 : i)) * 16;
    }
};

// Copies the integers of a tile's COLS rows of W to shared memory, step by step along k, with their scales and offsets; zeros beyond the
// blocks of rows and beyond k. Pointers advance, as those of Copier do.
template <int BITS, typename S, int COLUMNS = S::K> struct PackedCopier {
    using To = Stage<BITS, S, COLUMNS>;
    // A block of rows has its slabs one after the other: so many pieces lie together.
    static constexpr int BLOCK_PIECES = To::SLABS * BLOCK_ROWS * To::PIECES;
    static constexpr int BLOCKS_AT_ONCE = THREADS / BLOCK_PIECES, N = S::COLS / BLOCK_ROWS / BLOCKS_AT_ONCE;
    // Scales of 8 rows are 16 bytes. A thread copies some, or offsets, or neither.
    static constexpr int SCALE_THREADS = To::SLABS * S::COLS / 8;

    static_assert(THREADS % BLOCK_PIECES == 0 && S::COLS % (BLOCK_ROWS * BLOCKS_AT_ONCE) == 0, "every thread copies as many pieces");
    static_assert(2 * SCALE_THREADS <= THREADS, "there are threads for all scales and offsets");

    const int* words;    // this thread's piece of its first block, at the next step; it may point beyond the blocks
    size_t block_step;   // words from a block of this thread to the next
    int n_blocks;        // how many blocks of this thread there are
    int slab;            // the slab of this thread's piece, at the next step
    int offset;          // of the piece within a stage
    const f16* scales;   // of this thread's 8 rows in group 0; null if it copies none
    int scale_slab;      // the slab whose scales it copies at the next step
    int n_scale_slabs;   // 0 beyond the blocks
    int scale_offset;    // of those within a stage
    int n_slabs, group_log2;

    __device__ PackedCopier(const Packed<BITS>& w, int n, int first_col, int first_slab) {
        const int first_block = first_col / BLOCK_ROWS, end_block = ceil_div(n, BLOCK_ROWS);
        n_slabs = w.n_slabs();
        group_log2 = w.group_log2;
        {
            const int at = threadIdx.x % BLOCK_PIECES, block = threadIdx.x / BLOCK_PIECES;
            const int of_slab = at % (BLOCK_ROWS * To::PIECES), row = of_slab / To::PIECES;
            words = w.words + size_t(first_block + block) * n_slabs * BLOCK_ROWS * BITS + first_slab * (BLOCK_ROWS * BITS) + at * 4;
            block_step = size_t(BLOCKS_AT_ONCE) * n_slabs * BLOCK_ROWS * BITS;
            n_blocks = ceil_div(max(0, end_block - first_block - block), BLOCKS_AT_ONCE);
            const int its_slab = at / (BLOCK_ROWS * To::PIECES);
            slab = first_slab + its_slab;
            offset = To::piece(its_slab, block * BLOCK_ROWS + row, of_slab % To::PIECES);
        }
        {
            const int at = threadIdx.x % SCALE_THREADS, its_slab = at / (S::COLS / 8), row = at % (S::COLS / 8) * 8;
            const int block = first_block + row / BLOCK_ROWS;
            const f16* const from = threadIdx.x < SCALE_THREADS ? w.scales : threadIdx.x < 2 * SCALE_THREADS ? w.offsets : nullptr;
            scales = from ? from + size_t(block) * w.n_groups() * BLOCK_ROWS + row % BLOCK_ROWS : nullptr;
            n_scale_slabs = block < end_block ? n_slabs : 0;
            scale_slab = first_slab + its_slab;
            scale_offset = To::SCALES + threadIdx.x * 16;
        }
    }

    __device__ void copy(unsigned char* stage) {
        const int* from = words;
#pragma unroll
        for (int i = 0; i < N; ++i) {
            async_copy_16(stage + offset + i * (BLOCKS_AT_ONCE * BLOCK_ROWS * To::PIECES * 16), from,
                          i < n_blocks && slab < n_slabs ? 16 : 0);
            from += block_step;
        }
        if (scales) {
            const f16* its = scales + size_t(scale_slab * SLAB >> group_log2) * BLOCK_ROWS;
            async_copy_16(stage + scale_offset, its, scale_slab < n_scale_slabs ? 16 : 0);
        }
        words += To::SLABS * BLOCK_ROWS * BITS;
        slab += To::SLABS;
        scale_slab += To::SLABS;
    }
};

}  // namespace
