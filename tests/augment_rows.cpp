// A digest of every function of csrc/cpu/augment_rows.h over all colours: it must not follow the
// instruction set or the optimiser. Printed as one hexadecimal number.
#include "cpu/augment_rows.h"

#include <cinttypes>
#include <cstdio>
#include <vector>

using namespace fastreid_vi::augment;

namespace {

constexpr int64_t kPixels = 65533;  // not a multiple of any vector

uint64_t digest = 1469598103934665603ull;

void add(const void* data, size_t size) {
  const Byte* bytes = static_cast<const Byte*>(data);
  for (size_t i = 0; i < size; ++i) digest = (digest ^ bytes[i]) * 1099511628211ull;
}

}  // namespace

int main() {
  std::vector<std::vector<Byte>> planes(9, std::vector<Byte>(65536));
  std::vector<Byte>&r = planes[0], &g = planes[1], &b = planes[2];
  Byte *h = planes[3].data(), *s = planes[4].data(), *v = planes[5].data();
  Byte* out[3] = {planes[6].data(), planes[7].data(), planes[8].data()};
  const HueTable hues;
  for (int i = 0; i < 65536; ++i) {
    g[i] = static_cast<Byte>(i >> 8);
    b[i] = static_cast<Byte>(i);
  }
  for (int level = 0; level < 256; level += 3) {
    std::fill(r.begin(), r.end(), static_cast<Byte>(level));
    to_hsv(r.data(), g.data(), b.data(), kPixels, h, s, v);
    for (int i = 3; i < 6; ++i) add(planes[i].data(), kPixels);
    from_hsv(h, s, v, hues.sector.data(), hues.part.data(), level * 37 & 255, kPixels, out[0],
             out[1], out[2]);
    for (const Byte* plane : out) add(plane, kPixels);
    const double w1 = level / 1000.3, w2 = (255 - level) / 1000.7;
    weighted<false>(r.data(), g.data(), b.data(), w1, w2, 0.7, kPixels, out[0]);
    weighted<true>(r.data(), g.data(), b.data(), w1, w2, 0.7, kPixels, out[1]);
    averaged<true>(r.data(), g.data(), b.data(), kPixels, out[2]);
    for (const Byte* plane : out) add(plane, kPixels);
    averaged<false>(r.data(), g.data(), b.data(), kPixels, out[2]);
    drawn_to<false>(g.data(), b.data(), level / 255.3f, kPixels, out[0]);
    drawn_to<true>(g.data(), b.data(), level / 255.3f, kPixels, out[1]);
    for (const Byte* plane : out) add(plane, kPixels);
    int64_t sums[9] = {};
    add_moments(r.data(), g.data(), b.data(), kPixels, sums);
    const float mix[5] = {0.3f, -1.2f, level / 77.7f, 100.0f, 40.0f};
    double gains[3], offset;
    tone(sums, kPixels, mix, gains, &offset);
    add(sums, sizeof(sums));
    add(gains, sizeof(gains));
    add(&offset, sizeof(offset));
    toned(r.data(), g.data(), b.data(), gains, offset, kPixels, out[0]);
    add(out[0], kPixels);
  }
  std::printf("%016" PRIx64 "\n", digest);
}
