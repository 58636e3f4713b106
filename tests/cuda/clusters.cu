// Small kernels for clusters and tensor cores, some of them wrong on purpose. A function returns
// null, or the error that the emulation raised.
#include <string>

#include "tensor_core.cuh"

namespace {

using fastreid_vi::at_rank;
using fastreid_vi::cluster_rank;
using fastreid_vi::cluster_sync;

constexpr int kThreads = 64, kBlocks = 4;

// Twice: every block hands its values to the one before it, in its own shared memory. A barrier
// shows that they are there, another that they were read.
template <bool there, bool read>
__global__ void fetch_kernel(const float* in, float* out) {
  SHARED_ARRAY(float, tile, [kThreads]);
  const int thread = blockIdx.x * kThreads + threadIdx.x;
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    tile[threadIdx.x] = in[thread] + round;
    if (there) cluster_sync();
    if (!there) __syncthreads();
    const float* const other = at_rank(&tile[0], (cluster_rank() + 1) % kBlocks);
    sum += other[kThreads - 1 - threadIdx.x];
    if (read) cluster_sync();
  }
  out[thread] = sum;
}

// Every block writes into the memory of the one after it.
template <bool begun, bool written>
__global__ void push_kernel(const float* in, float* out) {
  SHARED_ARRAY(float, tile, [kThreads]);
  const int thread = blockIdx.x * kThreads + threadIdx.x;
  if (begun) cluster_sync();
  at_rank(&tile[0], (cluster_rank() + 1) % kBlocks)[threadIdx.x] = in[thread];
  if (written) cluster_sync();
  if (!written) __syncthreads();
  out[thread] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void both_write_kernel(const float* in, float* out) {
  SHARED_ARRAY(float, tile, [kThreads]);
  tile[threadIdx.x] = in[threadIdx.x];
  cluster_sync();
  if (cluster_rank() != 1) at_rank(&tile[0], 1)[threadIdx.x] = in[threadIdx.x];
  cluster_sync();
  out[blockIdx.x * kThreads + threadIdx.x] = tile[threadIdx.x];
}

// Blocks of a cluster through global memory; `barrier` false: nothing orders them.
template <bool barrier>
__global__ void global_kernel(const float* in, float* out) {
  const int first = blockIdx.x / kBlocks * kBlocks, other = first + (cluster_rank() + 1) % kBlocks;
  float* const kept = out + gridDim.x * kThreads;
  kept[blockIdx.x * kThreads + threadIdx.x] = in[blockIdx.x * kThreads + threadIdx.x];
  if (barrier) cluster_sync();
  out[blockIdx.x * kThreads + threadIdx.x] = kept[other * kThreads + threadIdx.x];
}

__global__ void one_stays_away_kernel(const float*, float* out) {
  if (cluster_rank() == 2) {
    __syncthreads();
    if (threadIdx.x < 32) __syncthreads();
    __shfl_sync(fastreid_vi::kAllLanes, 1.0f, 0);
  }
  cluster_sync();
  out[blockIdx.x * kThreads + threadIdx.x] = 1;
}

__global__ void two_places_kernel(const float*, float* out) {
  if (cluster_rank() == 2) {
    cluster_sync();
  } else {
    cluster_sync();
  }
  out[blockIdx.x * kThreads + threadIdx.x] = 1;
}

__global__ void beyond_kernel(const float*, float* out) {
  SHARED_ARRAY(float, tile, [kThreads]);
  tile[threadIdx.x] = 1;
  cluster_sync();
  out[threadIdx.x] = at_rank(&tile[0], kBlocks)[threadIdx.x];
}

// d = a b by one warp; a [16, 16], b [16, 8]; `transposed`: stored as their transposes.
template <typename T, bool transposed>
__global__ void product_kernel(const float* in, float* out) {
  constexpr int pitch = 24;
  SHARED_ARRAY(T, a, [16 * pitch]);
  SHARED_ARRAY(T, b, [16 * pitch]);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) {
    const int row = i / 16, column = i % 16;
    a[transposed ? column * pitch + row : row * pitch + column] = fastreid_vi::narrow<T>(in[i]);
    if (column >= 8) continue;
    // The second operand counts as transposed when its rows lie along the sum.
    b[transposed ? row * pitch + column : column * pitch + row] =
        fastreid_vi::narrow<T>(in[256 + row * 8 + column]);
  }
  __syncwarp();
  uint32_t left[4], right[2];
  const int r = lane % 8, second = lane / 8 % 2 * 8, third = lane / 16 * 8;
  fastreid_vi::load_matrices<transposed>(
      left, transposed ? &a[(third + r) * pitch + second] : &a[(second + r) * pitch + third]);
  fastreid_vi::load_matrices<transposed>(
      right, transposed ? &b[(second + r) * pitch] : &b[r * pitch + second]);
  float d[4] = {1, 1, 1, 1};
  fastreid_vi::multiply_add<T>(d, left, right);
  for (int i = 0; i < 4; ++i) {
    out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
  }
}

using Kernel = void (*)(const float*, float*);

const char* run(Kernel kernel, unsigned cluster, dim3 grid, dim3 block, const float* in,
                float* out) {
  static std::string message;
  try {
    fastreid_vi::launch_clusters(kernel, cluster, grid, block, 0, nullptr, in, out);
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

#define EXPORT(name, cluster, grid, threads, ...)                                     \
  extern "C" __attribute__((visibility("default"))) const char* name(const float* in, \
                                                                     float* out) {    \
    return run(__VA_ARGS__, cluster, grid, threads, in, out);                         \
  }
#define TWO_CLUSTERS(name, ...) EXPORT(name, kBlocks, 2 * kBlocks, kThreads, __VA_ARGS__)

TWO_CLUSTERS(fetch, fetch_kernel<true, true>)
TWO_CLUSTERS(not_there_yet, fetch_kernel<false, true>)
TWO_CLUSTERS(not_read_yet, fetch_kernel<true, false>)
TWO_CLUSTERS(push, push_kernel<true, true>)
TWO_CLUSTERS(not_begun, push_kernel<false, true>)
TWO_CLUSTERS(not_written_yet, push_kernel<true, false>)
TWO_CLUSTERS(both_write, both_write_kernel)
TWO_CLUSTERS(through_global, global_kernel<true>)
TWO_CLUSTERS(through_global_unordered, global_kernel<false>)
TWO_CLUSTERS(one_stays_away, one_stays_away_kernel)
TWO_CLUSTERS(two_places, two_places_kernel)
TWO_CLUSTERS(beyond, beyond_kernel)
EXPORT(no_clusters, kBlocks, 6, kThreads, fetch_kernel<true, true>)
EXPORT(large_clusters, 16, 16, kThreads, fetch_kernel<true, true>)
EXPORT(product_half, 1, 1, 32, product_kernel<__half, false>)
EXPORT(product_half_transposed, 1, 1, 32, product_kernel<__half, true>)
EXPORT(product_bfloat16, 1, 1, 32, product_kernel<__nv_bfloat16, false>)
EXPORT(product_bfloat16_transposed, 1, 1, 32, product_kernel<__nv_bfloat16, true>)
