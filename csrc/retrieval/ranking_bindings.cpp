// Binding of ranking.h; bindings.cpp calls bind_ranking.
#include "bindings.h"

namespace py = pybind11;

namespace fastreid_vi::retrieval {
namespace {

template <typename T>
Distances<T> view_of(const py::array& distance) {
  constexpr py::ssize_t size = sizeof(T);
  if (distance.ndim() != 2) throw std::invalid_argument("distance: expected a matrix");
  if (distance.strides(0) % size != 0 || distance.strides(1) % size != 0 ||
      reinterpret_cast<std::uintptr_t>(distance.data()) % alignof(T) != 0) {
    throw std::invalid_argument("distance: expected aligned elements");
  }
  return {static_cast<const T*>(distance.data()), distance.shape(0), distance.shape(1),
          distance.strides(0) / size, distance.strides(1) / size};
}

template <typename T>
std::span<T> fill_span(py::array_t<T>& values) {
  return {values.mutable_data(), static_cast<std::size_t>(values.size())};
}

py::tuple rank_rows_of(const py::array& distance, const Vector<std::int32_t>& query_ids,
                       const Vector<std::int32_t>& query_places,
                       const Vector<std::int32_t>& pool_ids,
                       const Vector<std::int32_t>& pool_places, const Vector<std::int64_t>& columns,
                       const Vector<std::int64_t>& offsets, const std::string& rule, int threads) {
  const Images queries{span_of(query_ids, "query_ids"), span_of(query_places, "query_places")};
  const Images pool{span_of(pool_ids, "pool_ids"), span_of(pool_places, "pool_places")};
  const Galleries galleries{span_of(columns, "columns"), span_of(offsets, "offsets")};
  const CameraRule camera_rule = rule_named(rule);
  if (galleries.size() < 0) throw std::invalid_argument("offsets: expected at least one entry");

  const std::vector<py::ssize_t> shape{galleries.size(),
                                       static_cast<py::ssize_t>(query_ids.size())};
  py::array_t<std::int32_t> matches(shape), first_image(shape), first_identity(shape),
      last_image(shape);
  py::array_t<double> average_precision(shape);
  const Counts counts{fill_span(matches), fill_span(first_image), fill_span(first_identity),
                      fill_span(last_image), fill_span(average_precision)};

  const auto rank = [&](auto distances) {
    py::gil_scoped_release released;
    return rank_rows(distances, queries, pool, galleries, camera_rule, threads, counts);
  };
  std::int64_t bad_row = -1;
  if (py::isinstance<py::array_t<float>>(distance)) {
    bad_row = rank(view_of<float>(distance));
  } else if (py::isinstance<py::array_t<double>>(distance)) {
    bad_row = rank(view_of<double>(distance));
  } else {
    throw std::invalid_argument("distance: expected float32 or float64");
  }
  return py::make_tuple(matches, first_image, first_identity, last_image, average_precision,
                        bad_row);
}

}  // namespace

void bind_ranking(py::module_& module) {
  module.def("rank_rows", &rank_rows_of, py::arg("distance").noconvert(),
             py::arg("query_ids").noconvert(), py::arg("query_places").noconvert(),
             py::arg("pool_ids").noconvert(), py::arg("pool_places").noconvert(),
             py::arg("columns").noconvert(), py::arg("offsets").noconvert(), py::arg("rule"),
             py::arg("threads"),
             "(matches, first_image, first_identity, last_image, average_precision) as "
             "[galleries, queries], then the first row with a NaN or -1.");
}

}  // namespace fastreid_vi::retrieval
