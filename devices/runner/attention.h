// What the operators of attention.cpp hand to the vector code of attention_kernel.cpp.
//
// attention_kernel.cpp is compiled once for each instruction set. So neither file may put code of
// the C++ library into the other: the linker would keep one copy, perhaps the one that this CPU
// cannot run.

#pragma once

#include <cstdint>

namespace mobilellm {

// A tensor of one batch: float32, or int8 with a scale and a zero point for each row. Elements of
// a row are adjacent; `token` and `head` are strides in elements.
struct Rows {
  const void* data;
  int64_t token, head;
  const float* scales;  // null for float32
  const int8_t* zero_points;
  int64_t scale_token, scale_head;
};

// softmax(q k^T * scale + mask) v of one batch. Query heads are `group` times as many as key heads.
struct Attention {
  Rows q, k, v;
  float* out;
  int64_t out_token, out_head;
  const float* mask;  // [queries, keys], or null
  int64_t queries, keys, group, width;
  int64_t start;  // position of the first query; query i sees start + i + 1 keys if causal
  float scale;
  bool causal;
};

// At most so many rows at a time: a row is one query of one head, in the order of `row_of`.
constexpr int64_t kMostRows = 384;

// One instruction set's code. `scratch` has the number of floats that `attend` needs; `attend`
// computes rows [first, first + count) of the query heads that share key head `kv_head`. Row r is
// query r / group of the group's head r % group.
struct Kernels {
  int64_t (*scratch)(int64_t width);
  void (*attend)(const Attention&, int64_t kv_head, int64_t first, int64_t count, float* scratch);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2, kernels_avx512;
#endif

// The ones that the operators use: the best for this CPU, unless a test chooses others.
extern const Kernels* kernels;

} // namespace mobilellm
