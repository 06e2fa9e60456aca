// Kernels for the operators of ExecuTorch's custom attention, so that a program made for the
// official runners runs here as it is: llama::update_cache, llama::custom_sdpa and
// llama::custom_quantized_sdpa. The wheel has them only in a library that needs torch.
//
// What they compute is defined by the operators' public schemas and by
// docs/formats.md; attention_kernel.cpp has the arithmetic.

#include "attention.h"

#include <executorch/extension/kernel_util/make_boxed_from_unboxed_functor.h>
#include <executorch/runtime/core/function_ref.h>
#include <executorch/runtime/kernel/kernel_includes.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>

// The wheel exports these; its header declares them only for builds with a thread pool.
namespace executorch::extension {
bool parallel_for(int64_t begin, int64_t end, int64_t grain,
                  runtime::FunctionRef<void(int64_t, int64_t)> body);
int64_t get_thread_count();
} // namespace executorch::extension

namespace mobilellm {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::KernelRuntimeContext;
using Optional = std::optional<Tensor>;

// Products below which other threads cost more than they bring.
constexpr int64_t kWorthThreads = 1 << 18;

const Kernels* best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
    return &kernels_avx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kernels_avx2;
#endif
  return &kernels_baseline;
}

// Memory of this thread, which the next call uses again.
float* scratch(int64_t floats) {
  thread_local std::unique_ptr<float[]> memory;
  thread_local int64_t size = 0;
  constexpr int64_t line = 16;  // floats of a cache line
  if (size < floats) {
    memory.reset(new float[floats + line]);
    size = floats;
  }
  const auto address = reinterpret_cast<uintptr_t>(memory.get());
  return reinterpret_cast<float*>((address + 63) / 64 * 64);
}

bool contiguous(const Tensor& tensor) {
  int64_t stride = 1;
  for (ssize_t i = tensor.dim() - 1; i >= 0; --i) {
    if (tensor.size(i) != 1 && tensor.strides()[i] != stride) return false;
    stride *= tensor.size(i);
  }
  return true;
}

// A tensor [batch, token, head, width], or with tokens at dimension 2.
struct Layout {
  int64_t batches, tokens, heads, width;
};

Layout layout_of(const Tensor& tensor, bool tokens_at_2) {
  return {tensor.size(0), tensor.size(tokens_at_2 ? 2 : 1), tensor.size(tokens_at_2 ? 1 : 2),
          tensor.size(3)};
}

// The rows of one batch of a contiguous tensor.
Rows rows_of(const Tensor& tensor, const Layout& of, bool tokens_at_2, int64_t batch,
             const Optional& scales, const Optional& zero_points) {
  const int64_t token = tokens_at_2 ? 1 : of.heads, head = tokens_at_2 ? of.tokens : 1;
  const int64_t rows = batch * of.tokens * of.heads;
  Rows found{};
  found.token = token * of.width;
  found.head = head * of.width;
  const auto* data = static_cast<const char*>(tensor.const_data_ptr());
  found.data = data + rows * of.width * tensor.element_size();
  if (tensor.scalar_type() == ScalarType::Char) {
    found.scales = scales->const_data_ptr<float>() + rows;
    found.zero_points = zero_points->const_data_ptr<int8_t>() + rows;
    found.scale_token = token;
    found.scale_head = head;
  }
  return found;
}

// Whether a tensor has the type of the others, and if int8, a scale and a zero point for each row.
bool readable(const Tensor& tensor, ScalarType type, const Optional& scales,
              const Optional& zero_points) {
  if (tensor.dim() != 4 || tensor.scalar_type() != type || !contiguous(tensor)) return false;
  if (type == ScalarType::Float) return true;
  if (type != ScalarType::Char || !scales || !zero_points) return false;
  if (scales->scalar_type() != ScalarType::Float) return false;
  if (zero_points->scalar_type() != ScalarType::Char) return false;
  for (const Tensor* of : {&*scales, &*zero_points}) {
    if (of->dim() != 4 || of->size(3) != 1 || !contiguous(*of)) return false;
    for (ssize_t i = 0; i < 3; ++i) {
      if (of->size(i) != tensor.size(i)) return false;
    }
  }
  return true;
}

struct Quantization {
  const Optional &zero_points, &scales;
};

void attend(const Attention& call, int64_t kv_heads) {
  const Kernels& code = *kernels;
  const int64_t rows = call.queries * call.group;
  const int64_t threads = executorch::extension::get_thread_count();
  // Rows of a task: as many as fit, fewer where threads would have none.
  int64_t most = kMostRows;
  if (threads > 1) {
    const int64_t share = (rows * kv_heads + 2 * threads - 1) / (2 * threads);
    most = std::min(most, std::max<int64_t>(share, 64));
  }
  const int64_t pieces = (rows + most - 1) / most;
  const int64_t size = (rows + pieces - 1) / pieces;
  const int64_t memory = code.scratch(call.width);
  const auto body = [&](int64_t begin, int64_t end) {
    float* const own = scratch(memory);
    for (int64_t i = begin; i < end; ++i) {
      // The last rows see most keys, so they come first.
      const int64_t piece = pieces - 1 - i / kv_heads;
      const int64_t first = piece * size, count = std::min(size, rows - first);
      if (count > 0) code.attend(call, i % kv_heads, first, count, own);
    }
  };
  const int64_t tasks = pieces * kv_heads;
  if (threads == 1 || tasks == 1 || rows * kv_heads * call.keys * call.width < kWorthThreads) {
    body(0, tasks);
  } else {
    executorch::extension::parallel_for(0, tasks, 1, body);
  }
}

// What both operators compute. Nothing is written where the arguments do not fit each other.
bool attention(const Tensor& q, const Tensor& k, const Tensor& v, int64_t start,
               const Optional& mask, bool causal, std::optional<double> scale,
               const Quantization& of_q, const Quantization& of_k, const Quantization& of_v,
               bool tokens_at_2, Tensor& out) {
  const ScalarType type = q.scalar_type();
  if (!readable(q, type, of_q.scales, of_q.zero_points) ||
      !readable(k, type, of_k.scales, of_k.zero_points) ||
      !readable(v, type, of_v.scales, of_v.zero_points)) {
    return false;
  }
  const Layout of = layout_of(q, tokens_at_2), cache = layout_of(k, tokens_at_2);
  const bool fits = v.sizes() == k.sizes() && cache.batches == of.batches &&
      cache.width == of.width && cache.heads > 0 && of.heads % cache.heads == 0 &&
      of.width > 0 && start >= 0 && start <= cache.tokens - of.tokens && !(mask && causal);
  if (!fits || out.scalar_type() != ScalarType::Float) return false;
  if (resize_tensor(out, q.sizes()) != Error::Ok || !contiguous(out)) return false;

  Attention call{};
  call.queries = of.tokens;
  call.keys = mask ? cache.tokens : start + of.tokens;
  call.group = of.heads / cache.heads;
  call.width = of.width;
  call.start = start;
  call.scale = scale ? static_cast<float>(*scale) : 1 / std::sqrt(static_cast<float>(of.width));
  call.causal = causal;
  if (mask && mask->numel() != 0) {
    if (mask->scalar_type() != ScalarType::Float || mask->dim() != 2 || !contiguous(*mask) ||
        mask->size(0) != call.queries || mask->size(1) != call.keys) {
      return false;
    }
    call.mask = mask->const_data_ptr<float>();
  }
  call.out_token = (tokens_at_2 ? 1 : of.heads) * of.width;
  call.out_head = (tokens_at_2 ? of.tokens : 1) * of.width;
  for (int64_t batch = 0; batch < of.batches && of.tokens > 0; ++batch) {
    call.q = rows_of(q, of, tokens_at_2, batch, of_q.scales, of_q.zero_points);
    call.k = rows_of(k, cache, tokens_at_2, batch, of_k.scales, of_k.zero_points);
    call.v = rows_of(v, cache, tokens_at_2, batch, of_v.scales, of_v.zero_points);
    call.out = out.mutable_data_ptr<float>() + batch * of.tokens * of.heads * of.width;
    attend(call, cache.heads);
  }
  return true;
}

Tensor& custom_sdpa(KernelRuntimeContext& context, const Tensor& q, const Tensor& k,
                    const Tensor& v, const int64_t start, const Optional mask, const double,
                    const bool causal, const std::optional<double> scale, Tensor& out) {
  const Optional none;
  const Quantization is_float{none, none};
  const bool is_valid = q.scalar_type() == ScalarType::Float &&
      attention(q, k, v, start, mask, causal, scale, is_float, is_float, is_float, false, out);
  ET_KERNEL_CHECK_MSG(context, is_valid, InvalidArgument, out,
                      "llama::custom_sdpa.out: the arguments do not fit");
  return out;
}

Tensor& custom_quantized_sdpa(
    KernelRuntimeContext& context, const Tensor& q, const Tensor& k, const Tensor& v,
    const int64_t start, const Optional mask, const double, const bool causal,
    const std::optional<double> scale, const Optional q_zero_points, const Optional q_scales,
    const Optional k_zero_points, const Optional k_scales, const Optional v_zero_points,
    const Optional v_scales, const bool tokens_at_2, Tensor& out) {
  ET_KERNEL_CHECK_MSG(
      context,
      attention(q, k, v, start, mask, causal, scale, {q_zero_points, q_scales},
                {k_zero_points, k_scales}, {v_zero_points, v_scales}, tokens_at_2, out),
      InvalidArgument, out, "llama::custom_quantized_sdpa.out: the arguments do not fit");
  return out;
}

// Copies `value` [batch, n, heads, width] into `cache` [batch, context, heads, width] from
// position `start` on. The result is a placeholder that nothing reads.
Tensor& update_cache(KernelRuntimeContext& context, const Tensor& value, Tensor& cache,
                     const int64_t start, Tensor& out) {
  const bool fits = value.dim() == 4 && cache.dim() == 4 && contiguous(value) &&
      contiguous(cache) && value.size(0) == cache.size(0) && value.size(2) == cache.size(2) &&
      value.size(3) == cache.size(3) && value.scalar_type() == cache.scalar_type() &&
      start >= 0 && start <= cache.size(1) - value.size(1);
  ET_KERNEL_CHECK_MSG(context, fits, InvalidArgument, out,
                      "llama::update_cache.out: the value does not fit into the cache");
  if (value.numel() == 0) return out;
  const size_t token = value.size(2) * value.size(3) * value.element_size();
  const auto* from = static_cast<const char*>(value.const_data_ptr());
  auto* to = static_cast<char*>(cache.mutable_data_ptr()) + start * token;
  for (ssize_t batch = 0; batch < value.size(0); ++batch) {
    std::memcpy(to + batch * cache.size(1) * token, from + batch * value.size(1) * token,
                value.size(1) * token);
  }
  return out;
}

EXECUTORCH_LIBRARY(llama, "update_cache.out", update_cache);
EXECUTORCH_LIBRARY(llama, "custom_sdpa.out", custom_sdpa);
EXECUTORCH_LIBRARY(llama, "custom_quantized_sdpa.out", custom_quantized_sdpa);

} // namespace

const Kernels* kernels = best();

} // namespace mobilellm
