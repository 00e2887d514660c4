// The checks of every load and store of an emulated kernel. The kernels are compiled with
// -fsanitize=thread, but linked with the functions below instead of libtsan.

#include <link.h>
#include <pthread.h>

#include <sstream>
#include <unordered_map>
#include <vector>

#include "internal.h"

namespace emulator {
namespace {

struct Range {
  uintptr_t begin = 0, end = 0;
  uintptr_t cell = 4;  // bytes that races are told apart by: the smallest thing anybody stores there
  bool holds(uintptr_t address, size_t bytes) const { return address >= begin && address + bytes <= end; }
};

Range make_range(const void* begin, size_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(begin);
  return {address, address + bytes, 4};
}

Range stack, fibers, launch_frames;
std::vector<Range> shared;  // of each block of the running cluster
uint32_t first_block = 0;

const Range* shared_of(uintptr_t address, size_t bytes) {
  for (const Range& range : shared)
    if (range.holds(address, bytes)) return &range;
  return nullptr;
}

std::vector<Range> announced;

// The library's own constants and the emulator's variables (threadIdx and the like).
const std::vector<Range>& library_image() {
  static const std::vector<Range> image = [] {
    std::vector<Range> ranges;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          std::vector<Range> segments;
          bool ours = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            if (header.p_type != PT_LOAD) continue;
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            segments.push_back({begin, begin + header.p_memsz, 4});
            ours |= segments.back().holds(reinterpret_cast<uintptr_t>(&announced), 1);
          }
          if (ours) *static_cast<std::vector<Range>*>(out) = segments;
          return 0;
        },
        &ranges);
    return ranges;
  }();
  return image;
}

struct Cell {
  uint32_t owner = 0;
  bool written = false;
  Epoch write;
  int reads = 0;
  Epoch read[2];  // the last one, and the last one of another thread
};

constexpr uintptr_t kPageBytes = 1024;
std::unordered_map<uintptr_t, std::vector<Cell>> shadow;
uintptr_t last_page = ~uintptr_t{0};  // the page used last, to spare most look-ups
Cell* last_cells = nullptr;

Cell& cell_of(uintptr_t address) {
  const uintptr_t page = address / kPageBytes;
  if (page != last_page) {
    auto& cells = shadow[page];
    if (cells.empty()) cells.resize(kPageBytes);
    last_page = page;
    last_cells = cells.data();
  }
  return last_cells[address % kPageBytes];
}

[[gnu::noinline]] void report(const char* what, uintptr_t address, const Epoch* other) {
  std::ostringstream text;
  text << what;
  const Range* block = shared_of(address, 1);
  if (block) text << " in shared memory, byte " << address - block->begin;
  for (size_t i = 0; i < announced.size() && !block; ++i)
    if (announced[i].holds(address, 1))
      text << " in tensor " << i << ", byte " << address - announced[i].begin;
  if (other) text << ", against thread " << other->thread << " of block number " << other->block;
  fail(text.str());
}

void note_read(Cell& cell, const Epoch& now, uintptr_t address, bool in_shared) {
  if (in_shared && (!cell.written || cell.write.launch != now.launch))
    report("uninitialised read", address, nullptr);
  if (cell.written && !happened_before_now(cell.write))
    report("race (read after write)", address, &cell.write);
  if (cell.reads > 0 && (cell.read[0].thread != now.thread || cell.read[0].block != now.block)) {
    cell.read[1] = cell.read[0];
    cell.reads = 2;
  }
  cell.read[0] = now;
  if (cell.reads == 0) cell.reads = 1;
}

void note_write(Cell& cell, const Epoch& now, uintptr_t address) {
  if (cell.written && !happened_before_now(cell.write))
    report("race (write after write)", address, &cell.write);
  for (int i = 0; i < cell.reads; ++i)
    if (!happened_before_now(cell.read[i])) report("race (write after read)", address, &cell.read[i]);
  cell.written = true;
  cell.write = now;
  cell.reads = 0;
}

enum class Access { kRead, kWrite, kWriteBegun };

void access(const void* pointer, size_t bytes, Access kind) {
  const bool write = kind != Access::kRead;
  if (current == nullptr) return;  // host code around the launch
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  if (stack.holds(address, bytes)) return;
  const Range* holder = shared_of(address, bytes);
  const bool in_shared = holder != nullptr;
  const uint32_t rank = in_shared ? holder - shared.data() : 0;
  if (in_shared && !has_begun(rank)) report("access to a block that has not begun", address, nullptr);
  if (in_shared && has_returned(rank)) report("access to a block that has returned", address, nullptr);
  if (!in_shared) {
    if (fibers.holds(address, bytes) || launch_frames.holds(address, bytes)) return;
    for (const Range& range : announced)
      if (range.holds(address, bytes)) holder = &range;
    if (holder == nullptr) {
      for (const Range& range : library_image())
        if (range.holds(address, bytes)) return;
      report(write ? "write out of bounds" : "read out of bounds", address, nullptr);
    }
  }
  const Epoch now = current_epoch();
  for (uintptr_t at = address & ~(holder->cell - 1); at < address + bytes; at += holder->cell) {
    Cell& cell = cell_of(at);
    // Shared memory is the block's own: what another block did at this address is forgotten.
    if (in_shared && cell.owner != first_block + rank) cell = Cell{};
    cell.owner = first_block + rank;
    if (write) {
      note_write(cell, now, at);
      cell.written = kind == Access::kWrite;
    } else {
      note_read(cell, now, at, in_shared);
    }
  }
}

}  // namespace

void check_read(const void* place, size_t bytes) { access(place, bytes, Access::kRead); }
void check_write(const void* place, size_t bytes) { access(place, bytes, Access::kWrite); }
void check_write_begun(const void* place, size_t bytes) { access(place, bytes, Access::kWriteBegun); }

void set_fibers(const void* begin, size_t bytes) { fibers = make_range(begin, bytes); }
void set_stack(const void* begin, size_t bytes) { stack = make_range(begin, bytes); }
void set_shared(const void* begin, size_t bytes, size_t stride, uint32_t first, uint32_t blocks) {
  shared.clear();
  for (uint32_t rank = 0; rank < blocks; ++rank) {
    shared.push_back(make_range(static_cast<const char*>(begin) + rank * stride, bytes));
    shared.back().cell = 2;
  }
  first_block = first;
}
void set_launch_frame(const void* frame) {
  pthread_attr_t attributes;
  void* lowest = nullptr;
  size_t bytes = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &lowest, &bytes);
  pthread_attr_destroy(&attributes);
  launch_frames = {reinterpret_cast<uintptr_t>(frame), reinterpret_cast<uintptr_t>(lowest) + bytes, 4};
}

void announce_memory(const void* data, size_t bytes, size_t element) {
  announced.push_back(make_range(data, bytes));
  announced.back().cell = element < 4 ? element : 4;
}

void forget_memory() {
  announced.clear();
  shadow.clear();
  last_page = ~uintptr_t{0};
}

}  // namespace emulator

// ---- what the compiler calls ----
#define CNNRNN_ACCESS(size)                                                                            \
  extern "C" void __tsan_read##size(void* p) { emulator::access(p, size, emulator::Access::kRead); }   \
  extern "C" void __tsan_write##size(void* p) { emulator::access(p, size, emulator::Access::kWrite); } \
  extern "C" void __tsan_unaligned_read##size(void* p) {                                               \
    emulator::access(p, size, emulator::Access::kRead);                                                \
  }                                                                                                    \
  extern "C" void __tsan_unaligned_write##size(void* p) {                                              \
    emulator::access(p, size, emulator::Access::kWrite);                                               \
  }
CNNRNN_ACCESS(1)
CNNRNN_ACCESS(2)
CNNRNN_ACCESS(4)
CNNRNN_ACCESS(8)
CNNRNN_ACCESS(16)

extern "C" void __tsan_read_range(void* p, size_t bytes) {
  emulator::access(p, bytes, emulator::Access::kRead);
}
extern "C" void __tsan_write_range(void* p, size_t bytes) {
  emulator::access(p, bytes, emulator::Access::kWrite);
}
extern "C" void __tsan_vptr_update(void**, void*) {}
extern "C" void __tsan_init() {}
extern "C" void __tsan_func_entry(void*) {}
extern "C" void __tsan_func_exit() {}
