// The part of CUDA's language that our kernels use, for g++: keywords, indices, barriers, warp
// operations, integer atomics, intrinsics. CUDA's own headers supply the vector, half and bfloat16
// types.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "emulation.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __shared__ \
  static_assert(false, "declare shared memory with SHARED_ARRAY or DYNAMIC_SHARED");
#define __forceinline__ inline
#define __launch_bounds__(...)

#define SHARED_ARRAY(type, name, extents) \
  auto& name = emulation::shared_array<type extents>([] {}, #name)
#define DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulation::scheduler.dynamic_shared())

#define threadIdx (emulation::scheduler.current->index)
#define blockIdx (emulation::scheduler.block_index)
#define blockDim (emulation::scheduler.block)
#define gridDim (emulation::scheduler.grid)

namespace emulation {

using Place = std::source_location;

// A lambda's type is unique to its place in the source and to the template instance around it: as
// on the device, one declaration is one array, however often a block comes by.
template <typename Array, typename Site>
Array& shared_array(Site, const char* name) {
  static const char key = 0;
  return *static_cast<Array*>(
      scheduler.shared(&key, name, sizeof(Array), std::max<size_t>(alignof(Array), 16)));
}

template <typename T>
T shuffle(unsigned mask, T value, unsigned source, const Place& place) {
  static_assert(sizeof(T) <= sizeof(uint64_t) && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = scheduler.warp_operation(Operation::shuffle, mask, bits, source, place);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline unsigned lane() { return scheduler.current->linear % warp_size; }

// Reported to the race detector; defined there, absent without it.
extern "C" __attribute__((weak)) void fastreid_vi_emulation_atomic(const void* address,
                                                                   size_t bytes);
extern "C" __attribute__((weak)) void fastreid_vi_emulation_fence();

template <typename T, typename F>
T atomic(T* address, F&& update) {
  static_assert(std::is_integral_v<T>,
                "no float atomics: their order, and so the result, would vary");
  if (fastreid_vi_emulation_atomic) fastreid_vi_emulation_atomic(address, sizeof(T));
  const Quietly quietly;
  const T old = *address;
  *address = update(old);
  return old;
}

}  // namespace emulation

inline void __syncthreads(const emulation::Place& place = emulation::Place::current()) {
  emulation::scheduler.block_barrier(false, place);
}
inline int __syncthreads_count(int predicate,
                               const emulation::Place& place = emulation::Place::current()) {
  return static_cast<int>(emulation::scheduler.block_barrier(predicate != 0, place));
}
inline int __syncthreads_or(int predicate,
                            const emulation::Place& place = emulation::Place::current()) {
  return emulation::scheduler.block_barrier(predicate != 0, place) != 0;
}
inline int __syncthreads_and(int predicate,
                             const emulation::Place& place = emulation::Place::current()) {
  return emulation::scheduler.block_barrier(predicate == 0, place) == 0;
}
inline void __syncwarp(unsigned mask = ~0u,
                       const emulation::Place& place = emulation::Place::current()) {
  emulation::scheduler.warp_operation(emulation::Operation::sync, mask, 0, 0, place);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const emulation::Place& place = emulation::Place::current()) {
  const unsigned first = emulation::lane() & ~unsigned(width - 1);
  return emulation::shuffle(mask, value, first | (unsigned(source) & unsigned(width - 1)), place);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  const emulation::Place& place = emulation::Place::current()) {
  const unsigned lane = emulation::lane(), other = lane ^ unsigned(lanes);
  const bool beyond = (other & ~unsigned(width - 1)) > (lane & ~unsigned(width - 1));
  return emulation::shuffle(mask, value, beyond ? lane : other, place);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   const emulation::Place& place = emulation::Place::current()) {
  const unsigned lane = emulation::lane();
  const bool inside = (lane & unsigned(width - 1)) + delta < unsigned(width);
  return emulation::shuffle(mask, value, inside ? lane + delta : lane, place);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 const emulation::Place& place = emulation::Place::current()) {
  const unsigned lane = emulation::lane();
  const bool inside = (lane & unsigned(width - 1)) >= delta;
  return emulation::shuffle(mask, value, inside ? lane - delta : lane, place);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              const emulation::Place& place = emulation::Place::current()) {
  return static_cast<unsigned>(emulation::scheduler.warp_operation(emulation::Operation::ballot,
                                                                   mask, predicate != 0, 0, place));
}
inline int __any_sync(unsigned mask, int predicate,
                      const emulation::Place& place = emulation::Place::current()) {
  return __ballot_sync(mask, predicate, place) != 0;
}
inline int __all_sync(unsigned mask, int predicate,
                      const emulation::Place& place = emulation::Place::current()) {
  return __ballot_sync(mask, predicate == 0, place) == 0;
}

inline void __threadfence() {
  if (emulation::fastreid_vi_emulation_fence) emulation::fastreid_vi_emulation_fence();
}
inline void __threadfence_block() {}

template <typename T>
T atomicAdd(T* address, T value) {
  return emulation::atomic(address, [&](T old) { return T(old + value); });
}
template <typename T>
T atomicMax(T* address, T value) {
  return emulation::atomic(address, [&](T old) { return old > value ? old : value; });
}
template <typename T>
T atomicMin(T* address, T value) {
  return emulation::atomic(address, [&](T old) { return old < value ? old : value; });
}
template <typename T>
T atomicOr(T* address, T value) {
  return emulation::atomic(address, [&](T old) { return T(old | value); });
}
template <typename T>
T atomicExch(T* address, T value) {
  return emulation::atomic(address, [&](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  return emulation::atomic(address, [&](T old) { return old == expected ? value : old; });
}

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
template <typename A, typename B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  return a > b ? a : b;
}
template <typename A, typename B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  return a < b ? a : b;
}

namespace fastreid_vi {

inline void expect_aligned(const void* address, int bytes) {
  if (reinterpret_cast<uintptr_t>(address) % static_cast<unsigned>(bytes) == 0) return;
  emulation::scheduler.fail("accesses " + std::to_string(bytes) +
                            " bytes at an address that is not a multiple of it");
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            const Arguments&... arguments) {
  emulation::scheduler.run(grid, block, shared_bytes,
                           [&] { kernel(static_cast<Parameters>(arguments)...); });
}

// With `cluster` neighbouring blocks running together.
template <typename... Parameters, typename... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, dim3 block,
                     size_t shared_bytes, cudaStream_t, const Arguments&... arguments) {
  emulation::scheduler.run(
      grid, block, shared_bytes, [&] { kernel(static_cast<Parameters>(arguments)...); }, cluster);
}

}  // namespace fastreid_vi
