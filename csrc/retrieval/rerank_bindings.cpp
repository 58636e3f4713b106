// Binding of rerank_select.h and rerank.h; bindings.cpp calls bind_rerank.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>

#include "rerank.h"
#include "rerank_select.h"

namespace py = pybind11;

namespace fastreid_vi::retrieval {
namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style>;

void expect(bool good, const std::string& message) {
  if (!good) throw std::invalid_argument(message);
}

template <typename T>
std::span<const T> span_of(const Array<T>& values, const char* name) {
  expect(values.ndim() == 1, std::string(name) + ": expected a vector");
  return {values.data(), static_cast<std::size_t>(values.size())};
}

template <typename T>
Array<T> array_of(const std::vector<T>& values) {
  return Array<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

Array<float> matrix(std::int64_t rows, std::int64_t columns) {
  return Array<float>(std::vector<py::ssize_t>{rows, columns});
}

Array<std::int32_t> integers(std::int64_t rows, std::int64_t columns) {
  return Array<std::int32_t>(std::vector<py::ssize_t>{rows, columns});
}

void expect_shape(const py::array& array, std::int64_t rows, std::int64_t columns,
                  const char* name) {
  const bool fits = array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == columns;
  expect(fits, std::string(name) + ": expected shape [" + std::to_string(rows) + ", " +
                   std::to_string(columns) + "]");
}

Trials trials_of(const Array<std::int64_t>& columns, const Array<std::int64_t>& offsets) {
  const Trials trials{span_of(columns, "columns"), span_of(offsets, "offsets")};
  const auto& o = trials.offsets;
  expect(!o.empty() && o.front() == 0 && o.back() == std::ssize(trials.columns) &&
             std::is_sorted(o.begin(), o.end()),
         "offsets: expected to rise from 0 to the length of columns");
  return trials;
}

// Holds the arrays that the selection looks at.
class HeldSelection {
 public:
  HeldSelection(Array<float> squares, Array<float> base, Array<std::int64_t> columns,
                Array<std::int64_t> offsets, std::int64_t rows, std::int64_t candidates,
                std::int64_t keep, std::int64_t keep_others, int threads)
      : squares_(std::move(squares)),
        base_(std::move(base)),
        columns_(std::move(columns)),
        offsets_(std::move(offsets)),
        selection_(shape_of(squares_, base_, rows, candidates, keep, keep_others),
                   span_of(squares_, "squares"), trials_of(columns_, offsets_),
                   base_.mutable_data(), threads) {}

  void take(Array<float> dots) {
    const auto width = selection_.shape().items - selection_.taken();
    expect(dots.ndim() == 2 && dots.shape(1) == width, "dots: expected all later items as columns");
    float* values = dots.mutable_data();
    const std::int64_t rows = dots.shape(0);
    py::gil_scoped_release released;
    selection_.take(values, rows);
  }

  py::tuple finish() {
    const auto& s = selection_.shape();
    auto lists = integers(s.rows, s.keep), others = integers(s.items - s.rows, s.keep_others);
    auto distances = matrix(s.rows, s.keep);
    auto maxima = matrix(selection_.trials().size(), s.rows);
    const Selected out{lists.mutable_data(), distances.mutable_data(), others.mutable_data(),
                       maxima.mutable_data()};
    {
      py::gil_scoped_release released;
      selection_.finish(out);
    }
    return py::make_tuple(lists, distances, others, maxima);
  }

 private:
  static SelectionShape shape_of(const Array<float>& squares, const Array<float>& base,
                                 std::int64_t rows, std::int64_t candidates, std::int64_t keep,
                                 std::int64_t keep_others) {
    expect(base.ndim() == 2, "base: expected shape [queries, images]");
    return {squares.size(), base.shape(0), rows, candidates, keep, keep_others, base.shape(1)};
  }

  Array<float> squares_, base_;
  Array<std::int64_t> columns_, offsets_;
  Selection selection_;
};

// What all trials share: lists, neighbours and the distances of queries to the pool.
class Reranking {
 public:
  Reranking(Array<std::int32_t> lists, const Array<float>& distances, Array<std::int32_t> others,
            Array<float> base, Array<float> rounding, const std::vector<Array<float>>& features,
            std::int64_t query_sets, std::int64_t gallery_sets, std::int64_t k1, std::int64_t half,
            bool expand, std::int64_t k2, float weight, int threads)
      : lists_(std::move(lists)),
        others_(std::move(others)),
        base_(std::move(base)),
        rounding_(std::move(rounding)) {
    expect(lists_.ndim() == 2 && others_.ndim() == 2 && base_.ndim() == 2,
           "lists, others, base: expected matrices");
    expect_shape(distances, lists_.shape(0), lists_.shape(1), "distances");
    expect(query_sets >= 1 && gallery_sets >= 1 && base_.shape(0) % query_sets == 0,
           "base: expected a row per query");
    expect(k1 >= 1 && half >= 0 && k2 >= 1, "k1, half, k2: expected to be positive");
    shape_ = {base_.shape(0) / query_sets,
              query_sets,
              base_.shape(1),
              gallery_sets,
              lists_.shape(0),
              k2,
              weight};
    std::vector<const float*> rows;
    std::int64_t size = -1;
    for (const auto& part : features) {
      expect(part.ndim() == 2 && (size < 0 || part.shape(1) == size),
             "features: expected matrices of equal width");
      size = part.shape(1);
      for (std::int64_t i = 0; i < part.shape(0); ++i) rows.push_back(part.data() + i * size);
    }
    expect(std::ssize(rows) >= shape_.rows, "features: expected one per row");
    const Lists view{lists_.data(), distances.data(), lists_.shape(0), lists_.shape(1)};
    py::gil_scoped_release released;
    sets_ = find_neighbors(view, {k1, half, expand}, rows, size, threads);
  }

  py::tuple neighbors() const {
    return py::make_tuple(array_of(sets_.offsets), array_of(sets_.columns),
                          array_of(sets_.distances));
  }

  Array<float> encoding(const Array<float>& maxima) const {
    check_maxima(maxima);
    return array_of(encoded(maxima, 1));
  }

  py::tuple averages(const Array<float>& maxima, const Array<std::int64_t>& items) const {
    check_maxima(maxima);
    const auto values = encoded(maxima, 1);
    const auto found = average(shape_, input(maxima, values, {}, {}), span_of(items, "items"));
    return py::make_tuple(array_of(found.offsets), array_of(found.columns),
                          array_of(found.distances));
  }

  Array<float> result(const Array<float>& maxima, const Array<std::int64_t>& columns,
                      const Array<std::int64_t>& wanted, int threads) const {
    check_maxima(maxima);
    auto out = matrix(wanted.size(), columns.size());
    const auto images = span_of(columns, "columns"), rows = span_of(wanted, "wanted");
    float* filled = out.mutable_data();
    {
      py::gil_scoped_release released;
      const auto values = encoded(maxima, threads);
      fuse(shape_, input(maxima, values, images, rows), threads, filled);
    }
    return out;
  }

 private:
  void check_maxima(const Array<float>& maxima) const {
    expect(maxima.ndim() == 1 && maxima.size() == shape_.rows && rounding_.size() == shape_.rows,
           "maxima, rounding: expected one per row");
  }

  std::vector<float> encoded(const Array<float>& maxima, int threads) const {
    std::vector<float> values(sets_.columns.size());
    const auto rows = static_cast<std::size_t>(shape_.rows);
    encode(sets_.offsets, sets_.distances, {maxima.data(), rows}, {rounding_.data(), rows}, threads,
           values);
    return values;
  }

  TrialInput input(const Array<float>& maxima, const std::vector<float>& values,
                   std::span<const std::int64_t> columns,
                   std::span<const std::int64_t> wanted) const {
    const auto rows = static_cast<std::size_t>(shape_.rows);
    return {{lists_.data(), nullptr, lists_.shape(0), lists_.shape(1)},
            {others_.data(), nullptr, others_.shape(0), others_.shape(1)},
            {sets_.offsets, sets_.columns, values},
            base_.data(),
            {maxima.data(), rows},
            {rounding_.data(), rows},
            columns,
            wanted};
  }

  Array<std::int32_t> lists_, others_;
  Array<float> base_, rounding_;
  TrialShape shape_;
  NeighborSets sets_;
};

}  // namespace

void bind_rerank(py::module_& module) {
  py::class_<HeldSelection>(module, "RerankSelection",
                            "Nearest items of every item, from stripes of products.")
      .def(py::init<Array<float>, Array<float>, Array<std::int64_t>, Array<std::int64_t>,
                    std::int64_t, std::int64_t, std::int64_t, std::int64_t, int>(),
           py::arg("squares").noconvert(), py::arg("base").noconvert(),
           py::arg("columns").noconvert(), py::arg("offsets").noconvert(), py::kw_only(),
           py::arg("rows"), py::arg("candidates"), py::arg("keep"), py::arg("keep_others"),
           py::arg("threads"))
      .def("take", &HeldSelection::take, py::arg("dots").noconvert(),
           "The next rows, [rows, items from the first of them on]; changed in place.")
      .def("finish", &HeldSelection::finish, "(lists, distances, other_lists, maxima).");
  py::class_<Reranking>(module, "Reranking", "Neighbours and distances that all trials share.")
      .def(py::init<Array<std::int32_t>, const Array<float>&, Array<std::int32_t>, Array<float>,
                    Array<float>, const std::vector<Array<float>>&, std::int64_t, std::int64_t,
                    std::int64_t, std::int64_t, bool, std::int64_t, float, int>(),
           py::arg("lists").noconvert(), py::arg("distances").noconvert(),
           py::arg("others").noconvert(), py::arg("base").noconvert(),
           py::arg("rounding").noconvert(), py::arg("features"), py::kw_only(),
           py::arg("query_sets"), py::arg("gallery_sets"), py::arg("k1"), py::arg("half"),
           py::arg("expand"), py::arg("k2"), py::arg("weight"), py::arg("threads"))
      .def("neighbors", &Reranking::neighbors, "R*: (offsets, columns, distances).")
      .def("encoding", &Reranking::encoding, py::arg("maxima").noconvert(), "Values of V.")
      .def("averages", &Reranking::averages, py::arg("maxima").noconvert(),
           py::arg("items").noconvert(), "Rows of V': (offsets, columns, values).")
      .def("result", &Reranking::result, py::arg("maxima").noconvert(),
           py::arg("columns").noconvert(), py::arg("wanted").noconvert(), py::arg("threads"),
           "F of the wanted queries and of the pool images `columns`.");
}

}  // namespace fastreid_vi::retrieval
