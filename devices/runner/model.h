// A program in ExecuTorch's runtime: loaded once, then read and decoded with.
#pragma once

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>

#include "argmax.h"
#include "loader.h"
#include "options.h"
#include "packed_cache.h"

namespace mobilellm {

using executorch::extension::Module;
using executorch::runtime::Error;

// The operators that a program needs and that nothing here has. ExecuTorch tells their names only
// in what it logs.
inline std::string missing_operators;

inline void log_message(et_timestamp_t, et_pal_log_level_t level, const char* file, const char*,
                 size_t line, const char* message, size_t) {
  static const std::string told = "Missing operator: ";
  const std::string text = message;
  if (text.rfind(told, 0) == 0) {
    const size_t number = text.find("] ");
    const std::string name = text.substr(number == std::string::npos ? told.size() : number + 2);
    if (missing_operators.find(name) == std::string::npos) {  // told for each call of it
      missing_operators += (missing_operators.empty() ? "" : ", ") + name;
    }
  }
  std::fprintf(stderr, "%c executorch:%s:%zu] %s\n", level, file, line, message);
}

// The steps after which the rows that they looked up are given back. Each costs two page faults
// when it is read again; all of them together would be the whole table.
constexpr int64_t kTokensPerRelease = 64;

class Model {
 public:
  // `mapped` or read. `packed` is the file for XNNPACK's packed weights, null for none.
  Model(const std::string& path, bool mapped, PackedCache* packed,
        std::unique_ptr<executorch::runtime::EventTracer> tracer) {
    if (mapped) {
      auto file = MappedFile::open(path);
      if (!file) fail(kCannotLoad, path + ": ExecuTorch cannot load it, it cannot be mapped");
      file_ = file.get();
      module_ = std::make_unique<Module>(std::move(file), nullptr, nullptr, std::move(tracer));
    } else {
      module_ = std::make_unique<Module>(path, Module::LoadMode::File, std::move(tracer));
    }
    executorch::runtime::BackendOptions<2> options;
    executorch::runtime::LoadBackendOptionsMap backends;
    if (packed) {
      check(options.set_option("packed_cache_path", packed->path().c_str()), path);
      check(options.set_option("weight_cache_enabled", true), path);
      check(backends.set_options("XnnpackBackend", options.view()), path);
    }
    check(module_->load(backends), path);
    auto meta = module_->method_meta("forward");
    check(meta.error(), path);
    memory_ = std::make_unique<PlannedMemory>(meta.get());
    if (!memory_->allocator()) fail(kCannotLoad, "no memory for the program's plan");
    rows_ = rows_of(meta.get());
    check(module_->load_method("forward", memory_->allocator()), path);
    if (file_) file_->cut_constants();
    context_ = constant("get_max_context_len");
    vocab_ = constant("get_vocab_size");
    longest_ = std::max<int64_t>(1, constant("get_max_seq_len"));
  }

  int64_t context() const { return context_; }
  int64_t vocab() const { return vocab_; }
  // The most rows of logits that a step gives: those of its last positions.
  int64_t rows() const { return rows_; }

  // Reads tokens[0, count) at position `start`; the likeliest next token. The logits stay valid
  // until the next step.
  int64_t step(const int64_t* tokens, int64_t count, int64_t start) {
    using executorch::extension::from_blob;
    if (start + count > context_) fail(kFailed, "the context is full");
    auto ids = from_blob(const_cast<int64_t*>(tokens),
                         {1, static_cast<executorch::aten::SizesType>(count)},
                         executorch::aten::ScalarType::Long);
    auto place = from_blob(&start, {1}, executorch::aten::ScalarType::Long);
    auto outputs = module_->execute("forward", {ids, place});
    if (!outputs.ok()) {
      fail(kFailed, "ExecuTorch: error " + std::to_string(static_cast<int>(outputs.error())));
    }
    const auto& logits = outputs->at(0).toTensor();
    logits_ = logits.const_data_ptr<float>() + logits.numel() - vocab_;
    looked_up_ += count;
    if (file_ && looked_up_ >= kTokensPerRelease) {
      file_->release_constants();
      looked_up_ = 0;
    }
    return likeliest(0);
  }

  // The likeliest token after the last position of the last step, or so many positions `before` it.
  int64_t likeliest(int64_t before) const {
    return argmax(logits_ - before * vocab_, vocab_);
  }

  // The same in pieces of at most `chunk` tokens, and of no more than the program takes.
  int64_t read(const int64_t* tokens, int64_t count, int64_t start, int64_t chunk) {
    chunk = std::min(chunk, longest_);
    int64_t token = 0;
    for (int64_t done = 0; done < count; done += chunk) {
      token = step(tokens + done, std::min(chunk, count - done), start + done);
    }
    return token;
  }

  // Of the last position.
  const float* logits() const { return logits_; }

 private:
  // Logits are [1, vocab] or [1, rows, vocab].
  static int64_t rows_of(const executorch::runtime::MethodMeta& meta) {
    const auto output = meta.output_tensor_meta(0);
    return output.ok() && output->sizes().size() == 3 ? output->sizes()[1] : 1;
  }

  static void check(Error error, const std::string& path) {
    if (error == Error::Ok) return;
    if (error == Error::OperatorMissing) {
      fail(kCannotLoad, path + ": needs operators that this runner does not have: " +
               missing_operators);
    }
    fail(kCannotLoad, path + ": ExecuTorch cannot load it, error " +
             std::to_string(static_cast<int>(error)));
  }

  int64_t constant(const std::string& method) {
    auto value = module_->execute(method);
    if (!value.ok()) fail(kCannotLoad, "the program has no " + method);
    return value->at(0).toInt();
  }

  // Released after the module that uses it.
  std::unique_ptr<PlannedMemory> memory_;
  std::unique_ptr<Module> module_;
  // The module's own, null where the program is read.
  const MappedFile* file_ = nullptr;
  int64_t context_ = 0, vocab_ = 0, longest_ = 0, rows_ = 1, looked_up_ = 0;
  const float* logits_ = nullptr;
};

} // namespace mobilellm
