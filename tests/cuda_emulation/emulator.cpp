// The scheduler of the emulation: fibers, rendezvous, launches. The checks of memory accesses are in
// memory_checks.cpp, what builds on rendezvous and waiting in collectives.cpp. Controls for the tests are the
// extern "C" functions at the end.

#include "emulator.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "context.h"
#include "internal.h"

namespace emulator {

Fiber* current = nullptr;
Device device{227 * 1024, 16, 132};
Index grid_size, block_size;

namespace {

constexpr size_t kSharedGap = 64 * 1024;  // between the blocks of a cluster: an overrun must not go unnoticed
constexpr unsigned kWarpSize = 32;

enum class State { kReady, kWaiting, kDone };

struct Task : Fiber {
  Context context;
  State state = State::kReady;
  bool begun = false;
  const void* object = nullptr;  // of a wait: an asynchronous barrier or a flag, else the threads of `scope`
  Scope scope = kWarp;
  Site site{"", 0};
  Epoch epoch;
  void* operand = nullptr;  // of the exchange it waits in
};

std::mt19937 random_source(0);
std::string violation;
std::vector<Task> tasks;             // of the running gang: a cluster or the whole grid, block by block
std::vector<Clock> clocks;           // of its warps
std::vector<uint32_t> pushed_times;  // of what each has pushed
bool pushing = false;                // the running access is a push
unsigned block_threads, block_warps, gang_blocks;
bool is_cluster;  // the gang's blocks reach each other's shared memory
std::unique_ptr<unsigned char[]> stacks;
size_t stack_count = 0, shared_stride = 0;
std::vector<unsigned char> shared_storage;
Context scheduler;
const std::function<void()>* kernel_body;
std::set<std::string> dropped_sites, seen_sites;
uint32_t launches = 0;

Task& running() { return *static_cast<Task*>(current); }

void leave() {
  Task& task = running();
  task.context.switch_to(scheduler);
}

void fiber_main() {
  (*kernel_body)();
  running().state = State::kDone;
  leave();
}

// The tasks [begin, end) that meet at a barrier of this scope.
std::pair<unsigned, unsigned> group_of(const Task& task, Scope scope) {
  if (scope == kCluster) return {0, tasks.size()};
  const unsigned block = (&task - tasks.data()) / block_threads * block_threads;
  if (scope == kBlock) return {block, block + block_threads};
  const unsigned width = scope == kPair ? 2 * kWarpSize : kWarpSize, first = task.thread.x / width * width;
  return {block + first, block + std::min(first + width, block_threads)};
}

std::string site_name(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

bool is_same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

const char* scope_name(Scope scope) {
  return scope == kWarp ? "warp" : scope == kPair ? "pair" : scope == kBlock ? "block" : "cluster";
}

std::string describe_stall() {
  std::ostringstream text;
  text << "deadlock in block (" << tasks[0].block.x << ", " << tasks[0].block.y << ", " << tasks[0].block.z
       << "):";
  std::map<std::string, unsigned> waiting;
  unsigned done = 0;
  for (const Task& task : tasks) {
    if (task.state == State::kWaiting) ++waiting[site_name(task.site)];
    done += task.state == State::kDone;
  }
  for (const auto& [site, count] : waiting)
    text << " " << count << " of " << tasks.size() << " threads wait at " << site << ",";
  text << " " << done << " have returned";
  return text.str();
}

// Lets one warp run until every lane waits or has returned. False if no warp could. The choice is greedy, the
// order that finds most bugs: a block drawn at random goes on until it is stuck, its warps drawn at random.
bool run_a_warp() {
  static unsigned favourite = 0;  // block of the gang
  std::vector<unsigned> ready, ready_in_favourite;
  for (unsigned first = 0; first < tasks.size(); first = group_of(tasks[first], kWarp).second)
    for (unsigned i = first; i < group_of(tasks[first], kWarp).second; ++i)
      if (tasks[i].state == State::kReady) {
        ready.push_back(first);
        if (first / block_threads == favourite) ready_in_favourite.push_back(first);
        break;
      }
  if (ready.empty()) return false;
  const auto& choice = ready_in_favourite.empty() ? ready : ready_in_favourite;
  const unsigned first = choice[random_source() % choice.size()];
  favourite = first / block_threads;
  const unsigned lanes = group_of(tasks[first], kWarp).second - first;
  for (bool progress = true; progress && violation.empty();) {
    progress = false;
    const unsigned start = random_source() % lanes;
    for (unsigned i = 0; i < lanes && violation.empty(); ++i) {
      Task& task = tasks[first + (start + i) % lanes];
      if (task.state != State::kReady) continue;
      progress = true;
      current = &task;
      task.begun = true;
      set_stack(&stacks[(&task - tasks.data()) * kStackBytes], kStackBytes);
      scheduler.switch_to(task.context);
      current = nullptr;
    }
  }
  return true;
}

void run_gang(unsigned gang, size_t shared_bytes) {
  const unsigned count = gang_blocks * block_threads;
  tasks.assign(count, Task{});
  clocks.assign(gang_blocks * block_warps, Clock(2 * gang_blocks * block_warps, 0));
  for (size_t warp = 0; warp < clocks.size(); ++warp) clocks[warp][warp] = 1;
  pushed_times.assign(clocks.size(), 1);
  forget_objects();
  forget_copies();
  set_fibers(tasks.data(), tasks.size() * sizeof(Task));
  if (stack_count < count) {
    stacks.reset(new unsigned char[count * kStackBytes]);  // not value-initialised: most is never touched
    stack_count = count;
  }
  shared_stride = (shared_bytes + 15) / 16 * 16 + (gang_blocks > 1 ? kSharedGap : 0);
  shared_storage.assign(shared_stride * gang_blocks + 16, 0xFF);
  auto* shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_storage.data()) + 15) &
                                                  ~uintptr_t{15});
  const unsigned first_block = gang * gang_blocks;
  set_shared(shared, shared_bytes, shared_stride, first_block, gang_blocks);
  for (unsigned i = 0; i < count; ++i) {
    Task& task = tasks[i];
    const unsigned rank = i / block_threads, number = first_block + rank;
    task.thread.x = i % block_threads;
    task.block = {number % grid_size.x, number / grid_size.x % grid_size.y,
                  number / grid_size.x / grid_size.y};
    task.shared = shared + rank * shared_stride;
    task.epoch = {launches, gang, number, task.thread.x, rank * block_warps + task.thread.x / kWarpSize,
                  0,        0};
    task.context.prepare(&stacks[i * kStackBytes], fiber_main);
  }
  while (violation.empty() && run_a_warp()) {
  }
  for (const Task& task : tasks)
    if (violation.empty() && task.state != State::kDone) violation = describe_stall();
}

// Waits until the last thread of the scope has arrived. True for that one.
bool meet(Scope scope, Site site) {
  Task& self = running();
  self.scope = scope;
  self.object = nullptr;
  self.site = site;
  self.state = State::kWaiting;
  const auto [begin, end] = group_of(self, scope);
  unsigned arrived = 0;
  for (unsigned i = begin; i < end; ++i) {
    const Task& task = tasks[i];
    if (task.state != State::kWaiting || task.object) continue;
    if (task.scope == scope && !is_same(task.site, site)) {
      std::ostringstream text;
      text << "divergent " << scope_name(scope) << " barriers: " << site_name(task.site) << " and "
           << site_name(site);
      fail(text.str());
    }
    arrived += task.scope == scope;
  }
  if (arrived < end - begin) {
    leave();
    return false;
  }
  for (unsigned i = begin; i < end; ++i) tasks[i].state = State::kReady;  // the last to arrive goes on
  return true;
}

}  // namespace

void join(Clock& into, const Clock& from) {
  into.resize(2 * clocks.size(), 0);
  for (size_t i = 0; i < from.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void release(Clock& to) {
  join(to, clocks[running().epoch.warp]);
  ++clocks[running().epoch.warp][running().epoch.warp];
}

void acquire(const Clock& from) { join(clocks[running().epoch.warp], from); }

void write_by_push(void* place, const void* value, size_t bytes, Clock& to) {
  pushing = true;
  check_write(place, bytes);
  pushing = false;
  std::memcpy(place, value, bytes);
  Clock pushed(2 * clocks.size(), 0);
  pushed[clocks.size() + running().epoch.warp] = pushed_times[running().epoch.warp]++;
  join(to, pushed);
}

void wait_until(const void* object, Site place, const std::function<bool()>& done) {
  Task& self = running();
  while (!done()) {
    self.state = State::kWaiting;
    self.object = object;
    self.site = place;
    leave();
  }
}

void wake(const void* object) {
  for (Task& task : tasks)
    if (task.state == State::kWaiting && task.object == object) task.state = State::kReady;
}

bool is_dropped(Site place) {
  const std::string site = site_name(place);
  seen_sites.insert(site);
  return dropped_sites.count(site) > 0;
}

void exchange(Site place, void* operand, void (*action)(void* const* operands)) {
  running().operand = operand;
  if (!meet(kWarp, place)) return;
  const auto [begin, end] = group_of(running(), kWarp);
  if (end - begin < kWarpSize) fail("an instruction of a whole warp in half a one");
  void* operands[kWarpSize];
  for (unsigned lane = 0; lane < kWarpSize; ++lane) operands[lane] = tasks[begin + lane].operand;
  action(operands);
}

Epoch current_epoch() {
  Epoch now = running().epoch;
  now.clock = pushing ? pushed_times[now.warp] : clocks[now.warp][now.warp];
  if (pushing) now.warp += clocks.size();
  return now;
}

bool happened_before_now(const Epoch& earlier) {
  const Epoch& now = running().epoch;
  if (earlier.launch != now.launch) return true;
  if (earlier.gang != now.gang) return false;
  if (earlier.warp != now.warp) return earlier.clock <= clocks[now.warp][earlier.warp];
  return earlier.thread == now.thread || earlier.barriers < now.barriers;
}

bool has_begun(uint32_t rank) {
  for (unsigned t = 0; t < block_threads; ++t)
    if (tasks[rank * block_threads + t].begun) return true;
  return false;
}

bool has_returned(uint32_t rank) {
  for (unsigned t = 0; t < block_threads; ++t)
    if (tasks[rank * block_threads + t].state != State::kDone) return false;
  return true;
}

void* in_block_of_cluster(void* place, unsigned rank) {
  if (!is_cluster || rank >= gang_blocks) fail("no such block in the cluster");
  const Task& task = running();
  const unsigned own = (&task - tasks.data()) / block_threads;
  return static_cast<unsigned char*>(place) + (static_cast<ptrdiff_t>(rank) - own) * shared_stride;
}

void check_alignment(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("misaligned access");
}

void fail(const std::string& message) {
  if (violation.empty()) {
    std::ostringstream text;
    const Task& task = running();
    text << message << " (thread " << task.thread.x << " of block (" << task.block.x << ", " << task.block.y
         << ", " << task.block.z << "))";
    violation = text.str();
  }
  leave();
}

void rendezvous(Scope scope, Site place) {
  if (is_dropped(place)) return;
  if (!meet(scope, place)) return;
  const auto [begin, end] = group_of(running(), scope);
  Clock joined(2 * clocks.size(), 0);
  for (unsigned i = begin; i < end; i += kWarpSize) join(joined, clocks[tasks[i].epoch.warp]);
  for (unsigned i = begin; i < end; ++i) {
    Task& task = tasks[i];
    ++task.epoch.barriers;
    if (i != begin && task.epoch.warp == tasks[i - 1].epoch.warp) continue;
    clocks[task.epoch.warp] = joined;
    ++clocks[task.epoch.warp][task.epoch.warp];
  }
}

void run(Index grid, unsigned blocks_of_cluster, bool together, unsigned threads, size_t shared_bytes,
         const std::function<void()>& body) {
  violation.clear();
  pushing = false;
  grid_size = grid;
  block_size = {threads, 1, 1};
  kernel_body = &body;
  ++launches;
  set_launch_frame(__builtin_frame_address(0));
  block_threads = threads;
  block_warps = (threads + kWarpSize - 1) / kWarpSize;
  const unsigned blocks = grid.x * grid.y * grid.z;
  gang_blocks = together ? blocks : blocks_of_cluster;
  is_cluster = !together;
  if (grid.x % blocks_of_cluster != 0)
    throw std::runtime_error("emulation: the grid is no multiple of its clusters");
  std::vector<unsigned> order(blocks / gang_blocks);
  for (unsigned c = 0; c < order.size(); ++c) order[c] = c;
  std::shuffle(order.begin(), order.end(), random_source);
  for (unsigned gang : order)
    if (violation.empty()) run_gang(gang, shared_bytes);
  if (!violation.empty()) throw std::runtime_error("emulation: " + violation);
}

}  // namespace emulator

// ---- controls for the tests, through ctypes ----
extern "C" __attribute__((visibility("default"))) void emulator_seed(unsigned seed) {
  emulator::random_source.seed(seed);
}

// What launchers see from now on.
extern "C" __attribute__((visibility("default"))) void emulator_device(size_t shared_bytes,
                                                                       unsigned cluster_blocks,
                                                                       unsigned blocks) {
  emulator::device = {shared_bytes, cluster_blocks, blocks};
}

// The barrier at `site` ("file:line") does nothing from now on; "" restores all.
extern "C" __attribute__((visibility("default"))) void emulator_drop_barrier(const char* site) {
  if (*site == '\0') emulator::dropped_sites.clear();
  if (*site != '\0') emulator::dropped_sites.insert(site);
}

// The sites of the barriers met since the last call, one a line.
extern "C" __attribute__((visibility("default"))) const char* emulator_seen_barriers() {
  static std::string text;
  text.clear();
  for (const std::string& site : emulator::seen_sites) text += site + "\n";
  emulator::seen_sites.clear();
  return text.c_str();
}
