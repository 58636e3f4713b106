// The last step of a row: pixel values become levels of the result's dtype, in either layout.
#pragma once

#include <array>
#include <cstdint>

#include "augment_rows.h"

namespace fastreid_vi::augment {

// Levels of the three channels in the result's dtype; bytes stay what they are.
template <typename T>
struct Levels {
  explicit Levels(const float* levels) {
    for (int c = 0; c < 3; ++c) {
      for (int v = 0; v < 256; ++v) {
        if constexpr (std::is_same_v<T, Byte>) {
          of[c][v] = static_cast<Byte>(v);
        } else {
          of[c][v] = static_cast<T>(levels[c * 256 + v]);
        }
      }
    }
  }
  T of[3][256];
};

template <typename T, int64_t Step>
inline void look_up(const Row& row, const Levels<T>& levels, int64_t count, T* __restrict out) {
  const Byte *red = row.plane[0], *green = row.plane[1], *blue = row.plane[2];
  for (int64_t x = 0; x < count; ++x) {
    out[3 * x] = levels.of[0][red[x * Step]];
    out[3 * x + 1] = levels.of[1][green[x * Step]];
    out[3 * x + 2] = levels.of[2][blue[x * Step]];
  }
}

template <typename T, int64_t Step>
inline void look_up_plane(const Byte* plane, const T* __restrict levels, int64_t count,
                          T* __restrict out) {
  for (int64_t x = 0; x < count; ++x) out[x] = levels[plane[x * Step]];
}

// Writes parts of a row of a result [B, 3, H, W]: `out` is its pixel 0 of channel 0.
template <typename T>
class Writer {
 public:
  Writer(const float* levels, bool channels_last, int64_t plane)
      : levels_(levels), last_(channels_last), plane_(plane) {}

  // Pixels begin to end; `row` starts with the first of them. Its step is 1, 3, -1 or -3.
  void pixels(const Row& row, int64_t begin, int64_t end, T* out) const {
    switch (row.step) {
      case 1:
        return stepped<1>(row, begin, end, out);
      case 3:
        return stepped<3>(row, begin, end, out);
      case -1:
        return stepped<-1>(row, begin, end, out);
      default:
        return stepped<-3>(row, begin, end, out);
    }
  }

  void border(Byte value, int64_t begin, int64_t end, T* out) const {
    set({levels_.of[0][value], levels_.of[1][value], levels_.of[2][value]}, begin, end, out);
  }

  // Bytes before normalisation are not erased.
  void erase(const std::array<float, 3>& values, int64_t begin, int64_t end, T* out) const {
    if constexpr (!std::is_same_v<T, Byte>) {
      set({static_cast<T>(values[0]), static_cast<T>(values[1]), static_cast<T>(values[2])}, begin,
          end, out);
    }
  }

 private:
  template <int64_t Step>
  void stepped(const Row& row, int64_t begin, int64_t end, T* out) const {
    if (last_) {
      look_up<T, Step>(row, levels_, end - begin, out + 3 * begin);
    } else {
      for (int c = 0; c < 3; ++c) {
        look_up_plane<T, Step>(row.plane[c], levels_.of[c], end - begin, out + c * plane_ + begin);
      }
    }
  }

  void set(const std::array<T, 3>& value, int64_t begin, int64_t end, T* out) const {
    const int64_t pixel = last_ ? 3 : 1, channel = last_ ? 1 : plane_;
    for (int64_t x = begin; x < end; ++x) {
      for (int c = 0; c < 3; ++c) out[x * pixel + c * channel] = value[c];
    }
  }

  Levels<T> levels_;
  bool last_;
  int64_t plane_;
};

}  // namespace fastreid_vi::augment
