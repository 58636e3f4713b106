// Binding of search.h; bindings.cpp calls bind_search.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "search.h"

namespace py = pybind11;

namespace fastreid_vi::retrieval {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

Metric metric_named(const std::string& name) {
  if (name == "cosine") return Metric::kCosine;
  if (name == "inner") return Metric::kInner;
  if (name == "euclidean") return Metric::kEuclidean;
  throw std::invalid_argument("metric: unknown \"" + name + "\"");
}

void expect(bool good, const char* message) {
  if (!good) throw std::invalid_argument(message);
}

// Columns must be adjacent; a row may be longer than what it shows.
template <typename T>
Matrix<T> view_of(const py::array_t<T>& array, const std::string& name) {
  constexpr py::ssize_t size = sizeof(T);
  const bool fits = array.ndim() == 2 && (array.shape(1) < 2 || array.strides(1) == size) &&
                    array.strides(0) % size == 0 &&
                    reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) == 0;
  if (!fits) throw std::invalid_argument(name + ": expected a matrix of aligned, adjacent columns");
  return {array.data(), array.shape(0), array.shape(1), array.strides(0) / size};
}

std::span<const double> norms_of(const Array<double>& norms, std::int64_t rows, const char* name) {
  if (norms.ndim() != 1 || norms.shape(0) != rows) {
    throw std::invalid_argument(std::string(name) + ": expected one norm per row");
  }
  return {norms.data(), static_cast<std::size_t>(rows)};
}

// Holds the arrays that Nearest looks at.
template <typename T>
struct Held {
  py::array_t<T> queries, part;
  Array<double> lengths;
  Nearest<T> nearest;

  Held(py::array_t<T> given, const Array<double>& norms, std::int64_t k, const std::string& metric)
      : queries(std::move(given)),
        nearest(view_of(queries, "queries"), norms_of(norms, queries.shape(0), "norms"), k,
                metric_named(metric)) {}

  void open(std::int64_t first_query, std::int64_t count, py::array_t<T> gallery,
            Array<double> norms, std::int64_t first_index) {
    const Matrix<T> rows = view_of(gallery, "gallery");
    expect(rows.columns == queries.shape(1), "gallery: expected rows as long as the queries");
    expect(rows.rows < (std::int64_t{1} << 31), "gallery: expected fewer than 2^31 rows at once");
    expect(first_query >= 0 && count >= 0 && first_query <= nearest.queries() - count,
           "first_query, count: expected a range of queries");
    const auto spans = norms_of(norms, rows.rows, "norms");
    part = std::move(gallery);
    lengths = std::move(norms);
    nearest.open(first_query, count, rows, spans, first_index);
  }

  void add(const py::array_t<T>& products, std::int64_t first_column, int threads) {
    const Matrix<T> values = view_of(products, "products");
    expect(values.rows == nearest.open_queries(), "products: expected one row per open query");
    expect(first_column >= 0 && first_column <= nearest.open_rows() - values.columns,
           "products: expected columns of the open part");
    py::gil_scoped_release released;
    nearest.add(values, first_column, threads);
  }

  void close(int threads) {
    {
      py::gil_scoped_release released;
      nearest.close(threads);
    }
    part = py::array_t<T>();
    lengths = Array<double>();
  }

  py::tuple take(int threads) {
    const std::vector<py::ssize_t> shape{nearest.queries(), nearest.k()};
    py::array_t<T> scores(shape);
    py::array_t<std::int64_t> indices(shape);
    const auto size = static_cast<std::size_t>(scores.size());
    const std::span<T> best{scores.mutable_data(), size};
    const std::span<std::int64_t> where{indices.mutable_data(), size};
    {
      py::gil_scoped_release released;
      nearest.take(best, where, threads);
    }
    return py::make_tuple(scores, indices);
  }
};

template <typename T>
void bind_one(py::module_& module, const char* name) {
  py::class_<Held<T>>(module, name, "The k best gallery rows of every query, block by block.")
      .def("open", &Held<T>::open, py::arg("first_query"), py::arg("count"),
           py::arg("gallery").noconvert(), py::arg("norms").noconvert(), py::arg("first_index"),
           "Some queries meet a part of the gallery, rows [n, D] with norms [n].")
      .def("add", &Held<T>::add, py::arg("products").noconvert(), py::arg("first_column"),
           py::arg("threads"), "Products [count, m] with rows of the open part.")
      .def("close", &Held<T>::close, py::arg("threads"), "Ends the part.")
      .def("take", &Held<T>::take, py::arg("threads"), "(scores, indices), [Q, k], best first.");
  module.def(
      "nearest",
      [](py::array_t<T> queries, const Array<double>& norms, std::int64_t k,
         const std::string& metric) {
        expect(k >= 1, "k: expected >= 1");
        return std::make_unique<Held<T>>(std::move(queries), norms, k, metric);
      },
      py::arg("queries").noconvert(), py::arg("norms").noconvert(), py::arg("k"), py::arg("metric"),
      "An empty list of k places for every query.");
  module.def(
      "row_norms",
      [](const py::array_t<T>& rows, int threads) {
        const Matrix<T> view = view_of(rows, "rows");
        Array<double> norms(view.rows);
        const std::span<double> filled{norms.mutable_data(), static_cast<std::size_t>(view.rows)};
        {
          py::gil_scoped_release released;
          row_norms(view, threads, filled);
        }
        return norms;
      },
      py::arg("rows").noconvert(), py::arg("threads"), "Euclidean norms [N] in float64.");
}

}  // namespace

void bind_search(py::module_& module) {
  bind_one<float>(module, "NearestFloat");
  bind_one<double>(module, "NearestDouble");
}

}  // namespace fastreid_vi::retrieval
