// Two stacks of `count` maps meet the features x of a sample: one along channels (weights, or
// gradients of pooled features) and one along positions (the maps, or gradients of their logits).
// x is read in rows along its contiguous axis: positions are rows of channels-last maps, channels
// are rows of NCHW maps. The stack along the rows holds one coefficient per row and map, the stack
// along the contiguous axis holds one vector per map. Neither layout ever makes a copy of x.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <new>

#include "common.h"
#include "cpu/pattern_tiles.h"

namespace fastreid_vi {
namespace {

int64_t rounded_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Zeroed scratch on cache lines: a vector load across two of them costs two.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t size)
      : data_(static_cast<A*>(::operator new(static_cast<size_t>(size) * sizeof(A), kLine))) {
    std::fill(data_.get(), data_.get() + size, A(0));
  }
  A* get() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kLine{64};
  struct Free {
    void operator()(A* data) const { ::operator delete(data, kLine); }
  };
  std::unique_ptr<A, Free> data_;
};

// A stack of maps: element (p, i) at data[p * map + i * item]; one of the two steps is 1.
template <typename A>
struct Stack {
  A* data;
  int64_t map, item;

  A& at(int64_t p, int64_t i) const { return data[p * map + i * item]; }
  Stack from(int64_t p) const { return {data + p * map, map, item}; }
};

// Sizes of one call, and where the rows of x run.
struct Plan {
  explicit Plan(const FeatureMap& x, int64_t maps)
      : samples(x.batches),
        channels(x.channels),
        positions(x.positions),
        maps(maps),
        count(rounded_up(maps, 2)) {}
  int64_t samples, channels, positions;
  int64_t maps, count;  // count: padded to an even number by maps that are zero

  // Elements that a stack of `stacks` * count maps over n items needs, and its two forms.
  int64_t size(int64_t n, int64_t stacks) const { return stacks * count * rounded_up(n, kPitch); }
  template <typename A>
  Stack<A> stack(A* data, int64_t n, int64_t stacks, bool vectors) const {
    if (vectors) return {data, rounded_up(n, kPitch), 1};
    return {data, 1, stacks * count};
  }
};

bool rows_are_positions(const FeatureMap& x) { return x.channel == 1; }

// The rows of one sample of x.
template <typename T>
struct Sample {
  Sample(const FeatureMap& map, int64_t b)
      : x(map.tensor.const_data_ptr<T>() + b * map.batch),
        end(map.tensor.const_data_ptr<T>() + (map.batches - 1) * map.batch +
            (map.channels - 1) * map.channel + (map.positions - 1) * map.position + 1),
        by_position(rows_are_positions(map)),
        rows(by_position ? map.positions : map.channels),
        stride(by_position ? map.position : map.channel),
        width(by_position ? map.channels : map.positions) {}
  const T* x;
  const T* end;
  bool by_position;
  int64_t rows, stride, width;
};

// out(p, row) += sum over the contiguous axis of vectors(p, .) x(row, .)
template <typename Tiles, typename T, typename A>
void contract_width(const Sample<T>& s, const Plan& plan, Stack<A> vectors, Stack<A> out) {
  parallel(s.rows, s.width * plan.count, [&](int64_t from, int64_t to) {
    Tiles::dots(s.x + from * s.stride, to - from, s.stride, s.width, s.end, vectors.data,
                vectors.map, plan.count, out.data + from * out.item, out.item);
  });
}

// out(p, i) += sum over the rows of coefficients(p, row) x(row, i)
template <typename Tiles, typename T, typename A>
void contract_rows(const Sample<T>& s, const Plan& plan, Stack<A> coefficients, Stack<A> out) {
  const int64_t blocks = (s.width + kPitch - 1) / kPitch;
  const int64_t cost = s.rows * plan.count * kPitch;
  parallel(blocks, cost, [&](int64_t from, int64_t to) {
    const int64_t first = from * kPitch;
    const int64_t last = std::min(s.width, to * kPitch);
    Tiles::combine(s.x + first, s.rows, s.stride, last - first, s.end, coefficients.data,
                   coefficients.item, plan.count, out.data + first, out.map);
  });
}

// positions(p, s) += sum over channels of channels(p, c) x(c, s)
template <typename Tiles, typename T, typename A>
void over_channels(const Sample<T>& s, const Plan& plan, Stack<A> channels, Stack<A> positions) {
  if (s.by_position) {
    contract_width<Tiles>(s, plan, channels, positions);
  } else {
    contract_rows<Tiles>(s, plan, channels, positions);
  }
}

// channels(p, c) += sum over positions of positions(p, s) x(c, s)
template <typename Tiles, typename T, typename A>
void over_positions(const Sample<T>& s, const Plan& plan, Stack<A> positions, Stack<A> channels) {
  if (s.by_position) {
    contract_rows<Tiles>(s, plan, positions, channels);
  } else {
    contract_width<Tiles>(s, plan, positions, channels);
  }
}

// Softmax over positions of map p, in place.
template <typename A>
void softmax(Stack<A> z, int64_t p, int64_t positions) {
  A top = z.at(p, 0), sum = 0;
  for (int64_t s = 1; s < positions; ++s) top = std::max(top, z.at(p, s));
  for (int64_t s = 0; s < positions; ++s) {
    z.at(p, s) = std::exp(z.at(p, s) - top);
    sum += z.at(p, s);
  }
  const A scale = 1 / sum;
  for (int64_t s = 0; s < positions; ++s) z.at(p, s) *= scale;
}

// d = a (d - sum over positions of a d): the gradient of map p to that of its logits, in place.
template <typename A>
void through_softmax(Stack<A> a, Stack<A> d, int64_t p, int64_t positions) {
  double mean = 0;
  for (int64_t s = 0; s < positions; ++s) {
    mean += static_cast<double>(a.at(p, s)) * static_cast<double>(d.at(p, s));
  }
  for (int64_t s = 0; s < positions; ++s) {
    d.at(p, s) = a.at(p, s) * (d.at(p, s) - static_cast<A>(mean));
  }
}

// Calls body(sample) for all samples: side by side where there are enough of them, otherwise one
// after the other with threads inside each. Both ways compute every element by the same sums.
template <typename F>
void each_sample(int64_t count, int64_t cost, const F& body) {
  if (count >= static_cast<int64_t>(torch::stable::get_num_threads())) {
    parallel(count, cost, [&](int64_t from, int64_t to) {
      for (int64_t i = from; i < to; ++i) body(i);
    });
  } else {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
}

template <typename T, typename A>
void copy_stack(const T* from, A divisor, int64_t maps, int64_t n, Stack<A> to) {
  for (int64_t p = 0; p < maps; ++p) {
    for (int64_t i = 0; i < n; ++i) to.at(p, i) = static_cast<A>(from[p * n + i]) / divisor;
  }
}

}  // namespace
}  // namespace fastreid_vi
