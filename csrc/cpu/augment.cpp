// The whole augmentation in one pass: a row of the result is taken, changed, mirrored, moved,
// looked up and erased while it is in the first cache. Images are read where they lie.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <optional>
#include <vector>

#include "augment_rows.h"
#include "augment_write.h"
#include "common.h"

namespace {

using fastreid_vi::augment::Byte;
using fastreid_vi::augment::Row;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace rows = fastreid_vi::augment;

constexpr int64_t kBand = 32;  // result rows that a thread takes at a time
constexpr int64_t kAhead = 2;  // rows that are fetched before a mirrored one is read

enum Kind : int64_t { kNone, kHue, kGray, kCutmix, kJitter, kChannel, kAverage, kKinds };

// Columns of a plan, where they are.
template <typename T, int64_t Columns = 1>
struct Column {
  explicit Column(const Tensor& tensor)
      : kept(torch::stable::contiguous(tensor)), data(kept.const_data_ptr<T>()) {}
  const T* operator[](int64_t row) const { return data + row * Columns; }
  Tensor kept;
  const T* data;
};

struct Span {
  int64_t begin, end;

  // A side of a box, clipped to 0..length.
  static Span clipped(int64_t start, int64_t size, int64_t length) {
    size = std::max<int64_t>(size, 0);
    if (start > 0) {  // no overflow: below zero there is none
      start = std::min(start, length);
      size = std::min(size, length);
    }
    return {std::max<int64_t>(start, 0), std::clamp<int64_t>(start + size, 0, length)};
  }
  bool holds(int64_t i) const { return i >= begin && i < end; }
};

// One slot of the plan. A value out of range, refused after the call, must not read outside.
struct Slot {
  int64_t source, top, left, kind;
  bool flip, nearest;
  int hue, channel, outside, inside;
  Byte border;
  float factor;
  std::array<double, 3> weights;
  Span rows, columns;  // cutmix
  Span erased_rows, erased_columns;
  std::array<float, 3> values;
  bool mixed = false;
  std::array<double, 3> gains;
  double offset;
};

struct Sizes {
  int64_t height, width;
};

// Scratch of a thread: planes of one row.
class Scratch {
 public:
  explicit Scratch(int64_t width) : width_(width), bytes_(static_cast<size_t>(width) * 10) {}
  Byte* plane(int i) { return bytes_.data() + i * width_; }
  Row row(int first) { return {{plane(first), plane(first + 1), plane(first + 2)}, 1}; }
  Row gray(int i) { return {{plane(i), plane(i), plane(i)}, 1}; }

 private:
  int64_t width_;
  std::vector<Byte> bytes_;
};

class Images {
 public:
  explicit Images(const Tensor& images)
      : tensor_(images),
        data_(images.const_data_ptr<Byte>()),
        size_{images.size(1), images.size(2)} {}

  Sizes size() const { return size_; }

  // Row y of an image; copied into scratch planes 0 to 2 if its pixels lie neither in threes nor
  // in planes, or if planes are wanted.
  Row row(int64_t image, int64_t y, Scratch& scratch, bool planes) const {
    const Byte* start = data_ + image * tensor_.stride(0) + y * tensor_.stride(1);
    const int64_t step = tensor_.stride(2), channel = tensor_.stride(3);
    const bool threes = step == 3 && channel == 1;
    if (step == 1 || (threes && !planes)) {
      return {{start, start + channel, start + 2 * channel}, step};
    }
    if (threes) {
      rows::split(start, size_.width, scratch.plane(0), scratch.plane(1), scratch.plane(2));
    } else {
      for (int c = 0; c < 3; ++c) {
        for (int64_t x = 0; x < size_.width; ++x) {
          scratch.plane(c)[x] = start[x * step + c * channel];
        }
      }
    }
    return scratch.row(0);
  }

  // Asks for a row: the processor does not guess rows that are read from their end.
  void fetch(int64_t image, int64_t y) const {
    if (y >= size_.height || tensor_.stride(2) != 3) return;
    const Byte* start = data_ + image * tensor_.stride(0) + y * tensor_.stride(1);
    for (int64_t at = 0; at < 3 * size_.width; at += 64) __builtin_prefetch(start + at);
  }

 private:
  const Tensor& tensor_;
  const Byte* data_;
  Sizes size_;
};

const rows::HueTable& hues() {
  static const rows::HueTable table;
  return table;
}

// Row y of the image of a slot, its channels changed.
Row changed(const Images& images, const Slot& slot, int64_t y, Scratch& scratch) {
  const int64_t width = images.size().width;
  const bool planes = slot.kind != kNone && slot.kind != kChannel;
  const Row row = images.row(slot.source, y, scratch, planes);
  const auto& [red, green, blue] = row.plane;
  Byte* out = scratch.plane(3);
  switch (slot.kind) {
    case kHue:
      rows::to_hsv(red, green, blue, width, scratch.plane(6), scratch.plane(7), scratch.plane(8));
      rows::from_hsv(scratch.plane(6), scratch.plane(7), scratch.plane(8), hues().sector.data(),
                     hues().part.data(), slot.hue, width, scratch.plane(3), scratch.plane(4),
                     scratch.plane(5));
      return scratch.row(3);
    case kGray: {
      const auto weighted = slot.nearest ? &rows::weighted<true> : &rows::weighted<false>;
      weighted(red, green, blue, slot.weights[0], slot.weights[1], slot.weights[2], width, out);
      return scratch.gray(3);
    }
    case kAverage:
      (slot.nearest ? &rows::averaged<true> : &rows::averaged<false>)(red, green, blue, width, out);
      return scratch.gray(3);
    case kCutmix: {
      std::memcpy(out, row.plane[slot.outside], width);
      const Span& part = slot.columns;
      if (slot.rows.holds(y) && part.begin < part.end) {
        std::memcpy(out + part.begin, row.plane[slot.inside] + part.begin, part.end - part.begin);
      }
      return scratch.gray(3);
    }
    case kJitter:
      for (int c = 0; c < 3; ++c) {
        const auto drawn_to = slot.nearest ? &rows::drawn_to<true> : &rows::drawn_to<false>;
        drawn_to(row.plane[slot.channel], row.plane[c], slot.factor, width, scratch.plane(3 + c));
      }
      return scratch.row(3);
    case kChannel: {
      const Byte* shown = row.plane[slot.channel];
      return {{shown, shown, shown}, row.step};
    }
    default:
      return row;
  }
}

// The same as planes, for a mix.
Row in_planes(const Images& images, const Slot& slot, int64_t y, Scratch& scratch) {
  const Row row = changed(images, slot, y, scratch);
  if (row.step == 1) return row;
  for (int c = 0; c < 3; ++c) {
    for (int64_t x = 0; x < images.size().width; ++x) {
      scratch.plane(3 + c)[x] = row.plane[c][x * row.step];
    }
  }
  return scratch.row(3);
}

void find_tone(const Images& images, Slot& slot, const float* mix) {
  const auto [height, width] = images.size();
  Scratch scratch(width);
  int64_t moments[9] = {};
  for (int64_t y = 0; y < height; ++y) {
    const Row row = in_planes(images, slot, y, scratch);
    rows::add_moments(row.plane[0], row.plane[1], row.plane[2], width, moments);
  }
  rows::tone(moments, height * width, mix, slot.gains.data(), &slot.offset);
}

Row shown(const Images& images, const Slot& slot, int64_t y, Scratch& scratch) {
  if (!slot.mixed) return changed(images, slot, y, scratch);
  const Row row = in_planes(images, slot, y, scratch);
  rows::toned(row.plane[0], row.plane[1], row.plane[2], slot.gains.data(), slot.offset,
              images.size().width, scratch.plane(9));
  return scratch.gray(9);
}

// Row y of the result of a slot.
template <typename T>
void fill_row(const Images& images, const Slot& slot, int64_t y, Scratch& scratch,
              const rows::Writer<T>& writer, T* out) {
  const auto [height, width] = images.size();
  const int64_t from = y + slot.top;
  const Span body = Span::clipped(-slot.left, width, width);
  if (from < 0 || from >= height || body.begin >= body.end) {
    writer.border(slot.border, 0, width, out);
  } else {
    Row row = shown(images, slot, from, scratch);
    const int64_t first = body.begin + slot.left;
    if (slot.flip) {
      images.fetch(slot.source, from + kAhead);
      row = row.from(width - 1 - first);
      row.step = -row.step;
    } else {
      row = row.from(first);
    }
    writer.border(slot.border, 0, body.begin, out);
    writer.pixels(row, body.begin, body.end, out);
    writer.border(slot.border, body.end, width, out);
  }
  if (slot.erased_rows.holds(y)) {
    writer.erase(slot.values, slot.erased_columns.begin, slot.erased_columns.end, out);
  }
}

template <typename F>
void for_result(ScalarType dtype, F&& body) {
  switch (dtype) {
    case ScalarType::Byte:
      return body.template operator()<Byte>();
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::Half:
      return body.template operator()<torch::headeronly::Half>();
    case ScalarType::BFloat16:
      return body.template operator()<torch::headeronly::BFloat16>();
    default:
      STD_TORCH_CHECK(false, "dtype: expected float32, bfloat16, float16 or uint8");
  }
}

// Into `out` [B, 3, H, W], dense in one of the two layouts.
void augment_into(Tensor out, const Tensor& given, const Tensor& source, const Tensor& flip,
                  const Tensor& top, const Tensor& left, const Tensor& border, const Tensor& kind,
                  const Tensor& hue, const Tensor& weights, const Tensor& boxes,
                  const Tensor& planes, const Tensor& channel, const Tensor& factor,
                  const Tensor& nearest, const Tensor& erase, const Tensor& values,
                  const Tensor& levels, std::optional<Tensor> channel_mix, bool channels_last) {
  const Images images(given);
  const auto [height, width] = images.size();
  const int64_t count = source.size(0), last = given.size(0) - 1;
  if (count == 0) return;

  std::vector<Slot> slots(static_cast<size_t>(count));
  {
    const Column<int64_t> sources(source), tops(top), lefts(left), kinds(kind), hues(hue),
        channels(channel);
    const Column<bool> flips(flip), near(nearest);
    const Column<Byte> borders(border);
    const Column<double, 3> w(weights);
    const Column<int64_t, 4> mixed(boxes), erased(erase);
    const Column<int64_t, 2> pairs(planes);
    const Column<float> factors(factor);
    const Column<float, 3> set(values);
    const auto one_of_three = [](int64_t c) {
      return static_cast<int>(std::clamp<int64_t>(c, 0, 2));
    };
    for (int64_t b = 0; b < count; ++b) {
      Slot& slot = slots[b];
      slot.source = std::clamp<int64_t>(*sources[b], 0, last);
      slot.top = std::clamp<int64_t>(*tops[b], -height, height);
      slot.left = std::clamp<int64_t>(*lefts[b], -width, width);
      slot.kind = *kinds[b];
      slot.flip = *flips[b];
      slot.nearest = *near[b];
      slot.hue = static_cast<int>(*hues[b] & 255);
      slot.channel = one_of_three(*channels[b]);
      slot.outside = one_of_three(pairs[b][0]);
      slot.inside = one_of_three(pairs[b][1]);
      slot.border = *borders[b];
      slot.factor = *factors[b];
      std::copy_n(w[b], 3, slot.weights.begin());
      slot.rows = Span::clipped(mixed[b][0], mixed[b][2], height);
      slot.columns = Span::clipped(mixed[b][1], mixed[b][3], width);
      slot.erased_rows = Span::clipped(erased[b][0], erased[b][2], height);
      slot.erased_columns = Span::clipped(erased[b][1], erased[b][3], width);
      std::copy_n(set[b], 3, slot.values.begin());
    }
  }
  if (channel_mix.has_value()) {
    const Column<float, 5> mix(*channel_mix);
    fastreid_vi::parallel(count, height * width, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        slots[b].mixed = mix[b][4] != 0;
        if (slots[b].mixed) find_tone(images, slots[b], mix[b]);
      }
    });
  }
  const Column<float, 256> table(levels);
  const int64_t bands = (height + kBand - 1) / kBand;
  for_result(out.scalar_type(), [&]<typename T>() {
    const rows::Writer<T> writer(table.data, channels_last, height * width);
    T* data = out.mutable_data_ptr<T>();
    fastreid_vi::parallel(count * bands, kBand * width * 3, [&](int64_t begin, int64_t end) {
      Scratch scratch(width);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / bands, first = item % bands * kBand;
        for (int64_t y = first; y < std::min(first + kBand, height); ++y) {
          T* row = data + b * 3 * height * width + y * width * (channels_last ? 3 : 1);
          fill_row(images, slots[b], y, scratch, writer, row);
        }
      }
    });
  });
}

Tensor augment(const Tensor& images, const Tensor& source, const Tensor& flip, const Tensor& top,
               const Tensor& left, const Tensor& border, const Tensor& kind, const Tensor& hue,
               const Tensor& weights, const Tensor& boxes, const Tensor& planes,
               const Tensor& channel, const Tensor& factor, const Tensor& nearest,
               const Tensor& erase, const Tensor& values, const Tensor& levels,
               std::optional<Tensor> channel_mix, ScalarType dtype, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  Tensor out = torch::stable::empty(
      {source.size(0), 3, images.size(1), images.size(2)}, dtype, std::nullopt, images.device(),
      std::nullopt, channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  augment_into(out, images, source, flip, top, left, border, kind, hue, weights, boxes, planes,
               channel, factor, nearest, erase, values, levels, channel_mix, channels_last);
  return out;
}

Tensor random_erase(const Tensor& images, const Tensor& boxes, const Tensor& values) {
  const bool columns = fastreid_vi::is_channels_last(images);
  const int64_t height = images.size(2), width = images.size(3);
  Tensor out = fastreid_vi::empty_map(images, columns);
  torch::stable::copy_(out, images);
  const Column<int64_t, 4> box(boxes);
  const Column<float, 3> set(values);
  fastreid_vi::for_floating(images.scalar_type(), [&]<typename T>() {
    T* data = out.mutable_data_ptr<T>();
    const int64_t channel = columns ? 1 : height * width, pixel = columns ? 3 : 1;
    fastreid_vi::parallel(images.size(0), 3 * height * width, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const Span down = Span::clipped(box[b][0], box[b][2], height);
        const Span across = Span::clipped(box[b][1], box[b][3], width);
        for (int64_t y = down.begin; y < down.end; ++y) {
          T* row = data + b * 3 * height * width + y * width * pixel;
          for (int64_t x = across.begin; x < across.end; ++x) {
            for (int c = 0; c < 3; ++c) row[x * pixel + c * channel] = static_cast<T>(set[b][c]);
          }
        }
      }
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastreid_vi_native, CPU, m) {
  m.impl("augment", TORCH_BOX(&augment));
  m.impl("augment_into", TORCH_BOX(&augment_into));
  m.impl("random_erase", TORCH_BOX(&random_erase));
}
