#include "rerank.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "bits.h"
#include "turns.h"

namespace fastreid_vi::retrieval {
namespace {

// Queries of a turn. They stand beside each other in memory, so that one pass over a column of the
// gallery serves all of them: neighbouring queries tend to show one person and share columns.
constexpr std::int64_t kLanes = 16;
// Rows of the gallery whose sums stay in the first cache.
constexpr std::int64_t kGalleryRows = 512;
// Added up by vector instructions; compilers do not see through the loop.
using Lanes [[gnu::vector_size(4 * kLanes), gnu::aligned(4), gnu::may_alias]] = float;

// One thread's row of V', dense between being added up and being read.
class Average {
 public:
  Average(const TrialShape& shape, const TrialInput& in)
      : shape_(shape), in_(in), sums_(shape.rows), touched_(shape.rows) {}

  // Columns of V'(item, .), ascending.
  template <typename Use>
  void columns(std::int64_t item, const Use& use) {
    for (const std::int32_t row : averaged(item)) {
      for (std::int64_t k = in_.encoding.offsets[row]; k < in_.encoding.offsets[row + 1]; ++k) {
        touched_.insert(in_.encoding.columns[k]);
      }
    }
    touched_.drain(use);
  }

  // use(column, value), columns ascending.
  template <typename Use>
  void values(std::int64_t item, const Use& use) {
    const auto rows = averaged(item);
    for (const std::int32_t row : rows) {
      for (std::int64_t k = in_.encoding.offsets[row]; k < in_.encoding.offsets[row + 1]; ++k) {
        touched_.insert(in_.encoding.columns[k]);
        sums_[in_.encoding.columns[k]] += in_.encoding.values[k];
      }
    }
    const auto count = static_cast<float>(rows.size());
    touched_.drain([&](std::int32_t column) {
      const float sum = sums_[column];
      sums_[column] = 0;
      use(column, sum / count);
    });
  }

 private:
  // Rows of V whose mean is the item's row of V'.
  std::span<const std::int32_t> averaged(std::int64_t item) {
    if (shape_.k2 == 1) {  // the row itself; an item that is nobody's neighbour has none
      own_ = static_cast<std::int32_t>(item);
      return {&own_, item < shape_.rows ? 1U : 0U};
    }
    const bool other = item >= shape_.rows;
    const Lists& lists = other ? in_.other_lists : in_.lists;
    const auto list = lists.row(other ? item - shape_.rows : item);
    return list.first(std::min(list.size(), static_cast<std::size_t>(shape_.k2)));
  }

  const TrialShape& shape_;
  const TrialInput& in_;
  std::vector<float> sums_;
  ColumnSet touched_;
  std::int32_t own_ = 0;
};

// V' of the trial's gallery by columns: which gallery rows hold a column, and how much of it.
struct Inverted {
  struct Entry {
    std::int32_t row;
    float value;
  };
  std::vector<std::int64_t> offsets;  // [rows + 1]
  std::vector<Entry> entries;         // rows ascending within a column
};

std::int64_t gallery_item(const TrialShape& shape, const TrialInput& in, std::int64_t row) {
  const std::int64_t set = row / std::ssize(in.columns), image = row % std::ssize(in.columns);
  return shape.queries() + set * shape.pool_images + in.columns[image];
}

// Every worker counts and then fills a stretch of gallery rows; the places it fills do not depend
// on where stretches end.
Inverted invert(const TrialShape& shape, const TrialInput& in, std::vector<Average>& averages) {
  const std::int64_t rows = std::ssize(in.columns) * shape.gallery_sets;
  const auto workers = static_cast<std::int64_t>(averages.size());
  std::vector<std::vector<std::int64_t>> next(workers, std::vector<std::int64_t>(shape.rows, 0));
  run_workers(workers, [&](std::int64_t w) {
    for (std::int64_t g = rows * w / workers; g < rows * (w + 1) / workers; ++g) {
      averages[w].columns(gallery_item(shape, in, g), [&](std::int32_t c) { ++next[w][c]; });
    }
  });
  Inverted inverted;
  inverted.offsets.resize(shape.rows + 1);
  std::int64_t total = 0;
  for (std::int64_t c = 0; c < shape.rows; ++c) {
    inverted.offsets[c] = total;
    for (auto& counts : next) total += std::exchange(counts[c], total);
  }
  inverted.offsets[shape.rows] = total;
  inverted.entries.resize(total);
  run_workers(workers, [&](std::int64_t w) {
    for (std::int64_t g = rows * w / workers; g < rows * (w + 1) / workers; ++g) {
      averages[w].values(gallery_item(shape, in, g), [&](std::int32_t c, float value) {
        inverted.entries[next[w][c]++] = {static_cast<std::int32_t>(g), value};
      });
    }
  });
  return inverted;
}

// overlaps[row] += min(values, entry) for the entries before row `end`, all queries of a turn at
// once; returns the first entry after them.
FASTREID_VI_CLONES const Inverted::Entry* add_column(const Inverted::Entry* entry,
                                                     const Inverted::Entry* last, std::int32_t end,
                                                     const float* values, float* overlaps) {
  const Lanes own = *reinterpret_cast<const Lanes*>(values);
  for (; entry != last && entry->row < end; ++entry) {
    Lanes& overlap = *reinterpret_cast<Lanes*>(overlaps + entry->row * kLanes);
    const Lanes limit = entry->value - Lanes{};
    overlap += own < limit ? own : limit;
  }
  return entry;
}

// J of all sets of the gallery, added up per image: sums = sum over sets of 1 - S / (2 - S).
// Leaves the overlaps zero.
FASTREID_VI_CLONES void add_jaccard(float* overlaps, std::int64_t sets, std::int64_t images,
                                    float* sums) {
  const std::int64_t size = images * kLanes;
  std::fill_n(sums, size, 0.0F);
  for (std::int64_t set = 0; set < sets; ++set) {
    float* overlap = overlaps + set * size;
    for (std::int64_t k = 0; k < size; ++k) {
      const float s = overlap[k] > 1.0F ? 1.0F : overlap[k];  // beyond 1 lies rounding only
      overlap[k] = 0;
      sums[k] += 1.0F - s / (2.0F - s);
    }
  }
}

// What one thread writes on.
struct Scratch {
  Scratch(std::int64_t rows, std::int64_t images, std::int64_t gallery_sets)
      : values(rows * kLanes),
        overlaps(images * gallery_sets * kLanes),
        sums(images * kLanes),
        touched(rows),
        next(rows) {
    columns.reserve(rows);
  }

  std::vector<float> values;                 // [rows, kLanes] V' of the turn's queries
  std::vector<float> overlaps;               // [gallery rows, kLanes] S, zero between turns
  std::vector<float> sums;                   // [images, kLanes]
  ColumnSet touched;                         // columns of `values` that are not all zero
  std::vector<std::int32_t> columns;         // the same as a list
  std::vector<const Inverted::Entry*> next;  // [rows] entries of a column that are still to come

  // S of the turn's queries and all gallery rows, some rows at a time; every sum runs over
  // ascending columns. Leaves `values` zero.
  void add_overlaps(const Inverted& inverted, std::int64_t gallery_rows) {
    columns.clear();
    touched.drain([&](std::int32_t column) {
      columns.push_back(column);
      next[column] = inverted.entries.data() + inverted.offsets[column];
    });
    for (std::int64_t begin = 0; begin < gallery_rows; begin += kGalleryRows) {
      const auto end = static_cast<std::int32_t>(std::min(begin + kGalleryRows, gallery_rows));
      for (const std::int32_t column : columns) {
        next[column] =
            add_column(next[column], inverted.entries.data() + inverted.offsets[column + 1], end,
                       values.data() + column * kLanes, overlaps.data());
      }
    }
    for (const std::int32_t column : columns) {
      std::fill_n(values.data() + column * kLanes, kLanes, 0.0F);
    }
  }
};

struct Mixture {
  float jaccard, scaled;  // factors of the sum of J and of the sum of distances
};

FASTREID_VI_CLONES void mix(const float* sums, const float* base, const std::int64_t* columns,
                            std::int64_t images, Mixture factor, float* out) {
  for (std::int64_t g = 0; g < images; ++g) {
    const float d = base[columns[g]];
    out[g] += factor.jaccard * sums[g * kLanes] + factor.scaled * (d < 0 ? 0 : d);
  }
}

void check(const TrialShape& shape, const TrialInput& in) {
  const auto expect = [](bool good, const char* message) {
    if (!good) throw std::invalid_argument(message);
  };
  const auto within = [](auto values, std::int64_t limit) {
    return std::all_of(values.begin(), values.end(),
                       [=](std::int64_t v) { return 0 <= v && v < limit; });
  };
  expect(shape.query_sets == 1 || shape.gallery_sets == 1, "shape: sets on one side only");
  expect(shape.queries() <= shape.rows && shape.rows <= shape.items(), "shape: rows do not fit");
  expect(in.lists.rows == shape.rows && in.other_lists.rows == shape.items() - shape.rows,
         "lists: expected one per item");
  expect(std::ssize(in.maxima) == shape.rows && std::ssize(in.rounding) == shape.rows,
         "maxima, rounding: expected one per row");
  expect(std::ssize(in.encoding.offsets) == shape.rows + 1 &&
             in.encoding.offsets.back() == std::ssize(in.encoding.columns) &&
             std::ssize(in.encoding.columns) == std::ssize(in.encoding.values),
         "encoding: expected a row per item that can be a neighbour");
  expect(within(in.columns, shape.pool_images), "columns: expected pool images");
  expect(within(in.wanted, shape.query_images), "wanted: expected queries");
}

}  // namespace

void fuse(const TrialShape& shape, const TrialInput& in, int threads, float* out) {
  check(shape, in);
  const std::int64_t images = std::ssize(in.columns), wanted = std::ssize(in.wanted);
  const std::int64_t workers = workers_for(std::max(wanted, images), kLanes, threads);
  std::vector<Average> averages(workers, Average(shape, in));
  const Inverted inverted = invert(shape, in, averages);

  std::vector<Scratch> scratches(workers, Scratch(shape.rows, images, shape.gallery_sets));
  const auto mean = 1.0F / static_cast<float>(shape.query_sets * shape.gallery_sets);
  take_turns(wanted, kLanes, workers, [&](std::int64_t w, std::int64_t begin, std::int64_t end) {
    Scratch& scratch = scratches[w];
    std::fill(out + begin * images, out + end * images, 0.0F);
    for (std::int64_t set = 0; set < shape.query_sets; ++set) {
      const std::int64_t first = set * shape.query_images;
      for (std::int64_t k = begin; k < end; ++k) {
        averages[w].values(first + in.wanted[k], [&](std::int32_t column, float value) {
          scratch.values[column * kLanes + (k - begin)] = value;
          scratch.touched.insert(column);
        });
      }
      scratch.add_overlaps(inverted, images * shape.gallery_sets);
      add_jaccard(scratch.overlaps.data(), shape.gallery_sets, images, scratch.sums.data());
      for (std::int64_t k = begin; k < end; ++k) {
        const std::int64_t query = first + in.wanted[k];
        const float m = in.maxima[query];
        const Mixture factor{(1.0F - shape.weight) * mean,
                             m > in.rounding[query] ? shape.weight * mean / m : 0.0F};
        mix(scratch.sums.data() + (k - begin), in.base + query * shape.pool_images,
            in.columns.data(), images, factor, out + k * images);
      }
    }
  });
}

NeighborSets average(const TrialShape& shape, const TrialInput& in,
                     std::span<const std::int64_t> items) {
  check(shape, in);
  Average row(shape, in);
  NeighborSets found;
  found.offsets.push_back(0);
  for (const std::int64_t item : items) {
    if (item < 0 || item >= shape.items()) throw std::invalid_argument("items: out of range");
    row.values(item, [&](std::int32_t column, float value) {
      found.columns.push_back(column);
      found.distances.push_back(value);
    });
    found.offsets.push_back(std::ssize(found.columns));
  }
  return found;
}

}  // namespace fastreid_vi::retrieval
