// Binding of streaming.h; bindings.cpp calls bind_streaming.
#include "bindings.h"
#include "streaming.h"

namespace py = pybind11;

namespace fastreid_vi::retrieval {

namespace {

template <typename T>
std::span<T> open_span(Vector<T>& values, const char* name) {
  if (values.ndim() != 1) throw std::invalid_argument(std::string(name) + ": expected a vector");
  return {values.mutable_data(), static_cast<std::size_t>(values.size())};
}

template <typename T>
std::int64_t count_ahead_of(const Vector<T>& distance, const Vector<std::int32_t>& query_ids,
                            const Vector<std::int32_t>& query_places,
                            const Vector<std::int32_t>& pool_ids,
                            const Vector<std::int32_t>& pool_places,
                            const Vector<std::int64_t>& columns, const Vector<std::int32_t>& slots,
                            const Vector<std::int64_t>& offsets, const std::string& rule,
                            const Vector<std::int64_t>& start, const Vector<T>& match_distance,
                            const Vector<std::int32_t>& match_slots, Vector<std::int64_t>& images,
                            Vector<std::int64_t>& identities, Vector<std::int32_t>& last,
                            int threads) {
  if (distance.ndim() != 2) throw std::invalid_argument("distance: expected a matrix");
  const Distances<T> block{distance.data(), distance.shape(0), distance.shape(1), distance.shape(1),
                           1};
  const Images queries{span_of(query_ids, "query_ids"), span_of(query_places, "query_places")};
  const Images pool{span_of(pool_ids, "pool_ids"), span_of(pool_places, "pool_places")};
  const Galleries members{span_of(columns, "columns"), span_of(offsets, "offsets")};
  const Matches<T> matches{span_of(start, "start"), span_of(match_distance, "match_distance"),
                           span_of(match_slots, "match_slots")};
  const Ahead ahead{open_span(images, "images"), open_span(identities, "identities"),
                    open_span(last, "last")};
  const CameraRule camera_rule = rule_named(rule);
  const auto positions = span_of(slots, "slots");
  py::gil_scoped_release released;
  return count_ahead(block, queries, pool, members, positions, camera_rule, threads, matches,
                     ahead);
}

template <typename T>
void define(py::module_& module) {
  module.def(
      "count_ahead", &count_ahead_of<T>, py::arg("distance").noconvert(),
      py::arg("query_ids").noconvert(), py::arg("query_places").noconvert(),
      py::arg("pool_ids").noconvert(), py::arg("pool_places").noconvert(),
      py::arg("columns").noconvert(), py::arg("slots").noconvert(), py::arg("offsets").noconvert(),
      py::arg("rule"), py::arg("start").noconvert(), py::arg("match_distance").noconvert(),
      py::arg("match_slots").noconvert(), py::arg("images").noconvert(),
      py::arg("identities").noconvert(), py::arg("last").noconvert(), py::arg("threads"),
      "Adds one block of columns to images, identities and last; first row with a NaN or -1.");
}

}  // namespace

void bind_streaming(py::module_& module) {
  define<float>(module);
  define<double>(module);
}

}  // namespace fastreid_vi::retrieval
