// The thread pool of the wheel, which ships its library without this header.
#pragma once

#include <cstdint>

namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
} // namespace executorch::extension::threadpool

namespace mobilellm {

// The calling thread is one of them.
inline void set_threads(int64_t threads) {
  executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(threads);
}

} // namespace mobilellm
