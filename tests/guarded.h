// Test buffers that end where a page without access begins, or begin where one ends: an element too many is
// a crash.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>

enum class Guard { kAfter, kBefore };

template <typename T>
class Guarded {
 public:
  Guarded(size_t count, Guard guard) : count_(count) {
    page_ = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = count * sizeof(T);
    whole_ = (bytes + page_ - 1) / page_ * page_;
    void* pages =
        mmap(nullptr, whole_ + 2 * page_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) std::abort();
    pages_ = static_cast<char*>(pages);
    if (mprotect(pages_, page_, PROT_NONE) || mprotect(pages_ + page_ + whole_, page_, PROT_NONE))
      std::abort();
    data_ = reinterpret_cast<T*>(pages_ + page_ + (guard == Guard::kAfter ? whole_ - bytes : 0));
  }
  ~Guarded() { munmap(pages_, whole_ + 2 * page_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t size() const { return count_; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }

 private:
  size_t count_, page_, whole_;
  char* pages_;
  T* data_;
};
