// What makes the rows that the models begin with: gathers, copies, and CLIP's patches.
//
//   embed_fwd:      y[i] = table[ids[i]]; embed_packed*_fwd: the same of a packed table (packed.cuh)
//   copy_rows_fwd:  y[to] = x[from] for each pair (to, from)
//   patchify_fwd:   y[(image, pr, pc), (c, r, s)] = pixels[image, c, pr·p + r, pc·p + s]
//   clip_embed_fwd: y[(image, 0)] = class + positions[0],   y[(image, 1 + j)] = patches[image·(n − 1) + j] + positions[1 + j]
//
// Layouts: table [vocab, hidden], x, y, patches [rows, hidden] of T; ids [rows], pairs [n_pairs, 2] i32; pixels [images, 3, height, width]
// f32, height and width multiples of p; class [hidden], positions [n, hidden] f32. All contiguous; any hidden, any alignment of T.
// Indices are within their tables, no two pairs have the same `to` (checked in cuda/rows.rs).
// Grid: one block for each row of y, or each pair. Copies are exact, patchify and a packed table's weights are rounded once, clip_embed adds in f32 and rounds once.
// Writes y with `=`. No shared memory.
#include "common.cuh"
#include "packed.cuh"

namespace {

constexpr int THREADS = 128;

template <typename T> __device__ inline void copy_row(T* to, const T* from, int n) {
    constexpr int N = Vec16<T>::N;
    if (n % N == 0 && is_aligned16(to) && is_aligned16(from)) {
        for (int i = threadIdx.x * N; i < n; i += THREADS * N) Vec16<T>::load(from + i).store(to + i);
    } else {
        for (int i = threadIdx.x; i < n; i += THREADS) to[i] = from[i];
    }
}

template <typename T> __device__ inline void embed_fwd(T* y, const T* table, const int* ids, int hidden) {
    begin_launch();
    const size_t row = blockIdx.x;
    copy_row(y + row * hidden, table + size_t(ids[row]) * hidden, hidden);
}

// An element at a time: it is a row for each token, next to all the matrices.
template <int BITS, typename T> __device__ inline void embed_packed_fwd(T* y, const Packed<BITS>& table, const int* ids) {
    begin_launch();
    const size_t row = blockIdx.x;
    for (int i = threadIdx.x; i < table.k; i += THREADS) y[row * table.k + i] = from_f32<T>(table.at(ids[row], i));
}

template <typename T> __device__ inline void copy_rows_fwd(T* y, const T* x, const int* pairs, int hidden) {
    begin_launch();
    const size_t pair = blockIdx.x;
    copy_row(y + size_t(pairs[pair * 2]) * hidden, x + size_t(pairs[pair * 2 + 1]) * hidden, hidden);
}

// Element by element: a run of p = 14 pixels begins at no multiple of 16 bytes, and neither does every row of y. It is done once an image.
template <typename T> __device__ inline void patchify_fwd(T* y, const float* pixels, int height, int width, int p) {
    begin_launch();
    const int patch_columns = width / p, n_patches = height / p * patch_columns, n = 3 * p * p;
    const int image = blockIdx.x / n_patches, patch = blockIdx.x % n_patches;
    const float* corner = pixels + size_t(image) * 3 * height * width + size_t(patch / patch_columns) * p * width + patch % patch_columns * p;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const int c = i / (p * p), r = i / p % p, s = i % p;
        y[size_t(blockIdx.x) * n + i] = from_f32<T>(corner[(size_t(c) * height + r) * width + s]);
    }
}

template <typename T>
__device__ inline void clip_embed_fwd(T* y, const T* patches, const float* cls, const float* positions, int n_positions, int hidden) {
    constexpr int N = Vec16<T>::N;
    begin_launch();
    const int image = blockIdx.x / n_positions, token = blockIdx.x % n_positions;
    T* out = y + size_t(blockIdx.x) * hidden;
    const float* position = positions + size_t(token) * hidden;
    if (token == 0) {
        for (int i = threadIdx.x; i < hidden; i += THREADS) out[i] = from_f32<T>(cls[i] + position[i]);
        return;
    }
    const T* patch = patches + (size_t(image) * (n_positions - 1) + token - 1) * hidden;
    if (hidden % N == 0 && is_aligned16(out) && is_aligned16(patch)) {
        for (int i = threadIdx.x * N; i < hidden; i += THREADS * N) {
            Vec16<T> v = Vec16<T>::load(patch + i);
#pragma unroll
            for (int j = 0; j < N; ++j) v.set(j, v.get(j) + position[i + j]);
            v.store(out + i);
        }
    } else {
        for (int i = threadIdx.x; i < hidden; i += THREADS) out[i] = from_f32<T>(to_f32(patch[i]) + position[i]);
    }
}

}  // namespace

#define EMBED_PACKED(BITS, T, suffix)                                                                                            \
    KERNEL(THREADS) embed_packed##BITS##_fwd_##suffix(T* y, const int* words, const f16* scales, const f16* offsets,             \
                                                      const int* ids, int hidden, int group) {                                   \
        embed_packed_fwd<BITS, T>(y, Packed<BITS>{words, scales, offsets, hidden, __ffs(group) - 1}, ids);                       \
    }                                                                                                                            \
    REGISTER_KERNEL(embed_packed##BITS##_fwd_##suffix)
#define INSTANCE(T, suffix)                                                                                                           \
    KERNEL(THREADS) embed_fwd_##suffix(T* y, const T* table, const int* ids, int hidden) { embed_fwd<T>(y, table, ids, hidden); }    \
    REGISTER_KERNEL(embed_fwd_##suffix)                                                                                              \
    EMBED_PACKED(4, T, suffix)                                                                                                       \
    EMBED_PACKED(8, T, suffix)                                                                                                       \
    KERNEL(THREADS) copy_rows_fwd_##suffix(T* y, const T* x, const int* pairs, int hidden) { copy_rows_fwd<T>(y, x, pairs, hidden); } \
    REGISTER_KERNEL(copy_rows_fwd_##suffix)                                                                                          \
    KERNEL(THREADS) patchify_fwd_##suffix(T* y, const float* pixels, int height, int width, int p) {                                 \
        patchify_fwd<T>(y, pixels, height, width, p);                                                                                \
    }                                                                                                                                \
    REGISTER_KERNEL(patchify_fwd_##suffix)                                                                                           \
    KERNEL(THREADS)                                                                                                                  \
    clip_embed_fwd_##suffix(T* y, const T* patches, const float* cls, const float* positions, int n_positions, int hidden) {         \
        clip_embed_fwd<T>(y, patches, cls, positions, n_positions, hidden);                                                          \
    }                                                                                                                                \
    REGISTER_KERNEL(clip_embed_fwd_##suffix)
FOR_EACH_DTYPE(INSTANCE)
