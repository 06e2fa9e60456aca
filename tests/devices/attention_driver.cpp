// Calls operators of the native runner by their names, for tests/devices/test_attention_kernels.py.
//
//   attention_driver THREADS [KERNELS]
//
// Reads cases from standard input and writes the output of each. A case is, in int64: the number
// of arguments, and for each its kind and value: 0 none; 1 an int64; 2 a float64; 3 a bool; 4 a
// tensor, which is its scalar type, its number of dimensions, the sizes and then the data. The
// first argument is the operator's name: the kind 5, its length and its characters. The last one
// is the result, a tensor without data. What is written is the error code in int64, then the data
// of the result, then that of the argument before it where the name is update_cache's.

#include "attention.h"
#include "threads.h"

#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/core/evalue.h>
#include <executorch/runtime/kernel/kernel_runtime_context.h>
#include <executorch/runtime/kernel/operator_registry.h>
#include <executorch/runtime/platform/runtime.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <optional>
#include <string>
#include <vector>

using executorch::aten::ScalarType;
using executorch::runtime::EValue;

namespace {

enum Kind : int64_t { kNone, kInteger, kFloat, kBool, kTensor, kName };

bool read(void* to, size_t size) { return std::fread(to, 1, size, stdin) == size; }

template <class T>
T next() {
  T value{};
  if (!read(&value, sizeof value)) std::exit(1);
  return value;
}

size_t size_of(ScalarType type) { return type == ScalarType::Float ? 4 : type == ScalarType::Long ? 8 : 1; }

bool choose(const std::string& name) {
#if defined(__x86_64__)
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    mobilellm::kernels = &mobilellm::kernels_avx2;
    return true;
  }
  if (name == "avx512" && mobilellm::kernels == &mobilellm::kernels_avx512) return true;
#endif
  if (name == "baseline") mobilellm::kernels = &mobilellm::kernels_baseline;
  return name == "baseline";
}

void run_case(int64_t arguments) {
  // What tensors point to must not move.
  std::deque<std::vector<char>> data;
  std::deque<executorch::extension::TensorPtr> tensors;
  std::deque<EValue> values;
  std::string name;
  for (int64_t i = 0; i < arguments; ++i) {
    switch (next<int64_t>()) {
      case kNone: values.emplace_back(); break;
      case kInteger: values.emplace_back(next<int64_t>()); break;
      case kFloat: values.emplace_back(next<double>()); break;
      case kBool: values.emplace_back(next<int64_t>() != 0); break;
      case kName: name.resize(next<int64_t>()); read(name.data(), name.size()); break;
      case kTensor: {
        const auto type = static_cast<ScalarType>(next<int64_t>());
        std::vector<executorch::aten::SizesType> sizes(next<int64_t>());
        size_t bytes = size_of(type);
        for (auto& size : sizes) bytes *= size = static_cast<int32_t>(next<int64_t>());
        data.emplace_back(bytes);
        if (i + 1 < arguments && !read(data.back().data(), bytes)) std::exit(1);
        tensors.push_back(executorch::extension::from_blob(data.back().data(), sizes, type));
        values.emplace_back(*tensors.back());
      }
    }
  }
  std::vector<EValue*> stack;
  for (auto& value : values) stack.push_back(&value);
  const auto found = executorch::runtime::get_op_function_from_registry(name.c_str(), {});
  if (!found.ok()) std::exit(3);
  executorch::runtime::KernelRuntimeContext context;
  found.get()(context, {stack.data(), stack.size()});
  const int64_t error = static_cast<int64_t>(context.failure_state());
  std::fwrite(&error, sizeof error, 1, stdout);
  const size_t changed = data.size() - (name == "llama::update_cache.out" ? 2 : 1);
  std::fwrite(data[changed].data(), 1, data[changed].size(), stdout);
}

} // namespace

int main(int argc, char** argv) {
  executorch::runtime::runtime_init();
  if (argc < 2 || (argc > 2 && !choose(argv[2]))) return 2;
  mobilellm::set_threads(std::atoi(argv[1]));
  for (int64_t arguments; read(&arguments, sizeof arguments);) run_case(arguments);
  return 0;
}
