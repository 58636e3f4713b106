// What the bindings share: vectors of NumPy as spans, names as rules.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <span>
#include <stdexcept>
#include <string>

#include "ranking.h"

namespace fastreid_vi::retrieval {

template <typename T>
using Vector = pybind11::array_t<T, pybind11::array::c_style>;

template <typename T>
std::span<const T> span_of(const Vector<T>& values, const char* name) {
  if (values.ndim() != 1) throw std::invalid_argument(std::string(name) + ": expected a vector");
  return {values.data(), static_cast<std::size_t>(values.size())};
}

inline CameraRule rule_named(const std::string& name) {
  if (name == "none") return CameraRule::kNone;
  if (name == "location") return CameraRule::kLocation;
  if (name == "same_id_and_camera") return CameraRule::kSameIdAndCamera;
  throw std::invalid_argument("rule: unknown \"" + name + "\"");
}

}  // namespace fastreid_vi::retrieval
