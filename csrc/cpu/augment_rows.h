// Rows of pixels: the changes of their channels to the byte of the reference, and their way out.
// Products are rounded before they are added: no fused multiply-add here.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "common.h"

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#define FASTREID_VI_NO_FMA
#elif defined(__GNUC__)
// Inlined, a function would take its caller's word for it.
#define FASTREID_VI_NO_FMA __attribute__((optimize("fp-contract=off"), noinline))
#else
#define FASTREID_VI_NO_FMA
#endif

namespace fastreid_vi::augment {

using Byte = uint8_t;

// Pixel x of channel c lies at plane[c] + x * step.
struct Row {
  std::array<const Byte*, 3> plane;
  int64_t step;

  Row from(int64_t x) const {
    return {{plane[0] + x * step, plane[1] + x * step, plane[2] + x * step}, step};
  }
};

FASTREID_VI_CLONES inline void split(const Byte* __restrict pixels, int64_t width,
                                     Byte* __restrict red, Byte* __restrict green,
                                     Byte* __restrict blue) {
  for (int64_t x = 0; x < width; ++x) {
    red[x] = pixels[3 * x];
    green[x] = pixels[3 * x + 1];
    blue[x] = pixels[3 * x + 2];
  }
}

// Half to even, or the fraction cut off.
template <bool Nearest, typename A>
[[gnu::always_inline]] inline Byte level(A value) {
  if constexpr (Nearest) value = std::nearbyint(value);
  return static_cast<Byte>(static_cast<int>(value));
}

template <bool Nearest>
FASTREID_VI_CLONES FASTREID_VI_NO_FMA void weighted(const Byte* __restrict red,
                                                    const Byte* __restrict green,
                                                    const Byte* __restrict blue, double w1,
                                                    double w2, double w3, int64_t width,
                                                    Byte* __restrict out) {
  for (int64_t x = 0; x < width; ++x) {
    out[x] = level<Nearest>((w1 * red[x] + w2 * green[x]) + w3 * blue[x]);
  }
}

// The whole sum is at most 765, where its third is exact in integers: rounded down, or to nearest
// (a third is never half way).
template <bool Nearest>
FASTREID_VI_CLONES void averaged(const Byte* __restrict red, const Byte* __restrict green,
                                 const Byte* __restrict blue, int64_t width, Byte* __restrict out) {
  for (int64_t x = 0; x < width; ++x) {
    const unsigned sum = red[x] + green[x] + blue[x];
    out[x] = static_cast<Byte>((sum + Nearest) / 3);
  }
}

template <bool Nearest>
FASTREID_VI_CLONES FASTREID_VI_NO_FMA void drawn_to(const Byte* __restrict centre,
                                                    const Byte* __restrict from, float factor,
                                                    int64_t width, Byte* __restrict out) {
  for (int64_t x = 0; x < width; ++x) {
    const float g = centre[x];
    out[x] = level<Nearest>(g + factor * (from[x] - g));
  }
}

FASTREID_VI_CLONES FASTREID_VI_NO_FMA inline void toned(
    const Byte* __restrict red, const Byte* __restrict green, const Byte* __restrict blue,
    const double* __restrict gains, double offset, int64_t width, Byte* __restrict out) {
  const double a = gains[0], b = gains[1], c = gains[2];
  for (int64_t x = 0; x < width; ++x) {
    const double grey = ((a * red[x] + b * green[x]) + c * blue[x]) + offset;
    out[x] =
        static_cast<Byte>(static_cast<int>(std::min(std::max(std::nearbyint(grey), 0.0), 255.0)));
  }
}

// What the 256 hues of Pillow stand for: sector of the circle, and the place in it.
struct HueTable {
  std::array<int32_t, 256> sector;
  std::array<float, 256> part;

  HueTable() {
    for (int hue = 0; hue < 256; ++hue) {
      const double place = static_cast<float>(hue) * 6.0 / 255.0;
      const double whole = std::floor(place);
      sector[hue] = static_cast<int32_t>(whole) % 6;
      part[hue] = static_cast<float>(place - whole);
    }
  }
};

// a where the mask is -1, b where it is 0. Branches would keep the loops below from being vectors.
[[gnu::always_inline]] inline int pick(int mask, int a, int b) { return (a & mask) | (b & ~mask); }

// Pillow's RGB to HSV. `value` is the largest channel.
FASTREID_VI_CLONES FASTREID_VI_NO_FMA inline void to_hsv(
    const Byte* __restrict red, const Byte* __restrict green, const Byte* __restrict blue,
    int64_t width, Byte* __restrict hue, Byte* __restrict saturation, Byte* __restrict value) {
  for (int64_t x = 0; x < width; ++x) {
    const int r = red[x], g = green[x], b = blue[x];
    const int high = std::max(r, std::max(g, b)), low = std::min(r, std::min(g, b));
    const int spread = high - low;
    const int not_red = (r - high) >> 31, not_green = (g - high) >> 31;
    const int after = pick(not_red, pick(not_green, g, r), b);
    const int before = pick(not_red, pick(not_green, r, b), g);
    const int base = pick(not_red, pick(not_green, 4, 2), 0);
    const float divisor = static_cast<float>(std::max(spread, 1));
    const float up = static_cast<float>(high - after) / divisor;
    const float down = static_cast<float>(high - before) / divisor;
    const double sum = static_cast<double>(base) + static_cast<double>(up);
    const float sector = static_cast<float>(sum - static_cast<double>(down));
    const double turn = static_cast<double>(sector) / 6.0 + 1.0;  // 5/6 to 11/6
    const float place = static_cast<float>(turn - static_cast<double>(static_cast<int>(turn)));
    const int whole = high - ((high - 1) >> 31);  // at least 1
    const float share = static_cast<float>(spread) / static_cast<float>(whole);
    const int coloured = -spread >> 31;
    hue[x] = static_cast<Byte>(static_cast<int>(static_cast<double>(place) * 255.0) & coloured);
    saturation[x] = static_cast<Byte>(static_cast<int>(static_cast<double>(share) * 255.0));
    value[x] = static_cast<Byte>(high);
  }
}

// C's round() of a number from 0 to 255.
[[gnu::always_inline]] inline int half_up(double value) {
  return (static_cast<int>(value * 2.0) + 1) >> 1;
}

// Pillow's HSV to RGB, of hues moved by `shift`.
FASTREID_VI_CLONES FASTREID_VI_NO_FMA inline void from_hsv(
    const Byte* __restrict hue, const Byte* __restrict saturation, const Byte* __restrict value,
    const int32_t* __restrict sectors, const float* __restrict parts, int shift, int64_t width,
    Byte* __restrict red, Byte* __restrict green, Byte* __restrict blue) {
  for (int64_t x = 0; x < width; ++x) {
    const int h = (hue[x] + shift) & 255, v = value[x];
    const int sector = sectors[h];
    const float part = parts[h];
    const float share = static_cast<float>(static_cast<double>(saturation[x]) / 255.0);
    const float product = share * part;
    const double bright = v;
    const int p = half_up(bright * (1.0 - static_cast<double>(share)));
    const int q = half_up(bright * (1.0 - static_cast<double>(product)));
    const double rest = 1.0 - static_cast<double>(part);
    const int t = half_up(bright * (1.0 - static_cast<double>(share) * rest));
    const int is0 = -(sector == 0), is1 = -(sector == 1), is2 = -(sector == 2);
    const int is3 = -(sector == 3), is4 = -(sector == 4), is5 = -(sector == 5);
    // Without saturation p, q and t are v.
    red[x] = static_cast<Byte>(pick(is1, q, pick(is2 | is3, p, pick(is4, t, v))));
    green[x] = static_cast<Byte>(pick(is0, t, pick(is3, q, pick(is4 | is5, p, v))));
    blue[x] = static_cast<Byte>(pick(is0 | is1, p, pick(is2, t, pick(is5, q, v))));
  }
}

// Sums of the channels, then of their products 00, 11, 22, 01, 02, 12, over a row.
FASTREID_VI_CLONES inline void add_moments(const Byte* __restrict red, const Byte* __restrict green,
                                           const Byte* __restrict blue, int64_t width,
                                           int64_t* __restrict sums) {
  int64_t s0 = 0, s1 = 0, s2 = 0, p00 = 0, p11 = 0, p22 = 0, p01 = 0, p02 = 0, p12 = 0;
  for (int64_t x = 0; x < width; ++x) {
    const int32_t r = red[x], g = green[x], b = blue[x];
    s0 += r;
    s1 += g;
    s2 += b;
    p00 += r * r;
    p11 += g * g;
    p22 += b * b;
    p01 += r * g;
    p02 += r * b;
    p12 += g * b;
  }
  const int64_t row[9] = {s0, s1, s2, p00, p11, p22, p01, p02, p12};
  for (int i = 0; i < 9; ++i) sums[i] += row[i];
}

// Gains of the channels and offset that give an image with these sums the asked mean and spread.
FASTREID_VI_NO_FMA inline void tone(const int64_t* moments, int64_t pixels, const float* mix,
                                    double* gains, double* offset) {
  double sums[9], w[3];
  std::copy_n(moments, 9, sums);
  std::copy_n(mix, 3, w);
  const double count = static_cast<double>(std::max<int64_t>(pixels, 1));
  double terms[6];
  constexpr int kPairs[6][2] = {{0, 0}, {1, 1}, {2, 2}, {0, 1}, {0, 2}, {1, 2}};
  for (int k = 0; k < 6; ++k) {
    const auto [i, j] = kPairs[k];
    terms[k] = (w[i] * w[j]) * (sums[3 + k] - sums[i] * sums[j] / count);
  }
  const double own = (terms[0] + terms[1]) + terms[2];
  const double cross = (terms[3] + terms[4]) + terms[5];
  const double deviation = std::sqrt(std::max((own + 2.0 * cross) / count, 0.0));
  const double scale = static_cast<double>(mix[4]) / (deviation + 1e-3);
  const double mean = ((w[0] * sums[0] + w[1] * sums[1]) + w[2] * sums[2]) / count;
  for (int c = 0; c < 3; ++c) gains[c] = w[c] * scale;
  *offset = static_cast<double>(mix[3]) - mean * scale;
}

}  // namespace fastreid_vi::augment
