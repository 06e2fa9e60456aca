// Runs prefill and decode of an ExecuTorch program and prints one JSON line for each phase.
//
//   mobilellm_runner --model model.pte --tokens tokens.txt --prompts 64,512 --depths 0,512
//
// Linked against the libraries of the executorch wheel only; it knows no tokenizer and no torch.
// The program's method is forward(tokens [1, n] int64, start [1] int64) -> logits [1, vocab],
// with core operators, delegates of the wheel and the operators of attention.cpp.
// devices/runner/README.md lists the options and the lines. Exit codes: 0 fine, 2 wrong usage, 3 the
// program cannot be loaded, 4 it failed.

#include <executorch/devtools/etdump/etdump_flatcc.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "clock.h"
#include "huge_pages.h"
#include "model.h"
#include "options.h"
#include "packed_cache.h"
#include "speculative.h"
#include "threads.h"

namespace {

using namespace mobilellm;  // the parts of this runner

// Longer prompts are read in pieces, so that what a delegate needs for one stays bounded.
constexpr int64_t kDefaultChunk = 128;

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
    token = i ? model.step(&token, 1, position)
              : model.read(prompt.data(), prompt.size(), 0, prompt.size());
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

Reader reader_of(Model& model, int64_t chunk) {
  return [&model, chunk](const int64_t* tokens, int64_t count, int64_t start, int64_t rows) {
    Tokens likeliest(rows);
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
  const auto made = speculate(
      prompt, count, most, model.context(), reader_of(model, chunk),
      small ? draft_model(reader_of(*small, chunk), small->context())
            : draft_lookup());
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
  set_threads(threads);

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
  std::unique_ptr<PackedCache> packed;
  if (packs) {
    packed = std::make_unique<PackedCache>(options.text("packed-cache"),
                                                      options.text("model"));
    if (!packed->problem().empty()) fail(kCannotLoad, packed->problem());
  }
  const bool mapped = load == "mmap";
  Model model(options.text("model"), mapped, packed.get(), std::move(tracer));
  if (packed) packed->publish();
  if (packed && !packed->problem().empty()) fail(kCannotLoad, packed->problem());
  if (options.number("huge-pages", 1)) collapse_pages();
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
