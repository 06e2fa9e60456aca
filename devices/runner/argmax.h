// The position of the greatest of many floats.

#pragma once

#include <algorithm>
#include <cstdint>

namespace mobilellm {

// The first position of the greatest value, as std::max_element gives it; NaNs are never greater.
// A vocabulary has 128,256 logits: one comparison at a time costs as much as a layer's norms do.
inline int64_t argmax(const float* values, int64_t count) {
  typedef float Vector __attribute__((vector_size(16), aligned(4), may_alias));
  constexpr int64_t width = 4, unroll = 8, block = 2048;
  int64_t first = 0;  // of the block with the greatest value so far
  float greatest = -__builtin_inff();
  for (int64_t start = 0; start < count; start += block) {
    const int64_t size = std::min(block, count - start);
    const float* here = values + start;
    float found = greatest;
    int64_t i = 0;
    if (size >= width * unroll) {
      Vector most[unroll];
      for (int64_t j = 0; j < unroll; ++j) most[j] = Vector{} + greatest;
      for (; i + width * unroll <= size; i += width * unroll) {
#pragma GCC unroll 8
        for (int64_t j = 0; j < unroll; ++j) {
          const Vector x = *reinterpret_cast<const Vector*>(here + i + j * width);
          most[j] = x > most[j] ? x : most[j];
        }
      }
      for (const Vector& lane : most) {
        for (int64_t j = 0; j < width; ++j) found = std::max(found, lane[j]);
      }
    }
    for (; i < size; ++i) found = std::max(found, here[i]);
    if (found > greatest) {
      greatest = found;
      first = start;
    }
  }
  const float* const found = std::find(values + first, values + count, greatest);
  return found == values + count ? 0 : found - values;
}

} // namespace mobilellm
