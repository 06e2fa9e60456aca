// Greedy speculative decoding (see speculative.h). It knows nothing of ExecuTorch.

#include "speculative.h"

#include <algorithm>

#include "clock.h"

namespace mobilellm {
namespace {

// How many tokens both begin with.
int64_t common(const Tokens& one, const Tokens& other) {
  const size_t shorter = std::min(one.size(), other.size());
  return std::mismatch(one.begin(), one.begin() + shorter, other.begin()).first - one.begin();
}

} // namespace

Speculation speculate(const Tokens& prompt, int64_t count, int64_t most, int64_t context,
                      const Reader& model, const Draft& draft) {
  Speculation result;
  if (count < 1) return result;
  double started = now_ms();
  Tokens text = prompt;
  text.push_back(model(prompt.data(), prompt.size(), 0, 1)[0]);
  result.ms.push_back(now_ms() - started);
  result.draft_ms.push_back(0);
  const int64_t end = prompt.size() + count;
  while (static_cast<int64_t>(text.size()) < end) {
    started = now_ms();
    // The model has read all but the last token. It reads that one and the proposals, which must
    // fit into the context, and writes one token more than it accepts.
    const int64_t length = text.size(), position = length - 1;
    const int64_t room = std::min({most, end - length - 1, context - length});
    const Tokens proposed = room > 0 ? draft(text, room) : Tokens();
    result.draft_ms.push_back(now_ms() - started);
    Tokens read = {text.back()};
    read.insert(read.end(), proposed.begin(), proposed.end());
    const Tokens next = model(read.data(), read.size(), position, read.size());
    const int64_t accepted = common(next, proposed);
    text.insert(text.end(), next.begin(), next.begin() + accepted + 1);
    result.drafted += proposed.size();
    result.accepted += accepted;
    result.ms.push_back(now_ms() - started);
  }
  result.tokens.assign(text.begin() + prompt.size(), text.end());
  return result;
}

Draft draft_model(Reader model, int64_t context) {
  return [model, context, seen = Tokens()](const Tokens& text, int64_t most) mutable {
    const int64_t length = text.size();
    Tokens proposed;
    // The last proposal is not read.
    most = std::min(most, context - length + 1);
    if (most < 1) return proposed;
    const int64_t known = std::min(common(seen, text), length - 1);
    seen = text;
    int64_t token = model(text.data() + known, length - known, known, 1)[0];
    proposed.push_back(token);
    while (static_cast<int64_t>(proposed.size()) < most) {
      const int64_t position = seen.size();
      seen.push_back(token);
      token = model(&token, 1, position, 1)[0];
      proposed.push_back(token);
    }
    return proposed;
  };
}

Draft draft_lookup() {
  return [](const Tokens& text, int64_t most) {
    const int64_t length = text.size();
    for (const int64_t size : {3, 2}) {
      for (int64_t first = length - size - 1; first >= 0; --first) {
        const auto place = text.begin() + first;
        if (!std::equal(place, place + size, text.end() - size)) continue;
        const int64_t found = std::min(most, length - first - size);
        return Tokens(place + size, place + size + found);
      }
    }
    return Tokens();
  };
}

} // namespace mobilellm
