// The options of the command line, and how the runner ends where it cannot go on.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

namespace mobilellm {

// Exit codes.
constexpr int kBadUsage = 2, kCannotLoad = 3, kFailed = 4;

[[noreturn]] inline void fail(int code, const std::string& reason) {
  std::fprintf(stderr, "mobilellm_runner: %s\n", reason.c_str());
  std::exit(code);
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

} // namespace mobilellm
