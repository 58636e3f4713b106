// The layer between our CUDA kernels and whatever compiles them: nvcc, NVRTC, or g++. With g++
// (emulation.h) they run on the CPU, one fibre per thread, so that tests execute every kernel
// without a GPU.
//
// A new kernel, step by step
//
// <family>.cuh: device code only. It includes common.cuh and nothing of the host, no <cmath> and no
// <cstdint>, for it must also compile under NVRTC, which has no host headers. Write plain CUDA:
// threadIdx, __syncthreads, __shfl_xor_sync, powf. Only what g++ cannot read has a name here:
//
//   SHARED_ARRAY(float, partial, [8][32]);  // __shared__ float partial[8][32];
//   DYNAMIC_SHARED(float, tile);            // extern __shared__ float tile[];
//
// Inline PTX goes behind a function with `#ifdef __CUDACC__` and, for g++, a loop over the lanes.
//
// <family>.cu: checks, allocation, launch(kernel, grid, block, shared_bytes, stream, arguments...),
// check_launch(), and registration with FASTREID_VI_CUDA_ROOM, all from stream.h. Keep it thin. It
// is compiled by g++ too: the same op then takes CPU tensors.
//
// fastreid_vi/nvrtc/<family>.py and a line in its ROOMS: the same host code in Python, for
// installations without nvcc. Every test of the kernels runs with it too, and compares.
//
// tests/cuda/test_<family>_kernels.py: the contract of the op's own tests through EmulatedRoom
// (room.py), and what only the kernel knows through the `emulated` fixture: emulated.gem_pool(x, p,
// eps). Every test runs in three thread orders under a race detector, and once more under the
// address and undefined-behaviour sanitizers. Nothing has to be built or bound by hand.
//
// tests/cuda/budgets.py: registers, shared memory, 128-bit accesses. A kernel without a line there
// fails test_cuda_compiles.py, as does one that spills on sm_80, sm_90a or sm_100.
//
// The emulation has no TMA, wgmma, mbarrier or cooperative group. Blocks run one after another,
// those of a cluster (launch_clusters, tensor_core.cuh) together: a kernel whose blocks wait for
// each other otherwise never ends there. Only speed needs a GPU.
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

// `dimension` must live until the launch.
inline cudaLaunchConfig_t cluster_config(unsigned cluster, dim3 grid, dim3 block,
                                         size_t shared_bytes, cudaStream_t stream,
                                         cudaLaunchAttribute* dimension) {
  dimension->id = cudaLaunchAttributeClusterDimension;
  dimension->val.clusterDim.x = cluster;
  dimension->val.clusterDim.y = dimension->val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = dimension;
  config.numAttrs = 1;
  return config;
}

// With `cluster` neighbouring blocks running together; sm_90 and later.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block,
                     size_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > 48 * 1024) {
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared_bytes));
  }
  cudaLaunchAttribute dimension{};
  const auto config = cluster_config(cluster, grid, block, shared_bytes, stream, &dimension);
  cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}
#endif

}  // namespace fastreid_vi

#endif  // __CUDACC__
