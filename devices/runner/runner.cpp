// Runs prefill and decode of an ExecuTorch program and prints one JSON line for each phase.
//
//   mobilellm_runner --model model.pte --tokens tokens.txt --prompts 64,512 --depths 0,512
//
// Linked against the libraries of the executorch wheel only; it knows no tokenizer and no torch.
// The program's method is forward(tokens [1, n] int64, start [1] int64) -> logits [1, vocab],
// with core operators, delegates of the wheel and the operators of attention.cpp.
// devices/runner/README.md lists the options and the lines. Exit codes: 0 fine, 2 wrong usage, 3 the program cannot be loaded, 4 it failed.

#include "argmax.h"

#include <executorch/devtools/etdump/etdump_flatcc.h>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/platform/platform.h>

#include <algorithm>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "huge_pages.h"
#include "loader.h"
#include "packed_cache.h"
#include "speculative.h"

// The wheel ships this library without its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
} // namespace executorch::extension::threadpool

using executorch::extension::Module;
using executorch::runtime::Error;

namespace {

constexpr int kBadUsage = 2, kCannotLoad = 3, kFailed = 4;
// Longer prompts are read in pieces, so that what a delegate needs for one stays bounded.
constexpr int64_t kDefaultChunk = 128;

[[noreturn]] void fail(int code, const std::string& reason) {
  std::fprintf(stderr, "mobilellm_runner: %s\n", reason.c_str());
  std::exit(code);
}

// The operators that a program needs and that nothing here has. ExecuTorch tells their names only
// in what it logs.
std::string missing_operators;

void log_message(et_timestamp_t, et_pal_log_level_t level, const char* file, const char*,
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

double now_ms() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

class Options {
 public:
  Options(int argc, char** argv) {
    static const char* known[] = {
        "model", "tokens", "threads", "warmup", "prompts", "depths", "steps", "chunk", "sustained",
        "sustained-steps", "generate", "prompt-length", "logits", "trace", "load",
        "packed-cache", "unfilled", "draft", "draft-tokens", "huge-pages"};
    for (int i = 1; i < argc; i += 2) {
      const std::string key = argv[i];
      const bool named = key.rfind("--", 0) == 0 &&
          std::any_of(std::begin(known), std::end(known), [&](const char* k) {
                           return key.substr(2) == k;
                         });
      if (!named) fail(kBadUsage, "unknown option " + key);
      if (i + 1 == argc) fail(kBadUsage, key + " wants a value");
      values_[key.substr(2)] = argv[i + 1];
    }
  }

  bool has(const std::string& key) const { return values_.count(key) != 0; }

  std::string text(const std::string& key) const {
    if (!has(key)) fail(kBadUsage, "--" + key + " is missing");
    return values_.at(key);
  }

  int64_t number(const std::string& key, int64_t otherwise) const {
    return has(key) ? parse(key, values_.at(key)) : otherwise;
  }

  std::vector<int64_t> numbers(const std::string& key) const {
    std::vector<int64_t> found;
    std::stringstream list(has(key) ? values_.at(key) : "");
    for (std::string item; std::getline(list, item, ',');) found.push_back(parse(key, item));
    return found;
  }

 private:
  static int64_t parse(const std::string& key, const std::string& text) {
    char* end = nullptr;
    const long long value = std::strtoll(text.c_str(), &end, 10);
    if (text.empty() || *end != '\0' || value < 0) {
      fail(kBadUsage, "--" + key + ": " + text + " is not a whole number");
    }
    return value;
  }

  std::map<std::string, std::string> values_;
};

// ---- Memory of this process, in bytes; -1 where the system does not tell. ----

int64_t kilobytes_of(const char* file, const std::string& key) {
  std::ifstream stream(file);
  for (std::string line; std::getline(stream, line);) {
    if (line.rfind(key, 0) == 0) return 1024 * std::atoll(line.c_str() + key.size());
  }
  return -1;
}

// From here on VmHWM counts anew, so that every phase has a peak of its own.
void reset_peak() {
  std::ofstream("/proc/self/clear_refs") << "5";
}

std::string memory_json() {
  char text[320];
  std::snprintf(
      text, sizeof text,
      "{\"peak_rss\":%" PRId64 ",\"rss\":%" PRId64 ",\"anonymous\":%" PRId64 ",\"file\":%" PRId64
      ",\"pss\":%" PRId64 "}",
      kilobytes_of("/proc/self/status", "VmHWM:"), kilobytes_of("/proc/self/status", "VmRSS:"),
      kilobytes_of("/proc/self/status", "RssAnon:"), kilobytes_of("/proc/self/status", "RssFile:"),
      kilobytes_of("/proc/self/smaps_rollup", "Pss:"));
  return text;
}

std::string list_json(const std::vector<double>& values) {
  std::string text = "[";
  char number[32];
  for (size_t i = 0; i < values.size(); ++i) {
    std::snprintf(number, sizeof number, i ? ",%.4f" : "%.4f", values[i]);
    text += number;
  }
  return text + "]";
}

// One finished phase: its extra keys as JSON text, and its raw samples in milliseconds.
void print_phase(const char* name, const std::string& keys, const std::vector<double>& ms) {
  std::printf("{\"phase\":\"%s\",%s\"ms\":%s,\"memory\":%s}\n", name, keys.c_str(),
              list_json(ms).c_str(), memory_json().c_str());
  std::fflush(stdout);
  reset_peak();
}

// ---- The model. ----

// The steps after which the rows that they looked up are given back. Each costs two page faults
// when it is read again; all of them together would be the whole table.
constexpr int64_t kTokensPerRelease = 64;

class Model {
 public:
  // `mapped` or read. `packed` is the file for XNNPACK's packed weights, null for none.
  Model(const std::string& path, bool mapped, mobilellm::PackedCache* packed,
        std::unique_ptr<executorch::runtime::EventTracer> tracer) {
    if (mapped) {
      auto file = mobilellm::MappedFile::open(path);
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
    memory_ = std::make_unique<mobilellm::PlannedMemory>(meta.get());
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
    return mobilellm::argmax(logits_ - before * vocab_, vocab_);
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
  std::unique_ptr<mobilellm::PlannedMemory> memory_;
  std::unique_ptr<Module> module_;
  // The module's own, null where the program is read.
  const mobilellm::MappedFile* file_ = nullptr;
  int64_t context_ = 0, vocab_ = 0, longest_ = 0, rows_ = 1, looked_up_ = 0;
  const float* logits_ = nullptr;
};

// ---- The phases. ----

std::vector<int64_t> read_tokens(const std::string& path, int64_t vocab) {
  std::ifstream stream(path);
  if (!stream) fail(kBadUsage, path + ": cannot be opened");
  std::vector<int64_t> tokens;
  for (int64_t token; stream >> token;) {
    if (token < 0 || token >= vocab) {
      fail(kBadUsage, path + ": " + std::to_string(token) + " is no token of this model");
    }
    tokens.push_back(token);
  }
  if (!stream.eof() || tokens.empty()) fail(kBadUsage, path + ": is not a list of tokens");
  return tokens;
}

// `count` tokens, the text from its start again where it is too short.
std::vector<int64_t> text_of(const std::vector<int64_t>& tokens, int64_t count) {
  std::vector<int64_t> text(count);
  for (int64_t i = 0; i < count; ++i) text[i] = tokens[i % tokens.size()];
  return text;
}

void measure_prefill(Model& model, const std::vector<int64_t>& tokens, int64_t length,
                     int64_t chunk) {
  const auto text = text_of(tokens, length);
  const double started = now_ms();
  model.read(text.data(), length, 0, chunk);
  const double took = now_ms() - started;
  print_phase("prefill", "\"tokens\":" + std::to_string(length) + ",", {took});
}

// Fills the cache up to each depth, in ascending order, and times every step from there. An
// `unfilled` cache is left as it is, zeros: a step then executes the same, which is counted
// without the hours that filling takes under emulation.
void measure_decode(Model& model, const std::vector<int64_t>& tokens,
                    std::vector<int64_t> depths, int64_t steps, int64_t chunk, bool unfilled) {
  std::sort(depths.begin(), depths.end());
  int64_t filled = 0;
  for (const int64_t depth : depths) {
    const auto text = text_of(tokens, depth + 1);
    const int64_t missing = unfilled ? 0 : depth - filled;
    const double before = now_ms();
    if (missing) model.read(text.data() + filled, missing, filled, chunk);
    const double fill_ms = now_ms() - before;
    filled = depth;
    std::vector<double> ms;
    int64_t token = text[depth];
    for (int64_t i = 0; i < steps; ++i) {
      const double started = now_ms();
      token = model.step(&token, 1, depth + i);
      ms.push_back(now_ms() - started);
    }
    print_phase("decode",
                "\"depth\":" + std::to_string(depth) + ",\"filled\":" + std::to_string(missing) +
                    ",\"fill_ms\":" + std::to_string(fill_ms) + ",",
                ms);
  }
}

// Decodes without pause, for so many seconds and so many steps; a full cache is begun anew.
void measure_sustained(Model& model, const std::vector<int64_t>& tokens, double seconds,
                       size_t steps) {
  std::vector<double> ms;
  int64_t token = tokens[0], position = 0;
  for (const double end = now_ms() + 1000 * seconds; now_ms() < end || ms.size() < steps;) {
    if (position == model.context()) position = 0;
    const double started = now_ms();
    token = model.step(&token, 1, position++);
    ms.push_back(now_ms() - started);
  }
  print_phase("sustained", "", ms);
}

// Greedy tokens, and on request the logits behind each: float32 [count, vocab].
void generate(Model& model, const std::vector<int64_t>& prompt, int64_t count,
              const std::string& logits_path) {
  FILE* file = logits_path.empty() ? nullptr : std::fopen(logits_path.c_str(), "wb");
  if (!logits_path.empty() && !file) fail(kBadUsage, logits_path + ": cannot be written");
  std::string list;
  std::vector<double> ms;
  int64_t position = 0, token = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double started = now_ms();
    token = i ? model.step(&token, 1, position) : model.read(prompt.data(), prompt.size(), 0, prompt.size());
    ms.push_back(now_ms() - started);
    position += i ? 1 : prompt.size();
    list += (i ? "," : "") + std::to_string(token);
    const size_t vocab = model.vocab();
    if (file && std::fwrite(model.logits(), sizeof(float), vocab, file) != vocab) {
      fail(kFailed, logits_path + ": cannot be written");
    }
  }
  if (file && std::fclose(file)) fail(kFailed, logits_path + ": cannot be written");
  print_phase("generate", "\"tokens\":[" + list + "],", ms);
}

mobilellm::Reader reader_of(Model& model, int64_t chunk) {
  return [&model, chunk](const int64_t* tokens, int64_t count, int64_t start, int64_t rows) {
    mobilellm::Tokens likeliest(rows);
    likeliest[rows - 1] = model.read(tokens, count, start, std::max(chunk, rows));
    for (int64_t i = 0; i + 1 < rows; ++i) likeliest[i] = model.likeliest(rows - 1 - i);
    return likeliest;
  };
}

// The same greedy tokens, which a draft proposes: a smaller program, or `lookup`. `ms` has one value
// for each call of the model, of which `draft_ms` was the draft's.
void generate_with_draft(Model& model, const std::vector<int64_t>& prompt, int64_t count,
                         const std::string& draft, int64_t most, int64_t chunk,
                         bool mapped) {
  if (most < 1) fail(kBadUsage, "--draft-tokens: give 1 or more");
  if (most >= model.rows()) {
    fail(kBadUsage, "--draft-tokens " + std::to_string(most) + ": the program gives the logits of " +
             std::to_string(model.rows()) + " positions; lower it with logits=" +
             std::to_string(most + 1));
  }
  std::unique_ptr<Model> small;
  if (draft != "lookup") {
    small = std::make_unique<Model>(draft, mapped, nullptr, nullptr);
    if (small->vocab() != model.vocab()) {
      fail(kBadUsage, draft + ": has " + std::to_string(small->vocab()) + " tokens, the model " +
               std::to_string(model.vocab()));
    }
  }
  const auto made = mobilellm::speculate(
      prompt, count, most, model.context(), reader_of(model, chunk),
      small ? mobilellm::draft_model(reader_of(*small, chunk), small->context())
            : mobilellm::draft_lookup());
  std::string list;
  for (const int64_t token : made.tokens) list += (list.empty() ? "" : ",") + std::to_string(token);
  print_phase("generate",
              "\"tokens\":[" + list + "],\"drafted\":" + std::to_string(made.drafted) +
                  ",\"accepted\":" + std::to_string(made.accepted) + ",\"calls\":" +
                  std::to_string(made.ms.size()) + ",\"draft_ms\":" + list_json(made.draft_ms) + ",",
              made.ms);
}

void write_etdump(executorch::etdump::ETDumpGen& tracer, const std::string& path) {
  const auto dump = tracer.get_etdump_data();
  FILE* file = std::fopen(path.c_str(), "wb");
  if (!file || std::fwrite(dump.buf, 1, dump.size, file) != dump.size || std::fclose(file)) {
    fail(kFailed, path + ": cannot be written");
  }
  std::free(dump.buf);
}

} // namespace

int main(int argc, char** argv) {
  using executorch::runtime::PalImpl;
  executorch::runtime::register_pal(PalImpl::create(log_message, __FILE__));
  const Options options(argc, argv);
  const int64_t threads = options.number("threads", 1);
  if (threads < 1) fail(kBadUsage, "--threads: give 1 or more");
  executorch::extension::threadpool::get_threadpool()->_unsafe_reset_threadpool(threads);

  std::unique_ptr<executorch::etdump::ETDumpGen> tracer;
  if (options.has("trace")) tracer = std::make_unique<executorch::etdump::ETDumpGen>();
  executorch::etdump::ETDumpGen* const dump = tracer.get();
  const std::string load = options.has("load") ? options.text("load") : "mmap";
  if (load != "mmap" && load != "file") fail(kBadUsage, "--load: give mmap or file");

  const bool packs = options.has("packed-cache");
  if (packs && load != "mmap") fail(kBadUsage, "--packed-cache: needs --load mmap");

  reset_peak();
  print_phase("start", "", {});
  const double started = now_ms();
  std::unique_ptr<mobilellm::PackedCache> packed;
  if (packs) {
    packed = std::make_unique<mobilellm::PackedCache>(options.text("packed-cache"),
                                                      options.text("model"));
    if (!packed->problem().empty()) fail(kCannotLoad, packed->problem());
  }
  const bool mapped = load == "mmap";
  Model model(options.text("model"), mapped, packed.get(), std::move(tracer));
  if (packed) packed->publish();
  if (packed && !packed->problem().empty()) fail(kCannotLoad, packed->problem());
  if (options.number("huge-pages", 1)) mobilellm::collapse_pages();
  const double took = now_ms() - started;
  const std::string packing =
      packed ? std::string("\"packed\":\"") + (packed->fits() ? "read" : "written") + "\"," : "";
  print_phase("load",
              "\"context\":" + std::to_string(model.context()) +
                  ",\"vocab_size\":" + std::to_string(model.vocab()) + "," + packing,
              {took});

  const auto tokens = read_tokens(options.text("tokens"), model.vocab());
  if (const int64_t warmup = options.number("warmup", 0)) {
    std::vector<double> ms;
    for (int64_t i = 0; i < warmup; ++i) {
      const double began = now_ms();
      model.step(tokens.data(), 1, 0);
      ms.push_back(now_ms() - began);
    }
    print_phase("warmup", "", ms);
  }
  const int64_t chunk = std::max<int64_t>(1, options.number("chunk", kDefaultChunk));
  for (const int64_t length : options.numbers("prompts")) {
    measure_prefill(model, tokens, length, chunk);
  }
  measure_decode(model, tokens, options.numbers("depths"), options.number("steps", 32), chunk,
                 options.number("unfilled", 0) != 0);
  const int64_t seconds = options.number("sustained", 0);
  const int64_t sustained = options.number("sustained-steps", 0);
  if (seconds || sustained) {
    measure_sustained(model, tokens, static_cast<double>(seconds), sustained);
  }
  if (const int64_t count = options.number("generate", 0)) {
    const int64_t length = options.number("prompt-length", tokens.size());
    const auto prompt = text_of(tokens, length);
    if (options.has("draft")) {
      if (options.has("logits")) fail(kBadUsage, "--logits: not with --draft");
      generate_with_draft(model, prompt, count, options.text("draft"),
                          options.number("draft-tokens", 4), chunk, mapped);
    } else {
      generate(model, prompt, count, options.has("logits") ? options.text("logits") : "");
    }
  }
  if (dump) write_etdump(*dump, options.text("trace"));
  std::printf("{\"phase\":\"end\"}\n");
  return 0;
}
