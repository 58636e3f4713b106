// What the tests set and read in an emulated library.
#include "emulation.h"

#define VISIBLE extern "C" __attribute__((visibility("default")))

VISIBLE void fastreid_vi_emulation_order(int order, uint64_t seed) {
  emulation::scheduler.order = static_cast<emulation::Order>(order);
  emulation::scheduler.seed = seed;
}

VISIBLE unsigned fastreid_vi_emulation_launches() { return emulation::scheduler.launches; }
