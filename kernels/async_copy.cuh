// Copies from global to shared memory that run beside the arithmetic (cp.async, sm_80 and later).
//
// A thread's copies since its last commit make a group; groups are done in order. After async_copy_wait<N> all but its last N groups are
// done, for this thread alone: a barrier must follow before other threads read.
#pragma once

#include "common.cuh"

namespace {

// Copies 16 bytes, of which the first `valid_bytes` (0 to 16) are read and the rest become zero. Both addresses are multiples of 16.
__device__ inline void async_copy_16(void* shared, const void* global, int valid_bytes = 16) {
#ifdef LLAVA_SIM
    sim::async_copy_16(shared, global, valid_bytes);
#else
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(valid_bytes) : "memory");
#endif
}

__device__ inline void async_copy_commit() {
#ifdef LLAVA_SIM
    sim::async_commit();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

template <int GROUPS_LEFT> __device__ inline void async_copy_wait() {
#ifdef LLAVA_SIM
    sim::async_wait(GROUPS_LEFT);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS_LEFT) : "memory");
#endif
}

}  // namespace
