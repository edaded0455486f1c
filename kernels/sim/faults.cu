// Kernels for the tests of the simulator (tests/simulator.rs): faults, each beside its correct twin, and the instructions of mma.cuh,
// async_copy.cuh and sim.h on their own. No GPU ever runs them: build.rs compiles this folder for the simulator alone.
#include "async_copy.cuh"
#include "common.cuh"
#include "mma.cuh"

// ---------------------------------------------------------------- shared memory

// out[i] = what thread (i + distance) % threads wrote. Correct with `barrier`: 0 none, 1 of the warp (enough within it), 2 of the block.
KERNEL(1024) fault_read_after_write(int* out, int distance, int barrier) {
    begin_launch();
    SHARED_MEMORY(shared);
    int* words = reinterpret_cast<int*>(shared);
    words[threadIdx.x] = threadIdx.x;
    if (barrier == 1) __syncwarp();
    if (barrier == 2) __syncthreads();
    out[threadIdx.x] = words[(threadIdx.x + distance) % blockDim.x];
}
REGISTER_KERNEL(fault_read_after_write)

// Rotates shared memory in place, by `distance`: all must have read before the first writes.
KERNEL(1024) fault_write_after_read(int* out, int distance, int barrier) {
    begin_launch();
    SHARED_MEMORY(shared);
    int* words = reinterpret_cast<int*>(shared);
    words[threadIdx.x] = threadIdx.x;
    __syncthreads();
    const int word = words[(threadIdx.x + distance) % blockDim.x];
    if (barrier == 1) __syncwarp();
    if (barrier == 2) __syncthreads();
    words[threadIdx.x] = word;
    out[threadIdx.x] = words[threadIdx.x];
}
REGISTER_KERNEL(fault_write_after_read)

// Every `n` threads write the same word.
KERNEL(1024) fault_write_after_write(int* out, int n) {
    begin_launch();
    SHARED_MEMORY(shared);
    int* words = reinterpret_cast<int*>(shared);
    words[threadIdx.x / n] = threadIdx.x;
    __syncthreads();
    out[threadIdx.x] = words[threadIdx.x / n];
}
REGISTER_KERNEL(fault_write_after_write)

// All write `n_words` words of shared memory, which may be more than there are.
KERNEL(1024) fault_shared_bounds(int* out, int n_words) {
    begin_launch();
    SHARED_MEMORY(shared);
    int* words = reinterpret_cast<int*>(shared);
    for (int i = threadIdx.x; i < n_words; i += blockDim.x) words[i] = i;
    __syncthreads();
    for (int i = threadIdx.x; i < n_words; i += blockDim.x) out[i] = words[i];
}
REGISTER_KERNEL(fault_shared_bounds)

// out[i] = shared[i], which nobody wrote.
KERNEL(1024) fault_unwritten(float* out) {
    begin_launch();
    SHARED_MEMORY(shared);
    out[threadIdx.x] = reinterpret_cast<const float*>(shared)[threadIdx.x];
}
REGISTER_KERNEL(fault_unwritten)

// ---------------------------------------------------------------- global memory

// Thread i writes out[first + i], or reads it.
KERNEL(1024) fault_global_bounds(int* out, int first, int write) {
    begin_launch();
    const int i = first + int(threadIdx.x);
    if (write) out[i] = i;
    else if (out[i] == 1) out[0] = 2;
}
REGISTER_KERNEL(fault_global_bounds)

// Copies four words with one instruction from `first` words on.
KERNEL(32) fault_misaligned(float* out, const float* in, int first) {
    begin_launch();
    Vec16<float>::load(in + first).store(out);
}
REGISTER_KERNEL(fault_misaligned)

// out[0..4] = in[0..4], read before or after the launch before is done, as constants or not.
KERNEL(32) fault_early(float* out, const float* in, int read_early, int constant, int write_early) {
    Vec16<float> v = {};
    if (read_early) v = constant ? Vec16<float>::load_constant(in) : Vec16<float>::load(in);
    if (write_early) v.store(out);
    begin_launch();
    if (!read_early) v = Vec16<float>::load(in);
    v.store(out);
}
REGISTER_KERNEL(fault_early)

// ---------------------------------------------------------------- barriers and collectives

// The first `n` threads come to a barrier; the others return.
KERNEL(1024) fault_barrier_left_out(int* out, int n) {
    begin_launch();
    if (int(threadIdx.x) < n) __syncthreads();
    out[threadIdx.x] = 1;
}
REGISTER_KERNEL(fault_barrier_left_out)

// The first `n` threads come to one barrier, the others to another.
KERNEL(1024) fault_two_barriers(int* out, int n) {
    begin_launch();
    if (int(threadIdx.x) < n) {
        __syncthreads();
        out[threadIdx.x] = 1;
    } else {
        __syncthreads();
        out[threadIdx.x] = 2;
    }
}
REGISTER_KERNEL(fault_two_barriers)

// The first `n` lanes come to a collective of all.
KERNEL(32) fault_lane_left_out(float* out, int n) {
    begin_launch();
    float x = 1.0f;
    if (int(threadIdx.x) < n) x = warp_sum(x);
    __syncthreads();
    out[threadIdx.x] = x;
}
REGISTER_KERNEL(fault_lane_left_out)

// The lanes below 16 exchange values with the lanes `lanes` away, and say that only they take part.
KERNEL(32) fault_shuffle_outside(int* out, int lanes) {
    begin_launch();
    int x = int(threadIdx.x);
    if (threadIdx.x < 16) x = __shfl_xor_sync(0xffffu, x, lanes);
    out[threadIdx.x] = x;
}
REGISTER_KERNEL(fault_shuffle_outside)

// ---------------------------------------------------------------- cp.async

// out = in by way of shared memory, a vector for each thread: waits if `wait`, has a barrier if `barrier`, and reads what the thread
// `distance` further on copied. Of the last vector only `valid_bytes` are copied.
KERNEL(1024) fault_async(float* out, const float* in, int wait, int barrier, int distance, int valid_bytes) {
    begin_launch();
    SHARED_MEMORY(shared);
    float* words = reinterpret_cast<float*>(shared);
    const int n = blockDim.x, me = threadIdx.x, other = (me + distance) % n;
    async_copy_16(words + me * 4, in + me * 4, me == n - 1 ? valid_bytes : 16);
    async_copy_commit();
    if (wait) async_copy_wait<0>();
    if (barrier) __syncthreads();
    Vec16<float>::load(words + other * 4).store(out + me * 4);
}
REGISTER_KERNEL(fault_async)

// Two groups of copies, of which the first is waited for: `read` says which of them is read.
KERNEL(1024) fault_async_group(float* out, const float* in, int read) {
    begin_launch();
    SHARED_MEMORY(shared);
    float* words = reinterpret_cast<float*>(shared);
    for (int group = 0; group < 2; ++group) {
        const int at = (group * int(blockDim.x) + int(threadIdx.x)) * 4;
        async_copy_16(words + at, in + at);
        async_copy_commit();
    }
    async_copy_wait<1>();
    const int at = (read * int(blockDim.x) + int(threadIdx.x)) * 4;
    Vec16<float>::load(words + at).store(out + threadIdx.x * 4);
    async_copy_wait<0>();
}
REGISTER_KERNEL(fault_async_group)

// ---------------------------------------------------------------- tensor cores

// d = A·B + c of one warp a block, all as fragments: a [blocks, 32, 4], b [blocks, 32, 2] words, c, d [blocks, 32, 4] f32.
template <typename T> static void mma_fragments(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
    const size_t lane = size_t(blockIdx.x) * WARP + threadIdx.x;
    uint32_t fa[4], fb[2];
    float fd[4];
    for (int i = 0; i < 4; ++i) fa[i] = a[lane * 4 + i];
    for (int i = 0; i < 2; ++i) fb[i] = b[lane * 2 + i];
    for (int i = 0; i < 4; ++i) fd[i] = c[lane * 4 + i];
    mma_m16n8k16<T>(fd, fa, fb);
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = fd[i];
}

// out [32, 4] = what each lane gets of four matrices [32 rows, 8] of 16 bits, lane i naming row rows[i].
KERNEL(32) check_ldmatrix(uint32_t* out, const uint4* matrices, const int* rows, int transposed) {
    begin_launch();
    SHARED_MEMORY(shared);
    uint4* tile = reinterpret_cast<uint4*>(shared);
    tile[threadIdx.x] = matrices[threadIdx.x];
    __syncthreads();
    uint32_t r[4];
    if (transposed) ldmatrix_x4_trans(r, tile + rows[threadIdx.x]);
    else ldmatrix_x4(r, tile + rows[threadIdx.x]);
    for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = r[i];
}
REGISTER_KERNEL(check_ldmatrix)

// ---------------------------------------------------------------- conversions

#define INSTANCE(T, suffix)                                                                                          \
    KERNEL(32) check_mma_##suffix(float* d, const uint32_t* a, const uint32_t* b, const float* c) {                  \
        begin_launch();                                                                                              \
        mma_fragments<T>(d, a, b, c);                                                                                \
    }                                                                                                                \
    REGISTER_KERNEL(check_mma_##suffix)                                                                              \
    KERNEL(1024) check_widen_##suffix(float* out, const T* in, int n) {                                              \
        begin_launch();                                                                                              \
        for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = to_f32(in[i]);                                    \
    }                                                                                                                \
    REGISTER_KERNEL(check_widen_##suffix)                                                                            \
    KERNEL(1024) check_narrow_##suffix(T* out, const float* in, int n) {                                             \
        begin_launch();                                                                                              \
        for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = from_f32<T>(in[i]);                               \
    }                                                                                                                \
    REGISTER_KERNEL(check_narrow_##suffix)                                                                           \
    KERNEL(1024) check_pack2_##suffix(uint32_t* out, const float* in, int n) {                                       \
        begin_launch();                                                                                              \
        for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = pack2<T>(in[2 * i], in[2 * i + 1]);               \
    }                                                                                                                \
    REGISTER_KERNEL(check_pack2_##suffix)
FOR_EACH_HALF(INSTANCE)
