// The scheduler of the emulation: fibers, rendezvous, launches. The checks of memory accesses are in
// memory_checks.cpp. Controls for the tests are the extern "C" functions at the end.

#include "emulator.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "internal.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

Fiber* current = nullptr;
Device device{227 * 1024, true};
Index grid_size, block_size;

namespace {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kSharedGap = 64 * 1024;  // between the blocks of a cluster: an overrun must not go unnoticed
constexpr unsigned kWarpSize = 32;

#if defined(__x86_64__)
// Saves the callee-saved registers and changes stacks: swapcontext() would make a system call each time.
extern "C" void emulator_switch(void** save, void* load);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

struct Context {
  void* stack_pointer = nullptr;
  void prepare(unsigned char* stack, void (*entry)()) {
    auto** top =
        reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + kStackBytes) & ~uintptr_t{63});
    *--top = nullptr;  // entry must find the stack as after a call
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer = top;
  }
  void switch_to(Context& other) { emulator_switch(&stack_pointer, other.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void prepare(unsigned char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&context, &other.context); }
};
#endif

enum class State { kReady, kWaiting, kDone };

// An asynchronous copy that has not landed: what it will write.
struct PendingCopy {
  unsigned char* to;
  std::array<unsigned char, 16> data;
  size_t bytes;
  int group;  // committed with the copies of this number
};

struct Task : Fiber {
  Context context;
  State state = State::kReady;
  bool begun = false;
  Scope scope = kWarp;
  Site site{"", 0};
  void* operand = nullptr;  // of the exchange it waits in
  Epoch epoch;
  std::vector<PendingCopy> copies;
  int copy_groups = 0;  // committed so far
};

std::mt19937 random_source(0);
std::string violation;
std::vector<Task> tasks;  // of the running cluster, block by block
unsigned block_threads, cluster_blocks;
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
  const unsigned warp = task.thread.x / kWarpSize * kWarpSize;
  return {block + warp, block + std::min(warp + kWarpSize, block_threads)};
}

std::string site_name(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

const char* scope_name(Scope scope) {
  return scope == kWarp ? "warp" : scope == kBlock ? "block" : "cluster";
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
  static unsigned favourite = 0;  // block of the cluster
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

// Waits until all threads of the scope are here: false for those that were waited for, true for the last,
// which is to release the others, tasks [begin, end).
bool arrive_last(Scope scope, Site site, std::pair<unsigned, unsigned>& group) {
  Task& self = running();
  self.scope = scope;
  self.site = site;
  self.state = State::kWaiting;
  group = group_of(self, scope);
  unsigned arrived = 0;
  for (unsigned i = group.first; i < group.second; ++i) {
    const Task& task = tasks[i];
    if (task.state != State::kWaiting || task.scope != scope) continue;
    if (task.site.line != site.line || std::strcmp(task.site.file, site.file) != 0) {
      std::ostringstream text;
      text << "divergent " << scope_name(scope) << " barriers: " << site_name(task.site) << " and "
           << site_name(site);
      fail(text.str());
    }
    ++arrived;
  }
  if (arrived == group.second - group.first) return true;
  leave();
  return false;
}

void run_cluster(unsigned cluster, size_t shared_bytes) {
  const unsigned count = cluster_blocks * block_threads;
  tasks.assign(count, Task{});
  set_fibers(tasks.data(), tasks.size() * sizeof(Task));
  if (stack_count < count) {
    stacks.reset(new unsigned char[count * kStackBytes]);  // not value-initialised: most is never touched
    stack_count = count;
  }
  shared_stride = (shared_bytes + 15) / 16 * 16 + (cluster_blocks > 1 ? kSharedGap : 0);
  shared_storage.assign(shared_stride * cluster_blocks + 16, 0xFF);
  auto* shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_storage.data()) + 15) &
                                                  ~uintptr_t{15});
  const unsigned first_block = cluster * cluster_blocks;
  set_shared(shared, shared_bytes, shared_stride, first_block, cluster_blocks);
  for (unsigned i = 0; i < count; ++i) {
    Task& task = tasks[i];
    const unsigned rank = i / block_threads, number = first_block + rank;
    task.thread.x = i % block_threads;
    task.block = {number % grid_size.x, number / grid_size.x % grid_size.y,
                  number / grid_size.x / grid_size.y};
    task.shared = shared + rank * shared_stride;
    task.epoch = {launches, cluster, number, task.thread.x, {0, 0, 0}};
    task.context.prepare(&stacks[i * kStackBytes], fiber_main);
  }
  while (violation.empty() && run_a_warp()) {
  }
  for (const Task& task : tasks)
    if (violation.empty() && task.state != State::kDone) violation = describe_stall();
}

}  // namespace

const Epoch& current_epoch() { return running().epoch; }

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
  if (rank >= cluster_blocks) fail("no such block in the cluster");
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
  const std::string site = site_name(place);
  seen_sites.insert(site);
  std::pair<unsigned, unsigned> group;
  if (dropped_sites.count(site) || !arrive_last(scope, place, group)) return;
  for (unsigned i = group.first; i < group.second; ++i) {  // the last to arrive goes on, the others may
    tasks[i].state = State::kReady;
    for (int s = 0; s <= scope; ++s) ++tasks[i].epoch.phase[s];
  }
}

void exchange(Site place, void* operand, void (*action)(void* const* operands)) {
  running().operand = operand;
  std::pair<unsigned, unsigned> group;
  if (!arrive_last(kWarp, place, group)) return;
  if (group.second - group.first < kWarpSize) fail("an instruction of a whole warp in half a one");
  void* operands[kWarpSize];
  for (unsigned lane = 0; lane < kWarpSize; ++lane) operands[lane] = tasks[group.first + lane].operand;
  action(operands);
  for (unsigned i = group.first; i < group.second; ++i) tasks[i].state = State::kReady;
}

void async_copy(void* to, const void* from, size_t bytes, bool zeros) {
  Task& task = running();
  PendingCopy copy{static_cast<unsigned char*>(to), {}, bytes, task.copy_groups};
  check_alignment(to, bytes);
  if (!zeros) {
    check_alignment(from, bytes);
    check_read(from, bytes);
    std::memcpy(copy.data.data(), from, bytes);
  }
  check_write_begun(to, bytes);
  std::memset(to, 0xFF, bytes);
  task.copies.push_back(copy);
}

void async_commit() { ++running().copy_groups; }

void async_wait(int groups_left) {
  Task& task = running();
  std::vector<PendingCopy> left;
  for (const PendingCopy& copy : task.copies) {
    if (copy.group >= task.copy_groups - groups_left) {
      left.push_back(copy);
      continue;
    }
    check_write(copy.to, copy.bytes);
    std::memcpy(copy.to, copy.data.data(), copy.bytes);
  }
  task.copies = left;
}

void run(Index grid, unsigned blocks_of_cluster, unsigned threads, size_t shared_bytes,
         const std::function<void()>& body) {
  violation.clear();
  grid_size = grid;
  block_size = {threads, 1, 1};
  kernel_body = &body;
  ++launches;
  set_launch_frame(__builtin_frame_address(0));
  block_threads = threads;
  cluster_blocks = blocks_of_cluster;
  if (grid.x % cluster_blocks != 0)
    throw std::runtime_error("emulation: the grid is no multiple of its clusters");
  std::vector<unsigned> order(grid.x * grid.y * grid.z / cluster_blocks);
  for (unsigned c = 0; c < order.size(); ++c) order[c] = c;
  std::shuffle(order.begin(), order.end(), random_source);
  for (unsigned cluster : order)
    if (violation.empty()) run_cluster(cluster, shared_bytes);
  if (!violation.empty()) throw std::runtime_error("emulation: " + violation);
}

}  // namespace emulator

// ---- controls for the tests, through ctypes ----
extern "C" __attribute__((visibility("default"))) void emulator_seed(unsigned seed) {
  emulator::random_source.seed(seed);
}

// What launchers see from now on.
extern "C" __attribute__((visibility("default"))) void emulator_device(size_t shared_bytes, bool clusters) {
  emulator::device = {shared_bytes, clusters};
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
