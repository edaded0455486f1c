// Pictures to the tower's pixels: bicubic passes over u8, and normalisation. Weights and levels are tables that the host makes
// (src/image/resize.rs says how); what is left is integer arithmetic and copies, so that every bit is the host's.
//
//   resize_horizontal_u8: y[r, x, c] = to_u8(sum_i k[x, i] p(first + r, start[x] + i, c))
//   resize_vertical_u8:   y[r, x, c] = to_u8(sum_i k[r, i] p(start[r] + i, first + x, c))
//   normalize_f32:        pixels[c, y, x] = levels[c, p(y, x, c)]
//   to_u8(sum)            = clamp((sum + 2^21) >> 22, 0, 255)
//   p(y, x, c)            = source[y - top, x - left, c] within the source's rows and columns, fill[c] around it
//
// Layouts: source [bottom - top, right - left, 3] u8, fill = R | G << 8 | B << 16; y [rows, n, 3] u8; taps [outputs, 2 + padded] i32:
// start, number of taps, weights k in units of 2^-22; levels [3, 256] f32, pixels [3, side, side] f32. All contiguous, any alignment.
// Sums are below 2^31 (`to_u8` in resize.rs says why), in the order of the taps, which does not matter.
// Grid: in x one block for each row of y, or of a plane; in y as many as its elements take with one thread each. Writes with `=`. No
// shared memory: neighbours read the same pixels, from L1.
#include "common.cuh"

namespace {

constexpr int THREADS = 128;
constexpr int CHANNELS = 3;
constexpr int WEIGHT_BITS = 22;

// A picture somewhere on an endless field of one colour.
struct Source {
    const uint8_t* pixels;
    int top, bottom, left, right, fill;

    __device__ int at(int y, int x, int c) const {
        if (y < top || y >= bottom || x < left || x >= right) return fill >> (8 * c) & 255;
        return pixels[(size_t(y - top) * (right - left) + (x - left)) * CHANNELS + c];
    }
};

__device__ inline uint8_t to_u8(int sum) {
    const int rounded = (sum + (1 << (WEIGHT_BITS - 1))) >> WEIGHT_BITS;
    return uint8_t(rounded < 0 ? 0 : rounded > 255 ? 255 : rounded);
}

// One pass: along the rows if HORIZONTAL, else along the columns.
template <bool HORIZONTAL>
__device__ inline void resize_u8(uint8_t* y, int n, const Source& source, const int* taps, int stride, int first) {
    begin_launch();
    const int i = blockIdx.y * THREADS + threadIdx.x, x = i / CHANNELS, c = i % CHANNELS, row = blockIdx.x;
    if (x >= n) return;
    const int* own = taps + size_t(HORIZONTAL ? x : row) * stride;
    const int start = own[0], n_taps = own[1];
    int sum = 0;
    for (int tap = 0; tap < n_taps; ++tap) {
        const int level = HORIZONTAL ? source.at(first + row, start + tap, c) : source.at(start + tap, first + x, c);
        sum += own[2 + tap] * level;
    }
    y[size_t(row) * n * CHANNELS + i] = to_u8(sum);
}

}  // namespace

#define SOURCE const uint8_t *pixels, int top, int bottom, int left, int right, int fill

KERNEL(THREADS) resize_horizontal_u8(uint8_t* y, int n, SOURCE, const int* taps, int stride, int first) {
    resize_u8<true>(y, n, {pixels, top, bottom, left, right, fill}, taps, stride, first);
}
REGISTER_KERNEL(resize_horizontal_u8)

KERNEL(THREADS) resize_vertical_u8(uint8_t* y, int n, SOURCE, const int* taps, int stride, int first) {
    resize_u8<false>(y, n, {pixels, top, bottom, left, right, fill}, taps, stride, first);
}
REGISTER_KERNEL(resize_vertical_u8)

KERNEL(THREADS) normalize_f32(float* y, int side, SOURCE, const float* levels) {
    begin_launch();
    const Source source = {pixels, top, bottom, left, right, fill};
    const int x = blockIdx.y * THREADS + threadIdx.x, c = blockIdx.x / side, row = blockIdx.x % side;
    if (x >= side) return;
    y[size_t(blockIdx.x) * side + x] = levels[c * 256 + source.at(row, x, c)];
}
REGISTER_KERNEL(normalize_f32)
