// Starts an emulated kernel as cuLaunchKernel does: from the addresses of its arguments. The caller
// says what it put there, and every parameter must agree.
#pragma once

#include <string>
#include <type_traits>
#include <utility>

#include "common.cuh"

namespace invoke {

// "f4" for float, "h2" __half, "b2" __nv_bfloat16, "i8" int64_t, "s24" a struct, "*f4" a pointer.
template <typename T>
std::string kind() {
  const std::string size = std::to_string(sizeof(T));
  if constexpr (std::is_same_v<T, __half>) return "h2";
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return "b2";
  if constexpr (std::is_floating_point_v<T>) return "f" + size;
  if constexpr (std::is_integral_v<T>) return (std::is_signed_v<T> ? "i" : "u") + size;
  return "s" + size;
}

template <typename T>
void expect(const std::string& given, int index) {
  bool agrees;
  std::string wanted;
  if constexpr (std::is_pointer_v<T>) {
    using Element = std::remove_cv_t<std::remove_pointer_t<T>>;
    wanted = "*" + kind<Element>();
    // A null pointer fits any parameter, a signed integer its unsigned twin, and a structure its
    // members.
    agrees = given == wanted || given == "*";
    if (wanted[1] == 'u') agrees |= given == "*i" + wanted.substr(2);
    if (wanted[1] == 's') agrees |= given.substr(2) == std::to_string(alignof(Element));
  } else {
    wanted = kind<std::remove_cv_t<T>>();
    agrees = given == wanted;
  }
  if (!agrees) {
    throw emulation::Error("argument " + std::to_string(index) + ": expected " + wanted + ", got " +
                           given);
  }
}

// grid and block: three axes each. Returns the error, or null.
template <typename... Parameters>
const char* run(void (*kernel)(Parameters...), const unsigned* grid, const unsigned* block,
                size_t shared_bytes, void* const* arguments, const char* const* kinds, int count) {
  static std::string message;
  try {
    if (count != static_cast<int>(sizeof...(Parameters))) {
      throw emulation::Error("expected " + std::to_string(sizeof...(Parameters)) +
                             " arguments, got " + std::to_string(count));
    }
    [&]<size_t... I>(std::index_sequence<I...>) {
      (expect<Parameters>(kinds[I], static_cast<int>(I)), ...);
      fastreid_vi::launch(kernel, dim3(grid[0], grid[1], grid[2]),
                          dim3(block[0], block[1], block[2]), shared_bytes, nullptr,
                          *static_cast<std::remove_cv_t<Parameters>*>(arguments[I])...);
    }(std::index_sequence_for<Parameters...>{});
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace invoke

#define FASTREID_VI_INVOKE(name, ...)                                                           \
  extern "C" __attribute__((visibility("default"))) const char* name(                           \
      const unsigned* grid, const unsigned* block, size_t shared_bytes, void* const* arguments, \
      const char* const* kinds, int count) {                                                    \
    return invoke::run(__VA_ARGS__, grid, block, shared_bytes, arguments, kinds, count);        \
  }
