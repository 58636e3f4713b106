// Small kernels, most of them wrong on purpose: the emulation must say so. A function returns null,
// or the error that the emulation raised.
#include <string>

#include "common.cuh"

namespace {

using fastreid_vi::launch;

constexpr int kThreads = 64;

// out[i] = in[63 - i] by way of shared memory.
template <bool barrier>
__global__ void reverse_kernel(const float* in, float* out) {
  SHARED_ARRAY(float, tile, [kThreads]);
  tile[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncthreads();
  out[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

// Running sums of two tiles through one buffer: the second barrier keeps the next write from an
// early reader.
template <bool barrier>
__global__ void two_tiles_kernel(const float* in, float* out) {
  SHARED_ARRAY(float, tile, [kThreads]);
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = in[round * kThreads + threadIdx.x];
    __syncthreads();
    sum += tile[(threadIdx.x + 1) % kThreads];
    if (barrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

// Every thread writes its neighbour's element too, with the same value: no result shows it.
__global__ void written_twice_kernel(float* out) {
  out[threadIdx.x] = 1;
  out[(threadIdx.x + 1) % kThreads] = 1;
}

__global__ void blocks_overlap_kernel(float* out) {
  if (threadIdx.x == 0) out[blockIdx.x / 2] = 1;
}

// The block that comes last adds up what all have written; `handed`: with the fence that hands a
// block's result over, `taken`: with the one that takes the others' over. Grid of four.
template <bool handed, bool taken>
__global__ void last_block_kernel(const float* in, float* out, unsigned* ticket) {
  SHARED_ARRAY(bool, last, [1]);
  if (threadIdx.x < 2) out[1 + blockIdx.x * 2 + threadIdx.x] = in[blockIdx.x * 2 + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (handed) __threadfence();
    last[0] = atomicAdd(ticket, 1u) == gridDim.x - 1;
    if (taken) __threadfence();
  }
  __syncthreads();
  if (!last[0] || threadIdx.x != 40) return;
  float sum = 0;
  for (int i = 0; i < 8; ++i) sum += out[1 + i];
  out[0] = sum;
}

__global__ void half_at_barrier_kernel(float* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

__global__ void barrier_against_shuffle_kernel(float* out) {
  float x = 1;
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    x = __shfl_xor_sync(fastreid_vi::kAllLanes, x, 1);
  }
  out[threadIdx.x] = x;
}

__global__ void divergent_shuffle_kernel(float* out) {
  float x = 1;
  if (threadIdx.x % 2 == 0) {
    x = __shfl_xor_sync(fastreid_vi::kAllLanes, x, 1);
  } else {
    x = __shfl_xor_sync(fastreid_vi::kAllLanes, x, 2);
  }
  out[threadIdx.x] = x;
}

__global__ void wrong_mask_kernel(float* out) {
  out[threadIdx.x] = __shfl_sync(0x0000FFFFu, 1.0f, 0);
}

__global__ void past_the_end_kernel(float* out) { out[threadIdx.x + 1] = 1; }

__global__ void past_shared_kernel(float* out) {
  SHARED_ARRAY(float, tile, [kThreads]);
  tile[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

__global__ void read_past_shared_kernel(float* out) {
  SHARED_ARRAY(float, tile, [kThreads]);
  tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void past_dynamic_kernel(float* out) {
  DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}

__global__ void unwritten_shared_kernel(float* out) {
  SHARED_ARRAY(float, tile, [kThreads]);
  if (threadIdx.x != 5) tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}

__global__ void misaligned_kernel(const float* in, float* out) {
  out[threadIdx.x] = fastreid_vi::load_vector(in + threadIdx.x).at[0];
}

// Lane i hands its value to lane i + 1 through shared memory.
template <bool barrier>
__global__ void within_a_warp_kernel(const float* in, float* out) {
  SHARED_ARRAY(float, tile, [kThreads]);
  tile[threadIdx.x] = in[threadIdx.x];
  if (barrier) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x / 32 * 32 + (threadIdx.x + 1) % 32];
}

// Right: counts, a dynamic array, early exit of the last threads, every reduction of common.cuh.
__global__ void histogram_kernel(const int* in, int count, int* out, int bins) {
  DYNAMIC_SHARED(int, counts);
  for (int i = threadIdx.x; i < bins; i += blockDim.x) counts[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    atomicAdd(&counts[in[i]], 1);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < bins; i += blockDim.x) atomicAdd(&out[i], counts[i]);
}

__global__ void reductions_kernel(const float* in, float* out) {
  const float x = in[threadIdx.x];
  const float sum = fastreid_vi::block_reduce(x, fastreid_vi::Sum{});
  const float high = fastreid_vi::block_reduce(x, fastreid_vi::Maximum{});
  const float low = fastreid_vi::block_reduce(x, fastreid_vi::Minimum{});
  const float warp = fastreid_vi::warp_reduce(x, fastreid_vi::Sum{});
  const int positive = __syncthreads_count(x > 0);
  const unsigned ballot = __ballot_sync(fastreid_vi::kAllLanes, x > 0);
  const float above = __shfl_up_sync(fastreid_vi::kAllLanes, x, 1, 16);
  const float below = __shfl_down_sync(fastreid_vi::kAllLanes, x, 3);
  const float results[] = {
      sum,   high, low, warp, static_cast<float>(positive), static_cast<float>(__popc(ballot)),
      above, below};
  for (int i = 0; i < 8; ++i) out[i * blockDim.x + threadIdx.x] = results[i];
}

__global__ void where_kernel(int* out) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  out[block * threads + thread] = block * 1000 + thread;
}

// Runs and gives the error, if any, for the test to read.
template <typename Kernel, typename... Arguments>
const char* run(Kernel kernel, dim3 grid, dim3 block, size_t shared, Arguments... arguments) {
  static std::string message;
  try {
    launch(kernel, grid, block, shared, nullptr, arguments...);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

#define EXPORT(name) extern "C" __attribute__((visibility("default"))) const char* name

#define ONE_BLOCK(name, kernel) \
  EXPORT(name)(const float* in, float* out) { return run(kernel, 1, kThreads, 0, in, out); }
#define WITHOUT_INPUT(name, kernel, blocks) \
  EXPORT(name)(const float*, float* out) { return run(kernel, blocks, kThreads, 0, out); }

#define FOUR_BLOCKS(name, kernel)                         \
  EXPORT(name)(const float* in, float* out) {             \
    unsigned ticket = 0;                                  \
    return run(kernel, 4, kThreads, 0, in, out, &ticket); \
  }

FOUR_BLOCKS(last_block, (last_block_kernel<true, true>))
FOUR_BLOCKS(not_handed_over, (last_block_kernel<false, true>))
FOUR_BLOCKS(not_taken_over, (last_block_kernel<true, false>))
ONE_BLOCK(reverse, reverse_kernel<true>)
ONE_BLOCK(missing_barrier, reverse_kernel<false>)
ONE_BLOCK(two_tiles, two_tiles_kernel<true>)
ONE_BLOCK(missing_second_barrier, two_tiles_kernel<false>)
ONE_BLOCK(within_a_warp, within_a_warp_kernel<true>)
ONE_BLOCK(missing_warp_barrier, within_a_warp_kernel<false>)
ONE_BLOCK(misaligned, misaligned_kernel)
ONE_BLOCK(reductions, reductions_kernel)
WITHOUT_INPUT(written_twice, written_twice_kernel, 1)
WITHOUT_INPUT(blocks_overlap, blocks_overlap_kernel, 4)
WITHOUT_INPUT(half_at_barrier, half_at_barrier_kernel, 1)
WITHOUT_INPUT(barrier_against_shuffle, barrier_against_shuffle_kernel, 1)
WITHOUT_INPUT(divergent_shuffle, divergent_shuffle_kernel, 1)
WITHOUT_INPUT(wrong_mask, wrong_mask_kernel, 1)
WITHOUT_INPUT(past_the_end, past_the_end_kernel, 1)
WITHOUT_INPUT(past_shared, past_shared_kernel, 1)
WITHOUT_INPUT(read_past_shared, read_past_shared_kernel, 1)
WITHOUT_INPUT(unwritten_shared, unwritten_shared_kernel, 1)

EXPORT(past_dynamic)(const float*, float* out) {
  return run(past_dynamic_kernel, 1, kThreads, kThreads * sizeof(float), out);
}
EXPORT(histogram)(const int* in, int count, int* out, int bins, int shared) {
  return run(histogram_kernel, 3, 40, static_cast<size_t>(shared), in, count, out, bins);
}
EXPORT(where)(int* out) { return run(where_kernel, dim3(2, 3, 2), dim3(4, 3, 2), 0, out); }
EXPORT(too_many_threads)(int* out) { return run(where_kernel, 1, 1025, 0, out); }
EXPORT(empty_grid)(int* out) { return run(where_kernel, dim3(0), 32, 0, out); }
EXPORT(grid_too_high)(int* out) { return run(where_kernel, dim3(1, 65536), 32, 0, out); }
EXPORT(too_much_shared)(int* out) { return run(where_kernel, 1, 32, 300000, out); }
