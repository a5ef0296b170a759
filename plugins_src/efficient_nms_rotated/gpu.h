// What the kernels need of CUDA, or of tests/cuda_on_cpu.h, which runs them on the CPU.
#pragma once

#ifdef ENR_EMULATED
#include "tests/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>

namespace enr {

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 blocks, int threads, cudaStream_t stream, Arguments... arguments) {
    kernel<<<blocks, threads, 0, stream>>>(arguments...);
    return cudaPeekAtLastError();
}

// The shared memory of a block, one T.
template <typename T>
__device__ __forceinline__ T& shared() {
    __shared__ T memory;
    return memory;
}

__device__ __forceinline__ void pause() { __nanosleep(100); }

}  // namespace enr
#endif

namespace enr {

constexpr unsigned kWarp = 0xffffffffu;

// Bits of the lanes below this one.
__device__ __forceinline__ unsigned lanes_below(int lane) { return (1u << lane) - 1; }

__device__ __forceinline__ unsigned or_of_warp(unsigned bits) {
    for (int step = 16; step; step >>= 1) bits |= __shfl_xor_sync(kWarp, bits, step);
    return bits;
}

__device__ __forceinline__ int sum_of_warp(int value) {
    for (int step = 16; step; step >>= 1) value += __shfl_xor_sync(kWarp, value, step);
    return value;
}

}  // namespace enr
