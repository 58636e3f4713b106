// The layer between our CUDA kernels and whatever compiles them: nvcc, NVRTC, or g++ (emulation.h
// runs the kernels on the CPU, one fibre per thread, so that every one of them is executed without
// a GPU).
//
// A new kernel
//   1. <family>.cuh: device code only. Include device.h, common.cuh and nothing of the host, no
//   <cmath>,
//      no <cstdint>: the file must also compile under NVRTC, which has no host headers. Write plain
//      CUDA: threadIdx, __syncthreads, __shfl_xor_sync, powf. Only what g++ cannot read goes
//      through this layer:
//        SHARED_ARRAY(float, partial, [8][32]);   for  __shared__ float partial[8][32];
//        DYNAMIC_SHARED(float, tile);             for  extern __shared__ float tile[];
//      Inline PTX goes behind a function with `#ifdef __CUDACC__` and, for g++, a plain loop over
//      the lanes.
//   2. <family>.cu: checks, allocation, `launch(kernel, grid, block, shared_bytes, stream,
//   arguments...)`,
//      check_launch(), registration with FASTREID_VI_CUDA_ROOM (stream.h). Keep it thin: g++
//      compiles this file too, for CPU tensors.
//   3. tests/cuda/test_<family>.py: calls the op by its name through the `emulated` fixture, which
//   runs it
//      in three thread orders under a race detector; test_sanitizers.py runs the same file once
//      more under the address and undefined-behaviour sanitizers. Nothing has to be built or bound
//      by hand.
//   4. tests/cuda/budgets.py: registers, vector loads. A kernel without a line there fails
//      test_cuda_compiles.py, as does one that spills on sm_80, sm_90a or sm_100.
// The emulation has no TMA, wgmma, mbarrier, cluster or cooperative group, and blocks run one after
// another: a kernel whose blocks wait for each other deadlocks there. Races between warps are found
// by the detector (tests/cuda/races.cpp) whatever the order; only speed needs a GPU.
#pragma once

#if defined(__CUDACC_RTC__)
using int64_t = long long;
using uint32_t = unsigned;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#elif defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#else
#include "emulation_builtins.h"
#endif

#ifdef __CUDACC__

#define SHARED_ARRAY(type, name, extents) __shared__ type name extents
#define DYNAMIC_SHARED(type, name)                                    \
  extern __shared__ __align__(16) unsigned char fastreid_vi_shared[]; \
  type* const name = reinterpret_cast<type*>(fastreid_vi_shared)

namespace fastreid_vi {

// The emulation fails here when a vector access is not aligned to its size; the device would trap.
__device__ __forceinline__ void expect_aligned(const void*, int) {}

#ifndef __CUDACC_RTC__
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {  // more than the default needs the kernel's consent
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
}
#endif

}  // namespace fastreid_vi

#endif  // __CUDACC__
