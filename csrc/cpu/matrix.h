// Matrices in memory and their products, by the library that PyTorch itself multiplies with.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include <memory>
#include <new>

#include "common.h"

namespace fastreid_vi {

// Memory of one thread, not initialised.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<A*>(::operator new(static_cast<size_t>(size) * sizeof(A), kLine))) {}
  A* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(A* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<A, Free> data_;
};

// Element (i, j) at data[i * row + j * column].
template <typename A>
struct Matrix {
  A* data;
  int64_t rows, columns, row, column;

  Matrix transposed() const { return {data, columns, rows, column, row}; }
};

template <typename A>
Matrix<A> square(A* data, int64_t size) {
  return {data, size, size, size, 1};
}

// A tensor that shows the matrix. It never requires gradients, so that threads without PyTorch's
// thread-local state may use it.
template <typename A>
Tensor tensor_of(const Matrix<A>& m) {
  using Element = std::remove_const_t<A>;
  const int64_t sizes[] = {m.rows, m.columns}, strides[] = {m.row, m.column};
  const auto dtype = std::is_same_v<Element, double> ? ScalarType::Double : ScalarType::Float;
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  return torch::stable::from_blob(const_cast<Element*>(m.data), sizes, strides, cpu, dtype);
}

// out = left right, or out += left right
template <typename L, typename R, typename A>
void product(const Matrix<L>& left, const Matrix<R>& right, const Matrix<A>& out,
             bool add = false) {
  const Tensor a = tensor_of(left), b = tensor_of(right), c = tensor_of(out);
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_cpu_addmm_out(c.get(), c.get(), a.get(), b.get(), add ? 1.0 : 0.0, 1.0));
}

}  // namespace fastreid_vi
