// exp and log whose loops turn into vector instructions; float64 takes the library's.
#pragma once

#include <cmath>
#include <cstdint>

namespace fastreid_vi {

[[gnu::always_inline]] inline double exponential(double x) { return std::exp(x); }
[[gnu::always_inline]] inline double logarithm(double x) { return std::log(x); }

// Cephes' expf for x <= 0; zero below -80, so that quotients of results are normal numbers.
[[gnu::always_inline]] inline float exponential(float x) {
  const float least = -80.0f, clamped = x < least ? least : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof(scale));
  // A comparison that keeps NaN: NaN < least is false, and n carries the NaN on to p.
  return x < least ? 0.0f : p * scale;
}

// Cephes' logf for positive, normal x.
[[gnu::always_inline]] inline float logarithm(float x) {
  int32_t bits;
  __builtin_memcpy(&bits, &x, sizeof(bits));
  int32_t exponent = (bits >> 23) - 126;
  const int32_t mantissa = (bits & 0x007fffff) | 0x3f000000;  // [0.5, 1)
  float m;
  __builtin_memcpy(&m, &mantissa, sizeof(m));
  const bool low = m < 0.707106781186547524f;
  exponent -= low ? 1 : 0;
  const float f = (low ? m + m : m) - 1.0f, z = f * f, e = static_cast<float>(exponent);
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  p = p * f * z;
  p += e * -2.12194440e-4f;
  p -= 0.5f * z;
  return f + p + e * 0.693359375f;
}

}  // namespace fastreid_vi
