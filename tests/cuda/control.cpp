// What the tests set and read in an emulated library.
#include <vector>

#include "emulation.h"

#define VISIBLE extern "C" __attribute__((visibility("default")))

VISIBLE void fastreid_vi_emulation_order(int order, uint64_t seed) {
  emulation::scheduler.order = static_cast<emulation::Order>(order);
  emulation::scheduler.seed = seed;
}

VISIBLE unsigned fastreid_vi_emulation_launches() { return emulation::scheduler.launches; }

// Grid, block and dynamic shared memory of each launch since the recording began.
struct Launch {
  uint64_t size[7];
};
static std::vector<Launch> recorded;
static bool recording = false;

extern "C" void fastreid_vi_emulation_launched(const dim3* grid, const dim3* block,
                                               size_t shared_bytes) {
  if (!recording) return;
  recorded.push_back(
      {{grid->x, grid->y, grid->z, block->x, block->y, block->z, uint64_t(shared_bytes)}});
}

VISIBLE void fastreid_vi_emulation_record(bool on) {
  recording = on;
  if (on) recorded.clear();
}

VISIBLE const uint64_t* fastreid_vi_emulation_recorded(size_t index) {
  return index < recorded.size() ? recorded[index].size : nullptr;
}
