// The scheduler of the emulation: fibers, rendezvous, launches. The checks of memory accesses are in
// memory_checks.cpp. Controls for the tests are the extern "C" functions at the end.

#include "emulator.h"

#include <algorithm>
#include <map>
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
Index grid_size, block_size;

namespace {

constexpr size_t kStackBytes = 128 * 1024;
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

struct Task : Fiber {
  Context context;
  State state = State::kReady;
  Scope scope = kWarp;
  std::string site;
  Epoch epoch;
};

struct Stop {};  // a violation was recorded: the launch is over

std::mt19937 random_source(0);
std::string violation;
std::vector<Task> tasks;
std::vector<unsigned char> stacks, shared_storage;
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

unsigned group_begin(const Task& task, Scope scope) {
  const unsigned index = &task - tasks.data();
  return scope == kWarp ? index / kWarpSize * kWarpSize : 0;
}

unsigned group_end(const Task& task, Scope scope) {
  const unsigned all = tasks.size();
  return scope == kWarp ? std::min(group_begin(task, scope) + kWarpSize, all) : all;
}

std::string site_name(Site site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

const char* scope_name(Scope scope) { return scope == kWarp ? "warp" : "block"; }

std::string describe_stall() {
  std::ostringstream text;
  text << "deadlock in block (" << tasks[0].block.x << ", " << tasks[0].block.y << ", " << tasks[0].block.z
       << "):";
  std::map<std::string, unsigned> waiting;
  unsigned done = 0;
  for (const Task& task : tasks) {
    if (task.state == State::kWaiting) ++waiting[task.site];
    done += task.state == State::kDone;
  }
  for (const auto& [site, count] : waiting)
    text << " " << count << " of " << tasks.size() << " threads wait at " << site << ",";
  text << " " << done << " have returned";
  return text.str();
}

// Lets one warp, drawn at random, run until every lane waits or has returned. False if no warp could.
bool run_a_warp() {
  std::vector<unsigned> ready;
  for (unsigned first = 0; first < tasks.size(); first += kWarpSize)
    for (unsigned i = first; i < std::min<size_t>(first + kWarpSize, tasks.size()); ++i)
      if (tasks[i].state == State::kReady) {
        ready.push_back(first);
        break;
      }
  if (ready.empty()) return false;
  const unsigned first = ready[random_source() % ready.size()];
  const unsigned lanes = std::min<size_t>(kWarpSize, tasks.size() - first);
  for (bool progress = true; progress && violation.empty();) {
    progress = false;
    const unsigned start = random_source() % lanes;
    for (unsigned i = 0; i < lanes && violation.empty(); ++i) {
      Task& task = tasks[first + (start + i) % lanes];
      if (task.state != State::kReady) continue;
      progress = true;
      current = &task;
      set_stack(&stacks[(&task - tasks.data()) * kStackBytes], kStackBytes);
      scheduler.switch_to(task.context);
      current = nullptr;
    }
  }
  return true;
}

void run_block(Index block, unsigned block_number, unsigned threads, size_t shared_bytes) {
  tasks.assign(threads, Task{});
  set_fibers(tasks.data(), tasks.size() * sizeof(Task));
  if (stacks.size() < threads * kStackBytes) stacks.resize(threads * kStackBytes);
  shared_storage.assign(shared_bytes + 64, 0xFF);
  auto* shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(shared_storage.data()) + 15) &
                                                  ~uintptr_t{15});
  set_shared(shared, shared_bytes);
  for (unsigned t = 0; t < threads; ++t) {
    Task& task = tasks[t];
    task.thread.x = t;
    task.block = block;
    task.shared = shared;
    task.epoch = {launches, block_number, t, {0, 0}};
    task.context.prepare(&stacks[t * kStackBytes], fiber_main);
  }
  while (violation.empty() && run_a_warp()) {
  }
  for (const Task& task : tasks)
    if (violation.empty() && task.state != State::kDone) violation = describe_stall();
}

}  // namespace

const Epoch& current_epoch() { return running().epoch; }

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
  if (dropped_sites.count(site)) return;
  Task& self = running();
  self.scope = scope;
  self.site = site;
  self.state = State::kWaiting;
  const unsigned begin = group_begin(self, scope), end = group_end(self, scope);
  unsigned arrived = 0;
  for (unsigned i = begin; i < end; ++i) {
    const Task& task = tasks[i];
    if (task.state != State::kWaiting) continue;
    if (task.scope == scope && task.site != site) {
      std::ostringstream text;
      text << "divergent " << scope_name(scope) << " barriers: " << task.site << " and " << site;
      fail(text.str());
    }
    arrived += task.scope == scope;
  }
  if (arrived < end - begin) {
    leave();
    return;
  }
  for (unsigned i = begin; i < end; ++i) {  // the last to arrive goes on, the others may
    tasks[i].state = State::kReady;
    for (int s = 0; s <= scope; ++s) ++tasks[i].epoch.phase[s];
  }
}

void run(Index grid, unsigned threads, size_t shared_bytes, const std::function<void()>& body) {
  violation.clear();
  grid_size = grid;
  block_size = {threads, 1, 1};
  kernel_body = &body;
  ++launches;
  set_launch_frame(__builtin_frame_address(0));
  const unsigned blocks = grid.x * grid.y * grid.z;
  std::vector<unsigned> order(blocks);
  for (unsigned b = 0; b < blocks; ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), random_source);
  for (unsigned b : order) {
    run_block({b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y}, b, threads, shared_bytes);
    if (!violation.empty()) break;
  }
  if (!violation.empty()) throw std::runtime_error("emulation: " + violation);
}

}  // namespace emulator

// ---- controls for the tests, through ctypes ----
extern "C" __attribute__((visibility("default"))) void emulator_seed(unsigned seed) {
  emulator::random_source.seed(seed);
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
