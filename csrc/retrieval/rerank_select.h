// First half of re-ranking: every distance is seen once and not kept, but for the nearest items of
// each item, the largest distance of each row, and the distances of queries to gallery images.
//
// Items are numbered: queries (all their sets), then gallery images (all their sets). Only rows of
// the upper triangle come in; an entry serves its row and its column.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fastreid_vi::retrieval {

struct SelectionShape {
  std::int64_t items;        // N
  std::int64_t queries;      // items that are queries
  std::int64_t rows;         // items that can be neighbours, the first ones: rows of the stripes
  std::int64_t candidates;   // items that lists choose among by distance, the first ones
  std::int64_t keep;         // length of the lists of `rows`; further entries follow by index
  std::int64_t keep_others;  // length of the lists of the other items
  std::int64_t images;       // gallery images, each once per set of the gallery
};

// The gallery images columns[offsets[t] : offsets[t + 1]] are searched in trial t.
struct Trials {
  std::span<const std::int64_t> columns, offsets;
  std::int64_t size() const { return static_cast<std::int64_t>(offsets.size()) - 1; }
};

// Where the results go; NaN for the distance of an entry that is in its list by index only.
struct Selected {
  std::int32_t* lists;        // [rows, keep] by (distance, index)
  float* distances;           // [rows, keep]
  std::int32_t* other_lists;  // [items - rows, keep_others]
  float* maxima;              // [trials, rows] m: over all queries and the trial's gallery
};

class Selection {
 public:
  // `squares`: [items] squared norms. `base`: [queries, images], zeros; takes the distances of
  // queries to gallery images, added up over the sets of the gallery.
  Selection(const SelectionShape& shape, std::span<const float> squares, const Trials& trials,
            float* base, int threads);

  // Dot products of the next `rows` items with themselves and all later items, [rows, items -
  // begin], where `begin` rows came before. The square on the diagonal is made symmetric in place.
  void take(float* dots, std::int64_t rows);

  std::int64_t taken() const { return begin_; }
  const SelectionShape& shape() const { return shape_; }
  const Trials& trials() const { return trials_; }

  // After the last of shape.rows rows.
  void finish(const Selected& out);

 private:
  std::uint64_t* keys_of(std::int64_t item);
  std::int64_t keep_of(std::int64_t item) const {
    return item < shape_.rows ? keep_ : keep_others_;
  }
  void push(std::int64_t item, float distance, std::int64_t candidate);
  void columns(const float* dots, std::int64_t rows, std::int64_t first, std::int64_t last);
  void row(const float* dots, std::int64_t item, float* farthest);

  SelectionShape shape_;
  std::span<const float> squares_;
  Trials trials_;
  float* base_;
  int threads_;
  std::int64_t begin_ = 0;
  std::int64_t keep_, keep_others_;      // chosen by distance
  std::int64_t room_, room_others_;      // entries before a list is cut back to that
  std::vector<std::uint64_t> keys_;      // (distance, index) as one integer
  std::vector<std::int32_t> sizes_;      // [items]
  std::vector<float> limits_;            // [items] what a candidate has to be below
  std::vector<float> largest_;           // [items]
  std::vector<float> largest_in_trial_;  // [trials, queries]
};

}  // namespace fastreid_vi::retrieval
