// Launch and registration of the retrieval loss.
#include <algorithm>

#include "cmr_rows.cuh"
#include "stream.h"

namespace {

using fastreid_vi::Accumulator;
using fastreid_vi::CmrScale;
using fastreid_vi::input;
using fastreid_vi::kCmrColumns;
using fastreid_vi::kCmrThreads;
using fastreid_vi::launch;
using fastreid_vi::output;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The batch as the kernels take it, and their buffers.
struct Batch {
  Tensor x, labels, modalities, tables, scales;
  int rows, columns;
  int64_t pitch;
  int longest, padded;  // the largest gallery of the general path
  cudaStream_t stream;
};

Batch batch_of(const char* op, const Tensor& embeddings, const Tensor& labels,
               const Tensor& modalities, double strength, cudaStream_t stream) {
  STD_TORCH_CHECK(embeddings.dim() == 2, op, ": expected embeddings of rank 2, got ",
                  embeddings.dim());
  const int64_t rows = embeddings.size(0), columns = embeddings.size(1);
  STD_TORCH_CHECK(labels.dim() == 1 && labels.size(0) == rows && modalities.dim() == 1 &&
                      modalities.size(0) == rows && labels.scalar_type() == ScalarType::Long &&
                      modalities.scalar_type() == ScalarType::Long,
                  op, ": expected int64 labels and modalities of shape [", rows, "]");
  STD_TORCH_CHECK(rows <= fastreid_vi::kCmrLongest, op, ": expected at most ",
                  fastreid_vi::kCmrLongest, " rows, got ", rows);
  const double longest = 2 / strength < 1 ? 1 : 2 / strength;
  const int general = longest < double(rows) ? static_cast<int>(longest) : static_cast<int>(rows);
  const int padded = fastreid_vi::sort_padded(general);
  const int64_t width = embeddings.scalar_type() == ScalarType::Double ? 8 : 4;
  STD_TORCH_CHECK(padded * (fastreid_vi::kSoftRankSlotBytes + width) + 2048 <=
                      fastreid_vi::shared_memory_limit(),
                  op, ": galleries of up to ", general,
                  " rows, at or below 2 / strength, do not fit the ",
                  "shared memory of this device");
  const bool unit = columns == 1 || embeddings.stride(1) == 1;
  const Tensor x = unit ? embeddings : torch::stable::contiguous(embeddings);
  const auto type = fastreid_vi::accumulate_type(embeddings.scalar_type());
  return {x,
          torch::stable::contiguous(labels),
          torch::stable::contiguous(modalities),
          torch::stable::new_empty(
              x, {fastreid_vi::kCmrPlanInts + fastreid_vi::kCmrItemInts * rows}, ScalarType::Int),
          torch::stable::new_empty(x, {2 * rows}, type),
          static_cast<int>(rows),
          static_cast<int>(columns),
          x.stride(0),
          general,
          padded,
          stream};
}

// Whether 16-byte vectors can run along every row.
template <typename T>
bool aligned(const void* data, int64_t pitch) {
  return pitch % fastreid_vi::Vector<T>::size == 0 &&
         reinterpret_cast<uintptr_t>(data) % fastreid_vi::kVectorBytes == 0;
}

template <typename T>
int64_t column_blocks(const Batch& batch) {
  return (batch.columns + kCmrColumns<T> - 1) / kCmrColumns<T>;
}

template <typename T>
size_t row_bytes(const Batch& batch) {
  return static_cast<size_t>(batch.padded) * fastreid_vi::kCmrEntryBytes<T>;
}

dim3 row_blocks(const Batch& batch) {
  return dim3(static_cast<unsigned>(std::min(batch.rows, fastreid_vi::kCmrRowBlocks)));
}

template <typename T>
const CmrScale<Accumulator<T>>* scales(const Batch& batch) {
  return input<CmrScale<Accumulator<T>>>(batch.scales);
}

// The tables and norms, then the sums over the batch or the shares of the loss.
template <typename T, bool backward>
void prepare(const Batch& batch, double* shares, Accumulator<T>* sums) {
  using A = Accumulator<T>;
  const T* x = input<T>(batch.x);
  const int64_t blocks = column_blocks<T>(batch);
  launch(fastreid_vi::cmr_batch_kernel<T>, fastreid_vi::blocks(batch.rows),
         dim3(fastreid_vi::kCmrBatchThreads), 0, batch.stream, x, input<int64_t>(batch.labels),
         input<int64_t>(batch.modalities), batch.pitch, batch.rows, batch.columns,
         output<int>(batch.tables), output<CmrScale<A>>(batch.scales));
  fastreid_vi::check_launch();
  launch(fastreid_vi::cmr_columns_kernel<T, backward>, fastreid_vi::blocks(blocks),
         dim3(kCmrThreads), batch.rows * sizeof(unsigned short), batch.stream, x, batch.pitch,
         batch.rows, batch.columns, aligned<T>(x, batch.pitch), output<int>(batch.tables),
         scales<T>(batch), shares, sums, blocks * kCmrColumns<T>);
  fastreid_vi::check_launch();
}

template <typename T>
void forward(const Batch& batch, const Tensor& loss, double strength) {
  const int64_t blocks = column_blocks<T>(batch);
  const Tensor partial =
      torch::stable::new_empty(batch.x, {2 * blocks + batch.rows}, ScalarType::Double);
  double* shares = output<double>(partial);
  prepare<T, false>(batch, shares, nullptr);
  launch(fastreid_vi::cmr_loss_kernel<T>, row_blocks(batch), dim3(kCmrThreads), row_bytes<T>(batch),
         batch.stream, input<T>(batch.x), batch.pitch, batch.rows, batch.columns,
         output<int>(batch.tables), scales<T>(batch), shares, static_cast<int>(blocks),
         shares + 2 * blocks, output<Accumulator<T>>(loss), batch.padded, strength);
  fastreid_vi::check_launch();
}

template <typename T>
void backward(const Batch& batch, const Tensor& grad, const Tensor& dx, double strength) {
  using A = Accumulator<T>;
  const int64_t pitch = column_blocks<T>(batch) * kCmrColumns<T>;
  const Tensor sums = torch::stable::new_empty(
      batch.x, {(fastreid_vi::kCmrCommonSums + batch.rows) * pitch}, grad.scalar_type());
  const Tensor slopes = torch::stable::new_empty(
      batch.x, {static_cast<int64_t>(batch.rows) * batch.longest}, grad.scalar_type());
  const T* x = input<T>(batch.x);
  prepare<T, true>(batch, nullptr, output<A>(sums));
  launch(fastreid_vi::cmr_slopes_kernel<T>, row_blocks(batch), dim3(kCmrThreads),
         row_bytes<T>(batch), batch.stream, x, batch.pitch, batch.rows, batch.columns,
         output<int>(batch.tables), scales<T>(batch), output<A>(slopes), batch.longest,
         batch.padded, strength);
  fastreid_vi::check_launch();
  T* to = output<T>(dx);
  launch(fastreid_vi::cmr_gradient_kernel<T>, fastreid_vi::blocks(batch.rows), dim3(kCmrThreads), 0,
         batch.stream, input<A>(grad), x, batch.pitch, batch.rows, batch.columns,
         aligned<T>(x, batch.pitch), aligned<T>(to, batch.columns), output<int>(batch.tables),
         scales<T>(batch), input<A>(sums), pitch, input<A>(slopes), batch.longest, to, strength);
  fastreid_vi::check_launch();
}

Tensor cross_modality_retrieval_loss(const Tensor& embeddings, const Tensor& labels,
                                     const Tensor& modalities, double strength) {
  const fastreid_vi::OnDevice device(embeddings);
  const Batch batch = batch_of("cross_modality_retrieval_loss", embeddings, labels, modalities,
                               strength, device.stream());
  Tensor loss = torch::stable::new_empty(embeddings, {},
                                         fastreid_vi::accumulate_type(embeddings.scalar_type()));
  if (batch.rows == 0) return torch::stable::zero_(loss);
  fastreid_vi::for_device_floating(embeddings.scalar_type(),
                                   [&]<typename T>() { forward<T>(batch, loss, strength); });
  return loss;
}

Tensor cross_modality_retrieval_loss_backward(const Tensor& grad, const Tensor& embeddings,
                                              const Tensor& labels, const Tensor& modalities,
                                              double strength) {
  const char* op = "cross_modality_retrieval_loss_backward";
  STD_TORCH_CHECK(grad.numel() == 1 &&
                      grad.scalar_type() == fastreid_vi::accumulate_type(embeddings.scalar_type()),
                  op, ": expected one grad in the accumulation dtype");
  const fastreid_vi::OnDevice device(embeddings);
  const Batch batch = batch_of(op, embeddings, labels, modalities, strength, device.stream());
  Tensor dx = torch::stable::new_empty(embeddings, {embeddings.size(0), embeddings.size(1)});
  if (dx.numel() == 0) return dx;
  fastreid_vi::for_device_floating(embeddings.scalar_type(),
                                   [&]<typename T>() { backward<T>(batch, grad, dx, strength); });
  return dx;
}

}  // namespace

FASTREID_VI_CUDA_ROOM(m) {
  m.impl("cross_modality_retrieval_loss", TORCH_BOX(&cross_modality_retrieval_loss));
  m.impl("cross_modality_retrieval_loss_backward",
         TORCH_BOX(&cross_modality_retrieval_loss_backward));
}
