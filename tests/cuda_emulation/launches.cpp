// What launchers ask for at sizes that are too large to be emulated: put down instead of run. For
// cuda/launches.py.

#include <dlfcn.h>

#include <sstream>
#include <string>

#include "emulator.h"

namespace emulator {
namespace {
bool recording = false;
std::ostringstream record;
}  // namespace

bool recorded(const void* kernel, Index grid, unsigned cluster_blocks, unsigned threads,
              size_t shared_bytes) {
  if (!recording) return false;
  Dl_info library{};
  dladdr(kernel, &library);
  const auto offset = static_cast<const char*>(kernel) - static_cast<const char*>(library.dli_fbase);
  record << offset << ' ' << grid.x << ' ' << grid.y << ' ' << grid.z << ' ' << cluster_blocks << ' '
         << threads << ' ' << shared_bytes << '\n';
  return true;
}

}  // namespace emulator

// Whether launches are recorded from now on, and run no more: what kernels would write is left as it is.
extern "C" __attribute__((visibility("default"))) void emulator_record_launches(bool on) {
  emulator::recording = on;
}

// The launches since the last call, one a line: where the kernel stands in the library, the grid, the blocks
// of a cluster, threads and bytes of shared memory of a block.
extern "C" __attribute__((visibility("default"))) const char* emulator_recorded_launches() {
  static std::string text;
  text = emulator::record.str();
  emulator::record.str("");
  return text.c_str();
}
