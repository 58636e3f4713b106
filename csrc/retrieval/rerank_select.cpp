#include "rerank_select.h"

#include <bit>
#include <limits>
#include <stdexcept>

#include "turns.h"

namespace fastreid_vi::retrieval {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::int64_t kLanes = 64;      // entries compared between two looks at the outcome
constexpr std::int64_t kRowSpan = 256;   // entries of a row between two updates of its limit
constexpr std::int64_t kColumns = 1024;  // columns of a turn: their limits stay in the first cache
constexpr std::int64_t kRows = 8;        // rows of a turn

// Order of (distance, index) as order of integers.
std::uint64_t key_of(float distance, std::int64_t index) {
  auto bits = std::bit_cast<std::uint32_t>(distance + 0.0F);  // -0 becomes +0
  bits = (bits >> 31) != 0 ? ~bits : bits | 0x80000000U;
  return static_cast<std::uint64_t>(bits) << 32 | static_cast<std::uint64_t>(index);
}

float distance_of(std::uint64_t key) {
  const auto bits = static_cast<std::uint32_t>(key >> 32);
  return std::bit_cast<float>((bits >> 31) != 0 ? bits & 0x7fffffffU : ~bits);
}

std::int32_t index_of(std::uint64_t key) { return static_cast<std::int32_t>(key & 0xffffffffU); }

[[gnu::always_inline]] inline float distance(float own, float other, float dot) {
  return (own + other) - 2.0F * dot;
}

// Positions k < count with a distance below limits[k]; raises largest[k] to the distance.
FASTREID_VI_CLONES std::int64_t scan_columns(const float* dots, const float* squares, float own,
                                             const float* limits, float* largest,
                                             std::int64_t count, std::int32_t* found) {
  std::int64_t size = 0;
  const auto look = [&](std::int64_t k, std::int64_t lanes) __attribute__((always_inline)) {
    std::int32_t hits = 0;
    for (std::int64_t l = k; l < k + lanes; ++l) {
      const float d = distance(own, squares[l], dots[l]);
      largest[l] = largest[l] < d ? d : largest[l];
      hits += d < limits[l];
    }
    if (hits == 0) return;
    for (std::int64_t l = k; l < k + lanes; ++l) {
      found[size] = static_cast<std::int32_t>(l);
      size += distance(own, squares[l], dots[l]) < limits[l];
    }
  };
  const std::int64_t whole = count / kLanes * kLanes;
  for (std::int64_t k = 0; k < whole; k += kLanes) look(k, kLanes);
  look(whole, count - whole);
  return size;
}

// Positions k < count with a distance below `limit`; raises `largest` to the largest distance.
FASTREID_VI_CLONES std::int64_t scan_row(const float* dots, const float* squares, float own,
                                         float limit, float& largest, std::int64_t count,
                                         std::int32_t* found) {
  std::int64_t size = 0;
  float lanes_largest[kLanes];
  std::fill_n(lanes_largest, kLanes, largest);
  const auto look = [&](std::int64_t k, std::int64_t lanes) __attribute__((always_inline)) {
    std::int32_t hits = 0;
    for (std::int64_t l = 0; l < lanes; ++l) {
      const float d = distance(own, squares[k + l], dots[k + l]);
      lanes_largest[l] = lanes_largest[l] < d ? d : lanes_largest[l];
      hits += d < limit;
    }
    if (hits == 0) return;
    for (std::int64_t l = k; l < k + lanes; ++l) {
      found[size] = static_cast<std::int32_t>(l);
      size += distance(own, squares[l], dots[l]) < limit;
    }
  };
  const std::int64_t whole = count / kLanes * kLanes;
  for (std::int64_t k = 0; k < whole; k += kLanes) look(k, kLanes);
  look(whole, count - whole);
  largest = *std::max_element(lanes_largest, lanes_largest + kLanes);
  return size;
}

// Distances of a query to one set of the gallery: added to `base`, the largest kept in `farthest`.
FASTREID_VI_CLONES void fold_set(const float* dots, const float* squares, float own,
                                 std::int64_t images, float* base, float* farthest) {
  for (std::int64_t g = 0; g < images; ++g) {
    const float d = distance(own, squares[g], dots[g]);
    base[g] += d;
    farthest[g] = farthest[g] < d ? d : farthest[g];
  }
}

FASTREID_VI_CLONES float largest_among(const float* values, const std::int64_t* columns,
                                       std::int64_t count) {
  float largest = -kInfinity;
  for (std::int64_t k = 0; k < count; ++k) {
    const float value = values[columns[k]];
    largest = largest < value ? value : largest;
  }
  return largest;
}

// Entries of a list before it is cut back to the nearest `keep`.
std::int64_t room_for(std::int64_t keep, std::int64_t candidates) {
  return std::min(2 * keep, candidates);
}

void expect(bool good, const char* message) {
  if (!good) throw std::invalid_argument(message);
}

}  // namespace

Selection::Selection(const SelectionShape& shape, std::span<const float> squares,
                     const Trials& trials, float* base, int threads)
    : shape_(shape), squares_(squares), trials_(trials), base_(base), threads_(threads) {
  const auto& s = shape_;
  expect(0 < s.queries && s.queries <= s.rows && s.rows <= s.items, "shape: rows do not fit items");
  expect(s.items < std::numeric_limits<std::int32_t>::max(), "shape: too many items");
  expect(s.candidates == s.queries || s.candidates == s.items,
         "shape: expected queries or all items as candidates");
  expect(0 < s.images && (s.items - s.queries) % s.images == 0, "shape: images do not fit items");
  expect(0 < s.keep && s.keep <= s.items && 0 <= s.keep_others && s.keep_others <= s.items,
         "shape: lists are longer than all items");
  expect(std::ssize(squares) == s.items, "squares: expected one per item");
  expect(trials.size() >= 1, "trials: expected one at least");
  for (const std::int64_t column : trials.columns) {
    expect(0 <= column && column < s.images, "columns: expected gallery images");
  }
  keep_ = std::min(s.keep, s.candidates);
  keep_others_ = std::min(s.keep_others, s.candidates);
  room_ = room_for(keep_, s.candidates);
  room_others_ = room_for(keep_others_, s.candidates);
  keys_.resize(static_cast<std::size_t>(s.rows * room_ + (s.items - s.rows) * room_others_));
  sizes_.assign(s.items, 0);
  limits_.assign(s.items, kInfinity);
  if (keep_others_ == 0) std::fill(limits_.begin() + s.rows, limits_.end(), -kInfinity);
  largest_.assign(s.items, -kInfinity);
  largest_in_trial_.assign(static_cast<std::size_t>(trials.size() * s.queries), -kInfinity);
}

std::uint64_t* Selection::keys_of(std::int64_t item) {
  if (item < shape_.rows) return keys_.data() + item * room_;
  return keys_.data() + shape_.rows * room_ + (item - shape_.rows) * room_others_;
}

// Candidates come with rising indices, so one as far as the last of a full list is behind it.
void Selection::push(std::int64_t item, float distance, std::int64_t candidate) {
  if (!(distance < limits_[item])) return;
  std::uint64_t* keys = keys_of(item);
  keys[sizes_[item]++] = key_of(distance, candidate);
  const std::int64_t keep = keep_of(item);
  if (keep == shape_.candidates || sizes_[item] < (item < shape_.rows ? room_ : room_others_)) {
    return;
  }
  std::nth_element(keys, keys + keep - 1, keys + sizes_[item]);
  sizes_[item] = static_cast<std::int32_t>(keep);
  limits_[item] = distance_of(keys[keep - 1]);
}

// Rows of a stripe as candidates for the items first .. last, which come after all of them.
void Selection::columns(const float* dots, std::int64_t rows, std::int64_t first,
                        std::int64_t last) {
  std::int32_t found[kColumns];
  const std::int64_t width = shape_.items - begin_;
  for (std::int64_t r = 0; r < rows; ++r) {
    const float* row = dots + r * width + (first - begin_);
    const float own = squares_[begin_ + r];
    const std::int64_t size = scan_columns(row, &squares_[first], own, &limits_[first],
                                           &largest_[first], last - first, found);
    if (begin_ + r >= shape_.candidates) continue;
    for (std::int64_t k = 0; k < size; ++k) {
      const std::int64_t item = first + found[k];
      push(item, distance(own, squares_[item], row[found[k]]), begin_ + r);
    }
  }
}

// One row of a stripe: the items from `begin_` on as candidates for it, and its gallery.
void Selection::row(const float* dots, std::int64_t item, float* farthest) {
  const float own = squares_[item];
  std::int32_t found[kRowSpan];
  const auto scan = [&](std::int64_t first, std::int64_t last, bool select, float& largest) {
    for (; first < last; first += kRowSpan) {
      const std::int64_t count = std::min(kRowSpan, last - first);
      const std::int64_t size =
          scan_row(dots + (first - begin_), &squares_[first], own,
                   select ? limits_[item] : -kInfinity, largest, count, found);
      for (std::int64_t k = 0; k < size; ++k) {
        const std::int64_t other = first + found[k];
        push(item, distance(own, squares_[other], dots[other - begin_]), other);
      }
    }
  };
  const std::int64_t middle = std::max(begin_, shape_.queries);
  const bool all = shape_.candidates == shape_.items;
  scan(begin_, middle, true, largest_[item]);
  float largest = largest_[item];
  if (all || item >= shape_.queries) scan(middle, shape_.items, all, largest);
  if (item >= shape_.queries) {
    largest_[item] = largest;
    return;
  }
  std::fill_n(farthest, shape_.images, -kInfinity);
  for (std::int64_t set = shape_.queries; set < shape_.items; set += shape_.images) {
    fold_set(dots + (set - begin_), &squares_[set], own, shape_.images,
             base_ + item * shape_.images, farthest);
  }
  for (std::int64_t t = 0; t < trials_.size(); ++t) {
    const std::int64_t first = trials_.offsets[t];
    largest_in_trial_[t * shape_.queries + item] =
        largest_among(farthest, &trials_.columns[first], trials_.offsets[t + 1] - first);
  }
}

void Selection::take(float* dots, std::int64_t rows) {
  expect(0 < rows && begin_ + rows <= shape_.rows, "stripe: more rows than expected");
  const std::int64_t width = shape_.items - begin_;
  for (std::int64_t r = 1; r < rows; ++r) {
    for (std::int64_t c = 0; c < r; ++c) dots[r * width + c] = dots[c * width + r];
  }
  const std::int64_t after = begin_ + rows;
  const std::int64_t columns_left = shape_.items - after;
  take_turns(columns_left, kColumns, workers_for(columns_left, kColumns, threads_),
             [&](std::int64_t, std::int64_t first, std::int64_t last) {
               columns(dots, rows, after + first, after + last);
             });
  const std::int64_t workers = workers_for(rows, kRows, threads_);
  std::vector<std::vector<float>> farthest(workers, std::vector<float>(shape_.images));
  take_turns(rows, kRows, workers, [&](std::int64_t worker, std::int64_t first, std::int64_t last) {
    for (std::int64_t r = first; r < last; ++r) {
      row(dots + r * width, begin_ + r, farthest[worker].data());
    }
  });
  begin_ = after;
}

void Selection::finish(const Selected& out) {
  expect(begin_ == shape_.rows, "finish: rows are missing");
  const auto& s = shape_;
  take_turns(s.items, 256, workers_for(s.items, 256, threads_),
             [&](std::int64_t, std::int64_t first, std::int64_t last) {
               for (std::int64_t i = first; i < last; ++i) {
                 const bool other = i >= s.rows;
                 const std::int64_t at = other ? i - s.rows : i;
                 const std::int64_t length = other ? s.keep_others : s.keep;
                 std::int32_t* list = (other ? out.other_lists : out.lists) + at * length;
                 std::uint64_t* keys = keys_of(i);
                 const std::int64_t near = keep_of(i);
                 std::partial_sort(keys, keys + near, keys + sizes_[i]);
                 for (std::int64_t k = 0; k < length; ++k) {
                   list[k] = k < near ? index_of(keys[k]) : static_cast<std::int32_t>(k);
                   if (other) continue;
                   out.distances[at * length + k] =
                       k < near ? distance_of(keys[k]) : std::numeric_limits<float>::quiet_NaN();
                 }
               }
             });
  for (std::int64_t t = 0; t < trials_.size(); ++t) {
    for (std::int64_t i = 0; i < s.rows; ++i) {
      float& largest = out.maxima[t * s.rows + i];
      largest = largest_[i];
      if (i < s.queries) largest = std::max(largest, largest_in_trial_[t * s.queries + i]);
    }
  }
}

}  // namespace fastreid_vi::retrieval
