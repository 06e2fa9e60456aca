// The time of the samples.
#pragma once

#include <chrono>

namespace mobilellm {

inline double now_ms() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

} // namespace mobilellm
