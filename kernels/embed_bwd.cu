// Gradients of gathers and copies: rows that are added to rows.
//
//   add_rows_bwd: dst[to] += Σ src[from], both of T;   embed_bwd: the same with dst of f32
//   clip_embed_bwd: d_patches[i·p + j] = dy[i·(1 + p) + 1 + j],  d_class += Σ_i dy[i·(1 + p)],  d_positions[j] += Σ_i dy[i·(1 + p) + j]
//   round_rows_fwd: y = x[:, first..first + n], of f32, rounded to T
//
// Layouts: dst, src [rows, hidden]; groups i32 [n_groups, 3]: a row of dst, and the first and the last but one of its entries in `from`, rows
// of src; no two groups have the same row (cuda/rows_grad.rs). d_patches [images·p, hidden], dy [images·(1 + p), hidden] of T, d_class
// [hidden], d_positions [1 + p, hidden] f32; x f32 [rows, stride], y [rows, n]. All contiguous; any width, any alignment of T.
// Grid: x one block for each group, position, or row, y one for each THREADS columns. A sum has one thread, which takes its terms in order, in
// f32, and rounds once. Shared memory: none.
#include "common.cuh"

namespace {

constexpr int THREADS = 128;

template <typename D, typename T>
__device__ inline void add_rows_bwd(D* dst, const T* src, const int* groups, const int* from, int hidden) {
    begin_launch();
    const int column = blockIdx.y * THREADS + threadIdx.x;
    if (column >= hidden) return;
    const int* group = groups + 3 * size_t(blockIdx.x);
    D* to = dst + size_t(group[0]) * hidden + column;
    float sum = to_f32(*to);
    for (int i = group[1]; i < group[2]; ++i) sum += to_f32(src[size_t(from[i]) * hidden + column]);
    *to = from_f32<D>(sum);
}

template <typename T>
__device__ inline void clip_embed_bwd(T* d_patches, float* d_class, float* d_positions, const T* dy, int images, int n_positions, int hidden) {
    begin_launch();
    const int position = blockIdx.x, column = blockIdx.y * THREADS + threadIdx.x;
    if (column >= hidden) return;
    float sum = 0.0f;
    for (int image = 0; image < images; ++image) {
        const T d = dy[(size_t(image) * n_positions + position) * hidden + column];
        sum += to_f32(d);
        if (position > 0) d_patches[(size_t(image) * (n_positions - 1) + position - 1) * hidden + column] = d;
    }
    d_positions[size_t(position) * hidden + column] += sum;
    if (position == 0) d_class[column] += sum;
}

template <typename T> __device__ inline void round_rows(T* y, const float* x, int stride, int n) {
    begin_launch();
    const int column = blockIdx.y * THREADS + threadIdx.x;
    if (column < n) y[size_t(blockIdx.x) * n + column] = from_f32<T>(x[size_t(blockIdx.x) * stride + column]);
}

}  // namespace

#define INSTANCE(T, suffix)                                                                                                          \
    KERNEL(THREADS) add_rows_bwd_##suffix(T* dst, const T* src, const int* groups, const int* from, int hidden) {                    \
        add_rows_bwd<T, T>(dst, src, groups, from, hidden);                                                                          \
    }                                                                                                                                \
    REGISTER_KERNEL(add_rows_bwd_##suffix)                                                                                           \
    KERNEL(THREADS) embed_bwd_##suffix(float* dst, const T* src, const int* groups, const int* from, int hidden) {                   \
        add_rows_bwd<float, T>(dst, src, groups, from, hidden);                                                                      \
    }                                                                                                                                \
    REGISTER_KERNEL(embed_bwd_##suffix)                                                                                              \
    KERNEL(THREADS)                                                                                                                  \
    clip_embed_bwd_##suffix(T* d_patches, float* d_class, float* d_positions, const T* dy, int images, int n_positions, int hidden) { \
        clip_embed_bwd<T>(d_patches, d_class, d_positions, dy, images, n_positions, hidden);                                         \
    }                                                                                                                                \
    REGISTER_KERNEL(clip_embed_bwd_##suffix)                                                                                         \
    KERNEL(THREADS) round_rows_fwd_##suffix(T* y, const float* x, int stride, int n) { round_rows<T>(y, x, stride, n); }             \
    REGISTER_KERNEL(round_rows_fwd_##suffix)
FOR_EACH_DTYPE(INSTANCE)
