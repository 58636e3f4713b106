// The host side of a CUDA room: device and stream, launch check, dtypes, registration. Compiled by
// g++ (tests/cuda/) the same files serve CPU tensors, under a namespace of their own.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include <cstdint>
#include <limits>

#include "common.h"
#include "device.h"

#ifdef __CUDACC__

// A PyTorch without CUDA lacks these symbols. Weak, they let the library load there; nothing calls
// them, for no CUDA tensor can exist.
extern "C" {
extern __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);
extern __attribute__((weak)) AOTITorchError torch_c10_cuda_check_msg(int32_t, const char*,
                                                                     const char*, uint32_t, bool,
                                                                     char**);
extern __attribute__((weak)) void torch_c10_cuda_free_error_msg(char*);
}

#define FASTREID_VI_CUDA_ROOM(m) STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CUDA, m)
#else
#define FASTREID_VI_CUDA_ROOM(m) STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_emulated, CPU, m)
#endif

namespace fastreid_vi {

// Makes the tensor's device current while it lives; the stream is the one PyTorch uses there.
class OnDevice {
 public:
#ifdef __CUDACC__
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#else
  explicit OnDevice(const Tensor&) {}
#endif
  cudaStream_t stream() const { return stream_; }

 private:
#ifdef __CUDACC__
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
};

// After every launch.
inline void check_launch() {
#ifdef __CUDACC__
  STD_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

// Bytes of shared memory, static and dynamic, that a block may have on the current device.
inline int64_t shared_memory_limit() {
#ifdef __CUDACC__
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
#else
  return static_cast<int64_t>(emulation::shared_limit);
#endif
}

// Whether the current device can run a kernel in clusters of this size, and has it compiled for
// that: code for sm_80 does nothing. A slice of a GPU (MIG) may be too small.
template <typename... Parameters>
bool runs_clusters([[maybe_unused]] void (*kernel)(Parameters...),
                   [[maybe_unused]] unsigned cluster, [[maybe_unused]] dim3 block,
                   [[maybe_unused]] size_t shared_bytes) {
#ifdef __CUDACC__
  int device = 0, major = 0, clusters = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaFuncAttributes attributes{};
  if (major < 9 || cudaFuncGetAttributes(&attributes, kernel) != cudaSuccess ||
      attributes.ptxVersion < 90) {
    return false;
  }
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                       static_cast<int>(shared_bytes));
  cudaLaunchAttribute dimension{};
  const auto config =
      cluster_config(cluster, dim3(cluster), block, shared_bytes, nullptr, &dimension);
  const bool known = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
  if (!known) cudaGetLastError();  // it is no error of the launch to come
  return known && clusters > 0;
#else
  return true;
#endif
}

// A grid's first axis; the others end at 65535.
inline dim3 blocks(int64_t count) {
  STD_TORCH_CHECK(count <= std::numeric_limits<int32_t>::max(), "a launch of ", count,
                  " blocks is beyond CUDA's limit");
  return dim3(static_cast<unsigned>(count));
}

// The device's own type for an element type of common.h.
template <typename T>
struct device_type {
  using type = T;
};
template <>
struct device_type<torch::headeronly::Half> {
  using type = __half;
};
template <>
struct device_type<torch::headeronly::BFloat16> {
  using type = __nv_bfloat16;
};

// Calls body.operator()<T>() with the device type of a floating dtype.
template <typename F>
void for_device_floating(ScalarType dtype, F&& body) {
  for_floating(dtype,
               [&]<typename T>() { body.template operator()<typename device_type<T>::type>(); });
}

template <typename T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

}  // namespace fastreid_vi
